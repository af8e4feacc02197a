"""fastdp.comm under mpirun (scripts in tests/mpi, many cases per launch), and how it checks its environment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from mpi import launch

from fastdp import comm
from fastdp import launch as launch_module
from fastdp.errors import CommError


def test_collectives_on_1_to_8_ranks() -> None:
    output = launch.run("collectives.py", ranks=8, timeout=240)
    for size in (1, 2, 3, 4, 7, 8):
        assert f"done: {size} ranks" in output


def test_sums_have_the_same_bits_in_every_launch() -> None:
    first, second = (launch.run("digest.py", ranks=3) for _ in range(2))
    assert "digest" in first and first == second


def test_more_than_2_to_the_31_bytes() -> None:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < 6 << 30:
        pytest.skip(f"needs 6 GiB of free memory, {available / 2**30:.1f} GiB are there")
    assert "done: large" in launch.run("large.py", ranks=2, timeout=240)


def test_sums_within_hosts_and_between_them() -> None:
    assert launch.run("hosts.py", ranks=8, timeout=240).count("done: [") == 4


def test_mismatches_are_errors_on_every_rank() -> None:
    for ranks in (3, 5):
        assert launch.run("mismatch.py", ranks=ranks).count("done: rank") == ranks


def files_in(folder: Path, count: int) -> set[str]:
    """Waits for `count` files: after a death, hydra may return before the survivors do."""
    deadline = time.perf_counter() + 10
    while len(names := {file.name for file in folder.iterdir()}) < count and time.perf_counter() < deadline:
        time.sleep(0.1)
    for file in folder.glob("* failed"):
        pytest.fail(file.read_text())
    return names


@pytest.mark.parametrize("ranks", [3, 5])
def test_a_late_rank_and_an_interrupted_one(ranks: int, tmp_path: Path) -> None:
    begin = time.perf_counter()
    result = launch.start("stall.py", str(tmp_path), "late", ranks=ranks, timeout=60)
    assert files_in(tmp_path, ranks) == {f"rank {rank}" for rank in range(ranks)}, result.stdout
    assert result.returncode != 0  # collectives never ended: the job is aborted at exit instead of hanging there
    assert time.perf_counter() - begin < 40


def test_a_rank_whose_program_ends(tmp_path: Path) -> None:
    begin = time.perf_counter()
    result = launch.start("leaves.py", str(tmp_path), ranks=3, timeout=60)
    assert files_in(tmp_path, 2) == {"rank 0", "rank 2"}, result.stdout
    assert result.returncode != 0
    assert time.perf_counter() - begin < 40


def test_what_programs_do_to_tensors_and_communicators() -> None:
    assert launch.run("hostile.py", ranks=2).count("done: rank") == 2


def test_forked_processes_are_no_ranks() -> None:
    assert launch.run("forks.py", ranks=2).count("done: rank") == 2


CUT_OFF = [
    "all_reduce window",
    "all_reduce small",
    "all_reduce",
    "all_reduce ring",
    "all_reduce tree messages",
    "all_reduce hierarchical",
    "all_reduce hierarchical hosts",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "reduce_noise_step",
    "handle",
    "handle ring messages",
]


@pytest.mark.parametrize("collective", [*CUT_OFF, "all_reduce mpi messages"])
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_dies_or_stops_in_the_middle(signal: str, collective: str, tmp_path: Path) -> None:
    killed = signal == "SIGKILL"
    if killed and collective == "all_reduce mpi messages":
        pytest.skip("MPI_Iallreduce of MPICH may end the survivors")
    try:
        result = launch.start("stall.py", str(tmp_path), signal, collective, ranks=3, timeout=60, cleanup=not killed)
    except subprocess.TimeoutExpired as hang:
        # Open MPI's with --enable-recovery waits for itself, 1 time in 20, when the survivors have ended.
        if not (killed and launch.is_open_mpi()):
            raise
        result = subprocess.CompletedProcess(hang.cmd, -1, str(hang.output))
    assert files_in(tmp_path, 2) == {"rank 0", "rank 2"}, result.stdout
    if not (killed and launch.is_open_mpi()):  # or returns 0, as often
        assert result.returncode != 0


@pytest.mark.parametrize("under_mpirun", [False, True])
def test_one_rank(under_mpirun: bool) -> None:
    if under_mpirun:
        output = launch.run("alone.py", ranks=1)
    else:
        command = [sys.executable, str(launch.HERE / "alone.py")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        output = result.stdout
    assert "done: alone" in output


# Stand-ins for mpi4py and fastdp._mpi, so that every mixture can be told apart in one environment.
MPICH = "MPICH Version:      5.0.2\nMPICH Release date: unset\0"
OPEN_MPI = "Open MPI v5.0.11, package: Open MPI root@host Distribution, ident: 5.0.11\0"


def load(
    monkeypatch: pytest.MonkeyPatch,
    mpi4py_library: str,
    extension_library: str | None,
    built_for: str = "MPICH",
    size: int = 1,
) -> None:
    mpi4py = ModuleType("mpi4py")
    mpi4py.MPI = SimpleNamespace(  # type: ignore[attr-defined]
        Get_library_version=lambda: mpi4py_library,
        Is_initialized=lambda: True,
        Is_finalized=lambda: False,
        COMM_WORLD=SimpleNamespace(Get_size=lambda: size),
    )
    mpi4py.rc = SimpleNamespace(initialize=False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
    extension = None
    if extension_library is not None:
        extension = ModuleType("fastdp._mpi")
        extension.loaded_library = lambda: extension_library  # type: ignore[attr-defined]
        extension.built_for = built_for  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastdp._mpi", extension)
    monkeypatch.setattr("fastdp._mpi", extension, raising=False)
    if extension is None:
        monkeypatch.delattr("fastdp._mpi")
    launch_module.load_mpi()


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.usefixtures("no_launcher")
class TestOneMPI:
    def test_agreement(self, monkeypatch: pytest.MonkeyPatch) -> None:
        load(monkeypatch, MPICH, MPICH)
        load(monkeypatch, OPEN_MPI, OPEN_MPI, built_for="Open MPI")
        monkeypatch.setenv("PMI_SIZE", "4")
        load(monkeypatch, MPICH, MPICH, size=4)

    def test_extension_and_mpi4py_differ(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
        with pytest.raises(CommError) as caught:
            load(monkeypatch, OPEN_MPI, MPICH)
        text = str(caught.value)
        for part in (
            "built for MPICH",
            "MPICH Version: 5.0.2",
            "Open MPI v5.0.11",
            "OMPI_COMM_WORLD_SIZE=2",
            "FASTDP_MPI",
        ):
            assert part in text
        assert "\n" not in text

    def test_loaded_library_is_not_the_one_compiled_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # mpi4py may load its library for all to see; the extension's symbols then resolve to that one.
        with pytest.raises(CommError, match="built for MPICH and loads Open MPI"):
            load(monkeypatch, OPEN_MPI, OPEN_MPI)

    def test_launcher_of_another_mpi(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
        with pytest.raises(CommError, match=r"Open MPI's mpirun .* started 2 processes, but each is alone: .*MPICH"):
            load(monkeypatch, MPICH, MPICH)

    def test_slurm_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
        with pytest.raises(CommError, match="srun"):
            load(monkeypatch, MPICH, MPICH)
        launch_module.load_mpi(alone=True)  # comm.init(MPI.COMM_SELF) in each job of a sweep
        monkeypatch.setenv("PMI_SIZE", "1")  # mpirun -n 1 inside the step: alone on purpose
        load(monkeypatch, MPICH, MPICH)

    def test_extension_cannot_be_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(CommError, match=r"fastdp\._mpi cannot load its MPI .* mpi4py uses MPICH"):
            load(monkeypatch, MPICH, None)

    def test_mpi4py_cannot_be_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "mpi4py", None)
        with pytest.raises(CommError, match=r"mpi4py cannot load MPI .*install"):
            comm.init()
