"""P8: what was reserved on disk counts as spent, whatever ended the process; and no run is under-reported."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastdp import ArgumentError, PrivacyEngine, PrivacyError, accounting, ledger
from fastdp.ledger import DurableLedger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ledger.jsonl"


def test_a_run_that_ends_in_good_order_has_spent_its_steps(path: Path) -> None:
    first = DurableLedger(path)
    for _ in range(37):
        first.step(1.1, 0.01)
    first.step(1.0, 0.5, 3)
    first.close()
    assert ledger.read(path) == {(1.1, 0.01): 37, (1.0, 0.5): 3}
    second = DurableLedger(path)
    assert second.events == {(1.1, 0.01): 37, (1.0, 0.5): 3}
    assert second.epsilon(1e-5) == first.epsilon(1e-5) > 0
    second.step(1.1, 0.01)
    second.close()
    assert ledger.read(path)[1.1, 0.01] == 38


def test_steps_are_on_disk_before_they_are_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    spending = DurableLedger(path)
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(sum(ledger.read(path).values())))
    for steps in range(1, 200):
        spending.step(1.0, 0.1)
        assert synced[-1] >= steps == spending.steps
    assert len(synced) < 20  # in blocks that grow: 2, 4, 8 ...
    spending.close()


def test_blocks_shrink_when_steps_are_slow(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    spending = DurableLedger(path)
    for _ in range(100):
        spending.step(1.0, 0.1)  # in no time
    for _ in range(1000):
        now += 3.0
        spending.step(1.0, 0.1)
    ahead = sum(ledger.read(path).values()) - spending.steps
    spending.close()
    assert ahead == 0


def test_the_limit_is_not_reserved_beyond(path: Path) -> None:
    spending = DurableLedger(path, limit=100)
    for steps in range(1, 101):
        spending.step(1.0, 0.1)
        assert steps <= sum(ledger.read(path).values()) <= 100
    spending.step(1.0, 0.1)  # whoever asks for more gets it, and it counts
    assert sum(ledger.read(path).values()) == 101
    spending.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from fastdp.ledger import DurableLedger
spending = DurableLedger(Path(sys.argv[1]))
for step in range(10**9):
    spending.step(1.0, 0.1)
    os.write(1, b".")  # the release
    if len(sys.argv) > 2 and step == int(sys.argv[2]):
        sys.exit()
"""


def test_a_killed_process_has_spent_at_least_what_it_released(path: Path) -> None:
    before = 0
    for delay in (0.0, 0.01, 0.2):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as run:
            assert run.stdout is not None
            released = len(run.stdout.read(1))
            time.sleep(delay)
            run.send_signal(signal.SIGKILL)
            released += len(run.stdout.read())
        spent = sum(ledger.read(path).values())
        assert spent >= before + released
        before = spent
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), "9"], stdout=subprocess.PIPE, timeout=60)
    assert len(done.stdout) == 10 and sum(ledger.read(path).values()) == before + 10  # closed at exit


def test_a_line_that_was_being_written_is_cut_off(path: Path) -> None:
    spending = DurableLedger(path)
    spending.step(1.0, 0.1)
    spending.close()
    content = path.read_bytes()
    last = content.splitlines(keepends=True)[-1]
    for torn in range(1, len(last)):
        path.write_bytes(content + last[:torn])
        again = DurableLedger(path)
        assert again.steps == 1
        again.step(1.0, 0.1)
        again.close()
        assert ledger.read(path) == {(1.0, 0.1): 2}


def test_a_new_name_and_a_cut_are_on_disk_before_the_first_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[os.stat_result] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file)))
    DurableLedger(path).close()
    assert [each.st_ino for each in synced] == [p.stat().st_ino for p in (path.parent.parent, path, path.parent)]
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"torn")
    synced.clear()
    DurableLedger(path).close()
    assert [(each.st_ino, each.st_size) for each in synced] == [(path.stat().st_ino, whole)]


def test_a_closed_ledger_is_not_kept_until_the_process_ends(path: Path) -> None:
    closed = DurableLedger(path)
    closed.close()
    kept = weakref.ref(closed)
    del closed
    assert kept() is None


def test_a_damaged_ledger_is_refused(path: Path) -> None:
    spending = DurableLedger(path)
    for _ in range(9):
        spending.step(1.0, 0.1)
    spending.close()
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    damaged = [
        b"".join(lines[:1] + lines[2:]),
        b"".join(lines[1:]),
        b"".join([*lines, lines[-1]]),
        content.replace(b'"reserve": 2', b'"reserve": 1'),
        content.replace(b'"reserve"', b'"unused" '),
        content.replace(b"\n", b"\n\n", 1),
        b"hello\n",
    ]
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(ArgumentError, match="what was spent cannot be told"):
            DurableLedger(path)
        assert path.read_bytes() == bad


def test_one_process_holds_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "LOCK_SECONDS", 0.2)
    spending = DurableLedger(path)
    with pytest.raises(ArgumentError, match="still going on"):
        DurableLedger(path)
    spending.close()
    DurableLedger(path).close()


