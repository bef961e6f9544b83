"""While training and afterwards: evaluation, the best model, steps, trackers, curves, cards, the hub."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefzoo
from prefzoo.algorithm import Algorithm, Stage, Term
from prefzoo.losses import create_loss
from prefzoo.models.load import learn_tokenizer, load_policy, new_scorer, save_policy, tiny_model
from prefzoo.models.roles import Policy, is_adapter
from prefzoo.parts.reference import Moving
from prefzoo.parts.source import DatasetRows
from prefzoo.registry import UsageError
from prefzoo.training import output
from prefzoo.training.engine import Engine

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


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_evaluation_does_not_depend_on_how_rows_are_batched(name):
    """Also where the last batch is smaller than the others."""
    steps = prefzoo.steps(name, dataset=PAIRS, max_steps=1, **QUICK)
    next(steps)
    engine, losses = steps.engine, []
    for rows in (64, 24, 7):
        engine.config = engine.config.model_copy(update={"rows_per_step": rows})
        losses.append(engine.evaluate(engine.data)["eval/loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_models_train_on_after_an_evaluation():
    """Gradient checkpointing, for one, works in training mode only."""
    for name, quick in (("dpo", QUICK), ("grpo", SAMPLED)):
        run = prefzoo.steps(name, dataset=PAIRS, eval_split=0.1, eval_steps=1, max_steps=2, lora=True, **quick)
        for step in run:
            assert step.evaluation and step.policy.training and step.policy.model.training
            assert all(t.module.training for t in run.engine.trained.values())
            assert {is_adapter(k) for k, p in step.policy.named_parameters() if p.requires_grad} == {True}


def test_terms_on_demonstrations_are_no_part_of_an_evaluation():
    """DPO with a likelihood term beside it: of the rows held out, the DPO loss."""
    terms = (Term(create_loss("dpo")), Term(create_loss("sft"), rows="ptx", weight=0.5))
    both = Algorithm(stages=(Stage(source=DatasetRows("pairs"), terms=terms),))
    shown = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS]
    run = prefzoo.train(both, dataset=PAIRS, ptx_dataset=shown, eval_split=0.25, eval_steps=1, max_steps=1, **QUICK)
    losses = [r["eval/loss"] for r in run.history if "eval/loss" in r]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[1] != losses[0]


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


def evaluations(monkeypatch, values):
    """From now on an evaluation gives the next of these losses; None: none."""
    rest = iter(values)
    given = lambda self, held: {k: v for k, v in {"eval/loss": next(rest)}.items() if v is not None}  # noqa: E731
    monkeypatch.setattr(Engine, "evaluate", given)


@pytest.mark.parametrize(("values", "steps", "best"), [
    ([5, 6, 4, 5, 3, 4, 4, 9], 6, 3),  # the count starts anew with every best one
    ([math.nan, 4, 3, 3.5, 3.6, 9], 4, 3),  # what is no number is not the best
    ([4, math.nan, 3, math.nan, math.nan, 9], 4, 3),
    ([4, None, 3, None, None, 9], 4, 3),  # nor is what was not measured
    ([4, 4, 4, 9], 2, 4),  # nor an equal
], ids=str)  # fmt: skip
def test_patience_counts_evaluations_since_the_best(values, steps, best, monkeypatch, tmp_path):
    evaluations(monkeypatch, values)
    watched = {"eval_split": 0.25, "eval_steps": 1, "best_metric": "loss", "output_dir": tmp_path / "a"}
    run = prefzoo.train("dpo", dataset=PAIRS, patience=2, max_steps=7, **watched, **QUICK)
    assert run.spent.optimizer_steps == steps
    assert run.best == {"metric": "eval/loss", "value": best, "step": values.index(best)}


def two_stages():
    stages = [Stage(source=DatasetRows("pairs"), terms=(Term(create_loss(name)),)) for name in ("ipo", "dpo")]
    return Algorithm(stages=tuple(stages))


def test_each_stage_has_a_best_model_of_its_own(monkeypatch, tmp_path):
    """Its loss is another one: lower numbers of an earlier stage do not count, nor does its patience."""
    evaluations(monkeypatch, [0.1, 0.2, 0.3, 9.0, 8.0, 8.5])
    watched = {"eval_split": 0.25, "eval_steps": 1, "best_metric": "loss", "output_dir": tmp_path / "a"}
    run = prefzoo.train(two_stages(), dataset=PAIRS, patience=3, max_steps=2, **watched, **QUICK)
    assert run.spent.optimizer_steps == 4 and run.best == {"metric": "eval/loss", "value": 8.0, "step": 1}


def test_a_callback_ends_the_run_not_the_stage():
    assert prefzoo.train(two_stages(), dataset=PAIRS, max_steps=2, **QUICK).spent.optimizer_steps == 4
    run = prefzoo.train(two_stages(), dataset=PAIRS, max_steps=2, callback=lambda *_: True, **QUICK)
    assert run.spent.optimizer_steps == 1


@pytest.mark.parametrize("settings", [{"early_stopping": True}, {"pad_token_id": -1}, {"temperature": 0.7}], ids=str)
def test_a_start_with_settings_that_contradict_each_other_is_trained_and_kept(settings, tmp_path):
    words = learn_tokenizer([str(PAIRS)], 270)
    save_policy(Policy(tiny_model(words)), words, tmp_path / "start")
    (tmp_path / "start/generation_config.json").write_text(json.dumps(settings))
    kept = {"best_metric": "loss", "eval_split": 0.2, "output_dir": tmp_path / "a"}
    prefzoo.train("dpo", dataset=PAIRS, max_steps=1, **kept, **QUICK | {"model": tmp_path / "start"})
    for name in ("best", "final"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "a" / name).generation_config.eos_token_id is not None


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


def test_an_error_in_a_loop_of_ones_own_keeps_what_was_trained(tmp_path):
    for name, taken in (("none", 0), ("two", 2)):
        steps = prefzoo.steps("dpo", dataset=PAIRS, max_steps=4, output_dir=tmp_path / name, **QUICK)
        with pytest.raises(ZeroDivisionError), steps:
            while steps.spent.optimizer_steps < taken:
                next(steps)
            raise ZeroDivisionError
        assert (tmp_path / name / "checkpoint-2").exists() == (taken > 0)
        assert not (tmp_path / name / "final").exists()
    kept = load_policy(tmp_path / "two" / "checkpoint-2")
    assert torch.equal(weights(kept), weights(steps.policy))
    steps = prefzoo.steps("dpo", dataset=PAIRS, max_steps=1, output_dir=tmp_path / "all", **QUICK)
    with pytest.raises(ZeroDivisionError), steps:
        next(steps)
        steps.finish()
        raise ZeroDivisionError
    assert (tmp_path / "all" / "final").exists() and not list((tmp_path / "all").glob("checkpoint-*"))


def test_a_run_that_never_began_has_no_result(tmp_path):
    for name in ("dpo", "reward_model"):
        steps = prefzoo.steps(name, dataset=PAIRS, output_dir=tmp_path / name, **QUICK)
        with pytest.raises(UsageError, match="before the first step"):
            steps.finish()
        assert not list(tmp_path.glob("*/*"))


def test_callbacks_see_every_logging_and_may_stop():
    seen = []
    run = prefzoo.train(
        "dpo", dataset=PAIRS, max_steps=40, **QUICK | {"logging_steps": 2},
        callback=[lambda step, policy, values: seen.append((step, values["loss"])), lambda step, *_: step >= 4],
    )  # fmt: skip
    assert [s for s, _ in seen] == [2, 4] and run.spent.optimizer_steps == 4


@pytest.mark.parametrize("error", [ValueError("the service is down"), KeyboardInterrupt()], ids=repr)
def test_an_error_keeps_what_was_trained(error, tmp_path, capsys):
    """A reward function that fails in the third step: the model of two steps is on disk, and the message says where."""
    calls = []

    def moody(completions, **_):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return [1.0 * (i % 2) for i in range(len(completions))]

    interrupted = isinstance(error, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt if interrupted else UsageError, match=None if interrupted else "moody"):
        prefzoo.train("grpo", dataset=PAIRS, max_steps=9, output_dir=tmp_path / "a", **SAMPLED | {"reward": moody})
    assert str(tmp_path / "a" / "checkpoint-2") in capsys.readouterr().err
    kept = load_policy(tmp_path / "a" / "checkpoint-2")
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
    watched = prefzoo.train(moving(1.0, 1), dataset=PAIRS, eval_split=0.25, eval_steps=1, max_steps=3, **QUICK)
    found = [r["eval/loss"] for r in watched.history if "eval/loss" in r]
    assert found == pytest.approx([math.log(2)] * 4, abs=1e-5), "evaluations ask where it is now"
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
    assert not list((tmp_path / "b").glob("checkpoint-*")), "the model is in final: nothing was interrupted"
    with pytest.raises(UsageError, match="output_dir"):
        prefzoo.train("sft", dataset=PAIRS, push_to_hub="me/model", **QUICK)


def test_trackers_get_the_metrics(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
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


def test_a_share_of_a_run_of_rollouts_is_one_of_its_optimizer_steps():
    """Two of four rollout steps with four optimizer steps each: the mean rate of a step's four."""
    quick = SAMPLED | {"warmup_steps": 0.5}
    run = prefzoo.train("grpo", dataset=PAIRS, max_steps=4, inner_epochs=2, minibatches=2, schedule="constant", **quick)
    rates = [r["learning_rate"] / 1e-3 for r in run.history]
    assert run.spent.optimizer_steps == 16 and rates == pytest.approx([2.5 / 8, 6.5 / 8, 1, 1])


