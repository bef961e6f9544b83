"""Models compared as they are: by scores and in both orders, from weights and from files, on the command line."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import prefzoo
from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.comparison import pairwise, turned
from prefzoo.benchmarks.results import recompute
from prefzoo.cli.app import main
from prefzoo.registry import UsageError

LETTERS = [{"prompt": f"say {x}:", "completion": " a a a"} for x in "pqrstuvw"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that says a, and the folder of one that says b."""
    folder = tmp_path_factory.mktemp("two")
    how = {"max_steps": 25, "rows_per_step": 8, "learning_rate": 3e-3, "warmup_steps": 0, "quiet": True}
    words = prefzoo.models.load.learn_tokenizer([r[k] for r in LETTERS for k in r] + [" b b b"], 280)
    runs = {}
    for letter in "ab":
        rows = [{**r, "completion": r["completion"].replace("a", letter)} for r in LETTERS]
        model = prefzoo.models.load.tiny_model(words)
        runs[letter] = prefzoo.train(
            "sft", model=model, tokenizer=words, dataset=rows, output_dir=folder / letter, **how
        )
    return {"says_a": runs["a"], "says_b": folder / "b"}


PROMPTS = [{"prompt": r["prompt"]} for r in LETTERS]
SHORT = {"prompts": PROMPTS, "max_new_tokens": 8, "samples": 2}


def likes_a(completions: list[str], **_: Any) -> list[float]:
    return [c.count("a") - c.count("b") for c in completions]


def test_compare_finds_the_better_model(two: dict[str, Any]) -> None:
    found = prefzoo.compare(two, judge=likes_a, **SHORT)
    (pair,) = found.pairs
    answers = {n: np.reshape(likes_a(found.answers[n]), (8, 2)) for n in two}
    wins = (answers["says_a"] > answers["says_b"]) + 0.5 * (answers["says_a"] == answers["says_b"])
    assert pair["win"]["estimate"] == pytest.approx(wins.mean()) and pair["win"]["estimate"] > 0.9
    assert (pair["a"], pair["b"], pair["verdict"], pair["order_flips"]) == ("says_a", "says_b", "better", None)
    assert "says_a" in str(found) and "better" in str(found)
    (swapped,) = prefzoo.compare(dict(reversed(two.items())), judge=likes_a, **SHORT).pairs
    assert swapped["win"]["estimate"] == pytest.approx(1 - pair["win"]["estimate"]) and swapped["verdict"] == "worse"
    assert swapped["win"]["ci"][0] == pytest.approx(1 - pair["win"]["ci"][1])


def test_a_model_against_itself_is_a_tie(two: dict[str, Any]) -> None:
    (pair,) = prefzoo.compare({"x": two["says_b"], "y": two["says_b"]}, judge=likes_a, **SHORT).pairs
    assert (pair["win"]["estimate"], pair["win"]["se"], pair["ties"], pair["p_holm"]) == (0.5, 0.0, 1.0, 1.0)
    assert pair["verdict"] == "equivalent"


def test_a_judge_is_asked_in_both_orders(two: dict[str, Any]) -> None:
    asked: list[tuple[list[str], list[str], list[str]]] = []

    def first(prompts: list[str], a: list[str], b: list[str]) -> list[float]:
        asked.append((prompts, a, b))
        return [1.0] * len(prompts)

    found = prefzoo.compare(two, judge=pairwise(first), **SHORT)
    (pair,) = found.pairs
    assert (pair["win"]["estimate"], pair["order_flips"], pair["verdict"]) == (0.5, 1.0, "equivalent")
    assert asked[0][1:] == asked[1][:0:-1] == (found.answers["says_a"], found.answers["says_b"])
    assert asked[0][0] == [r["prompt"] for r in PROMPTS for _ in range(2)]

    def fair(prompts: list[str], a: list[str], b: list[str]) -> list[float]:
        return [(np.sign(x - y) + 1) / 2 for x, y in zip(likes_a(a), likes_a(b), strict=True)]

    (by_pair,) = prefzoo.compare(two, judge=pairwise(fair), **SHORT).pairs
    (by_score,) = prefzoo.compare(two, judge=likes_a, **SHORT).pairs
    assert by_pair["order_flips"] == 0.0 and by_pair["win"] == by_score["win"]


