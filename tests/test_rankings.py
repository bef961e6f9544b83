"""Rankings, scored answers and rated steps: from rows to samples, through the engine, to what is learned from them."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import prefzoo
import prefzoo.training.engine as engine_module
import prefzoo.training.setup as training_setup
from prefzoo.algorithm import Algorithm, create_algorithm
from prefzoo.cli.app import main
from prefzoo.cli.data import show_data
from prefzoo.data.samples import Ragged, Samples
from prefzoo.data.tokens import tokenise
from prefzoo.losses import create_loss
from prefzoo.models.load import learn_tokenizer, load_causal, new_scorer, tiny_model
from prefzoo.models.reference import token_scores, weights_hash
from prefzoo.models.roles import Policy
from prefzoo.models.tree import TreeBatch, micro_batches
from prefzoo.parts.source import DatasetRows
from prefzoo.records import Ranked, RankedScores
from prefzoo.registry import UsageError
from prefzoo.training import NonFiniteError, Run
from prefzoo.training.engine import Engine

Row = dict[str, Any]
# Widths 2 to 5, lengths 1 to 6; two rankings of one prompt; scores in no order, two of them equal.
RANKED: list[Row] = [
    {"prompt": "say a:", "completions": [" b b", " a a a a", " c"], "scores": [0.25, 0.75, 0.5]},
    {"prompt": "say a:", "completions": [" d", " a b"], "scores": [0.0, 1.0]},
    {"prompt": "a b c and d, one after another, please:", "completions": [" d", " a b c d", " a b", " c", " b a"],
     "scores": [0.1, 0.9, 0.5, 0.1, 0.3]},
    {"prompt": "hum:", "completions": [" i i i", " h"], "scores": [0.8, 0.3]},
    {"prompt": "count:", "completions": [" a b c d e f", " f", " a", " b d"], "scores": [1.0, 0.2, 0.4, 0.6]},
    {"prompt": "b or c:", "completions": [" c c c", " b"], "scores": [0.0, 0.6]},
    {"prompt": "again:", "completions": [" b a b a", " a b", " a"], "scores": [0.5, 0.4, 0.3]},
    {"prompt": "more:", "completions": [" e", " f g", " h i a"], "scores": [0.2, 0.9, 0.7]},
]  # fmt: skip
PAIRS: list[Row] = [
    {"prompt": row["prompt"], "chosen": row["completions"][i], "rejected": row["completions"][j], "weight": 0.5 + n / 4,
     "score_chosen": row["scores"][i], "score_rejected": row["scores"][j]}
    for n, row in enumerate(RANKED) for i, j in [np.argsort(row["scores"])[::-1][[0, -1]].tolist()]
]  # fmt: skip
SCORED: list[Row] = [
    {"prompt": row["prompt"], "completion": c, "score": s}
    for row in RANKED
    for c, s in zip(row["completions"], row["scores"], strict=True)
]
STEPS: list[Row] = [
    {"prompt": f"{a} and {b}:", "completions": [f" {a} is", f" {b} more", f" so {a + b}"][: 1 + (a + b) % 3],
     "labels": [True, a > 1, a == b][: 1 + (a + b) % 3]}
    for a in range(4) for b in range(2)
]  # fmt: skip
DATA = {"rankings": RANKED, "pairs": PAIRS, "scored": SCORED, "steps": STEPS}
TRAINED = {"optimizer": "sgd", "learning_rate": 1e-2, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": None}
QUICK = {**TRAINED, "max_steps": 2, "rows_per_step": 8, "logging_steps": 1, "quiet": True}
LEARNERS: list[tuple[str, dict[str, Any]]] = [
    ("pl_dpo", {}), ("lipo", {}), ("all_pairs_dpo", {}), ("nca", {"alpha": 0.5}), ("exo", {"reward_beta": 0.5}),
    ("all_pairs", {}), ("plackett_luce", {}), ("reward_regression", {}), ("process_reward", {}), ("weighted_sft", {}),
    ("filtered_sft", {"threshold": 0.4}),
]  # fmt: skip


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return learn_tokenizer([json.dumps(rows) for rows in DATA.values()], 300)


def fit(name: str | Algorithm, words: PreTrainedTokenizerBase, dataset: Any = None, **options: Any) -> Run:
    known = create_algorithm(name).data if isinstance(name, str) else name.data
    options = {"model": tiny_model(words), **QUICK, **options}
    return prefzoo.train(name, tokenizer=words, dataset=dataset or DATA[known], **options)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


def said(samples: Samples, words: PreTrainedTokenizerBase, row: int) -> list[str]:
    """The completions of a row that are there."""
    first = row * samples.per_row
    ids = (samples.completions[b] for b in range(first, first + samples.per_row))
    return [words.decode(i).removesuffix("<eos>") for i in ids if len(i)]


# ------------------------------------------------------------------------------------------------ rows to samples


def test_a_ranking_is_told_best_first(words: PreTrainedTokenizerBase) -> None:
    samples, report = tokenise(RANKED, words, "rankings")
    assert len(samples) == 8 and samples.per_row == samples.width == 5 and len(samples.completions) == 40
    assert len(samples.prompts) == 7 and samples.prompt_B.reshape(8, 5).std(1).max() == 0
    scores_PK = samples.columns["score"].view(8, 5)
    for row, told in enumerate(RANKED):
        order = sorted(range(len(told["scores"])), key=lambda i: -told["scores"][i])
        assert said(samples, words, row) == [told["completions"][i] for i in order]
        assert scores_PK[row, : len(order)].tolist() == pytest.approx([told["scores"][i] for i in order])
        assert not scores_PK[row, len(order) :].any() and not scores_PK.isnan().any()
    assert said(samples, words, 2) == [" a b c d", " a b", " b a", " d", " c"], "equal ones as they stood in the file"
    assert report.notes["rankings with completions of equal score, which keep the order of the data"] == 1
    assert report.masked is not None and " | " in report.masked


@pytest.mark.parametrize("streaming", [False, True])
def test_however_it_is_read_it_is_the_same(streaming: bool, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in RANKED))
    plain, _ = tokenise(RANKED, words, "rankings")
    data = prefzoo.data.formats.load_dataset(file, streaming=streaming)
    for _ in range(2):  # written, and read from the store
        other, report = tokenise(data, words, "rankings", cache=tmp_path / "cache")
        assert {k: v.tolist() for k, v in other.tensors().items()} == {
            k: v.tolist() for k, v in plain.tensors().items()
        }
        assert len(report.notes) >= 1


def test_rows_are_taken_whole(words: PreTrainedTokenizerBase) -> None:
    samples, _ = tokenise([{**row, "weight": i} for i, row in enumerate(RANKED)], words, "rankings")
    part = samples.take([4, 1])
    assert part.width == 5 and part.row_columns["weight"].tolist() == [4.0, 1.0]
    assert [said(part, words, i) for i in (0, 1)] == [said(samples, words, i) for i in (4, 1)]
    again = Samples.from_tensors("rankings", part.tensors())
    assert len(again) == 2 and again.per_row == 5
    both = Samples.concatenate([part, samples.take([0])])
    assert len(both) == 3 and said(both, words, 2) == said(samples, words, 0)


def test_what_compares_nothing_is_left_out_and_told(words: PreTrainedTokenizerBase) -> None:
    rows = [
        RANKED[0],
        {"prompt": "x:", "completions": [" a", " a", " b"], "scores": [0.9, 0.5, 0.1]},
        {"prompt": "y:", "completions": [" a", " a"], "scores": [0.9, 0.5]},
        {"prompt": "z:", "completions": [" a", " b"], "scores": [0.5, 0.5]},
        {"prompt": "u:", "completions": [" a"], "scores": [0.5]},
        {"prompt": "v:", "completions": [" a", ""], "scores": [0.5, 0.1]},
        {"prompt": "w:", "completions": [" a", " b"], "scores": [0.5, float("nan")]},
    ]
    samples, report = tokenise(rows, words, "rankings")
    assert len(samples) == report.rows == 2 and said(samples, words, 1) == [" a", " b"]
    assert samples.columns["score"].view(2, 3)[1].tolist() == pytest.approx([0.9, 0.1, 0.0])
    assert report.dropped == {
        "fewer than two different completions": 2, "an empty completion": 1, "scores is not a finite number": 1,
    }  # fmt: skip
    assert report.cut == {
        "completions left out that are identical to a better one of their list": 2,
        "prompts left out: no two answers of different score": 1,
    }
    with pytest.raises(UsageError, match="fewer than two different completions; it starts 'y:'"):
        tokenise(rows[:3], words, "rankings", strict=True)
    limit = len(words("say a:")["input_ids"]) + 2
    cut, report = tokenise(RANKED[:2], words, "rankings", max_length=limit)
    assert max(cut.completions.lengths) == 2 and sum(report.cut.values()) >= 2


def test_ranks_give_an_order_and_no_scores(words: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "x:", "completions": [" c", " a", " b"], "ranks": [3, 1, 2]}]
    samples, _ = tokenise(rows, words, "rankings")
    assert said(samples, words, 0) == [" a", " b", " c"] and "score" not in samples.columns
    both, _ = tokenise([{**rows[0], "scores": [3.0, 1.0, 2.0]}], words, "rankings")
    assert said(both, words, 0) == [" a", " b", " c"] and both.columns["score"].tolist() == [1.0, 2.0, 3.0]
    mixed, _ = tokenise([RANKED[0], rows[0]], words, "rankings")
    assert len(mixed) == 2 and "score" not in mixed.columns, "of every row or of none"


def test_answers_of_a_dialogue_are_ranked(words: PreTrainedTokenizerBase) -> None:
    chat = learn_tokenizer(["user assistant one two three"], 290)
    chat.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ask = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": ask, "completions": [[{"role": "assistant", "content": c}] for c in answers],
         "scores": list(range(len(answers)))}
        for answers in (["one", "two"], ["one", "two", "three"])
    ]  # fmt: skip
    samples, _ = tokenise(rows, chat, "rankings")
    assert [said(samples, chat, i) for i in (0, 1)] == [["two", "one"], ["three", "two", "one"]]
    assert chat.decode(samples.prompts[0]).endswith("[assistant]")


def test_every_scored_answer_is_a_row(words: PreTrainedTokenizerBase) -> None:
    """Also from rankings and from pairs with scores; as demonstrations only the best of each prompt are."""
    scored, _ = tokenise(SCORED, words, "scored")
    ranked, _ = tokenise(RANKED, words, "scored")
    assert len(scored) == len(SCORED) and scored.columns["score"].tolist() == pytest.approx(
        [row["score"] for row in SCORED]
    )
    assert {k: v.tolist() for k, v in scored.tensors().items()} == {k: v.tolist() for k, v in ranked.tensors().items()}
    pairs, _ = tokenise(PAIRS, words, "scored")
    assert len(pairs) == 16 and pairs.columns["weight"].tolist()[:2] == [0.5, 0.5]
    assert len(tokenise(SCORED, words, "completions")[0]) == len({row["prompt"] for row in SCORED})
    bare = [{k: v for k, v in row.items() if "score" not in k} for row in PAIRS]
    with pytest.raises(UsageError, match=r"no usable row is left.*\n.*8 pairs left out: no number in score_chosen"):
        tokenise(bare, words, "scored")
    with pytest.raises(UsageError, match=r"prompt_completion; it cannot become scored"):
        tokenise([{"prompt": "a", "completion": " b"}], words, "scored")


def test_the_last_token_of_each_step_carries_its_label(words: PreTrainedTokenizerBase) -> None:
    samples, report = tokenise(STEPS, words, "steps")
    whole, _ = tokenise([{"prompt": r["prompt"], "completion": "".join(r["completions"])} for r in STEPS],
                        words, "completions")  # fmt: skip
    assert samples.completions.flat.tolist() == whole.completions.flat.tolist(), "steps are one text"
    for row, told in enumerate(STEPS):
        start, stop = samples.completions.offsets[row : row + 2]
        places = samples.tokens["trainable"][start:stop].nonzero()[:, 0].tolist()
        ids = samples.completions[row]
        assert places[-1] == len(ids) - 1 and ids[-1] == words.eos_token_id
        texts = [words.decode(ids[: p + 1]) for p in places]
        until = list(itertools.accumulate(told["completions"]))
        assert texts == [*until[:-1], until[-1] + "<eos>"]
        assert samples.tokens["labels"][start:stop][places].bool().tolist() == told["labels"]
    assert not samples.tokens["labels"][~samples.tokens["trainable"]].any()
    assert report.masked is not None and report.masked.count("[[") == len(STEPS[0]["labels"])


def test_steps_that_cannot_be_told_apart_are_faults(words: PreTrainedTokenizerBase) -> None:
    merged = learn_tokenizer(["say: hello hello hello"], 280)
    (one,) = merged(" hello", add_special_tokens=False)["input_ids"]
    rows = [{"prompt": "say:", "completions": [" hel", "lo", " hello"], "labels": [1, 0, 1]},
            {"prompt": "say:", "completions": [" hello", " hello"], "labels": [1, 0]}]  # fmt: skip
    samples, report = tokenise(rows, merged, "steps")
    assert samples.completions.flat.tolist() == [one, one, merged.eos_token_id]
    assert report.dropped == {"two steps that end in one token": 1}
    cut, report = tokenise(STEPS, words, "steps", max_length=len(words(STEPS[5]["prompt"])["input_ids"]) + 3)
    assert report.dropped or sum(report.cut.values())
    assert len(cut.tokens["labels"]) == len(cut.completions.flat)
    with pytest.raises(UsageError, match="loss_on='all' has no"):
        tokenise(STEPS, words, "steps", loss_on="all")


def test_it_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(Path(__file__).parent / "golden" / "tiny_model" / "policy")
    shown: dict[str, tuple[list[Row], list[str]]] = {
        "rankings": (
            RANKED[:2],
            ["completion 1 (score 0.75): [[ a a a a", "completion 2 (score 0)", "used as: prompts"],
        ),
        "scored": (SCORED[:2], ["completion (score 0.25): [[ b b"]),
        "steps": (STEPS[2:3], ["with loss"]),
    }
    for kind, (rows, expected) in shown.items():
        file = tmp_path / "d.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        show_data([str(file)], model=model)
        out = capsys.readouterr().out
        assert f"as {kind}: {len(rows)} rows" in out and all(text in out for text in expected), out


# ------------------------------------------------------------------------------------------------ empty completions


def with_empties(seed: int = 0) -> Samples:
    draw = np.random.default_rng(seed)
    ids = lambda n: draw.integers(1, 250, size=n).tolist()  # noqa: E731
    lengths = [4, 2, 0, 3, 0, 0, 1, 6, 5, 2, 2, 0]
    return Samples("rankings", Ragged.of([ids(5), ids(3), ids(9)]), Ragged.of([ids(n) for n in lengths]),
                   np.repeat([0, 1, 2, 0], 3), width=3)  # fmt: skip


def padded(model: Any) -> Any:
    """The same weights, called row by row."""
    other = load_causal(model)
    other.set_attn_implementation("sdpa")
    return other


def test_a_completion_that_is_not_there_costs_and_changes_nothing(words: PreTrainedTokenizerBase) -> None:
    samples, model = with_empties(), tiny_model(words)
    tree = TreeBatch.of(samples)
    there = np.flatnonzero(samples.completions.lengths)
    alone = TreeBatch.pack(samples.prompts, samples.completions.take(there), samples.prompt_B[there])
    for made in (load_causal(model), padded(model)):
        with torch.no_grad():
            torch.testing.assert_close(Policy(made)(tree).logps_C, Policy(made)(alone).logps_C, atol=1e-5, rtol=1e-5)
    assert [b.shape for b in tree.padded.buckets] == [b.shape for b in alone.padded.buckets], "not even its prompt"
    ends = np.cumsum(samples.prompts.lengths) - 1
    for b in np.flatnonzero(samples.completions.lengths == 0):
        p = samples.prompt_B[b]
        assert tree.ids_N[tree.last_B[b]] == samples.prompts.flat[ends[p]]
        assert tree.positions_N[tree.last_B[b]] == len(samples.prompts[p]) - 1
    whole = token_scores(lambda t: Policy(load_causal(model))(t).logps_C, samples, 10**6, "cpu")
    for budget in (1, 12, 30):
        for share in (True, False):
            rows = micro_batches(samples, budget, share)
            assert sorted(np.concatenate(rows).tolist()) == [0, 1, 2, 3]
            scores = token_scores(lambda t: Policy(load_causal(model))(t).logps_C, samples, budget, "cpu", share)
            torch.testing.assert_close(scores, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_rewards_are_those_of_packed_and_of_padded_rows(pooling: Any, words: PreTrainedTokenizerBase) -> None:
    samples = with_empties(1)
    found = []
    for make in (load_causal, padded):
        scorer = new_scorer(Policy(make(tiny_model(words))), pooling)
        nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            scores = scorer(TreeBatch.of(samples), steps=True)
            alone = scorer(TreeBatch.of(samples.take([1])), steps=True)
        assert bool(scores.rewards_B.isfinite().all()) and len(scores.steps_C) == len(samples.completions.flat)
        torch.testing.assert_close(alone.rewards_B, scores.rewards_B[3:6], atol=1e-5, rtol=1e-5)
        last_C = torch.from_numpy(samples.completions.offsets[1:][samples.completions.lengths > 0] - 1)
        if pooling == "last":
            there = scores.rewards_B[torch.from_numpy(samples.completions.lengths > 0)]
            torch.testing.assert_close(scores.steps_C[last_C], there, atol=1e-6, rtol=1e-6)
        found.append(torch.cat([scores.rewards_B, scores.steps_C]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ the engine


def moved(engine: Engine, words: PreTrainedTokenizerBase) -> Tensor:
    (role, trained), *rest = engine.trained.items()
    assert not rest
    start = Policy(tiny_model(words))
    return flat(trained.module) - flat(start if role == "policy" else new_scorer(start))


@pytest.mark.parametrize(("name", "options"), LEARNERS, ids=lambda x: x if isinstance(x, str) else "")
def test_any_split_into_micro_batches_gives_the_same_weights(
    name: str, options: dict[str, Any], words: PreTrainedTokenizerBase, engines: list[Engine]
) -> None:
    """1 x 8, 4 x 2 and 8 x 1; also with weights of rows."""
    data = [{**row, "weight": 0.5 + i / 4} for i, row in enumerate(DATA[create_algorithm(name, **options).data])]
    other = tiny_model(words, seed=1)
    for budget in (10**6, 64, 1):
        fit(create_algorithm(name, **options), words, data, tokens_per_batch=budget, reference=other)
    assert len(micro_batches(engines[1].data, 64)) > 1
    whole, *splits = (moved(e, words) for e in engines)
    assert whole.norm() > 1e-4
    for split in splits:
        assert (split - whole).norm() <= 1e-3 * whole.norm()
    fit(create_algorithm(name, **options), words, [{k: v for k, v in row.items() if k != "weight"} for row in data],
        reference=other)  # fmt: skip
    assert (moved(engines[-1], words) - whole).norm() > 1e-3 * whole.norm(), "the weights have an effect"


@pytest.mark.parametrize(("lists", "pairs", "options"), [
    ("pl_dpo", "dpo", {"beta": 0.2}), ("all_pairs_dpo", "dpo", {"beta": 0.2}), ("nca", "nca_pair", {}),
    ("exo", "exo_pair", {}), ("plackett_luce", "bradley_terry", {}), ("all_pairs", "bradley_terry", {}),
], ids=str)  # fmt: skip
def test_pairs_are_rankings_of_two(
    lists: str, pairs: str, options: dict[str, Any], words: PreTrainedTokenizerBase, engines: list[Engine]
) -> None:
    """The same pairs, read as lists: the same weights."""
    runs = [
        fit(name, words, PAIRS, reference=tiny_model(words, seed=1), max_steps=4, rows_per_step=3, **options)
        for name in (lists, pairs)
    ]
    ours, theirs = (moved(e, words) for e in engines)
    assert engines[0].data.width == 2 and theirs.norm() > 1e-4
    assert (ours - theirs).abs().max() <= 1e-6 and (ours - theirs).norm() <= 1e-5 * theirs.norm()
    for ours_row, theirs_row in zip(*(run.history for run in runs), strict=True):
        assert ours_row["loss"] == pytest.approx(theirs_row["loss"], rel=1e-5)
        assert ours_row["rewards/accuracies"] == theirs_row["rewards/accuracies"]


@pytest.mark.parametrize("name", ["pl_dpo", "lipo", "nca", "all_pairs", "plackett_luce"])
def test_what_is_not_there_gets_no_gradient(
    name: str, words: PreTrainedTokenizerBase, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN wherever no completion is and outside every mask: the same metrics and weights, to the bit."""
    clean = fit(name, words, reference=tiny_model(words, seed=1))
    build, seen = engine_module.build_record, []

    def poisoned(*args: Any) -> Any:
        record = build(*args)
        assert isinstance(record, Ranked | RankedScores)
        valid_PK, fields = record.valid_PK, {}
        assert valid_PK.sum(1).tolist() == [int(v) for v in valid_PK.int().cumprod(1).sum(1)], "first those there are"
        for key, value in record.tensors().items():
            if key in ("mask_PKT", "valid_PK", "weight_P"):
                continue
            there = record.mask_PKT if key.endswith("T") else valid_PK
            fields[key] = torch.where(there, value, torch.nan)
            if value.requires_grad:
                value.retain_grad()
                seen.append((value, there))
        return replace(record, **fields)

    monkeypatch.setattr(engine_module, "build_record", poisoned)
    dirty = fit(name, words, reference=tiny_model(words, seed=1))
    for role, trained in engines[0].trained.items():
        assert weights_hash(trained.module) == weights_hash(engines[1].trained[role].module)
    assert [{k: v for k, v in r.items() if k != "time"} for r in clean.history] == [
        {k: v for k, v in r.items() if k != "time"} for r in dirty.history
    ]
    for value, there in seen:
        assert not bool(there.all()) and bool((value.grad[~there] == 0).all()) and bool(value.grad[there].any())
    assert all(math.isfinite(v) for row in dirty.history for v in row.values())


