"""What a program may do to tensors and communicators without harm, or with an error that names it."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import resource
import signal
import time
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdp
from fastdp import ArgumentError, CommError, _mpi
from fastdp.clipping import spans_of
from fastdp.sharded import is_possible


def a_signal_handler_calls_a_collective(c: fastdp.comm.Communicator, other: fastdp.comm.Communicator) -> None:
    """While one waits: of the same communicator an error, of another it is done."""
    sums = []

    def handler(*_: object) -> None:
        with pytest.raises(CommError, match="in use by another thread or by the caller of this signal handler"):
            c.all_reduce(torch.ones(3))
        sums.append(other.all_reduce(torch.ones(3))[0].item())

    if c.rank == 0:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    else:
        time.sleep(0.6)
        sums.append(other.all_reduce(torch.ones(3))[0].item())
    assert c.all_reduce(torch.ones(10))[0] == c.size and sums == [c.size]


def numbers_of_shared_memory_are_used_again(c: fastdp.comm.Communicator) -> None:
    kept = c.empty(100).fill_(5)
    for _ in range(20):
        x = c.empty(100).fill_(1)
        assert c.all_reduce(x)[0] == c.size
    native = c._native
    assert native is not None and max(native.segments()) < 4 and kept[0] == 5


def memory_that_is_shared_no_more(c: fastdp.comm.Communicator) -> None:
    """At the place of a tensor that is gone: not taken for it. And each rank has freed another of two tensors."""
    x = c.empty(1 << 18)
    address, nbytes = x.data_ptr(), x.nbytes
    del x
    fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
    library = ctypes.CDLL(None)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    assert library.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, fixed, -1, 0) == address
    x = torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.float32).fill_(1)
    assert (c.all_reduce(x) == c.size).all()
    two, there = [c.empty(5000), c.empty(5000)], c.empty(5000)
    mine = two.pop(c.rank % 2)
    two.clear()
    for x, out in ((mine, there), (there, mine)):
        assert (c.all_reduce(x.fill_(1), out=out) == c.size).all()


def more_memory_than_there_is(c: fastdp.comm.Communicator) -> None:
    with pytest.raises(CommError, match=r"shared memory: \d+ bytes for this host's ranks: \d+ are available"):
        c.empty(1 << 40)
    assert c.all_reduce(c.empty(3).fill_(1))[0] == c.size


def memory_is_replaced_under_way(c: fastdp.comm.Communicator) -> None:
    for algorithm in ("shared", "ring"):
        x = torch.ones(1_000_003)
        handle = c.all_reduce(x, algorithm, async_op=True)
        x.data = torch.zeros(3)
        y = torch.full((1_000_003,), 7.0)  # where x was, if that had been let go
        handle.wait()
        assert y.unique().tolist() == [7.0]


class NotDetached(torch.Tensor):
    def detach(self) -> torch.Tensor:
        raise KeyboardInterrupt


def what_a_collective_needs_is_kept_as_long_as_it_is_needed(c: fastdp.comm.Communicator) -> None:
    x = torch.ones(1000).as_subclass(NotDetached)
    with pytest.raises(KeyboardInterrupt):
        c.all_reduce(x, async_op=True)
    assert c.all_reduce(torch.ones(3))[0] == c.size and x.mean() == 1  # it was not started
    for algorithm in ("shared", "ring"):
        x = torch.ones(1_000_003)
        version, kept = x._version, weakref.ref(x)
        c.all_reduce(x, algorithm, async_op=True)
        assert x._version == version
        assert c.all_reduce(torch.ones(3))[0] == c.size  # moves what was started before it
        assert x[-1] == c.size and x._version == version + 1
        del x
        gc.collect()
        assert kept() is None


def versions_tell_what_was_written(c: fastdp.comm.Communicator) -> None:
    """To autograd: in place or not, at once or by a handle, whoever asks."""
    x, out = torch.ones(1000), torch.zeros(1000)
    for ask in ("wait", "test"):
        for algorithm in ("shared", "ring"):
            versions = x._version, out._version
            handle = c.all_reduce(x, algorithm, out=out, async_op=True)
            while getattr(handle, ask)() is False:
                pass
            assert (x._version, out._version) == (versions[0], versions[1] + 1)
    for call in (
        lambda: c.all_reduce(x),
        lambda: c.all_reduce(x, "ring"),
        lambda: c.reduce_scatter(x),
        lambda: c.broadcast(x),
        lambda: c.all_gather(x[:0] if c.rank else x.clone(), out=x),
    ):
        version = x._version
        call()
        assert x._version == version + 1
    data, kept = torch.ones(1_000_003), torch.zeros(1_000_003)
    handle = c.all_reduce(data, "ring", out=kept, async_op=True)
    del data, kept
    filled = [torch.full((1_000_003,), 7.0) for _ in range(3)]  # where they were, if they had been let go
    assert (handle.wait() == c.size).all() and all((x == 7).all() for x in filled)


def a_communicator_is_dropped(c: fastdp.comm.Communicator) -> None:
    all_reduce = fastdp.comm.init(timeout=20).all_reduce
    gc.collect()
    assert all_reduce(torch.ones(3))[0] == c.size
    with pytest.raises(CommError, match="all_reduce: its communicator was dropped"):
        all_reduce(torch.ones(3), "ring")


def arguments_of_other_types(c: fastdp.comm.Communicator) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1).bfloat16())
    mixed = torch.optim.SGD(module.parameters(), lr=1.0)
    spans = spans_of(module, mixed)
    assert is_possible(c, mixed, spans[:2]) and not is_possible(c, mixed, spans)
    assert c.empty(np.int64(3)).shape == (3,)
    for call, name in (
        (lambda: c.empty(True), "numel"),
        (lambda: c.explain(True), "nbytes"),
        (lambda: c.wish("x"), "value"),
        (lambda: c.broadcast(torch.ones(3), True), "root"),
        (lambda: c.shard(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=1.0), []), "spans"),
        (lambda: c.shard(mixed, spans), "spans: dtypes"),
    ):
        with pytest.raises(ArgumentError, match=f"^{name}="):
            call()
    with pytest.raises(CommError, match=r"shared_memory=True on ranks \[0\], False on \[1"):
        fastdp.comm.init(timeout=20, shared_memory=c.rank == 0)


def tensors_without_memory(c: fastdp.comm.Communicator) -> None:
    x = torch.ones(2000)
    x.untyped_storage().resize_(0)
    for algorithm in (None, "ring"):
        with pytest.raises(ArgumentError, match=r"x.untyped_storage\(\).nbytes\(\)=0: must be enough for 2000"):
            c.all_reduce(x, algorithm)
    with pytest.raises(ArgumentError, match=r"x.is_neg\(\)=True: must be False"):
        c.broadcast(torch._neg_view(torch.ones(3)))
    negated = torch.ones(1, dtype=torch.complex64).conj().imag
    assert negated.is_neg() and negated.is_contiguous()
    with pytest.raises(ArgumentError, match=r"x.is_neg\(\)=True: must be False"):
        c.all_reduce(negated)
    values, row = torch.ones(1, 3), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ArgumentError, match=r"values.is_neg\(\)=True: must be False"):
        c.sparse_all_reduce(row, torch._neg_view(values), 5)
    values.untyped_storage().resize_(0)
    with pytest.raises(ArgumentError, match=r"values.untyped_storage\(\).nbytes\(\)=0"):
        c.sparse_all_reduce(row, values, 5)


def no_file_descriptors_are_left(c: fastdp.comm.Communicator) -> None:
    """A rank that is late is not taken for dead."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    c.barrier()
    if c.rank == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        with pytest.raises(OSError) as caught:
            os.open("/", os.O_RDONLY)
        assert caught.value.errno == errno.EMFILE
    else:
        time.sleep(0.5)
    assert c.all_reduce(torch.ones(3))[0] == c.size
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def frozen_parameters_and_buffers_start_as_rank_0s(c: fastdp.comm.Communicator) -> None:
    torch.manual_seed(c.rank)
    module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    module[0].requires_grad_(False)
    module.register_buffer("offset", torch.randn(()))
    data = TensorDataset(torch.ones(50, 5), torch.zeros(50, dtype=torch.int64))
    fastdp.PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module[1].parameters(), lr=0.5),
        data_loader=DataLoader(data, batch_size=10),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        comm=c,
    )
    states = c.allgather_object({name: x.tolist() for name, x in module.state_dict().items()})
    assert len(states[0]) == 5 and all(state == states[0] for state in states)


assert _mpi.max_segments == 1 << 16
c = fastdp.comm.init(timeout=20)
a_signal_handler_calls_a_collective(c, fastdp.comm.init(timeout=20))
for check in (
    numbers_of_shared_memory_are_used_again,
    memory_that_is_shared_no_more,
    more_memory_than_there_is,
    memory_is_replaced_under_way,
    what_a_collective_needs_is_kept_as_long_as_it_is_needed,
    versions_tell_what_was_written,
    a_communicator_is_dropped,
    arguments_of_other_types,
    tensors_without_memory,
    no_file_descriptors_are_left,
    frozen_parameters_and_buffers_start_as_rank_0s,
):
    check(c)
print(f"done: rank {c.rank}", flush=True)
