"""One optimiser step, forward and backward included, against the same step of plain PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastdp import PrivacyEngine

MODELS = {
    "64-256-256-2": ([64, 256, 256, 2], 512),
    "784-1024-1024-10": ([784, 1024, 1024, 10], 256),
    "9-50-2": ([9, 50, 2], 256),
}


def mlp(sizes: list[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("name", MODELS)
def bench_step_against_torch(pair, name: str, threads: int) -> None:
    sizes, batch = MODELS[name]
    plain, private = mlp(sizes), mlp(sizes)
    plain_optimizer = sgd(plain)
    records = TensorDataset(torch.randn(40 * batch, sizes[0]), torch.randint(0, sizes[-1], (40 * batch,)))
    private, optimizer, loader = PrivacyEngine().make_private(
        module=private,
        optimizer=sgd(private),
        data_loader=DataLoader(records, batch_size=batch),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )

    def batches():
        while True:
            yield from loader

    stream = batches()

    def step(module: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        F.cross_entropy(module(x), y).backward()
        opt.step()

    pair(
        lambda x, y: step(plain, plain_optimizer, x, y),
        lambda x, y: step(private, optimizer, x, y),
        lambda: next(stream),
        rounds=30 if batch == 256 and sizes[0] == 784 else 100,
    )
