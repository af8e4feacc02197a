"""A piece of a raw table to encoded rows, divided into training and test rows, and to rows that cannot be used.

Pure functions of the piece, its place and the schema: what becomes of a row depends on nothing else (P11), not on how
the table was cut into pieces. spark_jobs/prepare.py calls them on executors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from fastdp import csvrows, files
from fastdp.cells import Parsed, parse_rows
from fastdp.columns import Array, Batch, Reason, Schema

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Source:
    """A file of the input."""

    path: str
    name: str  # the same wherever the input lies: goes into hashes
    kind: str  # csv, json, parquet, arrow
    gzipped: bool
    bytes: int
    changed: int  # when, in nanoseconds
    split: Literal["train", "test"] | None  # of all its rows; None: a hash decides


@dataclass(frozen=True)
class Refined:
    """What became of the rows of a piece."""

    rows: int
    schema: Schema
    values: dict[str, Array]  # codes or numbers of those that can be used, by column
    users: pa.Array | None  # whose they are, if the schema has users: binary
    others: pa.Array | None  # users of rows of test files that cannot be used
    held_out: npt.NDArray[np.bool_]  # of users' rows, what is said of their file
    bad: pa.RecordBatch  # place int64, reason, column, text: a row each

    @property
    def train(self) -> Batch:
        """The rows to train on, encoded."""
        return self.schema.encode(chosen(self.values, np.flatnonzero(~self.held_out)))

    @property
    def test(self) -> Batch:
        """The rows held out, encoded."""
        return self.schema.encode(chosen(self.values, np.flatnonzero(self.held_out)))

    @property
    def quarantined(self) -> int:
        return int(self.bad.num_rows)


def of_csv(data: bytes, source: Source, offset: int, names: list[str], schema: Schema) -> Refined:
    """Of the rows in `data`, which stands `offset` bytes after the beginning of its file; its columns are `names`."""
    rows = csvrows.split(data, schema.layout)
    whole = parse_rows(files.csv_cells(rows, names, schema), schema)
    readable = np.flatnonzero(rows.reasons == Reason.GOOD)
    return _divided(rows.reasons, readable, whole, rows.starts + offset, source, rows.texts, schema)


def of_columns(batch: pa.RecordBatch, source: Source, first_row: int, schema: Schema) -> Refined:
    """Of rows that are typed already; `first_row` rows of their file stand before them."""
    import pyarrow as pa

    whole = parse_rows({column.name: batch.column(column.name) for column in schema.used}, schema)
    places = np.arange(first_row, first_row + batch.num_rows)

    def texts(rows: npt.NDArray[np.int64]) -> pa.Array:
        # By slices: take() knows no string_view, which polars writes.
        return pa.array([repr(batch.slice(row, 1).to_pylist()[0]) for row in rows.tolist()], pa.binary())

    reasons = np.full(batch.num_rows, Reason.GOOD, np.uint8)
    return _divided(reasons, np.arange(batch.num_rows), whole, places, source, texts, schema)


def of_json_lines(data: bytes, source: Source, offset: int, schema: Schema) -> Refined:
    """Of the lines in `data`, which stands `offset` bytes after the beginning of its file: a JSON object each."""
    import pyarrow as pa

    rows = csvrows.split(data, dataclasses.replace(schema.layout, quotes=False))
    cells: dict[str, list[str | None]] = {column.name: [] for column in schema.used}
    declared = {column.name for column in schema.columns}
    user = None if schema.user is None else schema.user.name
    for row in range(len(rows)):
        if rows.reasons[row] == Reason.GOOD:
            found = json_cells(rows.text(row), list(cells), user, declared)
            if found is None:
                rows.reasons[row] = Reason.SYNTAX
                continue
            for name, cell in zip(cells, found, strict=True):
                cells[name].append(cell)
    readable = np.flatnonzero(rows.reasons == Reason.GOOD)
    whole = parse_rows({name: pa.array(texts, pa.string()) for name, texts in cells.items()}, schema)
    return _divided(rows.reasons, readable, whole, rows.starts + offset, source, rows.texts, schema)


def json_members(text: bytes) -> dict[str, Any] | None:
    """The members of an object; None if the text is none."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        members = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return members if isinstance(members, dict) else None


