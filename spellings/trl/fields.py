"""The translation of TRL 1.16's configurations: what each field of a trainer is here.

There is one rule for each field of a trainer's configuration, of ``ModelConfig`` and of the arguments of TRL's scripts
(:mod:`prefzoo.spellings.trl.tables`, :mod:`prefzoo.spellings.trl.trainers`). A field becomes an option of the
``trl:`` entry, a training option, an argument of ``train``; or it has no effect here; or it can only be what it is by
default. What cannot be done is refused with the reason, never left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefzoo.parts.source import Rollouts
from prefzoo.registry import UsageError, suggest
from prefzoo.spellings.trl.names import SPELLINGS
from prefzoo.spellings.trl.rules import NO_LIMIT, Refusal, Rule, Translated
from prefzoo.spellings.trl.tables import OLDER
from prefzoo.spellings.trl.trainers import FIELDS, OWN, TABLES, TRAINERS
from prefzoo.yaml_numbers import read_yaml

ARGUMENTS = {  # what users give to a trainer beside its configuration -> ours
    "train_dataset": "dataset=", "ref_model": "reference=", "processing_class": "tokenizer=",
    "peft_config": "lora=True, with lora_rank, lora_alpha, lora_targets", "args": "the options themselves",
    "callbacks": "callback=",
}  # fmt: skip


def translate(
    trainer: str, fields: Mapping[str, Any], *, algorithm: str | None = None, source: str = "these options"
) -> Translated:
    """What a trainer's fields are here. Nothing is left out: what is not mapped is told to have no effect, or refused.

    Args:
        trainer: ``"dpo"``, ``"trl:dpo"``, ``"DPOTrainer"``, or the name of one of its losses, ``"trl:hinge"``.
        fields: by TRL's names.
        algorithm: the entry that takes the options; by default the one named by ``trainer``.
        source: what the fields are called in messages.

    >>> found = translate("dpo", {"per_device_train_batch_size": 2, "loss_type": "ipo"})
    >>> found.options, found.settings
    ({'loss_type': 'ipo'}, {'rows_per_step': 2})
    """
    name, spelled = trainer_of(trainer), trainer.removeprefix("trl:")
    algorithm = algorithm or f"trl:{spelled if spelled in SPELLINGS else name}"
    out = Translated(algorithm, dict(fields), source, name, sampled="num_generations" in OWN[name])
    for key in out.given:
        rule = FIELDS[name].get(key)
        owners = [TRAINERS[other] for other, table in OWN.items() if key in table]
        if rule is not None and _spelled(out, key):
            continue
        if rule is not None:
            rule(out, key)
        elif key in ARGUMENTS:
            out.refuse(key, f"an argument of the trainer; here it is {ARGUMENTS[key]}.")
        elif owners:
            out.refuse(key, f"a field of {', '.join(owners)}, not of {TRAINERS[name]}; leave it out.")
        else:
            out.refuse(key, f"{TRAINERS[name]} has no such field{suggest(key, FIELDS[name])}")
    if "bf16" not in out.given:
        out.notes.append("bf16 is not given: the forward pass is in float32; TRL's default is bfloat16.")
    _try(out)
    return out


def _spelled(out: Translated, key: str) -> bool:
    """Whether the field is settled by the entry's name: ``trl:hinge`` has its loss_type, and no discopop_tau."""
    from prefzoo.algorithm import algorithm_entry

    made = SPELLINGS.get(out.algorithm.removeprefix("trl:"))
    if made is None or key not in made.hidden:
        return False
    trainer = f"trl:{made.trainer}"
    value = out.given[key]
    if value in (made.fixed.get(key, algorithm_entry(trainer).own_options[key]), [made.fixed.get(key)]):
        out.same(key)
    elif key in made.fixed:
        out.refuse(key, f"{out.algorithm} is {key} {made.fixed[key]!r}; for another one take {trainer}.")
    else:
        out.refuse(key, f"no part of {out.algorithm} reads it; leave it out.")
    return True


