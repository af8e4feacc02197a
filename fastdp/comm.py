"""Collectives between the ranks of an MPI job, our own on MPI point-to-point: sums by a ring or two trees.

    comm = fastdp.comm.init()           # under mpirun; alone it has size 1
    comm.all_reduce(gradient)           # in place; bitwise the same on all ranks and from run to run

Importing this module neither loads nor initialises MPI; `init` does. No call hangs: ranks that disagree, stall
or die give a CommError on every rank that still runs, within `timeout` seconds without progress. Afterwards the
communicator is unusable, and so are the contents of the tensor passed to the call that failed.
"""

from __future__ import annotations

import atexit
import math
import os
import pickle
import platform
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from fastdp.errors import ArgumentError, require
from fastdp.launch import load_mpi

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi4py import MPI

    from fastdp import _mpi

# Two receive buffers and the piece of the tensor they are added to stay in a second-level cache of 1 MiB.
SEGMENT_BYTES = 256 * 1024
# Below it "auto" takes the tree: on 2 ranks 5 to 17 % faster than the ring at 4 KiB, undecided from 16 KiB, 17 % slower
# at 1 MiB (csrc/comm/tree.h). For more ranks only its steps speak for it: 2 log2 P instead of 2(P-1).
TREE_BELOW_BYTES = 16 * 1024
MAX_SEGMENT_BYTES = 1 << 30  # MPI counts are ints

# What late peers may still read or write after a failure: kept until the process ends, on purpose.
_kept_for_late_peers: list[object] = []


def init(
    mpi_comm: MPI.Intracomm | None = None,
    timeout: float = 60.0,
    *,
    algorithm: str = "auto",
    segment_bytes: int = SEGMENT_BYTES,
) -> Communicator:
    """A communicator over the ranks of `mpi_comm` (mpi4py; None: COMM_WORLD). All of its ranks call this, once and not
    in a loop: each is a duplicate that stays, and MPI has about 2,000 of them.

    timeout: seconds that a rank waits with nothing arriving before it raises CommError.
    algorithm: what all_reduce does when it is not told: "ring", "tree", "mpi" or "auto".
    segment_bytes: largest message; the same on all ranks.
    Raises CommError when MPI cannot be loaded, or when mpi4py, the launcher and this package disagree about
    which MPI they are.
    """
    require(
        isinstance(timeout, (int, float)) and math.isfinite(timeout) and timeout > 0,
        "timeout",
        timeout,
        "a finite number of seconds > 0",
    )
    require(
        isinstance(segment_bytes, int) and 8 <= segment_bytes <= MAX_SEGMENT_BYTES and segment_bytes % 8 == 0,
        "segment_bytes",
        segment_bytes,
        f"a multiple of 8 in [8, {MAX_SEGMENT_BYTES}]",
    )
    mpi = load_mpi(alone=mpi_comm is not None and getattr(mpi_comm, "size", 0) == 1)
    if mpi_comm is None:
        mpi_comm = mpi.COMM_WORLD
    require(
        isinstance(mpi_comm, mpi.Intracomm) and mpi_comm != mpi.COMM_NULL,
        "mpi_comm",
        mpi_comm,
        "an mpi4py intracommunicator other than COMM_NULL",
    )
    return Communicator(mpi_comm, timeout, algorithm, segment_bytes)


