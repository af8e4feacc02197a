"""What an all-reduce costs by each algorithm: measured once for these hosts and ranks, and kept in the user's cache."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from fastdp.disk import make_folder, write_whole

if TYPE_CHECKING:
    from fastdp.comm import Communicator

FORMAT: Final = "fastdp costs 1"
# Latency, a message or two, and what bandwidth alone decides; times between and beyond are on straight lines.
SIZES: Final = (1 << 10, 1 << 16, 1 << 20)
ROUNDS: Final = 5
CHANGED: Final = 3.0  # times slower or faster: what was measured on a noisy day still holds


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds at each of SIZES, by algorithm."""

    seconds: dict[str, list[float]]

    def predict(self, algorithm: str, nbytes: int) -> float:
        times = self.seconds[algorithm]
        i = 0 if nbytes <= SIZES[1] else 1
        slope = max(0.0, times[i + 1] - times[i]) / (SIZES[i + 1] - SIZES[i])
        return max(times[i] + slope * (nbytes - SIZES[i]), min(times))

    def cheapest(self, nbytes: int) -> str:
        return min(self.seconds, key=lambda algorithm: self.predict(algorithm, nbytes))


class Chooser:
    """Of one communicator. All ranks ask it the same, and are told the same."""

    def __init__(self, comm: Communicator, segment_bytes: int) -> None:
        self._comm, self._segment_bytes = comm, segment_bytes
        self._costs: dict[tuple[str, ...], Costs] = {}
        self._chosen: dict[int, str] = {}

    def choose(self, nbytes: int) -> str:
        if nbytes not in self._chosen:
            if len(self._chosen) == 1024:  # of sizes that keep changing
                self._chosen.clear()
            names = self._candidates()
            self._chosen[nbytes] = names[0] if len(names) == 1 else self._of(names).cheapest(nbytes)
        return self._chosen[nbytes]

    def explain(self, nbytes: int) -> str:
        comm = self._comm
        ranks, hosts = (f"{n} {what}{'s' * (n > 1)}" for n, what in ((comm.size, "rank"), (comm.hosts, "host")))
        where = f"all_reduce of {nbytes} bytes on {ranks} of {hosts}"
        if comm.size == 1:
            return f"{where}: nothing to do"
        chosen = self.choose(nbytes)
        costs = self._of(self._candidates() + ["ring", "tree"] * comm.meets_in_memory)
        times = ", ".join(f"{name} {costs.predict(name, nbytes) * 1e6:.3g} us" for name in costs.seconds)
        reason = "in memory that its ranks share" if chosen == "shared" else "the least of these"
        return f"{where}: {chosen}, {reason} (ordinary tensors: {times})"

    def _candidates(self) -> list[str]:
        """What "auto" chooses among. Not "mpi": the order of its sum is not ours to promise."""
        comm = self._comm
        if comm.meets_in_memory:
            return ["shared"]
        several = comm.shares_memory and comm.hosts < comm.size
        return ["ring", "tree"] + ["hierarchical"] * several

    def _of(self, algorithms: list[str]) -> Costs:
        """From rank 0's cache, or measured now."""
        if tuple(algorithms) not in self._costs:
            with self._comm.whole("all_reduce: costs"):
                self._costs[tuple(algorithms)] = self._found(algorithms)
        return self._costs[tuple(algorithms)]

    def _found(self, algorithms: list[str]) -> Costs:
        from fastdp import _mpi

        comm = self._comm
        names = comm.allgather_object(platform.node())
        shape = {name: names.count(name) for name in dict.fromkeys(names)}
        library = _mpi.loaded_library().splitlines()[0].strip()
        machine = f"{os.cpu_count()} cores, {platform.machine()}"
        key = f"{shape}, {machine}, {library}, segments of {self._segment_bytes} bytes, {', '.join(algorithms)}"
        cached = comm.bcast_object(_of_all(_load().get(key), algorithms) if comm.rank == 0 else None)
        if cached is None or not self._holds(cached):
            cached = {algorithm: [_measure(comm, algorithm, nbytes) for nbytes in SIZES] for algorithm in algorithms}
            cached = comm.bcast_object(cached)
            if comm.rank == 0:
                _store(key, cached)
        return Costs(cached)

    def _holds(self, costs: dict[str, list[float]]) -> bool:
        """The hosts' names tell nothing of the network that joins them today."""
        algorithm, known = next(iter(costs.items()))
        return 1 / CHANGED < _measure(self._comm, algorithm, SIZES[1]) / known[1] < CHANGED


def _of_all(costs: object, algorithms: list[str]) -> dict[str, list[float]] | None:
    """None where they are damaged."""
    if not isinstance(costs, dict) or list(costs) != algorithms:
        return None
    whole = all(
        isinstance(times, list) and len(times) == len(SIZES) and all(isinstance(t, float) and t > 0 for t in times)
        for times in costs.values()
    )
    return costs if whole else None


def _measure(comm: Communicator, algorithm: str, nbytes: int) -> float:
    """Of the slowest rank; the median of some rounds after one that does not count."""
    x, seconds = torch.zeros(nbytes // 4), []
    for _ in range(1 + ROUNDS):
        comm.barrier()
        begin = time.perf_counter()
        comm.all_reduce(x, algorithm)
        seconds.append(time.perf_counter() - begin)
    slowest: float = max(comm.allgather_object(statistics.median(seconds[1:])))
    return slowest


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdp" / "all_reduce.json"


def _load() -> dict[str, object]:
    try:
        content = json.loads(_path().read_bytes())
        costs = content["costs"] if content["format"] == FORMAT else {}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return {}  # none, no home, or damaged: measured anew, and written over
    return costs if isinstance(costs, dict) else {}


def _store(key: str, costs: dict[str, list[float]]) -> None:
    try:
        make_folder(_path().parent)
        write_whole(
            _path(), lambda file: file.write(json.dumps({"format": FORMAT, "costs": {**_load(), key: costs}}).encode())
        )
    except (OSError, RuntimeError):
        pass  # a cache that cannot be written costs the next run a second
