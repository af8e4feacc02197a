"""Table files to cells and arrays: CSV, Parquet and Arrow, by a declared schema, a batch of rows at a time."""

from __future__ import annotations

import functools
import gzip
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import numpy as np

from fastdp import csvrows
from fastdp.cells import is_number, parse_or_raise
from fastdp.columns import Batch, CellError, Layout, Reason, Schema
from fastdp.errors import ArgumentError, require

if TYPE_CHECKING:  # 0.5 s to import, and only tables from files need it
    import pyarrow as pa

KINDS: Final = {
    ".csv": "csv",
    ".txt": "csv",
    ".tsv": "csv",
    ".data": "csv",
    ".test": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
TEXT: Final = ("csv", "json")  # kinds that may be compressed, with .gz after the ending

# Rows that are encoded at once: the temporaries of a column stay in the cache, the calls per batch do not count.
BATCH_ROWS = 65536
CSV_BLOCK_BYTES = 8 << 20


def kind_of(name: str) -> str | None:
    """What a file is by the ending of its name."""
    plain = name.lower().removesuffix(".gz")
    kind = next((kind for ending, kind in KINDS.items() if plain.endswith(ending)), None)
    return kind if kind in TEXT or plain == name.lower() else None


def endings(kinds: Container[str]) -> str:
    """Of files of these kinds, for messages."""
    return ", ".join(f"{ending}[.gz]" if kind in TEXT else ending for ending, kind in KINDS.items() if kind in kinds)


def list_files(argument: str, path: Path) -> list[Path]:
    """The file, or a folder's files in order of their names; ArgumentError unless they are tables of one kind.

    Names that begin with a dot or an underscore are passed over: Spark writes `_SUCCESS` and `.part-0.crc`.
    """
    require(path.exists(), argument, str(path), "a file or folder that exists")
    files = [path]
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.name[0] not in "._"), key=lambda p: p.name)
        require(bool(files), argument, str(path), f"a folder with files that end in {endings(_READ)}")
    for file in files:
        readable = file.is_file() and kind_of(file.name) in _READ
        require(readable, argument, str(file), f"a file that ends in {endings(_READ)}")
    kinds = sorted({kind_of(file.name) or "" for file in files})
    require(len(kinds) == 1, argument, str(path), f"a folder of files of one kind, not of {' and '.join(kinds)}")
    return files


def read(argument: str, path: Path, schema: Schema) -> Batch:
    """All rows.

    argument: what the path was given as, for messages.
    Raises ArgumentError naming the file, or the first row (from 0, header not counted) that cannot be used and its
    column and value, or why it cannot be read.
    """
    parts: list[Batch] = []
    for file in list_files(argument, path):
        kind = kind_of(file.name) or ""
        with reading(argument, file, kind):
            first_row = 0
            for cells in _READ[kind](argument, file, schema):
                try:
                    parts.append(schema.encode(parse_or_raise(cells, schema)))
                except CellError as error:
                    raise error.at(first_row, file.name) from None
                first_row += len(parts[-1])
    require(sum(map(len, parts)) > 0, argument, str(path), "a table with at least one row")
    arrays = zip(*((part.features, part.categories, part.labels) for part in parts), strict=True)
    return Batch(*map(np.concatenate, arrays))


@contextmanager
def reading(argument: str, path: str | Path, kind: str) -> Iterator[None]:
    """ArgumentError if the file cannot be read."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, EOFError, OSError, UnicodeError, zlib.error) as error:
        reason = str(error).strip().split("\n")[0]
        raise ArgumentError(argument, str(path), f"a {kind} file that can be read ({reason})") from error


def open_bytes(path: str | Path) -> IO[bytes]:
    """Of what is in it, where it is compressed."""
    return gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def used_columns(names: list[str], file: str, schema: Schema) -> list[str]:
    """Names of the columns to read, in the schema's order."""
    for name in names:
        require(names.count(name) == 1, f"column {name!r} of {file}", "twice", "there once")
    declared = [column.name for column in schema.columns]
    for name in names:
        bound = 'in the schema, as type = "ignore" at least'
        if len(names) == 1 < len(declared):
            bound = f"one of several: cells are separated by {schema.layout.delimiter!r}, as [file] delimiter says"
        require(name in declared, f"column {name!r} of {file}", "undeclared", bound)
    used = [column.name for column in schema.used]
    for name in used:
        require(
            name in names, f"column {name!r} of {file}", "absent", f"there, as the schema declares; there are {names}"
        )
    return used


