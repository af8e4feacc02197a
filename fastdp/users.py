"""Tables of users: of each user the same few records are kept, wherever in the input they stand, in one of the splits.

    records        of a piece, with whose they are and in what order they would be kept
    (Spark)        brings each user's records together, in that order
    keep           the first ones of each user, held out or not as the user is
    sums, write    what becomes of those

Which of a user's records are kept, and where, depends on these records alone: adding a user or taking one out changes
the table by the user's own records. The first are those of the least hash of what they hold; a user with a row in a
file of test rows is held out, unless that row cannot be read at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fastdp import arrowfiles, statistics
from fastdp.columns import Array, Schema
from fastdp.transform import Refined, bits, chosen, row_hash

if TYPE_CHECKING:
    import pyarrow as pa

# Frames' columns, for Spark. Rows with a result have nothing else: they tell what was done, to those who come after.
RECORDS: Final = "user binary, trained boolean, hash long, record binary, result string"
KEPT: Final = "held_out boolean, record binary, result string"


def records(refined: Refined) -> pa.RecordBatch:
    """The rows that can be used, as RECORDS has them; and rows without record, for users to be held out by."""
    import pyarrow as pa

    assert refined.others is not None  # the schema has users
    key = hashlib.sha256(refined.schema.preparation.key.encode()).digest()
    hashed = pa.array(row_hash(refined.values, key).view(np.int64))
    rows = [refined.users, pa.array(~refined.held_out), hashed, _packed(refined.values)]
    others = pa.nulls(len(refined.others))
    without = [refined.others, pa.repeat(False, len(others)), others.cast(pa.int64()), others.cast(pa.binary())]
    return _batch(RECORDS, [pa.concat_arrays(both) for both in zip(rows, without, strict=True)])


def result(fields: str, text: str) -> pa.RecordBatch:
    """A row that tells what was done."""
    import pyarrow as pa

    columns: list[Any] = [pa.nulls(1)] * (len(fields.split(",")) - 1)
    return _batch(fields, [*columns, pa.array([text])])


def _batch(fields: str, columns: list[Any]) -> pa.RecordBatch:
    """With no result where there is none in `columns`."""
    import pyarrow as pa

    kinds = {"binary": pa.binary(), "boolean": pa.bool_(), "long": pa.int64(), "string": pa.string()}
    layout = pa.schema([(name, kinds[kind]) for name, kind in (field.split() for field in fields.split(", "))])
    columns += [pa.nulls(len(columns[0]))] * (len(layout) - len(columns))
    return pa.record_batch([column.cast(field.type) for column, field in zip(columns, layout, strict=True)], layout)


def _packed(values: dict[str, Array]) -> pa.Array:
    """Eight bytes of each column, row by row, as binary."""
    import pyarrow as pa

    rows = np.column_stack([bits(column) for column in values.values()])
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * np.int32(rows.itemsize * rows.shape[1])
    return pa.Array.from_buffers(pa.binary(), len(rows), [None, pa.py_buffer(offsets), pa.py_buffer(rows)])


def unpacked(records: pa.Array, schema: Schema) -> dict[str, Array]:
    """The values that `records` packed."""
    columns = [column for column in schema.used if column.type != "user"]
    rows = np.frombuffer(b"".join(records.to_pylist()), np.uint64).reshape(len(records), len(columns))
    return {
        column.name: np.ascontiguousarray(rows[:, i]).view(np.float64 if column.spellings is None else np.int64)
        for i, column in enumerate(columns)
    }


@dataclass(frozen=True)
class _Last:
    """The user of the last record, how many were seen, and whether they are held out."""

    user: bytes | None = None
    seen: int = 0
    held_out: bool = False


def keep(batches: Iterator[pa.RecordBatch], schema: Schema, by_hash: bool) -> Iterator[pa.RecordBatch]:
    """The first records of each user, as KEPT has them, of RECORDS that are sorted by all their columns.

    by_hash: users are held out by a hash of their name; otherwise, if their first record is of a file of test rows.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    last, surplus = _Last(), 0
    for batch, told in _divided(batches):
        yield from (result(KEPT, text) for text in told)
        if not batch.num_rows:
            continue
        users, trained = batch.column("user"), batch.column("trained").to_numpy(zero_copy_only=False)
        changes = pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)
        firsts = np.flatnonzero(np.concatenate(([users[0].as_py() != last.user], changes)))
        new = [_is_held_out(users[i].as_py(), schema) if by_hash else not trained[i] for i in firsts.tolist()]
        is_record = batch.column("record").is_valid().to_numpy(zero_copy_only=False)
        before = np.cumsum(is_record) - is_record  # records before each row of the batch
        # What is said of the user who goes on from the batch before comes first.
        starts, decided = np.concatenate(([-last.seen], before[firsts])), np.array([last.held_out, *new])
        which = np.searchsorted(firsts, np.arange(len(users)), side="right")
        place = before - starts[which]
        kept = pa.array(is_record & (place < schema.preparation.records_per_user))
        yield _batch(KEPT, [pa.array(decided[which]).filter(kept), batch.column("record").filter(kept)])
        surplus += int(is_record.sum()) - kept.true_count
        last = _Last(users[-1].as_py(), int(place[-1] + is_record[-1]), bool(decided[-1]))
    yield result(KEPT, json.dumps({"result": {"surplus": surplus}}))


def _is_held_out(user: bytes, schema: Schema) -> bool:
    how = schema.preparation
    key = hashlib.sha256(how.key.encode()).digest()
    hashed = hashlib.blake2b(user, digest_size=8, key=key).digest()
    return int.from_bytes(hashed, "little") < int(how.test * 2.0**64)


def _divided(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[pa.RecordBatch, list[str]]]:
    """Each batch's rows without result, and the results."""
    import pyarrow.compute as pc

    for batch in batches:
        told = pc.is_valid(batch.column("result"))
        yield batch.filter(pc.invert(told)), batch.column("result").filter(told).to_pylist()


def sums(batches: Iterator[pa.RecordBatch], schema: Schema) -> Iterator[pa.RecordBatch]:
    """Of KEPT: what `statistics.sums` says of the training rows, as a result."""
    import pyarrow.compute as pc

    total: statistics.Sums = {}
    for batch, told in _divided(batches):
        yield from (result(KEPT, text) for text in told)
        training = batch.column("record").filter(pc.invert(batch.column("held_out")))
        total = statistics.added([total, statistics.sums(unpacked(training, schema), schema)])
    yield result(KEPT, json.dumps({"result": {"sums": total}}))


def write(batches: Iterator[pa.RecordBatch], number: int, schema: Schema, output: Path) -> Iterator[pa.RecordBatch]:
    """KEPT to files of this number under `output`; what the manifest shall say of them as a result."""
    with arrowfiles.SplitWriter(output, f"part-{number:05d}.arrow", schema) as writer:
        for batch, told in _divided(batches):
            yield from (result(KEPT, text) for text in told)
            for first in range(0, batch.num_rows, arrowfiles.rows_at_once(schema)):
                part = batch.slice(first, arrowfiles.rows_at_once(schema))
                values = unpacked(part.column("record"), schema)
                held_out = part.column("held_out").to_numpy(zero_copy_only=False)
                writer.add("train", schema.encode(chosen(values, np.flatnonzero(~held_out))))
                writer.add("test", schema.encode(chosen(values, np.flatnonzero(held_out))))
    yield result(KEPT, json.dumps({"result": writer.written()}))
