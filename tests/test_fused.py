"""Steps taken with the noise: SGD, Adam and AdamW against torch's own, the paper's formulas, and the noise's bits."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from fastdp import ArgumentError, fused, native, reference
from fastdp.clipping import Span

# Within one chunk of noise, across chunks, a scalar, nothing; longer than a part of a thread's work (10240).
SHAPES = [(5, 7), (3,), (331,), (), (0,), (120, 97)]
BATCH = 8  # a power of two: the division is exact, and torch gets the very same gradient
LIMIT = {torch.float64: 1e-13, torch.float32: 1e-6}


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


class Rig:
    """Parameters in a flat buffer with gaps, as the engine lays them out, and the same ones for torch to step."""

    def __init__(self, make: Callable[[list[nn.Parameter]], Optimizer], dtype: torch.dtype = torch.float64) -> None:
        self.params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
        self.twins = copy.deepcopy(self.params)
        self.inner, self.torch = make(self.params), make(self.twins)
        sizes = [-(-p.numel() // 16) * 16 for p in self.params]
        self.spans = {
            p: Span(f"p{i}", p, sum(sizes[:i]), p.shape) for i, p in enumerate(self.params) if p.requires_grad
        }
        self.flat = torch.zeros(sum(sizes), dtype=dtype)

    def fused_step(self, std: float = 0.0, key: Tensor | None = None, step: int = 0) -> None:
        key = torch.zeros(32, dtype=torch.uint8) if key is None else key
        for h, parameters in fused.steps(self.inner, self.spans, std, BATCH):
            native.noise_step(h, parameters, self.flat, key, step)
        self.inner._opt_called = True  # for schedulers, as the engine does

    def torch_step(self) -> None:
        for p, twin in zip(self.params, self.twins, strict=True):
            s = self.spans.get(p)
            if s is not None:
                twin.grad = self.flat[s.offset : s.offset + s.numel].view(s.shape) / BATCH
        self.torch.step()

    def both(self, count: int = 4) -> None:
        for _ in range(count):
            self.flat.normal_()
            self.fused_step()
            self.torch_step()

    def check(self) -> None:
        """Parameters and state, to rounding; names, dtypes and shapes of the state exactly."""
        for p, twin in zip(self.params, self.twins, strict=True):
            close(p, twin)
            ours, theirs = self.inner.state.get(p, {}), self.torch.state.get(twin, {})
            assert ours.keys() == theirs.keys()
            for name, x in theirs.items():
                assert (ours[name].dtype, ours[name].shape) == (x.dtype, x.shape)
                close(ours[name], x)


def close(x: Tensor, y: Tensor) -> None:
    assert x.numel() == 0 or (x - y).abs().max() <= LIMIT.get(x.dtype, 0) * y.abs().max()


def halves(params: list[nn.Parameter], first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": params[::2], **first}, {"params": params[1::2], **second}]


STEPPERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: SGD(halves(p, {"weight_decay": 0.1}, {"maximize": True}), lr=0.1),
    "momentum": lambda p: SGD(halves(p, {"dampening": 0.3}, {"momentum": 0.0}), lr=0.1, momentum=0.9),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.7, nesterov=True, weight_decay=0.2, maximize=True),
    "adam": lambda p: Adam(p),
    "adam l2": lambda p: Adam(p, lr=0.1, weight_decay=0.3),
    "adam l2 maximize": lambda p: Adam(p, lr=0.1, weight_decay=0.3, maximize=True),
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.3),
    "adamw maximize": lambda p: AdamW(p, lr=0.1, weight_decay=0.3, maximize=True),
    "adamw without decay": lambda p: AdamW(p, lr=0.1, weight_decay=0.0),
    "groups": lambda p: Adam(
        halves(p, {"lr": 0.1, "betas": (0.3, 0.5)}, {"eps": 0.2, "weight_decay": 0.5, "maximize": True}), lr=0.01
    ),
    "adamw groups": lambda p: AdamW(halves(p, {"lr": 0.1, "eps": 0.1}, {"betas": (0.0, 0.9), "weight_decay": 0.5})),
    "foreach": lambda p: Adam(p, lr=0.1, foreach=True),
    "fused": lambda p: AdamW(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("name", STEPPERS)
def test_steps_without_noise_are_torchs(name: str, dtype: torch.dtype) -> None:
    rig = Rig(STEPPERS[name], dtype)
    assert fused.is_fused(rig.inner)
    schedules = [ExponentialLR(optimizer, gamma=0.5) for optimizer in (rig.inner, rig.torch)]
    for _ in range(3):
        rig.both(2)
        for schedule in schedules:
            schedule.step()
        rig.check()
    assert [g["lr"] for g in rig.inner.param_groups] == [g["lr"] for g in rig.torch.param_groups]


@pytest.mark.skipif("decoupled_weight_decay" not in Adam([nn.Parameter(torch.ones(1))]).defaults, reason="torch < 2.7")
def test_adam_with_decoupled_decay_is_adamw() -> None:
    rig = Rig(lambda p: Adam(p, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True))
    rig.both()
    rig.check()


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_groups_without_the_key_of_torch_2_7(kind: type[Optimizer]) -> None:
    """torch 2.6: the class alone says which decay it is."""
    rig = Rig(lambda p: kind(p, lr=0.1, weight_decay=0.3))
    for group in rig.inner.param_groups:
        group.pop("decoupled_weight_decay", None)
    rig.both()
    rig.check()


@pytest.mark.parametrize("name", ["adam l2", "momentum"])
def test_parameters_of_one_group_at_different_steps(name: str) -> None:
    rig = Rig(STEPPERS[name])
    rig.both(3)
    for optimizer, params in ((rig.inner, rig.params), (rig.torch, rig.twins)):
        del optimizer.state[params[0]], optimizer.state[params[4]]  # these begin again
        if "step" in optimizer.state[params[2]]:
            optimizer.state[params[2]]["step"].fill_(1000.0)
    rig.both(3)
    rig.check()
    if name == "adam l2":
        assert [rig.inner.state[p]["step"].item() for p in rig.params[:3]] == [3, 6, 1003]


def test_frozen_parameters_are_left_alone() -> None:
    def make(params: list[nn.Parameter]) -> Optimizer:
        params[1].requires_grad_(False)
        return Adam(params, lr=0.1, weight_decay=0.3)

    rig = Rig(make)
    before = rig.params[1].clone()
    rig.both()
    rig.check()
    assert torch.equal(rig.params[1], before) and rig.params[1] not in rig.inner.state


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", ["adam", "adamw groups", "fused", "nesterov"])
def test_state_goes_to_torch_and_back(name: str, wide: bool) -> None:
    torch.set_default_dtype(torch.float64 if wide else torch.float32)
    rig = Rig(STEPPERS[name], torch.float64)
    rig.both()
    rig.check()
    ours, theirs = copy.deepcopy((rig.inner.state_dict(), rig.torch.state_dict()))
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    rig.inner, rig.torch = STEPPERS[name](rig.params), STEPPERS[name](rig.twins)
    rig.inner.load_state_dict(theirs)
    rig.torch.load_state_dict(ours)
    rig.both()
    rig.check()


@pytest.mark.parametrize("decoupled", [False, True])
def test_noisy_steps_are_the_papers(key: Tensor, decoupled: bool) -> None:
    """The oracle's noise and formulas, neither of which shares code with the kernels."""
    lr, betas, eps, decay, std = 0.1, (0.8, 0.95), 1e-3, 0.4, 2.0
    rig = Rig(lambda p: (AdamW if decoupled else Adam)(p, lr=lr, betas=betas, eps=eps, weight_decay=decay))
    want = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in rig.params[:4]]
    for t in range(1, 4):
        rig.flat.normal_()
        rig.fused_step(std, key, t)
        for i, s in enumerate(itertools.islice(rig.spans.values(), 4)):
            noise = reference.gaussian_noise(s.numel, bytes(key.tolist()), t, s.offset)
            g = (rig.flat[s.offset : s.offset + s.numel] + std * noise).view(s.shape) / BATCH
            want[i] = reference.adam_step(*want[i], g, t, lr, betas, eps, decay, decoupled)
    for p, (theta, m, v) in zip(rig.params, want, strict=False):
        assert (p - theta).abs().max() < 1e-4 * lr  # the kernel's normals are floats: 2e-6 from the oracle's
        assert (rig.inner.state[p]["exp_avg"] - m).abs().max() < 1e-5
        assert (rig.inner.state[p]["exp_avg_sq"] - v).abs().max() < 1e-5


