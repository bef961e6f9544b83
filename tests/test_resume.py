"""Going on: a run that was stopped and resumed is the run that never was, and what was in its folder is still there.

Damaged files, disks and kills are in ``test_faults.py`` and ``test_killed.py``.
"""

from __future__ import annotations

import functools
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import prefzoo
from prefzoo.generation import generate
from prefzoo.models.load import learn_tokenizer, load_policy, new_scorer, tiny_model
from prefzoo.models.reference import as_bytes
from prefzoo.models.roles import Policy
from prefzoo.registry import UsageError
from prefzoo.training import Stopped, checkpoint
from prefzoo.training.engine import Engine, NonFiniteError

pytestmark = pytest.mark.usefixtures("no_pictures")

PAIRS = [
    {"prompt": f"{a} and {b}:", "chosen": f" {a + b} is it", "rejected": f" no {a * b}"}
    for a in range(5)
    for b in range(5)
]


# Rankings of two to four; solutions of one to three steps.
RANKED = [
    {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"], " well", " who knows"][: 2 + i % 3],
     "scores": [0.1, 0.9, 0.5, 0.2][: 2 + i % 3]} for i, row in enumerate(PAIRS)
]  # fmt: skip
STEPS = [
    {"prompt": row["prompt"], "completions": [" first", row["chosen"], row["rejected"]][: 1 + i % 3],
     "labels": [True, True, False][: 1 + i % 3]} for i, row in enumerate(PAIRS)
]  # fmt: skip


@functools.cache
def start() -> dict[str, Any]:
    words = learn_tokenizer([text for row in PAIRS for text in row.values()], 280)
    return {"model": tiny_model(words), "tokenizer": words}


def letters(completions, **_):
    return [float(len(set(c))) for c in completions]


COMMON = {
    "dataset": PAIRS, "learning_rate": 3e-3, "warmup_steps": 2, "schedule": "constant", "logging_steps": 1,
    "quiet": True,
}  # fmt: skip
ROWS = COMMON | {"rows_per_step": 6, "max_steps": 8}
EVALUATED = {"eval_split": 0.2, "eval_steps": 3, "best_metric": "loss"}
SAMPLED = COMMON | {"reward": letters, "max_new_tokens": 4, "prompts_per_step": 3, "max_steps": 5}
GROUPS = SAMPLED | {"group_size": 2}
ROUNDS = {k: v for k, v in SAMPLED.items() if k != "prompts_per_step"} | {"samples_per_prompt": 2}


class Broken(Exception):
    """What a user's callback raises."""


def at(number: int, act: Callable[[], object]) -> Callable[..., None]:
    """A callback that acts after one step."""

    def callback(step: int, *_: Any) -> None:
        if step == number:
            act()

    return callback


def breaking() -> None:
    raise Broken("the user's own error")


def raising(number: int) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    signal.raise_signal(number)


def train(folder: Path, algorithm: Any = "dpo", **options: Any) -> prefzoo.Run:
    return prefzoo.train(algorithm, output_dir=folder, **start() | (ROWS if algorithm == "dpo" else {}) | options)


def stopped(folder: Path, after: int = 5, algorithm: Any = "dpo", **options: Any) -> Path:
    """A run that an error of the user's ended: step ``after`` is taken, but its callbacks have not run."""
    with pytest.raises(Broken):
        train(folder, algorithm, callback=at(after, breaking), **options)
    assert checkpoint.found(folder)[-1].name == f"checkpoint-{after - 1}"
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def models(folder: Path) -> dict[str, bytes]:
    """Weights that a run leaves."""
    found = {f"{name}/{f.name}": f for name in ("final", "best") for f in (folder / name).glob("*.safetensors")}
    assert found
    return {name: file.read_bytes() for name, file in found.items()}


