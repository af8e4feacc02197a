"""Files in pieces: every kind of file, and every cut of it, gives the same rows; what is no such table is refused."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from raw_tables import HOSTILE, NAMES, WRITERS, contract, joined, plain_table, refine, write_csv
from test_csvrows import oracle

from fastdp import arrowfiles, csvrows, pieces
from fastdp.errors import ArgumentError
from fastdp.schema import parse_schema


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


def test_files_that_are_said_to_be_test_rows_are(tmp_path: Path) -> None:
    path = write_csv(plain_table(50), tmp_path / "t.csv")
    for split in ("train", "test"):
        schema = parse_schema(contract(test=0.5))
        (piece,) = pieces.cut(pieces.source(path, "t.csv", split), schema)
        (part,) = pieces.refined(piece, schema)
        there, empty = (part.train, part.test) if split == "train" else (part.test, part.train)
        assert len(there) == 50 - part.quarantined > 0 == len(empty)


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
            patch.setattr(arrowfiles, "ENCODED_BYTES", encoded)
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
        monkeypatch.setattr(arrowfiles, "ENCODED_BYTES", encoded)
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