# With sum 0, scale 1 and beta1 0, exp_avg is the noise itself; so is -p after SGD from 0 with lr 1.
NOISE = """
import hashlib, torch
from fastdp import _kernels, native, ops
key = torch.arange(32, dtype=torch.uint8)
adam = _kernels.AdamStep(
    std=1.5, scale=1.0, weight_decay=0.0, beta1=0.0, beta2=0.9, eps=0.1, keep=0.9, step_size=0.1, root=0.3
)
sgd = _kernels.SgdStep(
    std=1.5, scale=1.0, weight_decay=0.0, lr=1.0, momentum=0.0, dampening=0.0, nesterov=False, first=True
)
spans = ((0, 100003), (100016, 7), (100032, 331))
h = hashlib.sha256()
for dtype in (torch.float32, torch.float64):
    flat, want = (torch.zeros(100363, dtype=dtype) for _ in range(2))
    ops.gaussian_noise_(want, 1.5, key=key, step=2**40 + 3)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        p, m, v, q = (torch.zeros(100363, dtype=dtype) for _ in range(4))
        at = lambda x, offset: x[offset:].data_ptr()
        native.noise_step(adam, [(at(p, o), at(m, o), at(v, o), n, o) for o, n in spans], flat, key, 2**40 + 3)
        native.noise_step(sgd, [(at(q, o), 0, 0, n, o) for o, n in spans], flat, key, 2**40 + 3)
        for o, n in spans:
            assert torch.equal(m[o : o + n], want[o : o + n]) and torch.equal(-q[o : o + n], want[o : o + n])
        h.update(p.numpy().tobytes() + v.numpy().tobytes())
    assert m[100003:100016].abs().max() == 0
print(_kernels.isa(), h.hexdigest())
"""


