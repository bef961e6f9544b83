"""``train``: from names, folders and files to a trained model in a folder."""

from __future__ import annotations

import inspect
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefzoo.algorithm import Algorithm, Stage, algorithm_entry, create_algorithm
from prefzoo.data.formats import Dataset, load_dataset
from prefzoo.data.tokens import tokenise
from prefzoo.feedback import RewardSource, resolve_reward
from prefzoo.feedback.rewards import ModelReward
from prefzoo.models.load import (
    Size,
    clone,
    critic_of,
    learn_tokenizer,
    load_policy,
    load_scorer,
    load_tokenizer,
    new_scorer,
    save_policy,
    save_scorer,
    tiny_model,
)  # fmt: skip
from prefzoo.models.reference import cached_logps
from prefzoo.models.roles import Policy, Scorer
from prefzoo.parts.feedback import Verifier
from prefzoo.parts.roles import CRITIC, REFERENCE, REWARD
from prefzoo.parts.source import Rollouts
from prefzoo.registry import UsageError, suggest
from prefzoo.training.config import ONLY_DATASET, TrainConfig
from prefzoo.training.engine import Engine, Spent
from prefzoo.training.metrics import RunLog


@dataclass
class Run:
    """A finished run: the trained module, what it cost, its metrics, and where it was written."""

    algorithm: str
    policy: Policy | None
    scorer: Scorer | None
    tokenizer: PreTrainedTokenizerBase
    spent: Spent
    history: list[dict[str, Any]] = field(repr=False)
    output_dir: Path | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The trained causal model; call ``set_attn_implementation('sdpa')`` on it for ordinary forwards."""
        assert self.policy is not None
        return self.policy.model


def train(
    algorithm: str | Algorithm,
    *,
    model: str | Path | PreTrainedModel | Policy,
    dataset: Any = None,
    reward: Any = None,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reference: str | Path | PreTrainedModel | None = None,
    ptx_dataset: Any = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    callback: Callable[[int, Policy, dict[str, float]], None] | None = None,
    quiet: bool = False,
    **options: Any,
) -> Run:
    """Train a model with an algorithm, by name.

    Args:
        algorithm: a name (``prefzoo.list_algorithms()``) or a composition.
        model: a local Hugging Face folder, a hub id, a loaded model (copied), or ``"tiny"``: a small random model with
            a tokenizer learned from the data.
        dataset: a JSON Lines file, a list of rows or a ``datasets.Dataset``; converted to what the algorithm needs.
        reward: a function with TRL's signature, a verifier's name, a reward-model folder, or a list of these. An
            algorithm that needs none ignores it and says so.
        output_dir: gets ``metrics.jsonl``, ``samples.jsonl``, ``run.json`` and ``final/``; None: nothing is written.
        reference: the anchor; by default the start model.
        ptx_dataset: demonstrations for terms on ``ptx`` rows (``ppo(ptx=...)``).
        config: a :class:`TrainConfig` or a mapping of its fields.
        callback: called as ``callback(step, policy, metrics)`` after every ``logging_steps`` steps.
        **options: options of the algorithm (``beta=0.2``) or fields of the configuration (``learning_rate=1e-5``).

    Example::

        run = prefzoo.train("dpo", model="my-model", dataset="pairs.jsonl.gz", output_dir="runs/dpo", beta=0.2)
    """
    chosen, settings = _resolve(algorithm, options, config)
    if dataset is None:
        raise UsageError(f"algorithm {chosen.name!r}: give dataset=, a file or rows of type {chosen.data}.")
    folder = _output_folder(output_dir)
    data = load_dataset(dataset, strict=settings.strict)
    policy, words = _start(model, tokenizer, data, settings)
    device = _device(settings)
    policy.to(device)
    if settings.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    source = _reward(chosen, reward, words, device, quiet)
    anchor = load_policy(reference).to(device).requires_grad_(False) if reference is not None else None

    spent, scorer = Spent(), None
    with RunLog(folder, chosen.name, quiet=quiet) as log:
        if anchor is not None and REFERENCE not in chosen.needs:
            log.note(f"note: {chosen.name} needs no reference; reference= is ignored.")
        for stage in chosen.stages:
            engine, scorer = _engine(stage, settings, policy, words, data, ptx_dataset, source, anchor, device, log)
            log.begin(engine.total_steps)
            for step, values in engine.run():
                if callback is not None:
                    callback(step, policy, values)
            spent = _add(spent, engine.spent)
    result = Run(
        chosen.name, None if chosen.trains_reward else policy, scorer if chosen.trains_reward else None, words,
        spent, log.history, folder,
    )  # fmt: skip
    if folder is not None:
        _write(result, chosen, settings, data, words, folder)
    return result


def _resolve(
    algorithm: str | Algorithm, options: Mapping[str, Any], config: TrainConfig | Mapping[str, Any] | None
) -> tuple[Algorithm, TrainConfig]:
    """Sort options into the algorithm's and the configuration's, and merge defaults, recommended and given values."""
    given = config.model_dump(exclude_unset=True) if isinstance(config, TrainConfig) else dict(config or {})
    mathematics = {} if isinstance(algorithm, Algorithm) else algorithm_entry(algorithm).options
    for key in options:
        if key not in mathematics and key not in TrainConfig.model_fields:
            known = [*mathematics, *TrainConfig.model_fields, *inspect.signature(train).parameters]
            raise UsageError(f"neither algorithm {algorithm!r} nor training has an option {key!r}{suggest(key, known)}")
    mine = {k: v for k, v in options.items() if k in mathematics}
    given |= {k: v for k, v in options.items() if k not in mathematics}
    chosen = algorithm if isinstance(algorithm, Algorithm) else create_algorithm(algorithm, **mine)
    settings = TrainConfig.of(chosen.recommended, given)
    if chosen.stages[0].on_policy:
        for key in ONLY_DATASET:
            if key in given:
                raise UsageError(
                    f"{key!r} has no effect on {chosen.name!r}, whose rows are sampled: its schedule decides "
                    "(prompts_per_step, inner_epochs, minibatches of the algorithm; max_steps of the training)."
                )
    if "critic_learning_rate" in given and CRITIC not in chosen.needs:
        raise UsageError(f"'critic_learning_rate' has no effect on {chosen.name!r}, which has no critic; leave it out.")
    if "betas" in given and settings.optimizer == "sgd":
        raise UsageError("'betas' has no effect with optimizer='sgd'; leave it out.")
    return chosen, settings


def _output_folder(output_dir: str | Path | None) -> Path | None:
    if output_dir is None:
        return None
    folder = Path(output_dir)
    if (folder / "run.json").exists():
        raise UsageError(f"output folder {str(folder)!r} holds another run; choose a new folder or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _device(settings: TrainConfig) -> torch.device:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise UsageError(
            f"this run was launched as {processes} processes; training on several is not supported yet. "
            "Start it without a launcher: one process uses one device."
        )
    return torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _start(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, data: Dataset, settings: TrainConfig
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The start policy (a copy, where the caller holds the model) and its tokenizer."""
    if isinstance(model, str) and model in ("tiny", "small"):
        words = tokenizer or learn_tokenizer(_texts(data))
        return Policy(tiny_model(words, size=cast(Size, model), seed=settings.seed)), words
    if isinstance(model, Policy):
        model = model.model
    if tokenizer is None:
        where = model.config._name_or_path if isinstance(model, PreTrainedModel) else model
        if not where:
            raise UsageError("a model in memory needs its tokenizer: give tokenizer=.")
        tokenizer = load_tokenizer(where)
    return load_policy(model), tokenizer


