"""What the search for coupled records looks into, and when: what a loop does, replayed, and left as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import data, private
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastdp import PrivacyEngine, PrivacyError


def make(module: nn.Module, records: TensorDataset, batch_size: int = 20, **how: Any):
    return private(module, torch.optim.SGD(module.parameters(), lr=0.1), records, batch_size, **how)[1:]


def run(
    module: nn.Module,
    loss,
    steps: int = 2,
    labels: Tensor | None = None,
    batch_size: int = 20,
    poisson_sampling: bool = True,
    weights=lambda y: None,
    x: Tensor | None = None,
    loss_reduction: str = "mean",
    prepare=lambda x: x,
) -> None:
    x = torch.randn(60, 6) if x is None else x
    labels = torch.randint(0, 3, (60,)) if labels is None else labels
    how = {"loss_reduction": loss_reduction, "poisson_sampling": poisson_sampling}
    module, optimizer, loader = make(module, TensorDataset(x, labels), batch_size, **how)
    for _, (x, y) in zip(range(steps), loader, strict=False):
        optimizer.zero_grad()
        loss(module(prepare(x)), y).backward(weights(y))
        optimizer.step()


def mlp(middle: nn.Module | None = None, out: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), middle or nn.ReLU(), nn.Linear(8, out))


class Counts(nn.Module):
    """Keeps a buffer; the probe's extra forward must not show in it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.relu(x)


def test_the_probe_leaves_buffers_and_random_numbers_alone() -> None:
    middle = Counts()
    random.seed(7)
    np.random.seed(7)
    others = random.getstate(), np.random.get_state()[1].tolist()
    run(mlp(middle), F.cross_entropy, steps=2)
    assert middle.calls.item() == 2
    assert others == (random.getstate(), np.random.get_state()[1].tolist())
    # Dropout draws the same numbers as without the engine.
    x, y = torch.randn(60, 6), torch.randint(0, 3, (60,))
    states = []
    for probed in (True, False):
        module, _, loader = make(mlp(nn.Dropout(0.5)), TensorDataset(x, y))
        batch, labels = next(iter(loader))
        torch.manual_seed(5)
        if probed:
            F.cross_entropy(module(batch), labels).backward()
        else:
            F.dropout(torch.ones(len(batch), 8), 0.5)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_loss_that_cannot_be_replayed_is_refused(loop) -> None:
    _, module, optimizer, loader = loop
    x, _y = next(iter(loader))
    torch.autograd.backward(module(x).square().mean())
    with pytest.raises(PrivacyError, match="not probed"):
        optimizer.step()


class FirstTimeOnly(nn.Sequential):
    """Passes its last layer over in all calls but the first, and so in replays."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.calls: list[int] = []  # what is in a list is not put back before a replay

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return super().forward(x) if len(self.calls) == 1 else self[:-1](x)


def test_a_step_that_uses_other_layers_than_were_probed_is_refused() -> None:
    with pytest.raises(PrivacyError, match="not probed for coupled records"):
        run(FirstTimeOnly(nn.Linear(6, 3), nn.Linear(3, 3)), F.cross_entropy)


BESIDE = {
    "part": lambda m, x: m[2](x - x.mean(0)).sum(1).mean(),
    "part in a part": lambda m, x: m[1:](x - x.mean(0)).mean(),
    "unused layer": lambda m, x: m[2](torch.zeros(len(x), 6)).mean(),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("later", [False, True])
def test_a_part_called_beside_the_module_is_refused(name: str, later: bool) -> None:
    """Its inputs are not replayed: a loss linear in its output would hide that they couple records."""
    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    _, optimizer, loader = make(module, data())
    for step, (x, y) in enumerate(loader):
        beside = BESIDE[name](module, x)  # without a backward, nothing is wrong with it
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        if later and step < 2:
            loss.backward()
            optimizer.step()
            continue
        with pytest.raises(PrivacyError, match="beside the module given to make_private"):
            (loss + beside).backward()
        return


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_backward_that_counts_is_probed(when: str) -> None:
    """zero_grad() discards a first one; the loss of the second may be made before that, or after."""
    module = nn.Linear(6, 3)
    _, optimizer, loader = make(module, data())
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    if when == "before":
        second = F.cross_entropy(module(x - x.mean(0)), y)
        optimizer.zero_grad()
    else:
        optimizer.zero_grad()
        second = F.cross_entropy(module(x - x.mean(0)), y)
    with pytest.raises(PrivacyError, match=r"on the other records|not probed"):
        second.backward()
        optimizer.step()


def test_a_second_backward_that_couples_nothing_passes() -> None:
    module = mlp()
    _, optimizer, loader = make(module, data())
    for x, y in loader:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
        optimizer.step()
    assert optimizer.steps == len(loader)


class LayerDrop(nn.Module):
    """Draws for the whole batch which layers it passes over."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.last, self.draw = nn.Linear(6, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.draw() < 0.5:
                x = torch.tanh(layer(x))
        return self.last(x)


