"""A run's record, what two records differ in, `prefzoo diff`, determinism mode, and the random state as data."""

import copy
import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

import prefzoo
from prefzoo.algorithm import Algorithm
from prefzoo.cli import main
from prefzoo.cli.diff import Place, compare_metrics, compare_weights
from prefzoo.data.formats import load_dataset
from prefzoo.feedback import resolve_reward
from prefzoo.losses import create_loss
from prefzoo.models.load import learn_tokenizer, load_policy, save_policy, tiny_model
from prefzoo.parts.source import DatasetRows
from prefzoo.plugins import import_function
from prefzoo.registry import RunError, UsageError
from prefzoo.training import record as records
from prefzoo.training.config import TrainConfig
from prefzoo.training.determinism import deterministic, rng_state, set_rng_state
from prefzoo.training.record import (
    NO_EFFECT,
    ROUNDING,
    commit,
    describe,
    differences,
    fingerprint,
    refuse_foreign,
    write_record,
)

PAIRS = [{"prompt": f"{n} and {n}:", "chosen": f" {n + n}", "rejected": f" {n}{n}"} for n in range(1, 17)]
FACTS = {"model": "m", "reward": None, "fingerprints": {"model": "1", "tokenizer": "2"}}


def record_of(algorithm="dpo", rows=PAIRS, facts=FACTS, options=None, **settings):
    chosen = prefzoo.create_algorithm(algorithm, **options or {}) if isinstance(algorithm, str) else algorithm
    return describe(chosen, TrainConfig.of(settings), load_dataset(rows), None, facts)


def effects(mine, theirs):
    return {d.place: d.effect for d in differences(mine, theirs)}


# ---------------------------------------------------------------------------------------------------- record


def test_a_record_is_json_and_differs_from_itself_in_nothing():
    found = record_of()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert differences(found, json.loads(json.dumps(found))) == [] == differences(found, record_of())


def test_a_record_names_what_a_run_is_a_function_of():
    found = record_of()
    assert {"torch", "transformers", "prefzoo", "python", "safetensors", "numpy"} <= found["versions"].keys()
    assert {"threads", "cores", "processor", "gpus", "processes", "device"} <= found["hardware"].keys()
    assert found["sources"].keys() == {"dpo", "loss:dpo"} and found["layer"] and found["data"]["hash"]


def test_a_function_among_the_options_is_recorded_by_its_content():
    first, second, third = (records._json({"f": f}) for f in (lambda x: x, lambda x: x, lambda x: x + 1))
    assert first == second != third and " at 0x" not in str(first)


def test_a_record_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_record({"a": 1}, tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match=r"run\.json could not be written .*the disk is full.*make room"):
        write_record({"a": 2}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1}


def test_the_commit_is_told_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commit() is None  # no repository
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    for said, expected in [("abc", {"hash": "abc", "changed": False}), ("abc-dirty", {"hash": "abc", "changed": True})]:
        git.write_text(f"#!/bin/sh\necho {said}\n")
        git.chmod(0o755)
        monkeypatch.setenv("PATH", str(git.parent))
        assert commit() == expected
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert commit() is None  # no git


# ----------------------------------------------------------------------------------------------- differences

LEAVES = st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["a", "b"]) | st.just(float("nan"))
TREES = st.dictionaries(
    st.sampled_from(["config", "data", "model", "x"]),
    st.recursive(LEAVES, lambda t: st.dictionaries(st.sampled_from("abc"), t, max_size=3) | st.lists(t, max_size=2)),
)


@given(TREES, TREES)
def test_differences_are_symmetric_and_none_of_a_record_with_itself(one, other):
    there = {d.place: (d.here, d.there, d.effect) for d in differences(one, other)}
    back = {d.place: (d.there, d.here, d.effect) for d in differences(other, one)}
    assert repr(sorted(there.items())) == repr(sorted(back.items()))
    assert differences(one, one) == []


def test_every_option_of_the_training_has_exactly_one_effect():
    fields = set(TrainConfig.model_fields)
    assert fields >= NO_EFFECT | ROUNDING and not NO_EFFECT & ROUNDING
    for field in fields:
        expected = "none" if field in NO_EFFECT else "rounding" if field in ROUNDING else "result"
        assert effects({"config": {field: 1}}, {"config": {field: 2}}) == {f"config.{field}": expected}


