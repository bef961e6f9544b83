"""From names, folders and files to what a run needs: the algorithm, its settings, models and data."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefzoo.algorithm import Algorithm, Stage, algorithm_entry, create_algorithm
from prefzoo.data.formats import Dataset, load_dataset, split_by_prompt
from prefzoo.data.samples import Samples
from prefzoo.data.tokens import tokenise
from prefzoo.feedback import RewardSource, resolve_reward
from prefzoo.feedback.rewards import ModelReward
from prefzoo.losses.base import LossEntry
from prefzoo.models.adapters import Adapter
from prefzoo.models.folders import run_model
from prefzoo.models.heads import new_heads
from prefzoo.models.load import (
    Size,
    clone,
    critic_of,
    learn_tokenizer,
    load_policy,
    load_tokenizer,
    new_critic,
    new_scorer,
    prepare_tokenizer,
    tiny_model,
)  # fmt: skip
from prefzoo.models.reference import cached_logps, follower, reference_of, weights_hash
from prefzoo.models.roles import Policy, Scorer
from prefzoo.models.teacher import OTHER_TEACHER, check_vocabulary
from prefzoo.models.tokenizer import open_tokenizer, same_tokens
from prefzoo.parts.feedback import Verifier
from prefzoo.parts.reference import Moving
from prefzoo.parts.roles import HEADS, REFERENCE, REWARD, TEACHER
from prefzoo.parts.source import Rollouts
from prefzoo.processes import Processes
from prefzoo.registry import UsageError, suggest
from prefzoo.training.config import ONLY_DATASET, TrainConfig
from prefzoo.training.engine import Engine
from prefzoo.training.guards import Watchdog
from prefzoo.training.metrics import RunLog
from prefzoo.training.records import wanted
from prefzoo.training.stopping import Stopping

Note = Callable[[str], None]


def no_option(algorithm: str | Algorithm, options: Mapping[str, Any], key: str, known: Iterable[str]) -> UsageError:
    """The error of an option that neither an algorithm nor training has; it may be one of the algorithm inside."""
    words = f"neither algorithm {algorithm!r} nor training has an option {key!r}"
    inner = str(options.get("rl", "")).partition("(")[0]
    if inner and key in algorithm_entry(inner).options:
        return UsageError(f"{words}; {inner!r} has, and its options stand in its name: rl='{inner}({key}=...)'.")
    return UsageError(words + suggest(key, known))


def resolve(
    algorithm: str | Algorithm,
    options: Mapping[str, Any],
    config: TrainConfig | Mapping[str, Any] | None,
    arguments: Mapping[str, Any],
) -> tuple[Algorithm, TrainConfig]:
    """Sort options into the algorithm's and the configuration's; merge defaults, recommended and given values.

    ``arguments``: what else the run was given (``eval_dataset``, ...), to find options that have no effect.
    """
    if not isinstance(config, TrainConfig | Mapping | None):
        raise UsageError(f"config: expected a TrainConfig or a mapping of its fields, got {type(config).__name__}.")
    given = config.model_dump(exclude_unset=True) if isinstance(config, TrainConfig) else dict(config or {})
    entry = None if isinstance(algorithm, Algorithm) else algorithm_entry(algorithm)
    if entry is not None and "spelling" in entry.tags:  # trl: names take another library's words
        translated = entry.tags["spelling"](options)
        options = {**translated.options, **translated.settings}
    mathematics = {} if entry is None else entry.options
    if isinstance(entry, LossEntry):  # a modifier that does not apply has its own words
        entry.check_modifiers(options, "algorithm")
    for key in options:
        if key not in mathematics and key not in TrainConfig.model_fields:
            known = [*mathematics, *TrainConfig.model_fields, *arguments]
            raise no_option(algorithm, mathematics, key, known)
    mine = {k: v for k, v in options.items() if k in mathematics}
    given |= {k: v for k, v in options.items() if k not in mathematics}
    chosen = algorithm if isinstance(algorithm, Algorithm) else create_algorithm(algorithm, **mine)
    settings = TrainConfig.of(chosen.recommended, given)
    for keys, why in _without_effect(chosen, settings, arguments):
        for key in keys:
            if key in given:
                raise UsageError(f"{key!r} has no effect on {chosen.name!r}: {why}; leave it out.")
    return chosen, settings


def _without_effect(
    algorithm: Algorithm, settings: TrainConfig, arguments: Mapping[str, Any]
) -> list[tuple[tuple[str, ...], str]]:
    """Options that this run does not read, and why."""
    out: list[tuple[tuple[str, ...], str]] = []
    sampled = algorithm.on_policy
    if sampled:
        out.append((ONLY_DATASET, "its rows are sampled, and its schedule decides (prompts_per_step, inner_epochs, "
                    "minibatches of the algorithm; max_steps of the training)"))  # fmt: skip
        out.append((("loss_on", "implicit_prompt"), "it trains on answers of its own"))
    else:
        out.append((("log_completions", "eval_samples"), "it samples nothing"))
    if not any(stage.critics for stage in algorithm.stages):
        out.append((("critic_learning_rate",), "it has no critic"))
    if settings.optimizer == "sgd":
        out.append((("betas",), "the optimizer is sgd"))
    if settings.schedule == "constant":
        out.append((("final_learning_rate",), "the learning rate stays constant"))
    if not settings.lora:
        out.append((("lora_rank", "lora_alpha", "lora_targets", "merge", "load_in_4bit"), "there is no adapter (lora)"))
    if settings.precision == settings.dtype == "float32":
        out.append((("fp32_head",), "the forward pass is in float32 anyway"))
    if algorithm.trains_reward:
        out.append((("fp32_head",), "a reward head is in float32 anyway"))
        out.append((("merge",), "a reward model is always written merged"))
    if arguments.get("output_dir") is None:
        out.append((("save_steps", "save_total_limit"), "there is no output_dir to write checkpoints to"))
    if arguments.get("eval_dataset") is not None:
        out.append((("eval_split",), "eval_dataset is given"))
    elif settings.eval_split is None:
        why = "nothing is held out (eval_dataset or eval_split)"
        out.append((("eval_steps", "eval_samples", "best_metric", "best_mode", "patience"), why))
    if settings.best_metric is None and settings.patience is None:
        out.append((("best_mode",), "no best model is looked for (best_metric or patience)"))
    return out


def check_cache(settings: TrainConfig) -> None:
    if settings.cache_dir is not None and settings.cache_dir.exists() and not settings.cache_dir.is_dir():
        raise UsageError(f"cache_dir {str(settings.cache_dir)!r} is a file; give a folder.")


def device_of(settings: TrainConfig, processes: Processes) -> torch.device:
    """The device of this process: one each where there are several."""
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and processes.size > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if name.partition(":")[0] not in ("cpu", "cuda", "mps", "xpu"):
        raise UsageError(f"device {name!r} is not there: expected 'cpu', 'cuda' or 'cuda:0', 'mps' or 'xpu'.")
    try:
        device = torch.device(name)
        torch.zeros(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not there ({str(error).splitlines()[0]}); leave device out.") from None
    return device


def read_data(
    algorithm: Algorithm, dataset: Any, eval_dataset: Any, settings: TrainConfig
) -> tuple[Dataset | None, Dataset | None]:
    """The data to train on, and what is held out of it; no prompt is in both. A way to decode needs none."""
    if dataset is None and not algorithm.stages:
        return None, None
    if dataset is None:
        raise UsageError(f"algorithm {algorithm.name!r}: give dataset=, a file or rows of type {algorithm.data}.")
    s = settings
    held_out = None if eval_dataset is None else load_dataset(eval_dataset, **reading_of(s))
    data = load_dataset(
        dataset, **reading_of(s), deduplicate=s.deduplicate, streaming=s.streaming, without_prompts_of=held_out
    )
    if s.eval_split is not None:
        data, held_out = split_by_prompt(data, s.eval_split, s.seed)
    return data, held_out


def read_ptx(algorithm: Algorithm, dataset: Any, settings: TrainConfig, note: Note) -> Dataset | None:
    """The demonstrations of terms on ``ptx`` rows."""
    if all(t.rows != "ptx" for stage in algorithm.stages for t in stage.terms):
        if dataset is not None:
            note("note: no term has ptx rows; ptx_dataset= is ignored.")
        return None
    if dataset is None:
        raise UsageError("this algorithm has a term on ptx rows: give ptx_dataset= demonstrations.")
    return load_dataset(dataset, **reading_of(settings))


def reading_of(settings: TrainConfig) -> dict[str, Any]:
    """How every data set of a run is read."""
    s = settings
    return {"strict": s.strict, "columns": s.columns, "implicit_prompt": s.implicit_prompt, "seed": s.seed}


def start_model(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, data: Dataset | None, settings: TrainConfig, note: Note
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The start policy (a copy, where the caller holds the model) and its tokenizer."""
    s = settings
    if model is None:
        raise UsageError("which model? model=FOLDER, a hub id, a loaded model, or 'tiny' for a small random one.")
    if not isinstance(model, str | Path | PreTrainedModel | Policy) and not hasattr(model, "peft_config"):
        raise UsageError(f"model: expected a folder, a hub id or a loaded model, got {type(model).__name__}.")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        got = type(tokenizer).__name__
        raise UsageError(f"tokenizer: expected a tokenizer object (AutoTokenizer.from_pretrained(...)), got {got}.")
    if s.revision is not None and isinstance(model, str | Path) and Path(model).is_dir():
        raise UsageError(f"revision={s.revision!r} has no effect on a local folder, {str(model)!r}; leave it out.")
    if isinstance(model, str | Path) and str(model) not in ("tiny", "small"):
        model = run_model(model)
    words: dict[str, Any] = {"chat_template": s.chat_template, "added_tokens": s.added_tokens}
    where: dict[str, Any] = {"revision": s.revision, "trust_remote_code": s.trust_remote_code}
    if isinstance(model, str) and model in ("tiny", "small"):
        if data is None:
            raise UsageError(f"model {model!r} learns its words from the data: give dataset=.")
        tokenizer = tokenizer or learn_tokenizer(list(_texts(data)))
        model = tiny_model(tokenizer, size=cast(Size, model), seed=s.seed)
    if tokenizer is not None:
        tokenizer = prepare_tokenizer(copy.deepcopy(tokenizer), **words)
    else:
        source = getattr(getattr(model, "config", None), "_name_or_path", "") if _in_memory(model) else model
        if not source:
            raise UsageError("a model in memory needs its tokenizer: give tokenizer=.")
        tokenizer = load_tokenizer(source, **where, **words)
    policy = load_policy(
        model, **where, dtype=getattr(torch, s.dtype), tokenizer=tokenizer, adapter=adapter_of(s),
        load_in_4bit=s.load_in_4bit, note=note,
    )  # fmt: skip
    policy.fp32_head = s.fp32_head
    return policy, tokenizer


