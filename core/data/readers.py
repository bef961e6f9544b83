"""Sources: files, folders, hub ids, lists and ``datasets`` objects, read row by row."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from prefzoo.data.rows import Row, show
from prefzoo.registry import UsageError, suggest

FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
NOT_TEXT = {  # columns whose cells in a CSV file are JSON
    "label", "labels", "tie", "score", "scores", "ranks", "margin", "probability", "weight", "completions",
    "messages", "conversations", "tools", "chat_template_kwargs",
}  # fmt: skip
Read = Callable[[], Iterator[Row]]  # one pass over a source


class Cells(dict[str, Any]):
    """A row of a CSV file: all text, until it is known what its columns hold."""


@dataclass(frozen=True)
class DataSource:
    """One source of rows, and its part in a mixture.

    Args:
        path: a file, a folder, a hub id, rows, or a ``datasets`` object.
        split: of a hub id, a ``DatasetDict`` or a folder of splits; by default the only one, or ``train``.
        name: configuration of a hub id.
        revision: branch, tag or commit of a hub id.
        columns: what the source calls its columns: ``{"chosen": "good"}``.
        weight: share in a mixture; all of its sources have one, or none.
    """

    path: Any
    split: str | None = None
    name: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] | None = None
    weight: float | None = None

    @classmethod
    def of(cls, source: Any) -> DataSource:
        """A source as users write it: itself, a mapping of its fields, or what its ``path`` may be."""
        if isinstance(source, DataSource):
            return source
        if isinstance(source, Mapping) and not hasattr(source, "column_names"):
            known = [f.name for f in fields(cls)]
            for key in source:
                if key not in known:
                    raise UsageError(
                        f"data source {show(dict(source))}: no key {key!r}{suggest(str(key), known)} "
                        f"Its keys: {', '.join(known)}; rows are given as a list."
                    )
            if "path" not in source:
                raise UsageError(f"data source {show(dict(source))}: 'path' is missing.")
            return cls(**source)
        return cls(source)


def sources_of(source: Any) -> list[DataSource]:
    """The sources of a mixture; a list of mappings is one source of rows, unless they have a path and no column."""
    if isinstance(source, Sequence) and not isinstance(source, str) and not hasattr(source, "column_names") and source:
        first = source[0]
        if not isinstance(first, Mapping) or hasattr(first, "column_names") or _is_source(first):
            return [DataSource.of(s) for s in source]
    return [DataSource.of(source)]


def _is_source(first: Mapping[str, Any]) -> bool:
    known = set(first) <= {f.name for f in fields(DataSource)}
    return "path" in first and (known or (isinstance(first["path"], str) and Path(first["path"]).exists()))


def open_source(source: DataSource, streaming: bool) -> tuple[str, Read]:
    """The name of a source, and a function that makes a pass over its rows."""
    name, read = _open(source, streaming)
    mapping = dict(source.columns or {})

    def rows() -> Iterator[Row]:
        for number, row in enumerate(read(), 1):
            if not isinstance(row, Mapping):
                raise UsageError(f"data {name}, row {number}: expected a mapping, got {type(row).__name__}.")
            for new, old in mapping.items():
                if old not in row and number == 1:
                    raise UsageError(
                        f"data {name}: columns={{{new!r}: {old!r}}}: there is no column {old!r}"
                        f"{suggest(str(old), map(str, row))} Its columns: {', '.join(map(str, row))}."
                    )
            named = {k: v for k, v in row.items() if k not in mapping.values()}
            named |= {new: row[old] for new, old in mapping.items() if old in row}
            if isinstance(row, Cells):
                if said := next(
                    (k for k, v in named.items() if re.match(r"\[?\{'(role|from|content|value)'", v)), None
                ):
                    raise UsageError(
                        f"data {name}, row {number}, column {said!r}: messages as Python prints them, not JSON: "
                        f"{named[said][:60]!r}; write the column with json.dumps."
                    )
                named = {k: _cell(k, v) for k, v in named.items()}
            yield named

    return name, rows


def _open(source: DataSource, streaming: bool) -> tuple[str, Read]:
    path = source.path
    if isinstance(path, str | Path):
        return _open_path(source, streaming)
    for option in ("name", "revision", *(() if hasattr(path, "column_names") else ("split",))):
        if getattr(source, option) is not None:
            raise UsageError(f"data source: {option}={getattr(source, option)!r} has no effect on rows in memory.")
    if hasattr(path, "column_names") and isinstance(path, Iterable):
        return _library("datasets.Dataset", path, source.split)
    if isinstance(path, Sequence):
        return "list", lambda: iter(path)
    raise UsageError(
        f"data of type {type(path).__name__} cannot be read; give a path, a hub id, a list of rows or a "
        "datasets.Dataset."
    )


def _open_path(source: DataSource, streaming: bool) -> tuple[str, Read]:
    text, split = str(source.path), source.split
    path = Path(source.path)
    if not path.exists() and split is None and re.fullmatch(r"[\w.-]+", text.rpartition(":")[2]) and ":" in text:
        text, _, split = text.rpartition(":")
        path = Path(text)
    on_disk = path.exists()
    if not on_disk and re.fullmatch(r"\w[\w.-]*/[\w.-]+", text) and _kind(path) is None:
        return _hub(text, split, source, streaming)
    for option in ("name", "revision"):
        if getattr(source, option) is not None:
            raise UsageError(f"data {text!r}: {option}={getattr(source, option)!r} has no effect on files.")
    if not on_disk:
        near = suggest(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.exists() else "."
        raise UsageError(f"data {str(source.path)!r}: no such file{near}")
    if path.is_dir():
        return _open_folder(path, split)
    if split is not None:
        raise UsageError(f"data {text!r}: split={split!r} has no effect on a single file.")
    return path.name, lambda: _file(path, streaming)


def _kind(path: Path) -> str | None:
    """What the name of a file says it holds."""
    suffixes = [s.lower() for s in path.suffixes]
    last = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    return last if last in FILES else None


def _open_folder(path: Path, split: str | None) -> tuple[str, Read]:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():  # datasets' save_to_disk
        import datasets

        try:
            return _library(path.name, datasets.load_from_disk(str(path)), split)
        except (OSError, ValueError) as error:
            raise UsageError(f"data {str(path)!r} cannot be read: {_first_line(error)}.") from error
    files = sorted(p for p in path.iterdir() if p.is_file() and _kind(p)) or sorted(
        p for p in path.glob("data/*") if p.is_file() and _kind(p)
    )
    if not files:
        raise UsageError(f"data {str(path)!r}: the folder holds no file of a known kind ({', '.join(FILES)}).")
    stems = {p: re.split(r"[-_.]", p.name)[0] for p in files}
    whole = {p: re.sub(r"-\d+-of-\d+$", "", p.name.partition(".")[0]) for p in files}
    if split not in SPLITS and split in whole.values():  # train_prefs, test_prefs, ... as the hub stores them
        return f"{path.name}:{split}", lambda: (row for p in files if whole[p] == split for row in _file(p, True))
    names = sorted(set(stems.values()) & set(SPLITS))
    others = [p.name for p in files if stems[p] not in SPLITS]
    if names and others and split is None:
        raise UsageError(
            f"data {path.name}: files of splits ({', '.join(names)}) and others ({', '.join(others[:3])}) in one "
            "folder; give the file, or 'FOLDER:split'."
        )
    if names or split is not None:
        split = _choose(path.name, names, split)
        files = [p for p in files if stems[p] == split]
    label = f"{path.name}:{split}" if split else path.name
    return label, lambda: (row for file in files for row in _file(file, True))


def _choose(name: str, splits: Sequence[str], wanted: str | None) -> str:
    if wanted is None and (len(splits) == 1 or "train" in splits):
        return splits[0] if len(splits) == 1 else "train"
    if wanted in splits:
        assert wanted is not None
        return wanted
    said = "several splits" if wanted is None else f"no split {wanted!r}{suggest(wanted, splits)[:-1]}"
    raise UsageError(f"data {name}: {said}; give one as 'NAME:split'. Its splits: {', '.join(splits) or 'none'}.")


def _library(name: str, data: Any, split: str | None) -> tuple[str, Read]:
    """Rows of an object of the ``datasets`` library."""
    if isinstance(data, Mapping):  # a DatasetDict
        split = _choose(name, list(data), split)
        name, data = f"{name}:{split}", data[split]
    elif split is not None:
        raise UsageError(f"data {name}: split={split!r} has no effect on a single split.")
    plain = data.with_format(None)
    return name, lambda: iter(plain)


def _hub(path: str, split: str | None, source: DataSource, streaming: bool) -> tuple[str, Read]:
    import datasets

    options = {"name": source.name, "split": split, "revision": source.revision, "streaming": streaming}
    try:
        data = datasets.load_dataset(path, **options)
    except Exception as error:  # the library raises many kinds: no network, no such id, no such split, a bad file
        raise UsageError(
            f"data {path!r} is no file here, and as a hub id it cannot be loaded: {_first_line(error)}."
        ) from error
    name = ":".join(p for p in (path, source.name, split) if p)
    return _library(name, data, None)


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")


# ---------------------------------------------------------------------------------------------- files


def _file(path: Path, streaming: bool) -> Iterator[Row]:
    kind = _kind(path)
    if kind in (".csv", ".tsv"):
        rows = _csv(path, "\t" if kind == ".tsv" else ",")
    elif kind == ".parquet":
        rows = _parquet(path)
    elif kind == ".arrow":
        rows = _arrow(path)
    else:
        rows = _json(path, streaming)
    try:
        yield from rows
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        known = "" if kind else f" Known kinds of files: {', '.join(FILES)}."
        raise UsageError(f"data {str(path)!r} cannot be read: {error}.{known}") from error


def _text(path: Path, newline: str) -> IO[str]:
    """Unpacked text; a byte order mark, as Excel writes it, is left out."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _json(path: Path, streaming: bool) -> Iterator[Row]:
    with _text(path, "\n") as file:  # other line separators may stand in the strings of a row
        first = True
        for number, line in enumerate(file, 1):
            if first and line.lstrip()[:1] == "[":
                if streaming:
                    raise UsageError(
                        f"data {str(path)!r} is one JSON array, which is read as a whole; stream JSON Lines."
                    )
                yield from _array(path, line + file.read())
                return
            if not line.strip():
                continue
            first = False
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UsageError(
                    f"data {str(path)!r}, line {number} is not JSON ({getattr(error, 'msg', error)}): "
                    f"{line[:80].rstrip()!r}. Expected one JSON object per line."
                ) from error
            if not isinstance(row, dict):
                got = type(row).__name__
                raise UsageError(f"data {str(path)!r}, line {number}: expected a JSON object, got {got}.")
            yield row


