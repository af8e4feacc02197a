"""Of each user the same few records are kept, and all in one split, however the table is cut and ordered."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdp import arrowfiles, pieces, prepared, shards, statistics, transform, users
from fastdp.errors import ArgumentError
from fastdp.schema import parse_schema

CONTRACT = """
format = 1
name = "visits"
[prepare]
test = 0.4
{prepare}
[[column]]
name = "who"
type = "user"
[[column]]
name = "length"
type = "number"
bounds = [0, 10]
missing = "mean"
[[column]]
name = "kind"
type = "category"
values = ["a", "b", "c"]
[[column]]
name = "back"
type = "label"
values = ["0", "1"]
[statistics.length]
mean = 0.25
"""

Row = tuple[str, float | None, str, str]
ROWS = st.lists(
    st.tuples(
        st.sampled_from([f"user {i}" for i in range(12)]),
        st.none() | st.sampled_from([0.0, -0.0, 1.5, 10.0, 12.0]),
        st.sampled_from("abc"),
        st.sampled_from("01"),
    ),
    min_size=1,
    max_size=60,
)


def contract(most: int = 1) -> str:
    unit = "" if most == 1 else f'privacy_unit = "record"\nrecords_per_user = {most}'
    return CONTRACT.format(prepare=unit)


def write(path: Path, rows: list[Row]) -> Path:
    lines = [f"{who},{'' if length is None else length},{kind},{back}\n" for who, length, kind, back in rows]
    path.write_text("who,length,kind,back\n" + "".join(lines))
    return path


def records(path: Path, text: str, split: Any, output: Path) -> list[pa.RecordBatch]:
    """Of all pieces of a file."""
    schema = parse_schema(text)
    shards.begin(output)
    cut = pieces.cut(pieces.source(path, path.name, split), schema)
    return [batch for piece in cut for batch in pieces.records(piece, schema, output)]


def together(batches: list[pa.RecordBatch], draw: random.Random) -> Iterator[pa.RecordBatch]:
    """As Spark brings them together: sorted by everything, nulls first, and cut anywhere."""
    rows = [row for batch in batches for row in batch.to_pylist()]
    draw.shuffle(rows)
    rows.sort(key=lambda row: tuple((row[name] is not None, row[name]) for name in list(row)[:-1]))
    whole = pa.RecordBatch.from_pylist(rows, batches[0].schema)
    start = 0
    while start < len(rows):
        size = draw.randint(0, 5)  # empty ones, too
        yield whole.slice(start, size)
        start += size


def kept(batches: list[pa.RecordBatch], text: str, by_hash: bool, seed: int = 0) -> tuple[list[Any], dict[str, int]]:
    """(held out, length, kind, back) of the records, and what was told, added up."""
    schema = parse_schema(text)
    found: list[Any] = []
    told: dict[str, int] = defaultdict(int)
    for batch in users.keep(together(batches, random.Random(seed)), schema, by_hash):
        is_row = batch["result"].is_null()
        for text_of_one in batch["result"].filter(batch["result"].is_valid()).to_pylist():
            for name, count in json.loads(text_of_one)["result"].items():
                told[name] += count if isinstance(count, int) else sum(count.values())
        values = users.unpacked(batch["record"].filter(is_row), schema)
        held_out = batch["held_out"].filter(is_row).to_pylist()
        cells = [[None if v != v else v for v in values[name].tolist()] for name in ("length", "kind", "back")]
        found += zip(held_out, *cells, strict=True)
    return sorted(found, key=str), told


def as_parsed(row: Row) -> tuple[Any, ...]:
    return row[1] if row[1] is None else row[1] + 0.0, "abc".index(row[2]), int(row[3])


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 3), st.integers(0, 2**32))
def test_each_user_has_some_of_his_records_in_one_split(tmp_path_factory, rows, most, seed) -> None:
    folder = tmp_path_factory.mktemp("t")
    batches = records(write(folder / "t.csv", rows), contract(most), None, folder / "out")
    found, told = kept(batches, contract(most), True, seed)
    mine: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        mine[row[0]].append(as_parsed(row))
    assert told["rows"] == len(rows) == len(found) + told["surplus"]
    assert len(found) == sum(min(most, len(some)) for some in mine.values())
    # Of one user's records alone come the same ones: no other user decides (the promise that makes epsilon user-level).
    alone: list[Any] = []
    for who, some in mine.items():
        batches = records(
            write(folder / "one.csv", [row for row in rows if row[0] == who]), contract(most), None, folder / "out"
        )
        his, _ = kept(batches, contract(most), True, seed + 1)
        assert len({held_out for held_out, *_ in his}) == 1
        left = list(some)
        for _, *values in his:
            left.remove(tuple(values))  # raises if it is none of his
        alone += his
    assert sorted(alone, key=str) == found


def test_a_share_of_the_users_is_held_out(tmp_path: Path) -> None:
    rows: list[Row] = [(f"{i}", 1.0, "a", "1") for i in range(4000) for _ in range(2)]
    found, told = kept(records(write(tmp_path / "t.csv", rows), contract(), None, tmp_path / "out"), contract(), True)
    assert told["surplus"] == 4000 == len(found)
    assert abs(sum(held_out for held_out, *_ in found) - 1600) < 4 * np.sqrt(4000 * 0.4 * 0.6)


MANY: list[Row] = [(f"{i % 50}", float(i * 7 % 11), "abc"[i * 5 % 3], "01"[i // 7 % 2]) for i in range(400)]


def test_what_is_kept_hangs_on_the_key_and_not_on_the_place(tmp_path: Path) -> None:
    found = []
    for name, rows, key in (("a", MANY, "one"), ("b", MANY[::-1], "one"), ("c", MANY, "two")):
        text = contract().replace("[prepare]", f'[prepare]\nkey = "{key}"')
        (tmp_path / name).mkdir()
        found.append(kept(records(write(tmp_path / name / "t.csv", rows), text, None, tmp_path / "out"), text, True)[0])
    assert found[0] == found[1]
    of_one, of_two = (sorted(row[1:] for row in rows) for rows in (found[0], found[2]))
    assert of_one != of_two


def test_which_users_are_held_out_hangs_on_the_key(tmp_path: Path) -> None:
    rows: list[Row] = [(f"{i}", float(i % 7), "a", "1") for i in range(300)]
    chosen = []
    for key in ("one", "two"):
        schema = parse_schema(contract().replace("[prepare]", f'[prepare]\nkey = "{key}"'))
        chosen.append([users._is_held_out(who.encode(), schema) for who, *_ in rows])
    assert chosen[0] != chosen[1] and 60 < sum(chosen[0]) < 180


def test_sums_are_of_the_training_rows_that_are_kept(tmp_path: Path) -> None:
    text = contract().replace("[statistics.length]\nmean = 0.25\n", "").replace("[prepare]", STATS)
    schema = parse_schema(text)
    batches = records(write(tmp_path / "t.csv", MANY), text, None, tmp_path / "out")
    frames = users.keep(together(batches, random.Random(3)), schema, True)
    told = [json.loads(each)["result"] for batch in users.sums(frames, schema) for each in batch["result"].to_pylist()]
    lengths = [min(row[1], 10.0) / 10 for row in kept(batches, text, True)[0] if not row[0]]
    (sums,) = [each["sums"] for each in told if "sums" in each]
    assert sums["length"][0] == len(lengths) * statistics.GRID and 0 < len(lengths) < 50
    assert sums["length"][1] == pytest.approx(sum(lengths) * statistics.GRID, abs=50)
    assert sum(each.get("surplus", 0) for each in told) == 350 and sum(each.get("rows", 0) for each in told) == 400


STATS = '[prepare]\nstats = "non-private"'


def test_users_of_test_files_are_held_out_wholly(tmp_path: Path) -> None:
    trained = write(tmp_path / "a.csv", [("x", 1.0, "a", "0"), ("x", 2.0, "a", "0"), ("y", 3.0, "b", "0")])
    held_out = write(tmp_path / "b.csv", [("x", 4.0, "c", "1"), ("z", 5.0, "c", "1")])
    text = contract()
    batches = records(trained, text, "train", tmp_path / "out") + records(held_out, text, "test", tmp_path / "out")
    found, told = kept(batches, text, False)
    assert found == [(False, 3.0, 1, 0), (True, 4.0, 2, 1), (True, 5.0, 2, 1)] and told["surplus"] == 2


def test_a_test_row_that_cannot_be_used_holds_its_user_out_too(tmp_path: Path) -> None:
    """But no training row does."""
    bad: Row = ("u", 1.0, "nothing", "0")
    trained = write(tmp_path / "a.csv", [*((who, 1.0, "a", "0") for who in "uvwxyz"), bad])
    held_out = tmp_path / "b.csv"
    held_out.write_text("who,length,kind,back\nx,4,c,\nz,5,nothing,1\nz,5,c,0\n ,5,c,9\n")
    for most in (1, 2):
        text = contract(most)
        batches = records(trained, text, "train", tmp_path / "out") + records(held_out, text, "test", tmp_path / "out")
        for seed in range(5):  # cut elsewhere
            found, told = kept(batches, text, False, seed)
            assert [row[1] for row in found if not row[0]] == [1.0] * 4
            assert told["rows"] == 11 == len(found) + told["reasons"] + told["surplus"]
            assert sorted(row[1] for row in found if row[0]) == ([1.0, 5.0] if most == 1 else [1.0, 1.0, 5.0])


def test_users_in_json_are_texts_or_integers(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    names = ("7", '"7"', "7.0", "true", "1e400", "null", '"x"')
    path.write_text("".join(f'{{"who": {who}, "length": 1, "kind": "a", "back": 1}}\n' for who in names))
    *batches, last = records(path, contract(), None, tmp_path / "out")
    assert [who for batch in batches for who in batch["user"].to_pylist()] == [b"7", b"7", b"x"]
    told = json.loads(last["result"][0].as_py())["result"]
    assert told == {"rows": 7, "reasons": {"syntax": 3, "missing": 1}}


def test_rows_of_nobody_go_to_quarantine(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [("x", 1.0, "a", "0"), ("", 1.0, "a", "0"), (" ", 1.0, "z", "0")])
    *_, last = records(path, contract(), None, tmp_path / "out")
    assert json.loads(last["result"][0].as_py()) == {"result": {"rows": 3, "reasons": {"missing": 2}}}
    bad = pa.ipc.open_file(tmp_path / "out" / "private" / "part-00000.arrow").read_all()
    assert bad["column"].to_pylist() == ["who", "who"]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (pa.array(["7", " 7", "x"]), [b"7", b"7", b"x"]),
        (pa.array([7, 7, 8], pa.int64()), [b"7", b"7", b"8"]),
        (pa.array(["a", "a", "b"]).dictionary_encode(), [b"a", b"a", b"b"]),
        (pa.array(["a", "a", "b"], pa.string_view()), [b"a", b"a", b"b"]),
        (pa.array([1.0, 1.0, 2.0]), None),
    ],
)
def test_users_in_typed_columns(names: pa.Array, wanted: list[bytes] | None) -> None:
    rest = {"length": [1.0] * 3, "kind": ["a"] * 3, "back": [0, 1, 1]}
    batch = pa.RecordBatch.from_pydict({"who": names, **rest})
    source = transform.Source("t", "t", "arrow", False, 0, 0, None)
    if wanted is None:
        with pytest.raises(ArgumentError, match="type of column 'who'='double': must be texts or integers"):
            transform.of_columns(batch, source, 0, parse_schema(contract()))
    else:
        assert transform.of_columns(batch, source, 0, parse_schema(contract())).users.to_pylist() == wanted


def one_batch(batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.Table.from_batches(list(batches)).combine_chunks().to_batches()[0]


def test_written_files_hold_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing number is filled in last, by the statistic; rows of both splits, over several batches."""
    text = contract(2)
    rows: list[Row] = [(f"{i % 40}", None if i % 3 else 2.5, "abc"[i % 3], "01"[i % 2]) for i in range(100)]
    schema, output = parse_schema(text), tmp_path / "out"
    batches = records(write(tmp_path / "t.csv", rows), text, None, output)
    told = []
    monkeypatch.setattr(arrowfiles, "ENCODED_BYTES", 100)  # some rows at once
    frames = users.keep(iter([one_batch(together(batches, random.Random(0)))]), schema, True)
    for batch in users.write(frames, 3, schema, output):
        told += [json.loads(each)["result"] for each in batch["result"].to_pylist()]
    shards.finish(output, schema, shards.Origin(text, "", {}, "rows"), told, None)
    manifest = shards.read_manifest(output)
    assert manifest["privacy_unit"] == "record" and manifest["rows"]["surplus"] == 20
    found = []
    for split in arrowfiles.SPLITS:
        table = pa.ipc.open_file(output / split / "part-00003.arrow").read_all()
        found += [(split == "test", *x, y) for x, y in zip(*map(pa.ChunkedArray.to_pylist, table.columns), strict=True)]
    kept_rows, _ = kept(batches, text, True)
    wanted = [
        (held_out, 0.25 if length is None else length / 10, *(float(kind == k) for k in range(3)), back)
        for held_out, length, kind, back in kept_rows
    ]
    assert sorted(found) == sorted(wanted) and len(found) == 80
    table = prepared.load(output)
    assert table.unit == "record" and any(line.startswith("record-level: epsilon") for line in table.assumptions)


