"""Prepared tables on disk: aligned, private, whole or refused, and read without a copy."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_tables import source

from fastdp import arrowfiles, data, prepared, shards
from fastdp.columns import Batch
from fastdp.errors import ArgumentError
from fastdp.schema import parse_schema
from fastdp.stacked import Stacked

FEATURE = '[[column]]\nname = "x{}"\ntype = "number"\nbounds = [0, 1]\n'
CODE = '[[column]]\nname = "c{}"\ntype = "category"\nvalues = ["a", "b"]\nencode = "code"\n'
LABEL = '[[column]]\nname = "y"\ntype = "label"\nvalues = ["0", "1"]\n'
USER = '[[column]]\nname = "u"\ntype = "user"\n'
TARGET = '[[column]]\nname = "y"\ntype = "target"\nbounds = [0, 1]\n'


def contract(features: int = 3, codes: int = 2, label: str = LABEL, size_is_public: bool = False) -> str:
    head = f'format = 1\nname = "t"\nsize_is_public = {str(size_is_public).lower()}\n'
    return head + "".join([*map(FEATURE.format, range(features)), *map(CODE.format, range(codes)), label])


def batch(rows: int, text: str, seed: int = 0) -> Batch:
    schema, draw = parse_schema(text), np.random.default_rng(seed)
    labels = draw.random(rows, np.float32) if schema.label.type == "target" else draw.integers(0, 2, rows)
    features = draw.random((rows, len(schema.feature_names)), np.float32)
    return Batch(features, draw.integers(0, 2, (rows, len(schema.coded)), np.int32), labels)


def bad_rows(rows: int) -> pa.RecordBatch:
    values = [["t.csv"] * rows, [*range(rows)], ["number"] * rows, ["x0"] * rows, [b"a secret"] * rows]
    layout = arrowfiles.quarantine_layout()
    return pa.record_batch([pa.array(v, f.type) for v, f in zip(values, layout, strict=True)], layout)


def write_table(folder: Path, text: str, train: list[list[Batch]], test: list[Batch] | None = None) -> Path:
    """A part for each list of train, which are its batches; all test rows in part 0."""
    shards.begin(folder)
    written = []
    for number, batches in enumerate(train):
        held_out = (test or [batch(5, text, 99)]) if number == 0 else []
        with arrowfiles.SplitWriter(folder, f"part-{number:05d}.arrow", parse_schema(text)) as writer:
            for split, parts in (("train", batches), ("test", held_out)):
                for part in parts:
                    writer.add(split, part)
            writer.add_bad(bad_rows(2))
        rows = sum(map(len, [*batches, *held_out])) + 2
        written.append({"rows": rows, "reasons": {"number": 2}, **writer.written()})
    origin = shards.Origin(text, "sha-of-input", {"fastdp": "1"}, "rows held out")
    shards.finish(folder, parse_schema(text), origin, written, None)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = contract()
    return write_table(tmp_path / "t", text, [[batch(7, text, 1)], [], [batch(1, text, 2), batch(64, text, 3)]])


@pytest.mark.parametrize("features, codes, label", [(3, 2, LABEL), (1, 0, TARGET), (0, 1, LABEL), (510, 7, TARGET)])
def test_what_was_written_is_read_and_every_buffer_is_aligned(
    features: int, codes: int, label: str, tmp_path: Path
) -> None:
    text = contract(features, codes, label)
    sizes = [[1], [3, 17, 0, 64], [], [1000]]
    train = [[batch(n, text, 10 * i + n) for n in each] for i, each in enumerate(sizes)]
    path = write_table(tmp_path / "t", text, train)
    assert sorted(p.name for p in (path / "train").iterdir()) == [f"part-0000{i}.arrow" for i in (0, 1, 3)]
    table = prepared.load(path, verify=True)
    flat = [b for part in train for b in part]
    for found, field in ((table.train_features, "features"), (table.train_labels, "labels")):
        assert torch.equal(
            found[torch.arange(1085)], torch.from_numpy(np.concatenate([getattr(b, field) for b in flat]))
        )
    codes_of = table.train_categories
    assert (codes_of is None) == (codes == 0)
    if codes_of is not None:
        assert torch.equal(codes_of[torch.arange(1085)], torch.from_numpy(np.concatenate([b.categories for b in flat])))
        assert codes_of.dtype == torch.int32 and table.category_sizes == (2,) * codes
    for file in path.glob("t*/*.arrow"):
        content = pa.py_buffer(file.read_bytes())
        opened = pa.ipc.open_file(content)
        for i in range(opened.num_record_batches):
            for column in opened.get_batch(i).columns:
                for buffer in column.buffers():
                    offset = 0 if buffer is None or not buffer.size else buffer.address - content.address
                    assert offset % arrowfiles.ALIGNMENT == 0, file


def mappings() -> dict[tuple[int, int], str]:
    """Address ranges of this process that are files."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = [(line[0].split("-"), line[5]) for line in lines if len(line) == 6]
    return {(int(a, 16), int(b, 16)): name for (a, b), name in ends}


