"""The theory laboratory: every finding of every entry holds, every loss has one, and a wrong loss is found out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefzoo.losses import LOSSES, create_loss
from prefzoo.records import LossOut, Pairs, Ranked, RankedScores, Ratings, Record, Scores, StepScores, Unpaired
from prefzoo.theory import Finding, online, pairs, preferences, ranked, rewards, unpaired
from prefzoo.theory.base import Theorem, load_theorems

ALL = [(t, entry) for t in load_theorems() for entry in t.entries]
PREFERENCE_FAMILIES = (Pairs, Unpaired, Ranked, Scores, RankedScores, Ratings, StepScores)
PREFERENCE = [n for n in LOSSES.names() if LOSSES.entry(n).tags["family"] in PREFERENCE_FAMILIES]
MODULES = (online, pairs, preferences, ranked, rewards, unpaired)


@pytest.mark.parametrize(("theorem", "entry"), ALL, ids=[f"{t.name}-{entry}" for t, entry in ALL])
def test_every_finding_holds(theorem: Theorem, entry: str) -> None:
    found = list(theorem.prove(entry))
    assert found, "a theorem that finds nothing"
    assert all(f.entry == entry for f in found)
    wrong = [f.words for f in found if not f.holds]
    assert not wrong, wrong


def test_every_loss_has_a_theorem() -> None:
    spoken_of = {entry for t in load_theorems() for entry in t.entries}
    assert [n for n in LOSSES.names() if n not in spoken_of] == []


def test_names_of_theorems_and_entries_are_told_apart() -> None:
    """No theorem speaks twice of an entry, and none of two theorems about one entry have one name in one module."""
    for theorem, entry in ALL:
        assert theorem.entries.count(entry) == 1
    assert len({(t.prove.__module__, t.name) for t in load_theorems()}) == len(load_theorems())


def test_a_finding_can_fail() -> None:
    assert Finding("x", "limit", "claim", 1.0, 1.0).holds
    assert not Finding("x", "limit", "claim", 1.1, 1.0).holds
    assert not Finding("x", "limit", "claim", float("nan"), 1.0).holds
    assert Finding("x", "bias", "claim", 1.1, None).holds


# -- wrong losses -----------------------------------------------------------------------------------------------------

Wrong = Callable[[Record], Record]


def other_way(batch: Record) -> Record:
    """The record with the label turned round."""
    if isinstance(batch, Pairs):
        return batch.swapped()
    if isinstance(batch, Unpaired):
        return dataclasses.replace(batch, desirable_B=~batch.desirable_B)
    if isinstance(batch, Ranked | RankedScores):
        names = [n for n in batch.tensors() if "_PK" in n]
        return dataclasses.replace(batch, **{n: batch.tensors()[n].flip(1) for n in names if n != "scores_PK"})
    if isinstance(batch, Scores):
        return dataclasses.replace(batch, chosen_B=batch.rejected_B, rejected_B=batch.chosen_B)
    if isinstance(batch, Ratings):
        return dataclasses.replace(batch, targets_B=-batch.targets_B)
    assert isinstance(batch, StepScores)
    return dataclasses.replace(batch, labels_BT=1 - batch.labels_BT)


# A change of sides along with probability or margin changes nothing of these, by their contract.
SYMMETRIC = ("sppo_soft", "reward_aware_rpo")


def spoil(monkeypatch: pytest.MonkeyPatch, entry: str, wrong: Callable[[Any, Any], LossOut]) -> None:
    """Replace one loss, in the laboratory only."""

    def create(name: str, /, **options: Any) -> Any:
        loss = create_loss(name, **options)
        return (lambda batch: wrong(loss, batch)) if name == entry else loss

    for module in MODULES:
        monkeypatch.setattr(module, "create_loss", create)


def found_out(entry: str) -> bool:
    """Whether a finding does not hold; the proofs stop at the first."""
    return any(not f.holds for t in load_theorems() if entry in t.entries for f in t.prove(entry))


@pytest.mark.parametrize("entry", [n for n in PREFERENCE if n not in SYMMETRIC])
def test_a_loss_with_its_label_turned_round_is_found_out(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, entry, lambda loss, batch: loss(other_way(batch)))
    assert found_out(entry)


def half_a_side(batch: Record) -> Record:
    """The record with all that is compared made a tenth larger on the chosen side, or of the first of a list."""
    changed = {}
    for name, x in batch.tensors().items():
        if name in ("chosen_logps_BT", "chosen_B", "logps_BT", "rewards_B", "scores_BT"):
            changed[name] = 1.1 * x
        elif name in ("logps_PKT", "rewards_PK"):
            first = torch.arange(x.shape[1]).view(1, -1, *[1] * (x.dim() - 2)) == 0
            changed[name] = torch.where(first, 1.1 * x, x)
    return dataclasses.replace(batch, **changed)


@pytest.mark.parametrize("entry", [n for n in PREFERENCE if n != "chosen_nll"])
def test_a_loss_that_counts_one_side_a_tenth_more_is_found_out(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not ``chosen_nll``: of one side alone a tenth more is another scale of the loss."""
    spoil(monkeypatch, entry, lambda loss, batch: loss(half_a_side(batch)))
    assert found_out(entry)


SCALED = [n for n in PREFERENCE if {"beta", "delta"} & set(LOSSES.entry(n).own_options)]


@pytest.mark.parametrize("entry", SCALED)
def test_a_loss_with_another_scale_is_found_out(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, /, **options: Any) -> Any:
        own = LOSSES.entry(name).options
        key = "delta" if "delta" in own else "beta"
        changed = {key: 1.1 * options.get(key, own[key])} if name == entry else {}
        return create_loss(name, **(options | changed))

    for module in MODULES:
        monkeypatch.setattr(module, "create_loss", create)
    assert found_out(entry)