def test_a_table_says_that_users_are_protected(tmp_path: Path) -> None:
    schema, output = parse_schema(contract()), tmp_path / "out"
    batches = records(write(tmp_path / "t.csv", MANY), contract(), None, output)
    frames = users.keep(together(batches, random.Random(0)), schema, True)
    told = [batch["result"].to_pylist() for batch in users.write(frames, 0, schema, output)]
    done = [json.loads(each)["result"] for some in told for each in some]
    shards.finish(output, schema, shards.Origin(contract(), "", {}, "rows"), done, None)
    table = prepared.load(output)
    assert table.unit == "user" and "a user is protected: the table has one record of each" in table.assumptions
    assert len(table.train_labels) + len(table.test_labels) == 50 and table.prior == {}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        ("records_per_user = 3", "prepare.privacy_unit='user': must be 'record': with records_per_user = 3"),
        ('records_per_user = 3\nprivacy_unit = "user"', "prepare.privacy_unit='user': must be 'record'"),
        ('privacy_unit = "record"', "prepare.privacy_unit='record': must be 'user'"),
        ("records_per_user = 0", "prepare.records_per_user=0: must be an integer >= 1"),
        ("records_per_user = true", "prepare.records_per_user=True: must be an integer >= 1"),
    ],
)
def test_user_level_protection_is_refused_for_several_records(prepare: str, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        parse_schema(CONTRACT.format(prepare=prepare))
    assert str(error.value).startswith(message)
    without = CONTRACT.format(prepare='privacy_unit = "user"').replace('type = "user"', 'type = "ignore"')
    with pytest.raises(ArgumentError, match="absent: no column has the type user"):
        parse_schema(without)
