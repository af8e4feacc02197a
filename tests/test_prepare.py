"""The Spark job from raw files to a table that is trained on: against a loop over rows, killed, and on a cluster."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pyspark = pytest.importorskip("pyspark", reason="Spark is not installed: pip install 'fastdp[spark]'")
if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
    pytest.skip("Spark needs Java", allow_module_level=True)

from raw_tables import NAMES, WRITERS, contract, plain_table  # noqa: E402

from fastdp import arrowfiles, pieces, prepared, shards  # noqa: E402
from fastdp.errors import ArgumentError  # noqa: E402
from fastdp.schema import parse_schema  # noqa: E402

ROOT = Path(__file__).parents[1]
JOB = ROOT / "spark_jobs" / "prepare.py"
DATA = Path(os.environ.get("FASTDP_DATA", ""))
SPARK_HOME = Path(pyspark.__path__[0])

# What runs for seconds is not worth the work of the optimizing compiler, on two cores.
QUICK = {"JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC", "SPARK_LOCAL_IP": "127.0.0.1"}

USERS = """
format = 1
name = "visits"
size_is_public = true
[prepare]
stats = "STATS"
[[column]]
name = "who"
type = "user"
[[column]]
name = "length"
type = "number"
bounds = [0, 100]
standardize = true
[[column]]
name = "back"
type = "label"
values = ["0", "1"]
"""

COLUMNS = ["sex", "married", "black", "asian", "collegedegree", "employed", "militaryservice", "uscitizen"]
COLUMNS += ["disability", "englishability", "blackfemale", "targetted"]
ORIGINAL = """
format = 1
name = "original"
size_is_public = true
[file]
nulls = ["NA"]
[prepare]
split_by = "place"
"""
for name in COLUMNS:
    if name in ("blackfemale", "targetted"):
        ORIGINAL += f'[[column]]\nname = "{name}"\ntype = "ignore"\n'
    elif name == "employed":
        ORIGINAL += f'[[column]]\nname = "{name}"\ntype = "label"\nvalues = ["0", "1"]\n'
    else:
        ORIGINAL += f'[[column]]\nname = "{name}"\ntype = "boolean"\n'


def original_workload(path: Path, rows: int) -> Path:
    """As shared/peers/make_pums_csv.py writes it: the real rows drawn anew, 12 columns of 0 and 1, some NA."""
    draw = random.Random(0)
    with (DATA / "fulton_pums" / "FultonPUMS5full.csv").open() as file:
        real = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in draw.choices(real, k=rows):
            row["collegedegree"] = str(int(int(row["educ"]) >= 13))
            row["blackfemale"] = str(int(row["black"]) * int(row["sex"]))
            row["targetted"] = str(int(row["sex"] == "0" and row["employed"] == "1"))
            writer.writerow([
                "NA" if i < 10 and draw.random() < 0.002 else row[name] for i, name in enumerate(COLUMNS)
            ])  # fmt: skip
    return path


def row_loop(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """The seed's loader (shared/peers/preprocess_naive.py): features, labels and the number of rows with NA."""
    features, labels, bad = [], [], 0
    with path.open() as file:
        for row in list(csv.reader(file))[1:]:
            if "NA" in row[:10]:
                bad += 1
                continue
            features.append([int(v) for v in row[:5] + row[6:-2]])
            labels.append(int(row[5]))
    return np.array(features, np.float32), np.array(labels), bad


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The job's module, with a connection to Spark that all tests share; a worker finds the module too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(JOB.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        for name, value in QUICK.items():
            patch.setenv(name, value)
        patch.setenv("PYSPARK_SUBMIT_ARGS", "--master local[2] pyspark-shell")
        patch.setenv("SPARK_LOCAL_DIRS", str(tmp_path_factory.mktemp("spark")))
        patch.syspath_prepend(JOB.parent)
        import prepare

        with prepare.connected() as spark:
            assert spark.master == "local[2]"

            @contextmanager
            def shared() -> Iterator[Any]:
                yield spark

            patch.setattr(prepare, "connected", shared)
            yield prepare


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_of(table: Any, split: str) -> np.ndarray:
    features, labels = getattr(table, f"{split}_features"), getattr(table, f"{split}_labels")
    ids = torch.arange(len(labels))
    return np.column_stack([features[ids].numpy(), labels[ids].numpy()])


needs_data = pytest.mark.skipif(not DATA.name, reason="FASTDP_DATA is not set")


