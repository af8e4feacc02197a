"""Collectives over several hosts, emulated on this machine by bench/hosts.py, where that is permitted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import hosts
import pytest

HERE = Path(__file__).parent


def need_hosts() -> None:
    if reason := hosts.why_not():
        pytest.skip(f"no hosts here: {reason}")


def test_two_hosts_of_two_ranks() -> None:
    need_hosts()
    with hosts.emulate(2, "1gbit") as two:
        before = [two.sent(host) for host in range(2)]
        command = [sys.executable, str(HERE / "mpi" / "on_hosts.py"), "2"]
        how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = two.mpirun(4, command, **how, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
        sent = [two.sent(host) - before[host] for host in range(2)]
    assert done.returncode == 0, done.stdout
    for rank in range(4):
        assert f"done: rank {rank} on host{rank // 2}" in done.stdout
    # A host needs the other one's sums: of 30,011 numbers in 4, 8 and 8 bytes, by 5 algorithms.
    assert min(sent) > 30_011 * 20 * 5
    speed = re.search(r"(\d+) bytes per second", done.stdout)
    assert speed and int(speed[1]) < 1.1 * 1e9 / 8, done.stdout


def running(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes().decode() if folder.name.isdecimal() else ""
        except OSError:  # has ended
            continue
        if mark in line:
            found.append(line.replace("\0", " "))
    return found


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_runs_on_after_the_end(end: signal.Signals) -> None:
    need_hosts()
    # No shell may stand between: the mark is on the command lines of mpirun, of its daemons' ranks, and of the script.
    mark = f"mark-{os.getpid()}-{end}"
    sleep = [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)", mark]
    command = [sys.executable, hosts.__file__, "--hosts", "2", "--", *sleep]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as script:
        assert script.stdout and script.stdout.readline().startswith("up")  # "upup", when both speak at once
        script.send_signal(end)
    deadline = time.perf_counter() + 10
    while (left := running(mark)) and time.perf_counter() < deadline:
        time.sleep(0.1)
    assert left == []
    assert script.returncode != 0


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(hosts.Unavailable, match="needs root"):
        patch.setattr(os, "geteuid", lambda: 1000)
        hosts.emulate(2).__enter__()
    with monkeypatch.context() as patch, pytest.raises(hosts.Unavailable, match="no unshare on PATH"):
        patch.setattr(os, "geteuid", lambda: 0)
        patch.setenv("PATH", "")
        hosts.emulate(2).__enter__()
    with pytest.raises(ValueError, match="count=0: must be in"):
        hosts.emulate(0).__enter__()
    with pytest.raises(ValueError, match="rate='fast': must be a number of kbit, mbit or gbit"):
        hosts.emulate(2, "fast").__enter__()


def test_ranks_are_spread_evenly() -> None:
    need_hosts()
    with (
        hosts.emulate(2) as two,
        pytest.raises(ValueError, match="ranks=3: must be a multiple of the number of hosts, 2"),
    ):
        two.mpirun(3, ["true"])