# --------------------------------------------------------------------------------------------------- what is counted


def test_tokens_that_carry_no_loss_are_not_counted():
    """A longer question in the middle of a conversation trains no more tokens; a longer answer does."""

    def trained(question: str, answer: str) -> int:
        turns = [("user", "1 and 2"), ("assistant", "3"), ("user", question), ("assistant", answer)]
        rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 4
        quick = QUICK | {"chat_template": "chatml", "loss_on": "assistant", "rows_per_step": 4}
        run = prefzoo.train("sft", dataset=rows, max_steps=1, **quick)
        assert run.history[-1]["num_tokens"] == run.spent.trained_tokens
        return run.spent.trained_tokens

    short = trained("2 and 3", "5")
    assert short % 4 == 0 and trained("2 and 3 and 7 and 8 and 9", "5") == short < trained("2 and 3", "5 is it")


def test_the_time_and_the_share_of_the_data_that_a_run_took():
    for name, quick, rows in (("dpo", QUICK, 16), ("grpo", SAMPLED, 4)):
        run = prefzoo.train(name, dataset=PAIRS, max_steps=3, **quick)
        assert run.spent.seconds > 0
        assert [r["epoch"] for r in run.history] == pytest.approx([k * rows / len(PAIRS) for k in (1, 2, 3)])


