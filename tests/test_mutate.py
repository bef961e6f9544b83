"""The mutation test itself: its operators on a small source, its measure on a few faults, a sample of all."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import mutate
import pytest

SCRIPT = Path(__file__).with_name("mutate.py")

SMALL = '''
@register_loss
def small(batch: Pairs, *, beta: float = -0.1) -> LossOut:
    """-1 * chosen_B."""
    if beta < 0:
        raise UsageError(f"beta is {-beta}")
    first_B = batch.chosen_B[:, 1:].detach()
    rate_B = (first_B > 0).float()
    loss_B = masked(-beta * first_B, batch.mask_BT).sum(-1).clamp(min=1)
    return LossOut(loss_B, {"rate": rate_B})
'''


def test_operators_on_a_small_source() -> None:
    mutants = list(mutate.Source.of(SMALL, "file").mutants())
    found = {(m.operator, m.before, m.after) for m in mutants}
    sum_ = "masked(-beta * first_B, batch.mask_BT).sum(-1)"
    assert found == {
        ("swap_sides", "batch.chosen_B[:, 1:]", "batch.rejected_B[:, 1:]"),
        ("off_by_one", "batch.chosen_B[:, 1:]", "batch.chosen_B[:, 2:]"),
        ("drop_stop_gradient", "batch.chosen_B[:, 1:].detach()", "batch.chosen_B[:, 1:]"),
        ("clip_side", "first_B > 0", "first_B < 0"),
        ("off_by_one", "first_B > 0", "first_B > 1"),
        ("drop_mask", "masked(-beta * first_B, batch.mask_BT)", "-beta * first_B"),
        ("flip_sign", "-beta", "beta"),
        ("drop_factor", "-beta * first_B", "-beta"),
        ("drop_factor", "-beta * first_B", "first_B"),
        ("sum_for_mean", sum_, "mean_of(masked(-beta * first_B, batch.mask_BT), -1)"),
        ("off_by_one", f"{sum_}.clamp(min=1)", f"{sum_}.clamp(min=2)"),
        ("clip_side", f"{sum_}.clamp(min=1)", sum_),
        ("clip_side", f"{sum_}.clamp(min=1)", f"{sum_}.clamp(max=1)"),
    }
    assert {m.before for m in mutants if m.logged} == {"first_B > 0"}  # rate_B is read by nothing but a metric
    assert {m.operator for m in mutants} == set(mutate.OPERATORS)


def test_a_fault_is_in_the_code_and_leaves_the_source_as_it_was() -> None:
    source = mutate.Source.of("def half(x):\n    return x / 2 + 1\n", "file")
    values = {}
    for mutant in source.mutants():
        scope: dict[str, object] = {}
        function = type(mutate.mean_of)(source.code("half", mutant), scope)
        values[mutant.after] = function(8)
    assert values == {"x / 2 - 1": 3, "x": 9, "x / 2 + 2": 6, "x / 2 + 0": 4}
    assert type(mutate.mean_of)(source.code("half"), {})(8) == 5


def test_every_mutant_is_an_expression_that_compiles() -> None:
    for source in mutate.all_sources():
        for mutant in source.mutants():
            if mutant.node is not None and mutant.hole is not None:
                whole = ast.Expression(ast.copy_location(mutant.node, mutant.hole.node))
                compile(ast.fix_missing_locations(whole), mutant.name, "eval")


def test_names_are_unique_and_what_is_excused_has_a_reason() -> None:
    mutants = [m for source in mutate.all_sources() for m in source.mutants()]
    assert len({m.name for m in mutants}) == len(mutants) > 1000
    mutate.check_equivalents(mutants)
    assert all(mutate.EQUIVALENT.values())
    assert len(mutate.EQUIVALENT) < 0.1 * len(mutants)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    if not hasattr(os, "fork"):
        pytest.skip("mutate.py forks")
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)


ONE_OF_EACH = [
    "unpaired:bco:flip_sign:1",
    "unpaired:bco:drop_factor:2",  # beta
    "unpaired:regret:swap_sides:1",
    "unpaired:class_midpoint:sum_for_mean:1",
    "unpaired:labelled:drop_mask:1",
    "unpaired:class_midpoint:drop_stop_gradient:1",
    "unpaired:density_ratio_weights:clip_side:1",
    "unpaired:density_ratio_weights:off_by_one:1",
]
UNSEEN = "pairwise:ipo:flip_sign:1"


def test_named_faults_are_caught_and_one_that_no_test_sees_is_told() -> None:
    relations = (
        "monotone_in_the_ratio",
        "other_label_is_mirrored_ratio",
        "class_weights_scale_their_class_only",
        "bco_without_shift_is_bco_pair_taken_apart",
        "of_one_class_the_shift_is_its_mean_and_weights_are_1",
        "midpoint_is_as_far_from_both_classes",
        "density_ratio_weights_are_bounded_and_detached",
    )
    tests = [f"tests/losses/test_unpaired.py::test_{name}" for name in relations]
    done = run(*tests, "--only", *ONE_OF_EACH, UNSEEN, "--jobs", "1")
    assert {name.split(":")[2] for name in ONE_OF_EACH} == set(mutate.OPERATORS)
    assert "9 mutants" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("SURVIVED") == 1 and f"survivors:\n{UNSEEN}" in done.stdout
    assert done.returncode == 1  # 8 of 9


@pytest.mark.long
def test_a_sample_of_all_faults_is_caught() -> None:
    done = run("--sample", "40", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
