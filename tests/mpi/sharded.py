"""reduce_noise_step: a step that ranks take together is the step that each would take alone, whatever the optimizer."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from mpi4py import MPI
from together import rough
from torch import nn

from fastdp import comm, ops
from fastdp.clipping import Span, spans_of
from fastdp.errors import ArgumentError, CommError

KEY = torch.arange(32, dtype=torch.uint8)
STD, BATCH = 0.7, 16
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


def model(dtype: torch.dtype) -> nn.Module:
    """Parameters of 1 to 4000 elements: some slices end inside of one, some hold several."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(40, 100), nn.Linear(100, 7), nn.Linear(7, 1)).to(dtype)


def torch_step(twin: nn.Module, optimizer: torch.optim.Optimizer, total: torch.Tensor, step: int) -> None:
    """The oracle: noise on the whole flat sum, then torch's own optimizer."""
    noised = ops.gaussian_noise_(total.clone(), STD, key=KEY, step=step) / BATCH
    for s in spans_of(twin, optimizer):
        s.param.grad = noised[s.offset : s.offset + s.numel].view(s.shape)
    optimizer.step()


def summed(c: comm.Communicator, numel: int, dtype: torch.dtype, step: int) -> torch.Tensor:
    total = rough(1000 * step, numel, dtype)
    for rank in range(1, c.size):
        total += rough(1000 * step + rank, numel, dtype)
    return total


def check(c: comm.Communicator, name: str, dtype: torch.dtype) -> None:
    kind, how = OPTIMIZERS[name]
    module, twin = model(dtype), model(dtype)
    optimizer, theirs = kind(module.parameters(), **how), kind(twin.parameters(), **how)
    sharded = c.shard(optimizer, spans_of(module, optimizer))
    numel = sharded.flat.numel()

    def compare() -> None:
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            for buffer, x in theirs.state[q].items():
                torch.testing.assert_close(optimizer.state[p][buffer], x, rtol=1e-5, atol=1e-6)
        bits = b"".join(p.detach().numpy().tobytes() for p in module.parameters())
        assert len(set(c.allgather_object(bits))) == 1, "ranks disagree"

    def both(step: int) -> None:
        sharded.flat.copy_(rough(1000 * step + c.rank, numel, dtype))
        c.reduce_noise_step(sharded, noise_std=STD, batch_size=BATCH, key=KEY, step=step)
        torch_step(twin, theirs, summed(c, numel, dtype, step), step)
        compare()

    for step in range(3):
        both(step)
    # A checkpoint, and what is loaded from it; parameters in storages of their own on one rank.
    file = io.BytesIO()
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    elements = sum(p.numel() for p in module.parameters())
    assert len(file.getvalue()) < elements * dtype.itemsize * (3 if "adam" in name else 2) + 20_000  # nothing else
    for p in module.parameters():
        assert p.untyped_storage().nbytes() == p.nbytes
    both(3)
    file.seek(0)
    saved = torch.load(file)
    module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    twin.load_state_dict(saved["model"])
    theirs.load_state_dict(copy.deepcopy(saved["optimizer"]))
    if c.rank == c.size - 1:
        for p in module.parameters():
            p.data = p.data.clone()
    both(4)
    both(5)
    for of in (optimizer, theirs):  # begins anew
        of.state.clear()
    both(6)
    # An optimizer that is not fused any more, and is again.
    sharded.leave()
    torch_step(module, optimizer, summed(c, numel, dtype, 7), 7)
    torch_step(twin, theirs, summed(c, numel, dtype, 7), 7)
    compare()
    optimizer.zero_grad()
    both(8)