def test_the_spread_of_a_group_is_that_of_the_rewards_that_are_known():
    rewards = [1.0, None, 3.0, 5.0]
    quick = SAMPLED | {"reward": lambda completions, **_: [rewards[i % 4] for i in range(len(completions))]}
    (row,) = prefzoo.train("grpo", dataset=PAIRS, max_steps=1, **quick).history
    assert row["reward_std"] == pytest.approx(float(torch.tensor([1.0, 3.0, 5.0]).std()))
    assert row["reward"] == 3.0 and row["reward_missing"] == 0.25 and row["frac_reward_zero_std"] == 0.0


# ------------------------------------------------------------------------------------------------------- what fits


@pytest.mark.parametrize("precision", [{"precision": "bfloat16"}, {"dtype": "bfloat16"}], ids=str)
def test_the_anchor_computes_as_the_policy_does(precision):
    """The start model, given as the reference: DPO begins at log 2 to the last digit, whatever the precision."""
    words = learn_tokenizer([str(PAIRS)], 270)
    start = QUICK | {"model": tiny_model(words), "tokenizer": words, "reference": tiny_model(words)}
    for exact in (False, True):
        run = prefzoo.train("dpo", dataset=PAIRS, max_steps=1, fp32_head=exact, **precision, **start)
        assert run.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert run.history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("precision", [{"precision": "bfloat16"}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_the_ratio_starts_at_one(precision, exact):
    """The sampler has its logits from the library's head; what is trained on are the learner's numbers."""
    quick = SAMPLED | precision | {"learning_rate": 0.0, "fp32_head": exact}
    (row,) = prefzoo.train("grpo", dataset=PAIRS, max_steps=1, **quick).history
    assert row["ratio"] == pytest.approx(1.0, abs=1e-6) and row["approx_kl"] == pytest.approx(0.0, abs=1e-9)


def test_a_critic_from_a_reward_model_gets_an_adapter_too():
    words = learn_tokenizer([str(PAIRS)], 270)
    quick = {k: v for k, v in SAMPLED.items() if k != "group_size"}
    quick |= {"model": tiny_model(words), "tokenizer": words, "reward": new_scorer(Policy(tiny_model(words)))}
    run = prefzoo.steps("ppo", dataset=PAIRS, max_steps=1, critic_from="reward", lora=True, inner_epochs=1, **quick)
    next(run)
    moving = [k for k, p in run.engine.critics["critic"].named_parameters() if p.requires_grad]
    assert any(is_adapter(k) for k in moving) and all(is_adapter(k) or k.startswith("head.") for k in moving)


def test_the_folder_of_a_run_is_its_model(finished, tmp_path):
    """As start and as reference: at learning rate 0 the policy stays its own reference."""
    folder = finished[1]
    quick = QUICK | {"model": folder, "learning_rate": 0.0}
    run = prefzoo.train("dpo", dataset=PAIRS, reference=folder, max_steps=1, **quick)
    assert run.history[-1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert torch.equal(weights(run.policy), weights(finished[0].policy))


def test_a_warm_up_as_long_as_the_run_is_told(capsys):
    loud = QUICK | {"quiet": False, "max_steps": 2}
    prefzoo.train("dpo", dataset=PAIRS, **loud | {"warmup_steps": 10})
    assert "warm-up of 10 steps is as long as the run of 2" in capsys.readouterr().err
    prefzoo.train("dpo", dataset=PAIRS, **loud | {"warmup_steps": 1})
    assert "warm-up" not in capsys.readouterr().err