def _try(out: Translated) -> None:
    """Values that are wrong, or that do not go together, are told by those who take them."""
    from prefzoo.algorithm import create_algorithm
    from prefzoo.training.config import TrainConfig

    options = out.options
    if out.refused:  # options lean on each other, and some are missing now; the loss's name stands alone
        options = {k: v for k, v in options.items() if k == "loss_type"}
    try:
        TrainConfig.of(out.settings)
        (stage,) = create_algorithm(out.algorithm, **options).stages
    except UsageError as error:
        out.refused.append(("", None, str(error)))
        return
    if isinstance(stage.source, Rollouts) and not out.refused:
        group, s = stage.source.group_size, stage.schedule
        out.notes.append(
            f"{s.prompts} prompts x {group} samples = {s.prompts * group} completions are sampled at once; they serve "
            f"{s.inner_epochs} x {s.minibatches} optimizer steps of {s.prompts * group // s.minibatches}."
        )


def trainer_of(name: str) -> str:
    """The short name of a trainer.

    >>> trainer_of("trl:DPOTrainer"), trainer_of("grpo"), trainer_of("trl:hinge")
    ('dpo', 'grpo', 'dpo')
    """
    bare = name.removeprefix("trl:")
    if bare in SPELLINGS:
        return SPELLINGS[bare].trainer
    for short, long in TRAINERS.items():
        if bare in (short, long, long.replace("Trainer", "Config")):
            return short
    from prefzoo.algorithm import ALGORITHMS  # the reason, where TRL has it and we do not

    raise ALGORITHMS.unknown(f"trl:{bare}", [f"trl:{short}" for short in TRAINERS])


def read_trl_config(
    path: str | Path, trainer: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Translated:
    """The translation of a YAML file, as ``trl dpo --config FILE`` takes it.

    Args:
        trainer: whose file it is; None: what the key ``trainer`` or ``command`` of the file says.
        overrides: fields that win over the file's, by TRL's names.
    """
    fields = {**read_yaml(path), **(overrides or {})}
    named = [str(fields.pop(key)) for key in ("trainer", "command") if key in fields]
    for name in named:
        if trainer is not None and trainer_of(name) != trainer_of(trainer):
            raise UsageError(f"config {str(path)!r} is one of {name}, not of {trainer}.")
    chosen = trainer or next(iter(named), None)
    if chosen is None:
        raise UsageError(
            f"config {str(path)!r} does not say whose it is: name the trainer ({', '.join(TRAINERS)}), as in "
            "'prefzoo train trl:dpo --from-trl FILE', or write 'trainer: dpo' into the file."
        )
    return translate(chosen, fields, source=f"config {str(path)!r}")


def spelling(trainer: str, algorithm: str) -> Callable[[Mapping[str, Any]], Translated]:
    """What ``prefzoo.train("trl:...", **options)`` does with its options: TRL's names, and ours where TRL has none."""

    def spell(given: Mapping[str, Any]) -> Translated:
        from prefzoo.training.config import TrainConfig

        ours = {k for k in given if k not in FIELDS[trainer] and k in TrainConfig.model_fields}
        if "eval_strategy" not in given:  # who gives eval_dataset wants it evaluated
            ours |= {"eval_steps"} & set(given)
        out = translate(trainer, {k: v for k, v in given.items() if k not in ours}, algorithm=algorithm)
        for key in sorted(ours):
            if key in out.settings:
                theirs = next(f for f, name, _ in out.mapped if name == key)
                out.refused.append((key, given[key], f"{theirs} says it too, in TRL's words; give one."))
            out.settings[key] = given[key]
        for key in out.arguments:
            theirs = next(f for f, name, _ in out.mapped if name == key)
            out.refused.append((theirs, out.given[theirs], f"give it to train() as {key}=."))
        out.check()
        for name, reason in out.ignored:
            warnings.warn(f"{algorithm}: {name} has no effect here: {reason}.", stacklevel=2)
        return out

    return spell


__all__ = [
    "FIELDS",
    "NO_LIMIT",
    "OLDER",
    "TABLES",
    "TRAINERS",
    "Refusal",
    "Rule",
    "Translated",
    "read_trl_config",
    "spelling",
    "translate",
]