def json_cells(
    text: bytes, names: list[str], user: str | None = None, declared: set[str] | None = None
) -> list[str | None] | None:
    """The named members as texts; None if the text is no object of such, or of other members than are `declared`, or a
    user is neither text nor integer."""
    members = json_members(text)
    if members is None or (declared is not None and not members.keys() <= declared):
        return None
    found: list[str | None] = []
    for name in names:
        cell = members.get(name)
        if cell is not None and not isinstance(cell, (str, int, float)):
            return None
        if isinstance(cell, str) and not is_unicode(cell):
            return None
        if name == user and isinstance(cell, (float, bool)):
            return None  # 7 and 7.0 would be two users
        found.append(json.dumps(cell) if isinstance(cell, (int, float)) else cell)
    return found


def is_unicode(text: str) -> bool:
    """Halves of surrogate pairs can be written in JSON, and are no characters."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _divided(
    reasons: npt.NDArray[np.uint8],
    readable: npt.NDArray[np.int64],
    parsed: Parsed,
    places: npt.NDArray[np.int64],
    source: Source,
    texts: Any,
    schema: Schema,
) -> Refined:
    """reasons, places, texts: of all rows; parsed: of the `readable` ones."""
    import pyarrow as pa

    used, users = parsed.values, parsed.users
    others = None if users is None else users.slice(0, 0)
    columns = np.full(len(reasons), -1, np.int64)
    if parsed.reasons.any():
        good = np.flatnonzero(parsed.reasons == Reason.GOOD)
        used = chosen(used, good)
        if users is not None:
            of_bad = users.filter(pa.array(parsed.reasons != Reason.GOOD)).drop_null()
            others = of_bad if source.split == "test" else others
            users = users.take(pa.array(good))
        reasons[readable], columns[readable] = parsed.reasons, parsed.columns
        readable = readable[good]
    test = is_test(used, source, places[readable], schema)
    bad = np.flatnonzero(reasons != Reason.GOOD)
    names = pa.array([*(column.name for column in schema.used), None], pa.string())  # the last: of no column
    quarantined = pa.record_batch(
        {
            "file": pa.repeat(source.name, len(bad)),
            "place": pa.array(places[bad], pa.int64()),
            "reason": pa.array([reason.name.lower() for reason in Reason]).take(pa.array(reasons[bad])),
            "column": names.take(pa.array(columns[bad] % len(names))),
            "text": texts(bad),
        }
    )
    return Refined(len(reasons), schema, used, users, others, test, quarantined)


def is_test(
    values: dict[str, Array], source: Source, places: npt.NDArray[np.int64], schema: Schema
) -> npt.NDArray[np.bool_]:
    """Whether each row is held out, by a hash of what it holds: then no row decides about another (P1).

    Or by its place, if the schema says so; or as is said of its file. Hashes below the share of 2^64 are held out.
    Where rows are of users, only what is said of files: users.py holds users out.
    """
    if source.split is not None or schema.user is not None:
        return np.full(len(places), source.split == "test")
    how = schema.preparation
    key = hashlib.sha256(how.key.encode()).digest()
    if how.split_by == "place":
        seed = int.from_bytes(hashlib.blake2b(source.name.encode(), digest_size=8, key=key).digest(), "little")
        hashed = mixed(np.full(len(places), seed, np.uint64), places)
    else:
        hashed = row_hash(values, key)
    below: npt.NDArray[np.bool_] = hashed < np.uint64(min(int(how.test * 2.0**64), 2**64 - 1))
    return below


def row_hash(values: dict[str, Array], key: bytes) -> npt.NDArray[np.uint64]:
    """uint64 [n], of all columns' values and the key."""
    rows = len(next(iter(values.values())))
    hashed = np.full(rows, int.from_bytes(key[:8], "little"), np.uint64)
    for column in values.values():
        hashed = mixed(hashed, bits(column))
    return mixed(hashed, np.full(rows, int.from_bytes(key[8:16], "little"), np.uint64))


def chosen(values: dict[str, Array], rows: npt.NDArray[np.int64]) -> dict[str, Array]:
    """Of each column these rows."""
    return {name: cells.take(rows) for name, cells in values.items()}


def bits(column: Array) -> npt.NDArray[np.uint64]:
    """uint64 [n], the same for the same codes or numbers."""
    # One zero; and one NaN, which a missing number is until a statistic stands for it.
    column = np.where(np.isnan(column), np.nan, column + 0.0) if column.dtype == np.float64 else column
    found: npt.NDArray[np.uint64] = column.view(np.uint64)
    return found


def mixed(hashed: npt.NDArray[np.uint64], value: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """A hash of both: splitmix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195)."""
    z = (hashed ^ value.view(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    mixed: npt.NDArray[np.uint64] = z
    return mixed
