"""How a field of TRL's becomes one of ours: the translation that is filled in, and the rules that fill it in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefzoo.registry import UsageError, suggest

NO_LIMIT = 1 << 20  # of tokens: the model's positions are the limit


class Refusal(ValueError):
    """Why a value cannot be what it says."""


@dataclass
class Translated:
    """What another library's fields are here. ``check`` stops the run where something was refused."""

    algorithm: str
    given: Mapping[str, Any]
    source: str = "these options"
    options: dict[str, Any] = field(default_factory=dict)  # of the algorithm
    settings: dict[str, Any] = field(default_factory=dict)  # fields of TrainConfig
    arguments: dict[str, Any] = field(default_factory=dict)  # of train()
    mapped: list[tuple[str, str, Any]] = field(default_factory=list)  # field, our spelling, our value
    ignored: list[tuple[str, str]] = field(default_factory=list)  # field, reason
    refused: list[tuple[str, Any, str]] = field(default_factory=list)  # field, value, reason
    notes: list[str] = field(default_factory=list)  # what stays different, and how batch sizes add up

    def lines(self) -> list[str]:
        """The whole translation in words: what maps, what has no effect here, what is refused and why."""
        out = [f"{self.source}, as {self.algorithm}"]
        kinds = [
            ("maps", [f"{f} = {_show(self.given[f])} -> {_ours(name, value)}" for f, name, value in self.mapped]),
            ("has no effect here", self._ignored()),
            ("is refused", self._refusals()),
            ("note", self.notes),
        ]
        for title, found in kinds:
            out += [f"  {title}:", *(f"    {line}" for line in dict.fromkeys(found))] if found else []
        return out

    def check(self) -> None:
        """Raise with everything that was refused."""
        if self.refused:
            raise UsageError("\n  ".join([f"{self.source}, as {self.algorithm}:", *dict.fromkeys(self._refusals())]))

    def call(self) -> dict[str, Any]:
        """Keyword arguments of ``prefzoo.train(translated.algorithm, ...)``."""
        return {**self.arguments, **self.options, "config": self.settings}

    def _ignored(self) -> list[str]:
        """By reason: files are full of these."""
        by_reason: dict[str, list[str]] = {}
        for f, reason in self.ignored:
            by_reason.setdefault(reason, []).append(f"{f} = {_show(self.given[f])}")
        return [f"{', '.join(fields)}: {reason}" for reason, fields in by_reason.items()]

    def _refusals(self) -> list[str]:
        return [f"{f} = {_show(value)}: {reason}" if f else reason for f, value, reason in self.refused]

    # What rules do.

    def get(self, name: str, default: Any = None) -> Any:
        """The value given for a field, or the default where there is none or it is null."""
        value = self.given.get(name)
        return default if value is None else value

    def put(self, where: dict[str, Any], fieldname: str, name: str, value: Any) -> None:
        """Set one of ours, and say so; two fields that say different things contradict each other."""
        if name in where and where[name] != value:
            self.refuse(fieldname, f"another field makes {name} {where[name]!r} already, not {value!r}; give one.")
            return
        where[name] = value
        self.mapped.append((fieldname, name, value))

    def set(self, fieldname: str, name: str, value: Any) -> None:
        self.put(self.settings, fieldname, name, value)

    def same(self, fieldname: str) -> None:
        """What is asked for is what happens anyway."""
        self.mapped.append((fieldname, "", None))

    def ignore(self, fieldname: str, reason: str) -> None:
        self.ignored.append((fieldname, reason))

    def refuse(self, fieldname: str, reason: str) -> None:
        self.refused.append((fieldname, self.given.get(fieldname), reason))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _ours(name: str, value: Any) -> str:
    return f"{name} = {_show(value)}" if name else "as it is here"


# ------------------------------------------------------------------------------------------------ rules

Apply = Callable[[Translated, str], None]


