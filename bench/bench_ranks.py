"""What ranks of one host do together: a fused step, sums of few rows, more ranks than cores, and an epoch of two.

    python bench/bench_ranks.py [step sparse crowded scaling]

prints medians of several launches of mpirun; pytest --benchmark-only does one of each. Contenders take turns, inputs
are fresh, and a round is as long as its slowest rank's.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
LAUNCHES = 5
Medians = dict[str, float]  # milliseconds


def rounds(comm: Any, calls: dict[str, tuple[Callable[[], object], Callable[[], object]]], count: int) -> Medians:
    """Of each contender what makes its inputs, and its call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(1 + count):
        for name, (prepare, call) in calls.items():
            prepare()
            comm.barrier()
            begin = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - begin)
    everyone = comm.allgather_object(seconds)
    return {
        name: statistics.median(map(max, zip(*(rank[name] for rank in everyone), strict=True))) * 1e3 for name in calls
    }


def step(comm: Any) -> Medians:
    """10 million parameters, SGD with momentum: sum over ranks, noise, step."""
    import torch
    import torch.distributed
    from torch import nn

    from fastdp import ops
    from fastdp.clipping import Span

    n, key = 10_000_000, torch.zeros(32, dtype=torch.uint8)
    fresh = torch.randn(n, generator=torch.Generator().manual_seed(comm.rank))
    torch.distributed.init_process_group("gloo", store=store(comm), rank=comm.rank, world_size=comm.size)

    def parameter(gradient: torch.Tensor | None) -> tuple[nn.Parameter, torch.optim.SGD]:
        p = nn.Parameter(torch.zeros(n))
        p.grad = gradient
        return p, torch.optim.SGD([p], lr=0.1, momentum=0.9)

    p, fused_optimizer = parameter(None)
    sharded = comm.shard(fused_optimizer, [Span("p", p, 0, p.shape)])
    window, ordinary = comm.empty(n), torch.empty(n)
    _, ours = parameter(window)
    _, theirs = parameter(ordinary)

    def fused() -> None:
        comm.reduce_noise_step(sharded, noise_std=1.0, batch_size=10, key=key, step=1)

    def unfused() -> None:
        comm.all_reduce(window)
        ops.gaussian_noise_(window, 1.0, key=key, step=1)
        window.div_(10)
        ours.step()

    def gloo() -> None:
        torch.distributed.all_reduce(ordinary)
        ordinary.add_(torch.normal(0.0, 1.0, (n,))).div_(10)
        theirs.step()

    calls = {
        "reduce_noise_step": (lambda: sharded.flat.copy_(fresh), fused),
        "our all_reduce + our noise + torch's SGD": (lambda: window.copy_(fresh), unfused),
        "gloo all_reduce + torch's noise and SGD": (lambda: ordinary.copy_(fresh), gloo),
    }
    return rounds(comm, calls, 9)


def store(comm: Any) -> Any:
    import tempfile

    import torch.distributed

    path = comm.bcast_object(tempfile.mktemp() if comm.rank == 0 else None)
    return torch.distributed.FileStore(path, comm.size)


def sparse(comm: Any) -> Medians:
    """2048 rows of each rank, of a table of a million rows of 32."""
    import torch

    rows, width, touched = 1_000_000, 32, 2048
    generator = torch.Generator().manual_seed(comm.rank)
    dense, ordinary = comm.empty(rows * width).view(rows, width), torch.zeros(rows, width)
    index, values = torch.empty(0), torch.empty(0)

    def prepare(table: torch.Tensor | None = None) -> None:
        nonlocal index, values
        index = torch.randint(0, rows, (touched,), generator=generator)
        values = torch.randn(touched, width, generator=generator)
        if table is not None:
            table.zero_()[index] = values

    calls = {
        "sparse_all_reduce": (prepare, lambda: comm.sparse_all_reduce(index, values, rows)),
        "all_reduce of the table in the window": (lambda: prepare(dense), lambda: comm.all_reduce(dense)),
        "all_reduce of the table": (lambda: prepare(ordinary), lambda: comm.all_reduce(ordinary)),
    }
    return rounds(comm, calls, 15)


def crowded(comm: Any) -> Medians:
    """64 KiB on more ranks than cores."""
    import torch

    window, ordinary, fresh = comm.empty(1 << 14), torch.zeros(1 << 14), torch.randn(1 << 14)
    calls = {
        "window": (lambda: window.copy_(fresh), lambda: comm.all_reduce(window)),
        "ordinary": (lambda: ordinary.copy_(fresh), lambda: comm.all_reduce(ordinary)),
    }
    medians = rounds(comm, calls, 300)
    for name, x in (("window", window), ("ordinary", ordinary)):
        x.zero_()
        comm.barrier()
        begin = time.perf_counter()
        for _ in range(2000):
            comm.all_reduce(x)
        medians[f"{name}, one after the other"] = (time.perf_counter() - begin) / 2000 * 1e3
    return medians


def scaling(comm: Any) -> Medians:
    """A step of DP-SGD of the MLP 784-1024-1024-10, batch 512 over all ranks."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    import fastdp

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(20_000, 784), torch.randint(0, 10, (20_000,)))
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    model, optimizer, loader = fastdp.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        data_loader=DataLoader(data, batch_size=512),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        comm=comm,
    )
    begin = time.perf_counter()
    seconds = []
    for x, y in loader:  # an epoch of 39 steps; the first ones probe
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    return {f"{comm.size} ranks": max(comm.allgather_object(statistics.mean(seconds[9:]))) * 1e3}


CASES = {"step": (step, (2,)), "sparse": (sparse, (2,)), "crowded": (crowded, (4, 8)), "scaling": (scaling, (1, 2))}


def launch(case: str, ranks: int) -> Medians:
    beside_python = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside_python) if beside_python.exists() else shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("no mpirun, neither beside python nor on PATH")
    command = [mpirun, "-n", str(ranks), sys.executable, __file__, "--rank", case]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    medians: Medians = json.loads(result.stdout.splitlines()[-1])
    return {f"{name} ({ranks} ranks)" if case == "crowded" else name: value for name, value in medians.items()}


@pytest.mark.parametrize("case", CASES)
def bench_ranks(benchmark: Any, case: str) -> None:
    def once() -> Medians:
        return {name: value for ranks in CASES[case][1] for name, value in launch(case, ranks).items()}

    for name, value in benchmark.pedantic(once, rounds=1, iterations=1).items():
        benchmark.extra_info[name] = f"{value:.3g} ms"
        print(f"{case}: {name} {value:.3g} ms")


def main(cases: list[str]) -> None:
    if not set(cases) <= set(CASES):  # --help, or a slip
        sys.exit(__doc__)
    for case in cases or CASES:
        found: dict[str, list[float]] = {}
        for _ in range(LAUNCHES):
            for ranks in CASES[case][1]:
                for name, value in launch(case, ranks).items():
                    found.setdefault(name, []).append(value)
        first = statistics.median(next(iter(found.values())))
        for name, values in found.items():
            value = statistics.median(values)
            print(f"{case:<8} {name:<45} {value:9.3f} ms  {value / first:6.2f}x", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        import torch

        from fastdp import comm

        torch.set_num_threads(1)
        ranks = comm.init(timeout=60)
        medians = CASES[sys.argv[2]][0](ranks)
        if ranks.rank == 0:
            print(json.dumps(medians), flush=True)
    else:
        main(sys.argv[1:])
