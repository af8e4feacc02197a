"""The Arrow files of a prepared table: layout, and writers whose files are there whole or not at all.

Arrow IPC, uncompressed, buffers at multiples of 64 bytes, so that tensors are views of the files' pages, which all
ranks of a host share.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from fastdp.columns import Batch, Schema
from fastdp.disk import sync_folder

if TYPE_CHECKING:  # Spark's workers have no torch; and only tables from files need pyarrow
    import pyarrow as pa

FORMAT: Final = "fastdp shards 2"
SPLITS: Final = ("train", "test")
ALIGNMENT: Final = 64
ENCODED_BYTES: Final = 64 << 20  # of rows that are encoded at once


def rows_at_once(schema: Schema) -> int:
    """Rows that may be encoded together: a schema may make a hundred thousand features of a short row."""
    return max(1, ENCODED_BYTES // (4 * (len(schema.feature_names) + len(schema.coded) + 2)))


@dataclass(frozen=True)
class Written:
    """A file of a split, as the manifest has it."""

    file: str
    rows: int
    bytes: int
    sha256: str


class Writer:
    """An open file of record batches."""

    def __init__(self, file: IO[bytes], layout: pa.Schema) -> None:
        import pyarrow as pa

        self._sums = _Summed(file)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._sums, "w"), layout)
        self.rows = 0

    def add(self, batch: pa.RecordBatch, padding: str = "") -> None:
        if batch.num_rows:
            self.rows += batch.num_rows
            self._writer.write_batch(batch, custom_metadata={"padding": padding})

    def close(self) -> None:
        self._writer.close()

    def written(self, file: str) -> Written | None:
        return Written(file, self.rows, self._sums.size, self._sums.hash.hexdigest()) if self.rows else None


@contextmanager
def writing(folder: Path, name: str, layout: pa.Schema) -> Iterator[Writer]:
    """A file that is there whole after the block, or not at all; and none without rows.

    Writers of the same name do not disturb each other: what they write is the same, and the last one stays.
    """
    partial = folder / f".{name}.{secrets.token_hex(8)}.partial"  # on other hosts are processes of the same number
    try:
        with open(partial, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            writer = Writer(file, layout)
            yield writer
            writer.close()
            if writer.rows:
                file.flush()
                os.fsync(file.fileno())
        if writer.rows:
            partial.replace(folder / name)
            sync_folder(folder)
    finally:
        partial.unlink(missing_ok=True)


class SplitWriter:
    """A file of each split, and one of the rows that cannot be used, written as their batches come."""

    def __init__(self, folder: Path, name: str, schema: Schema) -> None:
        self._folder, self._name = folder, name
        self._layout, self._padding = _padded(layout_of(schema))
        self._stack = ExitStack()

    def __enter__(self) -> SplitWriter:
        folder, name = self._folder, self._name
        self._splits = {s: self._stack.enter_context(writing(folder / s, name, self._layout)) for s in SPLITS}
        self._bad = self._stack.enter_context(writing(folder / "private", name, quarantine_layout()))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, split: str, batch: Batch) -> None:
        if len(batch):
            self._splits[split].add(_arrow(batch, self._layout), self._padding)

    def add_bad(self, bad: pa.RecordBatch) -> None:
        """Rows of `quarantine_layout`."""
        self._bad.add(bad)

    def written(self) -> dict[str, dict[str, Any]]:
        """After the block: what the manifest shall say of the splits that have rows."""
        found = ((split, writer.written(f"{split}/{self._name}")) for split, writer in self._splits.items())
        return {split: asdict(written) for split, written in found if written is not None}


def quarantine_layout() -> pa.Schema:
    """The columns of rows that cannot be used."""
    import pyarrow as pa

    texts = [pa.field(name, pa.string()) for name in ("reason", "column")]
    return pa.schema([("file", pa.string()), ("place", pa.int64()), *texts, ("text", pa.binary())])


class _Summed(io.RawIOBase):
    """A file that knows the checksum of what was written."""

    def __init__(self, file: Any) -> None:
        self._file, self.size, self.hash = file, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.size += len(data)
        self._file.write(data)
        return len(data)


def layout_of(schema: Schema) -> pa.Schema:
    """The columns of the files."""
    import pyarrow as pa

    def vectors(kind: pa.DataType, size: int) -> pa.DataType:
        return pa.list_(pa.field("item", kind, False), size)

    fields = [pa.field("features", vectors(pa.float32(), len(schema.feature_names)), False)]
    fields += [pa.field("categories", vectors(pa.int32(), len(schema.coded)), False)] if schema.coded else []
    fields += [pa.field("label", pa.float32() if schema.label.type == "target" else pa.int64(), False)]
    return pa.schema(fields)


@functools.cache
def _padded(fields: pa.Schema) -> tuple[pa.Schema, str]:
    """`fields` with metadata, and metadata for each batch, that put all buffers at multiples of 64 bytes.

    Arrow pads buffers to 64 bytes, but what is before the first of a batch to 8 only.
    """
    import pyarrow as pa

    for before, between in ((" " * a, " " * b) for a in range(0, ALIGNMENT, 8) for b in range(0, ALIGNMENT, 8)):
        layout = pa.schema(fields, metadata={"format": FORMAT, "padding": before})
        file = io.BytesIO()
        one = _one(fields)
        with pa.ipc.new_file(file, layout) as writer:
            for _ in range(2):
                writer.write_batch(_arrow(one, layout), custom_metadata={"padding": between})
        content = pa.py_buffer(file.getvalue())
        opened = pa.ipc.open_file(content)
        columns = [column for i in range(2) for column in opened.get_batch(i).columns]
        buffers = [buffer for column in columns for buffer in column.buffers() if buffer is not None and buffer.size]
        if all((buffer.address - content.address) % ALIGNMENT == 0 for buffer in buffers):
            return layout, between
    raise AssertionError("no padding aligns the files of this pyarrow")


def _one(fields: pa.Schema) -> Batch:
    """A row."""
    features, *categories, label = fields
    size = categories[0].type.list_size if categories else 0
    zero = np.zeros(1, label.type.to_pandas_dtype())
    return Batch(np.zeros((1, features.type.list_size), np.float32), np.zeros((1, size), np.int32), zero)


def _arrow(batch: Batch, layout: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    arrays = {"features": batch.features, "categories": batch.categories, "label": batch.labels}
    columns = []
    for field in layout:
        values = np.ascontiguousarray(arrays[field.name])
        padded = np.zeros(-(-values.nbytes // ALIGNMENT) * ALIGNMENT, np.uint8)
        padded[: values.nbytes] = values.reshape(-1).view(np.uint8)
        is_list = pa.types.is_fixed_size_list(field.type)
        kind = field.type.value_type if is_list else field.type
        flat = pa.Array.from_buffers(kind, values.size, [None, pa.py_buffer(padded)])
        if is_list:
            flat = pa.Array.from_buffers(field.type, len(batch), [None], children=[flat])
        columns.append(flat)
    return pa.record_batch(columns, layout)