def test_tensors_are_the_files_pages_and_the_files_stay_as_they_are(folder: Path) -> None:
    table = prepared.load(folder)
    found = mappings()
    for stack in (table.train_features, table.train_labels, table.train_categories, table.test_features):
        assert isinstance(stack, Stacked)
        for part in stack.parts:
            assert part.data_ptr() % arrowfiles.ALIGNMENT == 0
            (name,) = (n for (a, b), n in found.items() if a <= part.data_ptr() and part.data_ptr() + part.nbytes <= b)
            assert name.startswith(str(folder))
    before = {path: path.read_bytes() for path in folder.glob("t*/*.arrow")}
    assert isinstance(table.train_features, Stacked)
    table.train_features.parts[0].fill_(7)
    assert {path: path.read_bytes() for path in before} == before
    prepared.load(folder, verify=True)


GROWTH = """
import sys, torch
from pathlib import Path
def resident(key):
    lines = Path('/proc/self/status').read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
import pyarrow as pa
from fastdp import prepared
torch.randn(10).argsort()
before = resident('VmRSS')
table = prepared.load(Path(sys.argv[1]))
opened = resident('VmRSS')
anonymous = resident('RssAnon')
n = len(table.train_labels)
for step in range(20):
    ids = torch.randperm(n)[:256].sort().values
    rows = table.train_features[ids]
print(opened - before, resident('RssAnon') - anonymous, len(list(Path('/proc/self/fd').iterdir())))
"""


def test_opening_200_mb_takes_no_memory_and_reading_takes_a_batch(tmp_path: Path) -> None:
    """MiB, and no descriptor for each file: a process may have 1,024."""
    text = contract(500, 0)
    part = batch(4000, text)
    path = write_table(tmp_path / "t", text, [[part] for _ in range(25)])
    assert sum(f.stat().st_size for f in path.glob("train/*")) > 200e6
    done = subprocess.run([sys.executable, "-c", GROWTH, path], capture_output=True, text=True, check=True, timeout=100)
    opened, reading, descriptors = map(float, done.stdout.split())
    assert opened < 0.05 * 200 and reading < 8 and descriptors < 20  # a batch takes 0.5 MiB


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(sum),
    width=st.sampled_from([(), (3,), (2, 2), (0,), (100_000,)]),
    draw=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_stacks_are_indexed_like_one_tensor(sizes: list[int], width: tuple[int, ...], draw: st.DataObject) -> None:
    parts = [torch.randn(n, *width) for n in sizes]
    whole, stack = torch.cat(parts), Stacked(parts)
    ids = torch.tensor(draw.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=12)), dtype=torch.int64)
    for each in (ids, ids.sort().values, ids.sort(descending=True).values):
        assert torch.equal(stack[each], whole[each])
    assert len(stack) == len(whole) and stack.shape == whole.shape and stack.dtype == whole.dtype
    pieces = list(stack.split(2))
    assert torch.equal(torch.cat(pieces), whole) and max(map(len, pieces)) <= 2
    for outside in (-1, sum(sizes)):
        for each in (torch.tensor([outside]), torch.cat((ids, torch.tensor([outside]), ids))):
            with pytest.raises(IndexError):
                stack[each]


