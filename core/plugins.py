"""Users' own files: importing one registers its losses and algorithms, and its functions can be named."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from prefzoo.registry import UsageError, suggest


def import_file(path: str | Path) -> ModuleType:
    """Import a Python file by its path; one file is imported once, however its path is written.

    The module's name is made from the absolute path, so that two files called alike do not meet, none hides an
    installed package, and every process of a benchmark gives it the same name.
    """
    file = Path(os.path.abspath(path))
    if not file.is_file():
        near = suggest(file.name, [p.name for p in file.parent.glob("*.py")]) if file.parent.is_dir() else "."
        raise UsageError(f"import {str(path)!r}: no such file{near}")
    if file.suffix != ".py":
        raise UsageError(f"import {str(path)!r}: expected a Python file, my_file.py.")
    name = f"prefzoo_import_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses, pickle and inspect look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, UsageError) or not isinstance(error, Exception):
            raise
        raise UsageError(f"import {str(path)!r}: {_in_words(error, file)}") from error
    return module


def import_function(spec: str) -> Callable[..., Any]:
    """The function that ``my_file.py:function`` names."""
    path, _, name = spec.rpartition(":")
    module = import_file(path)
    found = getattr(module, name, None)
    if not callable(found):
        known = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise UsageError(f"{path!r} has no function {name!r}{suggest(name, known)}")
    return found


def names_function(text: object) -> bool:
    """Whether this is written ``my_file.py:function``; in brackets, ``ensemble(my_file.py:function)``, it is not."""
    return isinstance(text, str) and text.rpartition(":")[0].endswith(".py") and not text.endswith(")")


def _in_words(error: Exception, file: Path) -> str:
    """What went wrong, and in which line of the user's file."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        line = error.lineno
    cure = " Files beside it are found when their folder is on PYTHONPATH." if isinstance(error, ImportError) else ""
    where = f"line {line}: " if line else ""
    return f"{where}{type(error).__name__}: {error}.{cure}"