def anchor(
    reference: Any, tokenizer: PreTrainedTokenizerBase, settings: TrainConfig, note: Note, role: str = REFERENCE
) -> Policy:
    """The user's own reference or teacher, frozen, in the precision of the policy."""
    reference = run_model(reference) if isinstance(reference, str | Path) else reference
    if isinstance(reference, str | Path) and not same_tokens(open_tokenizer(reference), tokenizer):
        raise UsageError(
            f"{role} {str(reference)!r}: its tokenizer has other ids than the policy's, so it would score other "
            f"words; give a model with the same tokenizer{OTHER_TEACHER if role == TEACHER else ''}."
        )
    policy = load_policy(
        reference, dtype=getattr(torch, settings.dtype), trust_remote_code=settings.trust_remote_code,
        tokenizer=None if role == TEACHER else tokenizer, note=note,  # new rows would teach nothing
    )  # fmt: skip
    policy.fp32_head = settings.fp32_head
    return policy.requires_grad_(False)


def adapter_of(settings: TrainConfig) -> Adapter | None:
    """The adapter that the settings ask for."""
    if not settings.lora:
        return None
    # What was not said is left open: an adapter that is continued keeps its own.
    said = {k: getattr(settings, f"lora_{k}") for k in ("rank", "alpha", "targets")}
    said = {k: v for k, v in said.items() if f"lora_{k}" in settings.model_fields_set}
    return Adapter("lora" if settings.lora is True else settings.lora, seed=settings.seed, **said)


