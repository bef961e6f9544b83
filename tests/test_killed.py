"""Runs that are killed at random times end as runs that never were: short forms of ``kills.py``.

Those of suites are in ``test_suites_resume.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


def kills(tmp_path: Path, *words: str) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("kills.py forks")
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path / "runs"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_of_several_optimizer_steps_on_its_samples_survives_kills(tmp_path):
    kills(tmp_path, "--kills", "2", "--only", "ppo", "--short", "--seed", "3")


@pytest.mark.long
@pytest.mark.parametrize(("number", "count"), [("KILL", 22), ("TERM", 11), ("INT", 11)])
def test_every_kind_of_run_survives(number, count, tmp_path):
    kills(tmp_path, "--kills", str(count), "--signal", number, "--seed", "1", "--short")
