"""Preparation of a raw table: Spark's job, cold and warm, against a loop over rows and against polars.

`pytest --benchmark-only bench/bench_prepare.py` takes 300,000 rows. For more, and a figure,

    python bench/bench_prepare.py pums 12000000 /tmp/pums.csv pums.png
    python bench/bench_prepare.py census 2992850 /tmp/census.csv census.png

pums: the original workload, 12 binary columns, of which 9 are features and one is the label, and rows with a missing
cell are left out; drawn from the real rows in $FASTDP_DATA/fulton_pums. census: Census-Income, $FASTDP_DATA's rows over
and over; 41 columns, of which 7 become numbers and 33 codes. The CSV is written if it is not there.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdp import pieces, prepared, shards
from fastdp.columns import Schema
from fastdp.schema import parse_schema

ROOT = Path(__file__).parent.parent
JOB, CONTRACTS = ROOT / "spark_jobs/prepare.py", ROOT / "spark_jobs/contracts"

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # features float32 [n, D], codes int32 [n, K], labels int64 [n]


def draw_pums(path: Path, rows: int) -> None:
    """The original workload: the real rows, drawn with replacement, 2 % of them with a missing cell."""
    import pandas

    source = Path(os.environ["FASTDP_DATA"]) / "fulton_pums" / "FultonPUMS5full.csv"
    real, rng = pandas.read_csv(source), np.random.default_rng(0)
    real = real.assign(
        collegedegree=(real.educ >= 13).astype(int),
        blackfemale=real.black * real.sex,
        targetted=((real.sex == 0) & (real.employed == 1)).astype(int),
    )[[column.name for column in PUMS.schema.columns]].astype("Int8")
    with open(path, "w", encoding="ascii") as file:
        for start in range(0, rows, 1_000_000):
            count = min(1_000_000, rows - start)
            part = real.iloc[rng.integers(0, len(real), count)].reset_index(drop=True)
            for name in part.columns[:10]:
                part.loc[rng.random(count) < 0.002, name] = pandas.NA
            part.to_csv(file, index=False, na_rep="NA", header=start == 0)


def repeat_census(path: Path, rows: int) -> None:
    """The real rows, training and test, as often as it takes."""
    folder = Path(os.environ["FASTDP_DATA"]) / "census_income"
    real = b"".join(gzip.decompress((folder / f"{name}.csv.gz").read_bytes()) for name in ("train", "test"))
    lines = real.splitlines(keepends=True)
    with open(path, "wb") as file:
        for start in range(0, rows, len(lines)):
            file.writelines(lines[: rows - start])


def loop_pums(path: Path) -> Rows:
    """As the original does it: one row after the other, and a look for NA in each."""
    features, labels = [], []
    with open(path, newline="", encoding="ascii") as file:
        rows = csv.reader(file)
        at = {name: i for i, name in enumerate(next(rows))}
        chosen, label = [at[name] for name in PUMS.schema.feature_names], at["employed"]
        for row in rows:
            if (np.array(row) == "NA").any():
                continue
            features.append([int(row[i]) for i in chosen])
            labels.append(int(row[label]))
    return np.array(features, np.float32), np.empty((len(labels), 0), np.int32), np.array(labels)


def loop_census(path: Path) -> Rows:
    """One row after the other; numbers clamped and scaled, texts looked up."""
    numbers = [(i, c) for i, c in enumerate(CENSUS.schema.columns) if c.type == "number"]
    texts = [(i, c.spellings) for i, c in enumerate(CENSUS.schema.columns) if c.is_code]
    answer = {text: code for text, code in (CENSUS.schema.label.spellings or {}).items()}
    features, codes, labels = [], [], []
    with open(path, newline="", encoding="ascii") as file:
        for row in csv.reader(file):
            scaled = []
            for i, column in numbers:
                low, high = column.bounds
                above = min(max(float(row[i]), low), high) - low
                scaled.append(above / (high - low) if column.scale == "linear" else np.log1p(above) / log_width(column))
            features.append(scaled)
            codes.append([spellings[row[i].strip()] for i, spellings in texts])
            labels.append(answer[row[-1].strip()])
    return np.array(features, np.float32), np.array(codes, np.int32), np.array(labels)


def log_width(column: Any) -> float:
    return math.log1p(column.bounds[1] - column.bounds[0])


def polars_pums(path: Path, output: Path) -> None:
    import polars

    table = polars.read_csv(path, null_values="NA").drop_nulls()
    features = polars.col(PUMS.schema.feature_names).cast(polars.Float32)
    table.select(features, polars.col("employed").alias("label")).write_ipc(output, compression="uncompressed")


def polars_census(path: Path, output: Path) -> None:
    import polars

    columns = CENSUS.schema.columns
    texts = {c.name: polars.String for c in columns}
    table = polars.read_csv(path, has_header=False, new_columns=list(texts), schema_overrides=texts)

    def scaled(column: Any) -> Any:
        low, high = column.bounds
        above = polars.col(column.name).str.strip_chars().cast(polars.Float64).clip(low, high) - low
        return (above / (high - low) if column.scale == "linear" else above.log1p() / log_width(column)).cast(
            polars.Float32
        )

    def code(column: Any) -> Any:
        return polars.col(column.name).str.strip_chars().replace_strict(column.spellings, return_dtype=polars.Int32)

    features = [scaled(column) for column in columns if column.type == "number"]
    codes = [code(column) for column in columns if column.is_code]
    table = table.select(*features, *codes, code(CENSUS.schema.label).alias("label"))
    table.write_ipc(output, compression="uncompressed")


@dataclass(frozen=True)
class Workload:
    """A table, and how others prepare it."""

    name: str
    contract: str
    make: Callable[[Path, int], None]
    loop: Callable[[Path], Rows]
    polars: Callable[[Path, Path], None]

    @property
    def schema(self) -> Schema:
        return parse_schema(self.contract)


def contract(name: str) -> str:
    return (CONTRACTS / f"{name}.toml").read_text(encoding="utf-8")


PUMS = Workload("pums", contract("fulton_pums"), draw_pums, loop_pums, polars_pums)
CODES = contract("census_income").replace('type = "category"\n', 'type = "category"\nencode = "code"\n')
CENSUS = Workload("census", CODES, repeat_census, loop_census, polars_census)
WORKLOADS = {workload.name: workload for workload in (PUMS, CENSUS)}


def signature(parts: Sequence[Rows]) -> tuple[int, int]:
    """The number of rows, and a sum of hashes of their bits: equal for equal tables, in whatever order."""
    rows, total = 0, 0
    for features, codes, labels in parts:
        columns = [*features.T.astype(np.float32), *codes.T.astype(np.float32), labels.astype(np.float32)]
        hashed = np.zeros(len(labels), np.uint64)
        for column in columns:
            hashed = (hashed ^ column.view(np.uint32)) * np.uint64(0x9E3779B97F4A7C15)
            hashed ^= hashed >> np.uint64(29)
        rows, total = rows + len(labels), (total + int(hashed.sum())) % 2**64
    return rows, total


def signature_of(folder: Path) -> tuple[int, int]:
    table = prepared.load(folder)
    parts = []
    for split in ("train", "test"):
        features, codes, labels = (getattr(table, f"{split}_{name}") for name in ("features", "categories", "labels"))
        for i, (x, y) in enumerate(zip(features.parts, labels.parts, strict=True)):
            k = codes.parts[i].numpy() if table.category_sizes else np.empty((len(y), 0), np.int32)
            parts.append((x.numpy(), k, y.numpy()))
    return signature(parts)


def signature_of_polars(path: Path, schema: Schema) -> tuple[int, int]:
    import polars

    table = polars.read_ipc(path)
    count = len(schema.feature_names)
    features, codes = table[:, :count].to_numpy(), table[:, count:-1].to_numpy()
    return signature([(features, codes.reshape(len(table), -1), table["label"].to_numpy())])


def load_job() -> Any:
    spec = importlib.util.spec_from_file_location("prepare", JOB)
    assert spec is not None and spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    return job


def cold(command: list[Any], environ: dict[str, str]) -> tuple[float, float]:
    """Seconds of a whole process, Java's start included, and the largest sum of its processes' memory, in GB."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=os.environ | environ, start_new_session=True, stdout=said, stderr=said)
        peak, ended = [0.0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.5):  # a look costs up to 30 ms
                peak[0] = max(peak[0], session_memory(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        seconds = time.perf_counter() - start
        ended.set()
        watcher.join()
        said.seek(0)
        assert status == 0, said.read().decode()[-3000:]
    return seconds, peak[0]


def session_memory(session: int) -> float:
    """GB of all processes of a session, pages that they share counted once (PSS)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                total += int((folder / "smaps_rollup").read_text().partition("\nPss:")[2].split()[0])
        except (OSError, ValueError, IndexError):
            continue  # it ended
    return total / 1e6


def job_cold(workload: Workload, path: Path, output: Path, cores: int) -> tuple[float, float]:
    shutil.rmtree(output, ignore_errors=True)
    config = output.with_suffix(".toml")
    config.write_text(workload.contract, encoding="utf-8")
    command = [sys.executable, JOB, "--config", config, "--input", path, "--output", output]
    return cold(command, spark_on(cores))


def apart(environ: dict[str, str], work: Callable[..., float], *arguments: Any) -> float:
    """What work(*arguments) says in a process of its own: Java and polars read once how many cores they have."""
    os.environ.update(environ)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(work, *arguments).result()
    finally:
        for name in environ:
            del os.environ[name]


def job_warm(name: str, path: Path, output: Path, rounds: int) -> float:
    """Median seconds of the job in a session that has done it before."""
    workload = WORKLOADS[name]
    job, text = load_job(), workload.contract
    sources, schema = job.list_sources([str(path)], "input", None), workload.schema
    seconds = []
    with job.connected() as spark:
        for _ in range(rounds + 1):
            shutil.rmtree(output, ignore_errors=True)
            start = time.perf_counter()
            cut = [piece for source in sources for piece in pieces.cut(source, schema)]
            shards.begin(output)
            job.write(spark, cut, schema, job.origin_of(text, sources), output)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def polars_warm(name: str, path: Path, output: Path, rounds: int) -> float:
    """Median seconds of polars, which was loaded before."""
    work = WORKLOADS[name].polars
    work(path, output)
    return statistics.median([timed(lambda: work(path, output)) for _ in range(rounds)])


def spark_on(cores: int) -> dict[str, str]:
    return {"PYSPARK_SUBMIT_ARGS": f"--master local[{cores}] pyspark-shell"}


Found = dict[str, tuple[float, float | None]]


def measure(workload: Workload, path: Path, rows: int, rounds: int = 3, cores: Sequence[int] = (1, 2)) -> Found:
    """{what: (seconds, GB or None)}; all of them made the same table, or this raises."""
    found: Found = {}
    start = time.perf_counter()
    looped = workload.loop(path)
    found["row loop"] = time.perf_counter() - start, None
    expected = signature([looped])
    del looped
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        output = Path(scratch) / "prepared"
        for count in cores:
            on = f"{count} core{'s' * (count > 1)}"
            found[f"job, cold, {on}"] = job_cold(workload, path, output, count)
            assert signature_of(output) == expected
            found[f"job, warm, {on}"] = apart(spark_on(count), job_warm, workload.name, path, output, rounds), None
            assert signature_of(output) == expected
            assert json.loads((output / shards.MANIFEST).read_text())["rows"]["read"] == rows
            shutil.rmtree(output)
            if importlib.util.find_spec("polars") is None:
                print("polars is not installed: left out")
                continue
            file, threads = Path(scratch) / "polars.arrow", {"POLARS_MAX_THREADS": str(count)}
            found[f"polars, {on}"] = apart(threads, polars_warm, workload.name, path, file, rounds), None
            assert signature_of_polars(file, workload.schema) == expected
    return found


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def draw(found: Found, title: str, rows: int, figure: Path) -> None:
    import matplotlib.pyplot as plt

    names = list(found)[::-1]
    rates = [rows / found[name][0] / 1e6 for name in names]
    _, axes = plt.subplots(figsize=(7, 3))
    bars = axes.barh(names, rates)
    slowest = found["row loop"][0]
    axes.bar_label(bars, [f" {rows / found[name][0] / 1e6:.2f} ({slowest / found[name][0]:.1f}x)" for name in names])
    axes.set_xlabel("million rows a second")
    axes.set_title(title)
    axes.margins(x=0.2)
    plt.savefig(figure, dpi=150, bbox_inches="tight")


@pytest.mark.parametrize("name", WORKLOADS)
def bench_prepare_against_row_loop(name: str, benchmark, tmp_path: Path) -> None:
    if "FASTDP_DATA" not in os.environ:
        pytest.skip("FASTDP_DATA names no folder with fulton_pums and census_income")
    pytest.importorskip("pyspark")
    rows, path, workload = 300_000, tmp_path / "table.csv", WORKLOADS[name]
    workload.make(path, rows)
    found = benchmark.pedantic(lambda: measure(workload, path, rows, 2, [2]), rounds=1)
    for what, (seconds, memory) in found.items():
        benchmark.extra_info[what] = f"{seconds:.2f} s" + ("" if memory is None else f", {memory:.2f} GB")
    benchmark.extra_info["row loop / job, warm"] = found["row loop"][0] / found["job, warm, 2 cores"][0]


def main(name: str, rows: int, path: Path, figure: Path) -> None:
    workload = WORKLOADS[name]
    if not path.exists():
        workload.make(path, rows)
    found = measure(workload, path, rows)
    for what, (seconds, memory) in found.items():
        ratio = found["row loop"][0] / seconds
        used = "" if memory is None else f"{memory:.2f} GB"
        print(f"{what:22} {seconds:8.2f} s  {rows / seconds:12,.0f} rows/s  {ratio:5.1f}x  {used}")
    columns = len(workload.schema.columns)
    draw(found, f"{name}: {rows:,} rows of {columns} columns, CSV to Arrow", rows, figure)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]).absolute(), Path(sys.argv[4]))
