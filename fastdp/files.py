"""Table files to arrays: CSV, Parquet and Arrow, by a declared schema, a batch of rows at a time.

pyarrow does what touches every cell: reading, stripping, looking up in the vocabulary, texts to numbers.
"""

from __future__ import annotations

import gzip
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fastdp.columns import Array, Batch, CellError, Column, Layout, Reason, Schema
from fastdp.errors import ArgumentError, require

if TYPE_CHECKING:  # 0.5 s to import, and only tables from files need it
    import pyarrow as pa

KINDS: Final = {
    ".csv": "csv",
    ".csv.gz": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
ENDINGS: Final = ", ".join(KINDS)

# Rows that are encoded at once: the temporaries of a column stay in the cache, the calls per batch do not count.
BATCH_ROWS = 65536
CSV_BLOCK_BYTES = 8 << 20  # no row may be longer


def kind_of(path: Path) -> str | None:
    """What a file's ending says it is."""
    return next((kind for ending, kind in KINDS.items() if path.name.lower().endswith(ending)), None)


def list_files(argument: str, path: Path) -> list[Path]:
    """The file, or a folder's files in order of their names; ArgumentError unless they are tables of one kind.

    Names that begin with a dot or an underscore are passed over: Spark writes `_SUCCESS` and `.part-0.crc`.
    """
    require(path.exists(), argument, str(path), "a file or folder that exists")
    files = [path]
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.name[0] not in "._"), key=lambda p: p.name)
        require(bool(files), argument, str(path), f"a folder with files that end in {ENDINGS}")
    for file in files:
        require(file.is_file() and kind_of(file) is not None, argument, str(file), f"a file that ends in {ENDINGS}")
    kinds = sorted({kind_of(file) or "" for file in files})
    require(len(kinds) == 1, argument, str(path), f"a folder of files of one kind, not of {' and '.join(kinds)}")
    return files


def read(argument: str, path: Path, schema: Schema) -> Batch:
    """All rows.

    argument: what the path was given as, for messages.
    Raises ArgumentError naming the file, or the column, row (from 0, header not counted) and value.
    """
    import pyarrow as pa

    parts: list[Batch] = []
    for file in list_files(argument, path):
        try:
            names, batches = _OPEN[kind_of(file) or ""](file, schema)
            used = used_columns(names, file.name, schema)
            first_row = 0
            for batch in batches(used):
                try:
                    parts.append(_encode(batch, schema))
                except CellError as error:
                    raise error.at(first_row, file.name) from None
                first_row += batch.num_rows
        except (pa.ArrowException, OSError, UnicodeError) as error:
            # A row of another length would be shown whole, with the columns that are not read.
            reason = re.sub(r"(columns, got \d+):.*", r"\1", " ".join(str(error).split()))
            raise ArgumentError(argument, str(file), f"a {kind_of(file)} file that can be read ({reason})") from error
    require(sum(map(len, parts)) > 0, argument, str(path), "a table with at least one row")
    arrays = zip(*((part.features, part.categories, part.labels) for part in parts), strict=True)
    return Batch(*map(np.concatenate, arrays))


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
    """A batch of a column that says whose row it is, as binary [n], and reasons uint8 [n]; numbers as their digits.

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
    return cells.cast(pa.binary()), reasons


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


def parse_or_raise(column: Column, cells: pa.Array, layout: Layout) -> Array:
    """The values of `parse`; CellError about the first cell, counted from 0, that has none."""
    values, reasons = parse(column, cells, layout)
    if reasons.any():
        row = int(reasons.astype(bool).argmax())
        cell = cells[row].as_py()
        raise cell_error(column, reasons[row], row, cell.strip() if layout.strip and isinstance(cell, str) else cell)
    return values


def _encode(batch: pa.RecordBatch, schema: Schema) -> Batch:
    columns = {column.name: column for column in schema.columns}
    return schema.encode(
        {
            name: parse_or_raise(columns[name], cells, schema.layout)
            for name, cells in zip(batch.schema.names, batch.columns, strict=True)
        }
    )


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


# A file of each kind: the names of its columns, and what reads those that are used, batch by batch.
Opened = tuple[list[str], "Callable[[list[str]], Iterator[pa.RecordBatch]]"]


def _open_csv(file: Path, schema: Schema) -> Opened:
    import pyarrow as pa
    from pyarrow import csv

    layout = schema.layout
    comments = 0
    if layout.comment:
        with gzip.open(file) if file.name.lower().endswith(".gz") else open(file, "rb") as stream:
            prefix = layout.comment.encode()
            comments = sum(1 for _ in itertools.takewhile(lambda line: line.startswith(prefix), stream))
    declared = [column.name for column in schema.columns]

    def start(names: list[str] | None, **convert: Any) -> csv.CSVStreamingReader:
        return csv.open_csv(
            file,
            read_options=csv.ReadOptions(
                use_threads=False,  # then errors name the row; and ranks share the cores
                block_size=CSV_BLOCK_BYTES,
                skip_rows=comments,
                column_names=names,
                autogenerate_column_names=names is None and not layout.header,
            ),
            parse_options=csv.ParseOptions(
                delimiter=layout.delimiter,
                quote_char='"' if layout.quotes else False,
                newlines_in_values=layout.quotes and layout.multiline,
            ),
            convert_options=csv.ConvertOptions(strings_can_be_null=False, **convert),
        )

    given = None if layout.header else declared
    if given and not schema.labelled:
        with start(None) as reader:
            if len(reader.schema.names) == len(declared) - 1:
                given = [name for name in declared if name != schema.label.name]
    with start(given) as reader:
        raw = reader.schema.names
    names = [name.strip() if layout.strip else name for name in raw]

    def batches(used: list[str]) -> Iterator[pa.RecordBatch]:
        there = [raw[names.index(name)] for name in used]
        # Everything as text: types inferred from the first rows would not suit the rest.
        with start(given, include_columns=there, column_types=dict.fromkeys(there, pa.string())) as reader:
            for batch in reader:
                yield batch.rename_columns(used)

    return names, batches


def _open_parquet(file: Path, schema: Schema) -> Opened:
    from pyarrow import parquet

    opened = parquet.ParquetFile(file, memory_map=True)
    return opened.schema_arrow.names, lambda used: opened.iter_batches(BATCH_ROWS, columns=used, use_threads=False)


def _open_arrow(file: Path, schema: Schema) -> Opened:
    import pyarrow as pa

    opened = pa.ipc.open_file(pa.memory_map(str(file)))

    def batches(used: list[str]) -> Iterator[pa.RecordBatch]:
        for i in range(opened.num_record_batches):
            whole = opened.get_batch(i).select(used)
            for first in range(0, whole.num_rows, BATCH_ROWS):
                yield whole.slice(first, BATCH_ROWS)

    return opened.schema.names, batches


_OPEN: Final[dict[str, Callable[[Path, Schema], Opened]]] = {
    "csv": _open_csv,
    "parquet": _open_parquet,
    "arrow": _open_arrow,
}
