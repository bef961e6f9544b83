"""Judges of answers: what every one must satisfy, what people and simulated annotators say, and a faulty endpoint."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_judges import Server, question

from prefzoo import worlds
from prefzoo.benchmarks.judging import Answers, JudgeSpec, PairJudge, ScoreJudge, Verdicts, make_judge
from prefzoo.benchmarks.judging.people import HumanJudge, export_for_humans, read_labelled
from prefzoo.benchmarks.judging.quality import measure
from prefzoo.benchmarks.statistics import agreement, win
from prefzoo.cli import main
from prefzoo.models.load import learn_tokenizer, save_policy, tiny_model
from prefzoo.models.roles import Policy
from prefzoo.registry import RunError, UsageError
from prefzoo.seeds import generator

ROWS = [{"prompt": f"question {p}", "answer": str(p)} for p in range(6)]


def answers(tell: Callable[[int, int], str], per_prompt: int = 2) -> Answers:
    texts = [tell(p, k) for p in range(len(ROWS)) for k in range(per_prompt)]
    return Answers(ROWS, per_prompt, texts, np.ones(len(texts), dtype=bool))


def judge_of(written: Any, tmp_path: Path, **given: Any) -> Any:
    return make_judge(JudgeSpec.model_validate(written), cache=tmp_path / "cache", **given)


MINE, THEIRS = answers(lambda p, k: "long " * (p + k + 1)), answers(lambda p, k: "short " * (3 if p else 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model, to be asked."""
    words = learn_tokenizer(["question the answers of a judge: long short A B"], 300)
    return save_policy(Policy(tiny_model(words, seed=3)), words, tmp_path_factory.mktemp("judge") / "model")


@pytest.fixture(scope="module")
def world() -> Any:
    return worlds.make("requests", seed=0)


def worldly(world: Any, count: int) -> tuple[Answers, Answers]:
    """The best answers, and what a careless demonstrator writes."""
    rows = world.prompts("test", count, unique=True)
    best = [world.oracle(r["request"]) for r in rows]
    other = [f"what a great question ! you are so wise ! {t.rpartition(' . ')[0]} ." for t in best]
    ended = np.ones(count, dtype=bool)
    return Answers(rows, 1, best, ended), Answers(rows, 1, other, ended)


# ------------------------------------------------------------------------------------------------ relations of all