def _in_memory(model: Any) -> bool:
    return isinstance(model, torch.nn.Module)


def _texts(data: Dataset) -> Iterator[str]:
    """Everything that is said in the data."""
    for row in data:
        for side in ("prompt", "chosen", "rejected", "completion", "completions", "text", "messages"):
            value = row.get(side)
            if isinstance(value, str):
                yield value
            elif value is not None:
                yield from (part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in value)


def reward_source(
    algorithm: Algorithm,
    reward: Any,
    weights: Any,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    note: Note,
) -> RewardSource | None:
    if weights is not None and reward is None:
        raise UsageError("reward_weights has no effect without reward=; leave it out.")
    if not algorithm.asks_for_reward:
        if reward is not None:
            note(f"note: {algorithm.name} learns from the data's labels; reward= is ignored.")
        return None
    if reward is None:
        raise UsageError(
            f"algorithm {algorithm.name!r} needs a reward: give reward= a function "
            "f(prompts, completions, **columns) -> list of float, a verifier ('exact', 'numeric'), or the "
            "folder of a reward model (prefzoo train reward_model ... makes one)."
        )
    source = resolve_reward(reward, tokenizer, device, weights=weights)
    for stage in algorithm.stages:
        getattr(stage.feedback, "check", _any_will_do)(source)
        if REWARD in stage.trains:  # later stages are judged by what this one makes
            break
    if any(isinstance(s.feedback, Verifier) for s in algorithm.stages) and not source.verifies:
        raise UsageError(
            f"algorithm {algorithm.name!r} needs a verifier (a function that checks answers), not a reward model; "
            "for a reward model use 'grpo'."
        )
    return source


