"""From anybody's rows to the table of seeds and prompts that the functions work on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .columns import columns, is_frame
from .records import FloatArray
from .tables import Clusters, Groups, table

TableLike = Any  # (N,), (S, N), a data frame, or a `Table`
ROLES = ("y", "prompt", "seed", "sample", "order", "cluster", "method")


@dataclass(frozen=True)
class Table:
    """Values by training seed and prompt, averaged over samples and judging orders; the labels where they are known."""

    y_SN: FloatArray
    groups: Groups
    n_unparsed: int = 0
    seeds: tuple[Any, ...] | None = None
    prompts: tuple[Any, ...] | None = None


def read(
    y: TableLike,
    clusters: Clusters = None,
    unparsed: float | None = None,
    names: Mapping[str, str] | None = None,
    argument: str = "y_SN",
) -> Table:
    """The table of one method.

    Args:
        y: one run (N,), runs by prompts (S, N), or a frame with one row per judgement: columns y, prompt, and where
            they exist seed, sample, order and cluster. Samples and orders are averaged within a prompt.
        clusters: one label per prompt, for arrays; a frame has them in its column cluster.
        unparsed: what a NaN counts as: 0.5, 0 or 1; None refuses NaN.
        names: names of a frame's columns that are called otherwise, by role.
        argument: what to call y in an error.
    """
    if unparsed not in (None, 0, 0.5, 1):
        raise ValueError(f"unparsed = {unparsed}: an unparsed judgement counts as 0.5, 0 or 1")
    if isinstance(y, Table):
        return y
    unknown = [role for role in names or () if role not in ROLES]
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*ROLES, "clusters", "level", "unparsed"], n=1)
        raise TypeError(f"no option {unknown[0]!r}{f', did you mean {near[0]!r}?' if near else ''}")
    if is_frame(y):
        if clusters is not None:
            raise ValueError("clusters are for arrays; name the frame's column instead: cluster='passage'")
        return _from_frame(y, unparsed, names or {}, argument)
    if names:
        raise ValueError(f"{', '.join(names)}: columns are named for data frames, and {argument} is an array")
    y_SN = np.atleast_2d(np.asarray(y, dtype=np.float64))
    y_SN, n_unparsed = _counted(y_SN, unparsed)
    return Table(table(argument, y_SN), Groups.of(clusters, y_SN.shape[1]), n_unparsed)


def read_two(
    a: TableLike,
    b: TableLike,
    paired_seeds: bool,
    clusters: Clusters = None,
    unparsed: float | None = None,
    names: Mapping[str, str] | None = None,
) -> tuple[Table, Table]:
    """The tables of two methods on the same prompts, in the same order; with shared seeds also of the same seeds."""
    a, b = read(a, clusters, unparsed, names, "a_SN"), read(b, clusters, unparsed, names, "b_SN")
    _same("prompt", a.prompts, b.prompts)
    shapes = f"a_SN has shape {a.y_SN.shape} and b_SN has shape {b.y_SN.shape}"
    if a.y_SN.shape[1] != b.y_SN.shape[1]:
        raise ValueError(f"{shapes}: both must hold the same prompts")
    if paired_seeds:
        if len(a.y_SN) != len(b.y_SN):
            raise ValueError(f"{shapes}: paired seeds need one row per seed in both; else pass paired_seeds=False")
        _same("seed", a.seeds, b.seeds)
    return a, b


def one_run(
    y: TableLike,
    clusters: Clusters = None,
    unparsed: float | None = None,
    names: Mapping[str, str] | None = None,
    argument: str = "y_N",
) -> Table:
    """The table of a single run; several seeds are refused."""
    found = read(y, clusters, unparsed, names, argument)
    if len(found.y_SN) > 1:
        raise ValueError(
            f"{argument} has {len(found.y_SN)} seeds, this test is of single runs; for methods: `difference`"
        )
    return found


def read_methods(
    methods: Mapping[str, TableLike] | TableLike,
    clusters: Clusters = None,
    unparsed: float | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, Table]:
    """The tables of many methods on the same prompts, from a mapping by name or a frame with a column method."""
    if is_frame(methods):
        column = (names or {}).get("method", "method")
        others = {role: name for role, name in (names or {}).items() if role != "method"}
        label_M = np.asarray(columns(methods, column)[0])
        rows = {c: np.asarray(methods[c]) for c in _known(methods)}
        methods = {
            str(name): _Rows({c: values[label_M == name] for c, values in rows.items()})
            for name in dict.fromkeys(label_M.tolist())
        }
        names = others
    found = {str(name): read(y, clusters, unparsed, names, str(name)) for name, y in methods.items()}
    if len(found) < 2:
        raise ValueError(f"{len(found)} method: a family of comparisons needs at least two")
    first = next(iter(found))
    for name, one in found.items():
        _same("prompt", found[first].prompts, one.prompts, (first, name))
        if one.y_SN.shape[1] != found[first].y_SN.shape[1]:
            sizes = f"{found[first].y_SN.shape[1]} prompts and {name} has {one.y_SN.shape[1]}"
            raise ValueError(f"{first} has {sizes}: all methods must answer the same prompts")
    return found


class _Rows(dict[str, npt.NDArray[Any]]):
    """A frame made of arrays."""

    @property
    def columns(self) -> list[str]:
        return list(self)


def _known(frame: Any) -> list[str]:
    return [str(column) for column in getattr(frame, "column_names", frame.columns)]


def _counted(y: FloatArray, unparsed: float | None) -> tuple[FloatArray, int]:
    missing = np.isnan(y)
    if unparsed is None:
        return y, 0
    return np.where(missing, unparsed, y), int(missing.sum())


def _from_frame(frame: Any, unparsed: float | None, names: Mapping[str, str], argument: str) -> Table:
    known = _known(frame)
    used = {role: names.get(role, role) for role in ROLES if role in names or role in known or role in ("y", "prompt")}
    used.pop("method", None)
    values = dict(zip(used, columns(frame, used["y"], **{r: c for r, c in used.items() if r != "y"}), strict=True))
    y_M, n_unparsed = _counted(np.asarray(values["y"], dtype=np.float64), unparsed)
    if not len(y_M):
        raise ValueError(f"{argument}: the frame has no rows")
    bad = np.flatnonzero(~np.isfinite(y_M))
    if len(bad):
        raise ValueError(
            f"{argument}: row {bad[0]} of column {used['y']!r} is {y_M[bad[0]]} ({len(bad)} such values in all); score "
            "failures explicitly, for example unparsed=0.5, never leave them out"
        )
    labels, id_M = {}, {}
    for role in ("seed", "prompt", "sample", "order"):
        labels[role], id_M[role] = _numbered(values[role]) if role in values else ((None,), np.zeros(len(y_M), int))
    shape = tuple(len(labels[role]) for role in ("seed", "prompt", "sample", "order"))
    place_M = np.ravel_multi_index(tuple(id_M.values()), shape)
    count_SNKO = np.bincount(place_M, minlength=int(np.prod(shape))).reshape(shape)
    where = ", ".join(role for role in ("seed", "prompt", "sample", "order") if role in values)
    if (count_SNKO > 1).any():
        cell = _words(labels, np.argwhere(count_SNKO > 1)[0])
        raise ValueError(f"{argument}: several rows with one {where} ({cell}); name the column that tells them apart")
    judged_SNK = count_SNKO.sum(3)
    if not judged_SNK.any(2).all():
        holes = np.argwhere(~judged_SNK.any(2))
        raise ValueError(
            f"{argument}: {len(holes)} of seeds × prompts without a row, the first {_words(labels, holes[0])}"
        )
    if ((judged_SNK > 0) & (judged_SNK < shape[3])).any():
        hole = np.argwhere((count_SNKO == 0) & (judged_SNK > 0)[..., None])[0]
        raise ValueError(f"{argument}: judged in some orders only, {_words(labels, hole)} is missing")
    sum_SNK = np.bincount(place_M, weights=y_M, minlength=count_SNKO.size).reshape(shape).sum(3)
    mean_SNK = np.divide(sum_SNK, judged_SNK, out=np.zeros(shape[:3]), where=judged_SNK > 0)
    y_SN = mean_SNK.sum(2) / (judged_SNK > 0).sum(2)
    clusters = None
    if "cluster" in values:
        label_M = np.asarray(values["cluster"])
        first_N = np.unique(id_M["prompt"], return_index=True)[1]
        clusters = label_M[first_N]
        moved = np.flatnonzero(clusters[id_M["prompt"]] != label_M)
        if len(moved):
            prompt = labels["prompt"][id_M["prompt"][moved[0]]]
            raise ValueError(f"{argument}: prompt {prompt!r} is in several clusters; a prompt belongs to one")
    return Table(
        table(argument, y_SN), Groups.of(clusters, shape[1]), n_unparsed,
        labels["seed"] if "seed" in values else None, labels["prompt"],
    )  # fmt: skip


def _numbered(values: Any) -> tuple[tuple[Any, ...], npt.NDArray[np.intp]]:
    """Sorted labels, and each row's number among them."""
    labels, ids_M = np.unique(np.asarray(values), return_inverse=True)
    return tuple(labels.tolist()), ids_M


def _words(labels: Mapping[str, Sequence[Any]], cell: Sequence[int]) -> str:
    parts = zip(labels.items(), cell, strict=False)
    return ", ".join(f"{role} {found[int(i)]!r}" for (role, found), i in parts if found != (None,))


def _same(
    role: str, a: tuple[Any, ...] | None, b: tuple[Any, ...] | None, names: tuple[str, str] = ("a_SN", "b_SN")
) -> None:
    if a is None or b is None or a == b:
        return
    for mine, theirs, name in ((a, b, names[1]), (b, a, names[0])):
        missing = [label for label in mine if label not in set(theirs)]
        if missing:
            raise ValueError(f"{name} has no {role} {missing[0]!r} ({len(missing)} missing): both must hold the same")
