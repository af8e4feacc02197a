"""One optimiser step, forward and backward included, against the same step of plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastdp import PrivacyEngine
from fastdp.examples import mnist


def mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, dim_feedforward=256, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(64 * 128, 10)
    )


class Residual(nn.Module):
    """Two 3x3 convolutions with GroupNorm, and the input beside them (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.GroupNorm(8, out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.GroupNorm(8, out),
        )
        self.beside = nn.Identity() if stride == 1 else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.convolutions(x) + self.beside(x))


def resnet8() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.GroupNorm(8, 16),
        nn.ReLU(),
        Residual(16, 16, 1),
        Residual(16, 32, 2),
        Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


# The model, the shape of a record, classes, batch size.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "64-256-256-2": (lambda: mlp(64, 256, 256, 2), (64,), 2, 512),
    "784-1024-1024-10": (lambda: mlp(784, 1024, 1024, 10), (784,), 10, 256),
    "9-50-2": (lambda: mlp(9, 50, 2), (9,), 2, 256),
    "CNN": (mnist.build_model, (1, 28, 28), 10, 240),
    "ResNet-8": (resnet8, (3, 32, 32), 10, 64),
    "Transformer": (transformer, (64, 128), 10, 64),
}


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)


def adam(module: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=0.001)


class Unfused(torch.optim.Adam):
    """A subclass, so that fastdp makes the noise first and calls this step."""


def unfused_adam(module: nn.Module) -> torch.optim.Adam:
    return Unfused(module.parameters(), lr=0.001)


def take_step(module: nn.Module, optimizer: torch.optim.Optimizer, criterion, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    criterion(module(x), y).backward()
    optimizer.step()


def records_for(name: str) -> TensorDataset:
    _, shape, classes, batch = MODELS[name]
    return TensorDataset(torch.randn(40 * batch, *shape), torch.randint(0, classes, (40 * batch,)))


def forever(loader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def rounds_for(name: str) -> int:
    return 30 if name in ("784-1024-1024-10", "CNN") else 100


def make_private(name: str, make, secure_mode: bool = False):
    build, _, _, batch = MODELS[name]
    module = build()
    module, optimizer, loader = PrivacyEngine().make_private(
        module=module,
        optimizer=make(module),
        data_loader=DataLoader(records_for(name), batch_size=batch),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        secure_mode=secure_mode,
    )
    return module, optimizer, forever(loader)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(("name", "make"), [*((name, sgd) for name in MODELS), ("784-1024-1024-10", adam)])
def bench_step_against_torch(pair, name: str, make, threads: int) -> None:
    plain = MODELS[name][0]()
    plain_optimizer = make(plain)
    private, optimizer, stream = make_private(name, make)
    pair(
        lambda x, y: take_step(plain, plain_optimizer, F.cross_entropy, x, y),
        lambda x, y: take_step(private, optimizer, F.cross_entropy, x, y),
        lambda: next(stream),
        rounds=rounds_for(name),
    )


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def bench_adam_step_against_the_unfused_one(pair, threads: int) -> None:
    name = "784-1024-1024-10"
    fused, fused_optimizer, stream = make_private(name, adam)
    unfused, unfused_optimizer, other = make_private(name, unfused_adam)
    pair(
        lambda _, batch: take_step(unfused, unfused_optimizer, F.cross_entropy, *batch),
        lambda batch, _: take_step(fused, fused_optimizer, F.cross_entropy, *batch),
        lambda: (next(stream), next(other)),
        rounds=rounds_for(name),
    )


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def bench_secure_step_against_the_usual_one(pair, make, threads: int) -> None:
    name = "784-1024-1024-10"
    usual, usual_optimizer, stream = make_private(name, make)
    secure, secure_optimizer, other = make_private(name, make, secure_mode=True)
    pair(
        lambda batch, _: take_step(usual, usual_optimizer, F.cross_entropy, *batch),
        lambda _, batch: take_step(secure, secure_optimizer, F.cross_entropy, *batch),
        lambda: (next(stream), next(other)),
        rounds=rounds_for(name),
    )


@pytest.mark.filterwarnings("ignore")  # Opacus's own
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("name", ["64-256-256-2", "784-1024-1024-10", "CNN"])
def bench_step_of_opacus_against_torch(pair, name: str, threads: int, mode: str) -> None:
    opacus = pytest.importorskip("opacus")
    build, _, _, batch = MODELS[name]
    plain, private = build(), build()
    plain_optimizer = sgd(plain)
    loader = DataLoader(records_for(name), batch_size=batch)
    criterion = nn.CrossEntropyLoss()
    made = opacus.PrivacyEngine().make_private(
        module=private,
        optimizer=sgd(private),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **({"criterion": criterion} if mode == "ghost" else {}),
    )
    private, optimizer = made[0], made[1]
    if mode == "ghost":
        criterion = made[2]
    stream = forever(loader)
    pair(
        lambda x, y: take_step(plain, plain_optimizer, F.cross_entropy, x, y),
        lambda x, y: take_step(private, optimizer, criterion, x, y),
        lambda: next(stream),
        rounds=rounds_for(name) if mode == "ghost" else 8,
    )
