"""One rank, with or without mpirun: arguments are checked, data stays as it is, only init loads MPI."""

from __future__ import annotations

import sys

import pytest
import torch

from fastdp import comm
from fastdp.errors import ArgumentError

assert "mpi4py.MPI" not in sys.modules and "fastdp._mpi" not in sys.modules

for keywords, text in (
    ({"timeout": 0}, "timeout=0: must be a number of seconds > 0, at most 1e+09"),
    ({"timeout": float("inf")}, "timeout=inf: must be a number of seconds > 0"),
    ({"timeout": "60"}, "timeout='60': must be a number of seconds > 0"),
    ({"segment_bytes": 12}, "segment_bytes=12: must be a multiple of 8 in [8, 1073741824]"),
    ({"segment_bytes": 1 << 31}, "segment_bytes=2147483648: must be"),
    ({"mpi_comm": "world"}, "mpi_comm='world': must be an mpi4py intracommunicator"),
):
    with pytest.raises(ArgumentError) as caught:
        comm.init(**keywords)  # type: ignore[arg-type]
    assert str(caught.value).startswith(text), caught.value

c = comm.init()
assert (c.rank, c.size, c.local_rank, c.local_size, c.timeout) == (0, 1, 0, 1, 60.0)
x = torch.arange(12, dtype=torch.float32)
assert c.all_reduce(x) is x and c.broadcast(x) is x
assert torch.equal(x, torch.arange(12, dtype=torch.float32))
assert c.bcast_object({"a": 1}) == {"a": 1} and c.allgather_object(7) == [7]
assert torch.equal(c.reduce_scatter(x.reshape(3, 4)), x) and torch.equal(c.all_gather(x.reshape(3, 4)), x)
assert torch.equal(c.all_gather(x, out=torch.empty(3, 4)), x.reshape(3, 4))
assert torch.equal(c.all_reduce(x, out=torch.empty(12)), x) and c.all_reduce(x, async_op=True).wait() is x
assert c.empty(3).tolist() == [0, 0, 0] and "nothing to do" in c.explain(10)
ids = torch.tensor([0, 1])
index, sums = c.sparse_all_reduce(torch.tensor([5, 2, 5]), torch.tensor([[1.0], [2.0], [4.0]]), 9)
assert (index.tolist(), sums.tolist()) == ([2, 5], [[2.0], [5.0]])
c.wish(True)
assert c.wished
c.barrier()

for call, text in (
    (
        lambda: c.all_reduce(x, algorithm="star"),
        "algorithm='star': must be one of auto, ring, tree, shared, hierarchical, mpi",
    ),
    (
        lambda: c.all_reduce(x.half()),
        "x.dtype=torch.float16: must be one of torch.float32, torch.float64, torch.int64, torch.bfloat16",
    ),
    (lambda: c.all_reduce(x.to(torch.complex64)), "x.dtype=torch.complex64: must be one of"),
    (lambda: c.broadcast(x.to(torch.complex64)), "x.dtype=torch.complex64: must be one of"),
    (lambda: c.all_reduce(x[::2]), "x.stride()=(2,): must be that of a contiguous tensor of shape (6,)"),
    (lambda: c.all_reduce(x.reshape(3, 4).T), "x.stride()=(1, 4): must be that of a contiguous tensor"),
    (lambda: c.all_reduce(x.to("meta")), "x.device='meta': must be cpu"),
    (lambda: c.all_reduce(x.to_sparse()), "x.layout=torch.sparse_coo: must be torch.strided"),
    (lambda: c.all_reduce([1.0]), "x='list': must be a torch.Tensor"),
    (
        lambda: c.reduce_scatter(x.half()),
        "x.dtype=torch.float16: must be one of torch.float32, torch.float64, torch.int64, torch.bfloat16",
    ),
    (lambda: c.reduce_scatter(x[::2]), "x.stride()=(2,): must be that of a contiguous tensor of shape (6,)"),
    (lambda: c.all_gather(x.to(torch.complex64)), "part.dtype=torch.complex64: must be one of"),
    (lambda: c.all_gather(x[::2]), "part.stride()=(2,): must be that of a contiguous tensor"),
    (lambda: c.all_gather(x, out=x.double()), "out.dtype=torch.float64: must be that of part, torch.float32"),
    (lambda: c.all_gather(x, out=torch.zeros(24)[::2]), "out.stride()=(2,): must be that of a contiguous tensor"),
    (lambda: c.all_gather(x, out=torch.zeros(11)), "out.numel()=11: must be 12"),
    (lambda: c.sparse_all_reduce(x, x, 3), "indices.dtype=torch.float32: must be torch.int64"),
    (
        lambda: c.sparse_all_reduce(ids, x.view(2, 6).half(), 3),
        "values.dtype=torch.float16: must be one of torch.float32,",
    ),
    (lambda: c.sparse_all_reduce(ids, x.view(3, 4), 3), "values.shape=[3, 4]: must be [2, width]"),
    (lambda: c.sparse_all_reduce(ids, x.view(2, 6), 1), "indices[1]=1: must be a row in [0, 1)"),
    (lambda: c.sparse_all_reduce(-ids, x.view(2, 6), 3), "indices[1]=-1: must be a row in [0, 3)"),
    (lambda: c.empty(-1), "numel=-1: must be an int >= 0"),
    (lambda: c.empty(3, torch.complex64), "dtype=torch.complex64: must be one of"),
    (lambda: c.all_reduce(x, out=x[:6]), "out.numel()=6: must be 12, that of x"),
    (lambda: c.all_reduce(x, out=x.double()), "out.dtype=torch.float64: must be that of x, torch.float32"),
    (lambda: c.all_reduce(x[:8], out=x[2:10]), "out='overlaps x': must be x itself, or apart from it"),
    (lambda: c.explain(-1), "nbytes=-1: must be an int >= 0"),
    (lambda: c.broadcast(x, root=1), "root=1: must be a rank in [0, 0]"),
    (lambda: c.bcast_object(x, root=-1), "root=-1: must be a rank in [0, 0]"),
):
    with pytest.raises(ArgumentError) as caught:
        call()
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value), caught.value
print("done: alone", flush=True)
