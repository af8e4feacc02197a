"""Ranks that were given different numbers, data or models: CommError on all of them before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import fastdp

comm = fastdp.comm.init(timeout=20.0)
mine = comm.rank == 1


# What is told of another dataset, width or engine.
NAMES = {
    "dataset": "dataset_size",
    "width": "weight",
    "engine": "(secure_mode|prior|seed|accountant|ledger)",
    "betas": r"param_groups\[0\]\['betas'\]",
    "eps": r"param_groups\[0\]\['eps'\]",
}


class Other(torch.optim.Adam):
    """The same groups, perhaps another step."""


def make(
    noise_multiplier: float = 1.0,
    max_grad_norm: float | dict[str, float] = 1.0,
    clipping: str = "flat",
    secure_mode: bool = False,
    dataset: Dataset[Any] | None = None,
    width: int = 3,
    optimizer: type[torch.optim.Adam] = torch.optim.Adam,
    engine: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    module = nn.Linear(5, width)
    fastdp.PrivacyEngine(**(engine or {"seed": 1})).make_private(
        module=module,
        optimizer=optimizer(module.parameters(), **options),
        data_loader=DataLoader(dataset or TensorDataset(torch.ones(40, 5)), batch_size=4),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        clipping=clipping,
        secure_mode=secure_mode,
        comm=comm,
    )


class Augmented(Dataset[Any]):
    """Inputs are random, labels are not."""

    def __init__(self, labels: torch.Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.rand(5), int(self.labels[i])


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """Differently on each rank."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(comm.rank))]


rows = torch.arange(200.0).view(40, 5)
ids = torch.arange(40)
table = TensorDataset(rows, ids)
for same in (
    table,
    Augmented(ids),
    Subset(table, ids.tolist()),
    Subset(table, ids),  # of tensors, as of ints
    TensorDataset(rows.bfloat16(), ids > 3, torch.ones(40, 0)),
):
    make(dataset=same)
for mixed in (
    TensorDataset(shuffled(rows)),
    TensorDataset(rows, shuffled(ids)),
    TensorDataset(rows.clone().index_fill_(0, ids[-1:], comm.rank)),
    Augmented(shuffled(ids)),
    Subset(table, shuffled(ids).tolist()),
    ConcatDataset([Subset(table, shuffled(ids)[:20].tolist()), Subset(table, ids[20:].tolist())]),
):
    with pytest.raises(fastdp.CommError, match="digest of 64 records, which must be the same in the same order: '"):
        make(dataset=mixed)
for changed in (
    {"noise_multiplier": 1.1},
    {"max_grad_norm": 2.0},
    {"clipping": "automatic"},
    {"clipping": "per_layer"},
    {"secure_mode": True},
    {"engine": {"seed": 1, "secure_mode": True}},
    {"dataset": TensorDataset(torch.ones(41, 5))},
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
    name = NAMES.get(next(iter(changed)), next(iter(changed)))
    with pytest.raises(fastdp.CommError, match=rf"^ranks disagree: {name}.* on rank 1, .* on rank 0$"):
        make(**(changed if mine else {}))
print(f"done: rank {comm.rank}", flush=True)
