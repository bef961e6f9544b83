"""``train`` and ``steps``: from names, folders and files to a trained model in a folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefzoo.algorithm import Algorithm, Stage
from prefzoo.data.samples import Samples
from prefzoo.models.folders import run_model
from prefzoo.models.load import load_policy, load_scorer, load_tokenizer, save_policy, save_scorer, set_checkpointing
from prefzoo.models.roles import Policy, Scorer
from prefzoo.parts.roles import REFERENCE
from prefzoo.registry import UsageError, suggest
from prefzoo.training import output, setup
from prefzoo.training.config import TrainConfig
from prefzoo.training.engine import Engine, Spent
from prefzoo.training.metrics import RunLog

Callback = Callable[[int, Policy, dict[str, float]], Any]


@dataclass
class Run:
    """A finished run: the trained module, what it cost, its metrics, and where it was written."""

    algorithm: str
    policy: Policy | None = field(repr=False)
    scorer: Scorer | None = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    spent: Spent
    history: list[dict[str, Any]] = field(repr=False)
    output_dir: Path | None = None
    best: dict[str, Any] | None = None  # metric, value and step of the best evaluation, where one was looked for

    @property
    def model(self) -> PreTrainedModel:
        """The trained causal model; call ``set_attn_implementation('sdpa')`` on it for ordinary forwards."""
        assert self.policy is not None
        return self.policy.model


@dataclass(frozen=True)
class Step:
    """One step of a run, after it was taken: an optimizer step, or a rollout step where samples are drawn."""

    number: int
    total: int
    metrics: dict[str, float]
    evaluation: dict[str, float] | None  # where this step was evaluated
    policy: Policy
    stage: int = 0


class Steps:
    """The steps of a run, one by one, for notebooks and loops of one's own: see :func:`steps`."""

    def __init__(
        self,
        algorithm: str | Algorithm,
        *,
        model: Any,
        dataset: Any = None,
        reward: Any = None,
        reward_weights: Sequence[float] | None = None,
        output_dir: str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reference: Any = None,
        ptx_dataset: Any = None,
        eval_dataset: Any = None,
        config: TrainConfig | Mapping[str, Any] | None = None,
        callback: Callback | Sequence[Callback] = (),
        push_to_hub: str | None = None,
        quiet: bool = False,
        **options: Any,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "options", "algorithm", "config")}
        self.algorithm, self.settings = setup.resolve(algorithm, options, config, arguments)
        chosen, settings = self.algorithm, self.settings
        if push_to_hub is not None and output_dir is None:
            raise UsageError("push_to_hub needs output_dir: the model is written there first.")
        if settings.best_metric is not None and output_dir is None:
            raise UsageError("best_metric needs output_dir: the best model is kept in OUTPUT/best.")
        self.push_to_hub = push_to_hub
        self.callbacks = [*callback] if isinstance(callback, Sequence) else [callback]
        for call in self.callbacks:
            if not callable(call):
                raise UsageError(f"callback: expected a function f(step, policy, metrics), got {type(call).__name__}.")
        output.check_folder(output_dir)
        setup.check_cache(settings)
        self.device = setup.device_of(settings)
        self.log = RunLog(None if output_dir is None else Path(output_dir), chosen.name, quiet=quiet)
        self.data, self.held_out = setup.read_data(chosen, dataset, eval_dataset, settings)
        self.policy, self.tokenizer = setup.start_model(model, tokenizer, self.data, settings, self.log.note)
        self.policy.to(self.device)
        self.source = setup.reward_source(chosen, reward, reward_weights, self.tokenizer, self.device, self.log.note)
        self.anchor = None
        if reference is not None and REFERENCE not in chosen.needs:
            self.log.note(f"note: {chosen.name} needs no reference; reference= is ignored.")
        elif reference is not None:
            self.anchor = setup.anchor(reference, self.tokenizer, settings, self.log.note).to(self.device)
        self.facts = {"model": _name_of(model), "reward": _name_of(reward), "reference": _name_of(reference)}
        self.ptx_dataset = ptx_dataset
        self.folder = output.make_folder(output_dir)
        self._done = Spent()  # by earlier stages
        self.scorer: Scorer | None = None
        self.engine: Engine | None = None  # of the stage that runs
        self.best: dict[str, Any] | None = None
        self.result: Run | None = None
        self._waited = 0  # evaluations since the best one
        self._steps = self._all_steps()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        return next(self._steps)

    def __enter__(self) -> Steps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._steps.close()
        if error is not None:
            self._interrupted()

    def finish(self) -> Run:
        """End the run here: what is trained so far is the result, written to ``output_dir``."""
        if self.result is None:
            self._steps.close()
            if self.engine is None:
                raise UsageError("finish() before the first step: there is nothing to keep.")
            self.result = self._finish()
        return self.result

    @property
    def spent(self) -> Spent:
        """What the run has cost so far."""
        return self._done if self.engine is None else self._done + self.engine.spent

    def _all_steps(self) -> Generator[Step]:
        try:
            with self.log:
                self.log.open_trackers(self.settings.report_to, self._described())
                for number, stage in enumerate(self.algorithm.stages):
                    if not (yield from self._stage_steps(number, stage)):
                        break
        except GeneratorExit:  # finish(), or the caller dropped the iterator
            raise
        except BaseException:
            self._interrupted()
            raise
        self.result = self._finish()

    def _stage_steps(self, number: int, stage: Stage) -> Generator[Step, None, bool]:
        """The steps of one stage; whether the run goes on after it."""
        settings = self.settings
        self._done, self.engine = self.spent, None
        engine, held = setup.make_engine(
            stage, settings, policy=self.policy, tokenizer=self.tokenizer, data=self.data, held_out=self.held_out,
            ptx_dataset=self.ptx_dataset, reward=self.source, anchor=self.anchor, device=self.device, log=self.log,
        )  # fmt: skip
        self.engine, self.scorer = engine, engine.scorer
        self.best, self._waited = None, 0  # stages differ in what they measure
        if settings.gradient_checkpointing:
            for trained in engine.trained.values():
                set_checkpointing(trained.module)
        total = engine.total_steps
        self.log.begin(total)
        every = settings.eval_steps or math.ceil(total / 10)
        if engine.optimizer_steps <= engine.config.warmup_steps and settings.learning_rate > 0:
            self.log.note(
                f"note: the warm-up of {engine.config.warmup_steps:g} steps is as long as the run of "
                f"{engine.optimizer_steps}: the learning rate hardly reaches {settings.learning_rate:g} (warmup_steps)."
            )
        if held is not None:
            self._evaluate(engine, held, 0)
        for step, values, logged in engine.run():
            evaluation, going_on = None, True
            if held is not None and (step % every == 0 or step == total):
                evaluation = self._evaluate(engine, held, step)
                going_on = settings.patience is None or self._waited < settings.patience
            if logged is not None:
                answers = [call(step, self.policy, logged) for call in self.callbacks]
                going_on = going_on and not any(answer is True for answer in answers)
            yield Step(step, total, values, evaluation, self.policy, number)
            if not going_on:
                if step < total:
                    self.log.note(f"stopped after step {step} of {total}, as asked.")
                return False
        return True

    def _interrupted(self) -> None:
        """Keep what was trained when the run cannot go on."""
        if self.spent.optimizer_steps and self.folder is not None and self.result is None:
            where = self._save("interrupted")
            self.log.say(f"stopped after {self.spent.optimizer_steps} optimizer steps; the model is in {where}")

    def _evaluate(self, engine: Engine, held_out: Samples, step: int) -> dict[str, float]:
        """Evaluate, and keep the model if it is the best so far."""
        values = engine.evaluate(held_out)
        self.log.evaluation(step, values)
        s = self.settings
        if s.best_metric is None and s.patience is None:
            return values
        metric = s.best_metric or ("eval/reward" if engine.stage.on_policy else "eval/loss")
        metric = metric if metric.startswith("eval/") else f"eval/{metric}"
        if metric not in values and self.best is not None:  # such as a reward that nobody gave this time
            self._waited += 1
            return values
        if metric not in values:
            raise UsageError(
                f"best_metric: no metric {metric!r}{suggest(metric, values)} There are: {', '.join(values)}."
            )
        mode = s.best_mode or ("min" if any(word in metric for word in ("loss", "kl")) else "max")
        value = values[metric]
        sign = 1 if mode == "max" else -1
        known = self.best is not None and not math.isnan(self.best["value"])
        if self.best is not None and known and not sign * value > sign * self.best["value"]:
            self._waited += 1
            return values
        self.best, self._waited = {"metric": metric, "value": value, "step": step}, 0
        if s.best_metric is not None:
            self._save("best")
        return values

    def _finish(self) -> Run:
        chosen = self.algorithm
        reward = chosen.trains_reward
        run = Run(
            chosen.name, None if reward else self.policy, self.scorer if reward else None, self.tokenizer,
            self.spent, self.log.history, self.folder, self.best,
        )  # fmt: skip
        if self.folder is None:
            return run
        if self.best is not None and self.best["step"] == 0:
            self.log.note("no evaluation was better than the one before the first step.")
        record = self._described() | {"spent": self.spent.to_dict(), "best": self.best}
        output.write_record(record, self.folder)
        output.write_card(record, self.log.history, self._save("final"))
        output.draw_curves(self.log.history, self.folder / "curves.png", chosen.name, self.log.note)
        if self.push_to_hub is not None:
            output.push(self.folder / "final", self.push_to_hub, self.log.note)
        return run

    def _save(self, name: str) -> Path:
        """The model as it is, as a folder; an older one of that name is replaced only when the new one is whole."""
        assert self.folder is not None
        module = self.scorer or self.policy
        if not all(bool(torch.isfinite(p).all()) for p in module.parameters() if p.requires_grad):
            self.log.say("the weights are not finite: an earlier step was too large for them. Lower the learning rate.")
        with output.replacing(self.folder / name) as aside:
            if self.scorer is not None:
                save_scorer(self.scorer, self.tokenizer, aside, note=self.log.note)
            else:
                save_policy(self.policy, self.tokenizer, aside, merge=self.settings.merge)
        return self.folder / name

    def _described(self) -> dict[str, Any]:
        return output.describe(self.algorithm, self.settings, self.data, self.held_out, self.facts)


