"""Models, data and engines that several test files train."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastdp import PrivacyEngine, native, reference, watch
from fastdp.gradients import Norms, of_parameters
from fastdp.layers import Recorder
from fastdp.uses import Use


class Reused(nn.Module):
    """One layer three times, another's weight tied to it, a shared bias, and frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.again = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.again.weight
        self.last = nn.Linear(5, 5)
        self.last.bias = self.first.bias
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.bias_only = nn.Linear(5, 3)
        self.bias_only.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.again(torch.tanh(self.first(x))))
        x = torch.tanh(self.tied(self.again(x))) + self.frozen(x)
        return self.bias_only(torch.relu_(self.last(self.again(x))))


class Sequences(nn.Module):
    """Two leading dimensions besides the record: the per-sample gradient is a sum over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 7)
        self.outer = nn.Linear(7, 3, bias=False)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([x, 2 * x, -x, x * x], dim=1).view(len(x), 2, 2, 6)
        return self.outer(torch.tanh(self.inner(x))).mean((1, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3)),
    "no_bias": lambda: nn.Sequential(nn.Linear(6, 9, bias=False), nn.GELU(), nn.Linear(9, 3, bias=False)),
    "logistic": lambda: nn.Linear(6, 3),
    "reused": Reused,
    "sequences": Sequences,
}


def data(n: int = 60, dtype: torch.dtype = torch.float32) -> TensorDataset:
    return TensorDataset(torch.randn(n, 6, dtype=torch.float64).to(dtype), torch.randint(0, 3, (n,)))


def private(module: nn.Module, optimizer: torch.optim.Optimizer, dataset: Dataset, batch_size: int = 12, **kwargs):
    engine = PrivacyEngine(seed=kwargs.pop("seed", 1))
    kwargs = {"noise_multiplier": 0.0, "max_grad_norm": 0.5, **kwargs}
    loader = DataLoader(dataset, batch_size=batch_size)
    return engine, *engine.make_private(module=module, optimizer=optimizer, data_loader=loader, **kwargs)


def first_owners(module: nn.Module) -> list[str]:
    """Of each trained parameter, the first module that has it; attention and its out_proj are one."""
    names = []
    for p in module.parameters():
        if p.requires_grad:
            name = next(name for name, m in module.named_modules() if any(q is p for q in m._parameters.values()))
            names.append(name.removesuffix("out_proj").rstrip("."))
    return names


def clipped(module: nn.Module, gradients: list[list[Tensor]], c: float, clipping: str) -> list[Tensor]:
    """The sum over records of what each adds, in float64, by fastdp/reference.py."""
    params = [p for p in module.parameters() if p.requires_grad]
    if clipping == "automatic":
        return reference.automatic_gradient(gradients, c, params)
    if clipping == "per_layer":
        layers = first_owners(module)
        bounds = dict.fromkeys(layers, c / len(set(layers)) ** 0.5)
        return reference.per_layer_gradient(gradients, layers, bounds, params)
    return reference.clipped_gradient(gradients, c, params)


def oracle_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    c: float,
    b: int,
    clipping: str = "flat",
) -> None:
    """The step of float64 per-sample gradients."""
    params = [p for p in module.parameters() if p.requires_grad]
    gradients = reference.per_sample_gradients(module, F.cross_entropy, x, y)
    for p, g in zip(params, clipped(module, gradients, c, clipping), strict=True):
        p.grad = (g / b).to(p.dtype)
    optimizer.step()


def seen(
    module: nn.Module, b: Tensor, *inputs: Tensor, autocast: bool = False
) -> tuple[dict[Tensor, Tensor], list[Use]]:
    """Per-sample gradients [B, *shape] of the trained parameters, as the hooks see them, and the uses they are from.

    b: the gradient of module(*inputs). autocast: to bfloat16, of the forward."""
    recorder = Recorder()
    watch.attach(module, recorder)
    recorder.depth = 1
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(*inputs)
    if y.requires_grad:
        y.backward(b)
    parameters = [p for p in module.parameters() if p.requires_grad]
    dtype = native.sum_dtype(parameters[0].dtype) if parameters else b.dtype
    found = {p: torch.zeros(len(b), *p.shape, dtype=dtype) for p in parameters}
    norms = Norms(len(b), dtype)
    parts = of_parameters(p for use in recorder.uses for p in use.parts(found, len(b), dtype))
    norms.add(parts)
    for part in parts:
        for block in part.blocks():
            g = block.expanded().formed()
            assert g.dtype == dtype
            found[block.p] += g.view_as(found[block.p])
    whole = sum((g.double().flatten(1).square().sum(1) for g in found.values()), torch.zeros(len(b)).double())
    torch.testing.assert_close(norms.sq, whole, rtol=1e-3, atol=1e-12)
    assert all(p.grad is None for p in module.parameters())
    return found, recorder.uses