@dataclass(frozen=True)
class Rule:
    """What is done with a field; ``ours`` says it in a few words, for the page."""

    ours: str
    apply: Apply

    def __call__(self, out: Translated, name: str) -> None:
        try:
            self.apply(out, name)
        except Refusal as refusal:
            out.refuse(name, str(refusal))


def same_value(value: Any) -> Any:
    return value


def whole(value: Any) -> int | None:
    """A whole number, also written 8.0 or '8'; null stays null."""
    if value is None:
        return None
    try:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise Refusal("expected a whole number.") from None


def positive(value: Any) -> int:
    number = whole(value)
    if number is None or number < 1:
        raise Refusal("expected a whole number of at least 1.")
    return number


def real(value: Any) -> float | None:
    """A number, also written as text ('1e-6'); null stays null."""
    if value is None:
        return None
    try:
        if isinstance(value, bool) or not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise Refusal("expected a number.") from None


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Refusal("expected true or false.")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise Refusal("expected a text.")
    return value


def listed(value: Any) -> list[Any]:
    """A list, or one of it; null is an empty one."""
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    if not isinstance(value, list | tuple):
        raise Refusal("expected a list.")
    return list(value)


def option(convert: Callable[[Any], Any] = same_value) -> Rule:
    """An option of the algorithm, under the same name."""
    return Rule("option of the algorithm", lambda out, name: out.put(out.options, name, name, convert(out.given[name])))


def setting(ours: str, convert: Callable[[Any], Any] = same_value) -> Rule:
    """A training option."""
    return Rule(f"`{ours}`", lambda out, name: out.set(name, ours, convert(out.given[name])))


def argument(ours: str, convert: Callable[[Any], Any] = same_value) -> Rule:
    """An argument of ``train``; null is none."""

    def apply(out: Translated, name: str) -> None:
        if out.given[name] is None:
            return out.same(name)
        out.put(out.arguments, name, ours, convert(out.given[name]))

    return Rule(f"`{ours}=`", apply)


def fixed(*values: Any, why: str) -> Rule:
    """Only these values: they are what happens here anyway. TRL's default is the first."""

    def apply(out: Translated, name: str) -> None:
        value = out.given[name]
        if any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            out.same(name)
        else:
            out.refuse(name, f"{why}; only {' or '.join(_yaml(v) for v in values)}.")

    return Rule(f"only {' or '.join(f'`{_yaml(v)}`' for v in values)}: {why}", apply)


def no_effect(why: str) -> Rule:
    return Rule(f"no effect: {why}", lambda out, name: out.ignore(name, why))


def refused(why: str) -> Rule:
    return Rule(f"refused: {why}", lambda out, name: out.refuse(name, f"{why}."))


def _yaml(value: Any) -> str:
    names: dict[Any, str] = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return names[value]
    return "''" if value == "" else str(value)


# ------------------------------------------------------------------------------------------------ fields together


def rows(out: Translated, name: str) -> None:
    micro = positive(out.get("per_device_train_batch_size", 8))
    rows = micro * positive(out.get("gradient_accumulation_steps", 1))
    if rows == 1 and out.algorithm == "trl:kto":
        raise Refusal("KTO compares the rows of a step with each other; a step needs at least 2.")
    out.set(name, "rows_per_step", rows)