@pytest.mark.parametrize("place", ["config.not_yet_invented", "options.beta", "seed", "versions.torch", "layer"])
def test_what_is_not_known_to_be_harmless_changes_the_result(place):
    assert effects(_nested(place, 1), _nested(place, 2)) == {place: "result"}


def _nested(place, value):
    return functools.reduce(lambda inner, key: {key: inner}, reversed(place.split(".")), value)


COMPOSITION = {"composition": "none", "fingerprints.composition": "none"}  # it follows from the options


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"learning_rate": 1e-4}, {"config.learning_rate": "result", "given.learning_rate": "none"}),
        ({"tokens_per_batch": 64}, {"config.tokens_per_batch": "rounding", "given.tokens_per_batch": "none"}),
        ({"learning_rate": 1e-6}, {"given.learning_rate": "none"}),  # the default, said
        ({"rows": PAIRS[::-1]}, {"data.hash": "result"}),
        ({"options": {"beta": 0.2}}, {"options.beta": "result"} | COMPOSITION),
        ({"facts": FACTS | {"model": "elsewhere"}}, {"model": "none"}),
        ({"facts": FACTS | {"spent": {"seconds": 3}, "finished": True}}, {"spent": "none", "finished": "none"}),
    ],
)  # fmt: skip
def test_each_change_is_told_with_its_effect(changed, expected):
    assert effects(record_of(), record_of(**changed)) == expected


def test_a_name_is_believed_only_where_the_content_is_known():
    here = {"model": "a", "data": {"source": "a", "hash": "h"}, "fingerprints": {"model": "1", "tokenizer": "2"}}
    moved = here | {"model": "b", "data": {"source": "b", "hash": "h"}}
    assert set(effects(here, moved).values()) == {"none"}
    unknown = moved | {"fingerprints": {"model": "1"}}
    assert effects(here, unknown)["model"] == "result"
    assert effects(here | {"fingerprints": {}}, moved | {"fingerprints": {}})["model"] == "result"
    other = moved | {"data": {"source": "b", "hash": "i"}}
    assert effects(here, other)["data.source"] == "result"


def test_the_commit_matters_only_with_the_code():
    here, there = ({"commit": {"hash": h}, "layer": "1", "sources": {"dpo": "1"}} for h in "ab")
    assert effects(here, there) == {"commit.hash": "none"}
    assert effects(here, there | {"layer": "2"}) == {"commit.hash": "result", "layer": "result"}


def test_a_composition_of_ones_own_is_seen_whole():
    """Its options are not listed, so its parts must be."""
    here, there = (Algorithm(source=DatasetRows("pairs"), loss=create_loss("dpo", beta=b)) for b in (0.1, 0.2))
    assert effects(record_of(here), record_of(there)) == {"fingerprints.composition": "result"}
    assert record_of(here)["sources"].keys() == {"loss:dpo"}


# --------------------------------------------------------------------------------------------------- refusal

CHANGES = [
    {"learning_rate": 1e-4},
    {"options": {"beta": 0.2}},
    {"rows": PAIRS[1:]},
    {"columns": {"prompt": "prompt"}},
    {"facts": FACTS | {"fingerprints": {"model": "9", "tokenizer": "2"}}},
    {"seed": 3},
]


@pytest.mark.parametrize("changed", CHANGES)
def test_the_refusal_names_each_change_and_its_own_cure_is_accepted(changed):
    mine, theirs = record_of(**changed), record_of()
    with pytest.raises(UsageError, match=r"^checkpoint x is of another run") as told:
        refuse_foreign(mine, theirs, (), "checkpoint x")
    text = str(told.value)
    assert all(d.words() in text for d in differences(mine, theirs) if d.effect == "result")
    words = re.search(r"--may-differ (\S+)", text)[1].split(",")
    assert refuse_foreign(mine, theirs, words, "checkpoint x") == []
    assert refuse_foreign(mine, theirs, ",".join(words), "checkpoint x") == []
    for left_out in words:  # each is needed
        with pytest.raises(UsageError):
            refuse_foreign(mine, theirs, [w for w in words if w != left_out], "checkpoint x")
    assert refuse_foreign(mine, theirs, ["all"], "checkpoint x") == []


