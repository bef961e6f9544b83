"""The house keeps its shape: folders, packages, import arrows, what the core needs, examples in docstrings."""

import ast
import doctest
import importlib
import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from prefzoo.algorithm import ALGORITHMS, list_algorithms
from prefzoo.losses.base import CREDITS, ESTIMATORS, LOSSES, MODIFIERS

list_algorithms()  # all of ours are there before an example adds one

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("layout", ROOT / ".ci" / "layout.py")
layout = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layout)

MODULES = layout.modules()
SHOWN_ONLY = ("typer", "rich", "jinja2", "matplotlib")  # the command line and the reports, never the core


def run_python(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True)


# ---- folders and packages


def test_packages_listed_by_hand_are_those_on_disk():
    assert sorted(layout.PACKAGES) == layout.packages_on_disk(), "tool.setuptools.packages in pyproject.toml"


def test_every_package_has_an_init():
    assert [p for p in layout.PACKAGES if not (layout.folder(p) / "__init__.py").exists()] == []


def test_no_folder_at_the_root_shadows_the_namespace():
    assert not (ROOT / "prefzoo").exists()


def test_core_has_no_module_called_like_a_mapped_folder():
    taken = {name.removeprefix("prefzoo.") for name in layout.FOLDERS if name != "prefzoo"}
    assert taken & {path.stem for path in layout.folder("prefzoo").iterdir()} == set()


@pytest.mark.parametrize("package", layout.PACKAGES)
def test_folder_and_package_name_are_inverse(package):
    assert layout.package_of(layout.folder(package)) == package


def test_tests_import_the_installed_names():
    import prefzoo
    from prefzoo import losses

    assert prefzoo.__name__ == "prefzoo" and losses.__name__ == "prefzoo.losses"
    assert "losses" not in sys.modules, "a test imported the folder losses/ by itself"


def test_losses_imported_by_its_folder_name_says_so():
    result = run_python("import losses")
    assert result.returncode != 0 and "ImportError" in result.stderr and "prefzoo.losses" in result.stderr


def test_link_tree_gives_the_same_modules_as_the_install(tmp_path):
    tree = layout.link_tree(tmp_path / "tree")
    seen = {
        ".".join(path.relative_to(tree).with_suffix("").parts).removesuffix(".__init__")
        for package in layout.PACKAGES
        for path in tree.joinpath(*package.split(".")).glob("*.py")
    }
    assert seen == set(MODULES)


# ---- import arrows


def test_import_arrows():
    assert layout.broken_arrows() == []


LEVEL_OF = {
    "prefzoo.registry": "registry, records",
    "prefzoo.records": "registry, records",
    "prefzoo.losses.pairwise": "losses",
    "prefzoo": "core",
    "prefzoo.training.loop": "core",
    "prefzoo.algos.dpo": "algos",
    "prefzoo.spellings.trl.names": "spellings",
    "prefzoo.benchmarks.perf.speed": "benchmarks",
    "prefzoo.cli": "cli",
}


@pytest.mark.parametrize("module", LEVEL_OF)
def test_level(module):
    assert layout.LEVELS[layout.level(module)] == LEVEL_OF[module]


WRITTEN = {
    "import prefzoo.algos.dpo": "prefzoo.algos.dpo",
    "from prefzoo import algos": "prefzoo.algos",
    "from prefzoo.algos import dpo": "prefzoo.algos.dpo",
    "from prefzoo.algos.dpo import dpo": "prefzoo.algos.dpo",
    "from .. import algos": "prefzoo.algos",
    "from ..algos.dpo import dpo as d": "prefzoo.algos.dpo",
    "def f():\n    from prefzoo.algos import dpo": "prefzoo.algos.dpo",
    "if TYPE_CHECKING:\n    from prefzoo.algos import dpo": "prefzoo.algos.dpo",
    "importlib.import_module('prefzoo.algos.dpo')": "prefzoo.algos.dpo",
}


@pytest.mark.parametrize("source", WRITTEN)
def test_an_import_is_seen_however_it_is_written(source):
    known = {"prefzoo.algos", "prefzoo.algos.dpo"}
    found = layout.imports(ast.parse(source), "prefzoo.training.loop", False, known)
    assert WRITTEN[source] in {name for _, name, _ in found}


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("losses/x.py", "import prefzoo.records", False),
        ("losses/x.py", "import math, torch", False),
        ("losses/x.py", "import prefzoo.training", True),
        ("losses/x.py", "import numpy", True),
        ("core/registry.py", "import transformers", True),
        ("core/registry.py", "import prefzoo.algos", True),
        ("core/registry.py", "def discover():\n    import prefzoo.algos", False),
        ("core/training/x.py", "from prefzoo.losses import x", False),
        ("core/training/x.py", "def f():\n    import prefzoo.algos", True),
        ("core/training/x.py", "from prefzoo import train", True),
        ("core/__init__.py", "import prefzoo.benchmarks", False),
        ("algos/x.py", "from prefzoo import train", False),
        ("algos/x.py", "import prefzoo.benchmarks", True),
        ("algos/x.py", "import prefzoo.spellings", True),
        ("spellings/x.py", "import prefzoo.algos", False),
        ("cli/x.py", "import prefzoo.benchmarks, rich", False),
    ],
)
def test_an_arrow_the_wrong_way_is_found(tmp_path, monkeypatch, file, line, broken):
    for package in layout.PACKAGES:
        home = tmp_path / layout.folder(package).relative_to(ROOT)
        home.mkdir(parents=True, exist_ok=True)
        (home / "__init__.py").touch()
    (tmp_path / file).write_text(line)
    monkeypatch.setattr(layout, "ROOT", tmp_path)
    assert [entry.split(":")[0] for entry in layout.broken_arrows()] == [file] * broken


