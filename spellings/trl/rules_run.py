"""Rules of TRL's fields about the run: batches, steps, schedule, optimizer, precision, evaluation, checkpoints."""

from __future__ import annotations

from prefzoo.registry import suggest
from prefzoo.spellings.trl.rules import (
    NO_LIMIT,
    Refusal,
    Translated,
    flag,
    listed,
    mapping,
    positive,
    real,
    text,
    whole,
)


def rows(out: Translated, name: str) -> None:
    micro = positive(out.get("per_device_train_batch_size", 8))
    rows = micro * positive(out.get("gradient_accumulation_steps", 1))
    if rows == 1 and out.trainer == "kto" and out.get("loss_type", "kto") == "kto":
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
    """Optimizer steps for each sampling; 1 for data sets."""
    if not out.sampled:
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
    kwargs = dict(mapping(out.get("lr_scheduler_kwargs", {})))
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


def evaluates(out: Translated) -> bool:
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
