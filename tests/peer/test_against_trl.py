"""Against TRL itself: the same model and texts, ten optimizer steps, and the weights are the same.

``PREFZOO_TRL_PYTHON`` names the interpreter of an environment that holds TRL 1.16 (``python -m venv``, then
``pip install -c constraints.txt torch trl==1.16.0``); ``pytest -m peer`` runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import prefzoo
from prefzoo.algorithm import Algorithm, create_algorithm
from prefzoo.data.samples import Ragged, Samples
from prefzoo.data.tokens import tokenise
from prefzoo.feedback import RewardSource
from prefzoo.models.load import load_policy, load_scorer, load_tokenizer
from prefzoo.rollout import Finish
from prefzoo.training import TrainConfig
from prefzoo.training.engine import Engine
from prefzoo.training.metrics import RunLog

pytestmark = pytest.mark.peer

HERE = Path(__file__).parent
POLICY, REFERENCE, REWARD = (HERE.parent / "golden" / "tiny_model" / name for name in ("policy", "reference", "reward"))
STEPS, ROWS = 10, 8  # optimizer steps, rows of each
OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # TRL's words and ours
    "sgd": ({"optim": "sgd", "learning_rate": 2e-2}, {"optimizer": "sgd", "learning_rate": 2e-2}),
    "adamw": (
        {"optim": "adamw_torch", "learning_rate": 1e-3},
        {"optimizer": "adamw", "learning_rate": 1e-3, "betas": (0.9, 0.999)},
    ),
}
PLAIN: dict[str, Any] = {
    "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": None, "logging_steps": 1,
}  # fmt: skip

TEXT = """the cat sat on a mat and looked at birds in old trees near water
while rain fell over quiet hills"""
WORDS = TEXT.split()


def sentence(generator: np.random.Generator, shortest: int, longest: int) -> str:
    return " ".join(generator.choice(WORDS, size=generator.integers(shortest, longest)))


def pairs() -> list[dict[str, str]]:
    """Prompts and answers of many lengths; 32 rows, so that ten steps of eight see all of them."""
    g = np.random.default_rng(0)
    return [
        {"prompt": sentence(g, 2, 9), "chosen": " " + sentence(g, 1, 9), "rejected": " " + sentence(g, 1, 9)}
        for _ in range(32)
    ]


def singles() -> list[dict[str, Any]]:
    rows = pairs()
    return [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 != 0} for i, r in enumerate(rows)]


def simpo() -> Algorithm:
    return create_algorithm("simpo", beta=2.0, gamma=0.5)


def orpo() -> Algorithm:
    """TRL's likelihood is a mean over all tokens of prompts and chosen answers of the batch: a term of its own."""
    return create_algorithm("trl:orpo", beta=0.1)


