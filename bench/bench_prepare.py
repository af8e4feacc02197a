"""Preparation of a raw table: Spark's job, cold and warm, against a loop over rows and against polars.

`pytest --benchmark-only bench/bench_prepare.py` takes 300,000 rows. `python bench/bench_prepare.py ROWS CSV FIGURE`
takes as many as are said, 12 million for example, of the original workload: 12 binary columns, of which 9 are features
and one is the label; rows with a missing cell are left out. CSV is written if it does not exist, by drawing from the
real rows in $FASTDP_DATA/fulton_pums.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdp import pieces, prepared, shards
from fastdp.schema import parse_schema

ROOT = Path(__file__).parent.parent
JOB, CONTRACT = ROOT / "spark_jobs/prepare.py", ROOT / "spark_jobs/contracts/fulton_pums.toml"

# The original's columns, and what they are made of.
COLUMNS = {
    "sex": "sex",
    "married": "married",
    "black": "black",
    "asian": "asian",
    "collegedegree": None,
    "employed": "employed",
    "militaryservice": "militaryservice",
    "uscitizen": "uscitizen",
    "disability": "disability",
    "englishability": "englishability",
    "blackfemale": None,
    "targetted": None,
}
FEATURES = [name for name in COLUMNS if name not in ("employed", "blackfemale", "targetted")]


def make_csv(path: Path, rows: int) -> None:
    """The original workload: the real rows, drawn with replacement, 2 % of them with a missing cell."""
    import pandas

    source = Path(os.environ["FASTDP_DATA"]) / "fulton_pums" / "FultonPUMS5full.csv"
    real, rng = pandas.read_csv(source), np.random.default_rng(0)
    real = real.assign(
        collegedegree=(real.educ >= 13).astype(int),
        blackfemale=real.black * real.sex,
        targetted=((real.sex == 0) & (real.employed == 1)).astype(int),
    )[list(COLUMNS)].astype("Int8")
    with open(path, "w", encoding="ascii") as file:
        for start in range(0, rows, 1_000_000):
            count = min(1_000_000, rows - start)
            part = real.iloc[rng.integers(0, len(real), count)].reset_index(drop=True)
            for name in part.columns[:10]:
                part.loc[rng.random(count) < 0.002, name] = pandas.NA
            part.to_csv(file, index=False, na_rep="NA", header=start == 0)


def row_loop(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """As the original does it: one row after the other, and a look for NA in each."""
    features, labels = [], []
    with open(path, newline="", encoding="ascii") as file:
        rows = csv.reader(file)
        at = {name: i for i, name in enumerate(next(rows))}
        chosen, label = [at[name] for name in FEATURES], at["employed"]
        for row in rows:
            if (np.array(row) == "NA").any():
                continue
            features.append([int(row[i]) for i in chosen])
            labels.append(int(row[label]))
    return np.array(features, np.float32), np.array(labels)


def polars_table(path: Path, output: Path) -> None:
    import polars

    table = polars.read_csv(path, null_values="NA").drop_nulls()
    table.select(polars.col(FEATURES).cast(polars.Float32), "employed").write_ipc(output, compression="uncompressed")


def patterns(features: Any, labels: Any) -> np.ndarray:
    """How often each of the 1024 different rows occurs: equal for equal tables, in whatever order."""
    bits = np.asarray(features).astype(np.int64) @ (1 << np.arange(9)) + (np.asarray(labels).astype(np.int64) << 9)
    return np.bincount(bits, minlength=1024)


def patterns_of(folder: Path) -> np.ndarray:
    table = prepared.load(folder)
    splits = ((table.train_features, table.train_labels), (table.test_features, table.test_labels))
    return sum(patterns(x, y) for xs, ys in splits for x, y in zip(xs.parts, ys.parts, strict=True))


def load_job() -> Any:
    spec = importlib.util.spec_from_file_location("prepare", JOB)
    assert spec is not None and spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    return job


def cold(path: Path, output: Path, cores: int) -> tuple[float, float]:
    """Seconds of the whole process, Java's start included, and the largest sum of its processes' memory, in GB."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, JOB, "--config", CONTRACT, "--input", path, "--output", output]
    environ = os.environ | {"PYSPARK_SUBMIT_ARGS": f"--master local[{cores}] pyspark-shell"}
    start = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environ, start_new_session=True, **quiet)
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            peak[0] = max(peak[0], session_memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    assert status == 0, status
    return seconds, peak[0]


def session_memory(session: int) -> float:
    """GB of all processes of a session; pages that they share count once for each."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended
        if int(fields[3]) == session:
            total += int(fields[21])
    return total * os.sysconf("SC_PAGE_SIZE") / 1e9


def warm(path: Path, output: Path, rounds: int) -> float:
    """Median seconds of the job in a session that has done it before."""
    job, text = load_job(), CONTRACT.read_text(encoding="utf-8")
    sources, schema = job.list_sources([str(path)], "input", None), parse_schema(text)
    seconds = []
    with job.session() as spark:
        for _ in range(rounds + 1):
            shutil.rmtree(output, ignore_errors=True)
            start = time.perf_counter()
            cut = [piece for source in sources for piece in pieces.cut(source, schema)]
            shards.begin(output)
            job.write(spark, cut, schema, job.origin_of(text, sources), output)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


Found = dict[str, tuple[float, float | None]]


def measure(path: Path, rows: int, rounds: int = 3, cores: Sequence[int] = (1, 2)) -> Found:
    """{what: (seconds, GB or None)}; all of them made the same table, or this raises."""
    found: Found = {}
    start = time.perf_counter()
    expected = patterns(*row_loop(path))
    found["row loop"] = time.perf_counter() - start, None
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        output = Path(scratch) / "prepared"
        for count in cores:
            found[f"job, cold, {count} core{'s' * (count > 1)}"] = cold(path, output, count)
            assert (patterns_of(output) == expected).all()
        found["job, warm, 2 cores"] = warm(path, output, rounds), None
        assert (patterns_of(output) == expected).all()
        assert json.loads((output / shards.MANIFEST).read_text())["rows"]["read"] == rows
        try:
            seconds = [timed(lambda: polars_table(path, Path(scratch) / "polars.arrow")) for _ in range(rounds)]
            found["polars, 2 cores"] = statistics.median(seconds), None
        except ImportError:
            print("polars is not installed: left out")
    return found


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def draw(found: Found, rows: int, figure: Path) -> None:
    import matplotlib.pyplot as plt

    names = list(found)[::-1]
    rates = [rows / found[name][0] / 1e6 for name in names]
    _, axes = plt.subplots(figsize=(7, 2.6))
    bars = axes.barh(names, rates)
    slowest = found["row loop"][0]
    axes.bar_label(bars, [f" {rows / found[name][0] / 1e6:.2f} ({slowest / found[name][0]:.1f}x)" for name in names])
    axes.set_xlabel("million rows a second")
    axes.set_title(f"{rows:,} rows of 12 columns, CSV to Arrow")
    axes.margins(x=0.2)
    plt.savefig(figure, dpi=150, bbox_inches="tight")


def bench_prepare_against_row_loop(benchmark, tmp_path: Path) -> None:
    if "FASTDP_DATA" not in os.environ:
        pytest.skip("FASTDP_DATA names no folder with fulton_pums")
    pytest.importorskip("pyspark")
    rows, path = 300_000, tmp_path / "table.csv"
    make_csv(path, rows)
    found = benchmark.pedantic(lambda: measure(path, rows, 2, [2]), rounds=1)
    for name, (seconds, memory) in found.items():
        benchmark.extra_info[name] = f"{seconds:.2f} s" + ("" if memory is None else f", {memory:.2f} GB")
    benchmark.extra_info["row loop / job, warm"] = found["row loop"][0] / found["job, warm, 2 cores"][0]


def main(rows: int, path: Path, figure: Path) -> None:
    if not path.exists():
        make_csv(path, rows)
    found = measure(path, rows)
    for name, (seconds, memory) in found.items():
        ratio = found["row loop"][0] / seconds
        print(
            f"{name:22} {seconds:8.2f} s  {rows / seconds:12,.0f} rows/s  {ratio:5.1f}x", memory and f"{memory:.2f} GB"
        )
    draw(found, rows, figure)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]).absolute(), Path(sys.argv[3]))