class Communicator:
    """Ranks that call the same collectives in the same order, from one thread at a time. Made by `init`.

    rank, size: among all ranks. local_rank, local_size: among those on this host.
    Collectives raise ArgumentError on the rank whose argument is bad, before anything is sent.
    """

    def __init__(self, mpi_comm: MPI.Intracomm, timeout: float, algorithm: str, segment_bytes: int) -> None:
        from fastdp import _mpi

        self.timeout = timeout
        self.rank = mpi_comm.Get_rank()
        self.size = mpi_comm.Get_size()
        self._mpi_comm = mpi_comm
        self._algorithms = {name: code for code, name in enumerate(_mpi.algorithms)}
        self.algorithm = self._known(algorithm)
        self._codes = {getattr(torch, name): code for code, name in enumerate(_mpi.dtypes)}
        self._summable = {dtype: self._codes[dtype] for dtype in (getattr(torch, n) for n in _mpi.summable_dtypes)}
        self._native: _mpi.Communicator | None = None
        if self.size > 1:
            try:
                self._native = _mpi.Communicator(mpi_comm.py2f(), timeout, segment_bytes)
            except BaseException:
                _kept_for_late_peers.append(mpi_comm)
                raise
        hosts, cores = zip(*self.allgather_object((_host(), _cores())), strict=True)
        self.local_rank = hosts[: self.rank].count(hosts[self.rank])
        self.local_size = hosts.count(hosts[self.rank])
        # The union: a launcher may have bound each rank to cores of its own.
        local_cores = set().union(*(c for c, host in zip(cores, hosts, strict=True) if host == hosts[self.rank]))
        if self._native is not None and len(local_cores) < self.local_size:
            self._native.share_cores()

    def __repr__(self) -> str:
        return f"<fastdp.comm.Communicator: rank {self.rank} of {self.size}, timeout {self.timeout} s>"

    def all_reduce(self, x: torch.Tensor, algorithm: str | None = None) -> torch.Tensor:
        """Sum `x` (contiguous, on the CPU; float32, float64 or int64) over the ranks, in place; returns x.

        algorithm: "ring" or "tree" (the order of summation depends on numel and size only, and differs between
        them), "mpi" (MPI_Iallreduce; the order is the library's choice), or "auto": ring or tree, by numel, dtype
        and size alone. None is what `init` was given.
        """
        name = self._known(self.algorithm if algorithm is None else algorithm)
        code = _dtype_code(x, self._summable)
        if self._native is not None:
            if name == "auto":
                name = "tree" if x.numel() * x.itemsize < TREE_BELOW_BYTES else "ring"
            self._in_place(self._native.all_reduce, x, code, self._algorithms[name])
        return x

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the ranks and return this rank's slice of the sum, [numel / size]: a view of x, 1-d.

        x: contiguous, on the CPU; float32, float64 or int64, of the same numel on all ranks. Its slices, flattened, are
        those of `torch.tensor_split`: the first numel % size ranks get one element more. In place: what is outside
        the slice holds partial sums afterwards, and `all_gather(slice, out=x)` makes x whole again without a copy.
        Guarantee: bitwise the slice of `all_reduce(x, algorithm="ring")`.
        Raises CommError on every rank when ranks differ in numel, dtype or operation.
        """
        code = _dtype_code(x, self._summable)
        if self._native is not None:
            self._in_place(self._native.reduce_scatter, x, code)
        part, rest = divmod(x.numel(), self.size)
        begin = self.rank * part + min(self.rank, rest)
        return x.detach().view(-1)[begin : begin + part + (self.rank < rest)]

    def all_gather(self, part: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """All ranks' `part`s, flattened, one after the other in order of rank, on every rank.

        part: contiguous, on the CPU, of a dtype that all ranks share; numel may differ between ranks and be 0.
        out: contiguous, of part's dtype and as many elements as all parts together, of any shape; returned. `part`
        may lie in it. None: a new 1-d tensor. Some ranks may give one and others not.
        Raises CommError on every rank when ranks differ in dtype or operation, or an `out` has another numel.
        """
        code = _dtype_code(part, self._codes, "part")
        if out is not None:
            _dtype_code(out, self._codes, "out")
            require(out.dtype == part.dtype, "out.dtype", out.dtype, f"that of part, {part.dtype}")
        if self._native is None:
            total = part.numel()
            out = torch.empty_like(part).view(-1) if out is None else out
            require(out.numel() == total, "out.numel()", out.numel(), f"{total}, that of all parts together")
            out.detach().view(-1).copy_(part.detach().view(-1))
            return out
        kept = [part] if out is None else [part, out]

        def result(numel: int) -> int:
            if out is None:
                kept.append(torch.empty(numel, dtype=part.dtype))
            return kept[-1].data_ptr()

        numel = -1 if out is None else out.numel()
        self._keeping(kept, self._native.all_gather, part.data_ptr(), part.numel(), code, numel, result)
        torch.autograd.graph.increment_version(kept[-1])
        return kept[-1]

    def _known(self, algorithm: str) -> str:
        if algorithm != "auto" and algorithm not in self._algorithms:
            raise ArgumentError("algorithm", algorithm, f"one of {', '.join(('auto', *self._algorithms))}")
        return algorithm

    def broadcast(self, x: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Copy `x` (contiguous, on the CPU) from rank `root` to the others, in place; returns x."""
        self._check_root(root)
        code = _dtype_code(x, self._codes)
        if self._native is not None:
            self._in_place(self._native.broadcast, x, code, root)
        return x

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        if self._native is not None:
            self._keeping(None, self._native.barrier)

    def bcast_object(self, obj: Any, root: int = 0) -> Any:
        """What `root` passed, on every rank. By pickle: ranks trust each other. Not for inner loops."""
        self._check_root(root)
        if self.size == 1:
            return obj
        data = bytearray(pickle.dumps(obj)) if self.rank == root else bytearray()
        numel = int(self.broadcast(torch.tensor([len(data)]), root))
        data.extend(bytes(numel - len(data)))
        self.broadcast(torch.frombuffer(data, dtype=torch.uint8), root)
        return obj if self.rank == root else pickle.loads(data)

    def allgather_object(self, obj: Any) -> list[Any]:
        """What each rank passed, in order of rank, on every rank."""
        return [self.bcast_object(obj, root) for root in range(self.size)]

    def abort(self, code: int = 1) -> NoReturn:
        """End all ranks at once with exit status `code`; does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(0.5)  # MPICH's launcher drops what it has not relayed yet when a rank aborts
        self._mpi_comm.Abort(code)
        os._exit(code)  # MPICH's Abort may return while the launcher is still at work, and the caller would go on

    def _in_place(self, collective: Callable[..., None], x: torch.Tensor, *codes: int) -> None:
        self._keeping(x, collective, x.data_ptr(), x.numel(), *codes)
        torch.autograd.graph.increment_version(x)  # or autograd would use a saved tensor that has changed

    def _keeping(self, memory: object, collective: Callable[..., None], *arguments: Any) -> None:
        try:
            collective(*arguments)
        except BaseException:
            native = self._native
            if native is not None and native.failure and native.pending and self not in _kept_for_late_peers:
                _kept_for_late_peers.extend((self, memory))
            raise

    def _check_root(self, root: int) -> None:
        require(isinstance(root, int) and 0 <= root < self.size, "root", root, f"a rank in [0, {self.size - 1}]")


def _dtype_code(x: torch.Tensor, codes: dict[torch.dtype, int], name: str = "x") -> int:
    # One expression for the good case: this is on the path of every collective.
    if isinstance(x, torch.Tensor) and x.is_cpu and x.layout is torch.strided and x.is_contiguous():
        code = codes.get(x.dtype)
        if code is not None:
            return code
    require(isinstance(x, torch.Tensor), name, type(x).__name__, "a torch.Tensor")
    require(x.dtype in codes, f"{name}.dtype", x.dtype, f"one of {', '.join(map(str, codes))}")
    require(x.is_cpu, f"{name}.device", str(x.device), "cpu")
    require(x.layout is torch.strided, f"{name}.layout", x.layout, "torch.strided")
    raise ArgumentError(f"{name}.stride()", x.stride(), f"that of a contiguous tensor of shape {tuple(x.shape)}")


def _host() -> tuple[str, str]:
    """Names the machine. Containers with names of their own count as hosts: they need not share memory."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
    except OSError:  # not Linux
        boot_id = ""
    return platform.node(), boot_id


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


@atexit.register
def _end_unfinished() -> None:
    """MPI_Finalize waits for peers, who may not come after a collective that never ended: end the job.

    The second of sleep is for peers that entered that collective a little later: they too shall report it.
    """
    if not _kept_for_late_peers:
        return
    from mpi4py import MPI

    if not MPI.Is_finalized():
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(1.0)
        MPI.COMM_WORLD.Abort(1)