def test_holm_covers_all_pairs_of_a_comparison(two: dict[str, Any]) -> None:
    models = {**two, "b_again": two["says_b"]}
    pairs = prefzoo.compare(models, judge=likes_a, **SHORT).pairs
    assert [(p["a"], p["b"]) for p in pairs] == list(itertools.combinations(models, 2))
    raw = sorted((p["win"]["p"], p["p_holm"]) for p in pairs)
    expected = np.maximum.accumulate([min(1, (3 - k) * p) for k, (p, _) in enumerate(raw)])
    assert [h for _, h in raw] == pytest.approx(expected.tolist())


@pytest.mark.parametrize(
    "judge, words",
    [
        ("exat", "did you mean 'exact'"),
        (3, "expected a function, a verifier's name or a reward-model folder, got int"),
        (lambda completions, **_: [1.0], "must return a list of 16 numbers"),
        (
            lambda completions, **_: [None] * 16,
            "judge 'function' gave no score for 16 of 16 answers, the first to prompt 0",
        ),
        (pairwise(lambda p, a, b: [2.0] * len(p)), "16 numbers in [0, 1]"),
        (pairwise(lambda p, a, b: [1.0]), "16 numbers in [0, 1]"),
    ],
)
def test_a_bad_judge_is_told_in_words(judge: Any, words: str, two: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        prefzoo.compare(two, judge=judge, **SHORT)


def test_models_that_cannot_be_told_apart_are_refused(two: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least two models"):
        prefzoo.compare([two["says_b"]], judge=likes_a, **SHORT)
    with pytest.raises(UsageError, match="two of the models are called 'b'"):
        prefzoo.compare([two["says_a"], two["says_b"], two["says_b"] / "final"], judge=likes_a, **SHORT)


def test_a_prompt_that_comes_twice_is_asked_once(two: dict[str, Any]) -> None:
    twice = prefzoo.compare(two, judge=likes_a, **{**SHORT, "prompts": PROMPTS + PROMPTS})
    once = prefzoo.compare(two, judge=likes_a, **SHORT)
    assert twice.answers == once.answers and twice.pairs == once.pairs


@pytest.mark.parametrize("learned", ["say p: a a a b b b", "quite other words, and none of those"])
def test_a_reward_model_reads_the_text_by_its_own_tokens(learned: str, two: dict[str, Any], tmp_path: Path) -> None:
    """Models need not share a tokenizer, neither with each other nor with their judge."""
    load = prefzoo.models.load
    words = load.learn_tokenizer([learned] * 4, 270)
    load.save_scorer(load.new_scorer(load.Policy(load.tiny_model(words))), words, tmp_path / "rm")
    found = prefzoo.compare(two, judge=tmp_path / "rm", **SHORT)
    assert found.pairs[0]["ties"] == 1.0, "a new reward model gives 0 to everything"


# ----------------------------------------------------------------------------------------------------------- files

ANSWERS = {
    "short": ["one", "two", "three", "four"], "long": ["one one one", "two two two", "3", "four four"],
    "other": ["1", "two!", "three three three", "four?"],
}  # fmt: skip
QUESTIONS = [f"question {i}" for i in range(4)]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def numbers(estimate: dict[str, Any]) -> list[float]:
    return [*estimate["ci"], *(estimate[k] for k in ("estimate", "se", "t", "df", "p"))]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [
        write(
            tmp_path / f"{name}.jsonl", [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, texts, strict=True)]
        )
        for name, texts in ANSWERS.items()
    ]


def test_files_of_every_known_form_say_the_same(files: list[Path], tmp_path: Path) -> None:
    told = prefzoo.compare(files, judge="length")
    rows = [list(zip(QUESTIONS, texts, strict=True)) for texts in ANSWERS.values()]
    alpaca = [[{"instruction": q, "output": a, "generator": "x", "dataset": "y"} for q, a in r] for r in rows]
    generated = [[{"prompt": q, "completions": [a], "finished": [True]} for q, a in r[::-1]] for r in rows]
    mine = [[{"question": q, "said": a} for q, a in r] for r in rows]
    for kind, form, columns in (
        ("alpaca", alpaca, None), ("generated", generated, None),
        ("mine", mine, {"prompt": "question", "completion": "said"}),
    ):  # fmt: skip
        (tmp_path / kind).mkdir()
        again = [write(tmp_path / kind / f.name, r) for f, r in zip(files, form, strict=True)]
        found = prefzoo.compare(again, judge="length", columns=columns)
        if kind != "generated":  # there the prompts come in another order
            assert found.pairs == told.pairs
        assert [p["win"]["estimate"] for p in found.pairs] == [p["win"]["estimate"] for p in told.pairs]
    lengths = {n: np.array([len(a) for a in texts]) for n, texts in ANSWERS.items()}
    for pair in told.pairs:
        a, b = lengths[pair["a"]], lengths[pair["b"]]
        assert pair["win"]["estimate"] == ((a > b) + 0.5 * (a == b)).mean()
    means = {n: found["length"]["mean"] for n, found in told.results["tasks"]["compare"]["methods"].items()}
    assert means == {n: x.mean() for n, x in lengths.items()} and "mean characters" in str(told)


def test_several_answers_are_averaged_within_their_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": q, "sample": k, "completion": "x" * (k + i)} for i, q in enumerate(QUESTIONS) for k in (2, 0, 1)]
    fixed = [{"prompt": q, "completions": ["xx"] * 3} for q in QUESTIONS]
    found = prefzoo.compare(
        {"a": write(tmp_path / "a.jsonl", rows), "b": write(tmp_path / "b.jsonl", fixed)}, judge="length"
    )
    assert found.answers["a"][:3] == ["", "x", "xx"], "samples stand in their order"
    y_N = [np.mean([(k + i > 2) + 0.5 * (k + i == 2) for k in range(3)]) for i in range(4)]
    assert numbers(found["a", "b"]["win"]) == pytest.approx(numbers(statistics.win_rate([y_N]).to_dict()))
    first = prefzoo.compare({"a": tmp_path / "a.jsonl", "b": tmp_path / "b.jsonl"}, judge="length", samples=1)
    assert first.answers["a"] == ["", "x", "xx", "xxx"]


def test_a_pair_is_found_by_its_names_from_either_side(files: list[Path]) -> None:
    found, reverse = (prefzoo.compare(f, judge=right) for f in (files, files[::-1]))
    for a, b in itertools.permutations(found.names, 2):
        one, other = found[a, b], reverse[a, b]
        assert (
            (one["a"], one["b"], one["verdict"]) == (other["a"], other["b"], other["verdict"]) == (a, b, one["verdict"])
        )
        assert one["mcnemar"] == other["mcnemar"]
        for key in ("win", "difference"):
            assert numbers(one[key]) == pytest.approx(numbers(other[key]))
            assert numbers(turned(one)[key]) == pytest.approx(numbers(found[b, a][key]))
    with pytest.raises(UsageError, match="no model 'shrt'; did you mean 'short'"):
        found["shrt", "long"]
    with pytest.raises(UsageError, match="names of two models"):
        found["long", "long"]


def right(completions: list[str], **_: Any) -> list[float]:
    return [float("o" in c) for c in completions]


def test_mcnemar_stands_beside_judges_of_right_and_wrong_only(files: list[Path]) -> None:
    found = prefzoo.compare(files, judge=[right, "length"])
    for a, b in itertools.combinations(ANSWERS, 2):
        expected = statistics.mcnemar(right(ANSWERS[a]), right(ANSWERS[b])).to_dict()
        assert found[a, b]["mcnemar"] == expected
    assert all(p["mcnemar"] is None for p in prefzoo.compare(files, judge="length").pairs)


def test_people_who_did_not_judge_everything_are_counted(files: list[Path], tmp_path: Path) -> None:
    sheet = tmp_path / "people.csv"
    with sheet.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["prompt", "a", "b", "label"])
        writer.writerows(
            [QUESTIONS[i], ANSWERS["long"][i], ANSWERS["short"][i], label] for i, label in ((0, 1), (1, 2), (2, 0))
        )
    pair = prefzoo.compare(files[:2], judge={"human": str(sheet)})["long", "short"]
    assert pair["unparsed"] == 0.25 and pair["flips"] == 0.0
    assert pair["win"]["estimate"] == np.mean([1, 0, 0.5, 0.5]), "what nobody judged counts half"


