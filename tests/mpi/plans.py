"""Ranks that were given different numbers, data or models: CommError on all of them before anything is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdp

comm = fastdp.comm.init(timeout=20.0)
mine = comm.rank == 1


def make(noise_multiplier: float = 1.0, max_grad_norm: float = 1.0, records: int = 40, width: int = 3) -> None:
    module = nn.Linear(5, width)
    fastdp.PrivacyEngine(seed=1).make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.ones(records, 5)), batch_size=4),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        comm=comm,
    )


make()
for changed in ({"noise_multiplier": 1.1}, {"max_grad_norm": 2.0}, {"records": 41}, {"width": 4}):
    with pytest.raises(fastdp.CommError, match="runs another plan, data size, model or optimizer"):
        make(**(changed if mine else {}))
print(f"done: rank {comm.rank}", flush=True)