def test_only_the_owner_may_read_what_is_private(folder: Path) -> None:
    """Names and sizes of files are private too: they tell the number of rows. Only the summary is for others."""
    modes = {p.relative_to(folder).as_posix(): stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*")}
    assert {name for name in modes if modes[name] & 0o077} == {shards.SUMMARY}
    assert all(mode == (0o700 if name in shards.FOLDERS else 0o600) for name, mode in modes.items() if "su" not in name)


@pytest.mark.parametrize("public, users", [(False, False), (True, False), (True, True)])
def test_the_summary_holds_nothing_that_is_computed_from_records(public: bool, users: bool, tmp_path: Path) -> None:
    """Two tables of other rows have the same one, but for counts that are public: how many rows users have is not."""
    text = contract(size_is_public=public) + USER * users
    found = []
    for rows in (17, 40):
        path = write_table(tmp_path / str(rows), text, [[batch(rows, text)]])
        summary = json.loads((path / shards.SUMMARY).read_text())
        del summary["sha256"]
        assert "rows" not in summary and summary.pop("rows_read", None) == (rows + 7 if public and not users else None)
        found.append(summary)
        whole = json.loads((path / shards.MANIFEST).read_text())
        assert whole["rows"] == {"read": rows + 7, "train": rows, "test": 5, "bad": {"number": 2}, "surplus": 0}
    assert found[0] == found[1] and "sha-of-input" not in str(found) and "part-" not in str(found)


def altered(path: Path, change: Callable[[bytearray], Any]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def flip_a_value(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def cut_short(content: bytearray) -> None:
    del content[-1:]


def test_missing_shortened_and_altered_files_are_refused(folder: Path) -> None:
    part = folder / "train" / "part-00002.arrow"
    good = part.read_bytes()
    altered(part, cut_short)
    with pytest.raises(ArgumentError, match=rf"size of {part}={len(good) - 1}: must be {len(good)}"):
        prepared.load(folder)
    part.unlink()
    with pytest.raises(ArgumentError, match=rf"size of {part}=None"):
        prepared.load(folder)
    part.write_bytes(good)
    altered(part, flip_a_value)
    with pytest.raises(ArgumentError, match=rf"sha256 of {part}='\w{{64}}': must be \w{{64}}, as its manifest"):
        prepared.load(folder, verify=True)


def test_altered_headers_are_refused_and_never_read_past_the_end(folder: Path) -> None:
    """A thousand files with a few bytes changed: each is read or refused."""
    part, draw = folder / "train" / "part-00002.arrow", random.Random(0)
    good, refused = part.read_bytes(), 0
    for _ in range(1000):
        content = bytearray(good)
        for _ in range(draw.choice([1, 1, 4])):
            content[draw.randrange(len(good))] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        part.write_bytes(content)
        try:
            table = prepared.load(folder)
            table.train_features[torch.arange(72)].sum()
        except ArgumentError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 100 < refused < 1000


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda m: m["rows"].update(train=1), "unaltered"),
        (lambda m: m.update(format="fastdp shards 3"), "of the format 'fastdp shards 2'"),
        (lambda m: m.pop("sha256"), "manifest.json can be read"),
        (lambda m: m.clear(), "manifest.json can be read"),
        (lambda m: m["files"]["train"].pop(), "unaltered"),
    ],
)
def test_altered_manifests_are_refused(change: Callable[[Any], Any], match: str, folder: Path) -> None:
    manifest = json.loads((folder / shards.MANIFEST).read_text())
    change(manifest)
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArgumentError, match=match):
        prepared.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '"sha256"', "null", "\0"])
def test_manifests_that_are_none_are_refused(text: str, folder: Path) -> None:
    (folder / shards.MANIFEST).write_text(text)
    with pytest.raises(ArgumentError, match=r"manifest\.json can be read"):
        prepared.load(folder)


def test_files_of_another_table_are_refused(folder: Path, tmp_path: Path) -> None:
    """Of other columns; of fewer rows; no table at all."""
    ours = folder / "train" / "part-00000.arrow"
    text = contract(2, 2)
    other = write_table(tmp_path / "o", text, [[batch(7, text)]]) / "train" / ours.name
    manifest = json.loads((folder / shards.MANIFEST).read_text())
    for content, match in (
        (other.read_bytes(), "columns of .*part-00000"),
        (b"none", "an Arrow file that can be read"),
    ):
        ours.write_bytes(content)
        manifest["files"]["train"][0]["bytes"] = len(content)
        (folder / shards.MANIFEST).write_bytes(shards._json(manifest))
        with pytest.raises(ArgumentError, match=match):
            prepared.load(folder)


WRITES = """
import sys
sys.path.insert(0, sys.argv[1])
from test_shards import *
text = contract()
shards.begin(Path(sys.argv[2]))
with arrowfiles.SplitWriter(Path(sys.argv[2]), "part-00000.arrow", parse_schema(text)) as writer:
    while True:
        writer.add("train", batch(1000, text))
        print("more", flush=True)
"""