def csv_head(argument: str, path: str | Path, stream: IO[bytes], schema: Schema) -> tuple[list[str], int]:
    """Names of a CSV file's columns, and where its records begin; no names: it is empty."""
    layout = schema.layout
    first, start = csvrows.head(stream, layout)
    if layout.header:
        stream.seek(start)
        readable = first is not None or not stream.read(1)
        require(readable, argument, str(path), "a CSV file whose first row can be read: it names columns")
        return first or [], start
    names = [column.name for column in schema.columns]
    if not schema.labelled and first is not None and len(first) == len(names) - 1:
        user = schema.user and schema.user.name
        bound = f"{len(names)}: without a header, it would not be known whether {user!r} or the label is left out"
        require(user is None, f"cells in a row of {path}", len(first), bound)
        names.remove(schema.label.name)
    return names, start


def csv_cells(rows: csvrows.Rows, names: list[str], schema: Schema) -> dict[str, pa.Array]:
    """The cells of the columns that are read, of all rows that have no reason; see csvrows.cells."""
    import pyarrow as pa

    texts = {column.name: pa.string() for column in schema.used}
    types = texts | {column.name: pa.float64() for column in schema.used if column.bounds != (0, 0)}
    try:
        table = csvrows.cells(rows, names, types if _nulls_are_no_numbers(schema.layout) else texts, schema.layout)
    except pa.ArrowInvalid:  # a cell that is no number
        table = csvrows.cells(rows, names, texts, schema.layout)
    return {name: table.column(name).chunk(0) for name in texts}  # it was read as one block


@functools.cache
def _nulls_are_no_numbers(layout: Layout) -> bool:
    """Then Arrow's reader may make numbers of texts: it looks for nulls before it takes blanks off."""
    return layout.strip and not any(is_number(text) for text in layout.nulls)


def row_error(rows: csvrows.Rows, row: int, name: str, width: int, layout: Layout) -> ArgumentError:
    """What to tell about a row, called `name`, that cannot be read. Not its text: it has columns that are not read."""
    reason = Reason(rows.reasons[row])
    if reason == Reason.WIDTH:
        found = len(csvrows.cells_of(rows.text(row), layout))
        return ArgumentError(f"cells in {name}", found, f"{width}, one for each column")
    bounds = {
        Reason.QUOTES: "without stray quotation marks (see [file] quotes, multiline) and lone carriage returns",
        Reason.ENCODING: "UTF-8",
        Reason.LONG: f"at most {csvrows.ROW_BYTES:,} bytes long",
    }
    return ArgumentError(name, reason.name.lower(), bounds[reason])  # as in the quarantine


# The cells of a file of each kind, some rows at a time.
Cells = Iterator[Mapping[str, "pa.Array"]]


def _read_csv(argument: str, file: Path, schema: Schema) -> Cells:
    with open_bytes(file) as stream:
        names, start = csv_head(argument, file, stream, schema)
        if not names:
            return
        used_columns(names, file.name, schema)
        stream.seek(start)
        first_row = 0
        for _, data in csvrows.blocks(stream, schema.layout, CSV_BLOCK_BYTES):
            rows = csvrows.split(data, schema.layout)
            cells = csv_cells(rows, names, schema)
            if rows.reasons.any():
                row = int(rows.reasons.astype(bool).argmax())
                yield {name: column[:row] for name, column in cells.items()}  # one of these may be bad, and is earlier
                raise row_error(rows, row, f"row {first_row + row} of {file.name}", len(names), schema.layout)
            yield cells
            first_row += len(rows)


def _read_parquet(argument: str, file: Path, schema: Schema) -> Cells:
    from pyarrow import parquet

    opened = parquet.ParquetFile(file, memory_map=True)
    used = used_columns(opened.schema_arrow.names, file.name, schema)
    for batch in opened.iter_batches(BATCH_ROWS, columns=used, use_threads=False):
        yield {name: batch.column(name) for name in used}


def _read_arrow(argument: str, file: Path, schema: Schema) -> Cells:
    import pyarrow as pa

    opened = pa.ipc.open_file(pa.memory_map(str(file)))
    used = used_columns(opened.schema.names, file.name, schema)
    for i in range(opened.num_record_batches):
        whole = opened.get_batch(i).select(used)
        for first in range(0, whole.num_rows, BATCH_ROWS):
            batch = whole.slice(first, BATCH_ROWS)
            yield {name: batch.column(name) for name in used}


# JSON lines are for spark_jobs/prepare.py only.
_READ: Final[dict[str, Callable[[str, Path, Schema], Cells]]] = {
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