@pytest.mark.parametrize("name", ["pl_dpo", "plackett_luce", "process_reward"])
def test_padded_rows_teach_what_packed_ones_teach(
    name: str, words: PreTrainedTokenizerBase, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(name, words, reference=tiny_model(words, seed=1))
    monkeypatch.setattr("prefzoo.models.roles.is_packed", lambda model: False)
    original = training_setup.load_policy

    def loaded(*args: Any, **keywords: Any) -> Policy:
        policy = original(*args, **keywords)
        policy.model.set_attn_implementation("sdpa")
        return policy

    monkeypatch.setattr(training_setup, "load_policy", loaded)
    fit(name, words, reference=tiny_model(words, seed=1))
    packed, padded_ = (moved(e, words) for e in engines)
    assert packed.norm() > 1e-4 and (packed - padded_).norm() <= 1e-3 * packed.norm()


def test_a_step_that_is_not_finite_shows_its_rankings(words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="not finite"):
        fit("pl_dpo", words, learning_rate=1e30, max_steps=4, output_dir=tmp_path)
    (file,) = tmp_path.glob("post-mortem-*.json")
    rows = json.loads(file.read_text())["batches"]["main"]["shown"]
    counts = [sum(name.startswith("completion ") for name in row) for row in rows]
    assert sorted(counts) == sorted(len(row["completions"]) for row in RANKED), "those that are there"
    assert rows[0]["completion 1"]["score"] >= rows[0]["completion 2"]["score"]


def test_an_evaluation_divides_by_all_its_lists(words: PreTrainedTokenizerBase) -> None:
    """Whatever they are batched by: another width here than in training, and the last batch smaller."""
    losses = []
    for rows in (16, 3):
        run = fit("pl_dpo", words, eval_dataset=RANKED[3:6] + RANKED[:1], rows_per_step=rows, learning_rate=0.0,
                  eval_steps=1, max_steps=1, reference=tiny_model(words, seed=1))  # fmt: skip
        losses.append(next(r["eval/loss"] for r in run.history if "eval/loss" in r))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 0


@pytest.mark.parametrize(("name", "options"), LEARNERS, ids=lambda x: x if isinstance(x, str) else "")
def test_it_is_learned(name: str, options: dict[str, Any], words: PreTrainedTokenizerBase) -> None:
    adam = {"optimizer": "adamw", "learning_rate": 2e-3, "max_steps": 25, "rows_per_step": 32}
    history = fit(create_algorithm(name, **options), words, **adam).history
    floor = 0.96 if name == "nca" else 0.6  # its least loss is the entropy of soft labels
    assert history[-1]["loss"] < floor * history[0]["loss"], (history[0]["loss"], history[-1]["loss"])
    if "rewards/accuracies" in history[0]:
        assert history[-1]["rewards/accuracies"] > 0.9
    assert all(math.isfinite(v) for row in history for v in row.values())


def test_weighted_answers_are_learned_by_their_scores(words: PreTrainedTokenizerBase) -> None:
    """Scores that are all 0 weigh 1: then it is sft, on every answer."""
    level = [{**row, "score": 0.0} for row in SCORED]
    weighted = fit("weighted_sft", words, level, rows_per_step=64)
    plain = fit("sft", words, [{k: v for k, v in row.items() if k != "score"} for row in SCORED], rows_per_step=64)
    assert torch.equal(flat(weighted.policy), flat(plain.policy))
    none = fit("filtered_sft", words, level, threshold=0.5)
    assert torch.equal(flat(none.policy), flat(Policy(tiny_model(words)))), "no answer reaches the threshold"


def test_a_regression_finds_the_scores(words: PreTrainedTokenizerBase) -> None:
    run = fit("reward_regression", words, optimizer="adamw", learning_rate=3e-3, max_steps=80, rows_per_step=64)
    samples, _ = tokenise(SCORED, words, "scored")
    assert run.policy is None and run.scorer is not None
    with torch.no_grad():
        found = run.scorer(TreeBatch.of(samples)).rewards_B
    assert (found - samples.columns["score"]).abs().mean() < 0.05


def test_a_process_reward_model_reads_its_steps(words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    run = fit("process_reward", words, optimizer="adamw", learning_rate=3e-3, max_steps=60, rows_per_step=64,
              output_dir=tmp_path)  # fmt: skip
    samples, _ = tokenise(STEPS, words, "steps")
    with torch.no_grad():
        scores = run.scorer(TreeBatch.of(samples), steps=True)
    marked = samples.tokens["trainable"]
    assert ((scores.steps_C > 0) == samples.tokens["labels"].bool())[marked].all()
    assert run.history[-1]["accuracies"] == 1.0 and run.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    last = [row["labels"][-1] for row in STEPS]
    assert (scores.rewards_B > 0).tolist() == last, "its reward of an answer is the logit of the last step"


# ------------------------------------------------------------------------------------------------ what is refused

BARE = [{k: v for k, v in row.items() if "score" not in k} for row in PAIRS]
RANKS = [{**{k: v for k, v in row.items() if k != "scores"},
          "ranks": (1 + np.argsort(np.argsort([-s for s in row["scores"]]))).tolist()} for row in RANKED]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "data", "message"), [
    ("lipo", {}, RANKS, "loss 'lipo' needs a number for each completion in the column 'scores' of every row"),
    ("lipo", {}, BARE, "'lipo' needs a number for each completion in the column 'scores'.*has none; add it"),
    ("nca", {"alpha": 0.1}, RANKS, "loss 'nca' needs a number for each completion in the column 'scores'"),
    ("exo", {"reward_beta": 0.1}, RANKS, "loss 'exo' needs a number for each completion in the column 'scores'"),
    ("weighted_sft", {}, BARE, "no usable row is left(.|\n)*no number in score_chosen and score_rejected"),
    ("filtered_sft", {}, [{"prompt": "a", "completion": " b"}], "cannot become scored. Types that can: scored"),
    ("reward_regression", {}, RANKS, "no usable row is left(.|\n)*ranks, but no scores"),
    ("process_reward", {}, PAIRS, "cannot become stepwise. Types that can: stepwise"),
    ("pl_dpo", {}, [{"prompt": "a"}], "cannot become ranking"),
], ids=str)  # fmt: skip
def test_what_the_data_lack_is_told(
    name: str, options: dict[str, Any], data: list[Row], message: str, words: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UsageError, match=message):
        fit(create_algorithm(name, **options), words, data)


