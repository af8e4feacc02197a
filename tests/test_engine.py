"""The engine on one process: P1 against a loop over single samples, P3 to P5, epsilon."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import MODELS, data, oracle_step, private
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastdp
from fastdp import PrivacyEngine, PrivacyError, ops, reference
from fastdp.plan import CLIPPINGS

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_steps_equal_a_loop_over_single_samples(name: str, dtype: torch.dtype, reduction: str, clipping: str) -> None:
    module = MODELS[name]().to(dtype)
    twin = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    how = {"loss_reduction": reduction, "clipping": clipping}
    _, module, optimizer, loader = private(module, optimizer, data(dtype=dtype), **how)
    check = torch.optim.SGD(twin.parameters(), lr=0.5)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y, reduction=reduction).backward()
        assert all(p.grad is None for p in module.parameters())
        optimizer.step()
        oracle_step(twin, check, x[: loader.rows], y[: loader.rows], 0.5, 12, clipping)
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            assert (p - q).abs().max() <= LIMIT[dtype] * q.abs().max()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, dampening=0.1, weight_decay=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.8, nesterov=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, maximize=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
}


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_as_torchs_do_on_the_noised_gradient(name: str, noise_multiplier: float) -> None:
    """With noise: the oracle adds the kernel's own noise, taken by flat index, and lets torch's optimizer step."""
    dtype = torch.float64
    module = MODELS["mlp"]().to(dtype)
    twin = copy.deepcopy(module)
    _engine, module, optimizer, loader = private(
        module, OPTIMIZERS[name](module.parameters()), data(dtype=dtype), noise_multiplier=noise_multiplier, seed=7
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    check = OPTIMIZERS[name](twin.parameters())
    check_scheduler = torch.optim.lr_scheduler.StepLR(check, step_size=2, gamma=0.5)
    import hashlib

    key = torch.frombuffer(bytearray(hashlib.sha256(b"fastdp test 7").digest()), dtype=torch.uint8)
    for step, (x, y) in enumerate(loader):
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        scheduler.step()
        gradients = reference.per_sample_gradients(twin, F.cross_entropy, x[: loader.rows], y[: loader.rows])
        offset = 0
        for p, g in zip(twin.parameters(), reference.clipped_gradient(gradients, 0.5, twin.parameters()), strict=True):
            ops.gaussian_noise_(g, noise_multiplier * 0.5, key=key, step=step, offset=offset)
            p.grad = g / 12
            offset += math.ceil(p.numel() / 16) * 16
        check.step()
        check_scheduler.step()
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            assert (p - q).abs().max() <= 1e-9 * q.abs().max()
    assert optimizer.param_groups[0]["lr"] == check.param_groups[0]["lr"]
    saved = optimizer.state_dict()
    assert saved.keys() == check.state_dict().keys()
    optimizer.load_state_dict(saved)
    assert optimizer.state is optimizer.inner.state


def test_noise_has_the_planned_variance_once_per_step_on_empty_batches_too() -> None:
    """P3: over many steps, the updates of a model with zero gradients have variance (sigma C lr / B)^2."""
    sigma, c, batch, lr = 1.3, 0.7, 10, 2.0
    module = nn.Linear(40, 25)
    dataset = TensorDataset(torch.zeros(30, 40), torch.zeros(30, 25))
    _engine, module, optimizer, loader = private(
        module,
        torch.optim.SGD(module.parameters(), lr=lr),
        dataset,
        batch,
        noise_multiplier=sigma,
        max_grad_norm=c,
        dataset_size=300,  # 30 of 300 records at rate 1/30: a third of the batches is empty
        loss_reduction="sum",
    )
    updates, empty = [], []
    for _ in range(4):
        for x, _y in loader:
            before = module.weight.detach().clone()
            optimizer.zero_grad()
            (0.0 * module(x)).sum().backward()
            optimizer.step()
            updates.append((module.weight.detach() - before).flatten())
            empty.append(loader.rows == 0)
    assert 20 < sum(empty) < 100 and len(updates) == 120
    want = (sigma * c * lr / batch) ** 2
    for chosen in (True, False):
        u = torch.stack([u for u, e in zip(updates, empty, strict=True) if e is chosen]).double()
        # Each update is the float difference of parameters near 1: rounding adds 1e-8 of the variance.
        assert abs(u.square().mean().item() / want - 1) < 5 * math.sqrt(2 / u.numel())
        assert abs(u.mean().item()) < 5 * math.sqrt(want / u.numel())
    x = torch.stack(updates)
    assert abs(torch.corrcoef(x)[~torch.eye(len(x), dtype=bool)].mean()) < 5 / math.sqrt(x.numel())


def test_runs_differ_without_a_seed_and_repeat_with_one() -> None:
    def run(seed: int | None) -> Tensor:
        torch.manual_seed(0)
        module = nn.Linear(6, 3)
        _, module, optimizer, loader = private(
            module, torch.optim.SGD(module.parameters(), lr=1.0), data(), noise_multiplier=1.0, seed=seed
        )
        x, y = next(iter(loader))
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        return module.weight.detach().clone()

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert not torch.equal(run(None), run(None))


def test_ledger_and_epsilon_follow_the_plan() -> None:
    module = nn.Linear(6, 3)
    engine, module, optimizer, loader = private(
        module, torch.optim.SGD(module.parameters(), lr=1.0), data(), noise_multiplier=1.1, seed=None
    )
    assert engine.get_epsilon(1e-5) == 0.0
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    assert engine.ledger.events == {(1.1, 12 / 60): 5}
    want = fastdp.accounting.epsilon(noise_multiplier=1.1, sample_rate=0.2, steps=5, delta=1e-5)
    assert engine.get_epsilon(1e-5) == pytest.approx(want, rel=1e-6)
    assert engine.get_epsilon(1e-5) >= want
    assert engine.assumptions() == [
        "a record is one row of the data set",
        "flat clipping: a record adds a vector of norm at most C = 0.5 to a step's sum",
        "n treated as public; add/remove adjacency",
    ]


@pytest.mark.filterwarnings("ignore:.*a step of noise alone")
def test_shuffled_batches_claim_no_amplification() -> None:
    """P5: a record is in one batch of an epoch, so an epoch costs one Gaussian mechanism."""
    module = nn.Linear(6, 3)
    engine, module, optimizer, loader = private(
        module, torch.optim.SGD(module.parameters(), lr=1.0), data(), noise_multiplier=2.0, poisson_sampling=False
    )
    for _ in range(2):
        for x, y in loader:
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
    next(iter(loader))  # a third epoch, begun
    optimizer.step()
    assert engine.ledger.events == {(2.0, 1.0): 3}
    assert any("no amplification" in line for line in engine.assumptions())
    assert any("NOT PRIVATE" in line for line in engine.assumptions())


def test_calibrated_runs_hit_the_target_and_stop_there() -> None:
    module = nn.Linear(6, 3)
    engine = PrivacyEngine()
    module, optimizer, loader = engine.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(data(600), batch_size=60),
        target_epsilon=2.0,
        target_delta=1e-5,
        epochs=3,
        max_grad_norm=1.0,
    )
    for _ in range(3):
        for x, y in loader:
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
    assert 0.995 * 2.0 < engine.get_epsilon(1e-5) <= 2.0
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(PrivacyError, match="calibrated for 30 steps"):
        optimizer.step()


def test_evaluation_between_steps_changes_nothing(loop) -> None:
    _, module, optimizer, loader = loop
    x, y = next(iter(loader))
    loss = F.cross_entropy(module(x), y)
    with torch.no_grad():
        module(torch.randn(5, 6))
    module(torch.randn(7, 6))  # a graph that nobody goes back through
    loss.backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:.*a step of noise alone")
def test_shuffled_calibrated_runs_stop_after_their_epochs() -> None:
    module = nn.Linear(6, 3)
    engine = PrivacyEngine()
    module, optimizer, loader = engine.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(data(60), batch_size=12),
        target_epsilon=2.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for _ in range(2):
        next(iter(loader))
        optimizer.step()
    next(iter(loader))
    with pytest.raises(PrivacyError, match="epoch 3: the noise was calibrated for 2 epochs"):
        optimizer.step()
    assert engine.get_epsilon(1e-5) <= 2.0


@pytest.mark.parametrize(("target", "delta"), [(50.0, 1e-5), (1.0, 1e-9)])
def test_calibration_counts_the_cut_tails(target: float, delta: float) -> None:
    module = nn.Linear(6, 3)
    engine = PrivacyEngine()
    module, optimizer, loader = engine.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(data(60), batch_size=12),
        target_epsilon=target,
        target_delta=delta,
        epochs=2,
        max_grad_norm=1.0,
    )
    for x, y in itertools.chain(loader, loader):
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    assert 0.99 * target < engine.get_epsilon(delta) <= target


class BrokenComm:
    """A communicator that fails as a step is released; it has seen what came before."""

    rank, size = 0, 2
    whole = staticmethod(contextlib.nullcontext)

    def agree(self, *_):
        pass

    def wish(self, value):
        pass

    def all_reduce(self, x: Tensor) -> None:
        raise fastdp.CommError("peer died")


def test_a_step_is_in_the_ledger_before_anything_of_it_is_released(loop) -> None:
    engine, module, optimizer, loader = loop
    optimizer._comm = BrokenComm()
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(fastdp.CommError, match="peer died"):
        optimizer.step()
    assert engine.ledger.steps == 1


def test_a_communicator_of_another_library_is_refused() -> None:
    module = MODELS["mlp"]()
    with pytest.raises(fastdp.ArgumentError, match=r"^comm=.*: must be None or what fastdp.comm.init\(\) returns"):
        private(module, torch.optim.SGD(module.parameters(), lr=0.1), data(), comm=object())


class Watches(torch.optim.SGD):
    """Not torch's SGD itself, so the unfused path is taken; keeps what it was shown, then fails."""

    def step(self, closure=None):
        self.seen = [p.grad for group in self.param_groups for p in group["params"]]
        raise RuntimeError("watched")


