"""The engine on one process: P1 against a loop over single samples, P3 to P6, P10 and P12."""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import pickle
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastdp
from fastdp import ArgumentError, PrivacyEngine, PrivacyError, ops, reference

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4}


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


def private(
    module: nn.Module, optimizer: torch.optim.Optimizer, dataset: TensorDataset, batch_size: int = 12, **kwargs
):
    engine = PrivacyEngine(seed=kwargs.pop("seed", 1))
    kwargs = {"noise_multiplier": 0.0, "max_grad_norm": 0.5, **kwargs}
    loader = DataLoader(dataset, batch_size=batch_size)
    return engine, *engine.make_private(module=module, optimizer=optimizer, data_loader=loader, **kwargs)


def oracle_step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, c: float, b: int) -> None:
    params = [p for p in module.parameters() if p.requires_grad]
    gradients = reference.per_sample_gradients(module, F.cross_entropy, x, y)
    for p, g in zip(params, reference.clipped_gradient(gradients, c, params), strict=True):
        p.grad = (g / b).to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_steps_equal_a_loop_over_single_samples(name: str, dtype: torch.dtype, reduction: str) -> None:
    module = MODELS[name]().to(dtype)
    twin = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    _, module, optimizer, loader = private(module, optimizer, data(dtype=dtype), loss_reduction=reduction)
    check = torch.optim.SGD(twin.parameters(), lr=0.5)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y, reduction=reduction).backward()
        assert all(p.grad is None for p in module.parameters())
        optimizer.step()
        oracle_step(twin, check, x[: loader.rows], y[: loader.rows], 0.5, 12)
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
        "n treated as public; add/remove adjacency",
    ]


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


# ---- P4: exactly one batch per step


@pytest.fixture
def loop():
    module = MODELS["mlp"]()
    return private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())


def test_a_step_needs_exactly_one_batch(loop) -> None:
    engine, module, optimizer, loader = loop
    with pytest.raises(PrivacyError, match="after 0 batches"):
        optimizer.step()
    batches = iter(loader)
    x, y = next(batches)
    F.cross_entropy(module(x), y).backward()
    optimizer.step()
    with pytest.raises(PrivacyError, match="after 0 batches"):
        optimizer.step()
    next(batches)
    x, y = next(batches)
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(PrivacyError, match="after 2 batches"):
        optimizer.step()
    assert engine.ledger.steps == 1


def test_a_step_without_backward_is_noise_and_is_accounted(loop) -> None:
    engine, module, optimizer, loader = loop
    before = copy.deepcopy(module.state_dict())
    next(iter(loader))
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())  # noise_multiplier is 0
    assert engine.ledger.steps == 1


def test_a_second_backward_is_refused(loop) -> None:
    _, module, optimizer, loader = loop
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(PrivacyError, match=r"second backward\(\) before optimizer.step"):
        F.cross_entropy(module(x), y).backward()
    optimizer.zero_grad()
    F.cross_entropy(module(x), y).backward()  # after zero_grad the first one no longer counts
    optimizer.step()


def test_other_rows_than_the_loaders_are_refused(loop) -> None:
    _, module, optimizer, loader = loop
    x, y = next(iter(loader))
    with pytest.raises(PrivacyError, match="the first dimension of its input is not the batch's records"):
        F.cross_entropy(module(torch.cat([x, x])), torch.cat([y, y])).backward()
        optimizer.step()