def end(folder: Path) -> dict[str, Any]:
    """What a run has come to, without its times."""
    record = json.loads((folder / "run.json").read_text())
    samples = folder / "samples.jsonl"
    assert record["finished"] and not [f for f in folder.iterdir() if f.name.startswith(".")]
    return {
        "spent": {k: v for k, v in record["spent"].items() if k != "seconds"}, "best": record["best"],
        "metrics": rows(folder), "samples": samples.read_text() if samples.exists() else "", **models(folder),
    }  # fmt: skip


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped. Tests work on copies."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, save_steps=2)
    return folder


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after step 5."""
    return stopped(tmp_path_factory.mktemp("middle") / "run", save_steps=2)


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def begun(middle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(middle, tmp_path / "run")


# ---------------------------------------------------------------------------------------------- every kind of model


def reward_model(pooling: str) -> Any:
    """One at the last token has no bias, one of means has one."""
    return new_scorer(Policy(start()["model"]), pooling)  # type: ignore[arg-type]


def tied() -> GPT2LMHeadModel:
    """Its head is its embedding: one tensor, two names."""
    words = start()["tokenizer"]
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, eos_token_id=words.eos_token_id))


KINDS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "critic from a reward model without bias": (
        "ppo", lambda: SAMPLED | {"critic_from": "reward", "reward": reward_model("last"), "inner_epochs": 2},
    ),
    "critic from a reward model with bias": (
        "ppo", lambda: SAMPLED | {"critic_from": "reward", "reward": reward_model("mean"), "lora": True},
    ),
    "adapter": ("dpo", lambda: {"lora": True, "lora_rank": 2}),
    "merged adapter": ("dpo", lambda: {"lora": True, "lora_rank": 2, "merge": True}),
    "bfloat16": ("dpo", lambda: {"dtype": "bfloat16", "precision": "bfloat16"}),
    "reward model": ("reward_model", lambda: ROWS),
    "reward model of means": ("reward_model", lambda: ROWS | {"pooling": "mean"}),
    "reward model with adapter": ("reward_model", lambda: ROWS | {"lora": True, "lora_rank": 2}),
    "rankings": ("pl_dpo", lambda: ROWS | {"dataset": RANKED}),
    "reward model of rankings": ("plackett_luce", lambda: ROWS | {"dataset": RANKED}),
    "rated steps": ("process_reward", lambda: ROWS | {"dataset": STEPS}),
    "tied embeddings": ("dpo", lambda: {"model": tied()}),
    "tied embeddings, reward model": ("reward_model", lambda: ROWS | {"model": tied()}),
    "added tokens": ("dpo", lambda: {"added_tokens": ("<a>", "<b>")}),
}  # fmt: skip
LONG = ("critic from a reward model with bias", "merged adapter", "reward model with adapter", "reward model of means",
        "tied embeddings, reward model", "added tokens", "reward model of rankings", "rated steps")  # fmt: skip


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.long if k in LONG else ()) for k in KINDS])
def test_every_kind_of_model_goes_on_to_the_same_bits(kind, tmp_path):
    algorithm, options = KINDS[kind][0], KINDS[kind][1]()
    train(tmp_path / "whole", algorithm, **options)
    stopped(tmp_path / "run", 3, algorithm, **options)
    train(tmp_path / "run", algorithm, resume=True, **options)
    assert end(tmp_path / "run") == end(tmp_path / "whole")


@pytest.mark.parametrize(("tokens", "after"), [(1, 1), (1, 4), (20, 4)])
def test_rounds_that_keep_no_sample_are_steps_too(tokens, after, tmp_path):
    """With one token no completion comes to its end; with twenty some do."""
    options = ROUNDS | {"prompts_per_round": 4, "epochs_per_round": 1, "max_new_tokens": tokens, "max_steps": 6}
    train(tmp_path / "whole", "rejection_sampling", **options)
    want = end(tmp_path / "whole")
    skipped = ["skipped_steps" in row for row in want["metrics"]]
    assert skipped[after - 1] and (all(skipped) if tokens == 1 else not all(skipped[: after - 1]))
    stopped(tmp_path / "run", after, "rejection_sampling", **options)
    before = contents(tmp_path / "run")
    with pytest.raises(UsageError, match="has not come to its end"):
        train(tmp_path / "run", "rejection_sampling", **options)
    assert contents(tmp_path / "run") == before
    train(tmp_path / "run", "rejection_sampling", resume=True, **options)
    assert end(tmp_path / "run") == want


def test_where_there_is_nothing_to_go_on_from_a_run_begins(tmp_path, whole):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        train(tmp_path / name, resume=True, save_steps=2)
        assert end(tmp_path / name) == end(whole)


@pytest.mark.parametrize("way", ["link", "relative", "moved"])
def test_the_way_to_the_folder_does_not_count(way, begun, whole, tmp_path, monkeypatch):
    path = {"link": tmp_path / "link", "relative": Path("run"), "moved": tmp_path / "else" / "where"}[way]
    monkeypatch.chdir(tmp_path)
    if way == "link":
        path.symlink_to(begun)
    if way == "moved":
        path.parent.mkdir()
        begun.rename(path)
    train(path, resume=True, save_steps=2)
    assert end(path) == end(whole)


def test_a_checkpoint_is_an_ordinary_model_folder(middle):
    folder = middle / "checkpoint-4"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ours = load_policy(folder).model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())
    assert tokenizer.get_vocab() == start()["tokenizer"].get_vocab()
    answers = generate(folder, ["1 and 2:"], max_new_tokens=3, temperature=0.0)
    ids = tokenizer("1 and 2:", return_tensors="pt")
    greedy = model.generate(**ids, max_new_tokens=3, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert answers == [[tokenizer.decode(greedy, skip_special_tokens=True)]]


# ------------------------------------------------------------------------------------------- what is not the run's


MINE: dict[str, dict[str, str]] = {
    "checkpoint": {"checkpoint-500/trainer_state.json": "{}", "checkpoint-500/model.safetensors": "weights"},
    "record": {"run.json": '{"mine": 1}'},
    "record that is no JSON": {"run.json": "my own notes"},
    "log": {"metrics.jsonl": "my own notes\n"},
    "samples": {"samples.jsonl": '{"text": "mine"}\n'},
    "model": {"final/thesis.tex": "mine"},
    "best model": {"best/thesis.tex": "mine"},
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("what", MINE)
def test_what_is_the_users_is_refused_and_left_alone(what, resume, tmp_path):
    for name, text in MINE[what].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    named = "another run" if "model" in what else next(iter(MINE[what])).partition("/")[0]
    with pytest.raises(UsageError, match=named) as refused:
        train(tmp_path, resume=resume)
    assert contents(tmp_path) == before and "choose a new folder" in str(refused.value)


def test_a_checkpoint_of_another_program_beside_ours_is_refused_and_left_alone(begun):
    (begun / "checkpoint-500").mkdir()
    (begun / "checkpoint-500" / "trainer_state.json").write_text("{}")
    before = contents(begun)
    with pytest.raises(UsageError, match="checkpoint-500 in it was not written by us"):
        train(begun, resume=True, save_steps=2)
    assert contents(begun) == before


def test_hidden_files_of_the_user_stay(tmp_path, whole):
    files = {".env.old": b"secret", ".git.old/HEAD": b"ref", ".movie.mp4.part": b"film", ".checkpoints.gone": b"",
             ".final": b"mine", ".finals.old/a": b"b"}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    stopped(tmp_path, save_steps=2)
    train(tmp_path, resume=True, save_steps=2)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert models(tmp_path) == models(whole) and rows(tmp_path) == rows(whole)


# ------------------------------------------------------------------------------------------------------ logs


def cut(file: Path, how: str) -> None:
    """Take lines away that were there when the checkpoint, of four steps, was written."""
    lines = file.read_bytes().splitlines(keepends=True)[:4]
    content = b"".join(lines)
    left = {"emptied": b"", "shortened": b"".join(lines[:2]), "cut in a line": content[: len(content) // 2],
            "without its last newline": content[:-1]}  # fmt: skip
    file.unlink() if how == "deleted" else file.write_bytes(left[how])


@pytest.mark.parametrize("how", ["deleted", "emptied", "shortened", "cut in a line", "without its last newline"])
def test_lines_of_a_log_that_are_gone_are_told_and_cost_no_weights(how, begun, whole, capsys):
    want = rows(whole)
    cut(begun / "metrics.jsonl", how)
    train(begun, resume=True, save_steps=2)
    assert "metrics.jsonl is shorter" in capsys.readouterr().err
    assert models(begun) == models(whole)
    left = rows(begun)  # every line can be read
    assert left[-4:] == want[-4:] and all(row in want for row in left)
    again = train(begun, resume=True, save_steps=2)
    assert len(again.history) == len(left)


def test_samples_that_were_removed_are_told_and_cost_no_weights(tmp_path, capsys):
    train(tmp_path / "whole", "grpo", **GROUPS)
    run = stopped(tmp_path / "run", 3, "grpo", **GROUPS)
    (run / "samples.jsonl").unlink()
    train(run, "grpo", resume=True, **GROUPS)
    assert "samples.jsonl is shorter" in capsys.readouterr().err
    there = (tmp_path / "whole" / "samples.jsonl").read_text()
    assert (run / "samples.jsonl").read_text() and there.endswith((run / "samples.jsonl").read_text())
    assert models(run) == models(tmp_path / "whole") and rows(run) == rows(tmp_path / "whole")


# ----------------------------------------------------------------------------------------------- not a finite number

BAD = 6  # the step whose loss is NaN


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine._optimizer_step

    def poisoned(engine: Engine, main: Any, *rest: Any) -> bool:
        if engine.step == BAD - 1:
            main = main.with_tokens(ref_logps=torch.full_like(main.tokens["ref_logps"], torch.nan))
        return step(engine, main, *rest)

    monkeypatch.setattr(Engine, "_optimizer_step", poisoned)


def test_a_run_that_stopped_at_nan_may_go_on_with_another_policy(poison, tmp_path):
    """Its last checkpoint is that before the bad step: going back there is leaving the step out."""
    options = {"save_steps": 4, "resume": True}
    train(tmp_path / "whole", on_nonfinite="skip", save_steps=4)
    with pytest.raises(NonFiniteError):
        train(tmp_path / "run", **options)
    with pytest.raises(UsageError, match="on_nonfinite"):
        train(tmp_path / "run", on_nonfinite="rollback", **options)
    train(tmp_path / "run", on_nonfinite="rollback", may_differ="on_nonfinite", **options)
    assert end(tmp_path / "run") == end(tmp_path / "whole")


def spoil(step: int, policy: Policy, *_: Any) -> None:
    if step == 4:
        with torch.no_grad():
            next(policy.parameters())[0, 0] = torch.nan


def test_weights_that_are_not_finite_are_never_the_last_checkpoint(tmp_path, whole, capsys):
    with pytest.raises(NonFiniteError, match=r"step 4: policy/.* is not finite.*Lower the learning rate"):
        train(tmp_path / "run", save_steps=2, callback=spoil)
    assert f"goes on from {tmp_path / 'run' / 'checkpoint-2'}" in capsys.readouterr().err
    assert [checkpoint.whole(f).number for f in checkpoint.found(tmp_path / "run")] == [2]
    train(tmp_path / "run", save_steps=2, resume=True)
    assert end(tmp_path / "run") == end(whole)


def test_weights_that_are_not_finite_go_back_to_the_last_checkpoint(tmp_path, capsys):
    back: list[bool] = []

    def compare(step: int, policy: Policy, *_: Any) -> None:
        if step == 5:
            back.append(all(bool(p.isfinite().all()) for p in policy.parameters()))

    # At learning rate 0 nothing else moves them: they end as those of the checkpoint.
    options = {"save_steps": 2, "learning_rate": 0.0, "on_nonfinite": "rollback", "callback": [spoil, compare]}
    run = train(tmp_path / "run", **options)
    assert back == [True] and run.spent.optimizer_steps == 8
    assert "back to the weights of" in (said := capsys.readouterr().err) and "checkpoint-2" in said
    own = Policy(start()["model"]).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in run.policy.state_dict().items())


# -------------------------------------------------------------------------------------- signals, loops of one's own


@pytest.mark.parametrize(("number", "code"), [("SIGHUP", 129), ("SIGINT", 130), ("SIGTERM", 143)])
def test_every_signal_that_asks_leaves_a_checkpoint(number, code, tmp_path, whole):
    if not hasattr(signal, number):
        pytest.skip(f"no {number} here")
    before = signal.getsignal(getattr(signal, number))
    with pytest.raises(Stopped) as said:
        train(tmp_path, callback=at(5, lambda: raising(getattr(signal, number))), save_steps=100)
    assert said.value.exit_code == code and signal.getsignal(getattr(signal, number)) is before
    assert [f.name for f in checkpoint.found(tmp_path)] in (["checkpoint-4"], ["checkpoint-5"])
    train(tmp_path, resume=True, save_steps=100)
    assert end(tmp_path) == end(whole)


def test_a_signal_between_two_steps_leaves_a_checkpoint(tmp_path, whole, monkeypatch):
    inner = prefzoo.training.run.Steps.__next__

    def struck(steps: Any) -> Any:
        step = inner(steps)
        if step.number == 5:
            raising(signal.SIGTERM)
        return step

    with monkeypatch.context() as patch:
        patch.setattr(prefzoo.training.run.Steps, "__next__", struck)
        with pytest.raises(Stopped):
            train(tmp_path / "run")
    assert [f.name for f in checkpoint.found(tmp_path / "run")] == ["checkpoint-5"]
    train(tmp_path / "run", resume=True)
    assert end(tmp_path / "run") == end(whole)


@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_a_signal_in_the_first_step_stands_in_nobodys_way(algorithm, tmp_path, monkeypatch):
    """The best model of step 0 is written by then."""
    options = EVALUATED if algorithm == "dpo" else GROUPS | EVALUATED | {"best_metric": "reward"}
    train(tmp_path / "whole", algorithm, **options)
    inner = Engine._prepare

    def struck(engine: Engine, *rest: Any) -> Any:
        if engine.step == 0 and engine.spent.prompts == (0 if algorithm == "dpo" else 3) and torch.is_grad_enabled():
            raising(signal.SIGTERM)
        return inner(engine, *rest)

    for resume in (False, True):
        folder = tmp_path / f"run-{resume}"
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_prepare", struck)
            with pytest.raises(Stopped):
                train(folder, algorithm, resume=resume, **options)
        assert not checkpoint.found(folder)
        train(folder, algorithm, resume=True, **options)
        assert end(folder) == end(tmp_path / "whole")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    """It has left its record, a log and the best model of step 0; without resume they are taken for somebody's."""
    train(tmp_path / "whole", **EVALUATED)
    killed = prefzoo.steps("dpo", output_dir=tmp_path / "run", **start() | ROWS | EVALUATED)
    next(killed)
    killed._steps.close()
    assert not checkpoint.found(tmp_path / "run") and (tmp_path / "run" / "best").is_dir()
    before = contents(tmp_path / "run")
    with pytest.raises(UsageError, match=r"has not come to its end.*resume=True"):
        train(tmp_path / "run", **EVALUATED)
    assert contents(tmp_path / "run") == before
    train(tmp_path / "run", resume=True, **EVALUATED)
    assert end(tmp_path / "run") == end(tmp_path / "whole")


