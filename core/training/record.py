"""A run's record: all that the run is a function of, as JSON; and what two records differ in."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from prefzoo.algorithm import Algorithm
from prefzoo.data.formats import Dataset
from prefzoo.feedback.rewards import FunctionReward, RewardSource, Several
from prefzoo.files import replacing_file
from prefzoo.models.reference import weights_hash
from prefzoo.registry import UsageError, suggest
from prefzoo.source import layer_hash
from prefzoo.training.checkpoint import told
from prefzoo.training.config import TrainConfig

PACKAGES = ("prefzoo", "torch", "transformers", "accelerate", "peft", "datasets", "numpy", "safetensors")
RECORD = "run.json"


def describe(
    algorithm: Algorithm,
    settings: TrainConfig,
    data: Dataset | None,
    held_out: Dataset | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """How a model was made, as JSON: enough to make it again, and to see what another run has different.

    ``facts``: names of what was given (``model``, ``reward``, ``reference``, ``ptx_dataset``), and under
    ``fingerprints`` the :func:`fingerprint` of each, taken before the first step.
    """
    losses = {f"loss:{t.loss.name}": t.loss.entry.source_hash() for s in algorithm.stages for t in s.terms}
    composition = _without_addresses(repr((algorithm.stages, algorithm.product)))
    fingerprints = {"composition": _digest([composition])}
    return _json(
        {
            "algorithm": algorithm.name,
            "options": algorithm.options,
            "composition": _without_addresses(repr(algorithm)),
            "sources": algorithm.sources | losses,
            "layer": layer_hash(),
            **facts,
            "fingerprints": {**facts.get("fingerprints", {}), **fingerprints},
            "config": settings.model_dump(mode="json"),
            "given": settings.model_dump(mode="json", exclude_unset=True),
            "data": None if data is None else _of(data),
            "held_out": None if held_out is None else _of(held_out),
            "versions": versions(),
            "commit": commit(),
            "hardware": hardware(settings.device),
        }
    )


def _of(data: Dataset) -> dict[str, Any]:
    report = data.report
    return {"source": report.source, "hash": data.hash(), "type": data.type, "rows": report.rows,
            "dropped": dict(report.dropped)}  # fmt: skip


def versions() -> dict[str, str | None]:
    """Of everything that computes."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a tree on PYTHONPATH
            found[package] = None
    return found


def commit() -> dict[str, Any] | None:
    """The git commit of the working directory, and whether it has changes; None where there is no git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    locks = {"GIT_OPTIONAL_LOCKS": "0"}  # somebody may be committing beside us
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, env={**os.environ, **locks})
    except (OSError, subprocess.SubprocessError):
        return None
    name = done.stdout.strip()
    return {"hash": name.removesuffix("-dirty"), "changed": name.endswith("-dirty")} if name else None


def hardware(device: str | None = None) -> dict[str, Any]:
    """What moves the last digits of a sum: processor, threads, GPUs, processes."""
    cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 if known else None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    return {
        "device": (device or ("cuda" if cuda else "cpu")).partition(":")[0],
        "processor": _line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "float32_products": torch.get_float32_matmul_precision(),
        "memory_gib": None if memory is None else round(memory, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda if cuda else None,
        "driver": _line("/proc/driver/nvidia/version", "NVRM version") if cuda else None,
        "platform": platform.platform(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _line(file: str, key: str) -> str | None:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _json(value: Any) -> Any:
    """A value as JSON gives it back; a function as its name and fingerprint."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if callable(value):
        return f"{getattr(value, '__name__', type(value).__name__)} {fingerprint(value)}"
    return _without_addresses(repr(value))


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def write_record(record: Mapping[str, Any], folder: Path) -> None:
    """``run.json``: the old one or the new one is there, whole, whenever the process or the machine dies."""
    with told(f"{RECORD} could not be written to {str(folder)!r}", folder), replacing_file(folder / RECORD) as aside:
        aside.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------- fingerprints


