"""Calibration: the temperature of least NLL, what it changes and what it leaves, and the folder it is kept in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from prefzoo.data.tokens import tokenise
from prefzoo.feedback import ModelReward, calibrate, resolve_reward
from prefzoo.feedback.calibration import BINS, fit_temperature, quality
from prefzoo.models.load import learn_tokenizer, load_policy, load_scorer, new_scorer, save_scorer, tiny_model
from prefzoo.models.roles import Policy, Scorer
from prefzoo.registry import UsageError


def nll(difference: np.ndarray, label: np.ndarray, temperature: float) -> float:
    return quality(difference / temperature, label).nll


@pytest.mark.parametrize("truth", [0.25, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found_and_none_is_better(truth: float) -> None:
    random = np.random.default_rng(0)
    size = np.abs(random.normal(size=20_000)) * 2
    won = random.random(len(size)) < 1 / (1 + np.exp(-size / truth))
    difference = np.where(won, size, -size)
    label = np.ones(len(size))
    found = fit_temperature(difference)
    assert found == pytest.approx(truth, rel=0.05)
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert nll(difference, label, found) < nll(difference, label, found * factor)
    before, after = quality(difference, label), quality(difference / found, label)
    assert after.accuracy == before.accuracy and after.ece < 0.02 and after.nll <= before.nll
    if truth != 1.0:
        assert before.ece > 0.05
    assert fit_temperature(difference / found) == pytest.approx(1)
    assert fit_temperature(difference * 7) == pytest.approx(7 * found)


def test_the_order_in_which_pairs_are_told_does_not_matter() -> None:
    random = np.random.default_rng(1)
    difference, label = random.normal(size=500) + 0.5, random.random(500) * 0.4 + 0.6
    turned = random.random(500) < 0.5
    other = np.where(turned, -difference, difference), np.where(turned, 1 - label, label)
    assert fit_temperature(*other) == pytest.approx(fit_temperature(difference, label))
    one, two = quality(difference, label), quality(*other)
    assert (one.nll, one.accuracy, one.ece) == pytest.approx((two.nll, two.accuracy, two.ece))


def test_soft_labels_count_as_so_many_pairs() -> None:
    difference = np.array([2.0, 2.0, 2.0, -2.0, 1.0, 1.0, -1.0])
    soft = fit_temperature(np.array([2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0]), np.array([0.75] * 4 + [2 / 3] * 3))
    assert soft == pytest.approx(fit_temperature(difference))


def test_quality_by_hand() -> None:
    found = quality(np.array([math.log(3), math.log(3), -math.log(3), 0.0]), np.ones(4))
    assert found.pairs == 4 and found.accuracy == 2.5 / 4
    assert found.nll == pytest.approx((2 * math.log(4 / 3) + math.log(4) + math.log(2)) / 4)
    assert found.ece == pytest.approx((3 * abs(0.75 - 2 / 3) + 0) / 4)
    certain = quality(np.array([1e4, -1e4]), np.ones(2))
    assert certain.nll == 5e3 and certain.ece == 0.5


@pytest.mark.parametrize(
    ("difference", "told"),
    [([], "no pair"), ([1.0, math.nan], "not finite"), ([0.0, 0.0], "no better than a coin"),
     ([1.0, -1.0], "no better than a coin"), ([-1.0, -2.0], "exchanged"), ([1.0, 2.0], "all 2 pairs")],
)  # fmt: skip
def test_pairs_that_have_no_temperature_are_told_why(difference: list[float], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        fit_temperature(np.array(difference))


# ------------------------------------------------------------------------------------------------ of a reward model


@pytest.fixture(scope="module")
def words() -> Any:
    return learn_tokenizer(["which is it? abcdefghij"], 300)


def noisy(words: Any, scorer: Scorer, flipped: float = 0.25, count: int = 80) -> list[dict[str, Any]]:
    """Pairs in the order that the reward model has them in, but for a share."""
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("abcdefghij"), 6)) for _ in range(2 * count)]
    rows = [{"prompt": f"which {i}?", "chosen": texts[2 * i], "rejected": texts[2 * i + 1]} for i in range(count)]
    samples, _ = tokenise(rows, words, "pairs")
    scores_B = ModelReward(scorer)(samples)
    for i, row in enumerate(rows):
        if bool(scores_B[2 * i] < scores_B[2 * i + 1]) != (i < flipped * count):
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


def made(words: Any, pooling: Any, library: bool) -> Scorer:
    if library:  # an architecture for which the library has a classifier: the scale goes into the weight
        config = LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(1)
        policy = load_policy(LlamaForCausalLM(config))
    else:
        policy = Policy(tiny_model(words, seed=1))
    scorer = new_scorer(policy, pooling)
    torch.manual_seed(1)
    torch.nn.init.normal_(scorer.head.weight)
    return scorer


@pytest.mark.parametrize("library", [False, True])
def test_the_temperature_becomes_the_scale_of_the_folder(words: Any, tmp_path: Path, library: bool) -> None:
    scorer = made(words, "last" if library else "mean", library)
    rows = noisy(words, scorer)
    save_scorer(scorer, words, tmp_path / "rm")
    found = calibrate(tmp_path / "rm", rows, output=tmp_path / "out", share=0.5, device="cpu")
    assert found.held_out and found.fitted_on + found.before.pairs == len(rows)
    assert found.after.accuracy == found.before.accuracy
    samples, _ = tokenise(rows, words, "pairs")
    before, after = (resolve_reward(str(tmp_path / name), words)(samples) for name in ("rm", "out"))
    torch.testing.assert_close(after, before / found.temperature, rtol=1e-4, atol=1e-5)
    if library:  # anybody's loader gives them
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        ids = [*samples.prompts[0], *samples.completions[0]]
        with torch.no_grad():
            logit = model(torch.tensor([ids])).logits[0, 0]
        assert logit.item() == pytest.approx(after[0].item(), abs=1e-4)
    facts = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert facts["temperature"] == found.temperature and facts["after"]["nll"] == found.after.nll
    png = (tmp_path / "out" / "reliability.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 5_000
    again = calibrate(tmp_path / "out", rows, share=0.5, device="cpu")
    assert again.temperature == pytest.approx(1, abs=1e-3)


def test_a_reward_model_in_memory_stays_as_it_is(words: Any, tmp_path: Path) -> None:
    scorer = made(words, "mean", library=False)
    scorer.scale.fill_(2.0)
    scorer.offset.fill_(1.0)
    rows = noisy(words, scorer)
    found = calibrate(scorer, rows, tokenizer=words, share=1, output=tmp_path / "out", device="cpu")
    assert scorer.scale == 2.0 and scorer.offset == 1.0 and not found.held_out
    assert load_scorer(tmp_path / "out").scale.item() == pytest.approx(2 * found.temperature)
    best = fit_temperature(_differences(words, scorer, rows))
    assert found.temperature == pytest.approx(best)
    assert sum(r["pairs"] for r in found.bins) == 2 * len(rows) and len(found.bins) <= 2 * BINS
    assert all(r["to"] - r["from"] == pytest.approx(0.5 / BINS) for r in found.bins)
    assert "the same" in found.lines()[0] and f"{found.after.nll:.4f}" in found.lines()[-1]


def _differences(words: Any, scorer: Scorer, rows: list[dict[str, Any]]) -> np.ndarray:
    samples, _ = tokenise(rows, words, "pairs")
    scores = ModelReward(scorer)(samples).double().numpy()
    return scores[0::2] - scores[1::2]


def test_what_cannot_be_calibrated_is_refused(words: Any, tmp_path: Path) -> None:
    scorer = made(words, "mean", library=False)
    rows = noisy(words, scorer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="there already"):
        calibrate(scorer, rows, tokenizer=words, output=tmp_path / "full")
    with pytest.raises(UsageError, match="tokenizer="):
        calibrate(scorer, rows)
    with pytest.raises(UsageError, match="share"):
        calibrate(scorer, rows, tokenizer=words, share=0.0)
    with pytest.raises(UsageError, match="all 80 pairs are in the right order"):
        calibrate(scorer, noisy(words, scorer, flipped=0.0), tokenizer=words, share=1)


def test_the_command_prints_what_changed(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from prefzoo.cli import main

    scorer = made(words, "mean", library=False)
    save_scorer(scorer, words, tmp_path / "rm")
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in noisy(words, scorer)))
    command = ["calibrate", str(tmp_path / "rm"), str(tmp_path / "pairs.jsonl")]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "temperature" in told and "before" in told and "reliability.png" in told
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["before"]["pairs"] == 40 and facts["folder"] is None
    assert main([*command, "--share", "7"]) == 2 and "share" in capsys.readouterr().err