def _texts(data: Dataset) -> list[str]:
    return [str(row[k]) for row in data.rows for k in ("prompt", "chosen", "rejected", "completion") if k in row]


def _reward(
    algorithm: Algorithm, reward: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device, quiet: bool
) -> RewardSource | None:
    needs = any(REWARD in s.needs and REWARD not in s.trains for s in algorithm.stages)
    if not needs:
        if reward is not None and not quiet:
            print(f"note: {algorithm.name} learns from the data's labels; reward= is ignored.", file=sys.stderr)
        return None
    if reward is None:
        raise UsageError(
            f"algorithm {algorithm.name!r} needs a reward: give reward= a function "
            "f(prompts, completions, **columns) -> list of float, a verifier ('exact', 'numeric'), or the "
            "folder of a reward model (prefzoo train reward_model ... makes one)."
        )
    source = resolve_reward(reward, tokenizer, device)
    if any(isinstance(s.feedback, Verifier) for s in algorithm.stages) and not source.verifies:
        raise UsageError(
            f"algorithm {algorithm.name!r} needs a verifier (a function that checks answers), not a reward model; "
            "for a reward model use 'grpo'."
        )
    return source


def _engine(
    stage: Stage, settings: TrainConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase, data: Dataset,
    ptx_dataset: Any, reward: RewardSource | None, anchor: Policy | None, device: torch.device, log: RunLog,
) -> tuple[Engine, Scorer | None]:  # fmt: skip
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or settings.max_length
    if isinstance(stage.source, Rollouts):  # a prompt must leave room for its answer; longer ones are dropped, counted
        positions = positions - stage.source.max_new_tokens + 1
    options: dict[str, Any] = {
        "max_length": min(settings.max_length, positions),
        "cache": settings.cache_dir,
        "strict": settings.strict,
    }
    samples, report = tokenise(data, tokenizer, stage.source.data, **options)
    for line in report.lines():
        log.note(line)
    ptx = None
    if ptx_dataset is not None and all(t.rows != "ptx" for t in stage.terms):
        log.note("note: no term has ptx rows; ptx_dataset= is ignored.")
    if any(t.rows == "ptx" for t in stage.terms):
        if ptx_dataset is None:
            raise UsageError("this algorithm has a term on ptx rows: give ptx_dataset= demonstrations.")
        ptx, _ = tokenise(ptx_dataset, tokenizer, "completions", **options)
    reference = None
    if REFERENCE in stage.needs:
        live = stage.on_policy or stage.prelude is not None
        reference = anchor or (clone(policy) if live else policy)
        if not stage.on_policy:
            # Offline rows never change, so neither do their reference log-probabilities: once, before any step.
            budget, precision = settings.tokens_per_batch, settings.precision
            logps = cached_logps(reference, samples, budget, device, settings.cache_dir, precision)
            samples = samples.with_tokens(ref_logps=logps)
    scorer = new_scorer(policy, stage.pooling).to(device) if REWARD in stage.trains else None  # type: ignore[arg-type]
    critic = None
    if CRITIC in stage.needs:
        critic = new_scorer(policy)
        if stage.critic_from == REWARD:
            if not isinstance(reward, ModelReward):
                raise UsageError("critic_from='reward' needs a reward model as the reward.")
            critic = critic_of(reward.scorer)
        critic.to(device)
    engine = Engine(
        stage, settings, tokenizer=tokenizer, policy=policy, data=samples, ptx=ptx, reward=reward,
        reference=reference, scorer=scorer, critic=critic, log=log,
    )  # fmt: skip
    return engine, scorer