def test_another_algorithm_is_another_folders():
    with pytest.raises(UsageError, match=r"^checkpoint x is of 'dpo', this run is 'ipo'; choose another folder"):
        refuse_foreign(record_of(algorithm="ipo"), record_of(), (), "checkpoint x")
    assert refuse_foreign(record_of(algorithm="ipo"), record_of(), ["all"], "checkpoint x") == []


@pytest.mark.parametrize("word", ["config.learning_rate", "learning_rate", "config", "all"])
def test_a_difference_is_allowed_by_place_last_part_and_group(word):
    assert refuse_foreign(record_of(learning_rate=1e-4), record_of(), [word], "x") == []


def test_a_word_that_allows_nothing_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"'learning_rat'; did you mean '.*learning_rate'"):
        refuse_foreign(record_of(), record_of(), ["learning_rat"], "x")


def test_rounding_is_handed_back_and_refused_in_deterministic_mode():
    here, there = ({"config": {}, "hardware": {"threads": n}} for n in (1, 2))
    assert [d.place for d in refuse_foreign(here, there, (), "x")] == ["hardware.threads"]
    strict = here | {"config": {"deterministic": True}}, there | {"config": {"deterministic": True}}
    with pytest.raises(UsageError, match="threads: 1 here, 2 there"):
        refuse_foreign(*strict, (), "x")
    assert refuse_foreign(*strict, ["threads"], "x")


# ---------------------------------------------------------------------------------------------- fingerprints

REWARD = '''
import math
SCALE = {"e": 2.0}
UNUSED = 1

def helper(text):
    return text.count("e") * SCALE["e"]

def unused():
    return 0

def reward(completions, weight=1.0, **columns):
    """Counts."""
    return [weight * helper(c) if c not in {"a", "b", "c"} else math.pi for c in completions]

fewer = lambda completions, **_: [1.0 for c in completions]
'''


def of_text(folder, text, name="reward"):
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text(text)
    return fingerprint(import_function(f"{folder / 'mine.py'}:{name}"))


@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        ("weight=1.0", "weight=2.0", True),
        ("weight * helper", "weight + helper", True),
        ('text.count("e")', 'text.count("a")', True),
        ('SCALE = {"e": 2.0}', 'SCALE = {"e": 3.0}', True),
        ("import math", "import cmath as math", True),
        ("UNUSED = 1", "UNUSED = 2", False),
        ("return 0", "return 1", False),
        ("import math", "# a comment\nimport math", False),
        ("    return [weight", "    # a comment\n\n    return [weight", False),
    ],
)
def test_a_change_of_what_a_reward_computes_is_seen_and_no_other(tmp_path, old, new, seen):
    assert old in REWARD
    before, after = of_text(tmp_path / "a", REWARD), of_text(tmp_path / "b", REWARD.replace(old, new))
    assert (before != after) == seen


def test_a_lambda_is_seen_alone(tmp_path):
    before = of_text(tmp_path / "a", REWARD, "fewer")
    assert before == of_text(tmp_path / "b", REWARD.replace("weight", "w"), "fewer")
    assert before != of_text(tmp_path / "c", REWARD.replace("[1.0", "[2.0"), "fewer")