def max_steps(out: Translated, name: str) -> None:
    steps = whole(out.given[name])
    if steps is None or steps <= 0:
        return out.same(name)  # as many as the epochs say
    per_sampling = _updates(out)
    if steps % per_sampling:
        raise Refusal(
            f"optimizer steps come {per_sampling} to a sampling here; give a multiple of {per_sampling} "
            f"({-(-steps // per_sampling) * per_sampling})."
        )
    out.set(name, "max_steps", steps // per_sampling)


def _updates(out: Translated) -> int:
    """Optimizer steps for each sampling of GRPO; 1 for data sets."""
    if out.algorithm != "trl:grpo":
        return 1
    micro, accumulation = out.get("per_device_train_batch_size", 8), out.get("gradient_accumulation_steps", 1)
    update = positive(micro) * positive(accumulation)
    per_generation = out.get("steps_per_generation", accumulation)
    sampled = positive(out.get("generation_batch_size", positive(micro) * positive(per_generation)))
    return max(1, sampled // update) * positive(out.get("num_iterations", 1))


def epochs(out: Translated, name: str) -> None:
    epochs = real(out.given[name])
    if epochs is None:
        return out.same(name)
    out.set(name, "epochs", epochs)


SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
             "cosine_with_min_lr": "cosine"}  # fmt: skip


def scheduler(out: Translated, name: str) -> None:
    kind = str(out.get("lr_scheduler_type", "linear"))
    kwargs = dict(_mapping(out.get("lr_scheduler_kwargs", {})))
    if kind not in SCHEDULES:
        if name == "lr_scheduler_type":
            raise Refusal(f"there are {', '.join(SCHEDULES)}{suggest(kind, SCHEDULES)}")
        return out.ignore(name, "of a schedule that is refused")
    if name == "lr_scheduler_type":
        out.set(name, "schedule", SCHEDULES[kind])
        floor = kwargs.get("min_lr_rate", 0.0)
        if "min_lr" in kwargs:
            peak = real(out.get("learning_rate"))
            if not peak:
                raise Refusal("min_lr is a share of learning_rate here; give learning_rate too, or min_lr_rate.")
            floor = (real(kwargs["min_lr"]) or 0.0) / peak
        if kind == "cosine_with_min_lr":
            out.set(name, "final_learning_rate", real(floor))
        return
    known = ("min_lr", "min_lr_rate") if kind == "cosine_with_min_lr" else ()
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise Refusal(f"the schedule {kind} takes no {', '.join(unknown)} here.")
    if kwargs and "lr_scheduler_type" in out.given:
        return out.mapped.append((name, "final_learning_rate", out.settings.get("final_learning_rate")))
    out.same(name)


def warmup(out: Translated, name: str) -> None:
    steps = real(out.given[name]) or 0.0
    if steps and str(out.get("lr_scheduler_type", "linear")) == "constant":
        return out.ignore(name, "TRL's schedule constant has no warm-up; constant_with_warmup has")
    if name == "warmup_ratio" and steps >= 1:
        raise Refusal("expected a share of the run, below 1.")
    if name == "warmup_ratio" and real(out.get("warmup_steps", 0)):
        return out.ignore(name, "warmup_steps decides")
    if name == "warmup_steps" and not steps and real(out.get("warmup_ratio", 0)):
        return out.ignore(name, "warmup_ratio decides")
    out.set(name, "warmup_steps", steps)
    if steps:
        out.notes.append("the warm-up starts at 1/warmup_steps and multiplies the decay; TRL's starts at 0, before it.")


OPTIMIZERS = {"adamw_torch_fused": "adamw", "adamw_torch": "adamw", "sgd": "sgd"}


def optimizer(out: Translated, name: str) -> None:
    kind = str(out.given[name])
    if kind not in OPTIMIZERS:
        raise Refusal(f"there are {', '.join(OPTIMIZERS)}{suggest(kind, OPTIMIZERS)}")
    out.set(name, "optimizer", OPTIMIZERS[kind])


def betas(out: Translated, name: str) -> None:
    if OPTIMIZERS.get(str(out.get("optim", "adamw_torch"))) == "sgd":
        return out.ignore(name, "the optimizer is sgd")
    out.set(name, "betas", (real(out.get("adam_beta1", 0.9)), real(out.get("adam_beta2", 0.999))))


def weight_decay(out: Translated, name: str) -> None:
    decay = real(out.given[name]) or 0.0
    out.set(name, "weight_decay", decay)
    if decay:
        out.notes.append("weight_decay takes all parameters; TRL spares biases and norms.")


def clip(out: Translated, name: str) -> None:
    out.set(name, "max_grad_norm", real(out.given[name]) or None)


def precision(out: Translated, name: str) -> None:
    value = out.given[name]
    if value is None:
        return out.same(name)
    out.set(name, "precision", "bfloat16" if flag(value) else "float32")


def fp32_head(out: Translated, name: str) -> None:
    if flag(out.given[name]) and out.get("bf16", False):
        return out.set(name, "fp32_head", True)
    out.same(name)  # the whole forward pass is in float32


def checkpointing(out: Translated, name: str) -> None:
    if out.given[name] is None:
        return out.same(name)
    out.set(name, "gradient_checkpointing", flag(out.given[name]))


def max_length(out: Translated, name: str) -> None:
    value = whole(out.given[name])
    out.set(name, "max_length", NO_LIMIT if value is None else value)


def logging(out: Translated, name: str) -> None:
    steps = real(out.given[name]) or 0.0
    if steps < 1:
        raise Refusal("a share of the run is not here; give the number of steps.")
    out.set(name, "logging_steps", max(1, round(steps / _updates(out))))


def evaluation(out: Translated, name: str) -> None:
    """``eval_strategy`` and ``eval_steps``. YAML reads a bare ``no`` as false."""
    strategy = out.get("eval_strategy", out.get("evaluation_strategy", "no"))
    strategy = "no" if strategy is False else str(strategy)
    if strategy == "no":
        if name != "eval_steps":
            return out.same(name)
        return out.ignore(name, "without eval_strategy nothing is evaluated")
    if strategy != "steps":
        if name == "eval_steps":
            return out.ignore(name, "of an eval_strategy that is refused")
        raise Refusal("evaluation is every eval_steps steps; give eval_strategy: steps.")
    steps = real(out.get("eval_steps", out.get("logging_steps", 10))) or 0.0
    if steps >= 1:
        return out.set(name, "eval_steps", max(1, round(steps / _updates(out))))
    if steps == 0.1:
        return out.same(name)  # ten in a run
    raise Refusal("a share of the run is not here; give the number of steps.")


def saving(out: Translated, name: str) -> None:
    """``save_strategy`` and ``save_steps``. Without either, checkpoints are written as often as costs little."""
    strategy = out.get("save_strategy", "steps")
    strategy = "no" if strategy is False else str(strategy)
    if strategy == "no":
        return out.ignore(name, "checkpoints cost about 1 % of the time, and none is left at the end")
    if strategy != "steps":
        if name == "save_steps":
            return out.ignore(name, "of a save_strategy that is refused")
        raise Refusal("checkpoints are every save_steps steps; give save_strategy: steps, or leave it out.")
    steps = real(out.get("save_steps", 500)) or 0.0
    if steps < 1:
        raise Refusal("a share of the run is not here; give the number of steps.")
    out.set(name, "save_steps", max(1, round(steps / _updates(out))))


def save_limit(out: Translated, name: str) -> None:
    limit = whole(out.given[name])
    if limit is None:
        return out.ignore(name, "the newest two checkpoints are kept, never all")
    out.set(name, "save_total_limit", positive(limit))


def resume(out: Translated, name: str) -> None:
    value = out.given[name]
    if value in (None, False):
        return out.same(name)
    if value is not True:
        raise Refusal("a run goes on from the newest checkpoint of its output_dir; give true.")
    out.put(out.arguments, name, "resume", True)


def _evaluates(out: Translated) -> bool:
    return out.get("eval_strategy", out.get("evaluation_strategy", "no")) not in ("no", False)


def best(out: Translated, name: str) -> None:
    """``load_best_model_at_end``, ``metric_for_best_model`` and ``greater_is_better``."""
    if not out.get("load_best_model_at_end", False):
        if name == "load_best_model_at_end":
            return out.same(name)
        return out.ignore(name, "without load_best_model_at_end")
    metric = str(out.get("metric_for_best_model", "loss")).removeprefix("eval_").removeprefix("eval/")
    if name == "greater_is_better":
        if out.given[name] is None:
            return out.same(name)
        return out.set(name, "best_mode", "max" if flag(out.given[name]) else "min")
    out.set(name, "best_metric", f"eval/{metric}")
    out.notes.append("the best model is kept in OUTPUT/best; OUTPUT/final is the last one.")


TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


def trackers(out: Translated, name: str) -> None:
    value = out.given[name]
    names = [n for n in listed(value) if n != "none"]
    for one in names:
        if one not in TRACKERS:
            raise Refusal(f"there are {', '.join(TRACKERS)}{suggest(str(one), TRACKERS)}")
    out.set(name, "report_to", tuple(names))


def push(out: Translated, name: str) -> None:
    """``push_to_hub`` and ``hub_model_id``: the model's name on the hub is the argument."""
    if not out.get("push_to_hub", False):
        return out.same(name) if name == "push_to_hub" else out.ignore(name, "without push_to_hub")
    target = out.get("hub_model_id")
    if not isinstance(target, str):
        raise Refusal("give hub_model_id, the model's name on the hub, too.")
    out.put(out.arguments, name, "push_to_hub", target)


def device(out: Translated, name: str) -> None:
    if flag(out.given[name]):
        return out.set(name, "device", "cpu")
    out.same(name)


def sampling_order(out: Translated, name: str) -> None:
    value = text(out.given[name])
    orders = {"random": True, "sequential": False}
    if value not in orders:
        raise Refusal(f"rows come in random or sequential order{suggest(value, orders)}")
    out.set(name, "shuffle", orders[value])


# ---- the model


def dtype(out: Translated, name: str) -> None:
    kinds = ("float32", "bfloat16", "float16")
    kind = str(out.given[name]).removeprefix("torch.")
    if kind not in kinds:
        raise Refusal(f"name it: {', '.join(kinds)}{suggest(kind, kinds)}")
    out.set(name, "dtype", kind)


def revision(out: Translated, name: str) -> None:
    if out.given[name] in (None, "main"):
        return out.same(name)
    out.set(name, "revision", text(out.given[name]))


MODEL_KWARGS: dict[str, Rule] = {}  # filled below: the rules of the fields that model_init_kwargs may hold


def model_kwargs(out: Translated, name: str) -> None:
    for key, value in _mapping(out.given[name] or {}).items():
        inner = Translated(out.algorithm, {key: value})
        if key not in MODEL_KWARGS:
            raise Refusal(f"{key} is not passed on{suggest(key, MODEL_KWARGS)} There are {', '.join(MODEL_KWARGS)}.")
        MODEL_KWARGS[key](inner, key)
        for _, why in inner.ignored:
            out.ignore(name, f"{key}: {why}")
        for _, _, why in inner.refused:
            raise Refusal(f"{key}: {why}")
        for ours, what in inner.settings.items():
            out.set(name, ours, what)
    if not out.given[name]:
        out.same(name)


def adapter(out: Translated, name: str) -> None:
    """``use_peft`` and what belongs to it."""
    value = out.given[name]
    if not out.get("use_peft", False):
        return out.same(name) if not value else out.ignore(name, "without use_peft")
    dora, rslora = out.get("use_dora", False), out.get("use_rslora", False)
    if dora and rslora:
        raise Refusal("use_dora and use_rslora together are not here; choose one.")
    if name in ("use_peft", "use_dora", "use_rslora"):
        out.set(name, "lora", "dora" if dora else "rslora" if rslora else True)
        if "lora_target_modules" not in out.given:
            out.notes.append("adapters are on all linear layers; TRL's default is a few of them: lora_target_modules.")
        if "lora_dropout" not in out.given:
            out.notes.append("adapters have no dropout; TRL's default is 0.05.")
    elif name == "lora_r":
        out.set(name, "lora_rank", positive(value))
    elif name == "lora_alpha":
        out.set(name, "lora_alpha", real(value))
    elif name == "lora_target_modules":
        names = [text(one) for one in listed(value)] or ["all-linear"]
        out.set(name, "lora_targets", "all-linear" if names == ["all-linear"] else tuple(names))
    elif name == "load_in_4bit":
        out.set(name, "load_in_4bit", flag(value))


def lora_dropout(out: Translated, name: str) -> None:
    if not out.get("use_peft", False):
        return out.ignore(name, "without use_peft")
    if out.given[name]:
        raise Refusal("adapters have no dropout here: two passes over the same tokens must agree; set it to 0.")
    out.same(name)


def four_bit(out: Translated, name: str) -> None:
    if out.given[name] and not out.get("use_peft", False):
        raise Refusal("a model in 4 bits is trained through an adapter; give use_peft too.")
    adapter(out, name)


# ---- the data


def data(out: Translated, name: str) -> None:
    """``dataset_name`` with its split and configuration, or ``datasets``, a mixture."""
    if out.get("datasets"):
        if name.startswith("dataset_"):
            return out.ignore(name, "datasets is given")
        return _mixture(out, name)
    if name in ("datasets", "test_split_size", "streaming"):
        return out.same(name) if not out.given[name] else out.ignore(name, "without datasets")
    path = out.get("dataset_name")
    if path is None:
        return out.ignore(name, "without dataset_name")
    if name == "dataset_streaming":
        return out.set(name, "streaming", flag(out.given[name]))
    if name == "dataset_test_split" or (name == "dataset_name" and _evaluates(out)):
        if not _evaluates(out):
            return out.ignore(name, "without eval_strategy nothing is evaluated")
        held_out = _source(text(path), out.get("dataset_config"), out.get("dataset_test_split", "test"))
        out.put(out.arguments, name, "eval_dataset", held_out)
    if name != "dataset_test_split":
        split = out.get("dataset_train_split")
        out.put(out.arguments, name, "dataset", _source(text(path), out.get("dataset_config"), split))


def _source(path: str, name: Any, split: Any) -> str | dict[str, Any]:
    """A plain path, or a mapping with the keys of ``prefzoo.data.DataSource``."""
    found = {"path": path, "name": name, "split": split}
    return path if name is None and split is None else {k: v for k, v in found.items() if v is not None}


BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # of the datasets library: the files are in data_files
SOURCE_KEYS = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")


def _mixture(out: Translated, name: str) -> None:
    if name == "streaming":
        return out.set(name, "streaming", flag(out.given[name]))
    if name == "test_split_size":
        share = real(out.given[name])
        if share is None:
            return out.same(name)
        if not 0 < share < 1:
            raise Refusal("expected a share between 0 and 1.")
        return out.set(name, "eval_split", share)
    if _evaluates(out) and out.get("test_split_size") is None:
        raise Refusal("eval_strategy needs rows that are held out: give test_split_size.")
    sources = [_mixed(out, one) for one in listed(out.given[name])]
    weights = [isinstance(s, dict) and "weight" in s for s in sources]
    if any(weights) and not all(weights):
        raise Refusal("give fraction for all of the data sets, or for none.")
    if any(weights):
        out.notes.append("fractions: rows are drawn by seed; TRL takes the first ones of each data set.")
    out.put(out.arguments, name, "dataset", sources[0] if len(sources) == 1 else sources)


def _mixed(out: Translated, given: Any) -> str | dict[str, Any]:
    if not isinstance(given, Mapping) or not isinstance(given.get("path"), str):
        raise Refusal(f"expected a list of mappings with a path, got {_show(given)}.")
    for key in given:
        if key not in SOURCE_KEYS:
            raise Refusal(f"a data set has no key {key!r}{suggest(key, SOURCE_KEYS)}")
    path, files = given["path"], given.get("data_files")
    if given.get("data_dir") is not None:
        raise Refusal(f"data_dir is not passed on; give the folder as the path of {path!r}.")
    if files is not None:
        files = files[0] if isinstance(files, list) and len(files) == 1 else files
        if not isinstance(files, str) or path not in BUILDERS:
            raise Refusal("data_files is one file, with path json, csv or parquet; give each file as a data set.")
        path = files
    if given.get("columns"):
        out.notes.append(f"columns of {path!r}: all are kept; what a row is follows from their names.")
    source = _source(path, given.get("name"), given.get("split") if files is None else None)
    fraction = real(given.get("fraction"))
    if fraction is None:
        return source
    return {**(source if isinstance(source, dict) else {"path": source}), "weight": fraction}


def text_field(out: Translated, name: str) -> None:
    if out.given[name] == "text":
        return out.same(name)
    out.set(name, "columns", {"text": text(out.given[name])})


def loss_on(out: Translated, name: str) -> None:
    """``completion_only_loss`` and ``assistant_only_loss``."""
    if out.get("assistant_only_loss", False):
        return out.set(name, "loss_on", "assistant")
    completions = out.get("completion_only_loss")
    if completions is None:
        return out.same(name)
    out.set(name, "loss_on", "completion" if flag(completions) else "all")


def template(out: Translated, name: str) -> None:
    path = out.given[name]
    if path is None:
        return out.same(name)
    if not str(path).endswith((".jinja", ".jinja2")):
        raise Refusal("expected a Jinja file; of another model's tokenizer, save the template to a file first.")
    out.set(name, "chat_template", path)


# ---- GRPO


def completions_shown(out: Translated, name: str) -> None:
    if name == "num_completions_to_print" and not out.get("log_completions", False):
        return out.ignore(name, "without log_completions")
    count = positive(out.get("num_completions_to_print", 3)) if out.get("log_completions", False) else 0
    out.set(name, "log_completions", count)


SHIPPED = {  # TRL's reward functions that are here under the same mathematics
    "think_format_reward": "think_format_reward",
    "get_soft_overlong_punishment": "get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)",
}
NOT_SHIPPED = ("accuracy_reward", "reasoning_accuracy_reward")


def rewards(out: Translated, name: str) -> None:
    """``reward_model_name_or_path`` and ``reward_funcs``: the model first, as in TRL's script."""
    model = out.get("reward_model_name_or_path")
    if name == "reward_model_name_or_path" and (model is None or out.get("reward_funcs")):
        return out.mapped.append((name, "reward", text(model))) if model is not None else out.same(name)
    found = [*([] if model is None else [text(model)]), *(_reward(text(f)) for f in listed(out.get("reward_funcs")))]
    if not found:
        return out.same(name)
    out.put(out.arguments, name, "reward", found[0] if len(found) == 1 else found)


def _reward(name: str) -> str:
    if name in SHIPPED:
        return SHIPPED[name]
    if name in NOT_SHIPPED:
        raise Refusal(f"{name} reads LaTeX with a package of its own; nearest here is 'numeric', the last number.")
    module, _, function = name.rpartition(".")
    if not module:
        near = suggest(name, [*SHIPPED, *NOT_SHIPPED])
        raise Refusal(f"{name!r} is no reward function of TRL's{near} Yours is my_module.function.")
    return f"{module.replace('.', '/')}.py:{function}"


def vllm(out: Translated, name: str) -> None:
    if out.get("use_vllm", False):
        return out.ignore(name, "of use_vllm, which is refused")
    out.ignore(name, "without use_vllm")


def entropy(out: Translated, name: str) -> None:
    if out.get("use_adaptive_entropy", False):
        return out.ignore(name, "of use_adaptive_entropy, which is refused")
    out.ignore(name, "without use_adaptive_entropy")


def scale(value: Any) -> Any:
    if value == "batch":
        raise Refusal("the standard deviation of the batch is not in the zoo yet; group or none.")
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, or JSON of one, as TRL's command line takes it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Refusal("expected a mapping.") from None
    if not isinstance(value, Mapping):
        raise Refusal("expected a mapping.")
    return value
