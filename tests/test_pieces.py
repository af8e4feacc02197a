"""max_physical_batch_size: a batch in pieces is the same step."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from loops import data, private
from torch import nn
from torch.utils.data import Dataset

from fastdp import ArgumentError, PrivacyError


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 3)
    ).double()


def make(piece: int | None, n: int = 60, batch_size: int = 12, dataset: Dataset | None = None):
    torch.manual_seed(4)
    records = dataset or data(n, torch.float64)
    module = make_model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    how = {"noise_multiplier": 1.0, "max_physical_batch_size": piece}
    return private(module, optimizer, records, batch_size, seed=5, **how)[1:]


def run(module, optimizer, loader, epochs: int = 2) -> list[int]:
    """Trains; returns the rows of all pieces."""
    sizes = []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            assert optimizer.is_accumulating == loader.more
            optimizer.step()
            sizes.append(loader.rows)
    return sizes


class Records(Dataset):
    """Not a TensorDataset: goes through a DataLoader and its workers."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.records = data(60, torch.float64)

    def __len__(self) -> int:
        return 60

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        return self.records[i]


@pytest.mark.parametrize("dataset", [None, Records()])
@pytest.mark.parametrize("piece", [1, 2, 7, 12])
def test_steps_do_not_depend_on_pieces(piece: int, dataset: Dataset | None) -> None:
    whole, pieces = make(None), make(piece, dataset=dataset)
    rows = run(*whole)
    sizes = run(*pieces)
    assert sum(sizes) == sum(rows) and max(sizes) <= piece < max(rows)
    assert whole[1].steps == pieces[1].steps == 10
    spent = [optimizer.ledger.epsilon_of_sampler(1e-5, 1) for _, optimizer, _ in (whole, pieces)]
    assert spent[0] == spent[1] > 0
    for p, q in zip(whole[0].parameters(), pieces[0].parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-10 * q.abs().max()


def test_empty_batches_and_single_records() -> None:
    whole, pieces = (make(piece, n=20, batch_size=1) for piece in (None, 1))
    rows = run(*whole)
    sizes = run(*pieces)
    assert 0 in rows and sizes.count(0) == rows.count(0) and max(rows) > 1
    for p, q in zip(whole[0].parameters(), pieces[0].parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-10 * q.abs().max()


def test_schedulers_fire_once_per_step() -> None:
    module, optimizer, loader = make(4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        if not optimizer.is_accumulating:
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**5)


def test_a_schedule_that_fires_within_a_batch_is_refused() -> None:
    module, optimizer, loader = make(4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with pytest.raises(ArgumentError, match=r"if not optimizer\.is_accumulating"):
        for x, y in loader:
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            schedule.step()


def test_pieces_cannot_be_skipped_left_or_repeated() -> None:
    module, optimizer, loader = make(4)
    iterator = iter(loader)
    x, y = next(iterator)
    F.cross_entropy(module(x), y).backward()
    optimizer.step()
    assert optimizer.is_accumulating and optimizer.steps == 0
    with pytest.raises(PrivacyError, match="after 0 batches"):
        optimizer.step()
    with pytest.raises(PrivacyError, match="in the middle of a batch's pieces"):
        next(iter(loader))
    next(iterator)
    x, y = next(iterator)
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(PrivacyError, match="after 2 batches"):
        optimizer.step()


def test_a_piece_that_failed_while_it_was_added_cannot_be_added_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimizer, loader = make(4)
    iterator = iter(loader)
    for fails in (False, True):
        x, y = next(iterator)
        F.cross_entropy(module(x), y).backward()
        if fails:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(torch.Tensor, "addmm_", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                optimizer.step()
            F.cross_entropy(module(x), y).backward()
            with pytest.raises(PrivacyError, match="cannot be continued"):
                optimizer.step()
        else:
            optimizer.step()


GROWTH = """
import resource, torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastdp import PrivacyEngine
module = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Unflatten(1, (8, 64)), nn.Conv1d(8, 8, 3), nn.Flatten(),
                       nn.Linear(496, 2))
records = TensorDataset(torch.randn(4000, 512), torch.randint(0, 2, (4000,)))
module, optimizer, loader = PrivacyEngine(seed=1).make_private(
    module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
    data_loader=DataLoader(records, batch_size=80), max_physical_batch_size=32)
peaks = []
for _ in range(3):
    for x, y in loader:
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print((peaks[2] - peaks[0]) // 1024)
"""


def test_memory_does_not_grow_over_100_batches() -> None:
    """MiB between the first 50 batches and the next 100; all gradients of one piece take 70 MiB."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 16
