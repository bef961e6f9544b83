"""What every test runs under: one thread per process, no network, no display."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before any test imports them; processes that tests start inherit these.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest

try:
    import torch
except ImportError:
    torch = None
else:
    torch.set_num_threads(1)  # the processes of pytest-xdist share the cores

ROOT = Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not (torch and torch.cuda.is_available()):
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets (HH and others): PREFZOO_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("PREFZOO_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set PREFZOO_DATA to a folder that holds it")
    return folder


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every engine that ``train`` makes during the test."""
    from prefzoo.training import setup
    from prefzoo.training.engine import Engine

    made: list[Engine] = []

    class Spy(Engine):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            made.append(self)

    monkeypatch.setattr(setup, "Engine", Spy)
    return made


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Learning curves cost more than the training of small runs."""
    from prefzoo.training import output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "draw_curves", lambda *_: None)
        yield
