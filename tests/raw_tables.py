"""Contracts and tables that several test files read."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
from hypothesis import strategies as st

from fastdp import pieces, transform
from fastdp.columns import Schema
from fastdp.schema import parse_schema


def toml(name: str, columns: dict[str, dict[str, Any]], **tables: dict[str, Any]) -> str:
    """A contract's text. columns: fields by name; tables: those of [file] and [prepare]."""

    def fields(of: dict[str, Any]) -> str:
        return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in of.items())

    parts = [fields({"format": 1, "name": name}), *(f"[{key}]\n{fields(of)}" for key, of in tables.items())]
    return "".join(parts + ["[[column]]\n" + fields({"name": key, **of}) for key, of in columns.items()])


LABEL: dict[str, Any] = {"type": "label", "values": [["no", "-"], "yes", "perhaps"]}
TARGET: dict[str, Any] = {"type": "target", "bounds": [-10, 10], "scale": "log"}
COLUMNS: dict[str, dict[str, Any]] = {
    "age": {"type": "number", "bounds": [0, 100], "bins": [30, 60], "missing": 40},
    "debt": {"type": "number", "bounds": [0, 1000], "scale": "log", "missing": "indicator"},
    "height": {"type": "number", "bounds": [1, 2], "scale": "none", "bins": [1.5]},
    "job": {"type": "category", "values": ["clerk", ["none", "?"], "été"], "missing": "none", "other": "rest"},
    "town": {"type": "category", "values": ["A", "B"], "other": "B", "encode": "code"},
    "member": {"type": "boolean", "missing": "true"},
    "zip": {"type": "ignore"},
    "repaid": LABEL,
}
NAMES = list(COLUMNS)
NULLS = ("", "NA")


def contract(label: dict[str, Any] = LABEL, strip: bool = True, test: float = 0, nulls: tuple[str, ...] = NULLS) -> str:
    """Its text."""
    file = {"multiline": True, "nulls": nulls, "strip": strip}
    return toml("people", {**COLUMNS, "repaid": label}, file=file, prepare={"test": test})


def source(kind: str = "csv", name: str = "t") -> transform.Source:
    return transform.Source("/t", name, kind, False, 0, 0, None)


def csv_row(cells: tuple[str, ...], quoted: bool) -> bytes:
    def written(text: str) -> str:
        needed = quoted or any(char in text for char in ',"\n\r')
        return '"' + text.replace('"', '""') + '"' if needed else text

    return ",".join(map(written, cells)).encode()


def plain_table(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Typed rows, one in ten of which cannot be used."""
    draw = random.Random(seed)

    def row() -> dict[str, Any]:
        return {
            "age": draw.choice([None, draw.randrange(-5, 120)]),
            "debt": draw.choice([None, draw.random() * 2000]),
            "height": draw.choice([None] + [round(draw.random() + 1, 3)] * 19),
            "job": draw.choice([None, "clerk", "?", "été", "pi,l\not"]),
            "town": draw.choice(["A", "B", 'C"']),
            "member": draw.choice([None, True, False]),
            "zip": "1",
            "repaid": draw.choice(["no", "yes", "perhaps"] * 6 + ["never"]),
        }

    return [row() for _ in range(rows)]


def write_csv(rows: list[dict[str, Any]], path: Path) -> Path:
    def text(cell: Any) -> str:
        return "NA" if cell is None else str(cell).lower() if isinstance(cell, bool) else str(cell)

    body = b"".join(csv_row(tuple(map(text, row.values())), False) + b"\n" for row in rows)
    data = ",".join(NAMES).encode() + b"\n" + body
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_json(rows: list[dict[str, Any]], path: Path) -> Path:
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(rows: list[dict[str, Any]], path: Path) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows).select(NAMES[::-1]), path, row_group_size=37)
    return path


def write_arrow(rows: list[dict[str, Any]], path: Path) -> Path:
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), path, chunksize=31)
    return path


WRITERS: dict[str, Callable[[list[dict[str, Any]], Path], Path]] = {
    "t.csv": write_csv,
    "t.csv.gz": write_csv,
    "t.jsonl": write_json,
    "t.json.gz": write_json,
    "t.parquet": write_parquet,
    "t.arrow": write_arrow,
}


def refine(path: Path, schema: Schema) -> list[transform.Refined]:
    """All that becomes of a file, as the job has it."""
    parts, before = [], 0
    for piece in pieces.cut(pieces.source(path, path.name), schema):
        inside = piece.inside if piece.inside is None else before % 2 == 1
        before += pieces.quotes(piece) if schema.layout.quotes and piece.source.kind == "csv" else 0
        parts += pieces.refined(dataclasses.replace(piece, inside=inside), schema)
    return parts


def joined(parts: list[transform.Refined]) -> dict[str, Any]:
    """Arrays of good rows, and the reasons of bad ones, in order."""
    parts = parts or [transform.of_csv(b"", source(), 0, NAMES, parse_schema(contract()))]
    named: dict[str, Any] = {"bad": [(b["reason"], b["column"]) for part in parts for b in part.bad.to_pylist()]}
    for split, field in itertools.product(("train", "test"), ("features", "categories", "labels")):
        named[f"{split} {field}"] = np.concatenate([getattr(getattr(part, split), field) for part in parts])
    return named


HOSTILE = st.lists(
    st.sampled_from(
        [
            b"25,10,1.7,clerk,A,1,x,no\n",
            b'25,10,1.7,clerk,A,1,"a\nb,""c",no\r\n',
            b'25,10,1.7,"clerk",A,1,,yes\n',
            b"\n",
            b"\xff,,1.2,,A,,,no\n",
            b'25,1"0,1.7,clerk,A,1,x,no\n',
            b'"',
            b'""',
            b"\r",
            b"x",
            b",,1.5,,A,,,perhaps",
            b"1,2\n",
        ]
    ),
    max_size=14,
).map(b"".join)
