"""Benchmarks run only when asked for: `pytest --benchmark-only`. Each is paired with its peer in the same process.

The setup of each round runs the peer on fresh inputs, the timed call then runs ours on the same inputs: both see the
same machine, however noisy, and `ratio` in the results is the ratio of the medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Pair = Callable[..., float]


def pytest_configure(config: pytest.Config) -> None:
    """Results are always kept, under .benchmarks/, for `pytest --benchmark-only --benchmark-compare`."""
    if config.getoption("benchmark_only", False) and not config.getoption("benchmark_save"):
        config.option.benchmark_autosave = f"{time.strftime('%Y%m%d_%H%M%S')}"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if config.getoption("benchmark_only", False) else True


@pytest.fixture
def pair(benchmark: Any) -> Pair:
    """pair(peer, ours, fresh, rounds=30) -> median(ours) / median(peer); fresh() -> the arguments of both."""

    def run(
        peer: Callable[..., Any], ours: Callable[..., Any], fresh: Callable[[], tuple[Any, ...]], rounds: int = 30
    ) -> float:
        times: list[float] = []

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            arguments = fresh()
            start = time.perf_counter()
            peer(*arguments)
            times.append(time.perf_counter() - start)
            return arguments, {}

        benchmark.pedantic(ours, setup=setup, rounds=rounds, warmup_rounds=3)
        base = statistics.median(times[3:])
        benchmark.extra_info["peer_median_s"] = base
        benchmark.extra_info["ratio"] = benchmark.stats.stats.median / base
        return float(benchmark.extra_info["ratio"])

    return run


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [(b.name, b.extra_info) for b in getattr(session, "benchmarks", []) if b.extra_info]
    if rows:
        terminalreporter.section("against the peer in the same run (medians)")
        for name, info in rows:
            terminalreporter.write_line(name)
            for fact, value in info.items():
                shown = f"{value:.4g}" if isinstance(value, float) else str(value)
                terminalreporter.write_line(f"    {fact}: {shown}")
