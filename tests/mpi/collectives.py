"""All collectives on 1, 2, 3, 4, 7 and 8 ranks in one launch of 8: groups of COMM_WORLD work side by side."""

from __future__ import annotations

import hashlib

import torch
from mpi4py import MPI
from together import data, expected, rough

from fastdp import comm

GROUPS = ([8], [7, 1], [4, 4], [3, 3, 2])
COUNTS = (0, 1, 2, 10, 100, 1000, 10007)
LONG = 300_001  # several rounds through the slots of the team (csrc/comm/shared.h)
DTYPES = (torch.float32, torch.float64, torch.int64, torch.bfloat16)
# Segment bytes, and whether ranks share memory.
WAYS = ((8, False), (256, True), (comm.SEGMENT_BYTES, True))


def check_all_reduce(c: comm.Communicator, segment_bytes: int) -> None:
    algorithms = ["ring", "tree", "mpi"] + ["shared", "hierarchical", "auto"] * c.shares_memory
    for count in COUNTS:
        if count * 8 > 128 * segment_bytes:
            continue  # 8-byte segments of the longest tensor would only take long
        for dtype in DTYPES:
            want = expected(c.size, count, dtype)
            for algorithm in algorithms:
                x = data(c.rank, count, dtype)
                assert c.all_reduce(x, algorithm=algorithm) is x
                assert torch.equal(x, want), (c, segment_bytes, count, dtype, algorithm)
    x = data(c.rank, 60, torch.float32).reshape(3, 4, 5)
    assert torch.equal(c.all_reduce(x, "ring").flatten(), expected(c.size, 60, torch.float32))
    # A view that starts at an address that is no multiple of 8.
    x = data(c.rank, 101, torch.float32)
    c.all_reduce(x[1:], "tree")
    assert torch.equal(x[1:], expected(c.size, 101, torch.float32)[1:])


def check_window(c: comm.Communicator) -> None:
    """Tensors in the window, at the same place or at others, alone or with ordinary ones; in place and out of place."""
    for count in (*COUNTS, LONG):
        for dtype in DTYPES:
            want = expected(c.size, count, dtype)
            x, y = c.empty(count, dtype), c.empty(count + 1, dtype)
            assert not x.numel() or x.data_ptr() % 64 == 0
            assert x.untyped_storage().nbytes() == x.nbytes and not x.any()
            for into in (None, y[:count], y[1:], torch.empty(count, dtype=dtype)):
                x.copy_(data(c.rank, count, dtype))
                result = c.all_reduce(x, out=into)
                assert result is (x if into is None else into) and torch.equal(result, want), (c, count, dtype)
                assert into is None or torch.equal(x, data(c.rank, count, dtype))
            # One rank's lies elsewhere.
            z = torch.empty(count, dtype=dtype) if c.rank == c.size - 1 else y[c.rank % 2 : count + c.rank % 2]
            z.copy_(data(c.rank, count, dtype))
            assert torch.equal(c.all_reduce(z), want), (c, count, dtype)
            if count:
                z = x[1:].copy_(data(c.rank, count, dtype)[1:])
                assert torch.equal(c.all_reduce(z), want[1:]), (c, count, dtype)
    for x in (data(c.rank, LONG, torch.float32), data(c.rank, LONG, torch.bfloat16)):
        want = expected(c.size, LONG, x.dtype)
        assert torch.equal(c.all_reduce(x.clone()), want) and torch.equal(c.all_reduce(x, "hierarchical"), want)
    x = data(c.rank, LONG, torch.float32)
    mine = c.reduce_scatter(x)
    assert torch.equal(mine, expected(c.size, LONG, torch.float32).tensor_split(c.size)[c.rank])
    assert torch.equal(c.all_gather(mine), expected(c.size, LONG, torch.float32))
    assert torch.equal(c.broadcast(data(c.rank, LONG, torch.int64), c.size - 1), data(c.size - 1, LONG, torch.int64))