def fingerprint(value: Any) -> Any:
    """Hash of the content of what a run was given: a model, a tokenizer, data, a reward.

    - A model or role: its weights and configuration, wherever it was loaded from.
    - A function: its source without comments, with everything of the same file that it names, and the constants it
      was bound to (defaults, closure, ``functools.partial``); a callable object: its class and its constants. What
      changes while it runs, such as a list that it fills, does not count, nor does code of other files.
    - A sum of rewards, or what else is made of several: a mapping, so that one sees which part changed.
    """
    if value is None:
        return None
    if isinstance(value, str | Path):
        raise TypeError(f"fingerprint of what {str(value)!r} names, not of its name")
    if isinstance(value, Dataset):
        return value.hash()
    if isinstance(value, Several):
        return {name: fingerprint(part) for name, part in value.parts.items()} | value.facts()
    if isinstance(value, FunctionReward):
        return fingerprint(value.function)
    if isinstance(value, RewardSource):
        public = {k: v for k, v in vars(value).items() if not k.startswith("_") and k != "name"}
        return _digest([_text(type(value), set()), *(f"{k}={_text(v, set())}" for k, v in public.items())])
    return _digest(_texts(value, set()))


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()[:16]


def _text(value: Any, seen: set[int]) -> str:
    return "\n".join(_texts(value, seen))


def _texts(value: Any, seen: set[int]) -> Iterator[str]:
    """What a value computes with, as text that is the same in every process."""
    if isinstance(value, bool | int | float | complex | str | bytes | type(None) | type(...)):
        yield repr(value)
    elif isinstance(value, tuple | frozenset):
        parts = [_text(v, seen) for v in value]
        yield repr(sorted(parts) if isinstance(value, frozenset) else parts)  # a set's order is not its own
    elif id(value) in seen or isinstance(value, list | dict | set):
        yield type(value).__name__
    elif isinstance(value, CodeType):
        yield value.co_code.hex() + repr((value.co_names, value.co_varnames))
        yield from _texts(value.co_consts, seen)
    else:
        seen.add(id(value))
        yield from _object_texts(value, seen)


def _object_texts(value: Any, seen: set[int]) -> Iterator[str]:
    if isinstance(value, nn.Module):
        yield weights_hash(value)
        for name, module in value.named_modules():  # of a role, the model's; of that, none twice
            if hasattr(getattr(module, "config", None), "to_dict"):
                facts = {k: v for k, v in module.config.to_dict().items() if k not in _WHERE}
                yield name + json.dumps(facts, sort_keys=True, default=str)
                break
    elif isinstance(value, PreTrainedTokenizerBase):
        backend = getattr(value, "backend_tokenizer", None)
        facts = value.get_vocab() if backend is None else json.loads(backend.to_str())
        facts = {k: v for k, v in facts.items() if backend is None or k not in ("truncation", "padding")}
        yield json.dumps([facts, value.special_tokens_map, value.chat_template], sort_keys=True, default=str)
    elif isinstance(value, functools.partial):
        yield from (_text(v, seen) for v in (value.func, value.args, tuple(sorted(value.keywords.items()))))
    elif isinstance(value, MethodType):
        yield from (_text(v, seen) for v in (value.__func__, value.__self__))
    elif isinstance(value, FunctionType):
        yield from _definition(value, value.__code__)
        bound = (value.__defaults__, tuple(sorted((value.__kwdefaults__ or {}).items())), *_closure(value))
        yield from (_text(v, seen) for v in bound)
    elif isinstance(value, type):
        yield from _definition(value, None)
    elif type(value).__module__ == "builtins":  # written in C
        yield getattr(value, "__qualname__", type(value).__name__)
    else:
        yield from _texts(type(value), seen)
        yield from (f"{k}={_text(v, seen)}" for k, v in sorted(getattr(value, "__dict__", {}).items()))


_WHERE = ("_name_or_path", "transformers_version")  # of a model's configuration: not what it computes


