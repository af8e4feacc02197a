"""Ranks that were given different numbers, data or models: CommError on all of them before anything is trained."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import fastdp
from fastdp import alike

comm = fastdp.comm.init(timeout=20.0)
mine = comm.rank == 1


# What is told of another dataset, width or engine.
NAMES = {
    "dataset": "dataset_size",
    "bias_first": r"param_groups\[0\]\['params'\]",
    "frozen": r"param_groups\[0\]\['params'\]",
    "width": r"module: 'Linear\(in_features=5, out_features=\d",
    "activation": r"module 'activation': '(ReLU|Tanh)\(\)'",
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
    bias_first: bool = False,
    frozen: bool = False,
    loss_reduction: str = "mean",
    dataset_size: int | None = None,
    activation: type[nn.Module] = nn.ReLU,
    **options: Any,
) -> None:
    module = nn.Linear(5, width)
    module.register_module("activation", activation())
    module.register_buffer("dataset_size", torch.ones(3))  # no name of the plan's
    module.bias.requires_grad_(not frozen)
    parameters = [p for p in module.parameters() if p.requires_grad]
    fastdp.PrivacyEngine(**(engine or {"seed": 1})).make_private(
        module=module,
        optimizer=optimizer(parameters[::-1] if bias_first else parameters, **options),
        data_loader=DataLoader(dataset or TensorDataset(torch.ones(40, 5)), batch_size=4),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        clipping=clipping,
        secure_mode=secure_mode,
        loss_reduction=loss_reduction,
        dataset_size=dataset_size,
        comm=comm,
    )


class Items(Dataset[Any]):
    """What `item` makes of a number."""

    def __init__(self, item: Callable[[int], Any], length: int = 40) -> None:
        self.item, self.length = item, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Any:
        return self.item(i)


class Unsized(Dataset[Any]):
    def __getitem__(self, i: str) -> Any:
        return torch.rand(5), ord(i)


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """Differently on each rank."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(comm.rank))]


def corrupt(i: int) -> Any:
    if i == 0:
        raise OSError("damaged")
    return torch.rand(5), i


def random_image(i: int) -> Any:
    image = torch.full((5, 4), i, dtype=torch.uint8)
    image[int(torch.randint(5, ())), random.randrange(4)] = np.random.randint(200)
    return image, str(comm.rank)


rows = torch.arange(200.0).view(40, 5)
ids = torch.arange(40)
order = shuffled(ids).tolist()
table = TensorDataset(rows, ids)
torch.manual_seed(comm.rank)
random.seed(comm.rank)
np.random.seed(comm.rank)
for same in (
    table,
    Items(lambda i: (torch.rand(5), i)),
    Items(random_image),
    Items(lambda i: {"x": torch.rand(5), "y": np.int64(i), "name": f"/scratch/{comm.rank}"}),
    Subset(table, ids.tolist()),
    Subset(table, ids),  # of tensors, as of ints
    Subset(Items(corrupt, 41), range(1, 41)),
    Subset(Unsized(), list("abcdefghij" * 4)),  # type: ignore[arg-type]
    TensorDataset(rows.bfloat16(), ids > 3, torch.ones(40, 0), rows.to_sparse(), torch.full((40,), torch.nan)),
    TensorDataset(rows * (1 + 1e-6 * comm.rank)),  # which ranks made themselves
):
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    alike.fingerprints(DataLoader(same))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))
    make(dataset=same)
for mixed in (
    TensorDataset(shuffled(rows)),
    TensorDataset(rows, shuffled(ids)),
    TensorDataset(rows.clone().index_fill_(0, ids[-1:], comm.rank)),
    Items(lambda i: (torch.rand(5), order[i])),
    Items(lambda i: (np.random.rand(5), np.array(order[i]))),
    Items(lambda i: (torch.rand(5), [1, 11] if comm.rank else [11, 1])),
    Items(lambda i: {"a": i, "b": 2} if comm.rank else {"b": i, "a": 2}),
    Subset(table, order),
    Subset(Items(corrupt, 60), [i + 1 for i in order]),
    ConcatDataset([Subset(table, order[:20]), Subset(table, ids[20:].tolist())]),
    Items(lambda i: (torch.rand(5), i // 999 * comm.rank), 1000),  # in the last record only
):
    with pytest.raises(fastdp.CommError, match=r"dataset\[\d+\]: another record on rank 1 than on rank 0"):
        make(dataset=mixed)
late = DataLoader(Items(corrupt), num_workers=1)  # not read here, where a file would be opened too early
assert len(alike.fingerprints(late)) == 40
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
    {"loss_reduction": "sum"},
    {"dataset_size": 80},
    {"bias_first": True},
    {"frozen": True},
    {"activation": nn.Tanh},
):
    name = NAMES.get(next(iter(changed)), next(iter(changed)))
    with pytest.raises(fastdp.CommError, match=rf"^ranks disagree: {name}.* on rank 1, .* on rank 0$"):
        make(**(changed if mine else {}))
print(f"done: rank {comm.rank}", flush=True)