def test_a_killed_writer_leaves_no_readable_half(tmp_path: Path) -> None:
    path, here = tmp_path / "t", str(Path(__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", WRITES, here, path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(20):
        assert process.stdout.readline() == b"more\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    (path / ".manifest.json.partial").write_text("half of one")
    assert not [p for p in path.rglob("*") if p.is_file() and p.name[0] != "."]
    assert list(path.glob("train/.*.partial")) and not prepared.is_prepared(path)
    text = contract()
    origin = shards.Origin(text, "sha-of-input", {}, "")
    assert not shards.is_done(path, origin)
    with pytest.raises(ArgumentError, match=r"data=.*a whole prepared table: .* was cut off, run it again"):
        data.load(str(path))
    write_table(path, text, [[batch(3, text)]])
    with pytest.raises(ArgumentError, match=r"schema='s.toml': .*: it is for files, and a prepared table has its own"):
        data.load(str(path), "s.toml")
    assert not list(path.rglob("*.partial")) and len(prepared.load(path, verify=True).train_labels) == 3
    assert shards.is_done(path, origin)
    for other in (dataclasses.replace(origin, input="another"), dataclasses.replace(origin, config=contract(1))):
        with pytest.raises(ArgumentError, match=r"output=.*a new folder: it holds a table of another"):
            shards.is_done(path, other)


def test_nothing_of_a_killed_run_is_left(tmp_path: Path) -> None:
    """No summary of a table that there is not."""
    shards.begin(tmp_path)
    for name in (shards.SUMMARY, *shards.PARTIALS):
        (tmp_path / name).touch()
    shards.begin(tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [shards.MARKER]


def test_a_fingerprint_is_of_all_that_makes_another_table() -> None:
    """But not of where the input lies."""
    changes: list[dict[str, Any]] = [{}, {"name": "u"}, {"bytes": 1}, {"changed": 1}, {"split": "train"}]
    found = [shards.fingerprint([dataclasses.replace(source(), **change)]) for change in changes]
    assert len(set(found)) == len(changes)
    assert shards.fingerprint([dataclasses.replace(source(), path="/u")]) == found[0]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    text = contract()
    shards.begin(tmp_path)
    with pytest.raises(KeyError), arrowfiles.SplitWriter(tmp_path, "part-00000.arrow", parse_schema(text)) as writer:
        writer.add("train", batch(3, text))
        raise KeyError
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [shards.MARKER]


def test_writers_of_one_part_do_not_disturb_each_other(tmp_path: Path) -> None:
    """As when Spark begins a task anew whose machine it has lost."""
    text = contract()
    shards.begin(tmp_path)
    rows = [batch(100, text, i) for i in range(4)]
    writers = [arrowfiles.SplitWriter(tmp_path, "part-00000.arrow", parse_schema(text)) for _ in range(2)]
    for writer in writers:
        writer.__enter__()
    for part, writer in itertools.product(rows, writers):
        writer.add("train", part)
        writer.add_bad(bad_rows(1))
    for writer in writers:
        writer.__exit__(None, None, None)
    first, second = (writer.written()["train"] for writer in writers)
    assert first["rows"] == 400 and first == second
    shards.check_files(tmp_path, {"files": {"train": [first], "test": []}}, sums=True)


def test_a_folder_is_for_one_job_and_not_for_others_files(tmp_path: Path) -> None:
    with shards.locked(tmp_path / "t"):
        with pytest.raises(ArgumentError, match="no other job writes"), shards.locked(tmp_path / "t"):
            pass
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with shards.locked(tmp_path / "t"):
        pass
    (tmp_path / "t" / "notes.txt").touch()
    with pytest.raises(ArgumentError, match="empty or does not exist"):
        shards.is_done(tmp_path / "t", shards.Origin("", "", {}, ""))


def test_a_table_without_training_or_test_rows_is_refused(tmp_path: Path) -> None:
    text = contract()
    with pytest.raises(ArgumentError, match="no row to train on"):
        write_table(tmp_path / "a", text, [[]])
    assert not (tmp_path / "a" / shards.MANIFEST).exists()
    path = write_table(tmp_path / "b", text, [[batch(3, text)]], [batch(0, text)])
    with pytest.raises(ArgumentError, match="a table with test rows"):
        prepared.load(path)


def test_rows_that_are_lost_are_noticed(tmp_path: Path) -> None:
    text = contract()
    with pytest.raises(AssertionError, match="rows were lost: 3 read"):
        each = {"rows": 3, "reasons": {"number": 2}}
        shards.finish(tmp_path, parse_schema(text), shards.Origin(text, "", {}, ""), [each], None)


def test_a_table_is_whole_only_with_its_files_and_without_what_killed_workers_left(tmp_path: Path) -> None:
    text = contract()
    path = write_table(tmp_path / "a", text, [[batch(3, text)]])
    (path / "train" / ".part-00009.arrow.0123.partial").write_text("rows")
    files = shards.read_manifest(path)["files"]
    written = [{"rows": 3, "train": files["train"][0]}, {"rows": sum(f["rows"] for f in files["test"])}]
    written[1] |= {"test": files["test"][0]} if files["test"] else {}
    origin = shards.Origin(text, "", {}, "")
    shards.finish(path, parse_schema(text), origin, written, None)
    assert not list(path.rglob("*.partial"))
    shards.begin(tmp_path / "b")
    with pytest.raises(ArgumentError, match=r"size of .*part-00000.arrow=None"):
        shards.finish(tmp_path / "b", parse_schema(text), origin, written, None)
    assert not (tmp_path / "b" / shards.MANIFEST).exists()