def left(folder: Path, after: int) -> prefzoo.training.run.Steps:
    with prefzoo.steps("dpo", output_dir=folder, **start() | ROWS) as steps:
        for step in steps:
            if step.number == after:
                break
    return steps


def test_a_loop_that_is_left_goes_on_or_is_finished(tmp_path, whole):
    left(tmp_path / "on", 5)
    assert [f.name for f in checkpoint.found(tmp_path / "on")] == ["checkpoint-5"]
    assert not json.loads((tmp_path / "on" / "run.json").read_text())["finished"]
    train(tmp_path / "on", resume=True)
    assert end(tmp_path / "on") == end(whole)

    run = left(tmp_path / "done", 5).finish()
    train(tmp_path / "five", max_steps=5)
    assert run.spent.optimizer_steps == 5 and end(tmp_path / "done") == end(tmp_path / "five")
    again = train(tmp_path / "done", resume=True)
    assert again.spent == run.spent
    assert all(map(torch.equal, again.policy.state_dict().values(), run.policy.state_dict().values()))


def test_the_users_own_error_is_the_one_that_is_raised(tmp_path, whole, monkeypatch, capsys):
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("device-side assert")

    def act() -> None:
        monkeypatch.setattr(checkpoint, "save_file", failing)
        breaking()

    with pytest.raises(Broken, match="the user's own error"):
        train(tmp_path / "run", save_steps=2, callback=at(5, act))
    assert "no checkpoint of this step: device-side assert" in capsys.readouterr().err
    assert [checkpoint.whole(f).number for f in checkpoint.found(tmp_path / "run")] == [2, 4]
    monkeypatch.undo()
    train(tmp_path / "run", save_steps=2, resume=True)
    assert models(tmp_path / "run") == models(whole) and rows(tmp_path / "run") == rows(whole)


