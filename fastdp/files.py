"""Table files to arrays: CSV, Parquet and Arrow, by a declared schema, a batch of rows at a time.

pyarrow does what touches every cell: reading, stripping, looking up in the vocabulary, texts to numbers.
"""

from __future__ import annotations

import functools
import gzip
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from fastdp import csvrows
from fastdp.columns import Array, Batch, CellError, Column, Layout, Reason, Schema
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


@dataclass(frozen=True)
class Parsed:
    """Rows of cells as values."""

    values: dict[str, Array]  # by column, as `parse` gives them
    users: pa.Array | None  # whose they are, if the schema has users: binary
    reasons: npt.NDArray[np.uint8]
    columns: npt.NDArray[np.int64]  # of the reason, as numbered in schema.used


def parse_rows(cells: Mapping[str, pa.Array], schema: Schema) -> Parsed:
    """The first column that a row cannot be used for gives the reason."""
    values: dict[str, Array] = {}
    whose = None
    rows = len(next(iter(cells.values())))
    reasons, columns = np.full(rows, Reason.GOOD, np.uint8), np.full(rows, -1, np.int64)
    for number, column in enumerate(schema.used):
        if column.type == "user":
            whose, found = users(column, cells[column.name], schema.layout)
        else:
            values[column.name], found = parse(column, cells[column.name], schema.layout)
        if found.any():
            new = (found != Reason.GOOD) & (reasons == Reason.GOOD)
            reasons[new], columns[new] = found[new], number
    return Parsed(values, whose, reasons, columns)


def parse(column: Column, cells: pa.Array, layout: Layout) -> tuple[Array, Array]:
    """A batch of a column to codes int64 [n] (of a vocabulary) or numbers float64 [n], and reasons uint8 [n].

    Missing cells are filled in as declared. Where the reason is not Reason.GOOD, the value means nothing.
    Raises ArgumentError if the column's type cannot hold what is declared.
    """
    import pyarrow as pa

    cells = decoded(cells)
    texts = str(cells.type) in ("string", "large_string", "string_view", "null")
    codes = column.spellings is not None
    whole = pa.types.is_integer(cells.type) or pa.types.is_boolean(cells.type)
    numbers = whole or pa.types.is_floating(cells.type) or pa.types.is_decimal(cells.type)
    bound = "texts, integers or booleans" if codes else "numbers, or texts that are"
    require(texts or (whole if codes else numbers), f"type of column {column.name!r}", str(cells.type), bound)
    if texts or codes:
        cells = cells.cast(pa.string())
    if codes:
        values, missing, reasons = _codes(column, cells, layout)
    else:
        values, missing, reasons = _numbers(cells, layout)
    if missing.any():
        if column.missing is None:
            reasons[missing] = Reason.MISSING
        else:
            values[missing] = column.missing
    return values, reasons


def users(column: Column, cells: pa.Array, layout: Layout) -> tuple[pa.Array, Array]:
    """A batch of a column that says whose row it is, as binary [n], null where missing, and reasons uint8 [n].

    Integers are their digits; texts are compared byte for byte: "7" and "07" are two users.

    Raises ArgumentError if the column's type does not tell users from each other.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = decoded(cells)
    texts = str(cells.type) in ("string", "large_string", "string_view", "null")
    exact = texts or pa.types.is_integer(cells.type)
    require(exact, f"type of column {column.name!r}", str(cells.type), "texts or integers")
    cells = cells.cast(pa.string())
    if layout.strip:
        cells = pc.utf8_trim_whitespace(cells)
    missing = pc.or_kleene(cells.is_null(), pc.is_in(cells, value_set=pa.array(layout.nulls, pa.string())))
    reasons = np.where(missing.to_numpy(zero_copy_only=False), Reason.MISSING, Reason.GOOD).astype(np.uint8)
    return pc.if_else(missing, pa.scalar(None, pa.string()), cells).cast(pa.binary()), reasons


def decoded(cells: pa.Array) -> pa.Array:
    """The cells themselves, of a dictionary's."""
    import pyarrow as pa

    if not pa.types.is_dictionary(cells.type):
        return cells
    texts = str(cells.type.value_type) == "string_view"  # polars writes it, and take() does not know it
    return (cells.dictionary.cast(pa.string()) if texts else cells.dictionary).take(cells.indices)