def _any_will_do(source: RewardSource) -> None:
    """Feedback that takes every reward."""


def check_columns(stage: Stage, samples: Samples, source: str) -> None:
    """Refuse data without the columns of numbers that the losses of its rows need."""
    for column in getattr(stage.credit, "reads", ()) if not stage.on_policy else ():
        if column not in samples.columns:
            raise UsageError(
                f"credit {type(stage.credit).__name__} reads a number in the column {column!r} of every row, and "
                f"{source} has none; add it, or name the column that holds it (columns={{{column!r}: ...}})."
            )
    for loss in (t.loss for t in stage.terms if t.rows == "main" and not stage.on_policy):
        for column in loss.columns:
            ours = "score" if column == "scores" else column
            if ours not in samples.columns and ours not in samples.row_columns:
                each = "a number for each completion" if column == "scores" else "a number"
                raise UsageError(
                    f"loss {loss.name!r} needs {each} in the column {column!r} of every row, and {source} has none; "
                    f"add it, or name the column that holds it (columns={{{column!r}: ...}})."
                )


def check_weights(stage: Stage, samples: Samples) -> None:
    """Refuse weights of rows where a loss has no value of its own for each row."""
    for loss in (t.loss for t in stage.terms if t.rows == "main"):
        if "weight" in {**samples.columns, **samples.row_columns} and not loss.by_row:
            raise UsageError(
                f"loss {loss.name!r} takes no weights: its values belong to ranks, not to rows. Take the column "
                "'weight' out, or choose another loss."
            )


