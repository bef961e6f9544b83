"""Presets of pairs and of labelled completions: sums of terms, a running shift, references that move."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import prefzoo
from prefzoo.models.load import learn_tokenizer, tiny_model
from prefzoo.models.reference import weights_hash
from prefzoo.models.roles import Policy, is_adapter
from prefzoo.parts.prelude import RunningMean
from prefzoo.training import Run
from prefzoo.training.engine import Engine

PAIRS = [
    {"prompt": "say a:", "chosen": " a", "rejected": " b b b"},
    {"prompt": "say a:", "chosen": " a a", "rejected": " c"},
    {"prompt": "count:", "chosen": " 1 2 3 4", "rejected": " 9"},
    {"prompt": "b or c:", "chosen": " b", "rejected": " c c c c"},
]
THUMBS = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in PAIRS]
THUMBS += [{"prompt": "say a:", "completion": " b b", "label": False}]
QUICK: dict[str, Any] = {
    "optimizer": "sgd", "learning_rate": 0.05, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": None,
    "max_steps": 3, "logging_steps": 1, "rows_per_step": 4, "quiet": True,
}  # fmt: skip
Fit = Callable[..., Run]
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    words = learn_tokenizer([row[k] for row in PAIRS for k in row], 270)
    folder = tmp_path_factory.mktemp("start")
    tiny_model(words).save_pretrained(folder)
    words.save_pretrained(folder)

    def train(algorithm: str, dataset: Any = PAIRS, **options: Any) -> Run:
        return prefzoo.train(algorithm, model=folder, dataset=dataset, **{**QUICK, **options})

    return train


def numbers(run: Run) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in run.history]


# ------------------------------------------------------------------------------------------------ several terms


def test_mpo_is_the_weighted_sum_of_its_three_parts(fit: Fit) -> None:
    """At the start every preference part is log 2, of BCO one for each side."""
    first = fit("mpo", max_steps=1).history[0]
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["loss/bco"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["loss/chosen_nll"] == pytest.approx(fit("chosen_nll", max_steps=1).history[0]["loss"], rel=1e-5)
    expected = (0.8 + 2 * 0.2) * math.log(2) + first["loss/chosen_nll"]
    assert first["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("weights", "alone"), [((1, 0, 0), "dpo"), ((0, 0, 1), "chosen_nll")])
def test_mpo_with_one_part_is_that_part(weights: tuple[int, int, int], alone: str, fit: Fit) -> None:
    of = dict(zip(("preference", "quality", "generation"), map(float, weights), strict=True))
    assert weights_hash(fit("mpo", **of).policy) == weights_hash(fit(alone).policy)


def test_the_bco_of_a_pair_is_that_of_its_two_labelled_rows(fit: Fit) -> None:
    """Pairs taken apart inside the record give the gradient of the converted rows."""
    inside = fit("mpo", preference=0.0, generation=0.0, quality=0.5, running=False, max_steps=2)
    outside = fit("bco", balanced=False, running=False, rows_per_step=8, max_steps=2)
    assert inside.history[1]["bco/delta"] != 0
    for name, row in enumerate(outside.history):
        assert inside.history[name]["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert inside.history[name]["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)


def test_weights_of_pairs_reach_both_of_their_sides(fit: Fit) -> None:
    heavy = [{**row, "weight": 1.0 + (i > 1)} for i, row in enumerate(PAIRS)]
    twice = [row for i, row in enumerate(PAIRS) for _ in range(1 + (i > 1))]
    weighted = fit("mpo", heavy, generation=0.0, running=False, max_steps=1).history[0]["grad_norm"]
    repeated = fit("mpo", twice, generation=0.0, running=False, max_steps=1, rows_per_step=6).history[0]["grad_norm"]
    assert weighted == pytest.approx(repeated * 6 / 4, rel=1e-4)  # the count is of rows


def test_fdpo_is_dpo_with_another_divergence(fit: Fit) -> None:
    hashes = {d: weights_hash(fit("fdpo", divergence=d).policy) for d in ("reverse_kl", "js", "forward_kl")}
    assert hashes["reverse_kl"] == weights_hash(fit("dpo").policy)
    assert hashes["js"] == weights_hash(fit("dpo", divergence="js").policy) and len(set(hashes.values())) == 3
    with pytest.raises(prefzoo.UsageError, match="alpha has no effect with divergence='js'"):
        fit("fdpo", alpha=0.3)


# ------------------------------------------------------------------------------------------------ bco


def test_bco_adds_the_means_of_its_classes(fit: Fit) -> None:
    """Four good rows and a bad one: at the start 2 log 2, where a mean over rows has log 2."""
    losses = {b: fit("bco", THUMBS, balanced=b, rows_per_step=5, max_steps=1).history[0]["loss"] for b in (True, False)}
    assert losses[True] == pytest.approx(2 * math.log(2), abs=1e-5)
    assert losses[False] == pytest.approx(math.log(2), abs=1e-5)
    heavy = [{**row, "weight": 3.0} for row in THUMBS]
    weighted = fit("bco", heavy, rows_per_step=5, max_steps=1).history[0]["loss"]
    assert weighted == pytest.approx(3 * losses[True], rel=1e-5)


def test_the_shift_is_the_mean_of_the_midpoints_so_far(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    midpoints: list[tuple[float, int]] = []
    original = RunningMean.with_batch

    def watched(self: RunningMean, value: float, rows: int) -> float:
        midpoints.append((value, rows))
        return original(self, value, rows)

    monkeypatch.setattr(RunningMean, "with_batch", watched)
    run = fit("bco", THUMBS, max_steps=5, learning_rate=0.2, shuffle=False)
    assert [rows for _, rows in midpoints] == [4, 1, 4, 1, 4]
    for step, row in enumerate(run.history):
        so_far = midpoints[: step + 1]
        mean = sum(v * n for v, n in so_far) / sum(n for _, n in so_far)
        assert row["bco/delta"] == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert abs(midpoints[4][0] - run.history[4]["bco/delta"]) > 1e-4, "it runs ahead of nothing: nothing is proved"


def test_an_evaluation_does_not_move_the_shift(fit: Fit) -> None:
    plain = fit("bco", THUMBS, max_steps=4)
    watched = fit("bco", THUMBS, max_steps=4, eval_dataset=[{**r, "prompt": "hum:"} for r in THUMBS], eval_steps=1)
    shifts = [[row["bco/delta"] for row in run.history if "bco/delta" in row] for run in (plain, watched)]
    assert shifts[0] == shifts[1] and weights_hash(plain.policy) == weights_hash(watched.policy)


@pytest.mark.parametrize(("name", "options"), [
    ("bco", {}), ("bema_dpo", {"every": 1}),
    pytest.param("tr_dpo", {"alpha": 1.0, "every": 2, "lora": True}, marks=pytest.mark.long),
], ids=str)  # fmt: skip
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    name: str, options: dict[str, Any], fit: Fit, tmp_path: Path
) -> None:
    """The running shift, and a reference between two updates, are kept in checkpoints."""
    data = THUMBS if name == "bco" else PAIRS
    options = {**options, "max_steps": 5, "learning_rate": 0.2, "save_steps": 3, "rows_per_step": 2}
    whole = fit(name, data, output_dir=tmp_path / "whole", **options)
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        fit(name, data, output_dir=folder, callback=stop_at_4, **options)
    again = fit(name, data, output_dir=folder, resume=True, **options)
    assert weights_hash(again.policy) == weights_hash(whole.policy)
    assert numbers(again) == numbers(whole)


def stop_at_4(step: int, *_: Any) -> None:
    if step == 4:
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------ moving references


@pytest.mark.parametrize("lora", [False, True])
def test_a_reference_that_is_the_policy_has_no_margin(lora: bool, fit: Fit, engines: list[Engine]) -> None:
    """A hard copy after every step: each step begins at log 2, also where both are adapters of one model."""
    for every, moves in ((1, False), (2, True)):
        run = fit("tr_dpo", alpha=1.0, every=every, lora=lora)
        margins = [abs(row["rewards/margins"]) for row in run.history]
        assert margins[0] < 1e-5 and (margins[1] > 1e-4) == moves and margins[2] < 1e-5, margins
    engine = engines[0]
    assert engine.reference is not None and engine.reference is not engine.policy
    assert weights_hash(engine.reference) == weights_hash(engine.policy)


def test_a_soft_update_is_between_the_reference_and_the_policy(fit: Fit, engines: list[Engine]) -> None:
    start = fit("dpo", learning_rate=0.0, max_steps=1).policy
    fit("tr_dpo", alpha=0.25, every=1, max_steps=1, learning_rate=0.5)
    engine = engines[-1]
    assert engine.reference is not None and start is not None
    moved = 0.0
    for was, now, ref in zip(*(m.parameters() for m in (start, engine.policy, engine.reference)), strict=True):
        torch.testing.assert_close(ref, was + 0.25 * (now.detach() - was), atol=1e-6, rtol=1e-4)
        moved += float((now - was).norm())
        assert not ref.requires_grad
    assert moved > 1e-2


def test_what_lies_under_an_adapter_is_one_for_both_and_not_in_the_checkpoint(fit: Fit, engines: list[Engine]) -> None:
    fit("tr_dpo", alpha=1.0, every=1, lora=True, max_steps=1)
    engine = engines[0]
    assert engine.reference is not None
    for (name, mine), theirs in zip(engine.policy.named_parameters(), engine.reference.parameters(), strict=True):
        assert (mine is theirs) == (not is_adapter(name)), name
    kept = [name for name in engine.state()[0] if name.startswith("reference/")]
    assert kept and all(is_adapter(name) for name in kept)
    assert isinstance(engine.policy, Policy)


def test_a_bias_corrected_reference_is_ahead_of_the_mean(fit: Fit, engines: list[Engine]) -> None:
    """Two updates by hand, from the weights of runs of one and two steps."""
    start = fit("dpo", learning_rate=0.0, max_steps=1).policy
    weights = []
    for steps in (1, 2):
        fit("bema_dpo", every=1, max_steps=steps, learning_rate=0.5)
        weights.append([p.detach().clone() for p in engines[-1].policy.parameters()])
    assert engines[-1].reference is not None and start is not None
    for was, first, second, ref in zip(start.parameters(), *weights, engines[-1].reference.parameters(), strict=True):
        mean = was + 11**-0.5 * (first - was)
        mean = mean + 12**-0.5 * (second - mean)
        torch.testing.assert_close(ref, mean + 12**-0.2 * (second - was), atol=1e-6, rtol=1e-4)
    with pytest.raises(prefzoo.UsageError, match="needs alpha=1, a hard copy"):
        fit("bema_dpo", lora=True)


def test_weights_between_two_adapters_are_refused_with_the_cure(fit: Fit) -> None:
    with pytest.raises(prefzoo.UsageError, match="needs alpha=1, a hard copy"):
        fit("tr_dpo", lora=True)