# --------------------------------------------------------------------------------------------------- finished runs


def test_a_finished_run_is_given_back_and_nothing_is_written(finished):
    before = contents(finished)
    for resume in ({}, {"may_differ": "max_steps"}):
        run = train(finished, save_steps=2, resume=True, **resume)
        assert contents(finished) == before and run.history[-1]["step"] == run.spent.optimizer_steps == 8
        trained = load_policy(finished / "final").state_dict()
        assert all(torch.equal(value, trained[name]) for name, value in run.policy.state_dict().items())


def test_a_finished_run_whose_model_was_moved_away_is_refused(finished):
    (finished / "final").rename(finished.with_name("moved"))
    before = contents(finished)
    for resume in (True, False):
        with pytest.raises(UsageError, match=r"final/ is not there: bring it back|holds another run"):
            train(finished, save_steps=2, resume=resume)
        assert contents(finished) == before


@pytest.mark.parametrize("may_differ", [(), "learning_rate"])
def test_a_finished_run_with_other_options_is_another(may_differ, finished):
    before = contents(finished)
    with pytest.raises(UsageError, match=r"(?s)finished.*learning_rate.*new output folder") as no:
        train(finished, save_steps=2, resume=True, learning_rate=0.5, may_differ=may_differ)
    assert "may_differ" not in str(no.value) and "may-differ" not in str(no.value)
    assert contents(finished) == before