def _codes(column: Column, texts: pa.Array, layout: Layout) -> tuple[Array, Array, Array]:
    """Codes, which are missing, reasons."""
    import pyarrow as pa
    import pyarrow.compute as pc

    assert column.spellings is not None
    # Nulls that are spellings of a value are values.
    nulls = [text for text in layout.nulls if text not in column.spellings]
    known = pa.array([*column.spellings, *nulls], pa.string())
    codes = np.array([*column.spellings.values(), *[-1] * len(nulls), -2], np.int64)
    missing = texts.is_null().to_numpy(zero_copy_only=False)

    def look_up(some: pa.Array) -> Array:
        found: Array = codes[pc.index_in(some, value_set=known).fill_null(len(known)).to_numpy()]
        return found

    values = look_up(texts)
    rest = np.flatnonzero(values == -2)
    if layout.strip and len(rest):  # most cells have no blanks: 6 ns a cell
        values[rest] = look_up(pc.utf8_trim_whitespace(texts.take(pa.array(rest))))
    missing |= values == -1
    unknown = (values == -2) & ~missing
    if column.other is not None:
        values[unknown] = column.other
        unknown[:] = False
    return values, missing, np.where(unknown, Reason.UNKNOWN, Reason.GOOD).astype(np.uint8)


def _numbers(cells: pa.Array, layout: Layout) -> tuple[Array, Array, Array]:
    """Numbers, which are missing, reasons."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(cells.type):
        if layout.strip:
            cells = pc.utf8_trim_whitespace(cells)
        null = pc.is_in(cells, value_set=pa.array(layout.nulls, pa.string()))
        cells = pc.if_else(null, pa.scalar(None, pa.string()), cells)
        cells = _readable(cells)
    missing = cells.is_null().to_numpy(zero_copy_only=False)
    values: Array = cells.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    values = values if values.flags.writeable else values.copy()
    bad = ~np.isfinite(values) & ~missing
    return values, missing, np.where(bad, Reason.NUMBER, Reason.GOOD).astype(np.uint8)


def _readable(texts: pa.Array) -> pa.Array:
    """`texts`, with "nan" in place of those that are no numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if _all_numbers(texts):
        return texts
    different = texts.dictionary_encode()
    bad = pa.array(_no_numbers(different.dictionary), pa.string())
    return pc.if_else(pc.is_in(texts, value_set=bad), "nan", texts)


def _no_numbers(texts: pa.Array) -> list[str]:
    """Those that are no numbers, by halving what has some: Arrow tells of one at a time."""
    if _all_numbers(texts):
        return []
    if len(texts) == 1:
        return [texts[0].as_py()]
    half = len(texts) // 2
    return _no_numbers(texts[:half]) + _no_numbers(texts[half:])


def _all_numbers(texts: pa.Array) -> bool:
    import pyarrow as pa

    try:
        texts.cast(pa.float64(), safe=False)
    except pa.ArrowInvalid:
        return False
    return True


def is_number(text: str) -> bool:
    """Whether Arrow reads it as one."""
    import pyarrow as pa

    return _all_numbers(pa.array([text.strip()], pa.string()))


def cell_error(column: Column, reason: int, row: int, value: object) -> CellError:
    """What to tell about a cell that cannot be used."""
    bound = "a finite number, or one of [file] nulls"
    if reason == Reason.MISSING:
        bound = "there: no value is declared for missing cells of this column"
        if column.type in ("label", "target"):
            bound = f"there: a {column.type} may not be missing"
    elif reason == Reason.UNKNOWN:
        bound = f"one of {', '.join(map(repr, column.spellings or ()))}"
    return CellError(column.name, row, value, bound)


def parse_or_raise(cells: Mapping[str, pa.Array], schema: Schema) -> dict[str, Array]:
    """The values of `parse_rows`; CellError about the first row, counted from 0, that cannot be used."""
    parsed = parse_rows(cells, schema)
    if parsed.reasons.any():
        row = int(parsed.reasons.astype(bool).argmax())
        column = schema.used[parsed.columns[row]]
        value = cells[column.name][row].as_py()
        value = value.strip() if schema.layout.strip and isinstance(value, str) else value
        raise cell_error(column, parsed.reasons[row], row, value)
    return parsed.values


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
    return {name: table.column(name).combine_chunks() for name in texts}


@functools.cache
def _nulls_are_no_numbers(layout: Layout) -> bool:
    """Then Arrow's reader may make numbers of texts: it looks for nulls before it takes blanks off."""
    return layout.strip and not any(text != text.strip() or is_number(text) for text in layout.nulls)


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
