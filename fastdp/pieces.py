"""Raw files in pieces that can be prepared one by one, on any machine that sees the files."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal

import numpy as np

from fastdp import arrowfiles, csvrows, statistics, transform, users
from fastdp.columns import Layout, Schema
from fastdp.errors import ArgumentError
from fastdp.files import KINDS, csv_head, endings, kind_of, open_bytes, reading, used_columns
from fastdp.transform import Source

if TYPE_CHECKING:
    import pyarrow as pa

# Of a piece: tens of milliseconds of Spark's to a second of ours; some 0.5 GB of memory at work for a row of 40 bytes.
PIECE_BYTES: Final = 16 << 20
PIECE_ROWS: Final = 1 << 18  # of formats that count rows


@dataclass(frozen=True)
class Piece:
    """A part of a file: bytes [start, stop), or row groups or record batches."""

    source: Source
    number: int  # in the whole input
    start: int
    stop: int
    first_row: int = 0  # of typed files
    names: tuple[str, ...] = ()  # of a CSV file's columns
    inside: bool | None = None  # whether `start` stands within quotation marks; None: a record begins there


def source(path: Path, name: str, split: Literal["train", "test"] | None = None) -> Source:
    """ArgumentError if the file's ending is not one of a table."""
    kind = kind_of(name)
    if kind is None:
        raise ArgumentError("input", str(path), f"a file that ends in {endings(KINDS.values())}")
    about, gzipped = path.stat(), name.lower().endswith(".gz")
    return Source(str(path.absolute()), name, kind, gzipped, about.st_size, about.st_mtime_ns, split)


def cut(source: Source, schema: Schema) -> list[Piece]:
    """A file's pieces, numbered from 0. Those of a CSV file do not know yet whether they begin in quotation marks."""
    with reading("input", source.path, source.kind):
        return _cut(source, schema)


@contextmanager
def opened(source: Source) -> Iterator[IO[bytes]]:
    """The file, unpacked; ArgumentError if it cannot be read."""
    with reading("input", source.path, source.kind), open_bytes(source.path) as stream:
        yield stream


def _cut(source: Source, schema: Schema) -> list[Piece]:
    if source.kind == "parquet":
        return _cut_parquet(source, schema)
    if source.kind == "arrow":
        return _cut_arrow(source, schema)
    names, start = _head(source, schema)
    if source.gzipped:
        return [Piece(source, 0, 0, source.bytes, names=names)]
    starts = range(start, source.bytes, PIECE_BYTES)
    return [
        Piece(source, i, a, min(a + PIECE_BYTES, source.bytes), 0, names, None if i == 0 else False)
        for i, a in enumerate(starts)
    ]


def quotes(piece: Piece) -> int:
    """How many quotation marks are in it."""
    with reading("input", piece.source.path, piece.source.kind), open(piece.source.path, "rb") as file:
        file.seek(piece.start)
        return file.read(piece.stop - piece.start).count(b'"')


def prepare(piece: Piece, schema: Schema, output: Path) -> dict[str, Any]:
    """Write the piece's files under `output`; returns what the manifest shall say of them."""
    rows, reasons = 0, Counter[str]()
    with _writer(piece, schema, output) as writer:
        for part in refined(piece, schema):
            rows += part.rows
            reasons.update(part.bad.column("reason").to_pylist())
            writer.add("train", part.train)
            writer.add("test", part.test)
            writer.add_bad(part.bad)
    return {"rows": rows, "reasons": reasons, **writer.written()}


def _writer(piece: Piece, schema: Schema, output: Path) -> arrowfiles.SplitWriter:
    return arrowfiles.SplitWriter(output, f"part-{piece.number:05d}.arrow", schema)


def records(piece: Piece, schema: Schema, output: Path) -> Iterator[pa.RecordBatch]:
    """The piece's rows as users.RECORDS, and what became of the others, which are written, as a result."""
    rows, reasons = 0, Counter[str]()
    with _writer(piece, schema, output) as writer:
        for part in refined(piece, schema):
            rows += part.rows
            reasons.update(part.bad.column("reason").to_pylist())
            yield users.records(part)
            writer.add_bad(part.bad)
    yield users.result(users.RECORDS, json.dumps({"result": {"rows": rows, "reasons": reasons}}))


def sums(piece: Piece, schema: Schema) -> statistics.Sums:
    """Of the piece's training rows."""
    training = (transform.chosen(part.values, np.flatnonzero(~part.held_out)) for part in refined(piece, schema))
    return statistics.added(statistics.sums(values, schema) for values in training)