@pytest.mark.parametrize(("kind", "loss", "message"), [
    ("pairs", "pl_dpo", "loss 'pl_dpo' takes rankings, but source DatasetRows gives pairs"),
    ("completions", "weighted_sft", r"takes scored, but source .* gives completions; give DatasetRows\('scored'\)"),
    ("rankings", "dpo", "takes pairs, but source DatasetRows gives rankings"),
    ("completions", "reward_regression", "takes scored"), ("completions", "process_reward", "takes steps"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused(kind: Any, loss: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Algorithm(source=DatasetRows(kind), loss=create_loss(loss))


def test_scored_completions_are_completions_too() -> None:
    algorithm = Algorithm(source=DatasetRows("scored"), loss=create_loss("sft"))
    assert algorithm.data == "scored" and not algorithm.trains_reward
    for name in ("all_pairs", "plackett_luce", "reward_regression", "process_reward"):
        assert create_algorithm(name).trains_reward and create_algorithm(name).needs == {"reward"}


# ------------------------------------------------------------------------------------------------ real data


@pytest.mark.parametrize("name", ["pl_dpo", "lipo", "plackett_luce", "reward_regression"])
def test_real_rankings_from_the_command_line(
    name: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AlpacaEval's answers, four to eight of a prompt, scored by a judge."""
    code = main([str(word) for word in (
        "train", name, "--model", "tiny", "--dataset", data_dir / "alpaca_eval_kwise" / "alpaca_eval_kwise.jsonl.gz",
        "--columns", "completions=responses", "--max-length", 128, "--max-steps", 3, "--rows-per-step", 4,
        "--logging-steps", 1, "--output-dir", tmp_path / "run",
    )])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(math.isfinite(v) for row in rows for v in row.values())
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
