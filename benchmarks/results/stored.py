"""Stored rows as arrays: runs × prompts × samples of every method, and what judges say of them.

A *run* is one training run of a method: its index among the suite's seeds. Run r of two methods shares data order and
random numbers of sampling, so tables of two methods are compared on the runs that both finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from prefzoo.benchmarks import statistics
from prefzoo.registry import UsageError

Array = npt.NDArray[Any]
PLACES = ("task", "method", "judge", "against", "run", "seed", "prompt", "row", "sample", "step")  # where a row belongs
BASELINES = ("start", "sft_more")
TABLES = ("rows", "greedy", "held_out", "curves", "judgements")  # NAME.parquet of a suite's folder


@dataclass(frozen=True)
class Runs:
    """The rows of one method: every column is (S, N, K), of S runs, N prompts and K samples."""

    runs: tuple[int, ...]
    columns: Mapping[str, Array]
    clusters_N: tuple[str, ...] | None

    @classmethod
    def of(cls, table: pa.Table, where: str) -> Runs:
        """From rows in any order; every run must have the same prompts and samples."""
        prompt = "prompt" if "prompt" in table.column_names else "row"
        sample_B = _ints(table, "sample") if "sample" in table.column_names else np.zeros(len(table), dtype=int)
        run_B, prompt_B = _ints(table, "run"), _ints(table, prompt)
        table = table.take(np.lexsort((sample_B, prompt_B, run_B)))
        runs = np.unique(run_B)
        shape = len(runs), len(np.unique(prompt_B)), len(np.unique(sample_B))
        if len({*zip(run_B.tolist(), prompt_B.tolist(), sample_B.tolist(), strict=True)}) != len(table) or (
            len(table) != np.prod(shape)
        ):
            raise UsageError(
                f"{where}: {len(table)} rows are not {shape[0]} runs × {shape[1]} prompts × {shape[2]} samples, each "
                "once; rows were lost or doubled. Run the suite again: finished cells are kept."
            )
        found = {name: _column(table[name]) for name in table.column_names if name not in PLACES}
        columns = {name: values.reshape(shape) for name, values in found.items() if values is not None}
        clusters = columns.pop("cluster", None)
        return cls(tuple(runs.tolist()), columns, None if clusters is None else tuple(clusters[0, :, 0].tolist()))

    def only(self, runs: Sequence[int]) -> Runs:
        """The same for some of the runs."""
        if tuple(runs) == self.runs:
            return self
        where = [self.runs.index(r) for r in runs]
        return Runs(tuple(runs), {name: values[where] for name, values in self.columns.items()}, self.clusters_N)

    @property
    def scores(self) -> list[str]:
        """The numeric columns."""
        return [name for name, values in self.columns.items() if values.dtype != object]

    def mean_SN(self, column: str) -> Array:
        return self.columns[column].mean(-1)


@dataclass(frozen=True)
class Judged:
    """What a judge says of one method against another, on the runs of both; y is averaged over samples and orders."""

    runs: tuple[int, ...]
    y_SN: Array
    ties: float
    flips: float | None = None
    unparsed: float | None = None

    def only(self, runs: Sequence[int]) -> Array:
        """The table of some of the runs."""
        return self.y_SN[[self.runs.index(r) for r in runs]]


@dataclass(frozen=True)
class Stored:
    """All rows of one task. ``starts``: run r begins from start r mod ``starts``; errors are then over starts.

    ``baseline``: of a comparison of models, which have no start; they are judged head to head."""

    answers: Mapping[str, Runs]
    greedy: Mapping[str, Runs]
    held_out: Mapping[str, Runs]
    curves: Mapping[str, Mapping[int, Runs]]
    judgements: Mapping[tuple[str, str, str], Runs]
    judges: Mapping[str, Mapping[str, Any]]
    starts: int = 1
    baseline: str | None = None

    @property
    def metric(self) -> str:
        return next(name for name, judge in self.judges.items() if judge["primary"])

    @property
    def column(self) -> str:
        """Its scores; a name that no column has, where it compares answers."""
        return self.judges[self.metric]["column"] or self.metric

    @property
    def clusters(self) -> list[str]:
        """The clusters of the test prompts, which are the same for every method."""
        clusters_N = next(iter(self.answers.values())).clusters_N
        assert clusters_N is not None
        return list(clusters_N)

    @property
    def baselines(self) -> tuple[str, ...]:
        """What every method is judged against."""
        return tuple(b for b in ((self.baseline,) if self.baseline else BASELINES) if b in self.answers)

    @property
    def reference(self) -> str | None:
        """What win rates are against: the start, or what is left of the baselines."""
        return next(iter(self.baselines), None)

    @property
    def length(self) -> str:
        """The column that says how long answers are: models compared without training share no tokens."""
        return "characters" if self.baseline else "tokens"

    def over_starts(self, y_SN: Array, runs: Sequence[int]) -> Array:
        """Rows that errors may take as independent: runs, or the mean of the runs of each start where starts vary."""
        if self.starts == 1:
            return y_SN
        start_S = np.asarray(runs) % self.starts
        return np.stack([y_SN[start_S == s].mean(0) for s in np.unique(start_S)])

    def table(self, name: str, column: str) -> Array:
        """(S, N) of one method, samples averaged."""
        mine = self.answers[name]
        return self.over_starts(mine.mean_SN(column), mine.runs)

    def two_tables(self, a: str, b: str, column: str) -> tuple[Array, Array]:
        """The tables of two methods on the runs that both finished."""
        runs = common(self.answers[a].runs, self.answers[b].runs)
        return tuple(self.over_starts(self.answers[m].only(runs).mean_SN(column), runs) for m in (a, b))  # type: ignore

    def judged(self, name: str, against: str, judge: str | None = None, *, unparsed: float = 0.5) -> Judged | None:
        """One method against another, answer k against answer k; None where the judge did not compare them.

        Of two orders the mean counts; an unparsed order counts as ``unparsed``.
        """
        judge = judge or self.metric
        if self.judges[judge]["pairs"]:
            found = self.judgements.get((judge, name, against))
            return None if found is None else _two_orders(found, unparsed)
        mine, theirs = self.answers[name], self.answers[against]
        runs = common(mine.runs, theirs.runs)
        column = self.judges[judge]["column"]
        if not runs or column not in mine.columns or column not in theirs.columns:
            return None
        y_SNK = statistics.win(mine.only(runs).columns[column], theirs.only(runs).columns[column])
        return Judged(runs, y_SNK.mean(-1), float((y_SNK == 0.5).mean()))

    def wins(self, name: str, against: str, judge: str | None = None, *, unparsed: float = 0.5) -> Array | None:
        """The table of :meth:`judged`, as errors are taken over it."""
        found = self.judged(name, against, judge, unparsed=unparsed)
        return None if found is None else self.over_starts(found.y_SN, found.runs)


def _two_orders(found: Runs, unparsed: float) -> Judged:
    forward, backward = found.columns["forward"], found.columns["backward"]
    missing = np.stack([np.isnan(forward), np.isnan(backward)])
    parsed = ~missing.any(0)
    y_SNK = (np.where(missing[0], unparsed, forward) + np.where(missing[1], unparsed, backward)) / 2
    turned = np.sign(forward - 0.5) != np.sign(backward - 0.5)
    return Judged(
        found.runs, y_SNK.mean(-1), _share(y_SNK == 0.5, parsed), _share(turned, parsed), float(missing.mean())
    )


def _share(true: Any, among: Any) -> float:
    return float((true & among).sum() / max(1, among.sum()))


def common(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The runs that both have.

    >>> common((0, 1, 3), (0, 2, 3))
    (0, 3)
    """
    return tuple(r for r in a if r in set(b))