def make_engine(
    stage: Stage,
    settings: TrainConfig,
    *,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    held_out: Dataset | None,
    ptx: Dataset | None,
    reward: RewardSource | None,
    anchor: Policy | None,
    teacher: Policy | None,
    device: torch.device,
    log: RunLog,
    processes: Processes,
    stopping: Stopping,
    watchdog: Watchdog,
) -> tuple[Engine, Samples | None]:
    """The engine of a stage, its roles loaded and its rows tokenised; and the rows held out."""
    config = policy.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or settings.max_length
    if isinstance(stage.source, Rollouts):  # a prompt must leave room for its answer; longer ones are dropped, counted
        if stage.source.max_new_tokens >= positions:
            raise UsageError(
                f"max_new_tokens={stage.source.max_new_tokens} leaves no room for a prompt: the model has {positions} "
                "positions."
            )
        positions = positions - stage.source.max_new_tokens + 1
    if stage.condition is not None:
        positions -= stage.condition.room(tokenizer)
    reading: dict[str, Any] = {
        "max_length": min(settings.max_length, positions),
        "cache": settings.cache_dir,
        "strict": settings.strict,
        "loss_on": settings.loss_on,
    }
    if stage.source.data == "pairs":
        reading["ties"] = any("tie_B" in t.loss.extras for t in stage.terms)
    samples, report = tokenise(data, tokenizer, stage.source.data, **reading)
    for line in report.lines():
        log.note(line)
    check_columns(stage, samples, report.source)
    check_weights(stage, samples)
    held = None
    if held_out is not None:
        held, report = tokenise(held_out, tokenizer, stage.source.data, **reading)
        log.note(f"held out: {report.rows} rows of {report.source}")
        check_columns(stage, held, report.source)
    demonstrations = None
    if ptx is not None and any(t.rows == "ptx" for t in stage.terms):
        demonstrations, _ = tokenise(ptx, tokenizer, "completions", **reading)
    moving = isinstance(stage.reference, Moving)
    if moving and anchor is not None:
        raise UsageError("a moving reference follows the policy from its start; leave reference= out.")
    if isinstance(stage.reference, Moving) and not stage.reference.copies and policy.adapter is not None:
        raise UsageError(
            "the weights between two adapters (lora) are not those between their factors: a moving reference needs "
            "alpha=1, a hard copy, there; or train all weights."
        )
    if TEACHER in stage.needs:
        if teacher is None:
            raise UsageError("this algorithm needs a teacher: give teacher=, a model with the policy's tokenizer.")
        check_vocabulary(policy, teacher, tokenizer)
    reference = None
    if REFERENCE in stage.needs:
        live = stage.on_policy or stage.prelude is not None or "kl" in wanted(t.loss for t in stage.terms)
        written = REFERENCE in stage.source.needs  # what samples is a model of its own
        reference = (
            follower(policy) if moving
            else clone(policy) if written and anchor is None
            else anchor or reference_of(policy, live=live)
        )  # fmt: skip
        if not stage.on_policy and not moving:
            # Offline rows never change, so neither do their reference log-probabilities: once, before any step.
            known = [samples] if held is None else [samples, held]
            budget, precision, cache = settings.tokens_per_batch, settings.precision, settings.cache_dir
            watchdog.doing("log-probabilities of the reference")
            known = [
                rows.with_tokens(ref_logps=cached_logps(reference, rows, budget, device, cache, precision, processes))
                for rows in known
            ]
            samples, held = known[0], (known[1] if held is not None else None)
    scorer = new_scorer(policy, stage.pooling).to(device) if REWARD in stage.trains else None  # type: ignore[arg-type]
    critics: dict[str, Scorer] = {}
    for role in stage.critics:
        if stage.critic_from != REWARD:
            critics[role] = new_critic(policy).to(device)
        elif isinstance(reward, ModelReward):
            critics[role] = critic_of(reward.scorer, adapter_of(settings)).to(device)
        else:
            raise UsageError("critic_from='reward' needs a reward model with the policy's tokenizer as the reward.")
    heads = None
    if HEADS in stage.trains:
        heads = new_heads(policy, polyak=stage.polyak, seed=settings.seed).to(device)
    if processes.size > 1:
        roles = (policy, scorer, *critics.values(), reference, teacher, heads)
        models = [weights_hash(m) for m in roles if m is not None]
        if len({tuple(m) for m in processes.gather(models)}) > 1:
            raise UsageError("the processes have loaded different weights: give all the same model and configuration.")
    engine = Engine(
        stage, settings, tokenizer=tokenizer, policy=policy, data=samples, ptx=demonstrations, reward=reward,
        reference=reference, teacher=teacher, scorer=scorer, critics=critics, heads=heads, log=log,
        processes=processes, stopping=stopping, watchdog=watchdog,
    )  # fmt: skip
    return engine, held
