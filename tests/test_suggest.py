"""Drafts of column contracts: word for word, and read back as contracts that the drafted rows keep."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastdp import peek, pieces, suggest
from fastdp.columns import Schema
from fastdp.errors import ArgumentError
from fastdp.schema import parse_schema

ROOT = Path(__file__).parents[1]
JOB = ROOT / "spark_jobs" / "prepare.py"
DATA = Path(os.environ.get("FASTDP_DATA", ""))
needs_data = pytest.mark.skipif(not DATA.name, reason="FASTDP_DATA is not set")
P = "  # private: declare it or make it DP"


def draft(*files: Path) -> str:
    return suggest.draft([pieces.source(file, file.name) for file in files])


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def labelled(text: str) -> Schema:
    """The contract, after the one change that a draft without a label asks for, to its last column that can be it."""
    if 'type = "label"' not in text:
        assert "# No guess at the label" in text
        *before, last = re.split(r'(?=type = "(?:number|category)")', text)
        last = last.replace('"number"', '"target"', 1).replace('"category"', '"label"', 1)
        text = "".join(before) + re.sub(r"^missing = .*", "", last, flags=re.M)
    return parse_schema(text)


def quarantined(schema: Schema, path: Path) -> Counter[str]:
    """Why rows of the file break the contract."""
    reasons: Counter[str] = Counter()
    for piece in pieces.cut(pieces.source(path, path.name), schema):
        for part in pieces.refined(piece, schema):
            reasons.update(part.bad.column("reason").to_pylist())
    return reasons


def of(text: str, name: str) -> list[str]:
    """The lines about a column, after its name, with P in place of the mark."""
    block = text.replace(P, " P").split(f"[[column]]\nname = {json.dumps(name)}")[1].split("\n\n")[0]
    return block.rstrip("\n").split("\n")[1:]


LOANS = """\
age;job;debt;member;mail;since;repaid
30;clerk;0.1;0;a@b.c;2001;no
41;?;;1;d@e.f;2001;yes
29;"an ""RN""; x";1e3;1;g@h.i;2001;no
57;clerk;-2;0;;2001;no
1;2;3
"""
DRAFT = f"""\
# A draft from up to 10000 rows of "loans.csv". Of other files, only the columns' names were read.
# A line that is marked private tells of these rows, and no epsilon covers it: put there what is known of the
# table without looking, and take the mark off; or make it DP, as stats = "dp" in [prepare] makes means,
# deviations and modes. Names of columns and the layout of the file are taken to be public. Cells of other
# rows that are unlike these are errors, unless `missing` or `other` says what they stand for. A column that
# says whose row it is has the type "user".
format = 1
name = "loans"

[file]
# a guess: the first row has no number and no equal cells; if it is a row of the table, the names below are private
header = true
delimiter = ";"
nulls = ["", "?"]{P}
# Rows that cannot be read: 1 width{P}

[[column]]
name = "age"
type = "number"{P}
bounds = [29, 57]{P}

[[column]]
name = "job"
type = "category"{P}
values = ["an \\"RN\\"; x", "clerk", "?"]{P}
missing = "?"{P}

[[column]]
name = "debt"
type = "number"{P}
bounds = [-2, 1000]{P}
missing = "indicator"{P}

[[column]]
name = "member"
type = "boolean"{P}

[[column]]
name = "mail"
type = "category"{P}
values = ["a@b.c", "d@e.f", "g@h.i", ""]{P}
missing = ""{P}

[[column]]
name = "since"
type = "ignore"{P}
# one value at most, or neither texts nor numbers nor booleans{P}

