"""The first rows of a file of a table of which nothing is known."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Final

import numpy as np

from fastdp import csvrows, pieces, transform
from fastdp.cells import is_number
from fastdp.columns import Layout, Reason
from fastdp.errors import require
from fastdp.transform import Source

if TYPE_CHECKING:
    import pyarrow as pa

ROWS: Final = 10_000  # at most
LINES: Final = 100  # that the guess at a CSV file's layout looks at
DELIMITERS: Final = ",;\t|"
COMMENTS: Final = "#%|"


@dataclass(frozen=True)
class Sample:
    """Rows by columns; those of CSV and JSON are texts."""

    columns: dict[str, pa.Array]
    unread: Counter[str]  # why other rows cannot be read
    layout: Layout

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def sample(source: Source) -> Sample:
    """Up to ROWS rows, fewer of those that are very long.

    Raises:
        ArgumentError: if the file cannot be read, or does not name its columns, each differently.
    """
    if source.kind == "csv":
        return _csv(source)
    return _json(source) if source.kind == "json" else _typed(source)


def _csv(source: Source) -> Sample:
    import pyarrow as pa

    with pieces.opened(source) as stream:
        layout, width = _layout(stream.read(csvrows.ROW_BYTES))
        stream.seek(0)
        names, start = csvrows.head(stream, layout)
        if names is not None and (len(set(names)) < len(names) or any(map(is_number, names))):
            layout, names = replace(layout, header=False), [f"column {i + 1}" for i in range(width)]
            stream.seek(0)
            _, start = csvrows.head(stream, layout)
        rows = _first_rows(stream, start, layout)
    require(names is not None or not len(rows), "input", source.path, "a CSV file whose first row can be read")
    names = names or []
    require("" not in names, "input", source.path, f"a CSV file whose first row names all columns, unlike {names}")
    table = csvrows.cells(rows, names, dict.fromkeys(names, pa.string()), layout)
    unread = Counter(Reason(reason).name.lower() for reason in rows.reasons if reason != Reason.GOOD)
    return Sample({name: table.column(name).combine_chunks() for name in names}, unread, layout)


def _layout(start: bytes) -> tuple[Layout, int]:
    """The delimiter of which most lines have the same number, and how many cells these have."""
    text = start.decode("utf-8-sig", errors="replace")
    lines = [re.sub(r'"[^"]*"', "", line) for line in text.split("\n")[:LINES] if line.strip()]
    found = [(0, 0, ",")]
    for delimiter in DELIMITERS:
        counts = Counter(line.count(delimiter) for line in lines if delimiter in line)
        found += [(lines_alike, count, delimiter) for count, lines_alike in counts.most_common(1)]
    _, count, delimiter = max(found)
    first = lines[0] if lines else ""
    is_comment = first.startswith(tuple(COMMENTS.replace(delimiter, ""))) and first.count(delimiter) != count
    return Layout(delimiter=delimiter, comment=first[0] if is_comment else ""), count + 1


def _json(source: Source) -> Sample:
    """Members that are never a text, a number or a boolean are columns of nulls."""
    import pyarrow as pa

    with pieces.opened(source) as stream:
        rows = _first_rows(stream, 0, Layout(quotes=False))
    texts = [rows.text(row) for row in np.flatnonzero(rows.reasons == Reason.GOOD)]
    has_cells: dict[str, bool] = {}
    for members in filter(None, map(transform.json_members, texts)):
        for name, cell in members.items():
            if name and transform.is_unicode(name):
                has_cells[name] = has_cells.get(name, False) or isinstance(cell, (str, int, float))
    names = [name for name, some in has_cells.items() if some]
    cells = [found for text in texts if (found := transform.json_cells(text, names)) is not None]
    columns = dict(zip(names, zip(*cells, strict=True), strict=True)) if cells else {}
    nulls = [None] * len(cells)
    unread = Counter({"syntax": len(rows) - len(cells)} if len(cells) < len(rows) else {})
    return Sample({name: pa.array(columns.get(name, nulls), pa.string()) for name in has_cells}, unread, Layout())


def _first_rows(stream: IO[bytes], start: int, layout: Layout) -> csvrows.Rows:
    data, _ = csvrows.piece(stream, start, start + pieces.PIECE_BYTES, None, layout)
    rows = csvrows.split(data, layout)
    return csvrows.Rows(data, rows.starts[:ROWS], rows.ends[:ROWS], rows.reasons[:ROWS])


def _typed(source: Source) -> Sample:
    import pyarrow as pa
    from pyarrow import parquet

    with pieces.opened(source) as stream:
        if source.kind == "parquet":
            file = parquet.ParquetFile(stream)
            schema, batches = file.schema_arrow, file.iter_batches(ROWS, use_threads=False)
        else:
            file = pa.ipc.open_file(stream)
            schema, batches = file.schema, map(file.get_batch, range(file.num_record_batches))
        for name in schema.names:
            require(schema.names.count(name) == 1, f"column {name!r} of {source.name}", "twice", "there once")
        require("" not in schema.names, "input", source.path, f"a table that names all columns, unlike {schema.names}")
        kept, rows = [schema.empty_table()], 0
        for batch in batches:
            kept.append(pa.Table.from_batches([batch.slice(0, ROWS - rows)]))
            rows += kept[-1].num_rows
            if rows == ROWS:
                break
        table = pa.concat_tables(kept)
        return Sample({name: table.column(name).combine_chunks() for name in schema.names}, Counter(), Layout())
