"""TRL's trainers and losses under TRL's names: ``trl:dpo`` has TRL's mathematics, defaults and option spellings.

The options of an entry are the fields of TRL 1.16's configuration that are mathematics;
:mod:`prefzoo.spellings.trl.fields` knows what all other fields are here. The entries of the trainers are in
:mod:`prefzoo.spellings.trl.preferences` and :mod:`prefzoo.spellings.trl.policy`; this module makes those of their
losses, ``trl:hinge``, from one table.
``docs/from-trl.md`` is the page for those who come from there.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from prefzoo.algorithm import ALGORITHMS, Algorithm, register_algorithm
from prefzoo.losses import LOSSES
from prefzoo.spellings.trl import preferences  # noqa: F401 - its entries come first
from prefzoo.spellings.trl.fields import TRAINERS, Translated, read_trl_config, spelling, translate
from prefzoo.spellings.trl.names import ABSENT, SPELLINGS, Spelling
from prefzoo.spellings.trl.policy import generation_schedule

ALGORITHMS.absent.update(
    {f"trl:{name}": f"is not in the zoo yet: {why}; nearest is {near!r}." for name, (why, near) in ABSENT.items()}
)
ALGORITHMS.absent["trl:chunked_nll"] = "is 'trl:sft': how the loss is cut into pieces does not change it."


def register_spelling(name: str, made: Spelling) -> None:
    """The entry ``trl:NAME``: the trainer's function with some options fixed, and a card that says what it is."""
    trainer = ALGORITHMS.entry(f"trl:{made.trainer}")
    signature = inspect.signature(trainer.function)
    kept = [
        p.replace(default=made.defaults.get(p.name, p.default))
        for p in signature.parameters.values()
        if p.name not in made.hidden
    ]

    def spelled(**options: Any) -> Algorithm:
        return trainer.function(**{**made.fixed, **made.defaults, **options})

    spelled.__name__, spelled.__qualname__ = trainer.function.__name__, trainer.function.__qualname__
    spelled.__module__ = trainer.function.__module__  # there is its mathematics
    spelled.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    spelled.__annotations__ = {p.name: trainer.hints[p.name] for p in kept}
    spelled.__doc__ = _card(name, made, {p.name for p in kept})
    register_algorithm(
        spelled, name=f"trl:{name}", paper=LOSSES.entry(made.loss).paper, recommended=trainer.tags["recommended"],
        spelling=spelling(made.trainer, f"trl:{name}"),
    )  # fmt: skip


def _card(name: str, made: Spelling, options: set[str]) -> str:
    """The docstring of a made entry: what it is, why it is that, and the trainer's words for the options it has."""
    trainer, loss = TRAINERS[made.trainer], LOSSES.entry(made.loss)
    fixed = ", ".join(f'{k}="{v}"' for k, v in made.fixed.items())
    args = "\n".join(_args(ALGORITHMS.entry(f"trl:{made.trainer}").function.__doc__ or "", options))
    kind = "pairs.jsonl" if made.trainer != "grpo" else "prompts.jsonl"
    reward = "" if made.trainer != "grpo" else ", reward=my_function"
    resolved = textwrap.fill(f"Resolves to the loss ``{made.loss}``: {made.why}", 116)
    return f"""TRL's {trainer} with ``{fixed}``: {loss.line}

{resolved}

Args:
{args}

Departures: those of ``trl:{made.trainer}``.

Source: TRL 1.16, ``{trainer}``; the loss: ``prefzoo show --loss {made.loss}``.

Example::

    prefzoo.train("trl:{name}", model="my-model", dataset="{kind}"{reward})
"""


def _args(doc: str, options: set[str]) -> Iterator[str]:
    """The paragraphs of a docstring's Args that are about these options, indented by 4."""
    block = re.search(r"^Args:\n(.*?)\n\n", inspect.cleandoc(doc), re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n(?=    \w)", block[1] if block else ""):
        names, colon, words = paragraph.partition(":")
        kept = [n for n in re.findall(r"\w+", names) if n in options]
        if kept:
            yield f"    {', '.join(kept)}{colon}{words}"


for _name, _made in SPELLINGS.items():
    register_spelling(_name, _made)


__all__ = ["ABSENT", "Translated", "generation_schedule", "read_trl_config", "translate"]
