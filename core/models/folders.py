"""What is in a model's folder, and the library's errors told in words."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from prefzoo.registry import UsageError

REWARD_FILE = "prefzoo_reward"  # .json and .safetensors of a reward head that no library class can hold


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """The library draws progress bars for loading and saving files; a run has one bar of its own."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def in_words(what: str) -> Iterator[None]:
    """Whatever goes wrong inside the library while it reads a folder is a mistake to be told, not a traceback."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # a damaged file may raise anything
        cure = " Give trust_remote_code=True if you trust it." if "trust_remote_code" in str(error) else ""
        raise UsageError(f"{what} ({first_line(error)}).{cure}") from error


def told(source: str | Path) -> str:
    """A model as its user wrote it; a name that is no folder here was looked for on the hub."""
    return f"model {str(source)!r}: {'' if Path(source).is_dir() else 'it is no folder here, and from the hub '}"


def run_model(source: str | Path) -> str:
    """The model folder of a run, or the source itself."""
    final = Path(source) / "final"
    checkpoints = sorted(Path(source).glob("checkpoint-*"), key=lambda f: (len(f.name), f.name))
    if (Path(source) / "run.json").exists() and not final.is_dir() and checkpoints:
        raise UsageError(f"the run in {str(source)!r} is not finished; its newest checkpoint is {checkpoints[-1]}.")
    return str(final if final.is_dir() else source)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:240]


def check_source(source: str | Path) -> None:
    """A path that is no folder is told before the library looks for it on the hub."""
    path = Path(source)
    if path.is_file():
        raise UsageError(f"model {str(source)!r} is a file; give the folder that holds config.json and the weights.")
    if not path.is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)):
        raise UsageError(f"model {str(source)!r}: there is no such folder.")


def find(source: str | Path, name: str, revision: str | None = None) -> Path | None:
    """A file of a local folder or a hub repository, if it is there."""
    if Path(source).is_dir():
        file: Any = Path(source) / name
    else:
        quiet = {f"_raise_exceptions_for_{w}": False for w in ("gated_repo", "missing_entries", "connection_errors")}
        try:
            file = cached_file(str(source), name, revision=revision, **quiet)
        except (OSError, ValueError):  # no such repository: loading the model itself says so
            file = None
    return Path(file) if file is not None and Path(file).is_file() else None


def adapter_facts(source: str | Path, revision: str | None = None) -> dict[str, Any] | None:
    """The configuration of a peft adapter; None if there is none."""
    file = find(source, "adapter_config.json", revision)
    if file is None:
        return None
    with in_words(f"adapter {str(source)!r}: its adapter_config.json cannot be read"):
        return dict(json.loads(file.read_text(encoding="utf-8")))
