"""Ranks of one machine that take each other for ranks of several hosts: shared memory within, messages between.

bench/hosts.py makes hosts that cannot reach each other's memory; here all shapes are tried.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mpi4py import MPI
from together import data, expected, rough
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdp
from fastdp import comm, hosts, ops
from fastdp.clipping import spans_of

# How many ranks each host has, of 8: alike, unlike, one alone.
SHAPES = ([4, 4], [2, 2, 2, 2], [1, 3, 4], [1] * 8)
COUNTS = (0, 1, 7, 1000, 300_001)


def host_of(rank: int, shape: list[int]) -> int:
    return next(host for host in range(len(shape)) if rank < sum(shape[: host + 1]))


def check_sums(c: comm.Communicator) -> None:
    for count in COUNTS:
        for dtype in (torch.float32, torch.float64, torch.int64, torch.bfloat16):
            want = expected(c.size, count, dtype)
            for algorithm in ("hierarchical", "auto", "ring", "tree"):
                x = c.empty(count, dtype).copy_(data(c.rank, count, dtype))
                assert torch.equal(c.all_reduce(x, algorithm), want), (c.host, count, dtype, algorithm)
            x = data(c.rank, count, dtype)
            handle = c.all_reduce(x, "hierarchical", async_op=True)
            assert torch.equal(handle.wait(), want)
        x = rough(c.rank, count, torch.float32)
        results = c.allgather_object(c.all_reduce(x, "hierarchical").numpy().tobytes())
        again = c.all_reduce(rough(c.rank, count, torch.float32), "hierarchical").numpy().tobytes()
        assert {*results} == {again}, (c.host, count)  # the same bits on all ranks, and every time
        x = data(c.rank, count, torch.float32)
        assert torch.equal(c.all_gather(c.reduce_scatter(x), out=x), expected(c.size, count, torch.float32))
        root = c.size - 1
        assert torch.equal(c.broadcast(data(c.rank, count, torch.int64), root), data(root, count, torch.int64))


def check_step(c: comm.Communicator) -> None:
    """The noise once, with the bits that it has on one rank; the sum over all hosts."""
    module = nn.Linear(100, 37, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    nn.init.zeros_(module.weight)
    sharded = c.shard(optimizer, spans_of(module, optimizer))
    key = torch.arange(32, dtype=torch.uint8)
    for step in range(2):  # zeros, and what all ranks share out
        sharded.flat.copy_(data(c.rank, 3700, torch.float32) * step)
        with torch.no_grad():
            module.weight.zero_()
        c.reduce_noise_step(sharded, noise_std=2.0, batch_size=1, key=key, step=step)
        want = expected(c.size, 3700, torch.float32) * step
        ops.gaussian_noise_(want, 2.0, key=key, step=step)
        assert torch.equal(-module.weight.detach().flatten(), want), (c.host, step)


def check_wishes(c: comm.Communicator) -> None:
    for rank in range(c.size):
        c.wish(c.rank == rank)
        c.all_reduce(torch.zeros(3))
        assert c.wished
        c.wish(False)
        c.all_reduce(torch.zeros(3), "hierarchical")
        assert not c.wished


class Words(nn.Module):
    """Two tables, with something dense before, between and after."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(24, 2)
        self.one = nn.Embedding(1000, 4)
        self.norm = nn.LayerNorm(4)
        self.two = nn.Embedding(900, 4)
        self.scale = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.norm(self.one(x)), self.scale(self.two(x))], dim=-1).flatten(1))


def trained(c: comm.Communicator, optimizer: type[torch.optim.Optimizer]) -> tuple[list[torch.Tensor], list[int]]:
    """Parameters after some steps with tables of embeddings, of which a batch uses few rows; and elements summed."""
    torch.manual_seed(5)
    words, labels = torch.randint(0, 300, (40, 3)) * 3, torch.randint(0, 2, (40,))
    model = Words()
    summed: list[int] = []
    plain = c.all_reduce

    def counted(x: torch.Tensor, *how: object) -> torch.Tensor:
        summed.append(x.numel())
        return plain(x, *how)

    c.all_reduce = counted  # type: ignore[assignment]
    engine = fastdp.PrivacyEngine(seed=3)
    _, private, loader = engine.make_private(
        module=model,
        optimizer=optimizer(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(words, labels), batch_size=10),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        max_physical_batch_size=3,  # a table's rows come in several pieces
        comm=c,
    )
    for x, y in loader:
        private.zero_grad()
        F.cross_entropy(model(x), y).backward()
        private.step()
    c.all_reduce = plain  # type: ignore[method-assign]
    return [p.detach().clone() for p in model.parameters()], summed


def check_tables(c: comm.Communicator, alone: comm.Communicator) -> None:
    for optimizer in (torch.optim.SGD, torch.optim.Adagrad):  # in one pass, and not
        theirs, _ = trained(alone, optimizer)
        ours, summed = trained(c, optimizer)
        assert summed and max(summed) < 1000, summed  # never the table
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def main() -> None:
    alone = comm.init(MPI.COMM_SELF)
    for shape in SHAPES:
        host = host_of(MPI.COMM_WORLD.rank, shape)
        hosts.name = lambda host=host: (f"host{host}", "", "")  # type: ignore[misc]
        c = comm.init(timeout=60)
        assert c.shares_memory and c.hosts == len(shape)
        assert (c.local_rank, c.local_size) == (c.rank - sum(shape[:host]), shape[host])
        check_sums(c)
        check_step(c)
        check_wishes(c)
        check_tables(c, alone)
        assert "hierarchical" in c.explain(1 << 20) or shape == [1] * 8
        if c.rank == 0:
            print(f"done: {shape}", flush=True)


main()