def _closure(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not bound yet
            yield cell.cell_contents


def _definition(target: Any, code: CodeType | None) -> Iterator[str]:
    """The source of a function or class, without comments, and of all names of its file that it uses."""
    if str(target.__module__).startswith("prefzoo."):  # its source is the layer's
        yield f"{target.__module__}.{target.__qualname__}"
        return
    try:
        tree = ast.parse("".join(inspect.findsource(target if code is None else code)[0]))
    except (OSError, TypeError, SyntaxError):  # made by exec, or in an interpreter
        tree = ast.Module([], [])
    found = [node for node in ast.walk(tree) if _defines(node, target, code)]
    if not found:
        yield getattr(target, "__qualname__", "")
        yield from () if code is None else _texts(code, set())
        return
    named = {name: node for node in tree.body for name in _names_of(node)}
    used: dict[str, ast.AST] = {}
    new = found
    while new:
        names = sorted({name for node in new for name in _uses(node)} - used.keys())
        new = [named[name] for name in names if name in named and named[name] not in found]
        used |= {name: named[name] for name in names if name in named}
    yield from (ast.unparse(node) for node in found)
    yield from (ast.unparse(used[name]) for name in sorted(used))


def _defines(node: ast.AST, target: Any, code: CodeType | None) -> bool:
    if code is None:
        return isinstance(node, ast.ClassDef) and node.name == target.__name__
    if isinstance(node, ast.Lambda):  # there may be several in a line
        starts = {(line, column) for line, _, column, _ in code.co_positions()}
        return code.co_name == "<lambda>" and (node.body.lineno, node.body.col_offset) in starts
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    first = min(n.lineno for n in (node, *node.decorator_list))
    return node.name == code.co_name and first == code.co_firstlineno


def _names_of(node: ast.AST) -> set[str]:
    """The names that a statement at the top of a file gives."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {a.asname or a.name.partition(".")[0] for a in node.names}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _uses(node: ast.AST) -> set[str]:
    """The names that a definition takes from around it."""
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    own |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    return {n.id for n in names} - own


# ----------------------------------------------------------------------------------------------- differences

Effect = Literal["result", "rounding", "none"]

# Options of the training by what another value does to the run. What stands in neither changes its result.
NO_EFFECT = frozenset({"save_steps", "save_total_limit", "report_to", "stuck_minutes", "cache_dir", "log_completions"})
ROUNDING = frozenset({"device", "deterministic", "tokens_per_batch", "gradient_checkpointing"})

OUTCOMES = frozenset({"given", "spent", "best", "finished", "started", "ended", "time", "output_dir", "resumed"})
# A name proves nothing where the content is known: these have no effect where all that stands beside them agrees.
CONTENT = {
    "model": ("fingerprints.model", "fingerprints.tokenizer"),
    "config.revision": ("fingerprints.model", "fingerprints.tokenizer"),
    "config.chat_template": ("fingerprints.tokenizer",),
    "reward": ("fingerprints.reward",),
    "reference": ("fingerprints.reference",),
    "ptx_dataset": ("fingerprints.ptx_dataset",),
    "data": ("data.hash",),
    "held_out": ("held_out.hash",),
    "commit": ("layer", "sources"),
}


@dataclass(frozen=True)
class Difference:
    """One place in which two records differ, and what the difference does: to the result, or to its rounding only."""

    place: str  # dotted: config.learning_rate, data.hash, sources.loss:dpo
    here: Any
    there: Any
    effect: Effect = "result"

    def words(self) -> str:
        """For a person.

        >>> Difference("config.learning_rate", 1e-05, None).words()
        'config.learning_rate: 1e-05 here, none there'
        """
        return f"{self.place}: {shown(self.here)} here, {shown(self.there)} there"

    def named(self, name: str) -> bool:
        """Whether a user's word means it: the place, its last part, its group, or ``all``."""
        return name in _words_for(self.place)


def shown(value: Any, width: int = 60) -> str:
    """A recorded value, short."""
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _words_for(place: str) -> set[str]:
    parts = place.split(".")
    return {"all", parts[-1], *(".".join(parts[: n + 1]) for n in range(len(parts)))}


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    """Every place in which two records differ, in the order of the record, each with its effect.

    >>> a = {"config": {"seed": 0, "device": "cpu"}, "spent": {"seconds": 3.0}}
    >>> b = {"config": {"seed": 1, "device": "cuda"}, "spent": {"seconds": 4.0}}
    >>> [(d.place, d.effect) for d in differences(a, b)]
    [('config.seed', 'result'), ('config.device', 'rounding'), ('spent.seconds', 'none')]
    """
    found = list(_compare(_json(mine), _json(theirs)))
    differing = {word for d in found for word in _words_for(d.place)}

    def agree(place: str) -> bool:
        value = _at(mine, place)
        return value is not None and _at(theirs, place) is not None and place not in differing

    return [Difference(d.place, d.here, d.there, _effect(d.place, agree)) for d in found]


def _compare(here: Any, there: Any, place: str = "") -> Iterator[Difference]:
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        for key in [*here, *(k for k in there if k not in here)]:
            yield from _compare(here.get(key), there.get(key), f"{place}.{key}" if place else key)
    elif here != there and json.dumps(here) != json.dumps(there):  # the second: NaN is NaN
        yield Difference(place, here, there)


def _at(record: Any, place: str) -> Any:
    for part in place.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record


def _effect(place: str, agree: Callable[[str], bool]) -> Effect:
    group, _, rest = place.partition(".")
    field = rest.partition(".")[0] if group == "config" else None
    if group in OUTCOMES or field in NO_EFFECT:
        return "none"
    if group == "hardware" or field in ROUNDING:
        return "rounding"
    if place in ("composition", "fingerprints.composition") and not (agree("algorithm") and agree("options")):
        return "none"  # it follows from these, which are told
    content = CONTENT.get(place, CONTENT.get(group, ()))
    return "none" if content and all(map(agree, content)) else "result"


def refuse_foreign(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], may_differ: str | Collection[str], what: str
) -> list[Difference]:
    """Refuse to go on from the state of another run; gives the differences that only move the last digits.

    Args:
        mine, theirs: the record of this run, and that beside the state.
        may_differ: what the user allows: places, their last parts (``learning_rate``), groups (``versions``), ``all``;
            as a list, or as text with commas.
        what: the state, in words: ``checkpoint runs/dpo/checkpoint-57``.

    Errors: a difference that changes the result, or in deterministic mode the rounding, and is not allowed; a word
        in ``may_differ`` that names nothing.
    """
    known = {word for place in _places(_json(mine)) | _places(_json(theirs)) for word in _words_for(place)}
    allowed = [w.strip() for w in may_differ.split(",")] if isinstance(may_differ, str) else may_differ
    for name in allowed:
        if name not in known:
            raise UsageError(
                f"may_differ: nothing in the record of a run is called {name!r}{suggest(name, sorted(known))}"
            )
    found = differences(mine, theirs)
    strict = bool(_at(mine, "config.deterministic"))
    refused = [
        d for d in found
        if d.effect in (("result", "rounding") if strict else ("result",)) and not any(map(d.named, allowed))
    ]  # fmt: skip
    if "algorithm" in {d.place for d in refused}:
        raise UsageError(
            f"{what} is of {_at(theirs, 'algorithm')!r}, this run is {_at(mine, 'algorithm')!r}; choose another folder."
        )
    if refused:
        lines = "".join(f"\n  {d.words()}" for d in refused)
        words = list(dict.fromkeys(_permission(d.place) for d in refused))
        raise UsageError(
            f"{what} is of another run (here: this run; there: the one that wrote it):{lines}\n"
            "Take the change back, choose a new output folder, or allow it: "
            f"--may-differ {','.join(words)} (may_differ={words!r})."
        )
    return [d for d in found if d.effect == "rounding"]


def _permission(place: str) -> str:
    """The word that allows a difference: of the options themselves their name, of the rest the group."""
    group, _, rest = place.partition(".")
    if group in ("config", "options") and "." not in rest:
        return rest
    return place if group in ("config", "options", "fingerprints") else group


def _places(record: Any, place: str = "") -> set[str]:
    if isinstance(record, Mapping) and record:
        return set().union(*(_places(v, f"{place}.{k}" if place else k) for k, v in record.items()))
    return {place}
