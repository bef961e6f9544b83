"""While training and afterwards: evaluation, the best model, steps, trackers, curves, cards, the hub."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefzoo
from prefzoo.algorithm import Algorithm
from prefzoo.losses import create_loss
from prefzoo.models.load import load_policy
from prefzoo.parts.reference import Moving
from prefzoo.parts.source import DatasetRows
from prefzoo.registry import UsageError
from prefzoo.training import output

PAIRS = [
    {"prompt": f"{a} and {b}:", "chosen": f" {a + b} is it", "rejected": f" no {a * b}"}
    for a in range(8)
    for b in range(8)
]
QUICK = {
    "model": "tiny",
    "quiet": True,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "rows_per_step": 16,
    "logging_steps": 1,
}
SAMPLED = {k: v for k, v in QUICK.items() if k != "rows_per_step"} | {
    "prompts_per_step": 4, "group_size": 4, "max_new_tokens": 6, "reward": lambda completions, **_: [
        float(len(c) % 3) for c in completions
    ],
}  # fmt: skip


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


# -------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("name", ["sft", "dpo", "reward_model", "kto"])
@pytest.mark.parametrize("budget", [8192, 60])
def test_evaluation_is_the_training_loss_of_the_same_rows(name, budget):
    """At learning rate 0, one step over all rows and their evaluation give the same numbers, however they are cut."""
    quick = QUICK | {"learning_rate": 0.0, "rows_per_step": 128, "shuffle": False, "tokens_per_batch": budget}
    steps = prefzoo.steps(name, dataset=PAIRS, **quick, max_steps=1)
    (step,) = steps
    found = steps.engine.evaluate(steps.engine.data)
    same = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "accuracy", "entropy")
    assert {f"eval/{k}" for k in same if k in step.metrics} <= set(found) and "eval/loss" in found
    for key, value in found.items():
        assert value == pytest.approx(step.metrics[key.removeprefix("eval/")], abs=1e-5), key


def test_evaluations_come_at_the_start_every_n_steps_and_at_the_end(tmp_path):
    run = prefzoo.train(
        "dpo", dataset=PAIRS, eval_split=0.25, eval_steps=2, max_steps=5, output_dir=tmp_path / "a", **QUICK
    )
    rows = metrics(tmp_path / "a")
    assert [r["step"] for r in rows if "eval/loss" in r] == [0, 2, 4, 5]
    start = next(r for r in rows if "eval/loss" in r)
    assert start["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is still the reference
    assert run.history == rows
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["data"]["rows"] == 48 and record["held_out"]["rows"] == 16


def test_evaluating_changes_nothing():
    """The same weights, bit for bit, with evaluations and without them."""
    for name, quick in (("dpo", QUICK), ("kto", QUICK), ("grpo", SAMPLED)):
        plain = prefzoo.train(name, dataset=PAIRS[16:], max_steps=2, **quick)
        watched = prefzoo.train(name, dataset=PAIRS[16:], eval_dataset=PAIRS[:16], eval_steps=1, max_steps=2, **quick)
        assert torch.equal(weights(plain.policy), weights(watched.policy)), name
        assert watched.spent.reward_calls == plain.spent.reward_calls
        assert any("eval/loss" in r or "eval/reward" in r for r in watched.history)


def test_evaluation_of_a_policy_that_does_not_move_does_not_move():
    quick = SAMPLED | {"learning_rate": 0.0}
    run = prefzoo.train("grpo", dataset=PAIRS, eval_split=0.25, eval_steps=1, max_steps=2, **quick)
    rewards = [r["eval/reward"] for r in run.history if "eval/reward" in r]
    assert len(rewards) == 3 and len(set(rewards)) == 1


def test_prompts_of_the_evaluation_are_not_trained_on():
    run = prefzoo.steps("sft", dataset=PAIRS, eval_dataset=PAIRS[:16], max_steps=1, **QUICK)
    held = {r["prompt"] for r in PAIRS[:16]}
    assert len(run.data.rows) == 48 and not held & {r["prompt"] for r in run.data.rows}


# ---------------------------------------------------------------------------------- the best model, early stopping


def test_the_best_model_is_the_one_of_the_best_evaluation(tmp_path):
    """A learning rate that ruins the model: the best is early, and is what its evaluation says."""
    folder = tmp_path / "run"
    quick = QUICK | {"learning_rate": 3e-3}
    start = prefzoo.train("sft", model="tiny", dataset=PAIRS, max_steps=1, learning_rate=1e-3, quiet=True)
    wanted = {"dataset": PAIRS, "eval_split": 0.25}
    run = prefzoo.train(
        "sft",
        output_dir=folder,
        best_metric="loss",
        eval_steps=2,
        epochs=20,
        **wanted,
        **quick | {"model": start.model, "tokenizer": start.tokenizer},
    )
    losses = {r["step"]: r["eval/loss"] for r in run.history if "eval/loss" in r}
    assert run.best is not None and run.best["metric"] == "eval/loss"
    assert run.best["value"] == min(losses.values()) == losses[run.best["step"]]
    again = prefzoo.steps("sft", eval_steps=1, **wanted, **quick | {"model": folder / "best", "learning_rate": 0.0})
    first = next(again)
    assert first.evaluation is not None
    assert first.evaluation["eval/loss"] == pytest.approx(run.best["value"], rel=1e-5)


def test_patience_stops_the_run():
    run = prefzoo.train(
        "dpo", dataset=PAIRS, eval_split=0.25, eval_steps=1, patience=2, max_steps=40, **QUICK | {"learning_rate": 0.0}
    )
    assert run.spent.optimizer_steps == 2  # the first evaluation, before any step, is never bettered


def test_an_unknown_metric_is_told_before_the_first_step(tmp_path):
    with pytest.raises(UsageError, match="no metric 'eval/los'; did you mean 'eval/loss'"):
        prefzoo.train("sft", dataset=PAIRS, eval_split=0.2, best_metric="los", output_dir=tmp_path / "a", **QUICK)


# ------------------------------------------------------------------------------------------- steps and callbacks


def test_steps_are_the_run(tmp_path):
    whole = prefzoo.train("dpo", dataset=PAIRS, max_steps=4, **QUICK)
    steps = prefzoo.steps("dpo", dataset=PAIRS, max_steps=4, output_dir=tmp_path / "a", **QUICK)
    seen = list(steps)
    assert [s.number for s in seen] == [1, 2, 3, 4] and {s.total for s in seen} == {4}
    assert [s.metrics["loss"] for s in seen] == [r["loss"] for r in whole.history]
    assert torch.equal(weights(steps.finish().policy), weights(whole.policy))
    assert steps.finish() is steps.finish()
    AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "final")


def test_a_loop_that_is_left_keeps_what_was_trained(tmp_path):
    steps = prefzoo.steps("dpo", dataset=PAIRS, max_steps=40, output_dir=tmp_path / "a", **QUICK)
    for step in steps:
        if step.number == 2:
            break
    run = steps.finish()
    assert run.spent.optimizer_steps == 2 and (tmp_path / "a" / "final" / "README.md").exists()
    assert json.loads((tmp_path / "a" / "run.json").read_text())["spent"]["optimizer_steps"] == 2


def test_callbacks_see_every_logging_and_may_stop():
    seen = []
    run = prefzoo.train(
        "dpo", dataset=PAIRS, max_steps=40, **QUICK | {"logging_steps": 2},
        callback=[lambda step, policy, values: seen.append((step, values["loss"])), lambda step, *_: step >= 4],
    )  # fmt: skip
    assert [s for s, _ in seen] == [2, 4] and run.spent.optimizer_steps == 4


def test_an_error_keeps_what_was_trained(tmp_path):
    """A reward function that fails in the third step: the model of two steps is on disk, and the message says where."""
    calls = []

    def moody(completions, **_):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("the service is down")
        return [1.0 * (i % 2) for i in range(len(completions))]

    with pytest.raises(UsageError, match="moody"):
        prefzoo.train("grpo", dataset=PAIRS, max_steps=9, output_dir=tmp_path / "a", **SAMPLED | {"reward": moody})
    kept = load_policy(tmp_path / "a" / "interrupted")
    two = prefzoo.train("grpo", dataset=PAIRS, max_steps=2, **SAMPLED | {"reward": lambda completions, **_: [
        1.0 * (i % 2) for i in range(len(completions))
    ]})  # fmt: skip
    assert kept.model.config.model_type == two.model.config.model_type
    with pytest.raises(UsageError, match="holds another run"):
        prefzoo.train("sft", dataset=PAIRS, output_dir=tmp_path / "a", **QUICK)


# --------------------------------------------------------------------------------------------- moving references


def test_a_moving_reference_follows():
    """Hard updates after every step: the policy is its own reference at each step, so the DPO loss is log 2."""

    def moving(alpha: float, every: int) -> Algorithm:
        return Algorithm(source=DatasetRows("pairs"), loss=create_loss("dpo"), reference=Moving(alpha, every))

    run = prefzoo.train(moving(1.0, 1), dataset=PAIRS, max_steps=4, **QUICK)
    assert [r["loss"] for r in run.history] == pytest.approx([math.log(2)] * 4, abs=1e-5)
    never = prefzoo.train(moving(1.0, 100), dataset=PAIRS, max_steps=4, **QUICK)
    plain = prefzoo.train("dpo", dataset=PAIRS, max_steps=4, **QUICK)
    assert [r["loss"] for r in never.history] == pytest.approx([r["loss"] for r in plain.history], abs=1e-5)
    with pytest.raises(UsageError, match="moving reference has no effect"):
        Algorithm(source=DatasetRows("completions"), loss=create_loss("sft"), reference=Moving())
    with pytest.raises(UsageError, match="alpha"):
        Moving(alpha=0.0)


# ---------------------------------------------------------------------------------------------- what is left behind


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    data = [*PAIRS, {"prompt": "x", "chosen": "a", "rejected": "a"}]
    run = prefzoo.train("dpo", dataset=data, eval_split=0.25, epochs=2, output_dir=folder, beta=0.3, **QUICK)
    return run, folder


def test_the_card_says_how_the_model_was_made(finished):
    run, folder = finished
    text = (folder / "final" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    record = json.loads((folder / "run.json").read_text())
    facts = ["`beta=0.3`", "`learning_rate=0.001`", "1 dropped: chosen and rejected are identical"]
    facts += [f"torch={torch.__version__}", record["data"]["hash"], record["sources"]["dpo"]]
    for fact in [*facts, f"{run.spent.trained_tokens:,} trained tokens"]:
        assert fact in body, fact
    assert "AutoModelForCausalLM" in body


def test_curves_are_drawn(finished):
    from matplotlib.image import imread

    picture = imread(finished[1] / "curves.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    assert len({tuple(p) for p in picture.reshape(-1, picture.shape[-1])[::7].tolist()}) > 10  # not an empty page


def test_an_output_folder_of_another_run_is_refused_before_anything_is_loaded(finished):
    with pytest.raises(UsageError, match="holds another run"):
        prefzoo.train("dpo", model="no such model", dataset="no such file", output_dir=finished[1])


def test_the_result_loads_with_the_library(finished):
    run, folder = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    ids = AutoTokenizer.from_pretrained(folder / "final")("3 and 4:", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name]), name


def test_generate(finished):
    run, folder = finished
    prompts = ["3 and 4:", "1 and 1:"]
    answers = prefzoo.generate(folder, prompts, n=2, max_new_tokens=5, seed=1)
    assert answers == prefzoo.generate(run, prompts, n=2, max_new_tokens=5, seed=1)
    assert [len(a) for a in answers] == [2, 2] and answers[0] != answers[1]
    with pytest.raises(UsageError, match="list of prompts"):
        prefzoo.generate(run, "3 and 4:")
    with pytest.raises(UsageError, match="positions"):
        prefzoo.generate(run, prompts, max_new_tokens=5000)


def test_push_to_hub(monkeypatch, tmp_path):
    calls = []

    class Hub:
        def create_repo(self, name, exist_ok):
            calls.append(name)
            return f"hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append({p.name for p in Path(folder_path).iterdir()})
            if repo_id == "me/refused":
                raise OSError("403 Forbidden")

    monkeypatch.setattr(output, "HfApi", Hub)
    prefzoo.train("sft", dataset=PAIRS, max_steps=1, output_dir=tmp_path / "a", push_to_hub="me/model", **QUICK)
    assert calls[0] == "me/model" and {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= calls[1]
    with pytest.raises(UsageError, match=r"403 Forbidden.*upload it later"):
        prefzoo.train("sft", dataset=PAIRS, max_steps=1, output_dir=tmp_path / "b", push_to_hub="me/refused", **QUICK)
    assert (tmp_path / "b" / "final" / "config.json").exists() and (tmp_path / "b" / "run.json").exists()
    with pytest.raises(UsageError, match="output_dir"):
        prefzoo.train("sft", dataset=PAIRS, push_to_hub="me/model", **QUICK)


def test_trackers_get_the_metrics(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "a"
    run = prefzoo.train(
        "dpo", dataset=PAIRS, max_steps=3, eval_split=0.2, report_to=["tensorboard"], output_dir=folder, **QUICK
    )
    events = accumulator.EventAccumulator(str(folder / "dpo"))
    events.Reload()
    losses = [e.value for e in events.Scalars("loss")]
    assert losses == pytest.approx([r["loss"] for r in run.history if "loss" in r], rel=1e-6)
    assert "eval/loss" in events.Tags()["scalars"]


def test_a_tracker_that_is_not_installed_is_told(monkeypatch, tmp_path):
    from prefzoo.training import metrics as module

    monkeypatch.setattr(module, "_available", lambda name: False)
    with pytest.raises(UsageError, match="pip install wandb"):
        prefzoo.train("sft", dataset=PAIRS, max_steps=1, report_to=["wandb"], output_dir=tmp_path / "a", **QUICK)


def test_warm_up_may_be_a_share_of_the_run():
    run = prefzoo.train("dpo", dataset=PAIRS, max_steps=8, schedule="constant", **QUICK | {"warmup_steps": 0.5})
    rates = [r["learning_rate"] / 1e-3 for r in run.history]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