def test_the_inner_optimizer_sees_noised_gradients_in_memory_of_their_own() -> None:
    module = MODELS["mlp"]()
    inner = Watches(module.parameters(), lr=0.1)
    engine, module, optimizer, loader = private(module, inner, data(), noise_multiplier=3.0)
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(RuntimeError, match="watched"):
        optimizer.step()
    assert engine.ledger.steps == 1
    for p, g in zip(module.parameters(), inner.seen, strict=True):
        assert p.grad is None
        assert g.untyped_storage().nbytes() == g.numel() * g.element_size()
        assert g.abs().max() > 0.05  # noise of 3 * 0.5 / 12 on every element


@pytest.mark.filterwarnings("ignore:.*a step of noise alone")
def test_epsilon_includes_the_cut_tails() -> None:
    module = nn.Linear(6, 3)
    engine, module, optimizer, loader = private(
        module, torch.optim.SGD(module.parameters(), lr=1.0), data(), noise_multiplier=0.2
    )
    next(iter(loader))
    optimizer.step()
    delta = 1e-4
    tail = engine.ledger.tail_delta(6 * 3 + 3)
    assert tail > 1e-5
    with_tails, without = engine.get_epsilon(delta), engine.ledger.epsilon(delta)
    assert with_tails == engine.ledger.epsilon(delta - tail) and with_tails > 1.001 * without