def test_what_cannot_be_written_is_not_spent(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spending = DurableLedger(path)
    spending.step(1.0, 0.1)

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(PrivacyError, match="No space left on device"):
            for _ in range(10):
                spending.step(1.0, 0.1)
    with pytest.raises(PrivacyError, match="closed"):  # what the file holds is uncertain
        spending.step(1.0, 0.1)
    with pytest.raises(ArgumentError, match="can be written"):
        DurableLedger(path / "below a file")


def test_an_interrupt_while_a_line_is_written_leaves_a_ledger_that_can_be_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spending = DurableLedger(path)
    spending.step(1.0, 0.1)
    fsync = os.fsync

    def interrupted(file: int) -> None:
        fsync(file)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            spending.step(1.0, 0.1)
    with pytest.raises(PrivacyError, match="closed"):  # a notebook, whose cell is run again
        spending.step(1.0, 0.1)
    spending.close()
    assert ledger.read(path)[1.0, 0.1] >= 1
    DurableLedger(path).close()


def test_bad_arguments_reserve_nothing(path: Path) -> None:
    spending = DurableLedger(path)
    for wrong in ((-1.0, 0.1, 1), (1.0, 0.0, 1), (1.0, 0.1, -1)):
        with pytest.raises(ArgumentError):
            spending.step(*wrong)
    spending.close()
    assert ledger.read(path) == {}


FORKED = """
import os, signal, sys
from pathlib import Path
from fastdp import PrivacyError
from fastdp.ledger import DurableLedger
spending = DurableLedger(Path(sys.argv[1]))
spending.step(1.0, 0.1)
spending.step(1.0, 0.1)  # reserves another, which the child must not give back
child = os.fork()
if child == 0:
    signal.alarm(30)
    try:
        spending.close()
        spending.step(1.0, 0.1)
    except PrivacyError:
        os._exit(7)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
spending.step(1.0, 0.1)
spending.close()
"""


def test_a_forked_child_can_spend_nothing(path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORKED, str(path)], timeout=60, check=True)
    assert ledger.read(path) == {(1.0, 0.1): 3}


def train(path: Path, steps: int, seed: int | None = None, **arguments: object) -> tuple[list[int], float]:
    """Steps of a user's own loop: their numbers, and what the run has cost by then."""
    engine = PrivacyEngine(accountant="rdp", seed=seed, ledger=path, prior=arguments.pop("prior", None))
    model = torch.nn.Linear(3, 1)
    common = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(TensorDataset(torch.randn(64, 3)), batch_size=8),
        "max_grad_norm": 1.0,
    }
    done: list[int] = []
    try:
        if "target_epsilon" in arguments:
            _, optimizer, loader = engine.make_private_with_epsilon(**common, target_delta=1e-5, **arguments)
        else:
            _, optimizer, loader = engine.make_private(**common, **arguments)
        while True:
            for (x,) in loader:
                if len(done) == steps:
                    return done, engine.get_epsilon(1e-5)
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                done.append(optimizer.steps)
    finally:
        engine.close()


def test_a_loop_of_the_users_own_goes_on_where_its_ledger_stands(path: Path) -> None:
    done, first = train(path, 11, noise_multiplier=1.0)
    assert done == list(range(1, 12))
    done, second = train(path, 5, noise_multiplier=1.0)
    assert done == list(range(12, 17)) and second > first
    _, third = train(path, 1, noise_multiplier=2.0)  # another mechanism: composed with what was
    assert third > second
    assert ledger.read(path) == {(1.0, 0.125): 16, (2.0, 0.125): 1}


def test_a_calibrated_run_cannot_be_stretched_by_starting_it_again(path: Path) -> None:
    train(path, 11, target_epsilon=1.0, epochs=2)
    with pytest.raises(PrivacyError, match="step 17: the noise was calibrated for 16 steps"):
        train(path, 6, target_epsilon=1.0, epochs=2)
    assert list(ledger.read(path).values()) == [16]
    with pytest.raises(ArgumentError, match=r"ledger: epsilon=0\.99\d+: must be at most target_epsilon=0\.5 with"):
        train(path, 1, target_epsilon=0.5, epochs=2)
    with pytest.raises(PrivacyError, match="calibrated for 16 steps"):
        train(path, 1, target_epsilon=1.0, epochs=2)
    assert list(ledger.read(path).values()) == [16]


