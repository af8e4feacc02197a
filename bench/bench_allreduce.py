"""All-reduce of float32 on the ranks of one host: ours, each algorithm, against MPI_Allreduce and gloo.

    python bench/bench_allreduce.py allreduce.json allreduce.svg [--launches 5] [--open-mpi PYTHON]

starts mpirun several times and prints a table; PYTHON is that of another environment, with Open MPI and mpi4py in it.
pytest --benchmark-only does one short launch.

Each round has fresh inputs, contenders take turns, and a round is as long as its slowest rank's. "probe": what the
window cannot beat, the same loads and stores without meetings. MPI at both thread levels: with MULTIPLE, mpi4py's
default, MPICH does without its fast collectives in shared memory. busbw = bytes / seconds * 2(P-1)/P, as in nccl-tests.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BYTES = (256, 4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
RANKS = 2
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

Rows = dict[str, dict[str, list[float]]]  # seconds of rounds by bytes and contender


# What is measured together: kind of launch, thread level of MPI, contenders.
KINDS = {
    "multiple": ("multiple", ("window", "ordinary", "probe", "MPI_Allreduce")),
    "funneled": ("funneled", ("window", "ordinary", "probe", "MPI_Allreduce")),
    "algorithms": ("multiple", ("ring", "tree", "mpi")),
    "gloo": ("multiple", ("gloo",)),  # its threads would disturb the others
    "openmpi": ("multiple", ("MPI_Allreduce",)),
}


def contenders(world: Any, names: tuple[str, ...], nbytes: int) -> dict[str, tuple[Any, Callable[[], object]]]:
    """The tensor of each, and its call."""
    import torch
    from mpi4py import MPI

    x = torch.empty(nbytes // 4)
    view = x.numpy()
    if "gloo" in names:
        return {"gloo": (x, lambda: torch.distributed.all_reduce(x))}
    calls: dict[str, tuple[Any, Callable[[], object]]] = {
        "MPI_Allreduce": (x, lambda: world.Allreduce(MPI.IN_PLACE, view))
    }
    if names == ("MPI_Allreduce",):
        return calls
    ours = open_ours()
    window = ours.empty(nbytes // 4)
    calls["window"] = (window, lambda: ours.all_reduce(window))
    calls["ordinary"] = (x, lambda: ours.all_reduce(x))
    for name in ("ring", "tree", "mpi"):
        calls[name] = (x, lambda name=name: ours.all_reduce(x, name))
    calls["probe"] = probe(ours, nbytes)
    return {name: calls[name] for name in names}


def probe(ours: Any, nbytes: int) -> tuple[Any, Callable[[], object]]:
    import torch

    from fastdp import _mpi

    segment = ours.segment(nbytes)
    tensors = [segment.part(rank) for rank in range(ours.size)]
    begin, end = (nbytes // 4 * at // ours.size for at in (ours.rank, ours.rank + 1))
    return segment.tensor(nbytes // 4, torch.float32), lambda: _mpi.sum_in_place(tensors, begin, end)


def measure(kind: str, effort: float) -> Rows:
    """On every rank, under mpirun."""
    import mpi4py
    import torch

    thread_level, names = KINDS[kind]
    mpi4py.rc.thread_level = thread_level
    from mpi4py import MPI

    torch.set_num_threads(1)
    world, one = MPI.COMM_WORLD, torch.ones(1)
    if kind == "gloo":
        open_gloo(world)
    rows: Rows = {}
    for nbytes in BYTES:
        fresh = torch.randn(nbytes // 4, generator=torch.Generator().manual_seed(world.rank))
        total = sum(torch.randn(nbytes // 4, generator=torch.Generator().manual_seed(r)) for r in range(world.size))
        calls = contenders(world, names, nbytes)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        # The first round warms up.
        for round_ in range(1 + max(5, int(effort * min(300, (64 << 20) // nbytes)))):
            order = list(calls)
            first = round_ % len(order)  # nobody always follows the same one
            for name in order[first:] + order[:first]:
                x, call = calls[name]
                torch.mul(fresh, one, out=x)  # by arithmetic, as gradients are: a copy may bypass the caches
                world.Barrier()
                begin = time.perf_counter()
                call()
                elapsed = time.perf_counter() - begin
                if round_:
                    seconds[name].append(elapsed)
                elif name != "probe":
                    assert torch.equal(x, total), (nbytes, name)  # two addends: exact in any order
        everyone = world.allgather(seconds)
        rows[str(nbytes)] = {
            name: [max(of) for of in zip(*(rank[name] for rank in everyone), strict=True)] for name in calls
        }
    return rows


@functools.cache
def open_ours() -> Any:
    from fastdp import comm

    return comm.init(timeout=30)


def open_gloo(world: Any) -> None:
    import torch.distributed

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = world.bcast(free.getsockname()[1])
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=world.rank, world_size=world.size
    )


def launch(python: str, kind: str, effort: float) -> Rows:
    beside_python = Path(python).with_name("mpirun")
    mpirun = str(beside_python) if beside_python.exists() else shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("no mpirun, neither beside python nor on PATH")
    command = [mpirun, "-n", str(RANKS), python, __file__, "--rank", kind, str(effort)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    rows: Rows = json.loads(result.stdout.splitlines()[-1])
    return rows


def summarise(launches: dict[str, list[Rows]]) -> dict[str, dict[str, dict[str, float]]]:
    """By bytes and contender: the median over launches of their p50 and p99 in us, and busbw of the former."""
    table: dict[str, dict[str, dict[str, float]]] = {str(nbytes): {} for nbytes in BYTES}
    for kind, of_kind in launches.items():
        for nbytes, row in of_kind[0].items():
            for name in row:
                p50, p99 = (
                    statistics.median(percentile(one[nbytes][name], q) for one in of_kind) * 1e6 for q in (0.5, 0.99)
                )
                busbw = int(nbytes) / p50 * 1e-3 * 2 * (RANKS - 1) / RANKS
                library = {"multiple": "MPICH, multiple", "funneled": "MPICH, funneled", "openmpi": "Open MPI"}.get(
                    kind, kind
                )
                contender = f"{name} ({library})" if kind in ("multiple", "funneled", "openmpi") else name
                table[nbytes][contender] = {"p50_us": p50, "p99_us": p99, "busbw_GBps": busbw}
    return table


def percentile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def show(table: dict[str, dict[str, dict[str, float]]]) -> None:
    for nbytes, row in table.items():
        best = min([of["p50_us"] for name, of in row.items() if name.startswith("MPI_Allreduce")], default=math.nan)
        for name, of in sorted(row.items(), key=lambda item: item[1]["p50_us"]):
            limit = row.get(f"probe ({name.partition('(')[2]}") if name.startswith("window") else None
            share = "" if limit is None else f"  {limit['p50_us'] / of['p50_us']:4.0%} of the probe"
            print(
                f"{nbytes:>9} B  {name:<26} p50 {of['p50_us']:>9.1f} us  p99 {of['p99_us']:>9.1f}  "
                f"busbw {of['busbw_GBps']:6.2f} GB/s  {best / of['p50_us']:5.2f}x the best MPI{share}"
            )


def draw(table: dict[str, dict[str, dict[str, float]]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(name for row in table.values() for name in row):
        if name in ("ring", "tree", "mpi") or ("funneled" in name and not name.startswith("MPI")):
            continue
        sizes = [nbytes for nbytes, row in table.items() if name in row]
        style = {"linewidth": 2.5} if name.startswith(("window", "ordinary")) else {"linestyle": "--"}
        axes.plot([int(s) for s in sizes], [table[s][name]["p50_us"] for s in sizes], marker="o", label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="microseconds, median")
    axes.set_title(f"all-reduce of float32, {RANKS} ranks on one host", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


@pytest.mark.parametrize("kind", ["multiple", "funneled", "algorithms", "gloo"])
def bench_allreduce(benchmark: Any, kind: str) -> None:
    rows = benchmark.pedantic(launch, args=(sys.executable, kind, 0.3), rounds=1, iterations=1)
    table = summarise({kind: [rows]})
    show(table)
    benchmark.extra_info["ranks"] = RANKS
    for nbytes, row in table.items():
        for name, of in row.items():
            benchmark.extra_info[f"{nbytes} B {name}"] = {key: round(value, 2) for key, value in of.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json")
    parser.add_argument("svg")
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--effort", type=float, default=1.0)
    parser.add_argument("--open-mpi", metavar="PYTHON")
    options = parser.parse_args()
    launches: dict[str, list[Rows]] = {}
    for _ in range(options.launches):
        for kind in KINDS:
            python = options.open_mpi if kind == "openmpi" else sys.executable
            if python:
                launches.setdefault(kind, []).append(launch(python, kind, options.effort))
    table = summarise(launches)
    show(table)
    Path(options.json).write_text(json.dumps(table, indent=1) + "\n")
    draw(table, options.svg)


if __name__ == "__main__":
    if "--rank" in sys.argv:
        result = measure(sys.argv[2], float(sys.argv[3]))
        from mpi4py import MPI

        if MPI.COMM_WORLD.rank == 0:
            print(json.dumps(result), flush=True)
    else:
        main()