@pytest.mark.parametrize("saved", [2, None])
def test_fewer_steps_than_are_done_are_refused_and_the_run_stays_as_it_was(saved, tmp_path):
    train(tmp_path / "run", save_steps=saved)
    before = contents(tmp_path / "run")
    for permission in ((), "max_steps"):
        with pytest.raises(UsageError, match=r"max_steps|save_steps"):
            train(tmp_path / "run", save_steps=saved, resume=True, max_steps=4, may_differ=permission)
        assert contents(tmp_path / "run") == before
    assert train(tmp_path / "run", save_steps=saved, resume=True).spent.optimizer_steps == 8


def test_fewer_steps_than_a_stopped_run_has_done_are_refused(begun, whole):
    before = contents(begun)
    with pytest.raises(UsageError, match=r"checkpoint-4 is after step 4, but this run has 3 steps"):
        train(begun, save_steps=2, resume=True, max_steps=3, may_differ="max_steps")
    assert contents(begun) == before
    train(begun, save_steps=2, resume=True)
    assert end(begun) == end(whole)


ENDED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    # what the first run had, what the longer one has, steps of the first
    "at its last step": ({"max_steps": 6}, {"max_steps": 12}, 6),
    "by epochs": ({"max_steps": None, "epochs": 1.0}, {"max_steps": None, "epochs": 2.0}, 5),
    "by patience": ({"patience": 2}, {"patience": 4}, 2),
    "by patience, more steps": ({"patience": 2}, {"patience": 3, "max_steps": 12}, 2),
    "by a callback": ({"callback": lambda step, *_: step == 4}, {"max_steps": 12}, 4),
}