[[column]]
name = "repaid"
type = "label"{P}
# a guess: the last column of few different texts, none missing
values = ["no", "yes"]{P}
"""


def test_a_draft_word_for_word(tmp_path: Path) -> None:
    path = written(tmp_path / "loans.csv", LOANS)
    assert draft(path) == DRAFT
    schema = parse_schema(DRAFT)
    assert schema.label.values == ("no", "yes") and quarantined(schema, path) == {"width": 1}


MANY = [f"t{i % 61}" for i in range(200)]
IGNORED = ['type = "ignore" P', "# one value at most, or neither texts nor numbers nor booleans P"]
MANIFOLD = [IGNORED[0], '# too many different texts for a vocabulary; if they say whose row it is: type = "user" P']
INDICATOR = 'missing = "indicator" P'
INFINITE = "# NaN or infinite cells are errors; there are some P"
NO_NUMBERS = "# cells that are no numbers are errors; there are some P"


def number(low: str, high: str, *more: str) -> list[str]:
    return ['type = "number" P', f"bounds = [{low}, {high}] P", *more]


def category(values: str, missing: str = "") -> list[str]:
    return ['type = "category" P', f"values = [{values}] P", *([f"missing = {missing} P"] if missing else [])]


CELLS: list[tuple[pa.Array | list[Any], list[str]]] = [
    (["17", " 90 ", "+30"], number("17", "90")),
    (["0.1", "0.30000000000000004", "1e-7"], number("1e-07", "0.30000000000000004")),
    ([0.1, 1 / 3, None], number("0.1", repr(1 / 3), INDICATOR)),
    (["9007199254740993", "-123456789012345678901234567890"], number("-1.2345678901234568e+29", "9007199254740992.0")),
    ([2**53 - 1, -(2**63)], number("-9.223372036854776e+18", "9007199254740991")),
    (["1e305", "-1e305"], number("-9.999999999999999e+299", "9.999999999999999e+299")),
    (pa.array([2**64 - 1, 0], pa.uint64()), number("0", "1.8446744073709552e+19")),
    ([Decimal("1.10"), Decimal("2.25")], number("1.1", "2.25")),
    (["1", "inf", "2", "1e999"], number("1", "2", INFINITE)),
    ([1.0, math.nan, 2.0], number("1", "2", INFINITE)),
    (["1", "NaN", "2", "N/A"], number("1", "2", INDICATOR)),
    (["1", "2"] * 9 + ["abc", "$12,000"], number("1", "2", NO_NUMBERS)),
    (["1", "2"] * 9 + ["?", "abc", "N/A", "abc", ""], number("1", "2", NO_NUMBERS, INDICATOR)),
    (["1", "2"] * 9 + ["abc", "-inf"], number("1", "2", INFINITE, NO_NUMBERS)),
    (["1", "2"] * 8 + ["1", "abc", "$12,000"], category('"$12,000", "1", "2", "abc"')),
    (["1"] * 18 + ["abc", "$12,000"], category('"1", "$12,000", "abc"')),
    (["04956", "10115"], category('"04956", "10115"')),
    (["00", *map(str, range(61))], MANIFOLD),
    (["0", "0.5", "-0.5", "-07", "1e05"], number("-7", "100000")),
    ([0.0, 1.0], number("0", "1")),
    (["a", "b", "a"], category('"a", "b"')),
    (["a", "b", None, "?", "NA"], category('"a", "b", ["", "?", "NA"]', '""')),
    (["a", "-", "a"], category('"a", "-"', '"-"')),
    (["1", "", "1.0"], category('"1", "1.0", ""', '""')),
    ([7, None, 7], category('"7", ""', '""')),
    (["1", "2", "x"], category('"1", "2", "x"')),
    (['"', "\\", "\\n\n\r"], category(r'"\"", "\\", "\\n"')),
    (["é😀", "\x7f\x00", "a\u2028b\xa0c"], category(r'"a\U00002028b\U000000a0c", "\U0000007f\u0000", "é😀"')),
    (["x\ny", "x'y"], category(r'"x\ny", "x' + "'y\"")),
    (["0", "1", "1"], ['type = "boolean" P']),
    ([True, False], ['type = "boolean" P']),
    (["true", "false"], ['type = "boolean" P']),
    (["True", "False"], ['type = "boolean" P', 'values = ["False", "True"] P']),
    ([True, False, None], category('"false", "true", ""', '""')),
    ([True, True], IGNORED),
    (["x", "x"], IGNORED),
    (["1", "1.0", "1"], category('"1", "1.0"')),
    ([2.0, 2.0], IGNORED),
    ([Decimal("2.0"), None], IGNORED),
    (["", None, "?"], IGNORED),
    (pa.nulls(3), IGNORED),
    ([math.nan, math.inf], IGNORED),
    ([datetime.date(2001, 1, 1), datetime.date(2002, 1, 1)], IGNORED),
    ([[1], [2]], IGNORED),
    ([b"a", b"b"], IGNORED),
    (MANY, MANIFOLD),
    (MANY[:60] * 2, category(", ".join(f'"{text}"' for text in sorted(MANY[:60])))),
    (MANY[:21], MANIFOLD),
    (MANY[:20], category(", ".join(f'"{text}"' for text in sorted(MANY[:20])))),
    (pa.array(["a", "b", None]).dictionary_encode(), category('"a", "b", ""', '""')),
    (pa.array(["a", "b"], pa.large_string()), category('"a", "b"')),
    (pa.array(["a", "b"], pa.string_view()), category('"a", "b"')),
]


def cases() -> Iterator[tuple[str, pa.Array, list[str]]]:
    """In typed files and in JSON, which has no other types and no infinite numbers."""
    for cells, expected in CELLS:
        array = cells if isinstance(cells, pa.Array) else pa.array(cells)
        yield from (("arrow", array, expected), ("parquet", array, expected))
        in_json = str(array.type) in ("string", "bool", "int64", "uint64", "double", "null")
        if in_json and all(math.isfinite(cell) for cell in array.to_pylist() if isinstance(cell, float)):
            yield "json", array, expected


@pytest.mark.parametrize(
    "kind, array, expected", [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(cases())]
)
def test_a_column_word_for_word(kind: str, array: pa.Array, expected: list[str], tmp_path: Path) -> None:
    """And the rows keep the draft."""
    other, label = [str(i % 2) for i in range(len(array))], ["no", "yes", *["no"] * (len(array) - 2)]
    table = pa.table({"x": array, "other": other, "y": label})
    path = tmp_path / f"t.{kind}"
    if kind == "arrow":
        pa.feather.write_feather(table, path, compression="uncompressed")
    elif kind == "parquet":
        pa.parquet.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    text = draft(path)
    found = of(text, "x")
    assert found == expected
    schema = parse_schema(text)
    assert schema.label.name == "y"
    errors = any("are errors" in line for line in found) and 2 - isinstance(array[0].as_py(), float)
    assert quarantined(schema, path) == ({"number": errors} if errors else {})


@pytest.mark.parametrize(
    "text, header, delimiter, names",
    [
        ("a,b\n1,x\n2,y\n", True, ",", ["a", "b"]),
        ("a;b\n1,5;x\n2,5;y\n", True, ";", ["a", "b"]),
        ("a\tb\n1\tx,z\n2\ty,z\n", True, "\t", ["a", "b"]),
        ("a|b\r\n1|x\r\n2|y\r\n", True, "|", ["a", "b"]),
        ('\ufeff"a ", b\n1,x\n2,y', True, ",", ["a", "b"]),
        ('"a;,b";c\n"1;2,3";x\n"1;3";y\n', True, ";", ["a;,b", "c"]),
        ("1,x\n2,y\n", False, ",", ["column 1", "column 2"]),
        ("x,x\n2,y\n1,x\n", False, ",", ["column 1", "column 2"]),
        ("# made by hand, a, b\na,b\n1,x\n2,y\n", True, ",", ["a", "b"]),
        ("|a comment\n1,x\n2,y\n", False, ",", ["column 1", "column 2"]),
        ("#a,b\n1,x\n2,y\n", True, ",", ["#a", "b"]),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
def test_guesses_at_the_layout(
    text: str, header: bool, delimiter: str, names: list[str], ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"t.{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending == "csv.gz" else text.encode())
    found = draft(path)
    schema = parse_schema(found)
    assert (schema.layout.header, schema.layout.delimiter) == (header, delimiter)
    assert [column.name for column in schema.columns] == names
    assert quarantined(schema, path) == {}
    assert f"header = {str(header).lower()}\ndelimiter = {json.dumps(delimiter)}\n" in found
    assert ("the names below are private" in found) == header == ("by their places" not in found)


def test_json_rows_and_members_that_cannot_be_used(tmp_path: Path) -> None:
    rows = ['{"a": 1, "b": {"c": 1}, "y": "no", "": 1, "\\ud800": 1, "e": null}', '{"a": [], "y": "no"}', "[1]", "{"]
    rows += ['{"a": NaN}', '{"a": 2, "y": "yes"}', '{"a": 1.5, "y": "\\udc00"}', '{"y": "no"}']
    path = written(tmp_path / "t.jsonl", "\n".join(rows))
    text = draft(path)
    assert [column.name for column in parse_schema(text).columns] == ["a", "b", "y", "e"]
    assert of(text, "a") == number("1", "2", INDICATOR) and of(text, "b") == of(text, "e") == IGNORED
    assert f"# Rows that cannot be read: 5 syntax{P}\n" in text
    assert quarantined(parse_schema(text), path) == {"syntax": 6}  # one has a member without a name


def test_rows_with_stray_marks_may_want_line_feeds_in_cells(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", 'x,y\n1,no\n2,yes\n3,"no\nor yes"\n4,no,\n')
    told = f"# Rows that cannot be read: 2 quotes, 1 width. Cells that hold line feeds need multiline = true{P}\n"
    assert told in draft(path)


def test_rows_after_the_sample_count_for_nothing(tmp_path: Path) -> None:
    rows = [f"{i % 7},{'no' if i % 3 else 'yes'}" for i in range(peek.ROWS)]
    path = written(tmp_path / "t.csv", "\n".join(["x,y", *rows, "99,perhaps"]))
    text = draft(path)
    assert of(text, "x") == number("0", "6") and parse_schema(text).label.values == ("no", "yes")
    table = pa.table({"x": [i % 7 for i in range(peek.ROWS)] + [99], "y": ["a", "b"] * (peek.ROWS // 2) + ["c"]})
    pa.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=3_000)
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3_000)
    for name in ("t.parquet", "t.arrow"):
        text = draft(tmp_path / name)
        assert of(text, "x") == number("0", "6") and parse_schema(text).label.values == ("a", "b")


def test_the_last_of_the_columns_with_few_texts_and_no_missing_cells_is_the_label(tmp_path: Path) -> None:
    rows = [["no", "a", str(i / 8), "b"] for i in range(30)] + [["yes", "", "7", "b"]]
    head = ["p", "q", "r", "s"]
    path = written(tmp_path / "t.csv", "\n".join(map(",".join, [head, *rows])))
    assert parse_schema(draft(path)).label.name == "p"
    path = written(tmp_path / "u.csv", "\n".join(map(",".join, [head, *(["no", *row[1:]] for row in rows)])))
    text = draft(path)
    assert text.endswith(
        f'\n# No guess at the label: one column must have the type "label", or "target" if it has bounds{P}\n'
    )
    with pytest.raises(ArgumentError, match=r"label=\[\]: must be exactly one column"):
        parse_schema(text)
    schema = labelled(text)
    assert (schema.label.name, schema.label.type) == ("r", "target") and quarantined(schema, path) == {}


def test_other_files_are_read_for_their_columns_names_alone(tmp_path: Path) -> None:
    """Of any kind, in any order; empty ones, which Spark writes, are passed over."""
    files = [written(tmp_path / "a.csv", ""), written(tmp_path / "b.csv", "x,y\n"), tmp_path / "e.parquet"]
    files.insert(2, written(tmp_path / "c.csv", "x,y\n1,no\n2,yes\n"))
    files.insert(3, written(tmp_path / "d.csv", "y,x\nperhaps,1\n"))
    pa.parquet.write_table(pa.table({"y": ["perhaps"], "x": [9]}), files[-1])
    text = draft(*files)
    assert of(text, "x") == number("1", "2") and parse_schema(text).label.values == ("no", "yes")
    assert '10000 rows of "c.csv". Of other files, only' in text
    with pytest.raises(ArgumentError, match=r"column 'z' of z.csv='undeclared': must be in the schema"):
        draft(*files, written(tmp_path / "z.csv", "x,y,z\n1,no,2\n"))
    with pytest.raises(ArgumentError, match=r"column 'x' of z.csv='absent': must be there"):
        draft(*files, written(tmp_path / "z.csv", "y\nno\n"))


def test_categories_that_polars_writes_to_arrow_files(tmp_path: Path) -> None:
    """Of string_view; the contract's reader takes them, too."""
    towns = pa.DictionaryArray.from_arrays([0, 1, None], pa.array(["a", "b"], pa.string_view()))
    pa.feather.write_feather(pa.table({"x": towns, "y": ["no", "yes", "no"]}), tmp_path / "t.arrow")
    text = draft(tmp_path / "t.arrow")
    assert of(text, "x") == category('"a", "b", ""', '""')
    assert quarantined(parse_schema(text), tmp_path / "t.arrow") == {}


