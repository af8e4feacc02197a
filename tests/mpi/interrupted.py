"""Calls that are several collectives, left in the middle by one rank: an error on all of them."""

from __future__ import annotations

import functools
import gc
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdp
from fastdp import comm
from fastdp.clipping import spans_of
from fastdp.errors import CommError

KEY = torch.arange(32, dtype=torch.uint8)


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(40, 100), nn.Linear(100, 7), nn.Linear(7, 1))


def step(c: comm.Communicator, sharded: Any) -> None:
    c.reduce_noise_step(sharded, noise_std=0.7, batch_size=1, key=KEY, step=0)


def check_failure(c: comm.Communicator) -> None:
    """What is wrong on one rank ends the step on all."""
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9)
    sharded = c.shard(optimizer, spans_of(module, optimizer))
    if c.rank == 0:
        optimizer.state[module[0].weight]["momentum_buffer"] = torch.zeros(3)
    try:
        step(c, sharded)
    except ValueError as error:
        assert c.rank == 0 and "momentum_buffer of 0.weight" in str(error), error
    except CommError as error:
        assert c.rank != 0 and "rank 0 gave up: reduce_noise_step" in str(error), error
    else:
        raise AssertionError("no error")


def check_interruptions() -> None:
    """Ctrl-C on rank 0 between the collectives that make one of these, which its program survives: its next collective
    must not meet the rest of theirs."""
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    spans = spans_of(module, optimizer)
    rows, values = torch.tensor([3]), torch.ones(1, 3)
    dense = torch.zeros(3, dtype=torch.int64), torch.ones(3, 3)

    cases: tuple[tuple[str, str, int, Callable[[comm.Communicator, Any], object]], ...] = (
        ("sparse_all_reduce", "meet", 2, lambda c, _: c.sparse_all_reduce(rows, values, 50)),
        ("sparse_all_reduce", "all_reduce", 2, lambda c, _: c.sparse_all_reduce(*dense, 1)),
        ("reduce_noise_step", "meet", 1, step),
        ("reduce_noise_step", "meet", 2, step),
        ("shard", "segment", 2, lambda c, _: c.shard(optimizer, spans)),
        ("allgather_object", "all_gather", 2, lambda c, _: c.allgather_object(1)),
        ("bcast_object", "broadcast", 2, lambda c, _: c.bcast_object(1)),
        ("empty", "segment", 1, lambda c, _: c.empty(5)),
        ("all_reduce: costs", "barrier", 2, lambda c, _: c.explain(10)),
        ("optimizer.step()", "all_reduce", 1, lambda c, _: unfused_step(c)),
    )
    for name, part, number, call in cases:
        c = comm.init(timeout=30.0)
        sharded = c.shard(optimizer, spans)
        c._costs._holds = lambda _: False  # type: ignore[method-assign]  # measured anew
        if c.rank == 0:
            interrupt(c, part, number)
            with pytest.raises(KeyboardInterrupt):
                call(c, sharded)
            with pytest.raises(CommError, match=f"failed before: {re.escape(name)} on rank 0: KeyboardInterrupt"):
                c.barrier()
        else:
            with pytest.raises(CommError, match=f"rank 0 gave up: {re.escape(name)} on rank 0: KeyboardInterrupt"):
                call(c, sharded)


def interrupt(c: comm.Communicator, part: str, number: int) -> None:
    """The call of that number of one of its methods."""
    whole, calls = getattr(c, part), itertools.count(1)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    setattr(c, part, interrupted)


def unfused_step(c: comm.Communicator) -> None:
    module = nn.Linear(3, 2)
    data = TensorDataset(torch.ones(20, 3), torch.zeros(20, dtype=torch.int64))
    optimizer: torch.optim.Optimizer = torch.optim.RMSprop(module.parameters())
    all_reduce, c.all_reduce = c.all_reduce, functools.partial(comm.Communicator.all_reduce, c)  # type: ignore[method-assign]
    module, optimizer, loader = fastdp.PrivacyEngine(seed=1).make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=10),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        comm=c,
    )
    c.all_reduce = all_reduce  # type: ignore[method-assign]
    for x, y in loader:
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()


def check_handlers() -> None:
    """A signal handler that calls a collective of the same communicator between two of reduce_noise_step's, or of
    sparse_all_reduce's: an error on all ranks, and no sum of half of what should be in it."""
    rows, values = torch.tensor([3]), torch.ones(1, 3)
    for part, call in (
        ("step", step),
        ("_in_memory", lambda c, _: c.sparse_all_reduce(rows, values, 50)),
    ):
        c = comm.init(timeout=30.0)
        module = model()
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        sharded = c.shard(optimizer, spans_of(module, optimizer))
        if c.rank == 0:
            holder = sharded if part == "step" else c._sparse_sum
            whole = getattr(holder, part)
            setattr(holder, part, lambda *args, whole=whole, c=c: (c.barrier(), whole(*args)))
        with pytest.raises(CommError, match="ranks disagree: rank 0 called barrier"):
            call(c, sharded)


def check_ctrl_c_while_memory_is_made() -> None:
    """Of the result of an all_gather: it stays an interruption, to which programs have their own answer."""
    c, part = comm.init(timeout=30.0), torch.ones(3)

    def room(elements: int) -> torch.Tensor:
        if c.rank == 0:
            raise KeyboardInterrupt
        return torch.empty(elements)

    with pytest.raises(KeyboardInterrupt if c.rank == 0 else CommError) as caught:
        c.gather(part, -1, room)
    assert c.rank == 0 or "rank 0 gave up" in str(caught.value)


def check_a_communicator_that_is_dropped() -> None:
    c = comm.init(timeout=30.0)
    rank, handle = c.rank, c.all_reduce(torch.ones(5000), async_op=True)
    if rank == 0:
        del c, handle
        gc.collect()
    else:
        with pytest.raises(CommError, match="rank 0 gave up: the communicator was dropped with collectives under way"):
            handle.wait()


check_failure(comm.init(timeout=30.0))
check_ctrl_c_while_memory_is_made()
check_a_communicator_that_is_dropped()
check_interruptions()
check_handlers()
print(f"done: rank {MPI.COMM_WORLD.rank}", flush=True)
