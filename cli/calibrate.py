"""``prefzoo calibrate``: the temperature of a reward model, and the model with it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from prefzoo.cli.training import read_columns
from prefzoo.feedback.calibration import calibrate as fit


def calibrate(
    model: str, pairs: list[str], output: Path | None, columns: str | None, share: float, seed: int, max_length: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Fit, then say what changed and where the result is."""
    found = fit(
        model, pairs[0] if len(pairs) == 1 else pairs, output=output,
        columns=None if columns is None else read_columns(columns), share=share, seed=seed, max_length=max_length,
        note=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(found) | {"folder": None if output is None else str(output)}, indent=2))
        return
    print("\n".join(found.lines()))
    if output is not None:
        print(f"the calibrated model is in {output}, its figure in {output / 'reliability.png'}")