def refined(piece: Piece, schema: Schema) -> Iterator[transform.Refined]:
    """What becomes of the piece's rows, as many at a time as may be in memory together."""
    with reading("input", piece.source.path, piece.source.kind):
        yield from _refined(piece, schema)


def _refined(piece: Piece, schema: Schema) -> Iterator[transform.Refined]:
    source = piece.source
    layout = schema.layout if source.kind == "csv" else dataclasses.replace(schema.layout, quotes=False)

    def rows(data: bytes, offset: int) -> transform.Refined:
        if source.kind == "csv":
            return transform.of_csv(data, source, offset, list(piece.names), schema)
        return transform.of_json_lines(data, source, offset, schema)

    if source.kind == "parquet":
        yield from _refined_parquet(piece, schema)
    elif source.kind == "arrow":
        yield from _refined_arrow(piece, schema)
    elif source.gzipped:
        with open_bytes(source.path) as stream:
            _, start = csvrows.head(stream, layout) if source.kind == "csv" else (None, 0)
            stream.seek(start)
            for offset, data in csvrows.blocks(stream, layout, PIECE_BYTES):
                for first, part in _parts(data, layout, schema):
                    yield rows(part, start + offset + first)
    else:
        with open(source.path, "rb") as file:
            data, start = csvrows.piece(file, piece.start, piece.stop, piece.inside, layout)
        for first, part in _parts(data, layout, schema):
            yield rows(part, start + first)


def _parts(data: bytes, layout: Layout, schema: Schema) -> Iterator[tuple[int, bytes]]:
    """Rows in parts of about as many as may be encoded together, and where these begin."""
    parts = -(-data.count(b"\n") // arrowfiles.rows_at_once(schema))
    if parts <= 1:
        return iter([(0, data)])
    return csvrows.blocks(io.BytesIO(data), layout, -(-len(data) // parts))


def _head(source: Source, schema: Schema) -> tuple[tuple[str, ...], int]:
    """Names of the columns and where the records begin."""
    if source.kind == "json":
        return (), 0
    with open_bytes(source.path) as stream:
        names, start = csv_head("input", source.path, stream, schema)
    if names:
        used_columns(names, source.name, schema)
    return tuple(names), start


def _cut_parquet(source: Source, schema: Schema) -> list[Piece]:
    from pyarrow import parquet

    opened = parquet.ParquetFile(source.path)
    used_columns(opened.schema_arrow.names, source.name, schema)
    counts = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
    return _cut_counted(source, counts)


def _cut_arrow(source: Source, schema: Schema) -> list[Piece]:
    import pyarrow as pa

    with pa.ipc.open_file(pa.memory_map(source.path)) as opened:
        used_columns(opened.schema.names, source.name, schema)
        counts = [opened.get_batch(i).num_rows for i in range(opened.num_record_batches)]
    return _cut_counted(source, counts)


def _cut_counted(source: Source, counts: list[int]) -> list[Piece]:
    """Pieces of several groups of so many rows each, of PIECE_ROWS rows or one group."""
    pieces: list[Piece] = []
    start, first_row, rows = 0, 0, 0
    for i, count in enumerate(counts):
        if rows and rows + count > PIECE_ROWS:
            pieces.append(Piece(source, len(pieces), start, i, first_row))
            start, first_row, rows = i, first_row + rows, 0
        rows += count
    if rows:
        pieces.append(Piece(source, len(pieces), start, len(counts), first_row))
    return pieces


def _refined_parquet(piece: Piece, schema: Schema) -> Iterator[transform.Refined]:
    from pyarrow import parquet

    opened = parquet.ParquetFile(piece.source.path, memory_map=True)
    row, groups, at_once = piece.first_row, list(range(piece.start, piece.stop)), arrowfiles.rows_at_once(schema)
    used = [column.name for column in schema.used]
    for batch in opened.iter_batches(min(PIECE_ROWS, at_once), groups, used, use_threads=False):
        yield transform.of_columns(batch, piece.source, row, schema)
        row += batch.num_rows


def _refined_arrow(piece: Piece, schema: Schema) -> Iterator[transform.Refined]:
    import pyarrow as pa

    opened, row = pa.ipc.open_file(pa.memory_map(piece.source.path)), piece.first_row
    at_once = min(PIECE_ROWS, arrowfiles.rows_at_once(schema))
    for i in range(piece.start, piece.stop):
        batch = opened.get_batch(i).select([column.name for column in schema.used])
        for first in range(0, batch.num_rows, at_once):
            part = batch.slice(first, at_once)
            yield transform.of_columns(part, piece.source, row, schema)
            row += part.num_rows