def test_core_losses_and_algorithms_import_without_the_command_line_and_the_reports():
    wanted = [name for name in MODULES if layout.level(name) <= layout.LEVELS.index("algos")]
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({SHOWN_ONLY!r}))  # None: importing them fails
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    result = run_python(code, *wanted)
    assert result.returncode == 0, result.stderr


# ---- the zoo


LONGEST, RUN = 160, 6
# Every name that was promised, by family; an alias does not count. Of the pairwise losses each is one.
ZOO = {
    "likelihood": "sft",
    "pairwise": "dpo ipo ipo_sum hinge rpo_nll mpo fdpo tr_dpo",
    "unpaired": "kto bco apo_zero_unpaired",
    "ranked": "pl_dpo lipo",
    "reward models": "reward_model process_reward_model",
    "actor-critic": "a2c ppo ma_ppo nlpo trpo",
    "policy gradient": "reinforce reinforce_pp rloo remax grpo dr_grpo dapo gspo cispo gmpo sapo rlvr",
    "online preference": "online_dpo iterative_dpo rs_dpo rso spin sppo_iterative xpo nash_md",
    "sampling": "rejection_sampling best_of_n raft rest expert_iteration",
    "conditioned likelihood": "csft quark feedme",
    "offline": "ilql awr hpo",
    "distillation": "gkd minillm seqkd",
    "AI feedback": "rlaif constitutional rbr safe_rlhf",
}
COMPOSITIONS = sorted((ROOT / "algos").rglob("*.py"))


@pytest.mark.parametrize("file", COMPOSITIONS, ids=lambda f: f.name)
def test_no_composition_is_long(file):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{file.name} has {lines} lines: a file of algos/ says what an algorithm is made of"


def runs(text: str, length: int = RUN) -> dict[str, int]:
    """Every run of so many lines, blank ones left out, and the line that it begins at."""
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    return {"\n".join(words for _, words in lines[i : i + length]): lines[i][0] for i in range(len(lines) - length + 1)}


def test_a_run_of_lines_is_found_whatever_stands_between():
    text = "\n\n".join("abcdefgh")
    assert list(runs(text)) == ["a\nb\nc\nd\ne\nf", "b\nc\nd\ne\nf\ng", "c\nd\ne\nf\ng\nh"]
    assert runs("  b\nc\n\nd\n e\nf\ng\nz").keys() & runs(text).keys() == {"b\nc\nd\ne\nf\ng"}
    assert runs("a\nb\nc\nd\ne") == {}


def test_no_two_compositions_share_six_lines():
    seen: dict[str, str] = {}
    twice = []
    for file in COMPOSITIONS:
        for run, line in runs(file.read_text(encoding="utf-8")).items():
            where = f"{file.name}:{line}"
            if run in seen and not seen[run].startswith(f"{file.name}:"):
                twice.append(f"{where} is {seen[run]}")
            seen.setdefault(run, where)
    assert twice == [], "what two algorithms share is a part, or an option of core/parts/options.py"


@pytest.mark.parametrize("family", ZOO)
def test_every_algorithm_that_was_promised_is_listed_by_its_own_name(family):
    from prefzoo.algorithm import list_algorithms

    assert [name for name in ZOO[family].split() if name not in list_algorithms()] == []


def test_every_pairwise_loss_is_an_algorithm_or_has_a_reason():
    from prefzoo.algorithm import list_algorithms, untrained
    from prefzoo.losses import LOSSES, create_loss
    from prefzoo.records import Pairs

    pairwise = [name for name in LOSSES.names() if LOSSES.entry(name).tags["family"] is Pairs]
    missing = {name for name in pairwise if name not in list_algorithms()}
    assert len(pairwise) > 30 and all(untrained(create_loss(name)) for name in missing)
    assert missing <= {"step_dpo", "tpo"}, "their rows, marked steps and a third completion, are in no type of data"


# ---- examples in docstrings


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_docstring_examples(name):
    """What an example registers is gone afterwards: other tests look at all entries."""
    registries = (LOSSES, MODIFIERS, CREDITS, ESTIMATORS, ALGORITHMS)
    before = [(dict(r._entries), dict(r._aliases)) for r in registries]
    try:
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    finally:
        for registry, (entries, aliases) in zip(registries, before, strict=True):
            registry._entries, registry._aliases = entries, aliases
    assert result.failed == 0


# ---- distributions


def build(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.iterdir())


@pytest.mark.long
def test_wheel_from_the_source_distribution_is_the_wheel_from_the_tree(tmp_path):
    pytest.importorskip("build", reason="the extra `dev` is not installed")
    tree = layout.copy_sources(tmp_path / "tree")
    here = build("wheel", tree, tmp_path / "here")
    with tarfile.open(build("sdist", tree, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    there = build("wheel", next((tmp_path / "unpacked").iterdir()), tmp_path / "there")
    contents = [
        {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("RECORD")}
        for wheel in (zipfile.ZipFile(here), zipfile.ZipFile(there))
    ]
    assert contents[0] == contents[1]
    assert {"prefzoo/__init__.py", "prefzoo/py.typed", "prefzoo/losses/__init__.py"} <= set(contents[0])
    written = {path.relative_to(ROOT) for mapped in layout.FOLDERS.values() for path in (ROOT / mapped).rglob("*.py")}
    assert len(written) == sum(name.endswith(".py") for name in contents[0])