@pytest.mark.parametrize(
    "how",
    [pytest.param(h, marks=pytest.mark.long if h in ("by epochs", "by patience, more steps") else ()) for h in ENDED],
)
def test_a_longer_run_is_that_of_its_length_from_the_start(how, tmp_path):
    """The schedule is constant, and the loss, of which the largest counts as the best, gets no larger."""
    first, longer, steps = ENDED[how]
    options = {"save_steps": 2}
    if "patience" in how:
        options |= EVALUATED | {"eval_steps": 1, "best_mode": "max"}
    assert train(tmp_path / "run", **options | first).spent.optimizer_steps == steps
    train(tmp_path / "whole", **options | longer)
    words = [name for name in longer if longer[name] != first.get(name, ROWS.get(name))]
    before = contents(tmp_path / "run")
    with pytest.raises(UsageError, match=rf"may_differ=\[.*{words[0]}"):
        train(tmp_path / "run", resume=True, **options | longer)
    assert contents(tmp_path / "run") == before
    train(tmp_path / "run", resume=True, may_differ=words, **options | longer)
    assert end(tmp_path / "run") == end(tmp_path / "whole")
    assert end(tmp_path / "whole")["spent"]["optimizer_steps"] > steps


@pytest.mark.parametrize(("had", "given"), [(4, 2), (None, 2)])
def test_less_patience_than_a_finished_run_has_had_is_refused(had, given, tmp_path):
    """From the start such a run would have ended before; what is trained cannot be taken back."""
    options = {"save_steps": 2} | EVALUATED | {"eval_steps": 1, "best_mode": "max"}
    train(tmp_path, **options, patience=had)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="patience"):
        train(tmp_path, resume=True, may_differ="patience", **options, patience=given)
    assert contents(tmp_path) == before