def test_closures_and_new_groups_are_refused(loop) -> None:
    _, _module, optimizer, _ = loop
    with pytest.raises(ArgumentError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ArgumentError, match="before make_private"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_evaluation_between_steps_changes_nothing(loop) -> None:
    _, module, optimizer, loader = loop
    x, y = next(iter(loader))
    loss = F.cross_entropy(module(x), y)
    with torch.no_grad():
        module(torch.randn(5, 6))
    module(torch.randn(7, 6))  # a graph that nobody goes back through
    loss.backward()
    optimizer.step()


def test_an_exception_in_forward_leaves_parameters_trainable(loop) -> None:
    _, module, _optimizer, _loader = loop
    with pytest.raises(RuntimeError, match="shapes"):
        module(torch.randn(3, 5))
    assert all(p.requires_grad for p in module.parameters())


# ---- P1's guards


class Leaky(nn.Module):
    """Uses its layer's weight once as a module and once by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(x, self.layer.weight)


def test_a_gradient_by_another_way_is_refused_by_name() -> None:
    module = Leaky()
    _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(PrivacyError, match=r"layer\.weight: autograd delivered"):
        optimizer.step()


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.layer(x)
        x.mul_(2)
        return y


def test_an_input_changed_in_place_is_refused_by_name() -> None:
    module = ChangesItsInput()
    _, module, _optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
    x, y = next(iter(loader))
    with pytest.raises(PrivacyError, match="layer 'layer': its input was changed in place"):
        F.cross_entropy(module(x), y).backward()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
            "module.1='BatchNorm1d': must be replaced",
        ),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)), "module.1='BatchNorm1d'"),
        (nn.Linear(6, 3).bfloat16(), "torch.bfloat16"),
        (nn.Linear(6, 3).requires_grad_(False), "at least one parameter"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(module: nn.Module, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as error:
        private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")  # torch.compile's own imports
def test_compiled_modules_are_refused_by_name() -> None:
    module = torch.compile(nn.Linear(6, 3))
    with pytest.raises(ArgumentError, match="compiled"):
        private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())


def test_optimizer_and_module_must_match() -> None:
    module, other = MODELS["mlp"](), nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match=r"parameter 0\.weight='absent'"):
        private(module, torch.optim.SGD(module[2].parameters(), lr=0.1), data())
    with pytest.raises(ArgumentError, match="parameters of the module only"):
        private(module, torch.optim.SGD([*module.parameters(), *other.parameters()], lr=0.1), data())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0: must be finite and >= 0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"max_grad_norm": "1"}, "max_grad_norm='1': must be a number"),
        ({"noise_multiplier": torch.tensor(1.0)}, "noise_multiplier=tensor(1.): must be a number"),
        ({"dataset_size": 100.5}, "dataset_size=100.5: must be an int"),
        ({"batch_size": 61}, "batch_size=61: must be in"),
        ({"clipping": "per_layer"}, "clipping='per_layer'"),
        ({"loss_reduction": "none"}, "loss_reduction='none'"),
        ({"max_physical_batch_size": 0}, "max_physical_batch_size=0: must be None or an int >= 1"),
        ({"secure_mode": True}, "secure_mode=True"),
        ({"dataset_size": 100, "poisson_sampling": False}, "dataset_size=100"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, object], message: str) -> None:
    module = nn.Linear(6, 3)
    with pytest.raises(ArgumentError) as error:
        private(module, torch.optim.SGD(module.parameters(), lr=0.1), data(), **kwargs)
    assert message in str(error.value)


def test_bad_modules_and_optimizers_are_named(loop) -> None:
    module = nn.Linear(6, 3)
    with pytest.raises(ArgumentError, match="optimizer='LBFGS'"):
        private(module, torch.optim.LBFGS(module.parameters()), data())
    with pytest.raises(ArgumentError, match=r"must be an nn\.Module"):
        private(nn.Linear, torch.optim.SGD(module.parameters(), lr=0.1), data())
    used = loop[1]
    with pytest.raises(ArgumentError, match="private already"):
        private(used, torch.optim.SGD(used.parameters(), lr=0.1), data())
    again = copy.deepcopy(used)
    private(again, torch.optim.SGD(again.parameters(), lr=0.1), data())


@pytest.mark.parametrize(("name", "value"), [("target_epsilon", "3"), ("target_delta", None), ("target_delta", 2.0)])
def test_bad_targets_are_named(name: str, value: object) -> None:
    module = nn.Linear(6, 3)
    with pytest.raises(ArgumentError, match=f"{name}={value!r}: must be"):
        PrivacyEngine().make_private_with_epsilon(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(data(), batch_size=4),
            **{"target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 1, "max_grad_norm": 1.0, name: value},
        )


def test_a_penalty_in_the_loss_is_refused_with_the_cure(loop) -> None:
    _, module, optimizer, loader = loop
    x, y = next(iter(loader))
    penalty = sum(p.square().sum() for p in module.parameters())
    (F.cross_entropy(module(x), y) + 1e-3 * penalty).backward()
    with pytest.raises(PrivacyError, match="use the optimizer's weight_decay"):
        optimizer.step()


def test_an_engine_accounts_for_one_run(loop) -> None:
    engine = loop[0]
    module = nn.Linear(6, 3)
    with pytest.raises(ArgumentError, match="once per engine"):
        engine.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(data(), batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


CHANGES = {
    "0.weight: frozen or unfrozen": lambda m: m[0].weight.requires_grad_(False),
    "0.weight: removed or replaced": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.data.clone())),
    "0.weight: its dtype, shape, device or layout": lambda m: m.double(),
    "layout was changed": lambda m: setattr(m[0].weight, "data", m[0].weight.data.t().contiguous().t()),
    "get_float32_matmul_precision": lambda m: torch.set_float32_matmul_precision("medium"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_changes_after_make_private_are_refused(message: str, loop) -> None:
    _, module, optimizer, loader = loop
    try:
        CHANGES[message](module)
        x, y = next(iter(loader))
        F.cross_entropy(module(x.to(module[0].weight.dtype)), y).backward()
        with pytest.raises(PrivacyError, match=re.escape(message)):
            optimizer.step()
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_parameter_unfrozen_later_gets_no_raw_gradient(optimizer: type[torch.optim.Optimizer]) -> None:
    module = MODELS["mlp"]()
    module[0].requires_grad_(False)
    _, module, private_optimizer, loader = private(module, optimizer(module.parameters(), lr=0.1), data())
    module[0].requires_grad_(True)
    before = module[0].weight.detach().clone()
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(PrivacyError, match=r"0\.weight: autograd delivered"):
        private_optimizer.step()
    assert torch.equal(module[0].weight, before)


def test_the_original_optimizer_steps_nothing() -> None:
    module = MODELS["mlp"]()
    original = torch.optim.SGD(module.parameters(), lr=0.1)
    _, module, _, loader = private(module, original, data())
    before = copy.deepcopy(module.state_dict())
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    original.step()
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


# ---- P6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("name", ["mlp", "reused", "sequences", "logistic"])
def test_hostile_records_are_dropped_and_the_others_kept(name: str, bad: float) -> None:
    module = MODELS[name]()
    twin = copy.deepcopy(module)
    dataset = data()
    dataset.tensors[0][::7] = bad
    _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.5), dataset)
    check = torch.optim.SGD(twin.parameters(), lr=0.5)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        oracle_step(twin, check, x[: loader.rows], y[: loader.rows], 0.5, 12)
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            assert p.isfinite().all()
            assert (p - q).abs().max() <= 1e-4 * q.abs().max()
        break


def contribution(module: nn.Module, x: Tensor, y: Tensor, c: float) -> Tensor:
    """What one record adds to the sum: with lr = B = 1 and no noise it is the step."""
    dataset = TensorDataset(x, y)
    _, module, optimizer, loader = private(
        module, torch.optim.SGD(module.parameters(), lr=1.0), dataset, 1, max_grad_norm=c
    )
    batch, labels = next(iter(loader))
    for p in module.parameters():
        p.data.zero_()
    (module(batch) * 1.0 - labels).square().sum().backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()]).double()


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8, 1e18])
@pytest.mark.parametrize("c", [0.0, 1e-6, 1.0, 1e6])
def test_a_records_contribution_is_at_most_c(scale: float, c: float) -> None:
    for _ in range(5):
        x, y = torch.randn(1, 30) * scale, torch.randn(1, 20) * scale
        norm = contribution(nn.Linear(30, 20), x, y, c).norm().item()
        assert norm <= c
        true = 2 * y.double().norm().item() * math.sqrt(x.double().square().sum().item() + 1)
        assert norm == pytest.approx(min(c, true), rel=1e-5, abs=1e-42)


def test_cancelling_positions_stay_within_c() -> None:
    """Positions whose gradients nearly cancel: the norm is what rounding leaves, and must not be taken for less."""

    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.stack([x, x * (1 + 1e-7)], dim=1)
            y = self.layer(x)
            return y[:, 0] - y[:, 1]

    for _ in range(20):
        x, y = torch.randn(1, 8) * 1e3, torch.randn(1, 8) * 1e3
        assert contribution(Cancels(), x, y, 1.0).norm().item() <= 1.0


# ---- P12


def test_saved_models_hold_parameters_and_nothing_else(loop) -> None:
    _, module, optimizer, loader = loop
    plain_keys = MODELS["mlp"]().state_dict().keys()
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    optimizer.step()
    assert module.state_dict().keys() == plain_keys
    with_engine, without = io.BytesIO(), io.BytesIO()
    torch.save(module.state_dict(), with_engine)
    twin = MODELS["mlp"]()
    twin.load_state_dict(module.state_dict())
    torch.save(twin.state_dict(), without)
    assert len(with_engine.getvalue()) == len(without.getvalue())
    for p in module.parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
        assert p.grad is None


def test_copies_and_pickles_are_plain_modules(loop) -> None:
    _, module, optimizer, loader = loop
    x, y = next(iter(loader))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        loss = F.cross_entropy(twin(x), y)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in twin.parameters())
    F.cross_entropy(module(x), y).backward()
    optimizer.step()


def test_key_is_nowhere_to_be_seen(loop) -> None:
    engine, _, optimizer, loader = loop
    secret = bytes(optimizer._key.tensor().tolist())
    for shown in (repr(engine), repr(optimizer), repr(vars(loader.sampler)), str(vars(engine)), repr(engine.plan)):
        assert str(list(secret))[1:-1] not in shown and secret.hex() not in shown
    assert secret not in pickle.dumps(optimizer.state_dict())
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(PrivacyError, match="not pickled or copied"):
            copied(loader)


def test_a_forked_process_cannot_repeat_the_noise(loop) -> None:
    _, _, _, loader = loop
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            next(iter(loader))
            os.write(write, b"drew")
        except PrivacyError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"repeat the noise" in os.read(read, 1000)
    os.close(read)
    os.close(write)


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


# ---- what mutation testing found unguarded


class BrokenComm:
    """A communicator that fails as a step is released; it has seen what came before."""

    rank, size = 0, 2

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


def test_a_graph_from_before_the_step_is_not_used_with_the_new_parameters(loop) -> None:
    _, module, optimizer, loader = loop
    stale = (module[4].weight * module[4].weight).sum()
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


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


def test_ranks_without_a_communicator_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    module = nn.Linear(6, 3)
    with pytest.raises(ArgumentError, match=r"comm=None: must be fastdp.comm.init\(\) under mpirun"):
        private(module, torch.optim.SGD(module.parameters(), lr=1.0), data())


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_a_model_compiled_after_make_private_is_refused_by_name(loop) -> None:
    _, module, _, loader = loop
    x, _y = next(iter(loader))
    with pytest.raises(Exception, match=r"torch.compile: compiled models and losses are not supported"):
        torch.compile(module, backend="aot_eager")(x)


@pytest.mark.parametrize("x", [1e-30, 1.0, 1e20, 3e38])
@pytest.mark.parametrize("c", [1e-20, 2.5e-7, 1e-6, 0.1, 1.0])
def test_contributions_at_the_ends_of_float32(x: float, c: float) -> None:
    assert contribution(nn.Linear(1, 20), torch.full((1, 1), x), torch.ones(1, 20), c).norm().item() <= c
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.full((1, 3), x, dtype=torch.float64).to(dtype)
        assert ops.clip_sum(rows, c).double().norm().item() <= c