def check_handles(c: comm.Communicator, segment_bytes: int) -> None:
    """Several at once, asked about in any order, with blocking ones between; dropped ones are completed, too."""
    algorithms = ["ring", "tree", "mpi"] + ["shared", "hierarchical"] * c.shares_memory
    for count in (0, 10, 10007):
        if count * 8 > 128 * segment_bytes:
            continue
        want = expected(c.size, count, torch.float32)
        tensors = [data(c.rank, count, torch.float32) for _ in algorithms]
        handles = [c.all_reduce(x, a, async_op=True) for x, a in zip(tensors, algorithms, strict=True)]
        out = torch.empty(count)
        c.all_reduce(data(c.rank, count, torch.float32), out=out, async_op=True)
        x = data(c.rank, count, torch.float32)
        if c.rank % 2:  # some ask, some wait
            while not handles[-1].test():
                pass
            assert handles[0].test()
        else:
            assert handles[-1].wait() is tensors[-1]
        assert torch.equal(c.all_reduce(x), want) and torch.equal(out, want), (c, count)
        assert all(torch.equal(x, want) for x in tensors), (c, count)
        assert handles[1].wait() is tensors[1] and handles[1].test()


def check_sparse(c: comm.Communicator) -> None:
    """Against the dense sum: rows that several ranks have, or one has twice; ranks without any; all of the table;
    more than there is room for in the memory that ranks share."""
    for table, width, most in (
        (1, 1, 3),
        (50, 3, 10),
        (3_000_000, 32, 100),
        (40, 5, 200),
        (7, 0, 2),
        (10**6, 64, 6000),
    ):
        for dtype in (torch.float32, torch.float64):
            parts = []
            for rank in range(c.size):
                generator = torch.Generator().manual_seed(table + rank)
                count = rank * most // max(1, c.size - 1)  # rank 0 has none
                index = torch.randint(0, min(table, 2 * most), (count,), generator=generator) * (
                    table // (2 * most) or 1
                )
                parts.append((index % table, torch.randn(count, width, generator=generator, dtype=dtype)))
            rows = torch.cat([index for index, _ in parts])
            touched, place = torch.unique(rows, return_inverse=True)
            want = torch.zeros(len(touched), width, dtype=dtype)
            want.index_add_(0, place, torch.cat([values for _, values in parts]))
            index, sums = c.sparse_all_reduce(*parts[c.rank], table)
            assert torch.equal(index, touched), (c, table)
            torch.testing.assert_close(sums, want)
            assert len(set(c.allgather_object(sums.numpy().tobytes()))) == 1, (c, table)


def check_sparse_in_a_row(c: comm.Communicator) -> None:
    """No other collective between them: nobody's rows are written over while another still reads them."""

    def rows(rank: int, call: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * call + rank)
        return torch.randperm(5000, generator=generator)[:2000], torch.full((2000, 16), float(rank + 10 * call))

    calls = [rows(c.rank, call) for call in range(20)]
    results = [c.sparse_all_reduce(*call, 5000) for call in calls]
    for call, (index, sums) in enumerate(results):
        dense = torch.zeros(5000, 16)
        for rank in range(c.size):
            dense.index_add_(0, *rows(rank, call))
        assert torch.equal(dense[index], sums) and dense.double().sum() == sums.double().sum(), (c, call)


def check_freed(c: comm.Communicator) -> None:
    """Memory of `empty` that some ranks have freed, and others reduce."""
    for count in (100, 10_000, 300_000):
        kept = [c.empty(count), c.empty(count)]
        z = kept.pop(c.rank % 2).copy_(data(c.rank, count, torch.float32))
        del kept
        assert torch.equal(c.all_reduce(z), expected(c.size, count, torch.float32)), (c, count)


