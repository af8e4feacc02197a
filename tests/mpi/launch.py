"""Starts scripts of this folder under mpirun."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def find_mpirun() -> str | None:
    """That of this environment before any other on PATH: a mixture would run every rank alone."""
    beside_python = Path(sys.executable).with_name("mpirun")
    return str(beside_python) if beside_python.exists() else shutil.which("mpirun")


@functools.cache
def is_open_mpi() -> bool:
    mpirun = find_mpirun()
    assert mpirun
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60)
    return "open mpi" in (version.stdout + version.stderr).lower()


@functools.cache
def _cache() -> str:
    """For the costs that all-reduce measures: the user's own stay as they are."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def start(
    script: str, *args: str, ranks: int, timeout: float = 120, cleanup: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `script`; stdout and stderr come back together. cleanup=False: the survivors of a death go on.

    hydra ends the process groups of the survivors by SIGKILL, 1 time in 10 even with -disable-auto-cleanup (seen in its
    calls of kill): a session of their own keeps them out of its reach. They must end by themselves.
    """
    mpirun = find_mpirun()
    if mpirun is None:
        pytest.skip("no mpirun, neither beside python nor on PATH")
    flags: list[str] = []
    session: list[str] = []
    if is_open_mpi():
        flags += ["--oversubscribe", *(["--enable-recovery"] if not cleanup else [])]
    elif not cleanup:
        flags += ["-disable-auto-cleanup"]
        session += ["setsid", "--wait"]
    # One thread per rank: there are more ranks than cores.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "XDG_CACHE_HOME": _cache(),
    }
    command = [mpirun, *flags, "-n", str(ranks), *session, sys.executable, str(HERE / script), *args]
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=timeout,
        env=environment,
    )


def signalled(mpirun: subprocess.Popen[str]) -> int:
    """The process to ask for an end: mpirun itself, but under Open MPI a rank, its child.

    Open MPI's mpirun passes SIGTERM on for both signals, kills all ranks 0.25 s later and returns 1 (5.0.11).
    """
    if not is_open_mpi():
        return mpirun.pid
    threads = Path(f"/proc/{mpirun.pid}/task").iterdir()
    return max(int(pid) for thread in threads for pid in (thread / "children").read_text().split())


def run(script: str, *args: str, ranks: int, timeout: float = 120) -> str:
    """`start`, and every rank must have ended well."""
    result = start(script, *args, ranks=ranks, timeout=timeout)
    assert result.returncode == 0, result.stdout
    return result.stdout
