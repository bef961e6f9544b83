"""What watches a run: the watchdog, the monitor, and the post-mortem of a step that is not finite."""

from __future__ import annotations

import gc
import itertools
import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import prefzoo
from prefzoo.data.samples import Ragged, Samples
from prefzoo.feedback import resolve_reward, rewards
from prefzoo.models.load import learn_tokenizer
from prefzoo.training.guards import Monitor, Watchdog, gradient_norms, not_finite, words, write_post_mortem

TEXTS = ["say a:", " a a", " b b b", "count to nine:", " 1 2 3 4", " 9 b a"]
TOKENIZER = learn_tokenizer(TEXTS, 300)
NAN, INF = math.nan, math.inf


# ------------------------------------------------------------------------------------------------ the watchdog


class Hands:
    """A clock that only a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.said: list[str] = []
        self.dog = Watchdog(10, self.said.append, clock=lambda: self.now)

    def after(self, minutes: float) -> list[str]:
        """What is said when so many minutes more have passed."""
        self.now += 60 * minutes
        self.said.clear()
        self.dog.look()
        return [*self.said]


def test_the_watchdog_names_phase_place_and_cure_at_doubling_intervals_and_says_when_it_goes_on():
    hands = Hands()
    hands.dog.doing("sampling for step 57")
    assert hands.after(9.9) == []
    (line,) = hands.after(0.2)
    assert "for 10 minutes" in line and "sampling for step 57" in line and "kill -TERM" in line and "Ctrl-C" in line
    assert [len(hands.after(1)) for _ in range(31)] == [0] * 9 + [1] + [0] * 19 + [1, 0]  # after 20 and 40 minutes
    hands.dog.doing("forward and backward of step 57")
    (line,) = hands.after(0.1)
    assert "goes on" in line and "41 minutes" in line and "sampling for step 57" in line
    assert hands.after(9) == [] and len(hands.after(1)) == 1  # from the beginning


def test_progress_keeps_the_watchdog_silent_and_so_does_the_callers_own_loop():
    hands = Hands()
    for step in range(50):
        hands.dog.doing(f"step {step}")
        assert hands.after(9) == []
    hands.dog.idle()
    assert hands.after(1e6) == []


def test_the_same_phase_again_is_progress():
    hands = Hands()
    for _ in range(5):
        hands.dog.doing("step 1")
        assert hands.after(9) == []


def test_a_clock_that_goes_backwards_changes_nothing(monkeypatch):
    """The wall clock is not asked; and if the other one went back, there would be no alarm and no error."""
    hands = Hands()
    hands.dog.doing("step 1")
    for wall in (1e9, 0.0):
        monkeypatch.setattr(time, "time", lambda wall=wall: wall)
        assert hands.after(4) == []
    assert hands.after(-1000) == []
    assert len(hands.after(1010)) == 1


def nap(asleep: threading.Event, wake: threading.Event) -> list[float]:
    asleep.set()
    wake.wait(20)  # the line that hangs
    return [1.0] * 4


def said_of(run: Callable[[], object], wanted: str) -> str:
    """What is said of a thread that does this, once it has come to the line that is wanted; "" if it never does."""
    said: list[str] = []
    dog = Watchdog(1.0, said.append, clock=lambda: 0.0)

    def thread() -> None:
        dog.doing("reward function 'nap' for step 3")
        run()

    running = threading.Thread(target=thread, daemon=True)
    running.start()
    late = itertools.count(100.0)
    dog._clock = lambda: next(late) ** 4  # every look is twice as late
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not any(wanted in line for line in said):
        dog.look()
        time.sleep(0.001)
    return next((line for line in said if wanted in line), "")


def test_the_watchdog_points_at_the_users_line_inside_ours():
    """A reward function that hangs in the standard library, called by prefzoo, called by this file."""
    asleep, wake = threading.Event(), threading.Event()
    source = resolve_reward(lambda completions, **_: nap(asleep, wake), TOKENIZER)
    asked = replace(rows("completions"), extra={"prompt": ["say a:", "count to nine:"]})
    line = said_of(lambda: source(asked), "wake.wait(20)  # the line that hangs")
    wake.set()
    assert "reward function 'nap'" in line and "test_guards.py, line" in line


def test_the_watchdog_points_at_our_line_where_the_user_has_none_inside():
    """Not at the script that called us, nor at the library that we wait in."""
    never: Future = Future()
    line = said_of(lambda: rewards._wait(never), "running.result()")
    never.set_result(([], None))
    assert "rewards.py, line" in line


def its_threads() -> list[threading.Thread]:
    gc.collect()  # of iterators that another test has dropped
    return [thread for thread in threading.enumerate() if thread.name == "prefzoo watchdog"]


def test_the_thread_says_it_by_itself_and_survives_a_say_that_raises():
    called = threading.Semaphore(0)

    def say(line: str) -> None:
        called.release()
        raise OSError("no terminal")

    with Watchdog(0.01 / 60, say) as dog:
        dog.doing("nothing")
        assert called.acquire(timeout=20) and called.acquire(timeout=20)  # the second after the first raised
        assert [thread.daemon for thread in its_threads()] == [True]
    assert its_threads() == []
    with dog:  # of the next stage
        dog.doing("nothing")
        assert called.acquire(timeout=20)


def test_no_minutes_no_thread():
    with Watchdog(None, pytest.fail) as dog:
        dog.doing("nothing")
        assert its_threads() == []
        dog.look()


# ------------------------------------------------------------------------------------------------- the monitor


def calm(step: int) -> float:
    return 1 + 0.1 * math.sin(step)


def watched(values: list[dict[str, float]], monitor: Monitor | None = None, start: int = 1) -> list[str]:
    said: list[str] = []
    monitor = monitor or Monitor(said.append)
    monitor._note = said.append
    for step, row in enumerate(values, start):
        monitor.watch(step, row)
    return said


@pytest.mark.parametrize("name", Monitor.SPIKES)
@pytest.mark.parametrize("at", [15, 45, 150])
def test_a_spike_is_told_with_its_step_and_size(name, at):
    rows = [{name: calm(step)} for step in range(1, 200)]
    assert watched(rows) == []
    rows[at - 1] = {name: 30.0}
    (line,) = watched(rows)
    assert line.startswith(f"step {at}: {name} is 30") and "median" in line


@pytest.mark.parametrize(
    "values",
    [
        [10 * 0.9**step for step in range(100)],  # learning
        [1e-9 * math.sin(step * step) for step in range(100)],  # losses of on-policy steps: 0 but for rounding
        [0.0] * 50 + [0.05] * 50,
        [2.0 + (step > 50) for step in range(100)],  # another kind of data, half as much again
        [NAN, INF] * 20 + [1.0] * 20,  # the guard's, not ours
        [5.0, 80.0, 0.1, 30.0, 2.0, 60.0],  # too few to know
    ],
)
def test_what_is_no_spike_is_not_told(values):
    assert watched([{"loss": v} for v in values]) == []


def test_gradients_that_come_and_go_are_no_spikes():
    """Groups of equal rewards have none."""
    said = watched([{"grad_norm": 0.0 if step % 5 else calm(step)} for step in range(300)])
    assert said and not any("spike" in line or "far above" in line for line in said)


def test_a_step_without_gradient_is_told_with_its_reason():
    (line,) = watched([{"grad_norm": 1.0}, {"grad_norm": 0.0, "frac_reward_zero_std": 1.0}])
    assert line.startswith("step 2: there is no gradient. All samples of each prompt have the same reward")
    (line,) = watched([{"skipped_steps": 1.0, "prompts/tied": 1.0}])
    assert "nothing is left to train on, no step is taken. All samples of each prompt have equal scores." in line
    (line,) = watched([{"grad_norm": 0.0}])
    assert "do not depend on the weights" in line
    assert watched([{"grad_norm": 1e-30}]) == []


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_what_a_spiking_norm_is_does_not_depend_on_its_scale_and_what_lasts_is_no_spike(scale):
    norms = [calm(step) for step in range(40)] + [40.0 * calm(step) for step in range(140)]
    said = watched([{"grad_norm": scale * v} for v in norms])
    assert [line.split(":")[0] for line in said] == ["step 41", "step 61", "step 82"]
    assert said[-1].endswith("more spikes of grad_norm since step 61, not shown.")


def test_each_kind_is_told_once_in_twenty_steps_and_the_rest_is_counted():
    rows = [{"ratio/max": 50.0 if 5 <= step < 37 else 1.0} for step in range(1, 100)]
    said = watched(rows)
    assert [line.split(":")[0] for line in said] == ["step 5", "step 25", "step 46"]
    assert "19 more since step 5" in said[1] and "11 more wild ratios since step 25" in said[2]


def test_ratios_of_fresh_samples_and_of_stale_ones_are_told_apart():
    assert watched([{"ratio/max": 9.0, "ratio/min": 1e-3}]) == []  # unlearning a token is no fault
    (stale,) = watched([{"ratio/max": 11.0, "ratio/fresh_max": 1.01, "ratio/fresh_min": 0.99}])
    assert "11 times" in stale and "inner_epochs" in stale
    for fresh in ({"ratio/fresh_max": 11.0}, {"ratio/fresh_min": 0.05}, {"ratio/fresh_max": INF}):
        (apart,) = watched([{"ratio/max": 11.0, **fresh}])
        assert "sampler" in apart and "learner" in apart


def test_rewards_that_say_nothing_are_told():
    equal, unequal = {"frac_reward_zero_std": 1.0, "grad_norm": 0.0}, {"frac_reward_zero_std": 0.9, "grad_norm": 1.0}
    (line,) = watched([equal] * 4 + [unequal] + [equal] * 4)
    assert line.startswith("step 1: there is no gradient. All samples of each prompt")
    (_, line) = watched([unequal] * 3 + [equal] * 6)
    assert "for 5 steps" in line and "no gradient exists" in line
    (line,) = watched([equal | {"grad_norm": 1.0}] * 5)  # a KL term goes on
    assert "no gradient exists" not in line and "same reward" in line
    assert watched([{"reward_missing": 0.99}]) == []
    (line,) = watched([{"reward_missing": 1.0, "frac_reward_zero_std": 1.0}])
    assert "missing" in line


@pytest.mark.parametrize("cut", [1, 12, 30, 62, 75])
def test_a_resumed_monitor_says_the_same(cut):
    random = np.random.default_rng(0)
    rows = [
        {"loss": calm(s) + 9 * (s > 20 and random.random() < 0.1), "grad_norm": calm(s), "frac_reward_zero_std": 1.0,
         "ratio/max": random.lognormal(1, 1.5)}
        for s in range(1, 120)
    ]  # fmt: skip
    whole = watched(rows)
    first = Monitor(print)
    before = watched(rows[:cut], first)
    second = Monitor(print)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert len(whole) > 8 and before + watched(rows[cut:], second, start=cut + 1) == whole


def test_a_run_that_learns_is_silent_and_rows_unlike_the_others_are_told():
    """Real metrics; the 81st batch is of another kind."""
    shown = [{"prompt": f"{a} and {b}:", "completion": f" {a + b} is it"} for a in range(22) for b in range(32)]
    strange = [{"prompt": f"{a}?", "completion": " ~%~ #@ ^^ <> " * 3} for a in range(8)]
    quick = {"model": "tiny", "rows_per_step": 8, "warmup_steps": 0, "shuffle": False, "learning_rate": 1e-3}

    def said(dataset: list[dict[str, str]]) -> list[str]:
        return watched([step.metrics for step in prefzoo.steps("sft", dataset=dataset, quiet=True, **quick)])

    assert said(shown) == []
    (line,) = said(shown[:640] + strange + shown[640:])
    assert line.startswith("step 81: loss is")


# ------------------------------------------------------------------------------------- a step that is not finite


def rows(kind: str = "pairs", **columns: torch.Tensor) -> Samples:
    ids = [TOKENIZER(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
    completions = Ragged.of([ids[1], ids[2], ids[4], ids[5]])
    return Samples(
        kind=kind,  # type: ignore[arg-type]
        prompts=Ragged.of([ids[0], ids[3]]),
        completions=completions,
        prompt_B=np.array([0, 0, 1, 1]),
        columns=columns,
        tokens={"ref_logps": -torch.ones(len(completions.flat)), "trainable": torch.ones(len(completions.flat)) > 0},
        extra={"name": ["ann", {"deep": [1.0, NAN]}]},
    )


def spoiled(batch: Samples, completion: int, token: int, value: float) -> Samples:
    column = batch.tokens["ref_logps"].clone()
    column[int(batch.completions.offsets[completion]) + token] = value
    return batch.with_tokens(ref_logps=column)


def strict(file: Path) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def post_mortem(file: Path, batch: Samples, row_losses: torch.Tensor | None = None, **changed) -> Path | None:
    given = {
        "step": 57, "reasons": ["loss is nan"], "losses": {"loss": NAN}, "norms": {"policy": INF},
        "gradients": {"a.weight": 3.0, "b.weight": NAN, "c.weight": 7.0}, "batches": {"main": batch},
        "row_losses": {} if row_losses is None else {"main": row_losses}, "tokenizer": TOKENIZER,
        "extra": {"learning_rate": 1e-3, "scale": torch.tensor(-INF), "path": Path("x"), "half": "\ud800"},
    }  # fmt: skip
    return write_post_mortem(file, **(given | changed))


def test_the_post_mortem_is_strict_json_with_the_batch_decoded_and_culprits_first(tmp_path):
    file = tmp_path / "post-mortem-57.json"
    batch = spoiled(rows(), 3, 1, -INF)
    assert post_mortem(file, batch, torch.tensor([0.5, NAN])) == file
    assert [p.name for p in file.parent.iterdir()] == [file.name]  # nothing beside it
    report = strict(file)
    assert (
        report["step"] == 57 and report["losses"] == {"loss": "nan"} and report["gradient_norms"] == {"policy": "inf"}
    )
    assert report["facts"] == {"learning_rate": 1e-3, "scale": "-inf", "path": "x", "half": "\ud800"}
    assert report["gradients"]["of_these"] == {"b.weight": "nan"} and report["gradients"]["parameters"] == 3
    assert [*report["gradients"]["largest"]] == ["c.weight", "a.weight"]
    main = report["batches"]["main"]
    assert (main["kind"], main["rows"], main["rows_not_finite"], main["rows_not_shown"]) == ("pairs", 2, 1, 0)
    bad, good = main["shown"]
    assert (bad["row"], bad["loss"], good["row"], good["loss"]) == (2, "nan", 1, 0.5) and good["not_finite"] == []
    for row, texts in ((good, TEXTS[:3]), (bad, TEXTS[3:])):
        assert [row["prompt"], row["chosen"]["text"], row["rejected"]["text"]] == texts
    assert bad["extra"] == {"name": {"deep": [1.0, "nan"]}}
    column = bad["rejected"]["ref_logps"]
    assert column["sum"] == "-inf" and column["not_finite"] == 1 and column["max"] == -1.0
    assert column["first"]["token"] == 2 and column["first"]["value"] == "-inf"
    assert good["chosen"]["ref_logps"] == {"sum": -good["chosen"]["tokens"], "min": -1.0, "max": -1.0}
    assert report["culprits"] == words({"main": batch}, {"main": torch.tensor([0.5, NAN])}, TOKENIZER, {
        "a.weight": 3.0, "b.weight": NAN, "c.weight": 7.0})  # fmt: skip


def test_the_words_name_the_first_row_whose_data_is_at_fault():
    losses = {"main": torch.tensor([NAN, NAN])}
    said = words({"main": spoiled(rows(), 3, 1, -INF)}, losses, TOKENIZER)
    assert "row 2 (prompt 'count to nine:')" in said and "a loss of nan" in said
    assert "a reference log-probability of -inf (token 2 of rejected)" in said and "2 of 2 rows" in said
    said = words({"main": rows()}, losses, TOKENIZER, {"x": NAN, "y": 1.0})
    assert "row 1" in said and "all rows alike" in said and "gradient of x is nan (1 of 2 parameters" in said
    assert words({"main": rows()}, {"main": torch.zeros(2)}, TOKENIZER, {"x": 1.0}) == ""
    assert "row 1 of ptx" in words({"main": rows(), "ptx": spoiled(rows(), 0, 0, NAN)}, {}, TOKENIZER)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_reward_that_is_not_finite_is_named_with_its_row(value):
    batch = rows("completions", score=torch.tensor([1.0, 2.0, value, 4.0]))
    batch = batch.with_tokens(
        advantages=torch.repeat_interleave(batch.columns["score"], torch.from_numpy(batch.completions.lengths))
    )
    said = words({"main": batch}, {}, TOKENIZER)
    assert "row 3" in said and f"a score of {value}" in said and f"an advantage of {value} (token 1)" in said


def test_many_rows_are_counted_and_long_texts_are_cut(tmp_path):
    many = replace(rows("completions"), tokens={}).take(np.arange(400) % 4)
    losses = torch.zeros(400)
    losses[[123, 399]] = INF
    main = strict(post_mortem(tmp_path / "a.json", many, losses))["batches"]["main"]
    assert len(main["shown"]) == 64 and main["rows_not_shown"] == 336 and main["rows_not_finite"] == 2
    assert [row["row"] for row in main["shown"]][:4] == [124, 400, 1, 2]
    long = replace(rows("completions"), prompts=Ragged.of([np.tile(rows().prompts[0], 5000)] * 2))
    shown = strict(post_mortem(tmp_path / "b.json", long))["batches"]["main"]["shown"]
    assert len(shown[0]["prompt"]) < 4100 and "characters more" in shown[0]["prompt"]


def test_every_kind_of_rows_and_ids_that_no_tokenizer_knows(tmp_path):
    for kind, count in (("prompts", 2), ("completions", 4), ("unpaired", 4), ("pairs", 2)):
        batch = rows(kind) if kind != "prompts" else rows().as_prompts()
        main = strict(post_mortem(tmp_path / f"{kind}.json", batch))["batches"]["main"]
        assert len(main["shown"]) == main["rows"] == count
    batch = replace(rows(), prompts=Ragged.of([[-5], [10**9]]))
    assert post_mortem(tmp_path / "ids.json", batch) is not None


def test_what_cannot_be_written_is_told_and_raises_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    said: list[str] = []
    assert post_mortem(tmp_path / "file" / "a.json", rows(), say=said.append) is None
    (tmp_path / "folder.json").mkdir()
    assert post_mortem(tmp_path / "folder.json", rows(), say=said.append) is None
    assert post_mortem(tmp_path / "b.json", rows(), torch.tensor([NAN]), losses=None, say=said.append) is None
    assert len(said) == 3 and all("no post-mortem" in line for line in said) and "folder.json" in said[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.json"]  # no half file

    def broken(line: str) -> None:
        raise OSError

    assert post_mortem(tmp_path / "file" / "a.json", rows(), say=broken) is None


def test_gradient_norms_are_those_of_each_parameter_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).half(), nn.Linear(2, 2))
    for name, p in model.named_parameters():
        if not name.startswith("2"):
            p.grad = torch.full_like(p, 3e4)  # the square of it is no half-precision number
    found = gradient_norms(model.named_parameters())
    assert found.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert found[name] == pytest.approx(float(p.grad.float().norm()))
    model[0].weight.grad[1, 1] = NAN
    assert [n for n, v in gradient_norms(model.named_parameters()).items() if not math.isfinite(v)] == ["0.weight"]
    assert gradient_norms(nn.Linear(2, 2).named_parameters()) == {}


def test_reasons_are_the_numbers_that_are_not_finite():
    assert not_finite({"loss": 1.0}, {"policy": 2.0}) == []
    assert len(not_finite({"loss": NAN, "loss/critic": 1.0}, {"policy": INF, "critic": -INF})) == 3
