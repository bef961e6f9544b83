"""What pyproject.toml says about folders and packages, and the rules over it. Standard library only.

python .ci/layout.py arrows   no import goes back on the way
    cli → benchmarks → spellings → algos → core → losses → registry, records → torch
python .ci/layout.py links    .dev/prefzoo, a tree of links that looks like the installed package
"""

import ast
import os
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]

# The arrows, lowest first. A module may import what stands on its own level or below.
LEVELS = ("registry, records", "losses", "core", "algos", "spellings", "benchmarks", "cli")
LEAVES = ("prefzoo.registry", "prefzoo.records")
# The lazy face gives names from every level on first use; the registry discovers entry points.
# Both may name modules above them inside functions; the face alone also at any other place.
FACE, DISCOVERY = "prefzoo", "prefzoo.registry"
# Losses and the two leaf modules know torch and the standard library, nothing else.
PURE = {"torch", "prefzoo"}


def folder(package: str) -> Path:
    """The folder of a package: the longest mapped prefix, then the rest of the name as folders."""
    prefix = max((p for p in FOLDERS if package == p or package.startswith(p + ".")), key=len)
    return ROOT.joinpath(FOLDERS[prefix], *package.removeprefix(prefix).split(".")[1:])


def package_of(path: Path) -> str:
    """The package of a folder under one of the mapped ones: the inverse of `folder`."""
    for name, mapped in FOLDERS.items():
        if path.is_relative_to(ROOT / mapped):
            return ".".join((name, *path.relative_to(ROOT / mapped).parts))
    raise ValueError(f"{path} is in none of the mapped folders {sorted(FOLDERS.values())}")


def packages_on_disk() -> list[str]:
    """Every folder under the mapped ones that holds Python files, as an import name."""
    roots = [ROOT / mapped for mapped in FOLDERS.values()]
    found = {path.parent for root in roots for path in root.rglob("*.py") if "__pycache__" not in path.parts}
    return sorted(package_of(path) for path in found)


def modules() -> dict[str, Path]:
    """Every module on disk and its file; a package stands for its `__init__`."""
    found = {}
    for package in packages_on_disk():
        for path in sorted(folder(package).glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return dict(sorted(found.items()))


def level(module: str) -> int:
    if module in LEAVES:
        return 0
    part = module.split(".")[1] if "." in module else ""
    return LEVELS.index(part) if part in LEVELS[1:] else LEVELS.index("core")


def imports(tree: ast.AST, module: str, is_package: bool, known: set[str]) -> Iterator[tuple[int, str, bool]]:
    """Line, imported module and whether a name was taken from the face, for every import anywhere in the tree.

    Imports inside functions and under TYPE_CHECKING count, and `import_module("prefzoo.…")` with a literal.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, False
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if name in known:
                    yield node.lineno, name, False
                else:
                    yield node.lineno, base, base == FACE and alias.name != "__version__"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            argument = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(argument, str) and not argument.startswith("."):
                yield node.lineno, argument, False


def broken_arrows() -> list[str]:
    """Every import that points the wrong way, as `file:line: …`."""
    found, every = [], modules()
    for module, path in every.items():
        if module == FACE:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        mine = level(module)
        inside = functions_lines(tree) if module == DISCOVERY else set()
        for line, name, from_face in imports(tree, module, path.stem == "__init__", set(every)):
            where = f"{path.relative_to(ROOT)}:{line}"
            top = name.split(".")[0]
            if top == "prefzoo":
                if line in inside:
                    continue
                if level(name) > mine:
                    found.append(f"{where}: {LEVELS[mine]} may not import {name} ({LEVELS[level(name)]})")
                elif from_face and mine <= LEVELS.index("core"):
                    found.append(f"{where}: import the name from the module that defines it, not from the face prefzoo")
            elif mine <= LEVELS.index("losses") and top not in PURE and top not in sys.stdlib_module_names:
                found.append(f"{where}: {LEVELS[mine]} may import torch and the standard library only, not {name}")
    return found


def functions_lines(tree: ast.AST) -> set[int]:
    """The lines that stand inside functions."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {n for node in ast.walk(tree) if isinstance(node, kinds) for n in range(node.lineno, node.end_lineno + 1)}


def copy_sources(to: Path) -> Path:
    """What a build needs, away from the build folders of earlier builds (their leftovers end up in wheels)."""
    to.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)
    for mapped in FOLDERS.values():
        shutil.copytree(ROOT / mapped, to / mapped, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def link_tree(target: Path = ROOT / ".dev") -> Path:
    """Make `target/prefzoo` look like the installed package, out of links; new files need a new tree."""
    shutil.rmtree(target, ignore_errors=True)
    top = target / "prefzoo"
    top.mkdir(parents=True)
    for entry in sorted(folder("prefzoo").iterdir()):
        if entry.name != "__pycache__":
            link(top / entry.name, entry)
    for name in FOLDERS:
        if name != "prefzoo":
            link(target.joinpath(*name.split(".")), folder(name))
    return target


def link(at: Path, to: Path) -> None:
    at.symlink_to(os.path.relpath(to, at.parent), target_is_directory=to.is_dir())


def main(command: str) -> None:
    if command == "arrows":
        found = broken_arrows()
        print("\n".join(found) if found else f"import arrows: {len(modules())} modules, all point one way")
        raise SystemExit(bool(found))
    if command == "links":
        print(f"{link_tree()}: add it to your editor's search path, or to PYTHONPATH where prefzoo is not installed")
        return
    raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "")
