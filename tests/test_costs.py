"""What "auto" chooses, from costs that are measured once and kept."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastdp import costs

SECONDS = {"ring": [30e-6, 60e-6, 400e-6], "tree": [20e-6, 70e-6, 600e-6]}


def test_times_between_and_beyond_what_was_measured() -> None:
    known = costs.Costs(SECONDS)
    for nbytes, seconds in zip(costs.SIZES, SECONDS["ring"], strict=True):
        assert known.predict("ring", nbytes) == pytest.approx(seconds)
    assert known.predict("ring", 0) == pytest.approx(30e-6)
    half = (costs.SIZES[1] + costs.SIZES[2]) // 2
    assert known.predict("ring", half) == pytest.approx(230e-6)
    assert known.predict("ring", 2 * costs.SIZES[2]) == pytest.approx(400e-6 + 340e-6 * 16 / 15)
    assert [known.cheapest(nbytes) for nbytes in (8, 1 << 10, 1 << 16, 1 << 26)] == ["tree", "tree", "ring", "ring"]


def test_noise_in_what_was_measured_makes_no_time_shrink_with_size() -> None:
    known = costs.Costs({"ring": [50e-6, 40e-6, 30e-6]})
    assert known.predict("ring", 1 << 30) >= 30e-6


class Hosts:
    """Two ranks on two hosts, of which this is rank 0; counts what is measured."""

    rank, size, hosts, shares_memory, meets_in_memory = 0, 2, 2, False, False
    whole = staticmethod(contextlib.nullcontext)

    def __init__(self) -> None:
        self.measured, self.seconds = 0, 0.001

    def allgather_object(self, x: Any) -> list[Any]:
        return [x, f"other {x}"] if isinstance(x, str) else [x, x]

    def bcast_object(self, x: Any) -> Any:
        return x

    def barrier(self) -> None:
        pass

    def all_reduce(self, x: Any, algorithm: str) -> None:
        self.measured += 1
        time.sleep(self.seconds)


@pytest.fixture
def comm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hosts:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(
        __import__("sys").modules, "fastdp._mpi", SimpleNamespace(loaded_library=lambda: "MPICH Version: 5\nmore")
    )
    monkeypatch.setattr("fastdp._mpi", SimpleNamespace(loaded_library=lambda: "MPICH Version: 5\nmore"), raising=False)
    return Hosts()


def test_costs_are_measured_once(comm: Hosts, tmp_path: Path) -> None:
    for _ in range(2):  # processes
        chooser = costs.Chooser(comm, 1024)  # type: ignore[arg-type]
        assert chooser.choose(100) in ("ring", "tree")
        assert "2 ranks of 2 hosts: " in chooser.explain(100) and "ring " in chooser.explain(100)
    look = 1 + costs.ROUNDS  # whether the network is what it was
    once = 2 * len(costs.SIZES) * look
    assert comm.measured == once + look
    costs.Chooser(comm, 2048).choose(100)  # type: ignore[arg-type]
    assert comm.measured == 2 * once + look  # other segments
    (file,) = (tmp_path / "cache" / "fastdp").iterdir()
    kept = json.loads(file.read_bytes())
    for damage in (
        json.dumps({**kept, "costs": {key: {"ring": [1.0, 0.0, 1.0], "tree": []} for key in kept["costs"]}}).encode(),
        b"{",
        b"[]",
        b'{"format": "fastdp costs 0", "costs": 3}',
        b'{"format": "fastdp costs 1", "costs": 3}',
    ):
        file.write_bytes(damage)
        before = comm.measured
        costs.Chooser(comm, 1024).choose(100)  # type: ignore[arg-type]
        assert comm.measured == before + once


def test_costs_are_measured_anew_on_another_network(comm: Hosts) -> None:
    costs.Chooser(comm, 1024).choose(100)  # type: ignore[arg-type]
    look, measured = 1 + costs.ROUNDS, comm.measured
    comm.seconds *= 10
    for expected in (measured + look + measured, measured + look + measured + look):
        costs.Chooser(comm, 1024).choose(100)  # type: ignore[arg-type]
        assert comm.measured == expected


def test_a_cache_that_cannot_be_written_is_done_without(
    comm: Hosts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert costs.Chooser(comm, 1024).choose(100) in ("ring", "tree")  # type: ignore[arg-type]
