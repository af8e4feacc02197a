"""Prepared tables (fastdp/shards.py) as tensors that are views of their files' pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdp import arrowfiles, shards
from fastdp.columns import Schema
from fastdp.errors import ArgumentError, require
from fastdp.schema import parse_schema
from fastdp.stacked import Stacked
from fastdp.table import Table


def is_prepared(path: Path) -> bool:
    return (path / shards.MANIFEST).exists()


def load(path: Path, verify: bool = False) -> Table:
    """The table in a folder that spark_jobs/prepare.py wrote; nothing of it is read but the headers of its files.

    verify: read it all, and compare with the checksums.
    Raises ArgumentError if the manifest or a file is missing, of another size, altered, or of another format.
    """
    manifest = shards.read_manifest(path)
    shards.check_files(path, manifest, sums=verify)
    text = shards.contract(manifest)
    schema = parse_schema(text)
    train, test = (_split(path, manifest["files"][split], schema) for split in arrowfiles.SPLITS)
    require(len(test["label"]) > 0, "data", str(path), "a table with test rows: see [prepare] test, and --test-input")
    assumptions = ["bounds, vocabularies and fill values are those of the prepared table's schema, taken to be public"]
    if schema.unit == "user":
        assumptions.append("a user is protected: the table has one record of each")
    elif schema.unit == "record":
        most = schema.preparation.records_per_user
        assumptions.append(f"record-level: epsilon protects one record, not a user, who may have {most} in the table")
    released = manifest["statistics"]
    if released is not None and released["dp"]:
        noise = released["noise_multiplier"]
        assumptions.append(
            f"epsilon includes the table's own statistics, released with noise multiplier {noise:g}, and no other "
            "release of these records: each folder that prepare writes with noise is one"
        )
    elif released is not None:
        assumptions.append("NOT PRIVATE: the features were made with statistics of the records, without noise")
    if manifest["evaluation"] != shards.FILES:
        assumptions.append(f"the {manifest['evaluation']} are not trained on and not protected by epsilon")
    return Table(
        schema.name,
        train["features"],
        train["label"],
        test["features"],
        test["label"],
        schema.feature_names,
        schema.label.values,
        schema.size_is_public,
        schema.label if schema.label.type == "target" else None,
        evaluation=f"{len(test['label']):,} {manifest['evaluation']}",
        assumptions=tuple(assumptions),
        train_categories=train.get("categories"),
        test_categories=test.get("categories"),
        category_sizes=tuple(len(column.values) for column in schema.coded),
        digest=manifest["sha256"],
        schema=text,
        unit=schema.unit,
        statistics="" if released is None else repr(released["columns"]),
        prior={} if released is None else {(released["noise_multiplier"] if released["dp"] else 0.0, 1.0): 1},
    )


def _split(folder: Path, files: list[dict[str, Any]], schema: Schema) -> dict[str, Stacked]:
    parts: dict[str, list[Tensor]] = {name: [] for name in arrowfiles.layout_of(schema).names}
    for file in files:
        for name, tensors in _columns(folder / file["file"], file["rows"], schema).items():
            parts[name] += tensors
    if not files:  # nothing was held out
        parts = {name: [torch.empty(0)] for name in parts}
    return {name: Stacked(tensors) for name, tensors in parts.items()}


def _columns(path: Path, rows: int, schema: Schema) -> dict[str, list[Tensor]]:
    """The tensors of a file, one for each of its record batches."""
    import pyarrow as pa

    try:
        return _views(path, rows, schema)
    except (pa.ArrowException, OSError, RuntimeError, SystemError, UnicodeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ArgumentError("data", str(path), f"an Arrow file that can be read ({reason})") from error


def _views(path: Path, rows: int, schema: Schema) -> dict[str, list[Tensor]]:
    import pyarrow as pa

    # Private, so that torch may take the pages for writable: nothing that is written there reaches the file. And by
    # torch, which closes the file: Python's mmap holds a descriptor for each, of which a process may have 1,024.
    mapped = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    whole = pa.py_buffer(mapped.numpy())
    opened = pa.ipc.open_file(whole)
    batches = [opened.get_batch(i) for i in range(opened.num_record_batches)]
    layout = arrowfiles.layout_of(schema)
    require(
        opened.schema.equals(layout),
        f"columns of {path}",
        str(opened.schema).split("\n"),
        f"{str(layout).split(chr(10))}",
    )
    found = sum(batch.num_rows for batch in batches)
    require(found == rows, f"rows of {path}", found, f"{rows}, as the manifest says")

    def view(column: pa.Array) -> Tensor:
        values = column.values if pa.types.is_fixed_size_list(column.type) else column
        kind = torch.from_numpy(np.empty(0, values.type.to_pandas_dtype())).dtype
        start = values.buffers()[1].address - whole.address if len(values) else 0
        flat = mapped[start : start + len(values) * kind.itemsize].view(kind)
        return flat.view(len(column), column.type.list_size) if values is not column else flat

    return {field.name: [view(batch.column(field.name)) for batch in batches] for field in layout}
