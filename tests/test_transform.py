"""Pieces of raw tables to encoded rows, against a loop over rows in plain Python that shares no code with them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from raw_tables import LABEL, NAMES, NULLS, TARGET, contract, csv_row, plain_table, refine, source, write_csv
from test_csvrows import lines, oracle

from fastdp import csvrows, files, transform
from fastdp.cells import parse
from fastdp.columns import Reason
from fastdp.schema import parse_schema


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
    nulls = tuple(text.strip() if strip else text for text in nulls)
    schema = parse_schema(contract(TARGET if target else LABEL, strip, nulls=nulls))
    data = b"\n".join([*(csv_row(row, quoted) for row in rows), *junk])
    split = oracle(data, schema.layout, len(NAMES))
    starts = itertools.accumulate((len(line) for line in lines(data, True)), initial=0)
    places = [p + 70 for p, line in zip(starts, lines(data, True), strict=False) if line not in (b"\n", b"\r\n")]

    def expect(cells: list[str] | Reason) -> Any:
        named = cells if isinstance(cells, Reason) else dict(zip(NAMES, cells, strict=True))
        return named if isinstance(named, Reason) else lambda: expected_of(named, target, strip, nulls)

    found = transform.of_csv(data, source(), 70, NAMES, schema)
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


def test_a_long_row_is_bad_and_alone() -> None:
    data = b'"' + b"x" * csvrows.ROW_BYTES + b'",2\n'
    schema = parse_schema(contract())
    good = b"25,10,1.7,clerk,A,1,x,no\n"
    found = transform.of_csv(good + data + good, source(), 0, NAMES, schema)
    assert found.rows == 3 and found.bad["reason"].to_pylist() == ["long"] and len(found.train) == 2


def test_json_members_that_are_no_columns_are_bad() -> None:
    """A column that is misspelt would be missing in every row, and filled in."""
    schema = parse_schema(contract(LABEL))
    good = {name: cell for name, cell in zip(NAMES, ("25", "10", "1.7", "clerk", "A", "1", "x", "no"), strict=True)}
    data = b"".join(json.dumps(good | more).encode() + b"\n" for more in ({}, {"Age": 25}))
    found = transform.of_json_lines(data, source(), 0, schema)
    assert found.bad.column("reason").to_pylist() == ["syntax"] and found.rows == 2


@pytest.mark.parametrize("kind", [pa.int64(), pa.float32(), pa.string()])
def test_numbers_that_mean_missing_do_so_in_every_kind_of_file(kind: pa.DataType) -> None:
    text = '[file]\nnulls = ["-999", "nan"]\n[[column]]\nname = "x"\ntype = "number"\nbounds = [0, 10]\nmissing = 4\n'
    label = '[[column]]\nname = "y"\ntype = "label"\nvalues = ["no", "yes"]\n'
    schema = parse_schema(f'format = 1\nname = "t"\n{text}{label}')
    cells = pa.array([-999, 5], pa.int64()).cast(kind)
    values, reasons = parse(schema.columns[0], cells, schema.layout)
    assert values.tolist() == [4, 5] and not reasons.any()
    if kind != pa.int64():
        values, reasons = parse(schema.columns[0], pa.array([math.nan], pa.float32()).cast(kind), schema.layout)
        assert values.tolist() == [4] and not reasons.any()