def steps(algorithm: str | Algorithm, **arguments: Any) -> Steps:
    """The steps of a run, one by one: the arguments are those of :func:`train`.

    Each :class:`Step` comes after it was taken, with its metrics, and its evaluation where there was one. Leave the
    loop when you like; ``finish()`` then writes what is trained so far and gives the :class:`Run`.

    Example::

        steps = prefzoo.steps("dpo", model="my-model", dataset="pairs.jsonl.gz", output_dir="runs/dpo")
        for step in steps:
            print(step.number, step.metrics["loss"])
            if step.metrics["rewards/margins"] > 2:
                break
        run = steps.finish()
    """
    return Steps(algorithm, **arguments)


def train(
    algorithm: str | Algorithm,
    *,
    model: str | Path | PreTrainedModel | Policy,
    dataset: Any = None,
    reward: Any = None,
    reward_weights: Sequence[float] | None = None,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reference: str | Path | PreTrainedModel | None = None,
    ptx_dataset: Any = None,
    eval_dataset: Any = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    callback: Callback | Sequence[Callback] = (),
    push_to_hub: str | None = None,
    quiet: bool = False,
    **options: Any,
) -> Run:
    """Train a model with an algorithm, by name.

    Args:
        algorithm: a name (``prefzoo.list_algorithms()``) or a composition.
        model: a local Hugging Face folder, a hub id, a peft adapter's folder, a loaded model (copied), or ``"tiny"``:
            a small random model with a tokenizer learned from the data.
        dataset: a file, a folder, a hub id, a list of rows, a ``datasets`` object, or a list of
            :class:`prefzoo.DataSource`; converted to what the algorithm needs.
        reward: a function with TRL's signature, a verifier's name, a reward-model folder or hub id, or a list of these
            (their sum, with ``reward_weights``). An algorithm that needs none ignores it and says so.
        output_dir: gets ``metrics.jsonl``, ``samples.jsonl``, ``run.json``, ``curves.png`` and ``final/``; None:
            nothing is written.
        reference: the anchor; by default the start model.
        ptx_dataset: demonstrations for terms on ``ptx`` rows (``ppo(ptx=...)``).
        eval_dataset: rows or prompts that are not trained on, evaluated every ``eval_steps``; or ``eval_split=0.05``.
        config: a :class:`TrainConfig` or a mapping of its fields.
        callback: called as ``callback(step, policy, metrics)`` after every ``logging_steps`` steps; several in a list.
            The run ends early where one returns ``True``.
        push_to_hub: repository on the hub that gets ``final/``.
        **options: options of the algorithm (``beta=0.2``) or fields of the configuration (``learning_rate=1e-5``).

    If the run stops with an error or Ctrl-C, the model as it is then goes to ``output_dir/interrupted``.

    Example::

        run = prefzoo.train("dpo", model="my-model", dataset="pairs.jsonl.gz", output_dir="runs/dpo", beta=0.2)
    """
    given = {k: v for k, v in locals().items() if k not in ("algorithm", "options")}
    run = Steps(algorithm, **given, **options)
    for _ in run:
        pass
    return run.finish()


def load_run_policy(
    source: str | Path, *, chat_template: str | None = None, **where: Any
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The policy of a run folder, its ``final`` folder, any model or adapter folder, or a hub id.

    ``where``: ``revision`` and ``trust_remote_code`` of a hub id.
    """
    found = run_model(source)
    tokenizer = load_tokenizer(found, chat_template=chat_template, **where)
    return load_policy(found, tokenizer=tokenizer, **where), tokenizer


def _name_of(value: Any) -> Any:
    """What a record says about a model or a reward that was given."""
    if value is None or isinstance(value, str | Path):
        return None if value is None else str(value)
    if isinstance(value, list | tuple):
        return [_name_of(v) for v in value]
    path = getattr(getattr(value, "config", None), "_name_or_path", None)
    return path or getattr(value, "__name__", type(value).__name__)


__all__ = ["Run", "Step", "Steps", "load_run_policy", "load_scorer", "steps", "train"]