def test_the_folder_of_a_comparison_gives_its_numbers_again(files: list[Path], tmp_path: Path) -> None:
    found = prefzoo.compare(files, judge=[pairwise(lambda p, a, b: [0.75] * len(p)), "length"], baseline="long")
    assert "long" in found.report(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert recompute(tmp_path / "out") == written == json.loads(json.dumps(found.results))
    assert (tmp_path / "out" / "report.html").exists()
    said = {
        (r["method"], r["against"], r["prompt"]): (r["forward"], r["backward"])
        for r in pq.read_table(tmp_path / "out" / "judgements.parquet").to_pylist()
    }
    assert len(said) == 3 * 2 * 4
    for (a, b, prompt), (forward, backward) in said.items():
        assert (forward, backward) == (1 - said[b, a, prompt][1], 1 - said[b, a, prompt][0])
    task = written["tasks"]["compare"]
    assert task["reference"] == "long" and task["methods"]["long"]["win"] is None
    assert list(task["methods"]["short"]["against"]) == ["long"]
    assert {p["flips"] for p in found.pairs} == {1.0} and {p["verdict"] for p in found.pairs} == {"equivalent"}
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "results.json").write_text('{"suite": "quick"}')
    with pytest.raises(UsageError, match="results of a suite"):
        found.report(tmp_path / "suite")


