"""Build the wheel, install it into a clean environment, and try what a user would get: modules, data, types, docs.

The clean environment holds the wheel alone; third-party packages are seen through a path file that points at the
environment this script runs in, so nothing is downloaded twice. The editable install of that environment is not
seen: path files inside a folder named by a path file are not read.
"""

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from layout import FOLDERS, ROOT, copy_sources, modules, package_of

WORK = ROOT / ".check"

# Runs inside the clean environment: argument 1 the modules, argument 2 the data files as package:name.
TRY = """
import importlib, importlib.resources, pathlib, sys
prefix = pathlib.Path(sys.prefix).resolve()
for name in sys.argv[1].split():
    module = importlib.import_module(name)
    if not pathlib.Path(module.__file__).resolve().is_relative_to(prefix):
        raise SystemExit(f"{name} came from {module.__file__}, not from the installed wheel")
for item in sys.argv[2].split():
    package, _, name = item.partition(":")
    importlib.resources.files(package).joinpath(name).read_bytes()
"""


def run(*command: str | Path) -> None:
    result = subprocess.run(command, cwd=WORK, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        print(result.stdout, flush=True)
        raise SystemExit("failed: " + shlex.join(map(str, command)).splitlines()[0])


def step(words: str) -> None:
    print(f"--- {words} ({time.strftime('%H:%M:%S')})", flush=True)


def data_files() -> list[str]:
    """Every file of the packages that is not Python, as package:name."""
    found = []
    for mapped in FOLDERS.values():
        for path in (ROOT / mapped).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts:
                home = path.parent
                while not (home / "__init__.py").exists():
                    home = home.parent
                found.append(f"{package_of(home)}:{path.relative_to(home).as_posix()}")
    return sorted(found)


def in_the_repository(lines: str) -> str:
    """Paths of installed files as the paths of the files they came from."""
    lines = re.sub(r"^\S*site-packages/(?=prefzoo/)", "", lines, flags=re.MULTILINE)
    for name in sorted(FOLDERS, key=len, reverse=True):
        lines = re.sub(rf"^{name.replace('.', '/')}/", f"{FOLDERS[name]}/", lines, flags=re.MULTILINE)
    return lines


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    bin_folder = WORK / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    python = bin_folder / "python"

    step("wheel")
    copy_sources(WORK / "src")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", WORK / "dist", WORK / "src")
    wheel = next((WORK / "dist").glob("*.whl"))

    step(f"clean environment, {wheel.name}")
    run(sys.executable, "-m", "venv", "--without-pip", WORK / "venv")
    install = ["install", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    run(sys.executable, "-m", "pip", "--python", python, *install, wheel)
    paths = sysconfig.get_paths(vars={"base": str(WORK / "venv"), "platbase": str(WORK / "venv")})
    Path(paths["purelib"], "third_parties.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")

    step("every module, every data file, the command")
    names = [name for name in modules() if not name.endswith("__main__")]
    run(python, "-c", TRY, " ".join(names), " ".join(data_files()))
    print(f"imported {len(names)} modules, opened {len(data_files())} data files")
    run(bin_folder / "prefzoo", "list")

    step("types")
    config = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache")
    result = subprocess.run(
        [python, "-m", "mypy", *config, "-p", "prefzoo"], cwd=WORK, stdout=subprocess.PIPE, text=True
    )
    print(in_the_repository(result.stdout), end="", flush=True)
    if result.returncode:
        raise SystemExit(result.returncode)

    step("documentation")
    pages = ("--config-file", ROOT / "mkdocs.yml", "--site-dir", WORK / "site")
    run(python, "-m", "mkdocs", "build", "--strict", "--quiet", *pages)
    step(f"all passed, wheel of {wheel.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