def test_a_fingerprint_is_the_same_in_every_process(tmp_path):
    """The order of a set is not; the second function has no file, so its code stands for it."""
    text = "def f(completions): return [c in {'a', 'b', 'c'} for c in completions]"
    (tmp_path / "mine.py").write_text(REWARD)
    spec, made = f"{tmp_path / 'mine.py'}:reward", {}
    exec(text, made)
    code = (
        "import sys; from prefzoo.plugins import import_function; from prefzoo.training.record import fingerprint\n"
        "made = {}; exec(sys.argv[2], made); print(fingerprint(import_function(sys.argv[1])), fingerprint(made['f']))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    said = subprocess.check_output([sys.executable, "-c", code, spec, text], env=environment, text=True).split()
    assert said == [fingerprint(import_function(spec)), fingerprint(made["f"])]
    assert len(set(said)) == 2


def test_what_a_function_is_bound_to_is_seen_and_what_it_fills_is_not():
    calls = []

    def made(bonus, cache):
        def reward(completions, **_):
            calls.append(1)
            cache["x"] = 1
            return [bonus for _ in completions]

        return reward

    plain = fingerprint(made(1.0, {}))
    assert plain == fingerprint(made(1.0, {"y": 2})) != fingerprint(made(2.0, {}))
    made(1.0, {})([""])
    assert plain == fingerprint(made(1.0, {}))
    assert fingerprint(functools.partial(made, bonus=1)) != fingerprint(functools.partial(made, bonus=2))


class Threshold:
    def __init__(self, least):
        self.least = least

    def __call__(self, completions, **_):
        return [float(len(c) > self.least) for c in completions]


def test_an_object_is_its_class_and_its_constants():
    assert fingerprint(Threshold(1)) == fingerprint(Threshold(1)) != fingerprint(Threshold(2))
    assert fingerprint(Threshold(1).__call__) != fingerprint(Threshold(2).__call__)


@pytest.fixture(scope="module")
def tiny():
    tokenizer = learn_tokenizer([row["prompt"] + row["chosen"] for row in PAIRS])
    return load_policy(tiny_model(tokenizer, seed=0), tokenizer=tokenizer), tokenizer


def test_a_model_is_its_weights_and_configuration_not_its_path(tiny, tmp_path):
    policy, tokenizer = tiny
    copies = []
    for name in "ab":
        save_policy(policy, tokenizer, tmp_path / name)
        copies.append(load_policy(str(tmp_path / name), tokenizer=tokenizer))
    first = fingerprint(copies[0])
    assert first == fingerprint(copies[1])
    with torch.no_grad():
        next(copies[1].parameters()).view(-1)[0] += 1e-3
    assert first != fingerprint(copies[1])
    copies[0].model.config.rms_norm_eps *= 2
    assert first != fingerprint(copies[0])


def test_a_tokenizer_is_its_vocabulary_and_its_template_however_it_was_used(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    first = fingerprint(tokenizer)
    tokenizer(["a", "and and and"], padding=True, truncation=True, max_length=4)
    assert first == fingerprint(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert first != fingerprint(tokenizer)


def test_each_part_of_a_sum_of_rewards_is_told(tiny):
    one, other = (
        fingerprint(resolve_reward(["exact", f"repetition_penalty(ngram_size={n})"], tiny[1], weights=[1.0, 0.5]))
        for n in (2, 3)
    )
    changed = differences({"fingerprints": {"reward": one}}, {"fingerprints": {"reward": other}})
    assert [d.place for d in changed] == ["fingerprints.reward.repetition_penalty_reward"]
    with pytest.raises(TypeError):
        fingerprint("exact")  # a name is no content


# ---------------------------------------------------------------------------------------------- random state


def draws():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.randn(()))]


def test_the_random_state_comes_back_from_tensors_and_json_alone():
    draws()  # a second normal number is waiting in each generator
    tensors, facts = rng_state()
    stored = save({k: v.contiguous() for k, v in tensors.items()}), json.dumps(facts)
    first = [draws() for _ in range(3)]
    set_rng_state(load(stored[0]), json.loads(stored[1]))
    assert [draws() for _ in range(3)] == first


def flags():
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
    )  # fmt: skip


def test_determinism_seeds_by_the_run_and_leaves_the_process_as_it_was():
    before, state = flags(), rng_state()
    first = draws()
    set_rng_state(*state)
    seen = []
    for seed in (0, 0, 1):
        with deterministic(TrainConfig.of({"seed": seed}), torch.device("cpu")):
            assert flags() == (True, False, "highest", True, False, False)
            seen.append(draws())
    assert seen[0] == seen[1] != seen[2]
    assert flags() == before and draws() == first


