"""Pieces of raw tables to encoded rows, against a loop over rows in plain Python that shares no code with them."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_csvrows import lines, oracle

from fastdp import csvrows, files, pieces, transform
from fastdp.columns import Reason, Schema
from fastdp.errors import ArgumentError
from fastdp.schema import parse_schema

CONTRACT = """
format = 1
name = "people"
[file]
multiline = true
nulls = NULLS
strip = STRIP
[[column]]
name = "age"
type = "number"
bounds = [0, 100]
bins = [30, 60]
missing = 40
[[column]]
name = "debt"
type = "number"
bounds = [0, 1000]
scale = "log"
missing = "indicator"
[[column]]
name = "height"
type = "number"
bounds = [1, 2]
scale = "none"
bins = [1.5]
[[column]]
name = "job"
type = "category"
values = ["clerk", ["none", "?"], "été"]
missing = "none"
other = "rest"
[[column]]
name = "town"
type = "category"
values = ["A", "B"]
other = "B"
encode = "code"
[[column]]
name = "member"
type = "boolean"
missing = "true"
[[column]]
name = "zip"
type = "ignore"
[[column]]
name = "repaid"
LABEL
[prepare]
test = TEST
"""
LABEL = 'type = "label"\nvalues = [["no", "-"], "yes", "perhaps"]'
TARGET = 'type = "target"\nbounds = [-10, 10]\nscale = "log"'
NAMES = ["age", "debt", "height", "job", "town", "member", "zip", "repaid"]
NULLS = ("", "NA")


def contract(label: str = LABEL, strip: bool = True, test: float = 0, nulls: tuple[str, ...] = NULLS) -> str:
    """Its text."""
    text = CONTRACT.replace("LABEL", label).replace("STRIP", str(strip).lower()).replace("TEST", str(test))
    return text.replace("NULLS", json.dumps(list(nulls)))


def scaled(x: float, low: float, high: float, log: bool = False) -> float:
    x = min(max(x, low), high) - low
    return math.log1p(x) / math.log1p(high - low) if log else x / (high - low)


class BadCell(Exception):
    """Column and reason."""


def expected_of(cells: dict[str, str | None], target: bool, strip: bool, nulls: tuple[str, ...]) -> Any:
    """Features, codes and label of a row; BadCell about its first column that cannot be used."""
    bad: list[tuple[str, str]] = []

    def cell(name: str) -> str | None:
        text = cells[name]
        return text if text is None or not strip else text.strip()

    def number(name: str, missing: float | None) -> float:
        text = cell(name)
        if text is None or text in nulls:
            if missing is None:
                bad.append((name, "missing"))
            return missing or 0.0
        plain = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text)
        if not plain or math.isinf(float(text)):
            bad.append((name, "number"))
            return 0.0
        return float(text)

    def code(name: str, known: dict[str, int], missing: int | None, other: int | None) -> int:
        text = cell(name)
        if text is not None and text in known:
            return known[text]
        absent = text is None or text in nulls
        found = missing if absent else other
        if found is None:
            bad.append((name, "missing" if absent else "unknown"))
        return found or 0

    age, debt, height = number("age", 40), number("debt", math.nan), number("height", None)
    job = code("job", {"clerk": 0, "none": 1, "?": 1, "été": 2}, 1, 3)
    town = code("town", {"A": 0, "B": 1}, None, 1)
    member = code("member", {"false": 0, "0": 0, "true": 1, "1": 1}, 1, None)
    if target:
        label = scaled(number("repaid", None), -10, 10, log=True)
    else:
        label = code("repaid", {"no": 0, "-": 0, "yes": 1, "perhaps": 2}, None, None)
    if bad:
        raise BadCell(*bad[0])
    features = [scaled(age, 0, 100), age < 30, 30 <= age < 60, age >= 60]
    features += [0.0, 1.0] if math.isnan(debt) else [scaled(debt, 0, 1000, log=True), 0.0]
    features += [height < 1.5, height >= 1.5, *(job == i for i in range(4)), member]
    return [*map(float, features)], [town], label


def compare(found: transform.Refined, rows: list[tuple[bytes, Any]], places: list[int], target: bool) -> None:
    """rows: what each row is as it stands in the file, and cells by name or a Reason."""
    good, bad = [], []
    for (text, cells), place in zip(rows, places, strict=True):
        if isinstance(cells, Reason):
            bad.append({"file": "t", "place": place, "reason": cells.name.lower(), "column": None, "text": text})
            continue
        try:
            good.append(cells())
        except BadCell as why:
            column, reason = why.args
            bad.append({"file": "t", "place": place, "reason": reason, "column": column, "text": text})
    assert found.bad.to_pylist() == bad
    assert found.rows == len(rows) == len(found.train) + found.quarantined and len(found.test) == 0
    train = found.train
    assert (train.features.dtype, train.categories.dtype) == (np.float32, np.int32)
    assert train.labels.dtype == (np.float32 if target else np.int64) and train.features.shape == (len(good), 13)
    if good:
        features, codes, labels = zip(*good, strict=True)
        np.testing.assert_allclose(train.features, features, rtol=2e-7, atol=0)
        np.testing.assert_allclose(train.labels, labels, rtol=2e-7, atol=0)
        assert train.categories.tolist() == list(codes)


def source(kind: str = "csv", name: str = "t") -> transform.Source:
    return transform.Source("/t", name, kind, False, 0, 0, None)


NUMBERS = ["0", "1", "30", "59.99", "60", "-7", "1e2", "1e6", ".5", "5.", "+3", "007", "1e-400", "-0", "1.5"]
NO_NUMBERS = ["1e999", "inf", "nan", "1_0", "0x10", "1,5", "one", "1 2", "٣", "1\n2", "--1", "1e"]
MISSING = ["", "NA", " NA", "na", "\u00a0"]
TEXTS = [
    "clerk",
    " clerk\t",
    "none",
    "?",
    "été",
    "A",
    "B",
    "true",
    "0",
    "no",
    "-",
    "yes",
    "perhaps",
    "Clerk",
    'a"b',
    "é",
]
GOOD = [["25"], ["10"], ["1.7"], ["clerk"], ["A"], ["1"], ["x"], ["no"]]


def cell(i: int) -> st.SearchStrategy[str]:
    likely = NUMBERS if i in (0, 1, 2) else TEXTS
    return st.sampled_from(GOOD[i] * 20 + likely * 2 + NO_NUMBERS + MISSING + ["0", "1"])


ROWS = st.lists(st.tuples(*(cell(i) for i in range(len(NAMES)))), max_size=8)


def csv_row(cells: tuple[str, ...], quoted: bool) -> bytes:
    def written(text: str) -> str:
        needed = quoted or any(char in text for char in ',"\n\r')
        return '"' + text.replace('"', '""') + '"' if needed else text

    return ",".join(map(written, cells)).encode()


@given(
    rows=ROWS,
    strip=st.booleans(),
    target=st.booleans(),
    nulls=st.sampled_from([NULLS, ("NA",), ("", "0", "clerk"), (" ", "nan")]),
    quoted=st.booleans(),
    junk=st.lists(st.sampled_from([b"", b'a"b', b"1,2", b"\xff,,,,,,,", b'"x', b"\r\n"]), max_size=2),
)
@settings(max_examples=250, deadline=None)
@example(
    [("1", "2", "1", " ", "A", "1", "", "no"), ("1", " ", "1", "?", "A", "1", "", "no")], True, False, (" ",), False, []
)
def test_csv_is_what_a_loop_over_rows_makes(
    rows: list[tuple[str, ...]], strip: bool, target: bool, nulls: tuple[str, ...], quoted: bool, junk: list[bytes]
) -> None:
    schema = parse_schema(contract(TARGET if target else LABEL, strip, nulls=nulls))
    data = b"\n".join([*(csv_row(row, quoted) for row in rows), *junk])
    split = oracle(data, schema.layout, len(NAMES))
    starts = itertools.accumulate((len(line) for line in lines(data, True)), initial=0)
    places = [p + 70 for p, line in zip(starts, lines(data, True), strict=False) if line not in (b"\n", b"\r\n")]

    def expect(cells: list[str] | Reason) -> Any:
        named = cells if isinstance(cells, Reason) else dict(zip(NAMES, cells, strict=True))
        return named if isinstance(named, Reason) else lambda: expected_of(named, target, strip, nulls)

    found = transform.of_csv(data, source(), 70, NAMES, schema)
    if strip and " " in nulls:  # blanks are taken off before a cell is looked at, but for vocabularies
        assert found.rows == len(split) == len(found.train) + found.quarantined
    else:
        compare(found, [(text, expect(cells)) for text, cells in split], places, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_nulls_are_no_numbers", lambda layout: False)
        same(found, transform.of_csv(data, source(), 70, NAMES, schema))


def same(found: transform.Refined, other: transform.Refined) -> None:
    assert found.rows == other.rows and found.bad.equals(other.bad)
    for a, b in ((found.train, other.train), (found.test, other.test)):
        for field in dataclasses.fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


JSON_CELLS = st.none() | st.sampled_from(
    [
        1,
        0,
        25,
        1.5,
        1e6,
        10**400,
        True,
        False,
        "clerk",
        " NA ",
        "A",
        "no",
        "yes",
        "1",
        "\ud800",
        "\udc00x",
        [],
        {},
        "😀",
    ]
)
JSON_ROWS = st.lists(
    st.tuples(*(st.sampled_from(GOOD[i] * 12).map(lambda t: t) | JSON_CELLS for i in range(len(NAMES)))), max_size=6
)
JUNK = [b"{", b"[]", b"1", b'{"a":NaN}', b'{"age":Infinity}', b"\xff", b"{}", b" ", b"[" * 5000, b'"\\ud800"']


@given(rows=JSON_ROWS, target=st.booleans(), junk=st.lists(st.sampled_from(JUNK), max_size=2), crlf=st.booleans())
@settings(max_examples=200, deadline=None)
def test_json_lines_are_what_a_loop_over_rows_makes(
    rows: list[tuple[Any, ...]], target: bool, junk: list[bytes], crlf: bool
) -> None:
    schema = parse_schema(contract(TARGET if target else LABEL))
    members = [{n: c for n, c in zip(NAMES, row, strict=True) if c is not None} for row in rows]
    texts = [*(json.dumps(m).encode() for m in members), *junk]
    data = b"".join(text + (b"\r\n" if crlf else b"\n") for text in texts)
    places = [*itertools.accumulate((len(text) + 1 + crlf for text in texts), initial=0)]

    def text_of(cell: Any) -> str | None:
        if isinstance(cell, bool):
            return str(cell).lower()
        return cell if cell is None or isinstance(cell, str) else repr(cell)

    def expect(text: bytes, found: dict[str, Any] | None) -> Any:
        if text == b"\xff":
            return Reason.ENCODING
        if found is None:
            found = {} if text == b"{}" else None
        used = [found.get(n) for n in NAMES if n != "zip"] if found is not None else []
        halves = any(isinstance(c, str) and re.search("[\ud800-\udfff]", c) for c in used)
        if found is None or halves or any(isinstance(c, (list, dict)) for c in used):
            return Reason.SYNTAX
        cells = {n: text_of(found.get(n)) for n in NAMES}
        return lambda: expected_of(cells, target, True, NULLS)

    wanted = [expect(text, m) for text, m in zip(texts, [*members, *[None] * len(junk)], strict=True)]
    compare(
        transform.of_json_lines(data, source("json"), 0, schema),
        list(zip(texts, wanted, strict=True)),
        places[:-1],
        target,
    )


def test_typed_columns_are_what_their_texts_are() -> None:
    """Numbers and codes of every type that a Parquet or Arrow file has for them."""
    schema = parse_schema(contract())
    columns = {
        "age": pa.array([25, None, 120, 30, 30, 30]),
        "debt": pa.array([1.5, 2.5, math.nan, None, math.inf, 7.0]),
        "height": pa.array([1, 2, 1, 2, 1, None]),
        "job": pa.array(["clerk", None, "pilot", "?", "clerk", "clerk"]),
        "town": pa.array(["A"] * 6),
        "member": pa.array([True, None, False, True, True, True]),
        "repaid": pa.array(["no"] * 6),
    }
    kinds = {
        "age": [pa.int8(), pa.uint64(), pa.float32(), pa.float64(), pa.decimal128(20, 1), pa.string()],
        "debt": [pa.float16(), pa.float32(), pa.float64()],
        "height": [pa.int8(), pa.uint16(), pa.large_string()],
        "job": [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
        "member": [pa.bool_(), pa.int8(), pa.uint64()],
    }
    wanted = None
    for i in range(12):
        arrays = {n: cells.cast(kinds[n][i % len(kinds[n])]) if n in kinds else cells for n, cells in columns.items()}
        found = transform.of_columns(pa.record_batch(arrays), source("parquet"), 10, schema)
        assert [(b["place"], b["reason"], b["column"]) for b in found.bad.to_pylist()] == [
            (12, "number", "debt"), (14, "number", "debt"), (15, "missing", "height"),
        ]  # fmt: skip
        wanted = wanted or found
        for field in dataclasses.fields(found.train):
            np.testing.assert_array_equal(getattr(found.train, field.name), getattr(wanted.train, field.name))
    good = [
        expected_of(dict(zip(NAMES, row, strict=True)), False, True, NULLS)
        for row in (
            ("25", "1.5", "1", "clerk", "A", "true", "", "no"),
            (None, "2.5", "2", None, "A", None, "", "no"),
            ("30", None, "2", "?", "A", "true", "", "no"),
        )
    ]
    assert wanted is not None
    np.testing.assert_allclose(wanted.train.features, [g[0] for g in good], rtol=2e-7)


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


def test_each_kind_of_file_gives_the_same_rows_and_the_same_split(tmp_path: Path) -> None:
    schema, rows = parse_schema(contract(test=0.3)), plain_table(500)
    wanted: dict[str, Any] | None = None
    for name, write in WRITERS.items():
        parts = refine(write(rows, tmp_path / name), schema)
        assert sum(p.rows for p in parts) == sum(len(p.train) + len(p.test) + p.quarantined for p in parts) == 500
        found = joined(parts)
        wanted = wanted or found
        for key, value in wanted.items():
            np.testing.assert_array_equal(found[key], value, err_msg=f"{name}: {key}")
    assert wanted is not None and 20 < len(wanted["bad"]) < 100
    assert 0.15 < len(wanted["test labels"]) / 450 < 0.45


def sides(rows: list[dict[str, Any]], path: Path, how: str) -> dict[float, bool]:
    """Whether each good row is held out, by its debt."""
    schema = parse_schema(contract(test=0.25).replace("[prepare]", "[prepare]\n" + how))
    parts = refine(write_csv(rows, path), schema)
    batches = [(batch, held_out) for p in parts for batch, held_out in ((p.train, False), (p.test, True))]
    return {debt: held_out for batch, held_out in batches for debt in batch.features[:, 4].tolist() if 0 < debt < 1}


def test_a_row_alone_decides_where_it_goes(tmp_path: Path) -> None:
    """By content: other rows, their order and their number change nothing; another key divides anew."""
    rows = [{**row, "debt": (i + 1) / 6} for i, row in enumerate(plain_table(5000))]
    before = sides(rows, tmp_path / "a.csv", "")
    assert len(before) > 4000
    assert abs(sum(before.values()) / len(before) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(before))
    fewer = random.Random(1).sample(rows, 2000)
    after = sides([*plain_table(500, seed=7), *fewer], tmp_path / "b.csv", "")
    assert len(before.keys() & after.keys()) > 1500
    assert all(before[debt] == after[debt] for debt in before.keys() & after.keys())
    other = sides(rows, tmp_path / "a.csv", 'key = "another"')
    both = sum(before[debt] and other[debt] for debt in before) / len(before)
    assert abs(both - 0.0625) < 4 * math.sqrt(0.0625 / len(before))


def test_by_place_equal_rows_are_divided_and_names_count(tmp_path: Path) -> None:
    row = {**plain_table(1)[0], "height": 1.2, "repaid": "no"}
    how = 'split_by = "place"'
    schema = parse_schema(contract(test=0.25).replace("[prepare]", "[prepare]\n" + how))
    parts = refine(write_csv([row] * 4000, tmp_path / "a.csv"), schema)
    assert abs(sum(len(p.test) for p in parts) / 4000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    places = np.arange(1000) * 17
    a, b = (transform.is_test({}, source(name=name), places, schema) for name in ("a.csv", "b.csv"))
    again = transform.is_test({}, source(name="a.csv"), places[500:], schema)
    assert (a != b).any() and np.array_equal(a[500:], again)


def test_hashes_differ_in_every_column_and_bit() -> None:
    """Negative zero is zero; else a bit of a column changes half of the hash's."""
    values = {"a": np.array([0.0, -0.0, 1.0]), "b": np.array([3, 3, 3])}
    hashed = transform.row_hash(values, bytes(32))
    assert hashed[0] == hashed[1] != hashed[2]
    codes = np.arange(4096)
    for name in values:
        base = {"a": np.zeros(4096), "b": np.zeros(4096, np.int64)}
        base[name] = codes.astype(base[name].dtype)
        changed = {**base, name: (codes ^ 1).astype(base[name].dtype)}
        bits = np.unpackbits(
            (transform.row_hash(base, b"k" * 32) ^ transform.row_hash(changed, b"k" * 32)).view(np.uint8)
        )
        assert abs(bits.mean() - 0.5) < 0.01


