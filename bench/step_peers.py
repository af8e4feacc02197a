"""One step of plain PyTorch, and of those that make it private: fastdp, Opacus in two modes, and torch.func by hand.

Noise multiplier 1, clipping to norm 1, the user's optimizer; each takes the batches that the paired plain step takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from step_models import Model
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fastdp import PrivacyEngine

MakeOptimizer = Callable[[nn.Module], Optimizer]

# Per-sample gradients beyond this are not tried: formed whole, clipped and summed they take it two or three times.
MOST_BYTES = 4e9


class TooLarge(Exception):
    """Not tried."""


@dataclass
class Trainer:
    """A model in training: step(x, y) on the batches that it wants."""

    module: nn.Module
    optimizer: Optimizer
    batches: Iterator[Any]
    step: Callable[[Tensor, Tensor], None]

    def state_bytes(self) -> int:
        """Of parameters and of what the optimizer keeps."""
        kept = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in (*self.module.parameters(), *kept))


def sgd(module: nn.Module) -> Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)


def forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def drawn(model: Model) -> Iterator[list[Tensor]]:
    """Batches of the size that a DataLoader would give, without its Python call per record."""
    x, y = model.records.tensors
    while True:
        for ids in torch.randperm(len(x)).split(model.batch):
            yield [x[ids], y[ids]]


def usual_step(module: nn.Module, optimizer: Optimizer, criterion: Any) -> Callable[[Tensor, Tensor], None]:
    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        optimizer.step()

    return step


def plain(model: Model, make: MakeOptimizer = sgd) -> Trainer:
    module = model.build()
    optimizer = make(module)
    return Trainer(module, optimizer, drawn(model), usual_step(module, optimizer, model.criterion()))


def fastdp(
    model: Model, make: MakeOptimizer = sgd, poisson_sampling: bool = True, secure_mode: bool = False
) -> Trainer:
    module = model.build()
    module, optimizer, loader = PrivacyEngine().make_private(
        module=module,
        optimizer=make(module),
        data_loader=DataLoader(model.records, batch_size=model.batch),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=poisson_sampling,
        secure_mode=secure_mode,
    )
    return Trainer(module, optimizer, forever(loader), usual_step(module, optimizer, model.criterion()))


def opacus(model: Model, mode: str) -> Trainer:
    """With its own layers where it asks for them: DPMultiheadAttention, DPLSTM."""
    from opacus import PrivacyEngine
    from opacus.validators import ModuleValidator

    module = ModuleValidator.fix(model.build())
    if mode == "hooks":
        refuse_large(model, module)
    criterion = model.criterion()
    module, optimizer, *wrapped, _ = PrivacyEngine().make_private(
        module=module,
        optimizer=sgd(module),
        data_loader=DataLoader(model.records, batch_size=model.batch),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **({"criterion": criterion} if mode == "ghost" else {}),
    )
    return Trainer(module, optimizer, drawn(model), usual_step(module, optimizer, *(wrapped or [criterion])))


def torch_func(model: Model) -> Trainer:
    module = model.build()
    refuse_large(model, module)
    optimizer, criterion = sgd(module), model.criterion()

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return criterion(functional_call(module, parameters, (x[None],)), y[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        gradients = per_sample({name: p.detach() for name, p in module.named_parameters()}, x, y)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        factors = (1.0 / norms).clamp(max=1.0)
        for name, p in module.named_parameters():
            total = (factors @ gradients.pop(name).flatten(1)).view(p.shape)
            p.grad = (total + torch.normal(0.0, 1.0, p.shape)) / model.batch
        optimizer.step()

    return Trainer(module, optimizer, drawn(model), step)


def refuse_large(model: Model, module: nn.Module) -> None:
    size = 4 * model.batch * sum(p.numel() for p in module.parameters())
    if size > MOST_BYTES:
        raise TooLarge(f"{size / 1e9:.0f} GB of per-sample gradients")


PEERS: dict[str, Callable[[Model], Trainer]] = {
    "fastdp": fastdp,
    "Opacus ghost": lambda model: opacus(model, "ghost"),
    "Opacus hooks": lambda model: opacus(model, "hooks"),
    "torch.func": torch_func,
}