def test_files_that_cannot_be_compared_are_told_in_words(files: list[Path], tmp_path: Path) -> None:
    def refused(words: str, *others: list[dict[str, Any]], **how: Any) -> None:
        made = [write(tmp_path / f"made{i}.jsonl", rows) for i, rows in enumerate(others)]
        with pytest.raises(UsageError, match=re.escape(words)):
            prefzoo.compare([files[0], *made], **{"judge": "length", **how})

    some = [{"prompt": q, "completion": "x"} for q in QUESTIONS[:3]]
    refused("made0.jsonl has no answer to 1 of 4 prompts, such as 'question 3'", some)
    refused("no column for the completion among prompt, text; name it: --columns completion=THEIRS",
            [{"prompt": "q", "text": "x"}])  # fmt: skip
    refused("row 1, column 'completion': expected a text", [{"prompt": "q", "completion": 3}])
    refused(
        "different numbers of answers per prompt: short 1, made0 2",
        [{"prompt": q, "completions": ["x", "y"]} for q in QUESTIONS],
    )
    refused("-n 2: 'short' has only 1", some, samples=2, prompts=[{"prompt": q} for q in QUESTIONS[:3]])
    refused(
        "judge 'completion': a column of the answers has this name",
        some,
        judge={"rule": "length", "name": "completion"},
    )
    refused("no model 'shot'; did you mean 'short'", some, baseline="shot")
    refused("at least two prompts", some, prompts=[{"prompt": QUESTIONS[0]}])
    with pytest.raises(UsageError, match="which prompts do the models answer"):
        prefzoo.compare([tmp_path, tmp_path / "x"], judge="length")