def test_a_calibrated_run_goes_on_with_other_noise_within_its_target(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(path, 11, target_epsilon=1.0, epochs=2)
    calibrate = accounting.noise_multiplier  # as another release of dp-accounting may find it
    monkeypatch.setattr(accounting, "noise_multiplier", lambda **kwargs: calibrate(**kwargs) * (1 - 1e-9))
    _, epsilon = train(path, 5, target_epsilon=1.0, epochs=2)
    assert 0.99 < epsilon <= 1.0
    assert sorted(ledger.read(path).values()) == [5, 11]
    monkeypatch.undo()
    done, epsilon = train(path, 16, target_epsilon=2.0, epochs=4)  # a larger budget for more epochs
    assert done == list(range(17, 33)) and 1.0 < epsilon <= 2.0


def test_steps_with_a_seed_are_not_private_later_either(path: Path) -> None:
    train(path, 3, seed=1, noise_multiplier=1.0)
    content = path.read_bytes()
    with pytest.raises(ArgumentError, match="of a run without a seed: this one was NOT PRIVATE"):
        train(path, 1, noise_multiplier=1.0)
    assert path.read_bytes() == content
    train(path, 1, seed=2, noise_multiplier=1.0)
    assert ledger.read(path) == {(1.0, 0.125): 4}
    path.unlink()
    DurableLedger(path).close()
    with pytest.raises(ArgumentError, match="of a run with a seed"):
        train(path, 3, seed=1, noise_multiplier=1.0)


def test_shuffled_epochs_are_reserved_whole(path: Path) -> None:
    train(path, 9, noise_multiplier=1.0, poisson_sampling=False)
    assert ledger.read(path) == {(1.0, 1.0): 2}  # the second epoch was begun
    done, _ = train(path, 1, noise_multiplier=1.0, poisson_sampling=False)
    assert done == [17]  # of an epoch of its own
    assert ledger.read(path) == {(1.0, 1.0): 3}


def test_what_the_records_were_used_for_before_is_part_of_every_epsilon(path: Path) -> None:
    prior = {(5.0, 1.0): 1, (20.0, 1.0): 2}
    exact = accounting.Ledger("rdp", prior).epsilon(1e-5)
    assert 0 <= exact - _gaussian_rdp(1 / 25 + 2 / 400, 1e-5) < 1e-3  # dp-accounting has fewer orders
    done, epsilon = train(path, 16, target_epsilon=2.0, epochs=2, prior=prior)
    assert len(done) == 16 and 1.98 < epsilon <= 2.0
    ((sigma, _),) = ledger.read(path)
    assert sigma > accounting.noise_multiplier(
        target_epsilon=2.0, target_delta=1e-5, sample_rate=0.125, steps=16, accountant="rdp"
    )
    with pytest.raises(PrivacyError, match="calibrated for 16 steps"):  # the prior is no step, and counted once
        train(path, 1, target_epsilon=2.0, epochs=2, prior=prior)
    with pytest.raises(ArgumentError, match="ledger: prior"):
        train(path, 1, target_epsilon=2.0, epochs=2)
    fresh, before = train(path.with_name("b.jsonl"), 0, noise_multiplier=1.0, prior=prior)
    assert not fresh and before == pytest.approx(exact)


def _gaussian_rdp(rho2: float, delta: float) -> float:
    """ε of Gaussian mechanisms whose 1/σ² sum to rho2, from their Rényi curve (Canonne et al. 2020, prop. 12)."""
    orders = [1 + x / 1000 for x in range(1, 400_000)]
    return min(a * rho2 / 2 + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a in orders)


def test_priors_are_checked_and_in_any_order(path: Path) -> None:
    first, second = {(2.0, 1.0): np.int64(3), (20, 1): 1}, {(20.0, 1.0): 1, (2.0, 1.0): 3}
    DurableLedger(path, prior=first).close()
    DurableLedger(path, prior=second).close()
    for wrong in ({(2.0,): 3}, [(2.0, 1.0, 3)], {("x", 1.0): 2}, {("1", 1.0): 2}, {(2.0, 1.0): 2.5}):
        with pytest.raises(ArgumentError, match="prior="):
            PrivacyEngine(prior=wrong)
    with pytest.raises(ArgumentError, match="noise_multiplier=-1"):
        PrivacyEngine(prior={(-1.0, 1.0): 2})
    # What the file says was spent is not known before make_private reads it: 0 would be no bound.
    with pytest.raises(PrivacyError, match="get_epsilon: call make_private first"):
        PrivacyEngine(ledger=path).get_epsilon(1e-5)


def test_what_was_not_used_is_given_back_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spending = DurableLedger(path)
    for _ in range(20):
        spending.step(1.0, 0.1)
    reserved = ledger.read(path)[1.0, 0.1]
    assert reserved > 20

    def interrupted(self: DurableLedger) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(DurableLedger, "_shut", interrupted)
    with pytest.raises(KeyboardInterrupt):
        spending.close()
    spending.close()
    assert ledger.read(path) == {(1.0, 0.1): 20}


def test_an_engine_that_cannot_be_made_lets_go_of_its_ledger(path: Path) -> None:
    model = torch.nn.Linear(3, 1)
    common = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(TensorDataset(torch.randn(64, 3)), batch_size=8),
        "max_grad_norm": 1.0,
        "noise_multiplier": 1.0,
    }
    PrivacyEngine().make_private(**common)
    with pytest.raises(ArgumentError, match="private already"):
        PrivacyEngine(ledger=path).make_private(**common)
    DurableLedger(path).close()