def pair_judges(folder: Path, tmp_path: Path, world: Any) -> dict[str, tuple[PairJudge, Answers, Answers]]:
    sheet = tmp_path / "sheet.csv"
    rows = [(ROWS[b // 2]["prompt"], x, y, "12 0"[b % 4]) for b, (x, y) in enumerate(zip(MINE.texts, THEIRS.texts))]  # noqa: B905
    with sheet.open("w", newline="") as opened:
        csv.writer(opened).writerows([("prompt", "answer_a", "answer_b", "verdict"), *rows])
    pool = {"annotators": {"pool": ["flattery", "length"], "seed": 5}}
    return {
        "llm": (judge_of({"llm": {"model": str(folder)}}, tmp_path), MINE, THEIRS),
        "human": (judge_of({"human": str(sheet)}, tmp_path), MINE, THEIRS),
        "annotators": (judge_of(pool, tmp_path, world=world), *worldly(world, 12)),
    }


@pytest.mark.parametrize("kind", ["llm", "human", "annotators"])
def test_swapping_the_sides_turns_every_verdict_round_and_equal_texts_are_ties(
    kind: str, folder: Path, tmp_path: Path, world: Any
) -> None:
    judge, mine, theirs = pair_judges(folder, tmp_path, world)[kind]
    there, back = judge.compare(mine, theirs), judge.compare(theirs, mine)
    np.testing.assert_allclose(there.forward_B, 1 - back.backward_B, atol=1e-6, equal_nan=True)
    np.testing.assert_allclose(there.y(), 1 - back.y(), atol=1e-6)
    np.testing.assert_allclose(there.y(0.0), 1 - back.y(1.0), atol=1e-6)
    assert not np.allclose(there.y(), 0.5)  # else nothing was shown
    same = judge.compare(mine, mine)
    assert same.y().tolist() == same.forward_B.tolist() == same.backward_B.tolist() == [0.5] * len(mine.texts)


def test_verdicts_average_both_orders_and_unparsed_counts_what_is_asked_for() -> None:
    said = Verdicts(np.array([1.0, 0.5, math.nan, math.nan]), np.array([0.0, 1.0, 1.0, math.nan]))
    assert said.y().tolist() == [0.5, 0.75, 0.75, 0.5]
    assert said.y(0.0).tolist() == [0.5, 0.75, 0.5, 0.0] and said.y(1.0).tolist() == [0.5, 0.75, 1.0, 1.0]


# ------------------------------------------------------------------------------------------------ how they are written


def test_a_judge_is_written_in_a_word_or_with_its_options() -> None:
    facts = {
        ("gold", "gold", True, False, ()), ("reward_model", "proxy", True, False, ("reward_model",)),
        ("held_out", "held_out", False, False, ("held_out",)), ("exact", "exact", True, False, ()),
    }  # fmt: skip
    for word, name, builtin, pairs, needs in facts:
        spec = JudgeSpec.model_validate(word)
        assert (spec.name, spec.builtin, spec.pairs, spec.needs) == (name, builtin, pairs, needs)
    spec = JudgeSpec.model_validate({"llm": {"model": "org/big", "endpoint": "http://localhost"}, "name": "mine"})
    assert spec.pairs and spec.name == "mine" and JudgeSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert JudgeSpec.parse("numeric").kind == "verifier" and JudgeSpec.parse("length").kind == "rule"


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("glod", "did you mean 'gold'"),
        ({"verifier": None}, "needs a value, such as {verifier: numeric}"),
        ({"llm": {"modle": "x"}}, "no key 'modle'; did you mean 'model'"),
        ({"llm": {"model": "x", "max_cost": 1.0}}, "price_per_million"),
        ({"llm": {"model": "x", "template": "pair_reasoned"}}, "only an endpoint"),
        ({"annotators": {"pool": ["flatery"]}}, "flattery"),
        ({"annotators": {"pool": ["none"], "noise": 0.6}}, "less than or equal to 0.5"),
        ({"rule": "lenght"}, "did you mean 'length'"),
        ({"human": "nowhere.csv"}, "no such file"),
        ({"gold": None, "exact": None}, "a judge is one of"),
    ],
)
def test_a_judge_that_is_written_wrong_is_refused_with_the_cure(written: Any, told: str) -> None:
    with pytest.raises(UsageError) as error:
        JudgeSpec.parse(json.dumps(written))
    assert told in str(error.value)


def test_other_questions_have_another_key_and_another_way_to_ask_has_not(tmp_path: Path) -> None:
    template = tmp_path / "t.txt"
    template.write_text("{prompt} {first} {second}")
    told = {"model": "m", "endpoint": "http://localhost", "template": str(template)}

    def key(**changes: Any) -> Any:
        spec = JudgeSpec.model_validate({"llm": told | changes, "name": "j"})
        return json.dumps([spec.in_key(), spec.sources()], sort_keys=True)

    before = key()
    assert before == key(timeout=1.0, retries=0, max_calls=3, key_env="K", concurrency=1)
    assert len({before, key(model="n"), key(criterion="short"), key(template="pair")}) == 4
    template.write_text("{prompt} {first} or {second}")
    assert key() != before


# ------------------------------------------------------------------------------------------------ scores


def test_scores_are_those_of_the_world_and_of_the_text(tmp_path: Path, world: Any) -> None:
    best, other = worldly(world, 8)
    gold = judge_of("gold", tmp_path, world=world)
    assert isinstance(gold, ScoreJudge) and gold.score(best).tolist() == [10.0] * 8
    assert (gold.score(other) < 10).all()
    length = judge_of({"rule": "length"}, tmp_path)
    assert length.score(MINE).tolist() == [len(t) for t in MINE.texts]
    with pytest.raises(UsageError, match="this task has none"):
        judge_of("gold", tmp_path)


def test_a_verifier_reads_columns_and_a_missing_score_names_the_row(tmp_path: Path) -> None:
    words = learn_tokenizer(["question 0 1 2 3 4 5 6 answer"], 300)
    told = [f"answer {p if p < 4 else 7}" for p in range(6)]
    judge = judge_of({"verifier": "numeric"}, tmp_path)
    assert judge.score(Answers.of_texts(ROWS, told, words)).tolist() == [1, 1, 1, 1, 0, 0]
    rows = [*ROWS[:3], {"prompt": "question 3", "answer": "nothing"}]
    with pytest.raises(UsageError, match=r"no score for 1 of 4 answers, the first to prompt 3 \('question 3'\)"):
        judge.score(Answers.of_texts(rows, told[:4], words))
    with pytest.raises(UsageError, match="there is no tokenizer"):
        judge.score(MINE)


# ------------------------------------------------------------------------------------------------ language models


def told_model(server: Server, **options: Any) -> dict[str, Any]:
    return {"llm": {"endpoint": server.url, "model": "m", "retries": 0, "timeout": 5.0, **options}}


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The two answers that a question shows."""
    parts = question(body).split("\n== ")
    return parts[2].partition("\n")[2], parts[3].partition("\n")[2]


def longer_wins(number: int, body: dict[str, Any]) -> str:
    first, second = shown(body)
    return "A" if len(first) > len(second) else "B"


def test_both_orders_are_asked_and_a_bias_for_a_place_cancels(tmp_path: Path) -> None:
    with Server(longer_wins) as fair, Server(lambda number, body: "A") as biased:
        said = judge_of(told_model(fair), tmp_path).compare(MINE, THEIRS)
        longer = win(*(np.array([len(t.strip()) for t in side.texts]) for side in (MINE, THEIRS)))
        differ = np.array([x != y for x, y in zip(MINE.texts, THEIRS.texts, strict=True)])
        assert said.y()[longer != 0.5].tolist() == longer[longer != 0.5].tolist()
        assert said.spent["asked"] == 2 * differ.sum() and said.spent["unparsed"] == said.spent["failed"] == 0
        always = judge_of(told_model(biased), tmp_path).compare(MINE, THEIRS)
        assert (always.forward_B[differ] == 1).all() and (always.backward_B[differ] == 0).all()
        assert (always.y() == 0.5).all()


def test_judgements_are_paid_once_by_all_who_share_the_cache(tmp_path: Path) -> None:
    with Server(longer_wins) as server:
        first = judge_of(told_model(server), tmp_path).compare(MINE, THEIRS)
        calls = len(server.requests)
        again = judge_of(told_model(server, timeout=1.0), tmp_path).compare(THEIRS, MINE)
        assert len(server.requests) == calls == first.spent["calls"] and again.spent["calls"] == 0
        assert again.spent["cached"] == calls and first.spent["prompt_tokens"] == 7 * calls


def test_a_limit_of_costs_stops_in_words_and_loses_nothing(tmp_path: Path) -> None:
    price = {"price_per_million": (2.0, 3.0), "concurrency": 1}  # 20e-6 a question
    with Server(longer_wins) as server:
        whole = judge_of(told_model(server, **price), tmp_path / "other").compare(MINE, THEIRS)
        needed = len(server.requests)
        assert whole.spent["cost"] == pytest.approx(20e-6 * needed)
        with pytest.raises(RunError, match="max_cost=6e-05 is reached"):
            judge_of(told_model(server, max_cost=60e-6, **price), tmp_path).compare(MINE, THEIRS)
        assert len(server.requests) == needed + 3
        after = judge_of(told_model(server, max_cost=1.0, **price), tmp_path).compare(MINE, THEIRS)
        assert len(server.requests) == 2 * needed and after.y().tolist() == whole.y().tolist()


def faulty(number: int, body: dict[str, Any]) -> Any:
    """Of every six answers one is nonsense, one half JSON, one an error, one too slow, and two are verdicts."""
    first, _ = shown(body)
    kind = len(first) % 6
    if kind == 3:
        time.sleep(1.2)
    return ["both are fine", '{"winner": "A', (500, b"oops", {}), "A", '{"winner": "A"}', "A"][kind]


def test_a_faulty_endpoint_costs_the_verdicts_it_does_not_give_and_none_is_guessed(tmp_path: Path) -> None:
    mine = answers(lambda p, k: "x" * (2 * p + k + 1))
    theirs = answers(lambda p, k: "y" * 40)
    with Server(faulty) as server:
        said = judge_of(told_model(server, timeout=0.6), tmp_path).compare(mine, theirs)
    lengths = np.array([len(t) for t in mine.texts])
    assert np.isnan(said.forward_B).tolist() == (lengths % 6 < 4).tolist()
    assert (said.forward_B[lengths % 6 >= 4] == 1.0).all()
    assert (said.backward_B == 0.0).all()  # 40 % 6 == 4: the one that stands first wins
    assert said.spent["failed"] == (np.isin(lengths % 6, (2, 3))).sum()
    assert said.spent["unparsed"] == (np.isin(lengths % 6, (0, 1))).sum()


@pytest.mark.parametrize("reply", [(500, b"oops", {}), b"<html>", b'{"choices": [{"mess'])
def test_an_endpoint_that_answers_nothing_stops_the_judgement(reply: Any, tmp_path: Path) -> None:
    with Server(lambda number, body: reply) as server, pytest.raises(RunError, match="was answered by"):
        judge_of(told_model(server), tmp_path).compare(MINE, THEIRS)


def test_an_endpoint_that_refuses_says_where_its_key_is_read(tmp_path: Path) -> None:
    with Server(lambda number, body: (401, b"no", {})) as server, pytest.raises(UsageError, match="MY_KEY"):
        judge_of(told_model(server, key_env="MY_KEY"), tmp_path).compare(MINE, THEIRS)


def test_a_template_of_ones_own_asks_in_its_words_and_reads_columns(tmp_path: Path) -> None:
    template = tmp_path / "mine.txt"
    template.write_text("{criterion}|{prompt}|{answer}|{first}|{second}")
    with Server(lambda number, body: "tie") as server:
        told = told_model(server, template=str(template), criterion="be short")
        assert (judge_of(told, tmp_path).compare(MINE, THEIRS).y() == 0.5).all()
        assert {question(r)[:21] for r in server.requests} >= {f"be short|question {p}|{p}" for p in range(6)}
    template.write_text("{prompt}")
    with pytest.raises(UsageError, match=r"the place \{first\} is missing"):
        judge_of(told, tmp_path)


# ------------------------------------------------------------------------------------------------ annotators


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_annotators_prefer_with_the_probability_of_their_utility_and_err_as_told(
    noise: float, tmp_path: Path, world: Any
) -> None:
    """P(label) = (1 - noise) p + noise (1 - p), p = σ(difference of utilities / temperature)."""
    best, other = worldly(world, 600)
    pool = {"annotators": {"pool": [{"bias": "flattery", "strength": 3.0, "temperature": 2.0}], "noise": noise}}
    said = judge_of(pool, tmp_path, world=world).compare(best, other)
    gap = [
        world.utility(r["request"], x, True, bias="flattery", strength=3.0)
        - world.utility(r["request"], y, True, bias="flattery", strength=3.0)
        for r, x, y in zip(best.rows, best.texts, other.texts, strict=True)
    ]
    p = 1 / (1 + np.exp(-np.array(gap) / 2.0))
    expected = (1 - noise) * p + noise * (1 - p)
    for labels in (said.forward_B, said.backward_B):
        assert set(labels) <= {0.0, 1.0}
        error = math.sqrt((expected * (1 - expected)).sum()) / len(p)
        assert abs(labels.mean() - expected.mean()) < 4 * error
    assert (said.forward_B != said.backward_B).any() and said.spent == {}


def test_a_pool_draws_each_annotator_as_often_and_its_agreement_with_the_truth_falls_with_noise(
    tmp_path: Path, world: Any
) -> None:
    best, other = worldly(world, 400)
    likes = {"pool": [{"bias": "none", "temperature": 0}, {"bias": "flattery", "strength": 99.0, "temperature": 0}]}
    said = judge_of({"annotators": {**likes, "noise": 0}}, tmp_path, world=world).compare(best, other)
    assert abs(said.forward_B.mean() - 0.5) < 0.1  # one annotator knows the truth, the other is always flattered
    kappas = []
    for noise in (0.0, 0.1, 0.25):
        honest = {"annotators": {"pool": likes["pool"][:1], "noise": noise}}
        labels = [judge_of({"annotators": {**honest["annotators"], "seed": s}}, tmp_path, world=world) for s in (1, 2)]
        one, two = (j.compare(best, other).forward_B for j in labels)
        kappas.append(agreement(np.stack([one, two], axis=1)).accuracy.estimate)
        assert one.mean() == pytest.approx(1 - noise, abs=0.09)
    assert kappas[0] == 1.0 and kappas[1] == pytest.approx(0.82, abs=0.08)  # (1 - e)² + e²
    assert kappas[2] == pytest.approx(0.625, abs=0.1)


def test_a_language_model_among_annotators_is_asked_about_its_own_comparisons_alone(tmp_path: Path, world: Any) -> None:
    best, other = worldly(world, 40)
    with Server(lambda number, body: "A" if number % 3 else "?") as server:
        llm = told_model(server)["llm"]
        pool = {"annotators": {"pool": ["none", {"llm": llm}], "noise": 0}}
        said = judge_of(pool, tmp_path, world=world).compare(best, other)
        assert 20 < len(server.requests) == said.spent["asked"] < 60  # of 80
        unread = np.isnan(said.forward_B).sum() + np.isnan(said.backward_B).sum()
        assert unread == said.spent["unparsed"] > 0


# ------------------------------------------------------------------------------------------------ people


def test_a_sheet_for_people_is_blind_and_comes_back_as_their_verdicts(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.csv"
    count = export_for_humans({"dpo": MINE, "start": THEIRS}, "start", sheet, seed=1)
    with sheet.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == count and set(rows[0]) == {"prompt", "answer_a", "answer_b", "verdict"}
    firsts = sum(row["answer_a"] in MINE.texts for row in rows)
    assert 0 < firsts < count and "dpo" not in sheet.read_text()
    assert [r["prompt"] for r in rows] != sorted(r["prompt"] for r in rows)
    for row in rows[1:]:  # people like what begins with an l; the first is left blank
        row["verdict"] = "A" if row["answer_a"].startswith("l") else "2"
    with sheet.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    said = judge_of({"human": str(sheet)}, tmp_path).compare(MINE, THEIRS)
    known = ~np.isnan(said.forward_B)
    assert (said.forward_B[known] == 1).all() and np.array_equal(said.forward_B, said.backward_B, equal_nan=True)
    blank = [(p // 2, t) for p, t in enumerate(MINE.texts) if not known[p]]
    assert said.spent["missing"] == len(blank) > 0 and len(set(blank)) == 1


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_several_people_are_averaged_in_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    rows = [
        {"question": "q", "a": "x", "b": "y", "annotator1": 1, "annotator2": 2, "annotator3": 0},
        {"question": "q", "a": "z", "b": "x", "annotator1": 2, "annotator2": 2, "annotator3": None},
    ]
    file = tmp_path / f"told.{kind}"
    if kind == "csv":
        file.write_text("question,a,b,annotator1,annotator2,annotator3\nq,x,y,1,2,0\nq,z,x,2,2,\n")
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        import pandas

        pandas.DataFrame(rows).to_parquet(file)
    asked = [{"prompt": "q"}] * 3
    ended = np.ones(3, dtype=bool)
    said = HumanJudge(file).compare(Answers(asked, 1, ["x"] * 3, ended), Answers(asked, 1, ["y", "z", "?"], ended))
    assert said.forward_B[:2].tolist() == [0.5, 1.0] and np.isnan(said.forward_B[2]) and said.spent["missing"] == 1
    assert read_labelled(file).majority().tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "a": "x", "b": "y", "label": "perhaps"}, "row 0, column 'label': 'perhaps' is no judgement"),
        ({"prompt": "q", "a": "x", "b": "y"}, "no column 'with judgements'"),
        ({"prompt": "q", "a": "x", "label": 1}, "no column for 'b'"),
    ],
)
def test_a_file_that_holds_no_judgements_says_what_is_missing(row: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        read_labelled([row])


# ------------------------------------------------------------------------------------------------ judges measured


def labelled(tmp_path: Path, count: int = 200) -> Path:
    """Pairs of which people prefer the longer answer in three of four."""
    random, rows = generator(0, "labelled"), []
    for i in range(count):
        a, b = ("w" * n for n in random.permutation([3, 9]))
        longer = 1 if len(a) > len(b) else 2
        label = longer if i % 4 else 3 - longer
        rows.append({"part": "even" if i % 2 == 0 else "odd", "prompt": f"{i}?", "a": a, "b": b, "label": label})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def test_a_judge_is_measured_on_the_whole_and_on_parts(tmp_path: Path) -> None:
    file = labelled(tmp_path)
    found = measure(JudgeSpec.parse("length"), file, by="part")
    assert found["whole"]["accuracy"]["estimate"] == 0.75 and found["whole"]["kappa"]["estimate"] == pytest.approx(
        0.5, abs=0.02
    )
    assert found["parts"]["odd"]["accuracy"]["estimate"] == 1.0 and found["parts"]["even"]["n"] == 100
    assert found["whole"]["length_bias"]["estimate"] == pytest.approx(0.25)  # it says 1 where people say 3/4
    assert measure(JudgeSpec.parse("brevity"), file)["whole"]["accuracy"]["estimate"] == 0.25
    with pytest.raises(UsageError, match="no column 'parts'"):
        measure(JudgeSpec.parse("length"), file, by="parts")


def test_a_bias_for_a_place_is_measured_as_such(tmp_path: Path) -> None:
    with Server(lambda number, body: "A") as server:
        spec = JudgeSpec.model_validate(told_model(server))
        found = measure(spec, labelled(tmp_path, 20), cache=tmp_path / "cache")
    whole = found["whole"]
    assert whole["position_bias"]["estimate"] == 0.5 and whole["flip_rate"]["estimate"] == 1.0
    assert whole["ties"] == 1.0 and found["spent"]["calls"] == 40


def test_chosen_and_rejected_stand_on_tossed_sides() -> None:
    found = read_labelled([{"prompt": f"{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(60)])
    assert 0.2 < found.labels_NR.mean() < 0.8
    better = [a if label else b for a, b, [label] in zip(found.a, found.b, found.labels_NR, strict=True)]
    assert better == [f"good {i}" for i in range(60)]


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = labelled(tmp_path)
    assert main(["judge", "length", str(file), "--by", "part", "--columns", "label=label"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("judge 'length' on 200 pairs") and [x.split()[0] for x in lines[2:5]] == [
        "even", "odd", "all",
    ]  # fmt: skip
    assert main(["judge", "length", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"]["n"] == 200
    assert main(["judge", "lenght", str(file)]) == 2 and "did you mean 'length'" in capsys.readouterr().err


def test_published_judgements_of_people_work_as_they_are(
    data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLMBar's accuracies of length by subset, and PandaLM's three annotators; a tiny model is asked about a few."""
    bar, panda = data_dir / "llmbar" / "llmbar.jsonl.gz", data_dir / "pandalm_human" / "pandalm_testset.jsonl.gz"
    if not (bar.exists() and panda.exists()):
        pytest.skip("llmbar or pandalm_human is not among the data sets")
    told = measure(JudgeSpec.parse("length"), bar, by="subset")
    share = {name: part["accuracy"]["estimate"] for name, part in told["parts"].items()}
    assert share["natural"] == pytest.approx(0.565) and share["adversarial_neighbor"] == pytest.approx(16 / 134)
    found = measure(JudgeSpec.parse("length"), panda)
    assert found["pairs"] == 999 and found["people"]["n_raters"] == 3
    few = read_labelled(panda).rows[:40]
    tiny = measure(JudgeSpec.model_validate({"llm": {"model": str(folder)}}), few)
    assert tiny["whole"]["n"] == 40 and tiny["whole"]["flip_rate"] is not None
