"""What the entries of :mod:`prefzoo.spellings.trl` share: recommended training, checks of options, the reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from prefzoo.parts.reference import Moving, Start
from prefzoo.registry import UsageError, suggest
from prefzoo.spellings.trl.names import LOSS_TYPES, READ_BY

# What TRL's configurations have in common, in our words: linear decay to 0 without warm-up.
TRAINING = {"betas": (0.9, 0.999), "warmup_steps": 0, "final_learning_rate": 0.0}
OF_ROWS = {**TRAINING, "rows_per_step": 8, "epochs": 3.0}
OF_PAIRS = {**OF_ROWS, "implicit_prompt": "character"}


def our_losses(trainer: str, names: Iterable[str]) -> list[str]:
    """Our losses for TRL's names of one trainer; an unknown name is told with the nearest."""
    known = LOSS_TYPES[trainer]
    for name in names:
        if name not in known:
            near = suggest(name, known)
            raise UsageError(f"trl:{trainer}: loss_type {name!r} is unknown{near} There are: {', '.join(known)}.")
    return [known[name] for name in names]


def check_read(
    trainer: str,
    entry: Callable[..., Any],
    losses: Mapping[str, str],
    given: Mapping[str, Any],
    cures: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse an option that has another value than by default, and that none of these losses reads.

    ``losses``: TRL's name of each, and ours. ``cures`` says for an option what else there is.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(entry).parameters.items()}
    for option, value in given.items():
        readers = READ_BY[trainer][option]
        if value != defaults[option] and not set(readers) & set(losses.values()):
            read = ", ".join(name for name, ours in LOSS_TYPES[trainer].items() if ours in readers)
            raise UsageError(
                f"trl:{trainer}: {option}={value!r} has no effect on {', '.join(losses)}, it belongs to {read}; "
                f"{cures.get(option, 'leave it out.')}"
            )


def reference(trainer: str, follows: bool, alpha: float, every: int) -> Start | Moving:
    """``sync_ref_model`` and what belongs to it."""
    if follows:
        return Moving(alpha, every)
    if (alpha, every) != (0.6, 512):
        raise UsageError(
            f"trl:{trainer}: ref_model_mixup_alpha and ref_model_sync_steps have no effect without sync_ref_model."
        )
    return Start()


def all_of(values: object, *kinds: type) -> bool:
    """Whether it is a list of these kinds of values."""
    return isinstance(values, list | tuple) and all(isinstance(v, kinds) for v in values)
