"""Ranks that were given different numbers, data or models: CommError on all of them before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdp

comm = fastdp.comm.init(timeout=20.0)
mine = comm.rank == 1


class Other(torch.optim.Adam):
    """The same groups, perhaps another step."""


def make(
    noise_multiplier: float = 1.0,
    max_grad_norm: float | dict[str, float] = 1.0,
    clipping: str = "flat",
    secure_mode: bool = False,
    records: int = 40,
    width: int = 3,
    optimizer: type[torch.optim.Adam] = torch.optim.Adam,
    engine: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    module = nn.Linear(5, width)
    fastdp.PrivacyEngine(**(engine or {"seed": 1})).make_private(
        module=module,
        optimizer=optimizer(module.parameters(), **options),
        data_loader=DataLoader(TensorDataset(torch.ones(records, 5)), batch_size=4),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        clipping=clipping,
        secure_mode=secure_mode,
        comm=comm,
    )


make()
for changed in (
    {"noise_multiplier": 1.1},
    {"max_grad_norm": 2.0},
    {"clipping": "automatic"},
    {"clipping": "per_layer"},
    {"secure_mode": True},
    {"engine": {"seed": 1, "secure_mode": True}},
    {"records": 41},
    {"width": 4},
    {"betas": (0.9, 0.99)},
    {"eps": 1e-6},
    {"optimizer": torch.optim.AdamW, "weight_decay": 0.0},
    {"optimizer": Other},
    {"engine": {"seed": 1, "prior": {(20.0, 1.0): 1}}},
    {"engine": {"seed": None}},
    {"engine": {"seed": 1, "accountant": "rdp"}},
    {"engine": {"seed": 1, "ledger": "absent/ledger.jsonl"}},
):
    with pytest.raises(fastdp.CommError, match="runs another plan, data size, model, optimizer or account"):
        make(**(changed if mine else {}))
print(f"done: rank {comm.rank}", flush=True)