def test_an_operation_without_a_deterministic_kernel_is_told():
    before = flags()
    with (
        pytest.raises(UsageError, match="no deterministic kernel on cpu; run on another device"),
        deterministic(TrainConfig.of(), torch.device("cpu")),
    ):
        pooled, where = torch.nn.functional.max_pool2d(torch.rand(1, 1, 4, 4), 2, return_indices=True)
        torch.nn.functional.max_unpool2d(pooled, where, 2)
    assert flags() == before
    with pytest.raises(RuntimeError, match="mine"), deterministic(TrainConfig.of(), torch.device("cpu")):
        raise RuntimeError("mine")
    assert flags() == before


# -------------------------------------------------------------------------------------------------- prefzoo diff

ROWS = [{"step": s, "loss": 1 / s, "kl": s * 1e-9, "time": s * 0.1} for s in range(10, 60, 10)]
NAMES = ("a", "b")


def changed(index, **values):
    return [row | values if i == index else row for i, row in enumerate(ROWS)]


def test_metrics_agree_with_themselves_whatever_the_clock_says():
    later = [row | {"time": 99.0} for row in ROWS]
    found = compare_metrics(ROWS, later, NAMES)
    assert found.verdict == "the metrics agree bit for bit to step 50" and found.largest == 0


@pytest.mark.parametrize("index", range(5))
def test_metrics_part_where_they_were_changed_from_either_side(index):
    other = changed(index, loss=0.7)
    for pair in ((ROWS, other), (other, ROWS)):
        found = compare_metrics(*pair, NAMES)
        assert found.part_at == ROWS[index]["step"] and "loss" in found.verdict
        assert (f"agree bit for bit to step {10 * index} and part" in found.verdict) == (index > 0)


def test_rounding_is_told_apart_from_a_change():
    found = compare_metrics(ROWS, changed(2, loss=ROWS[2]["loss"] * (1 + 1e-8)), NAMES)
    assert found.verdict == "the metrics agree bit for bit to step 20, then to 3e-09 relative" and found.part_at is None
    assert compare_metrics(ROWS, changed(2, loss=ROWS[2]["loss"] * (1 + 1e-4)), NAMES).part_at == 30
    assert compare_metrics(ROWS, changed(2, kl=float("nan")), NAMES).part_at == 30
    assert compare_metrics(changed(2, kl=float("nan")), changed(2, kl=float("nan")), NAMES).largest == 0


def test_runs_of_other_lengths_and_metrics_are_compared_where_they_meet():
    found = compare_metrics(ROWS, ROWS[:3], NAMES)
    assert found.verdict == "the metrics agree bit for bit to step 30 (a has 2 lines more)"
    found = compare_metrics(ROWS, changed(0, reward=1.0), NAMES)
    assert found.verdict == "the metrics agree bit for bit to step 50 (only b has reward)"
    assert "logged none" in compare_metrics(ROWS, [], NAMES).verdict
    assert "other" not in compare_metrics(ROWS, [row | {"step": row["step"] + 1} for row in ROWS], NAMES).verdict


def test_stages_and_evaluations_are_lines_of_their_own():
    rows = [*ROWS, {"step": 50, "eval/loss": 1.0}, {"step": 10, "loss": 3.0}]
    found = compare_metrics(rows, [*rows[:-1], rows[-1] | {"loss": 4.0}], NAMES)
    assert "part at step 10 of stage 2: loss 3 / 4" in found.verdict


def weights_in(folder, **tensors):
    folder.mkdir()
    for name, value in tensors.items():  # one file each, as a model in shards
        save_file({name: value}, folder / f"model-{name}.safetensors")
    return Place(folder.name, folder, folder)