def test_a_run_without_noise_says_so() -> None:
    module = nn.Linear(6, 3)
    engine = PrivacyEngine()
    engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(data(), batch_size=12),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
    )
    assert engine.assumptions()[0] == "NOT PRIVATE: no noise is added"


class Positions(nn.Module):
    """Its layers but the last see 50 positions of each record: gradients are smaller than what they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x.unsqueeze(1).expand(-1, 50, -1))).mean(1))


def test_a_loss_that_is_kept_keeps_no_activations() -> None:
    module = Positions()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    _, module, optimizer, loader = private(module, optimizer, data())
    (x, y) = next(iter(loader))
    loss = F.cross_entropy(module(x), y)
    loss.backward(retain_graph=True)
    last, *formed = optimizer._recorder.uses
    assert len(formed) == 2 and not any(hasattr(use, "a") or hasattr(use, "b") for use in formed)
    a, b = weakref.ref(last.a), weakref.ref(last.b)
    optimizer.step()
    del last
    assert a() is None and b() is None
    with pytest.raises(PrivacyError, match=r"layer 'last': a second backward\(\) through the same forward"):
        loss.backward()


def test_a_start_that_fails_leaves_the_module_and_the_ledger_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = nn.Linear(6, 3), tmp_path / "ledger.jsonl"

    def start(engine: PrivacyEngine) -> None:
        engine.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(data(), batch_size=12),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory")

    for name in ("GradientSum", "PrivateLoader", "ledger.hold", "PrivateLoader.skip"):
        with monkeypatch.context() as patch:
            patch.setattr(f"fastdp.engine.{name}", fail)
            with pytest.raises(MemoryError):
                start(PrivacyEngine(ledger=path))
        assert not module._forward_hooks and not module._forward_pre_hooks
    start(PrivacyEngine(ledger=path))