def check_same_bits(c: comm.Communicator) -> None:
    """The noise alone does not depend on the ranks."""
    module = model(torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    spans = spans_of(module, optimizer)
    sharded = c.shard(optimizer, spans)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    c.reduce_noise_step(sharded, noise_std=STD, batch_size=1, key=KEY, step=9)
    noise = ops.gaussian_noise_(torch.zeros(sharded.flat.numel()), STD, key=KEY, step=9)
    for s in spans:
        assert torch.equal(-s.param.detach().flatten(), noise[s.offset : s.offset + s.numel])


def check_arguments(c: comm.Communicator) -> None:
    """What is wrong is named before anything is sent, and what differs between ranks is an error on all of them."""
    module = model(torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    spans = spans_of(module, optimizer)
    sharded = c.shard(optimizer, spans)
    good: dict[str, Any] = {"noise_std": STD, "batch_size": 1, "key": KEY, "step": 0}
    for name, bad in (
        ("noise_std", math.nan),
        ("noise_std", -1.0),
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("key", KEY[:4]),
        ("key", KEY.float()),
        ("key", None),
        ("step", -1),
        ("step", 1.5),
        ("noise_std", 10**400),
        ("noise_std", 1e39),
        ("noise_std", 1e-39),
        ("noise_std", True),
        ("batch_size", 10**400),
        ("batch_size", True),
        ("step", True),
        ("tables", [1]),
        ("tables", {spans[0]: [1]}),
        ("tables", {spans[0]: torch.tensor([3, 3])}),
        ("tables", {spans[0]: torch.tensor([3.0])}),
        ("tables", {spans[0]: torch.tensor([100])}),
        ("tables", {spans[0]: torch.tensor([[3]])}),
        ("tables", {spans[1]: torch.tensor([3])}),  # not of two dimensions
        ("tables", {Span("another", module[0].weight, 0, torch.Size([9, 9])): torch.tensor([3])}),
    ):
        with pytest.raises(ArgumentError, match=f"^{name}"):
            c.reduce_noise_step(sharded, **(good | {name: bad}))
    with pytest.raises(ArgumentError, match=r"^sharded=.NoneType"):
        c.reduce_noise_step(None, **good)  # type: ignore[arg-type]
    other = comm.init(timeout=30.0)
    with pytest.raises(ArgumentError, match="sharded"):
        other.reduce_noise_step(sharded, **good)
    c.reduce_noise_step(sharded, **good)
    for name, value in (("noise_std", c.rank), ("batch_size", 1 + c.rank), ("key", KEY + c.rank), ("step", c.rank)):
        c = comm.init(timeout=30.0)
        sharded = c.shard(optimizer, spans)
        with pytest.raises(CommError, match="with another noise, batch size, key, step or optimizer's settings"):
            c.reduce_noise_step(sharded, **(good | {name: value}))
    c = comm.init(timeout=30.0)
    sharded = c.shard(optimizer, spans)
    for same in (1, 1.0, torch.tensor(1.0)):
        optimizer.param_groups[0]["lr"] = same if c.rank == 0 else 1.0
        c.reduce_noise_step(sharded, **good)
    for other_lr in (1.0 + c.rank, torch.tensor(1.0 + 1e-6 * c.rank)):
        c = comm.init(timeout=30.0)
        sharded = c.shard(optimizer, spans)
        optimizer.param_groups[0]["lr"] = other_lr
        with pytest.raises(CommError, match="optimizer's settings"):
            c.reduce_noise_step(sharded, **good)


def check_parameters_that_change_places(c: comm.Communicator) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    sharded = c.shard(optimizer, spans_of(module, optimizer))
    a, b = module[0].weight, module[1].weight
    before = a.detach().clone(), b.detach().clone()
    a.data, b.data = b.data, a.data
    c.reduce_noise_step(sharded, noise_std=0.0, batch_size=1, key=KEY, step=0)
    assert torch.equal(a, before[1]) and torch.equal(b, before[0])


def check_moved_parameters(c: comm.Communicator) -> None:
    """share_memory() gives a tensor, and all that have its storage, other memory: ranks must not write to the old."""
    module, twin = model(torch.float32), model(torch.float32)
    optimizer, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, twin))
    sharded = c.shard(optimizer, spans_of(module, optimizer))
    numel = sharded.flat.numel()
    for step in range(4):
        sharded.flat.copy_(rough(1000 * step + c.rank, numel, torch.float32))
        c.reduce_noise_step(sharded, noise_std=STD, batch_size=BATCH, key=KEY, step=step)
        torch_step(twin, theirs, summed(c, numel, torch.float32, step), step)
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        if step == 1:
            module.share_memory()


def main() -> None:
    c = comm.init(timeout=30.0)
    for name in OPTIMIZERS:
        for dtype in (torch.float32, torch.float64):
            check(c, name, dtype)
    check_same_bits(c)
    check_moved_parameters(c)
    check_parameters_that_change_places(c)
    check_arguments(c)
    print(f"done: rank {MPI.COMM_WORLD.rank}", flush=True)


main()
