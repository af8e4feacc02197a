"""Runs that end early (P8, P10): by signals, kills and damage; and what they are resumed from."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi import kill, launch

from fastdp import ArgumentError, checkpoint, data, ledger, train
from fastdp.job import StopOnSignal

SEEDED = ["--seed", "3", "--epochs", "2", "--noise-multiplier", "1", "--momentum", "0.5"]


def begin(output: Path, *arguments: str, ranks: int = 0) -> subprocess.Popen[str]:
    """Starts the trainer in a process of its own, and waits for its second epoch."""
    prefix = []
    if ranks:
        mpirun = launch.find_mpirun() or pytest.skip("no mpirun")
        prefix = [mpirun, *(["--oversubscribe"] if launch.is_open_mpi() else []), "-n", str(ranks)]
    run = subprocess.Popen(
        [*prefix, sys.executable, "-m", "fastdp.train", "--output", str(output), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.stdout is not None
    while line := run.stdout.readline():
        if line.startswith("epoch 2"):
            return run
    pytest.fail(run.communicate()[1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    path = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*SEEDED, "--output", str(path)]) == 0
    return torch.load(path / "model.pt")


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGTERM) -> None:
    """The signal comes in the middle of a step: what it interrupts is finished."""
    loss_of, calls = train.loss_of, 0

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == steps:
            os.kill(os.getpid(), number)
        return loss_of(*arguments)

    monkeypatch.setattr(train, "loss_of", counted)


@pytest.mark.parametrize("steps", [1, 40])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(
    steps: int,
    uninterrupted: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        assert train.main([*SEEDED, "--output", str(output)]) == 130
    said = f"stopped after {steps} steps, which cost epsilon="
    assert said in (err := capsys.readouterr().err) and f"go on with --resume {output}" in err
    assert train.main(["--resume", str(output)]) == 0
    resumed = torch.load(output / "model.pt")
    for name, value in uninterrupted.items():
        assert torch.equal(value, resumed[name]), name
    report = json.loads((output / "report.json").read_text())
    assert report["steps"] == 64 and report["steps_lost"] == 0
    assert sum(ledger.read(output / "ledger.jsonl").values()) == 64
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert not (output / "checkpoints").exists()


def test_keys_of_a_resumed_run_are_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []
    urandom = os.urandom
    monkeypatch.setattr(os, "urandom", lambda n: keys.append(key := urandom(n)) or key)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train.main(["--epochs", "1", "--output", str(tmp_path / "run")]) == 130
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    secrets = [k for k in keys if len(k) == 32]
    assert len(secrets) == len(set(secrets)) == 2
    stored = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert not any(k in stored or k.hex().encode() in stored for k in secrets)


@pytest.mark.parametrize(("ranks", "name"), [(0, "SIGINT"), (2, "SIGINT"), (3, "SIGTERM")])
def test_a_signal_stops_all_ranks_at_the_same_step(ranks: int, name: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with begin(output, "--epochs", "5000", "--noise-multiplier", "20", ranks=ranks) as run:
        os.kill(launch.signalled(run) if ranks else run.pid, getattr(signal, name))
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors
    assert "Traceback" not in errors and errors.count("fastdp.train: stopped after ") == 1
    state, _ = checkpoint.load_newest(output / "checkpoints")
    assert state is not None
    spent = sum(ledger.read(output / "ledger.jsonl").values())
    assert f"stopped after {spent} steps" in errors and state["steps_trained"] == spent
    assert not (output / "model.pt").exists()


def test_a_wish_to_stop_at_the_last_step_comes_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 32)
    assert train.main(["--epochs", "1", "--noise-multiplier", "1", "--output", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == 32


def test_the_last_step_is_kept_when_its_evaluation_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise SystemExit  # an Exception would make this process deaf to SIGINT: fastdp.job expects its end

    monkeypatch.setattr(train, "evaluate", fail)
    with pytest.raises(SystemExit):
        train.main(["--epochs", "1", "--noise-multiplier", "1", "--output", str(tmp_path / "run")])
    state, _ = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert state is not None and state["steps"] == state["steps_trained"] == 32


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_any_second_signal_interrupts_and_the_handlers_come_back(first: int, second: int) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    asked = []
    with StopOnSignal(lambda: asked.append(True)):
        signal.raise_signal(first)
        assert asked == [True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
    assert asked == [True]
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    output = tmp_path / "out"
    slow = Path(launch.HERE / "train_slow_step.py")
    with subprocess.Popen(
        [sys.executable, str(slow), str(output)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        while "asleep" not in run.stdout.readline():
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        assert "asked" in run.stdout.readline()
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=30)
    assert run.returncode == 130
    assert errors.startswith("fastdp.train: interrupted after 2 steps, which cost epsilon=") and errors.count("\n") == 1
    assert f"go on with --resume {output}" in errors


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """10 here; `python tests/mpi/kill.py 50` for more. The checks are in there."""
    if launch.find_mpirun() is None:
        pytest.skip("no mpirun")
    for report in kill.kill_and_resume(tmp_path, kills=10, seed=int.from_bytes(os.urandom(4), "little")):
        assert report["accuracy"] > 0.82


def interrupted_run(output: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 40)
        more = ["--epochs", "2", "--noise-multiplier", "1", "--checkpoint-every", "1e-9", "--output", str(output)]
        assert train.main([*more, *arguments]) == 130


@pytest.mark.parametrize("damage", ["cut off", "bit", "empty", "other", "format"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_run(tmp_path / "run", monkeypatch)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [p.name for p in checkpoints] == ["step-0000000039.pt", "step-0000000040.pt"]
    content = bytearray(checkpoints[1].read_bytes())
    if damage == "bit":
        content[content.index(b"data/0") + 200] ^= 1
    other_format = io.BytesIO()
    torch.save(torch.load(checkpoints[1]) | {"format": "fastdp checkpoint 0"}, other_format)
    damaged = {
        "cut off": content[:-100],
        "bit": content,
        "empty": b"",
        "other": b"hello" * 1000,
        "format": other_format.getvalue(),
    }[damage]
    checkpoints[1].write_bytes(damaged)
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert "step-0000000040.pt is damaged (" in capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 64 and report["steps_lost"] == 1


def test_lost_steps_are_remembered_when_the_run_is_stopped_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_run(tmp_path / "run", monkeypatch)
    (tmp_path / "run" / "checkpoints" / "step-0000000040.pt").unlink()
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert train.main(["--resume", str(tmp_path / "run")]) == 130
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 64 and report["steps_lost"] == 1


def test_without_an_undamaged_checkpoint_nothing_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_run(tmp_path / "run", monkeypatch)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"x")
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        train.main(["--resume", str(tmp_path / "run")])
    assert "must be a run with an undamaged checkpoint" in capsys.readouterr().err
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("ledger_is", ["absent", "another", "damaged"])
def test_a_run_without_its_ledger_is_not_resumed(
    ledger_is: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_run(tmp_path / "run", monkeypatch)
    path = tmp_path / "run" / "ledger.jsonl"
    if ledger_is == "damaged":
        path.write_bytes(path.read_bytes()[1:])
    else:
        path.unlink()
    if ledger_is == "another":
        other = ledger.DurableLedger(path)
        other.step(1.0, 0.1, 39)
        other.close()
    before = sorted((p, p.read_bytes()) for p in (tmp_path / "run").rglob("*.*"))
    message = {
        "absent": "must be a run with its ledger.jsonl: what it spent cannot be told",
        "another": "holds 39 steps': must be a run with its whole ledger.jsonl: the checkpoint is of step 40",
        "damaged": "must be undamaged: what was spent cannot be told (line 1)",
    }[ledger_is]
    mpirun = launch.find_mpirun() or pytest.skip("no mpirun")
    command = [mpirun, "-n", "2", sys.executable, "-m", "fastdp.train", "--resume", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("fastdp.train: error") == 1
    assert sorted((p, p.read_bytes()) for p in (tmp_path / "run").rglob("*.*")) == before


def test_a_run_whose_last_steps_were_all_lost_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_run(tmp_path / "run", monkeypatch)
    crashed = ledger.DurableLedger(tmp_path / "run" / "ledger.jsonl")
    crashed.step(1.0, 1024 / 32561, 50)  # reserved beyond the 64 steps of the run, whose noise is given
    crashed.close()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 90 and report["steps_lost"] == 50


KILLED = """
import os, signal, sys
from fastdp import train
fsync, left = os.fsync, int(sys.argv[1])
def killed(file):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = killed
train.main(["--epochs", "1", "--noise-multiplier", "1", "--output", sys.argv[2]])
"""


@pytest.mark.parametrize("moment", range(1, 11))
def test_a_run_killed_before_it_was_begun_is_begun_again(moment: int, tmp_path: Path) -> None:
    """At each fsync until run.json is there: what is left behind is nobody's, and --resume auto begins the run."""
    output = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", KILLED, str(moment), str(output)], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert output.is_dir()
    more = ["--epochs", "1", "--noise-multiplier", "1"] if not (output / "run.json").exists() else []
    assert train.main(["--resume", "auto", "--output", str(output), *more]) == 0


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_process_finished_meanwhile_is_not_written_over(
    resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This process has looked at the folder, and waits for the ledger that the other holds until it is done."""
    path, options = tmp_path / "run", ["--epochs", "2", "--noise-multiplier", "1", "--output", str(tmp_path / "run")]
    if resume:
        interrupted_run(path, monkeypatch)
        options = ["--resume", str(path)]
    make_run, finished = train.make_run, []

    def late(*arguments: Any) -> Any:
        if not finished:
            finished.append(True)
            assert train.main(options) == 0
            finished.append((path / "model.pt").read_bytes())
        return make_run(*arguments)

    monkeypatch.setattr(train, "make_run", late)
    with pytest.raises(SystemExit, match="2"):
        train.main(options)
    assert f"error: {'resume' if resume else 'output'}='{path}': must be" in capsys.readouterr().err
    assert (path / "model.pt").read_bytes() == finished[1]


def test_the_checkpoint_is_read_when_the_ledger_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that, the process that is being stopped may write another."""
    interrupted_run(tmp_path / "run", monkeypatch)
    load_newest = checkpoint.load_newest
    monkeypatch.setattr(ledger, "LOCK_SECONDS", 0.0)

    def held(path: Path) -> Any:
        with pytest.raises(ArgumentError, match="still going on"):
            ledger.DurableLedger(tmp_path / "run" / "ledger.jsonl")
        return load_newest(path)

    monkeypatch.setattr(checkpoint, "load_newest", held)
    assert train.main(["--resume", str(tmp_path / "run")]) == 0


def test_another_table_is_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_run(tmp_path / "run", monkeypatch)
    whole = data.load("adult")
    less = dataclasses.replace(whole, train_features=whole.train_features[1:], train_labels=whole.train_labels[1:])
    monkeypatch.setattr(data, "load", lambda *_: less)
    with pytest.raises(SystemExit, match="2"):
        train.main(["--resume", str(tmp_path / "run")])
    message = "data='32560 training records': must be the table of the run that is resumed, of 32561"
    assert message in capsys.readouterr().err


def test_another_schema_is_not_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_run(tmp_path / "run", monkeypatch)
    whole = data.load("adult")
    renamed = dataclasses.replace(whole, feature_names=("another", *whole.feature_names[1:]))
    monkeypatch.setattr(data, "load", lambda *_: renamed)
    with pytest.raises(SystemExit, match="2"):
        train.main(["--resume", str(tmp_path / "run")])
    assert "schema='changed': must be as the run was begun with" in capsys.readouterr().err


def test_shuffled_epochs_that_were_cut_off_are_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 40)  # in the second of three epochs
        shuffled = ["--shuffle", "--epochs", "3", "--target-epsilon", "10", "--output", str(output)]
        assert train.main(shuffled) == 130
    assert train.main(["--resume", str(output)]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["steps"] == 3 * 32 and report["steps_lost"] == 2 * 32 - 40
    assert list(ledger.read(output / "ledger.jsonl").values()) == [3]
    assert report["epsilon"] <= 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "0.5"], "lr=0.5: must be absent as in the run that is resumed"),
        (["--epochs", "3"], "epochs=3: must be 2 as in the run that is resumed"),
        (["--noise-multiplier", "none"], "noise_multiplier=None: must be 1.0 as in the run"),
        (["--target-epsilon", "1"], "target_epsilon=1.0: must be absent as in the run"),
        (["--seed", "1"], "seed=1: must be absent as in the run"),
        (["--max-grad-norm", "1"], "max_grad_norm=1.0: must be 4.0 as in the run"),
        (["--clipping", "automatic"], "clipping='automatic': must be 'flat' as in the run"),
        (["--secure-mode"], "secure_mode=True: must be False as in the run"),
        (["--delta", "1e-6"], "delta=1e-06: must be 1e-05 as in the run"),
        (["--batch-size", "512"], "batch_size=512: must be 1024 as in the run"),
        (["--model", "logistic"], "model='logistic': must be 'mlp:32' as in the run"),
        (["--data", "x.csv"], "data='x.csv': must be 'adult' as in the run"),
        (["--output", "elsewhere"], "output='elsewhere': must be absent, or the folder that is resumed"),
    ],
)
def test_what_a_resumed_run_refuses(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupted_run(tmp_path / "run", monkeypatch)
    before = sorted((p, p.read_bytes()) for p in (tmp_path / "run").rglob("*.*"))
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted((p, p.read_bytes()) for p in (tmp_path / "run").rglob("*.*")) == before
