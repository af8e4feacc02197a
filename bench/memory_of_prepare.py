"""Peak memory of the preparation of a CSV file that is larger than what Spark is given.

    python bench/memory_of_prepare.py 3 /tmp/3gb.csv

prepares 3 GB of the original workload (bench_prepare.py), with 2 GB for Java, and prints the largest sum of the memory
of all its processes, Python's workers included. Fails if that is more than 2 GB, or if a row was lost.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from bench_prepare import CONTRACTS, JOB, PUMS, cold

from fastdp import shards

ROWS = 1_000_000  # that are drawn; the file has them again and again


def make_csv(path: Path, gigabytes: float) -> int:
    """Returns how many rows it has."""
    PUMS.make(path, ROWS)
    header, _, rows = path.read_bytes().partition(b"\n")
    times = int(gigabytes * 1e9 / len(rows))
    with open(path, "wb") as file:
        file.write(header + b"\n")
        for _ in range(times):
            file.write(rows)
    return times * ROWS


def main(gigabytes: float, path: Path) -> None:
    rows = make_csv(path, gigabytes)
    output = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        config = CONTRACTS / "fulton_pums.toml"
        command = [sys.executable, JOB, "--config", config, "--input", path, "--output", output]
        submit = "--master local[2] --driver-memory 2g pyspark-shell"
        seconds, memory = cold(command, {"PYSPARK_SUBMIT_ARGS": submit})
        counts = json.loads((output / shards.MANIFEST).read_text())["rows"]
        print(f"{path.stat().st_size / 1e9:.2f} GB, {rows:,} rows: {seconds:.1f} s, {memory:.2f} GB at most")
        assert counts["read"] == rows, counts
        assert memory <= 2, memory
    finally:
        shutil.rmtree(output)
        path.unlink()


if __name__ == "__main__":
    main(float(sys.argv[1]), Path(sys.argv[2]).absolute())