@needs_data
def test_the_original_workload_is_what_the_row_loop_makes(job: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """In one piece and in many; again it is done already; two runs give the same bytes."""
    path = original_workload(tmp_path / "pums.csv", 20_000)
    features, labels, bad = row_loop(path)
    job.prepare(ORIGINAL, [str(path)], [], tmp_path / "a")
    table = prepared.load(tmp_path / "a", verify=True)
    train, test = rows_of(table, "train"), rows_of(table, "test")
    whole = np.column_stack([features, labels])
    assert len(train) + len(test) == len(whole) and abs(len(test) / len(whole) - 0.2) < 0.02
    order = np.lexsort(whole.T), np.lexsort(np.concatenate([train, test]).T)
    np.testing.assert_array_equal(np.concatenate([train, test])[order[1]], whole[order[0]])
    manifest = json.loads((tmp_path / "a" / shards.MANIFEST).read_text())
    assert manifest["rows"] == {
        "read": 20_000,
        "train": len(train),
        "test": len(test),
        "bad": {"missing": bad},
        "surplus": 0,
    }
    # rows keep their order: the training rows are a subsequence of the loop's
    iterator = iter(map(tuple, whole.tolist()))
    assert all(row in iterator for row in map(tuple, train.tolist()))
    before = contents(tmp_path / "a")
    assert "is there already" in job.prepare(ORIGINAL, [str(path)], [], tmp_path / "a")
    job.prepare(ORIGINAL, [str(path)], [], tmp_path / "b")
    assert contents(tmp_path / "a") == before == contents(tmp_path / "b")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 40_000)
    job.prepare(ORIGINAL, [str(path)], [], tmp_path / "c")
    cut = prepared.load(tmp_path / "c", verify=True)
    assert len(list((tmp_path / "c" / "train").iterdir())) > 5
    for split, rows in (("train", train), ("test", test)):
        np.testing.assert_array_equal(rows_of(cut, split), rows)