def test_what_may_differ_is_one_text_or_a_list(middle, tmp_path):
    ends = []
    for number, words in enumerate(("max_steps, seed", "seed,max_steps", ["max_steps", "seed"], "config")):
        run = shutil.copytree(middle, tmp_path / str(number))
        train(run, save_steps=2, resume=True, max_steps=7, seed=1, may_differ=words)
        ends.append(end(run))
    assert all(e == ends[0] for e in ends) and ends[0]["spent"]["optimizer_steps"] == 7


@pytest.mark.parametrize("where", ["nothing", "stopped", "finished"])
def test_a_misspelt_word_is_told_wherever_it_stands(where, middle, whole, tmp_path):
    folder = tmp_path / "run"
    if where != "nothing":
        shutil.copytree(middle if where == "stopped" else whole, folder)
    before = contents(folder)
    with pytest.raises(UsageError, match=r"'max_step'.*max_steps"):
        train(folder, save_steps=2, resume=True, may_differ="seed, max_step")
    assert contents(folder) == before


# ---------------------------------------------------------------------------------------------- the command line


def test_the_command_says_how_to_go_on_and_its_exit_code_is_the_signals(tmp_path, middle):
    """A process of its own, which is asked to end; the same command with --resume ends as one left alone."""
    data, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    words = ["train", "dpo", "--model", str(middle / "checkpoint-4"), "--dataset", str(data)]
    words += ["-s", "logging_steps=1", "-s", "rows_per_step=6", "-s", "schedule=constant", "--output-dir"]
    code = "import sys; from prefzoo.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *words, str(run)]
    with subprocess.Popen(
        [*command, "--max-steps", "100000"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("dpo 3/"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 143, "".join(said)
    (last,) = checkpoint.found(run)
    assert str(last) in said[-2] and "Traceback" not in "".join(said)
    assert said[-1].startswith("go on with: prefzoo train dpo") and said[-1].endswith("--resume\n")

    from prefzoo.cli import main

    steps = str(checkpoint.whole(last).number + 2)
    longer = ["--max-steps", steps, "--resume", "--may-differ", "max_steps"]
    assert main([*words, str(run), *longer]) == 0
    assert main([*words, str(tmp_path / "whole"), "--max-steps", steps]) == 0
    assert end(run) == end(tmp_path / "whole")


def test_bytes_of_a_tensor_do_not_depend_on_its_strides():
    column = torch.arange(8.0).view(4, 2)[:, 1]
    for strided in (column, column[:1], column[:0]):  # one element counts as contiguous, whatever its stride
        assert torch.equal(as_bytes(strided), as_bytes(torch.tensor(strided.tolist())))