# TRL's trainer and configuration, and our algorithm.
CASES: dict[str, tuple[str, dict[str, Any], Callable[[], Algorithm]]] = {
    "sigmoid": ("dpo", {"loss_type": "sigmoid", "beta": 0.1}, lambda: create_algorithm("dpo", beta=0.1)),
    # A target of 1 nat per token: at β = 0.1 it is 5, the gradients are 50, and two of our own runs that differ by the
    # order of their sums end as far apart as ours and TRL's.
    "ipo": ("dpo", {"loss_type": "ipo", "beta": 0.5}, lambda: create_algorithm("ipo", beta=0.5)),
    "hinge": ("dpo", {"loss_type": "hinge", "beta": 0.1}, lambda: create_algorithm("hinge", beta=0.1)),
    "apo_zero": ("dpo", {"loss_type": "apo_zero", "beta": 0.1}, lambda: create_algorithm("apo_zero", beta=0.1)),
    "kto": ("kto", {"beta": 0.1}, lambda: create_algorithm("kto", beta=0.1)),
    "orpo": ("orpo", {"beta": 0.1}, orpo),
    "simpo": ("cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}, simpo),
}


@pytest.fixture(scope="session")
def trl() -> str:
    python = os.environ.get("PREFZOO_TRL_PYTHON")
    if not python:
        pytest.skip("PREFZOO_TRL_PYTHON is not set: the interpreter of an environment that holds TRL 1.16")
    return python


def run_trl(python: str, folder: Path, trainer: str, config: dict[str, Any], **job: Any) -> dict[str, Tensor]:
    job = {"model": str(POLICY), "reference": str(REFERENCE), **job}
    job |= {"trainer": trainer, "config": config, "out": str(folder / "trl.safetensors")}
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run([python, HERE / "trl_child.py", folder / "job.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(folder / "trl.safetensors")


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """The distance between the two ends is at most a thousandth of the way that was gone."""
    assert ours.keys() == theirs.keys() == start.keys()
    norm = lambda a, b: sum(float((a[k] - b[k]).double().square().sum()) for k in a) ** 0.5  # noqa: E731
    apart, moved = norm(ours, theirs), norm(theirs, start)
    print(f"apart {apart:.3g}, moved {moved:.3g}, ratio {apart / moved:.2g}")
    assert moved > 1e-3 and apart <= 1e-3 * moved


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in module.named_parameters()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_preferences(name: str, optimizer: str, trl: str, tmp_path: Path) -> None:
    trainer, config, algorithm = CASES[name]
    theirs, ours = OPTIMIZERS[optimizer]
    rows = singles() if trainer == "kto" else pairs()
    steps = {"per_device_train_batch_size": ROWS, "max_steps": STEPS, "max_length": 256}
    expected = run_trl(trl, tmp_path, trainer, {**config, **theirs, **steps}, rows=rows)
    made = algorithm()
    reference = {"reference": REFERENCE} if "reference" in made.needs else {}
    run = prefzoo.train(
        made, model=POLICY, dataset=rows, rows_per_step=ROWS, max_steps=STEPS, shuffle=False, quiet=True,
        **reference, **PLAIN, **ours,
    )  # fmt: skip
    assert_same_weights(weights(run.model), expected, weights(load_policy(POLICY).model))


def engine_of(algorithm: Algorithm, data: Samples, **roles: Any) -> Engine:
    (stage,) = algorithm.stages
    config = TrainConfig.of(PLAIN, roles.pop("settings"))
    return Engine(
        stage, config, tokenizer=load_tokenizer(POLICY), data=data, log=RunLog(None, "peer", quiet=True), **roles
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_reward_model(optimizer: str, trl: str, tmp_path: Path) -> None:
    """From the same sequence classifier."""
    theirs, ours = OPTIMIZERS[optimizer]
    steps = {"per_device_train_batch_size": ROWS, "max_steps": STEPS, "max_length": 256}
    config = {**theirs, **steps, "center_rewards_coefficient": 0.01}
    expected = run_trl(trl, tmp_path, "reward", config, rows=pairs(), model=str(REWARD))
    samples, _ = tokenise(pairs(), load_tokenizer(POLICY), "pairs")
    scorer, start = load_scorer(REWARD), weights(load_scorer(REWARD))
    settings = {"rows_per_step": ROWS, "max_steps": STEPS, "shuffle": False, **ours}
    algorithm = create_algorithm("reward_model", centering=0.01)
    engine = engine_of(algorithm, samples, policy=load_policy(POLICY), scorer=scorer, settings=settings)
    assert len(list(engine.run())) == STEPS
    named = {k.replace("score.", "head.").replace("model.", "trunk.", 1): v for k, v in expected.items()}
    assert_same_weights(weights(scorer), named, start)


def answer(generator: np.random.Generator) -> list[int]:
    """Any ids, six in ten with an end."""
    ids = generator.integers(3, 300, size=generator.integers(2, 9)).tolist()
    return [*ids, 2] if generator.random() < 0.6 else ids


class Given(RewardSource):
    """The rewards of the file, step by step."""

    name = "given"

    def __init__(self, steps: list[dict[str, Any]]) -> None:
        self.steps = iter(steps)

    def __call__(self, samples: Samples) -> Tensor:
        return torch.tensor(next(self.steps)["rewards"])


class Replay:
    """Stands in for the sampler: the completions of the file, with the log-probabilities of the policy that asks."""

    def __init__(self, steps: list[dict[str, Any]], prompt_B: np.ndarray) -> None:
        self.steps, self.prompt_B = iter(steps), prompt_B
        self.engine: Engine

    def generate(self, prompts: Samples, *_: Any, **__: Any) -> Samples:
        ids = next(self.steps)["ids"]
        finish = torch.tensor([Finish.STOP if i[-1] == 2 else Finish.LENGTH for i in ids])
        samples = Samples(
            "completions",
            prompts.prompts,
            Ragged.of(ids),
            self.prompt_B,
            columns={"finish": finish},
            extra=prompts.extra,
        )
        return samples.with_tokens(old_logps=self.engine.policy_logps(samples))


@pytest.mark.parametrize("loss", ["dapo", "grpo with kl"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_grpo_on_fixed_completions(optimizer: str, loss: str, trl: str, tmp_path: Path) -> None:
    theirs, ours = OPTIMIZERS[optimizer]
    g, group = np.random.default_rng(1), 4
    prompts = [sentence(g, 2, 9) for _ in range(4)]
    # No reward is the mean of its group: an advantage of 0 is 1e-8 in TRL, and AdamW makes whole steps of that.
    completions = [{"ids": [answer(g) for _ in range(16)], "rewards": g.normal(size=16).tolist()} for _ in range(STEPS)]
    with_kl = loss != "dapo"
    config = {
        "loss_type": "grpo" if with_kl else "dapo", "beta": 0.04 if with_kl else 0.0, "num_generations": group,
        "per_device_train_batch_size": 16, "max_steps": STEPS, "max_completion_length": 16, "shuffle_dataset": False,
        **theirs,
    }  # fmt: skip
    rows = [{"prompt": p} for p in prompts]
    expected = run_trl(trl, tmp_path, "grpo", config, rows=rows, completions=completions)
    algorithm = create_algorithm("trl:grpo", **({"loss_type": "grpo", "beta": 0.04} if with_kl else {}))
    (stage,) = algorithm.stages
    source = replace(stage.source, group_size=group)
    algorithm.stages = (replace(stage, source=source, schedule=replace(stage.schedule, prompts=4, minibatches=1)),)
    words, policy = load_tokenizer(POLICY), load_policy(POLICY)
    data = Samples(
        "prompts", Ragged.of([words(p)["input_ids"] for p in prompts]), Ragged.of([]), np.zeros(0, dtype=np.int64),
        extra={"prompt": prompts},
    )  # fmt: skip
    replay = Replay(completions, np.repeat(np.arange(4), group))
    reference = load_policy(POLICY).requires_grad_(False) if with_kl else None
    engine = engine_of(
        algorithm, data, policy=policy, reward=Given(completions), reference=reference,
        settings={"max_steps": STEPS, "shuffle": False, **ours},
    )  # fmt: skip
    replay.engine, engine.rollouts = engine, replay  # type: ignore[assignment]
    assert len(list(engine.run())) == STEPS
    assert_same_weights(weights(policy.model), expected, weights(load_policy(POLICY).model))