def _array(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"data {str(path)!r} is not JSON: {error}.") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(f"data {str(path)!r}, row {number}: expected a JSON object, got {type(row).__name__}.")
        yield row


def _csv(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses long texts
    with _text(path, "") as file:
        for number, cells in enumerate(csv.DictReader(file, delimiter=delimiter, strict=True), 1):
            if None in cells or None in cells.values():
                more = "more" if None in cells else "fewer"
                raise UsageError(f"data {str(path)!r}, row {number}: {more} cells than the header has columns.")
            yield Cells(cells)


def _cell(column: str, text: Any) -> Any:
    """What a cell of a CSV file holds; where text is expected it stays text, even ``4`` or ``true``."""
    if column not in NOT_TEXT and not re.match(r'\[?\{"(role|from|content|value)"', str(text)):  # messages
        return text
    if not isinstance(text, str) or not text.strip():
        return None
    try:
        return json.loads(text.lower() if text.strip().lower() in ("true", "false") else text)
    except json.JSONDecodeError:
        return text  # the check of its column says what is wrong with it


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            decode = _decoder(file.schema_arrow)
            for batch in file.iter_batches(batch_size=1000):
                yield from map(decode, batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UsageError(f"data {str(path)!r} cannot be read: {_first_line(error)}.") from error


def _decoder(schema: Any) -> Callable[[Row], Row]:
    """The ``datasets`` library writes columns of mixed objects as JSON strings and says so in the schema."""
    if b'"Json"' not in (schema.metadata or {}).get(b"huggingface", b""):
        return lambda row: row
    import datasets

    return datasets.Features.from_arrow_schema(schema).decode_example  # type: ignore[no-any-return]


def _arrow(path: Path) -> Iterator[Row]:
    import datasets
    import pyarrow

    try:
        yield from datasets.Dataset.from_file(str(path))
    except pyarrow.ArrowException as error:
        raise UsageError(f"data {str(path)!r} cannot be read: {_first_line(error)}.") from error