@pytest.mark.parametrize("draw", [lambda: torch.rand(()).item(), random.random, lambda: np.random.rand()])
@pytest.mark.parametrize("seed", range(4))
def test_replays_draw_what_the_module_drew(draw: Callable[[], float], seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    run(LayerDrop(draw), F.cross_entropy)


class CountsCalls(nn.Linear):
    """Puts another tensor in its buffer's place."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


def test_a_buffer_that_counts_calls_is_no_coupling_and_counts_the_loops_calls() -> None:
    module = CountsCalls()
    run(module, F.cross_entropy)
    assert module.calls.item() == 2


class ReturnsLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().mean()


def test_a_model_may_return_its_loss() -> None:
    run(ReturnsLoss(), lambda out, y: out)


class Several(nn.Module):
    """A dict of outputs, keyword arguments, and an output that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.a(x) * scale, "other": self.b(x)}


def test_nested_outputs_are_probed() -> None:
    run(Several(), lambda out, y: F.cross_entropy(out["logits"], y))
    with pytest.raises(PrivacyError, match="depends on the other records"):
        run(Several(), lambda out, y: F.cross_entropy(out["logits"] / out["other"].sum(), y))


@pytest.mark.parametrize("batch", [2, 10, 11])
def test_later_batches_are_probed_once_in_a_decade(batch: int) -> None:
    """The loop couples its records in one batch: the tenth is probed again, its neighbours are not."""
    count = 0

    def loss(out: Tensor, y: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return F.cross_entropy(out / out.std() if count == batch else out, y)

    x, y = torch.randn(240, 6), torch.randint(0, 3, (240,))
    if batch == 10:
        with pytest.raises(PrivacyError, match="depends on the other records"):
            run(mlp(), loss, x=x, labels=y, steps=12)
    else:
        run(mlp(), loss, x=x, labels=y, steps=12)


def test_what_the_loop_does_before_the_model_is_probed() -> None:
    with pytest.raises(PrivacyError, match="layer '0': its input for a record depends"):
        run(mlp(), F.cross_entropy, prepare=lambda x: (x - x.mean(0)) / x.std(0))
    run(mlp(), F.cross_entropy, prepare=lambda x: (x - 0.5) / 2)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_backward_hook_of_the_module_itself_is_replayed() -> None:
    module = mlp()
    module.register_full_backward_hook(lambda m, given, came: None)
    run(module, F.cross_entropy)


def test_weights_given_to_backward_are_replayed() -> None:
    def each(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, reduction="none")

    run(mlp(), each, loss_reduction="sum", weights=lambda y: 1.0 + y)
    with pytest.raises(PrivacyError, match="a record's gradient depends on the other records"):
        run(mlp(), each, loss_reduction="sum", weights=lambda y: (1.0 + y) / (1.0 + y).sum())


class Opaque:
    def __init__(self, parts) -> None:
        self.x, self.y = torch.utils.data.default_collate(parts)


def test_batches_that_cannot_be_looked_into_are_refused() -> None:
    module = mlp()
    _, _, loader = PrivacyEngine(seed=1).make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(60, 6), torch.ones(60)), batch_size=20, collate_fn=Opaque),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    with pytest.raises(PrivacyError, match="a batch with a Opaque cannot be probed"):
        next(iter(loader))


def test_each_mode_is_probed() -> None:
    """Mixing records in training mode only, with the first steps taken in evaluation mode."""

    class Mixes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0) if self.training else x

    module = mlp(Mixes())
    module.eval()
    module, optimizer, loader = make(module, data())
    with pytest.raises(PrivacyError, match=r"depends on the other records|not probed"):
        for step, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            if step == 0:
                module.train()


class Aside(nn.Module):
    """Makes a part of the loss in the module, of layers that its output does not use, and does not return it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.other = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.trunk.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.trunk(x))
        out = self.other(h)
        self.aside = (out - out.mean(0)).square().mean()
        return self.head(h)


def test_a_part_of_the_loss_that_is_not_returned_is_refused() -> None:
    module = Aside()
    with pytest.raises(PrivacyError, match="does not come with its output"):
        run(module, lambda out, y: F.cross_entropy(out, y) + module.aside)


class CallsItself(nn.Module):
    def __init__(self, couples: bool) -> None:
        super().__init__()
        self.layer, self.couples = nn.Linear(6, 3), couples

    def forward(self, x: Tensor, inner: bool = False) -> Tensor:
        return self.layer(x) if inner else self(x - x.mean(0) if self.couples else 2 * x, True)


def test_a_module_that_calls_itself_is_probed_as_a_whole() -> None:
    run(CallsItself(False), F.cross_entropy)
    with pytest.raises(PrivacyError, match="depends on the other records"):
        run(CallsItself(True), F.cross_entropy)


class MasksBySize(nn.Module):
    """Registers a buffer for each number of records it sees, one at a re-run, and remembers its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))
        self.register_buffer("expanded", torch.arange(6.0).expand(4, 6))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        name = f"mask_{len(x)}"
        if not hasattr(self, name):
            self.register_buffer(name, x.new_ones(len(x), 1))
        self.last = x * getattr(self, name) @ self.weight
        return self.last


def test_runs_of_ours_leave_nothing_in_the_module() -> None:
    module = nn.Sequential(MasksBySize())
    run(module, F.cross_entropy, poisson_sampling=False)
    assert sorted(module.state_dict()) == ["0.expanded", "0.mask_20", "0.weight"]
    assert module[0].last.shape == (20, 3) and module[0].last.isfinite().all()