def test_names_of_files_that_are_no_unicode(tmp_path: Path) -> None:
    path = written(tmp_path / os.fsdecode(b"\xff'\"\n.csv"), "x,y\n1,no\n2,yes\n")
    assert parse_schema(draft(path)).name == "?'\"\n"


def doubled(path: Path) -> None:
    pa.parquet.write_table(pa.Table.from_arrays([pa.array([1, 2])] * 2, ["x", "x"]), path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", "", "a table with a row, below its header"),
        ("t.csv", "\ufeff\n\n", "a table with a row, below its header"),
        ("t.csv", "x,y\n", "a table with a row, below its header"),
        ("t.json", "", "a table with a row, below its header"),
        ("t.json", "{}\n{}\n", "a table with a row, below its header"),
        ("t.json", "[\n{},\n", "a table with rows that can be read, not 2 syntax"),
        ("t.csv", "x,y\n1\n2\n3,4,5\n", "a table with rows that can be read, not 3 width"),
        ("t.csv", 'x"x,y\n1,2\n', "a CSV file whose first row can be read"),
        ("t.csv", ",x,y\n0,1,2\n1,2,3\n", r"a CSV file whose first row names all columns, unlike \['', 'x', 'y'\]"),
        ("t.csv", "x\n1\n2\n", r"a table with two columns or more that vary and can be used: \['x'\]"),
        ("t.csv", "x,y\n1,2\n1,2\n", r"a table with two columns or more that vary and can be used: \[\]"),
        ("t.csv.gz", "x,y\n1,2\n", "a csv file that can be read"),
        ("t.parquet", "x,y\n1,2\n", "a parquet file that can be read"),
        ("t.arrow", "", "a arrow file that can be read"),
        ("t.parquet", doubled, "column 'x' of t.parquet='twice': must be there once"),
    ],
)
def test_tables_without_a_draft(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    content(path) if callable(content) else written(path, content)
    with pytest.raises(ArgumentError, match=message) as error:
        draft(path)
    assert "\n" not in str(error.value)


@needs_data
def test_a_draft_of_adult_keeps_to_what_is_public_of_it() -> None:
    """UCI's own files, against the contract that was written without looking at them."""
    public = parse_schema((resources.files("fastdp") / "datasets" / "adult.toml").read_text())
    for name in ("adult.data", "adult.test"):
        path = DATA / "adult" / name
        schema = parse_schema(draft(path))
        assert not schema.layout.header and schema.layout.nulls == ("", "?")
        assert schema.layout.comment == ("|" if name == "adult.test" else "")
        assert len(schema.columns) == len(public.columns) and schema.label.name == "column 15"
        for ours, known in zip(schema.columns, public.columns, strict=True):
            if known.type == "ignore":
                continue
            assert ours.type == known.type
            if known.spellings is None:
                assert known.bounds[0] <= ours.bounds[0] < ours.bounds[1] <= known.bounds[1]
            else:
                assert ours.spellings is not None and set(ours.spellings) <= set(known.spellings)
                assert (ours.missing is not None) == ("?" in ours.spellings)


@needs_data
@pytest.mark.parametrize(
    "file, label",
    [("adult/adult.data", "column 15"), ("census_income/train.csv.gz", "column 42"), ("fulton_pums", "englishability")],
)
def test_sampled_rows_of_real_tables_keep_their_draft(file: str, label: str, tmp_path: Path) -> None:
    path = next((DATA / file).glob("*.csv")) if (DATA / file).is_dir() else DATA / file
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        sampled = written(tmp_path / "t.csv", "".join(line for _, line in zip(range(peek.ROWS), lines, strict=False)))
    schema = parse_schema(draft(path))
    assert schema.label.name == label
    assert quarantined(schema, sampled) == {}
    assert draft(sampled).split("[file]")[1] == draft(path).split("[file]")[1]


TOKENS = ["", "?", "NA", "nan", "-", "inf", "0", "1", "true", "False", "-3.5", "1e400", "1e300", "9" * 30, "b a", "07"]
TEXT = st.one_of(st.sampled_from(TOKENS), st.sampled_from(TOKENS[:10]), st.text(max_size=4))
NUMBER = st.one_of(st.sampled_from(TOKENS[:8]), st.floats().map(repr), st.integers().map(str))


@st.composite
def tables(draw: Any) -> tuple[list[list[str]], str]:
    """Rows of one width, of columns that are alike within themselves, and a delimiter."""
    width, rows = draw(st.sampled_from([1, 2, 3, 4, 4])), draw(st.integers(0, 30))
    columns = []
    for _ in range(width):
        kind = draw(st.sampled_from([TEXT, NUMBER]))
        known = st.sampled_from(draw(st.lists(kind, min_size=1, max_size=30)))
        head = draw(st.one_of(TEXT, st.text("abcdefgh", min_size=1, max_size=3)))
        cells = draw(st.lists(known, min_size=rows, max_size=rows))
        if cells and draw(st.booleans()):
            cells[draw(st.integers(0, rows - 1))] = draw(TEXT)
        columns.append([head, *cells])
    return [list(row) for row in zip(*columns, strict=True)], draw(st.sampled_from(",;\t|"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(([["a", "b"], ["\x85x", "1"], ["\u180ey\x1f", "0"]], ","))
@example(([["a", "b"], ["\x1c", "1"], ["x", "0"]], ","))
@given(tables())
def test_any_csv_file_has_a_draft_that_its_rows_keep_or_an_error_of_one_line(
    tmp_path_factory: pytest.TempPathFactory, table: tuple[list[list[str]], str]
) -> None:
    rows, delimiter = table
    path = tmp_path_factory.mktemp("any") / "t.csv"
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)
    try:
        text = draft(path)
    except ArgumentError as error:
        assert "\n" not in str(error)
        return
    schema = labelled(text)
    found = quarantined(schema, path)
    unread = re.search(r"cannot be read: ([\w ,]*\w)", text)
    told = {why: int(n) for n, why in (each.split() for each in unread[1].split(", "))} if unread else {}
    if 'type = "label"' not in text:
        found.pop("missing", 0)  # of a column that was made the label although it has such
    assert ("are errors; there are some" in text) == (found.pop("number", 0) > 0)
    assert found == told
    unmarked = ("# a guess", "header = ", "delimiter = ", "comment = ", "[[column]]", "name = ")
    for line in filter(None, text.split("[file]")[1].splitlines()):
        assert line.endswith(P) != line.startswith(unmarked)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "t.csv"
    path.write_bytes(data)
    try:
        labelled(draft(path))
    except ArgumentError as error:
        assert "\n" not in str(error)


def test_the_job_drafts_without_java_or_spark(tmp_path: Path) -> None:
    """To standard output, or to a file that is not there yet."""
    raw = tmp_path / "raw" / "deep"
    raw.mkdir(parents=True)
    written(raw / "loans.csv", LOANS)
    written(tmp_path / "pyspark.py", "raise ImportError('Spark')")
    environment = {**os.environ, "JAVA_HOME": "/none", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(JOB), "--suggest", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=60)

    expected = DRAFT.replace('"loans.csv"', '"deep/loans.csv"')
    done = run("--input", "raw")
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
    done = run("--input", "raw/*/*.csv", "--config", "s.toml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "s.toml").read_text(encoding="utf-8") == DRAFT
    written(tmp_path / "s.toml", "mine")
    done = run("--input", "raw", "--config", "s.toml")
    assert (done.returncode, done.stdout) == (2, "") and (tmp_path / "s.toml").read_text() == "mine"
    assert done.stderr == (
        "prepare: error: config='s.toml': must be a file that does not exist yet: the draft overwrites none\n"
    )
    done = run("--input", "raw", "--output", "o")
    assert (done.returncode, done.stdout) == (2, "") and "output='o': must be left out" in done.stderr


@pytest.mark.parametrize("given, message", [([], "config=None"), (["--config", "s.toml"], "output=None")])
def test_without_suggest_the_job_needs_a_contract_and_a_folder(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(JOB.parent)
    import prepare

    written(tmp_path / "s.toml", DRAFT)
    assert prepare.main(["--input", "loans.csv", *given]) == 2
    assert f"prepare: error: {message}: must be a" in capsys.readouterr().err