@pytest.mark.parametrize("share, below", [(0.0, 0), (0.9999999999999999, 2**64 - 2**11)])
def test_shares_at_the_ends(share: float, below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = parse_schema(contract(test=share))
    hashes = np.array([0, below - 1 if below else 5, below, 2**64 - 1], np.uint64)
    monkeypatch.setattr(transform, "row_hash", lambda values, key: hashes)
    found = transform.is_test({}, source(), np.zeros(4, np.int64), schema)
    assert found.tolist() == [share > 0, share > 0, False, False]


def test_files_that_are_said_to_be_test_rows_are(tmp_path: Path) -> None:
    path = write_csv(plain_table(50), tmp_path / "t.csv")
    for split in ("train", "test"):
        schema = parse_schema(contract(test=0.5))
        (piece,) = pieces.cut(pieces.source(path, "t.csv", split), schema)
        (part,) = pieces.refined(piece, schema)
        there, empty = (part.train, part.test) if split == "train" else (part.test, part.train)
        assert len(there) == 50 - part.quarantined > 0 == len(empty)


def test_a_long_row_is_bad_and_alone() -> None:
    data = b'"' + b"x" * csvrows.ROW_BYTES + b'",2\n'
    schema = parse_schema(contract())
    good = b"25,10,1.7,clerk,A,1,x,no\n"
    found = transform.of_csv(good + data + good, source(), 0, NAMES, schema)
    assert found.rows == 3 and found.bad["reason"].to_pylist() == ["long"] and len(found.train) == 2


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


@given(body=HOSTILE, size=st.integers(1, 90), crlf=st.booleans(), bom=st.booleans(), comment=st.booleans())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(body=b"", size=7, crlf=False, bom=True, comment=True)
@example(body=b"25,10,1.7,clerk,A,1,x,no", size=3, crlf=True, bom=True, comment=True)  # no final line feed
def test_every_cut_of_a_csv_file_gives_the_same_rows(
    body: bytes, size: int, crlf: bool, bom: bool, comment: bool, tmp_path: Path
) -> None:
    """Also compressed; header, byte order mark and comments before the rows; quotation marks over the cuts."""
    text = contract(test=0.5).replace("[file]", '[file]\ncomment = "#"') if comment else contract(test=0.5)
    schema = parse_schema(text)
    end = b"\r\n" if crlf else b"\n"
    head = (csvrows.BOM if bom else b"") + (b'# "a comment"' + end) * comment + ",".join(NAMES).encode() + end
    path, packed = tmp_path / "t.csv", tmp_path / "u.csv.gz"
    path.write_bytes(head + body)
    packed.write_bytes(gzip.compress(head) + gzip.compress(body))  # members
    whole = refine(path, schema)
    wanted, bad = joined(whole), [b for part in whole for b in part.bad.to_pylist()]
    assert len(bad) + len(wanted["train labels"]) + len(wanted["test labels"]) == len(oracle(body, schema.layout, 8))
    for piece_bytes, encoded in ((size, 64 << 20), (16 << 20, size), (size, size)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "PIECE_BYTES", piece_bytes)
            patch.setattr(pieces, "ENCODED_BYTES", encoded)
            for each in (path, packed):
                parts = refine(each, schema)
                assert [{**b, "file": "t.csv"} for part in parts for b in part.bad.to_pylist()] == bad
                for key, value in joined(parts).items():
                    np.testing.assert_array_equal(value, wanted[key])


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.jsonl"])
def test_every_cut_of_other_files_gives_the_same_rows(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    schema = parse_schema(contract(test=0.3))
    path = WRITERS[name](plain_table(100), tmp_path / name)
    whole = refine(path, schema)
    for rows, size, encoded in ((1, 50, 1 << 20), (20, 1000, 1 << 20), (80, 1 << 20, 500)):
        monkeypatch.setattr(pieces, "PIECE_ROWS", rows)
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        monkeypatch.setattr(pieces, "ENCODED_BYTES", encoded)
        parts = refine(path, schema)
        assert len(parts) > len(whole)
        assert [b for p in parts for b in p.bad.to_pylist()] == [b for p in whole for b in p.bad.to_pylist()]
        for key, value in joined(whole).items():
            np.testing.assert_array_equal(joined(parts)[key], value)


def test_a_row_across_many_pieces_is_one(tmp_path: Path, monkeypatch: Any) -> None:
    """One that is too long, and one that is never closed: what follows belongs to it."""
    schema = parse_schema(contract())
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 18)
    good = b"25,10,1.7,clerk,A,1,x,no\n"
    long = b'25,10,1.7,clerk,A,1,"' + b"\n,x" * (csvrows.ROW_BYTES // 2) + b'",no\n'
    head = ",".join(NAMES).encode() + b"\n"
    for name in ("t.csv", "t.csv.gz"):
        for body, wanted in ((good * 2 + long + good, (3, 1)), (good + b'"' + long[:10] + good * 90_000, (1, 1))):
            path = tmp_path / name
            path.write_bytes(gzip.compress(head + body, 1) if name.endswith("gz") else head + body)
            parts = refine(path, schema)
            bad = [b["reason"] for p in parts for b in p.bad.to_pylist()]
            assert (sum(len(p.train) for p in parts), bad) == (wanted[0], ["long"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("data", [b"", b"\n", csvrows.BOM, ",".join(NAMES).encode(), b"# nothing\n"])
def test_files_without_rows_have_none(data: bytes, packed: bool, tmp_path: Path) -> None:
    schema = parse_schema(contract().replace("[file]", '[file]\ncomment = "#"'))
    path = tmp_path / ("t.csv.gz" if packed else "t.csv")
    path.write_bytes(gzip.compress(data) if packed else data)
    if data == b"\n":
        with pytest.raises(ArgumentError, match=r"input=.*t\.csv.*whose first row can be read"):
            pieces.cut(pieces.source(path, path.name), schema)
    else:
        assert sum(part.rows for part in refine(path, schema)) == 0


@pytest.mark.parametrize(
    "name, data, match",
    [
        ("t.csv", b"age,debt\n1,2\n", r"column 'height' of t.csv='absent'"),
        ("t.csv", ",".join([*NAMES, "more"]).encode() + b"\n", r"column 'more' of t.csv='undeclared'"),
        ("t.csv", ",".join([*NAMES, "age"]).encode() + b"\n", r"column 'age' of t.csv='twice'"),
        ("t.csv", b'"age,debt\n1,2\n', r"input=.*t\.csv.*whose first row can be read"),
        ("t.csv", b"\xff,debt\n1,2\n", r"input=.*t\.csv.*whose first row can be read"),
        ("t.csv.gz", b"no gzip", r"input=.*t\.csv\.gz.*csv file that can be read"),
        ("t.parquet", b"PAR1 nothing PAR1", r"input=.*t\.parquet.*parquet file that can be read"),
        ("t.arrow", b"nothing", r"input=.*t\.arrow.*arrow file that can be read"),
        ("t.xlsx", b"", r"input=.*t\.xlsx.*ends in \.csv"),
        ("t.parquet.gz", b"", r"input=.*t\.parquet\.gz.*ends in"),
    ],
)
def test_files_that_are_no_such_tables_are_refused(name: str, data: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ArgumentError, match=match):
        pieces.cut(pieces.source(path, name), parse_schema(contract()))


def test_a_file_that_breaks_off_is_refused_where_it_does(tmp_path: Path) -> None:
    path = write_csv(plain_table(2000), tmp_path / "t.csv.gz")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ArgumentError, match=r"t\.csv\.gz.*csv file that can be read \(Compressed file ended"):
        refine(path, parse_schema(contract()))