def _add(a: Spent, b: Spent) -> Spent:
    return Spent(**{k: v + getattr(b, k) for k, v in a.__dict__.items()})


def _write(
    run: Run,
    algorithm: Algorithm,
    settings: TrainConfig,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    if run.scorer is not None:
        save_scorer(run.scorer, tokenizer, folder / "final")
    else:
        assert run.policy is not None
        save_policy(run.policy, tokenizer, folder / "final")
    packages = ("prefzoo", "torch", "transformers", "numpy")
    record = {
        "algorithm": algorithm.name,
        "options": {k: repr(v) if callable(v) else v for k, v in algorithm.options.items()},
        "composition": repr(algorithm),
        "sources": algorithm.sources,
        "config": settings.model_dump(mode="json"),
        "given": settings.model_dump(mode="json", exclude_unset=True),
        "data": {"source": data.report.source, "hash": data.hash(), "type": data.type, "rows": len(data.rows)},
        "spent": run.spent.to_dict(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }
    (folder / "run.json").write_text(json.dumps(record, indent=2, default=str) + "\n")


def load_run_policy(folder: str | Path) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The policy of a run folder, its ``final`` folder, or any model folder."""
    folder = Path(folder)
    final = folder / "final" if (folder / "final").is_dir() else folder
    return load_policy(final), load_tokenizer(final)


__all__ = ["Run", "load_run_policy", "load_scorer", "train"]