def test_the_distance_of_weights_is_that_of_all_of_them_at_once(tmp_path):
    a, b = ({"u": torch.randn(3, 4), "v": torch.randn(5)} for _ in range(2))
    here, there = weights_in(tmp_path / "a", **a), weights_in(tmp_path / "b", **b)
    flat_a, flat_b = (torch.cat([t.flatten() for t in x.values()]) for x in (a, b))
    found = compare_weights(here, there)
    assert found["distance"] == pytest.approx(float((flat_a - flat_b).norm() / flat_a.norm()))
    save_file({"noise": torch.zeros(2)}, tmp_path / "b" / "state.safetensors")  # of a checkpoint: no weights
    assert compare_weights(here, there) == found
    assert compare_weights(here, here) == {"words": "the weights are equal bit for bit", "distance": 0.0}
    half = weights_in(tmp_path / "c", u=a["u"].bfloat16(), v=a["v"].bfloat16())
    assert 0 < compare_weights(here, half)["distance"] < 0.01
    assert "only a has v" in compare_weights(here, weights_in(tmp_path / "d", u=a["u"]))["words"]
    assert "other shapes: u" in compare_weights(here, weights_in(tmp_path / "e", u=a["v"], v=a["v"]))["words"]


QUICK = {"model": "tiny", "dataset": PAIRS, "quiet": True, "max_steps": 3, "logging_steps": 1, "rows_per_step": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, learning_rate in (("a", 1e-3), ("b", 1e-3), ("c", 2e-3)):
        prefzoo.train("sft", output_dir=folder / name, learning_rate=learning_rate, **QUICK)
    return folder


@pytest.mark.parametrize("part", ["", "final"])
def test_equal_runs_are_told_equal(runs, capsys, part):
    assert main(["diff", str(runs / "a" / part), str(runs / "b")]) == 0
    out = capsys.readouterr().out
    assert "metrics agree bit for bit to step 3" in out and "weights are equal bit for bit" in out
    assert "changes the result" not in out and "Nothing that is recorded" not in out


def test_what_made_two_runs_differ_is_told(runs, capsys):
    assert main(["diff", str(runs / "a"), str(runs / "c")]) == 0
    out = capsys.readouterr().out
    assert "part at" in out and "‖a - b‖" in out
    assert re.search(r"config\.learning_rate\s+0\.001\s+0\.002", out)
    assert main(["diff", str(runs / "a"), str(runs / "c"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [d["place"] for d in told["differences"] if d["effect"] == "result"] == ["config.learning_rate"]
    assert told["weights"]["distance"] > 0


def test_a_difference_that_nothing_explains_says_what_may(runs, tmp_path, capsys):
    shutil.copytree(runs / "c", tmp_path / "c")
    shutil.copy(runs / "a" / "run.json", tmp_path / "c" / "run.json")
    assert main(["diff", str(runs / "a"), str(tmp_path / "c")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "The records are the same." in out and "--deterministic rules out the last" in out


def _damage(folder: Path, how: str) -> None:
    if how == "gone":
        shutil.rmtree(folder)
    elif how == "no record":
        (folder / "run.json").unlink()
    elif how == "broken record":
        (folder / "run.json").write_text("{")
    elif how == "other record":
        (folder / "run.json").write_text("[]")
    elif how == "broken metrics":
        (folder / "metrics.jsonl").write_text('oops\n{"step": 2}\n')
    elif how == "broken weights":
        file = folder / "final" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("gone", "no such folder"),
        ("no record", "give the output folder of a run"),
        ("broken record", r"run\.json cannot be read"),
        ("other record", "is not the record of a run"),
        ("broken metrics", r"metrics\.jsonl, line 1: not a line of metrics: 'oops'"),
        ("broken weights", r"model\.safetensors cannot be read"),
    ],
)
def test_bad_input_is_told_in_words(runs, tmp_path, capsys, how, words):
    shutil.copytree(runs / "a", tmp_path / "run" / "a")
    _damage(tmp_path / "run" / "a", how)
    assert main(["diff", str(runs / "a"), str(tmp_path / "run" / "a")]) == 2
    told = capsys.readouterr().err
    assert re.search(words, told) and "Traceback" not in told


def test_a_run_that_was_killed_is_compared_as_far_as_it_came(runs, tmp_path, capsys):
    shutil.copytree(runs / "a", tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "final")
    log = tmp_path / "a" / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text(f"{lines[0]}\n{lines[1]}\n{lines[2][:9]}")  # in the middle of a line
    found = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "a" / "run.json").write_text(json.dumps(found | {"finished": False}))
    assert main(["diff", str(runs / "a"), str(tmp_path / "a")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "agree bit for bit to step 2" in out and "is not finished" in out and "No weights to compare" in out
