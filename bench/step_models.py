"""The models whose steps are measured, with random records for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastdp.examples import mnist


@dataclass(frozen=True)
class Model:
    """What is trained, on which records: float32 of this shape, or codes in [0, codes); classes=1 is one logit."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    batch: int
    codes: int = 0

    def criterion(self) -> nn.Module:
        return nn.BCEWithLogitsLoss() if self.classes == 1 else nn.CrossEntropyLoss()

    @cached_property
    def records(self) -> TensorDataset:
        n = 40 * self.batch
        x = torch.randint(0, self.codes, (n, *self.shape)) if self.codes else torch.randn(n, *self.shape)
        y = torch.randint(0, 2, (n,)).float() if self.classes == 1 else torch.randint(0, self.classes, (n,))
        return TensorDataset(x, y)


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    # One logit a record is [B], as the labels are: Opacus's ghost clipping would make [B, B] of factors and [B, 1].
    return nn.Sequential(*layers[:-1], *([nn.Flatten(0)] if sizes[-1] == 1 else []))


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


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, dim_feedforward=256, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(64 * 128, 10)
    )


class LastOutput(nn.Module):
    """An LSTM, and a linear layer on its output at the last position."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(128, 128, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(100_000, 32), nn.Flatten(), mlp(8 * 32, 128, 1))


MODELS = {
    "MLP 784-1024-1024-10": Model(lambda: mlp(784, 1024, 1024, 10), (784,), 10, 256),
    "MLP 64-256-256-2": Model(lambda: mlp(64, 256, 256, 2), (64,), 2, 512),
    "MLP 9-50-1": Model(lambda: mlp(9, 50, 1), (9,), 1, 256),
    "CNN": Model(mnist.build_model, (1, 28, 28), 10, 256),
    "ResNet-8": Model(resnet8, (3, 32, 32), 10, 64),
    "Embedding + MLP": Model(embedding, (8,), 1, 1024, codes=100_000),
    "Transformer": Model(transformer, (64, 128), 10, 64),
    "LSTM": Model(LastOutput, (50, 128), 10, 64),
}