def shared_sum(size: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """In the order of ranks; bfloat16 in float32."""
    total = rough(0, count, dtype).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    for rank in range(1, size):
        total += rough(rank, count, dtype)
    return total.to(dtype)


def ring_sum(size: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The order of csrc/comm/ring.h: chunk k in the order k+1, k+2, ..., k (mod size)."""
    parts = [rough(rank, count, dtype) for rank in range(size)]
    total = torch.zeros(count, dtype=dtype)
    for chunk, index in enumerate(torch.arange(count).tensor_split(size)):
        total[index] = parts[(chunk + 1) % size][index]
        for step in range(2, size + 1):
            total[index] += parts[(chunk + step) % size][index]
    return total


def tree_sum(size: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The order of csrc/comm/tree.h: node + left subtree + right subtree; in the second tree, for the second half of
    4096 elements and more, every rank has the place of the next one in the first."""
    parts = [rough(rank, count, dtype) for rank in range(size)]
    half = (count + 1) // 2 if count >= 4096 else count

    def subtree(places: list[torch.Tensor]) -> torch.Tensor:
        top = 1
        while 2 * top <= len(places):
            top *= 2
        total = places[top - 1].clone()
        for below in (places[: top - 1], places[top:]):
            if below:
                total += subtree(below)
        return total

    def tree(places: list[torch.Tensor]) -> torch.Tensor:
        return places[0] + subtree(places[1:]) if size > 1 else places[0]

    return torch.cat([tree([p[:half] for p in parts]), tree([p[half:] for p in parts[-1:] + parts[:-1]])])


def check_order(c: comm.Communicator) -> None:
    for count in (1, 10, 1000, 4095, 4096, 4097, 10007):
        for dtype in (torch.float32, torch.float64):
            sums = {"ring": ring_sum(c.size, count, dtype), "tree": tree_sum(c.size, count, dtype)}
            if c.shares_memory:
                sums["shared"] = shared_sum(c.size, count, dtype)
            for algorithm, want in sums.items():
                results = [c.all_reduce(rough(c.rank, count, dtype), algorithm=algorithm) for _ in range(3)]
                digests = {hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in results}
                everywhere = set().union(*c.allgather_object(digests))
                assert len(everywhere) == 1, (c, count, dtype, algorithm)
                assert torch.equal(results[0], want), (c, count, dtype, algorithm)
            for algorithm in sorted(sums.keys() - {"tree"}):
                x = rough(c.rank, count, dtype)
                mine = c.reduce_scatter(x, algorithm)
                assert torch.equal(mine, sums[algorithm].tensor_split(c.size)[c.rank]), (c, count, dtype, algorithm)
                assert torch.equal(c.all_gather(mine, out=x), sums[algorithm]), (c, count, dtype, algorithm)
    if c.shares_memory:  # the way does not matter
        for count in (1, 10, 1000, 10007, LONG):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                x = c.empty(count, dtype).copy_(rough(c.rank, count, dtype))
                assert torch.equal(c.all_reduce(x), shared_sum(c.size, count, dtype)), (c, count, dtype)
                x = rough(c.rank, count, dtype)
                assert torch.equal(c.all_reduce(x), shared_sum(c.size, count, dtype)), (c, count, dtype)


def check_reduce_scatter(c: comm.Communicator, segment_bytes: int) -> None:
    for count in COUNTS:
        if count * 8 > 128 * segment_bytes:
            continue
        for dtype in DTYPES:
            x = data(c.rank, count, dtype)
            mine = c.reduce_scatter(x)
            assert torch.equal(mine, expected(c.size, count, dtype).tensor_split(c.size)[c.rank]), (c, count, dtype)
            assert mine.data_ptr() == x.tensor_split(c.size)[c.rank].data_ptr()  # in place
    x = data(c.rank, 60, torch.float32).reshape(3, 4, 5)
    assert torch.equal(c.reduce_scatter(x), expected(c.size, 60, torch.float32).tensor_split(c.size)[c.rank])


def check_all_gather(c: comm.Communicator, segment_bytes: int) -> None:
    # All alike; all different; one rank has nothing; one rank has everything; nothing at all.
    last = c.size - 1
    for numel in (
        lambda rank: 10,
        lambda rank: 1000 + 3 * rank,
        lambda rank: 0 if rank == 0 else 7,
        lambda rank: 501 if rank == last else 0,
        lambda rank: 0,
    ):
        counts = [numel(rank) for rank in range(c.size)]
        if sum(counts) * 8 > 128 * segment_bytes:
            continue
        for dtype in (torch.float32, torch.int64, torch.bfloat16, torch.uint8, torch.bool):
            parts = [data(rank, counts[rank], torch.float32).to(dtype) for rank in range(c.size)]
            mine, want = parts[c.rank].clone(), torch.cat(parts)
            result = c.all_gather(mine)
            assert result.dtype == dtype and torch.equal(result, want), (c, counts, dtype)
            assert torch.equal(mine, parts[c.rank])
            out = torch.zeros(sum(counts), dtype=dtype)
            # Some ranks bring their own memory, some do not; in one the part lies in it, at the wrong place.
            if c.rank == last:
                out[: counts[c.rank]] = mine
                mine = out[: counts[c.rank]]
            given = c.all_gather(mine, out=out if c.rank != 0 else None)
            assert torch.equal(given, want), (c, counts, dtype)
            assert c.rank == 0 or given is out
    part = torch.full((2, 3), c.rank)
    assert c.all_gather(part, out=torch.empty(c.size, 2, 3, dtype=torch.int64))[:, 1, 2].tolist() == list(range(c.size))


def check_library(c: comm.Communicator, mpi_comm: MPI.Intracomm) -> None:
    """algorithm="mpi" is MPI's own sum, whose order on 8 ranks is not the ring's."""
    mine = rough(c.rank, 1000, torch.float32)
    library = torch.empty_like(mine)
    mpi_comm.Iallreduce(mine.numpy(), library.numpy()).Wait()
    assert torch.equal(c.all_reduce(mine, algorithm="mpi"), library)
    assert c.size < 8 or not torch.equal(mine, ring_sum(c.size, 1000, torch.float32))


def check_broadcast(c: comm.Communicator, segment_bytes: int) -> None:
    for root in range(c.size):
        for count in (0, 1, 10, 1000):
            for dtype in (torch.float32, torch.int64, torch.bfloat16, torch.uint8, torch.bool):
                if count * dtype.itemsize > 128 * segment_bytes:
                    continue
                x = data(c.rank, count, torch.float32).to(dtype)
                assert c.broadcast(x, root=root) is x
                assert torch.equal(x, data(root, count, torch.float32).to(dtype)), (c, root, count, dtype)


def check_rest(c: comm.Communicator) -> None:
    assert (c.local_rank, c.local_size) == (c.rank, c.size)  # one host
    assert c.allgather_object({"rank": c.rank, "text": "x" * c.rank}) == [
        {"rank": r, "text": "x" * r} for r in range(c.size)
    ]
    for root in range(c.size):
        assert c.bcast_object(("from", c.rank) if c.rank == root else None, root) == ("from", root)
    c.barrier()
    x = torch.ones(3)
    before = x._version
    c.all_reduce(x)
    assert c.size == 1 or x._version > before
    with torch.inference_mode():
        assert c.all_reduce(torch.ones(3)).tolist() == [c.size] * 3
    parameter = torch.nn.Parameter(torch.full((3,), float(c.rank)))
    assert c.broadcast(parameter, root=c.size - 1).tolist() == [c.size - 1] * 3


def main() -> None:
    world = MPI.COMM_WORLD
    for sizes in GROUPS:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        group = max(i for i, start in enumerate(starts) if world.rank >= start)
        mpi_comm = world.Split(group)
        assert mpi_comm.size == sizes[group]
        for segment_bytes, shared_memory in WAYS:
            c = comm.init(
                mpi_comm,
                timeout=60,
                algorithm="auto" if shared_memory else "tree",  # measuring 1 MiB in messages of 8 bytes takes minutes
                segment_bytes=segment_bytes,
                shared_memory=shared_memory,
            )
            assert c.shares_memory == (shared_memory and c.size > 1)
            assert (c.rank, c.size) == (mpi_comm.rank, mpi_comm.size)
            check_all_reduce(c, segment_bytes)
            check_reduce_scatter(c, segment_bytes)
            check_all_gather(c, segment_bytes)
            check_broadcast(c, segment_bytes)
            check_handles(c, segment_bytes)
            if segment_bytes > 8:  # the order does not depend on it
                check_order(c)
        check_window(c)
        check_sparse(c)
        check_sparse_in_a_row(c)
        check_freed(c)
        check_library(c, mpi_comm)
        check_rest(c)
        if c.rank == 0:
            print(f"done: {c.size} ranks", flush=True)


main()