def read(folder: Path) -> dict[str, pa.Table]:
    """The whole tables of a suite's folder, as far as there are any."""
    return {name: pq.read_table(folder / f"{name}.parquet") for name in TABLES if (folder / f"{name}.parquet").exists()}


def stored(
    tables: Mapping[str, pa.Table], task: str, judges: Mapping[str, Mapping[str, Any]], starts: int,
    baseline: str | None = None,
) -> Stored:  # fmt: skip
    """The rows of one task out of the whole tables."""

    def parts(name: str, *by: str) -> dict[tuple[Any, ...], Runs]:
        found = split(tables[name], ("task", *by)) if name in tables else {}
        return {
            k[1:]: Runs.of(t, f"{name}.parquet, {', '.join(map(str, k))}") for k, t in found.items() if k[0] == task
        }

    curves: dict[str, dict[int, Runs]] = {}
    for (method, step), runs in sorted(parts("curves", "method", "step").items()):
        curves.setdefault(method, {})[step] = runs
    answers = {k[0]: v for k, v in parts("rows", "method").items()}
    prompts = {(v.columns["completion"].shape[1:], v.clusters_N) for v in answers.values()}
    if len(prompts) > 1:
        raise UsageError(
            f"task {task!r}: its methods did not answer the same prompts; delete the cells of one of them."
        )
    greedy, held_out = ({k[0]: v for k, v in parts(n, "method").items()} for n in ("greedy", "held_out"))
    judgements = {(k[0], k[1], k[2]): v for k, v in parts("judgements", "judge", "method", "against").items()}
    return Stored(answers, greedy, held_out, curves, judgements, judges, starts, baseline)


def split(table: pa.Table, by: Sequence[str]) -> dict[tuple[Any, ...], pa.Table]:
    """The table's rows by their values in some columns, sorted by these: the order of rows changes nothing."""
    code_B, names = np.zeros(len(table), dtype=np.int64), []
    for column in by:
        found = table[column].combine_chunks().dictionary_encode()
        names.append(found.dictionary.to_pylist())
        code_B = code_B * len(names[-1]) + found.indices.to_numpy()
    codes, part_B = np.unique(code_B, return_inverse=True)
    pieces = np.split(np.argsort(part_B, kind="stable"), np.cumsum(np.bincount(part_B))[:-1])
    made = {}
    for code, piece in zip(codes, pieces, strict=True):
        place = np.unravel_index(code, [len(n) for n in names])
        made[tuple(n[i] for n, i in zip(names, place, strict=True))] = table.take(piece)
    return dict(sorted(made.items()))


def _ints(table: pa.Table, name: str) -> Array:
    return np.asarray(table[name], dtype=np.int64)


def _column(values: pa.ChunkedArray) -> Array | None:
    """Numbers as floats, texts as objects; None for what is neither, and for a column that these rows do not have."""
    if values.null_count == len(values):
        return None
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return np.array(values.to_pylist(), dtype=object)
    number = pa.types.is_floating(values.type) or pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)
    return np.asarray(values.to_numpy(), dtype=np.float64) if number else None
