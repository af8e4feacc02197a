"""Kills training runs at random moments, resumes them, and looks whether anything was under-reported, torn or hung.

`python tests/mpi/kill.py KILLS [SEED]`: so many kills, spread over as many runs as it takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mpi import launch

from fastdp import accounting, checkpoint, ledger

EPOCHS, TARGET = 40, 2.0
STEPS = EPOCHS * 32


class Run:
    """One training run of several processes, one after the other, and the diaries of their steps."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.diary, self.chance = folder / "run", folder / "diary", chance
        self.diary.mkdir(parents=True)
        self.calibrated = chance.random() < 0.5
        self.executed: list[int] = []
        self.keys: list[str] = []

    def start(self, ranks: int) -> subprocess.Popen[bytes]:
        mpirun, self.ranks = launch.find_mpirun(), ranks
        assert mpirun
        flags = ["--oversubscribe"] if launch.is_open_mpi() else []
        command = [sys.executable, str(launch.HERE / "observed_train.py"), str(self.diary)]
        noise = f"--target-epsilon {TARGET}" if self.calibrated else "--noise-multiplier 1.5"
        options = f"--epochs {EPOCHS} {noise} --accountant rdp --checkpoint-every 0.3 --timeout 20"
        where = ["--output", str(self.folder), "--resume", "auto"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(self.diary / "output", "ab") as output:
            return subprocess.Popen(
                [mpirun, *flags, "-n", str(ranks), *command, *options.split(), *where],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def kill_once(self) -> str:
        """Start or resume the run and kill one or all of its processes; returns what was done."""
        ranks = self.chance.choice((1, 2, 3))
        everybody = self.chance.random() < 0.5
        from_the_start = self.chance.random() < 0.25
        process = self.start(ranks)
        if not from_the_start:
            while not self._diaries() and process.poll() is None:
                time.sleep(0.01)
        delay = self.chance.uniform(0, 5 if from_the_start else 1.5)
        time.sleep(delay)
        pids = [int(p.suffix[1:]) for p in self.diary.glob("steps.*")]
        self.chance.shuffle(pids)
        victims = [process.pid, *pids] if everybody or not pids else pids[:1]
        for pid in victims:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):  # the first one's death may have been the others'
                    os.kill(pid, signal.SIGKILL)
        status = process.wait(timeout=90)  # a hang ends the test
        for pid in pids:  # those whose launcher was killed
            wait_for(pid)
        moment = "start" if from_the_start else "first step"
        return f"{len(victims)} of {ranks} ranks, {delay:.2f} s after the {moment}, exit {status}: {self.check()}"

    def finish(self) -> dict[str, float]:
        process = self.start(2)
        assert process.wait(timeout=180) == 0, (self.diary / "output").read_text()
        self.check()
        report: dict[str, float] = json.loads((self.folder / "report.json").read_text())
        steps = report["steps"]
        assert steps == STEPS or (steps > STEPS and not self.calibrated), report
        assert report["steps_lost"] >= steps - len(self.executed), report
        events = ledger.read(self.folder / "ledger.jsonl")
        ((event, spent),) = events.items()
        assert spent == steps
        released = accounting.epsilon(
            noise_multiplier=event[0], sample_rate=event[1], steps=len(self.executed), delta=1e-5, accountant="rdp"
        )
        assert released <= report["epsilon"], (released, report)
        assert not self.calibrated or report["epsilon"] <= TARGET, report
        return report

    def check(self) -> str:
        self._read_diaries()
        assert self.executed == sorted(set(self.executed)), "a step was done twice"
        path = self.folder / "ledger.jsonl"
        spent = sum(ledger.read(path).values()) if path.exists() and path.stat().st_size else 0
        # Other ranks may be in a step that rank 0 was killed before it had recorded: nothing of it is released.
        ahead = [step for step in self.executed if step > spent]
        assert len(ahead) <= (self.ranks > 1), (ahead, spent)
        del self.executed[len(self.executed) - len(ahead) :]
        assert len(self.executed) <= spent, (len(self.executed), spent)
        assert not self.calibrated or spent <= STEPS, spent
        state, damaged = checkpoint.load_newest(self.folder / "checkpoints")
        assert not damaged
        saved = [int(p.stem[5:]) for p in (self.folder / "checkpoints").glob("step-*.pt")]
        assert all(step <= spent for step in saved)
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        assert all(json.loads(line)["step"] <= spent for line in lines)
        trained = state["steps_trained"] if state else None
        return (
            f"{len(self.executed)} steps done, {spent} spent, newest checkpoint {max(saved, default=None)} ({trained})"
        )

    def _diaries(self) -> list[list[str]]:
        files = self.diary.glob("steps.*")
        return [lines for f in files if (lines := f.read_text().split("\n")[:-1])]

    def _read_diaries(self) -> None:
        """Those of one session, whose ranks agree on step and key; then they are removed."""
        sessions = self._diaries()
        if sessions:
            longest = max(sessions, key=len)
            assert all(lines == longest[: len(lines)] for lines in sessions), "ranks are not at the same step"
            steps, keys = zip(*(line.split() for line in longest), strict=True)
            assert len(set(keys)) == 1 and keys[0] not in self.keys, "a key was used again"
            self.keys.append(keys[0])
            self.executed += map(int, steps)
        for file in self.diary.glob("steps.*"):
            file.unlink()


def wait_for(pid: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in status_of(pid):
        assert time.monotonic() < deadline, f"process {pid} hangs"
        time.sleep(0.05)


def status_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "\nState:\tZ"


def kill_and_resume(folder: Path, kills: int, seed: int) -> list[dict[str, float]]:
    """Runs until so many kills are done; the reports of the runs, each brought to its end."""
    chance = random.Random(seed)
    reports = []
    while kills > 0:
        run = Run(folder / f"{kills}", chance)
        for _ in range(min(kills, 10)):
            kills -= 1
            print(run.kill_once(), flush=True)
            if (run.folder / "report.json").exists():
                break
        if not (run.folder / "report.json").exists():
            reports.append(run.finish())
            print({k: reports[-1][k] for k in ("accuracy", "epsilon", "steps", "steps_lost")}, flush=True)
    return reports


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kill_and_resume(Path(folder), int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