def test_a_folder_of_every_kind_of_file_is_one_table(job: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Under equal names in other folders, with what Spark leaves beside files; and test rows from their own."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3_000)
    rows = plain_table(600)
    for i, (name, write) in enumerate(WRITERS.items()):
        folder = tmp_path / "raw" / f"day={i}"
        folder.mkdir(parents=True)
        write(rows[100 * i : 100 * (i + 1)], folder / name)
        (folder / "_SUCCESS").touch()
        (folder / f".{name}.crc").write_text("no table")
    WRITERS["t.csv"](rows, tmp_path / "all.csv")
    text = contract(test=0.2)
    job.prepare(text, [str(tmp_path / "raw")], [], tmp_path / "a")
    job.prepare(text, [str(tmp_path / "all.csv")], [], tmp_path / "b")
    found, wanted = (prepared.load(tmp_path / n, verify=True) for n in "ab")
    for split in arrowfiles.SPLITS:
        np.testing.assert_array_equal(rows_of(found, split), rows_of(wanted, split))
    bad = [json.loads((tmp_path / n / shards.MANIFEST).read_text())["rows"]["bad"] for n in "ab"]
    assert bad[0] == bad[1] and set(bad[0]) == {"missing", "unknown"}
    pattern = str(tmp_path / "raw" / "day=[12345]" / "t.*")
    job.prepare(text, [str(tmp_path / "raw" / "day=0")], [pattern], tmp_path / "c")
    divided = prepared.load(tmp_path / "c")
    assert len(divided.train_labels) + len(divided.test_labels) == len(found.train_labels) + len(found.test_labels)
    assert len(divided.train_labels) <= 100 and shards.FILES in divided.evaluation
    with pytest.raises(ArgumentError, match=r"input='.*t\.csv': must be of another name"):
        (tmp_path / "raw" / "t.csv").write_bytes(b"")
        job.list_sources([str(tmp_path / "raw" / "t.csv"), str(tmp_path / "raw" / "day=0")], "input", None)


def test_users_and_statistics(job: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Over several files, pieces and partitions: a record of each user, and the exact statistics of the training rows.

    What was released before the job was killed is released again.
    """
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4096)
    draw = random.Random(0)
    mine: dict[str, list[tuple[float, int]]] = {f"user {i}": [] for i in range(500)}
    for path in (tmp_path / "in" / "a.csv", tmp_path / "in" / "b.csv"):
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            file.write("who,length,back\n")
            for _ in range(1000):
                who, length, back = draw.choice(list(mine)), draw.randint(0, 100), draw.randint(0, 1)
                mine[who].append((length / 100, back))
                file.write(f"{who},{length},{back}\n")
            file.write("nobody,much,0\n,1,0\n")
    for stats in ("non-private", "dp"):
        text = USERS.replace('"STATS"', f'"{stats}"' + "\nnoise_multiplier = 3" * (stats == "dp"))
        output = tmp_path / stats
        job.prepare(text, [str(tmp_path / "in")], [], output)
        manifest = shards.read_manifest(output)
        counts, released = manifest["rows"], manifest["statistics"]
        users = sum(bool(some) for some in mine.values())
        assert manifest["privacy_unit"] == "user" and len(manifest["files"]["train"]) == 7
        assert counts["read"] == 2004 and counts["bad"] == {"number": 2, "missing": 2}
        assert counts["train"] + counts["test"] == users == 2000 - counts["surplus"]
        table, known = prepared.load(output), released["columns"]["length"]
        kept = np.concatenate([rows_of(table, "train"), rows_of(table, "test")])
        lengths = kept[:, 0] * known["deviation"] + known["mean"]
        found = sorted(zip(lengths.round(2).tolist(), kept[:, -1].tolist(), strict=True))
        left = [sorted(some) for some in mine.values() if some]
        assert set(found) <= {record for some in left for record in some}
        training = lengths[: counts["train"]]
        if stats == "non-private":
            assert known["mean"] == pytest.approx(training.mean(), abs=1e-6)
            assert known["deviation"] == pytest.approx(training.std(), abs=1e-6)
        else:
            assert known["mean"] != pytest.approx(training.mean(), abs=1e-6)
            assert known["mean"] == pytest.approx(training.mean(), abs=10 * 3 * 3**0.5 / len(training))
            before = contents(output)
            (output / shards.MANIFEST).unlink()  # killed at the end
            monkeypatch.setattr(job.statistics, "release", None)
            job.prepare(text, [str(tmp_path / "in")], [], output)
            assert contents(output) == before


def test_users_of_test_files_and_files_that_cannot_be_read(job: Any, tmp_path: Path) -> None:
    text = USERS.replace('"STATS"', '"declared"') + "[statistics.length]\nmean = 0.0\ndeviation = 1.0\n"
    rows = [(f"user {i % 40}", i % 90) for i in range(200)]
    tables = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        folder = tmp_path / name
        for part, some in (("train", order), ("test", [(f"user {i}", 99) for i in range(15)])):
            (folder / part).mkdir(parents=True)
            lines = [f"{who},{length},1\n" for who, length in some]
            (folder / part / f"{part}.csv").write_text("who,length,back\n" + "".join(lines))
        job.prepare(text, [str(folder / "train")], [str(folder / "test")], folder / "out")
        table = prepared.load(folder / "out")
        assert (len(table.train_labels), len(table.test_labels)) == (25, 15)
        tables.append([sorted(rows_of(table, split)[:, 0].tolist()) for split in ("train", "test")])
    assert tables[0] == tables[1] and tables[0][1] == pytest.approx([0.99] * 15)
    whole = gzip.compress(b"who,length,back\n" + b"u,1,1\n" * 5000)
    (tmp_path / "t.csv.gz").write_bytes(whole[:-20])
    with pytest.raises(ArgumentError, match=r"t\.csv\.gz': must be a csv file that can be read"):
        job.prepare(text, [str(tmp_path / "t.csv.gz")], [], tmp_path / "o")


def test_each_file_is_read_once_by_whatever_names(job: Any, tmp_path: Path) -> None:
    """Links are followed; what a folder or a pattern hides is read if it is named itself."""
    for name in ("raw/day=0/a.csv", "raw/_b.csv", "raw/.c/c.csv", "elsewhere/d.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        WRITERS["t.csv"](plain_table(2), tmp_path / name)
    (tmp_path / "raw" / "day=1").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw" / "day=0" / "latest.csv").symlink_to("a.csv")

    def names(*inputs: str) -> list[str]:
        return [Path(s.path).name for s in job.list_sources([str(tmp_path / text) for text in inputs], "input", None)]

    assert (
        names("raw")
        == names("raw/**")
        == names("raw", "raw/day=0")
        == names("raw/*", "raw/day=0/*")
        == ["a.csv", "d.csv"]
    )
    (tmp_path / "raw" / "up").symlink_to(tmp_path / "raw")
    assert names("raw") == ["a.csv", "d.csv"]
    assert names("raw/_b.csv", "raw/day=0") == ["_b.csv", "a.csv"]
    (tmp_path / "held_out.csv").hardlink_to(tmp_path / "raw" / "day=0" / "a.csv")
    with pytest.raises(ArgumentError, match=r"test_input=.*held_out.csv'.*also input: they are trained on"):
        job.prepare(contract(), [str(tmp_path / "raw")], [str(tmp_path / "held_out.csv")], tmp_path / "o")


def test_what_spark_keeps_in_temporary_folders_is_for_its_owner(job: Any) -> None:
    """Users' names among it."""
    folders = list(Path(os.environ["SPARK_LOCAL_DIRS"]).iterdir())
    assert folders and all(folder.stat().st_mode & 0o077 == 0 for folder in folders)


def test_changes_meanwhile_and_bad_rows_are_told(job: Any, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    path, make = tmp_path / "t.csv", job.write_rows
    WRITERS["t.csv"](plain_table(30), path)
    with path.open("a") as file:
        file.write("neither a number nor a row\n" * 200)
    job.prepare(contract(), [str(path)], [], tmp_path / "o")
    assert (
        f"prepare: warning: many rows cannot be used; {tmp_path / 'o' / 'private'} has them, and why"
        in capfd.readouterr().err
    )

    def and_then_the_file_grows(*arguments: Any) -> Any:
        made = make(*arguments)
        with path.open("a") as file:
            file.write("one more\n")
        return made

    monkeypatch.setattr(job, "write_rows", and_then_the_file_grows)
    with pytest.raises(ArgumentError, match=r"input='.*t\.csv': must be left as it is while it is prepared"):
        job.prepare(contract(), [str(path)], [], tmp_path / "p")
    assert not (tmp_path / "p" / shards.MANIFEST).exists()


def test_what_executors_cannot_read_is_told_like_what_the_driver_cannot(job: Any, tmp_path: Path) -> None:
    path = WRITERS["t.csv.gz"](plain_table(3000), tmp_path / "t.csv.gz")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ArgumentError, match=r"input='.*t\.csv\.gz': must be a csv file that can be read"):
        job.prepare(contract(), [str(path)], [], tmp_path / "o")
    assert not (tmp_path / "o" / shards.MANIFEST).exists()
    WRITERS["t.csv.gz"](plain_table(30), path)
    job.prepare(contract(test=0.5), [str(path)], [], tmp_path / "o")
    assert prepared.load(tmp_path / "o", verify=True)
    for text, inputs in ((contract(test=0.4), [str(path)]), (contract(test=0.5), [str(path), str(path)])):
        if text == contract(test=0.5):
            os.utime(path, ns=(1, 1))
        with pytest.raises(ArgumentError, match="a new folder: it holds a table of another"):
            job.prepare(text, inputs, [], tmp_path / "o")


def test_input_is_never_removed(job: Any, tmp_path: Path) -> None:
    """Not even if the folder looks like one of a job that was killed."""
    for split in ("train", "test"):
        (tmp_path / "raw" / split).mkdir(parents=True)
        WRITERS["t.csv"](plain_table(20), tmp_path / "raw" / split / f"part-0-{split}.csv")
    before = contents(tmp_path / "raw")
    train, test = str(tmp_path / "raw" / "train"), str(tmp_path / "raw" / "test")
    with pytest.raises(ArgumentError, match="a folder without input"):
        job.prepare(contract(), [train], [test], tmp_path / "raw")
    with pytest.raises(ArgumentError, match="outside of the input"):
        job.prepare(contract(), [train], [test], tmp_path / "raw" / "train" / "out")
    WRITERS["t.csv"](plain_table(20), tmp_path / "t.csv")
    with pytest.raises(ArgumentError, match="a folder that is empty or does not exist"):
        job.prepare(contract(), [str(tmp_path / "t.csv")], [], tmp_path / "raw")
    with pytest.raises(ArgumentError, match="a folder that is empty or does not exist"):
        shards.begin(tmp_path / "raw")
    assert contents(tmp_path / "raw") == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"config": "none.toml"}, r"config='none.toml': must be a TOML file that exists"),
        ({"config": "bad.toml"}, r"schema=.*must be TOML"),
        ({"config": "user.toml"}, r"column 'who' of t.csv='absent'"),
        ({"input": ["none*.csv"]}, r"input='none\*.csv': must be a file, a folder or a pattern that matches some"),
        ({"input": ["empty"]}, r"input=\['empty'\]: must be with at least one file"),
        ({"input": ["s.toml"]}, r"input='s.toml': must be a file that ends in .csv"),
        ({"input": ["other.csv"]}, r"column 'height' of other.csv='absent'"),
        ({"test_input": ["empty/../t.csv"]}, r"test_input=.*without files that are also input"),
        ({"output": "empty/.."}, r"output=.*must be a folder without input"),
        ({"config": "inline.toml"}, r"config='statistics': must be such that \[statistics.COLUMN\] tables can follow"),
        ({"JAVA_HOME": "/none"}, r"java='/none': must be Java 17 or newer, .* install openjdk-17-jre-headless"),
        ({"config": "draft.toml"}, r"line \d+='# private: .*must be declared, and without the mark"),
        ({"output": "t.csv"}, "output='t.csv': must be a folder"),
        ({"without": "pyspark"}, r"pyspark='absent \(.*pyspark.*\)': must be installed: pip install"),
        ({"surprise": "1"}, "error: Unknown option"),
        ({"JAVA_HOME": "old"}, r"java='.*version \"1.8.0.*must be Java 17 or newer"),
    ],
)
def test_mistakes_are_one_line(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """And come before Spark starts, with status 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(JOB.parent)
    import prepare

    (tmp_path / "s.toml").write_text(contract())
    (tmp_path / "bad.toml").write_text("format = ")
    (tmp_path / "user.toml").write_text(contract() + '[[column]]\nname = "who"\ntype = "user"\n')
    inline = USERS.replace('"STATS"', '"dp"\nnoise_multiplier = 1').replace("[prepare]", "statistics = {}\n[prepare]")
    (tmp_path / "inline.toml").write_text(inline)
    (tmp_path / "other.csv").write_text("age,debt\n1,2\n")
    (tmp_path / "empty").mkdir()
    WRITERS["t.csv"](plain_table(5), tmp_path / "t.csv")
    java = tmp_path / "old" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_402\"' >&2\n")
    java.chmod(0o755)
    if "JAVA_HOME" in change:
        monkeypatch.setenv("JAVA_HOME", change.pop("JAVA_HOME"))
    if "without" in change:
        monkeypatch.setitem(sys.modules, change.pop("without"), None)
    (tmp_path / "draft.toml").write_text(contract() + "# private: declare it or make it DP\n")
    given = {"config": ["s.toml"], "input": ["t.csv"], "test_input": [], "output": ["out"]}
    given |= {name: value if isinstance(value, list) else [value] for name, value in change.items()}
    status = prepare.main([text for name, of in given.items() if of for text in (f"--{name.replace('_', '-')}", *of)])
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert re.search(message, captured.err), captured.err
    assert not (tmp_path / "out").exists()


def test_quotation_marks_are_counted_in_each_file_alone(tmp_path: Path, monkeypatch: Any) -> None:
    """An odd one in a file says nothing about the next."""
    monkeypatch.syspath_prepend(JOB.parent)
    import prepare

    monkeypatch.setattr(prepare, "distribute", lambda spark, work, function, what: list(map(function, work)))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4)
    schema, cut = parse_schema(contract()), []
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(",".join(NAMES) + "\n" + 'xx"x' + "xxxx" + '""xx' + '"xxx' + '"xxx' + "xxxx")
        cut += pieces.cut(pieces.source(tmp_path / name, name), schema)
    known = prepare.know_quotes(None, cut, schema)
    assert [piece.inside for piece in known] == [None, True, True, True, False, True] * 2


CONFIG = contract(test=0.2)
MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, inputs, outputs, categories):
        super().__init__()
        self.town = nn.Embedding(categories[0], 3)
        self.linear = nn.Linear(inputs + 3, outputs)

    def forward(self, features, codes):
        return self.linear(torch.cat((features, self.town(codes[:, 0].long())), 1))
"""


@contextmanager
def started(command: list[str], log: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours, ended with its group."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, **QUICK, **more},
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def until(condition: Any, process: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.03)
    return found


def workers_of(group: int) -> list[int]:
    """Python processes that Spark has forked to work."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
            parent = (path.parent / fields[1] / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if int(fields[3]) == group and b"pyspark.daemon" in parent:
            found.append(int(path.name))
    return found


@contextmanager
def cluster(folder: Path, poison: Path) -> Iterator[str]:
    """A standalone master and two workers on this host, of a core each; nobody there can import fastdp."""
    spark_class = str(SPARK_HOME / "bin" / "spark-class")
    package = "org.apache.spark.deploy"
    more = {"PYTHONPATH": str(poison), "SPARK_HOME": str(SPARK_HOME)}
    host = ["--host", "127.0.0.1", "--port", "0", "--webui-port", "0"]
    log = folder / "master.log"
    with started([spark_class, f"{package}.master.Master", *host], log, **more) as master:
        url = until(lambda: re.search(r"spark://127\.0\.0\.1:\d+", log.read_text()), master, log)[0]
        command = [spark_class, f"{package}.worker.Worker", *host, "--cores", "1", "--memory", "1g", "--work-dir"]
        logs = [folder / f"worker{i}.log" for i in range(2)]
        with (
            started([*command, str(folder / "w0"), url], logs[0], **more) as first,
            started([*command, str(folder / "w1"), url], logs[1], **more) as second,
        ):
            for worker, log in ((first, logs[0]), (second, logs[1])):
                until(lambda log=log: "Successfully registered" in log.read_text(), worker, log)
            yield url


def test_a_job_that_is_killed_and_done_again_on_a_cluster(job: Any, tmp_path: Path) -> None:
    """A worker dies, then all at once; then two workers of a cluster, which have the shipped modules alone, write what
    this process writes; and two ranks train on it, with an embedding of the codes."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    rows = plain_table(9_000)
    for i in range(30):
        WRITERS["t.csv"](rows[300 * i : 300 * (i + 1)], raw / f"t{i:02}.csv")
    (tmp_path / "s.toml").write_text(CONFIG)
    arguments = [str(JOB), "--config", str(tmp_path / "s.toml"), "--input", str(raw), "--output", str(out)]
    log = tmp_path / "log"

    def parts() -> list[Path]:
        return list(out.glob("train/part-*"))

    java = shutil.which("java") or f"{os.environ['JAVA_HOME']}/bin/java"
    elsewhere = os.pathsep.join([str(Path(java).parent), "/usr/bin", "/bin"])  # `python3` there has no pyarrow
    with started([sys.executable, *arguments], log, PATH=elsewhere) as process:
        until(lambda: len(parts()) >= 2, process, log)
        while process.poll() is None:  # one that idles is not missed
            for worker in workers_of(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            time.sleep(0.2)
        assert process.returncode != 0
    assert not prepared.is_prepared(out) and not (out / shards.SUMMARY).exists()
    with started([sys.executable, *arguments], log) as process:
        until(lambda: not parts(), process, log)  # those of the first run go
        until(lambda: len(parts()) >= 2, process, log)
        os.killpg(process.pid, signal.SIGKILL)
    assert not prepared.is_prepared(out) and len(parts()) < 30
    poison = tmp_path / "poison"
    (poison / "fastdp").mkdir(parents=True)
    (poison / "fastdp" / "__init__.py").write_text("raise ImportError('not the modules that were shipped')")
    with cluster(tmp_path, poison) as url:
        submit = [str(SPARK_HOME / "bin" / "spark-submit"), "--master", url, *arguments]
        done = subprocess.run(
            submit,
            capture_output=True,
            text=True,
            timeout=120,
            env={
                **os.environ,
                **QUICK,
                "PYSPARK_PYTHON": sys.executable,
                "PYTHONPATH": str(ROOT),
            },
        )
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]  # what Python says comes to stdout
        assert len([*tmp_path.glob("w[01]/app-*/*/stderr")]) == 2  # both had executors
    job.prepare(CONFIG, [str(raw)], [], tmp_path / "again")
    assert contents(out) == contents(tmp_path / "again")
    assert len(parts()) == 30 and not list(out.rglob("*.partial"))
    train(out, tmp_path)


def train(table: Path, folder: Path) -> None:
    (folder / "user_town.py").write_text(MODEL)
    common = ["--data", str(table), "--model", "user_town:Model", "--epochs", "1", "--batch-size", "512"]
    common += ["--noise-multiplier", "1", "--accountant", "rdp", "--verify", "--output", str(folder / "run")]
    done = subprocess.run(
        ["mpirun", "-n", "2", sys.executable, "-m", "fastdp.train", *common],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    report = json.loads((folder / "run" / "report.json").read_text())
    loaded = prepared.load(table)
    assert report["ranks"] == 2 and report["private"] and report["task"] == "multi-class"
    assert (report["training_records"], report["evaluation_records"]) == tuple(
        len(labels) for labels in (loaded.train_labels, loaded.test_labels)
    )