def test_answers_that_were_written_are_those_that_the_model_gives(two: dict[str, Any], tmp_path: Path) -> None:
    prompts, out = write(tmp_path / "prompts.jsonl", PROMPTS), tmp_path / "said.jsonl"
    assert main(["generate", str(two["says_b"]), "--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "8",
                 "-n", "2"]) == 0  # fmt: skip
    found = prefzoo.compare({"model": two["says_b"], "file": out}, judge="length", samples=2, max_new_tokens=8)
    assert found.answers["model"] == found.answers["file"] and found.pairs[0]["ties"] == 1.0


# ----------------------------------------------------------------------------------------------------------- command


def test_the_command_compares_writes_and_asks_people(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["compare", *map(str, files), "--judge", "length"]
    sheet, out = tmp_path / "sheet.csv", tmp_path / "out"
    assert main([*asked, "--out", str(out), "--export", str(sheet), "--names", "s,l,o"]) == 0
    said = capsys.readouterr().out
    assert "A wins, %" in said and "about these models" in said and "report.html" in said
    assert json.loads((out / "results.json").read_text())["command"].startswith("prefzoo compare ")
    rows = list(csv.DictReader(sheet.open()))
    assert len(rows) == sum(
        a != b for n in ("long", "other") for a, b in zip(ANSWERS["short"], ANSWERS[n], strict=True)
    )
    assert not any(word in sheet.read_text() for word in ("long", "short", "other")), "the sheet is blind"
    for row in rows:
        gap = len(row["answer_a"]) - len(row["answer_b"])
        row["verdict"] = "tie" if gap == 0 else "A" if gap > 0 else "B"
    filled = tmp_path / "filled.csv"
    with filled.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    found = {}
    for judge in ("length", f"{{human: {filled}}}"):
        assert main(["compare", *map(str, files), "--judge", judge, "--json"]) == 0
        task = json.loads(capsys.readouterr().out)["tasks"]["compare"]
        found[judge] = [task["methods"][n]["win"]["estimate"] for n in ("long", "other")]
    assert len({tuple(w) for w in found.values()}) == 1, "people who judge by length are the judge of length"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--judge", "lenght"], "did you mean 'length'"),
        (["--judge", "gold"], "knows the truth of an embedded world"),
        (["--judge", "length", "--names", "a,b"], "give 3 different names"),
        (["--judge", "length", "--judge", "length"], "two judges have this name"),
        (["--judge", "length", "--columns", "prompt=nothing"], "there is no column 'nothing'"),
    ],
)
def test_the_command_tells_mistakes_in_words(
    words: list[str], message: str, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *map(str, files), *words]) == 2
    assert message in capsys.readouterr().err


def test_real_answers_of_named_models(data_dir: Path, tmp_path: Path) -> None:
    """Two models of AlpacaEval by length: the win rate is that of plain numpy, and length has a number of its own."""
    by_model: dict[str, dict[str, str]] = {}
    with gzip.open(data_dir / "alpaca_eval_kwise" / "alpaca_eval_kwise.jsonl.gz", "rt") as lines:
        for row in map(json.loads, lines):
            for model, text in zip(row["models"], row["responses"], strict=True):
                by_model.setdefault(model, {})[row["prompt"]] = text
    a, b = max(itertools.combinations(sorted(by_model), 2), key=lambda p: len({*by_model[p[0]]} & {*by_model[p[1]]}))
    prompts = sorted({*by_model[a]} & {*by_model[b]})
    files = {
        m: write(tmp_path / f"{i}.jsonl", [{"instruction": p, "output": by_model[m][p]} for p in prompts])
        for i, m in enumerate((a, b))
    }
    pair = prefzoo.compare(files, judge="length")[a, b]
    lengths = np.array([[len(by_model[m][p]) for p in prompts] for m in (a, b)])
    wins = (lengths[0] > lengths[1]) + 0.5 * (lengths[0] == lengths[1])
    assert pair["win"]["estimate"] == pytest.approx(wins.mean(), abs=1e-12)
    assert pair["win"]["se"] == pytest.approx(wins.std(ddof=1) / len(wins) ** 0.5, abs=1e-12)