def test_noise_and_steps_have_the_same_bits_on_every_instruction_set_and_thread_count(
    at_isa: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    exec(NOISE, {})
    assert at_isa(NOISE).split()[1] == capsys.readouterr().out.split()[1]


def test_threads_do_not_change_a_bit() -> None:
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        rig = Rig(STEPPERS["groups"], torch.float32)
        for step in range(3):
            rig.flat.normal_()
            rig.fused_step(1.0, step=step)
        results.append([x for p in rig.params for x in (p.detach(), *rig.inner.state[p].values())])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


class Own(Adam):
    """A subclass may do anything."""


def hooked(params: list[nn.Parameter]) -> Optimizer:
    optimizer = Adam(params)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def one_group(**options: Any) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda p: Adam(halves(p, {}, options))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Own(p),
        hooked,
        lambda p: torch.optim.NAdam(p),
        lambda p: SGD(p, lr=0.1, differentiable=True),
        one_group(amsgrad=True),
        one_group(differentiable=True),
        one_group(lr=torch.tensor(0.1)),
        one_group(betas=(torch.tensor(0.9), torch.tensor(0.99))),
    ],
)
def test_what_the_kernels_do_not_do_is_left_to_torch(make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    assert not fused.is_fused(make([nn.Parameter(torch.ones(3)) for _ in range(2)]))


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    r"exp_avg of p2='torch.float32\[331\] on cpu'": lambda s: s.update(exp_avg=s["exp_avg"].float()),
    r"exp_avg_sq of p2='torch.float64\[330\] on cpu'": lambda s: s.update(exp_avg_sq=s["exp_avg_sq"][1:]),
    r"exp_avg_sq of p2='torch.float64\[331\] on cpu'": lambda s: s.update(exp_avg_sq=s["exp_avg_sq"].repeat(2)[::2]),
    "exp_avg of p2=None": lambda s: s.pop("exp_avg"),
    "step of p2=None": lambda s: s.pop("step"),
    r"step of p2=tensor\(\[1., 1.\]\)": lambda s: s.update(step=torch.ones(2)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_bad_state_is_refused_before_anything_changes(message: str) -> None:
    rig = Rig(STEPPERS["adam"])
    rig.both(1)
    BROKEN[message](rig.inner.state[rig.params[2]])
    before = copy.deepcopy((rig.params, rig.inner.state[rig.params[0]]))
    with pytest.raises(ArgumentError, match=message + ": must be ") as error:
        rig.fused_step()
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(rig.params, before[0], strict=True))
    assert rig.inner.state[rig.params[0]]["step"] == before[1]["step"] == 1


def test_bad_momentum_is_refused_by_name() -> None:
    rig = Rig(STEPPERS["nesterov"])
    rig.both(1)
    rig.inner.state[rig.params[0]]["momentum_buffer"] = torch.zeros(5, 7)
    with pytest.raises(
        ArgumentError, match=r"momentum_buffer of p0='torch.float32\[5, 7\] on cpu': must be contiguous"
    ):
        rig.fused_step()
