"""Collectives between the ranks of an MPI job: within a host by loads and stores in memory that its ranks share,
between hosts by a ring or two trees on MPI point-to-point.

    comm = fastdp.comm.init()           # under mpirun; alone it has size 1
    gradient = comm.empty(1_000_000)    # where the other ranks of this host reach it: the fastest to sum
    comm.all_reduce(gradient)           # in place; bitwise the same on all ranks and from run to run

Importing this module neither loads nor initialises MPI; `init` does. No call hangs: ranks that disagree, stall
or die give a CommError on every rank that still runs, within `timeout` seconds without progress. Afterwards the
communicator is unusable, and so are the contents of the tensor passed to the call that failed.
"""

from __future__ import annotations

import contextlib
import numbers
import os
import pickle
import sys
import time
import warnings
import weakref
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from fastdp import costs, hosts, native, sparse, window
from fastdp.errors import ArgumentError, CommError, require
from fastdp.launch import load_mpi
from fastdp.underway import Handle, in_use, kept_for_late_peers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mpi4py import MPI

    from fastdp import _mpi
    from fastdp.clipping import Span
    from fastdp.sharded import Sharded

# Two receive buffers and the piece of the tensor they are added to stay in a second-level cache of 1 MiB.
SEGMENT_BYTES = 256 * 1024
MAX_SEGMENT_BYTES = 1 << 30  # MPI counts are ints
MAX_TIMEOUT = 1e9
MAX_BYTES = 1 << 46  # what processes can address


def init(
    mpi_comm: MPI.Intracomm | None = None,
    timeout: float = 60.0,
    *,
    algorithm: str = "auto",
    segment_bytes: int = SEGMENT_BYTES,
    shared_memory: bool = True,
) -> Communicator:
    """A communicator over the ranks of `mpi_comm` (mpi4py; None: COMM_WORLD). All of its ranks call this, once and not
    in a loop: each is a duplicate that stays, and MPI has about 2,000 of them.

    timeout: seconds that a rank waits with nothing arriving before it raises CommError.
    algorithm: what all_reduce does when it is not told: see there. "nccl" is "auto", but that the engine sums gradients
        of models on GPUs by torch.distributed's NCCL instead of by way of the CPU's memory.
    segment_bytes: largest message; the same on all ranks.
    shared_memory: whether the ranks of a host meet in memory; if not, or if the system refuses (a warning says so),
        they send messages, too.
    Raises CommError when MPI cannot be loaded, or when mpi4py, the launcher and this package disagree about
    which MPI they are.
    """
    require(
        type(timeout) in (int, float) and 0 < timeout <= MAX_TIMEOUT,
        "timeout",
        timeout,
        f"a number of seconds > 0, at most {MAX_TIMEOUT:.0e}",
    )
    require(
        _is_int(segment_bytes) and 8 <= segment_bytes <= MAX_SEGMENT_BYTES and segment_bytes % 8 == 0,
        "segment_bytes",
        segment_bytes,
        f"a multiple of 8 in [8, {MAX_SEGMENT_BYTES}]",
    )
    require(isinstance(shared_memory, bool), "shared_memory", shared_memory, "a bool")
    mpi = load_mpi(alone=bool(mpi_comm) and getattr(mpi_comm, "size", 0) == 1)  # COMM_NULL is false
    if mpi_comm is None:
        mpi_comm = mpi.COMM_WORLD
    require(
        isinstance(mpi_comm, mpi.Intracomm) and mpi_comm != mpi.COMM_NULL,
        "mpi_comm",
        mpi_comm,
        "an mpi4py intracommunicator other than COMM_NULL",
    )
    return Communicator(mpi_comm, timeout, algorithm, segment_bytes, shared_memory)


class Communicator:
    """Ranks that call the same collectives in the same order, from one thread at a time. Made by `init`.

    rank, size: among all ranks. local_rank, local_size: among those on this host.
    Collectives raise ArgumentError on the rank whose argument is bad, before anything is sent.
    """

    def __init__(
        self, mpi_comm: MPI.Intracomm, timeout: float, algorithm: str, segment_bytes: int, shared_memory: bool
    ) -> None:
        from fastdp import _mpi

        self.timeout = timeout
        self.rank = mpi_comm.Get_rank()
        self.size = mpi_comm.Get_size()
        self._mpi_comm = mpi_comm
        self._algorithms = {name: code for code, name in enumerate(_mpi.algorithms)}
        self._operations = {name: code for code, name in enumerate(_mpi.operations)}
        self.by_nccl = algorithm == "nccl"
        self.algorithm = self._known("auto" if self.by_nccl else algorithm)
        self._codes = {getattr(torch, name): code for code, name in enumerate(_mpi.dtypes)}
        self._summable = {dtype: self._codes[dtype] for dtype in (getattr(torch, n) for n in _mpi.summable_dtypes)}
        self._native: _mpi.Communicator | None = None
        self._wish = False
        self._sparse_sum = sparse.SparseSum(self)
        self._costs = costs.Chooser(self, segment_bytes)
        self._place = hosts.ALONE
        self.shares_memory = False
        self.meets_in_memory = False  # all ranks are on one host, and share memory
        if self.size == 1:
            return
        try:
            self._native = _mpi.Communicator(mpi_comm.py2f(), timeout, segment_bytes)
        except BaseException:
            kept_for_late_peers.append(mpi_comm)
            raise
        in_use.add(self._native)
        self._place = hosts.find(self, shared_memory)
        if self._place.crowded:
            self._native.share_cores()
        if shared_memory:
            self._share_memory()

    def _share_memory(self) -> None:
        assert self._native is not None
        try:
            window.join(self, self._native)
        except CommError as refused:
            if self._native.failure:
                raise
            if self.rank == 0:
                text = f"fastdp.comm: no memory is shared between ranks, which send messages instead ({refused})"
                warnings.warn(text, stacklevel=4)
            return
        self.shares_memory = True
        if self.hosts == 1:
            self.meets_in_memory = True
            if self.algorithm in ("auto", "shared"):  # the usual call goes a shorter way, in csrc/comm/mpi_bindings.cpp
                this = weakref.ref(self)  # or self would hold itself

                def otherwise(*args: Any, **kwargs: Any) -> Any:
                    if (comm := this()) is None:
                        raise CommError("all_reduce: its communicator was dropped")
                    return Communicator.all_reduce(comm, *args, **kwargs)

                self.all_reduce = self._native.shared_sum(torch.Tensor, otherwise)  # type: ignore[method-assign]

    @property
    def host(self) -> list[int]:
        """Of each rank, the number of its host, from 0."""
        return self._place.host

    @property
    def hosts(self) -> int:
        """How many there are."""
        return max(self.host) + 1

    @property
    def local_rank(self) -> int:
        return self._place.local_rank

    @property
    def local_size(self) -> int:
        return self._place.local_size

    def __repr__(self) -> str:
        return f"<fastdp.comm.Communicator: rank {self.rank} of {self.size}, timeout {self.timeout} s>"

    def empty(self, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor [numel] of zeros in memory that the ranks of its host share, aligned to 64 bytes, its pages there.

        All ranks call it with the same arguments. Each has a tensor of its own; the others touch it in collectives that
        are given it. Its storage is no larger than itself. Where no memory is shared, an ordinary tensor.
        Raises CommError on all ranks if there is not enough memory, or if they differ in the arguments.
        """
        require(_is_int(numel) and numel >= 0, "numel", numel, "an int >= 0")
        is_known = isinstance(dtype, torch.dtype) and dtype in self._codes
        require(is_known, "dtype", dtype, f"one of {', '.join(map(str, self._codes))}")
        require(numel * dtype.itemsize <= MAX_BYTES, "numel", numel, f"at most {MAX_BYTES} bytes of {dtype}")
        if not self.shares_memory:
            return torch.zeros(numel, dtype=dtype)
        with self.whole("empty"):
            self.meet("empty", numel, dtype)
            return self.segment(numel * dtype.itemsize).tensor(numel, dtype)

    def segment(self, part_bytes: int) -> window.Segment:
        """Memory for several tensors, which all ranks lay out alike. All ranks call it; only where memory is shared."""
        from fastdp import _mpi

        assert self._native is not None
        used = set().union(*self.allgather_object(self._native.segments()))
        number = next(n for n in range(len(used) + 1) if n not in used)
        if number >= _mpi.max_segments:
            raise window.Refused(f"comm.empty: {number} tensors are there: must be at most {_mpi.max_segments}")
        return window.Segment(self, self._native, number, part_bytes)

    def all_reduce(
        self,
        x: torch.Tensor,
        algorithm: str | None = None,
        *,
        out: torch.Tensor | None = None,
        async_op: bool = False,
    ) -> Any:
        """Sum `x` (contiguous, on the CPU; float32, float64, bfloat16 or int64) over the ranks, in place or into `out`,
        of its dtype and numel and not overlapping; returns where the sum is. bfloat16 is summed in float32.

        algorithm: "shared", by loads and stores, on one host, in the order of ranks; directly where x (and out) is of
            `empty` on all ranks, at the same place. "ring" or "tree", by messages (the order of summation depends on
            numel and size only, and differs between them). "hierarchical", shared within each host and rings between
            them. "mpi" (MPI_Iallreduce; the order is the library's choice). "auto": see `explain`. None is what `init`
            was given.
        async_op: return a Handle at once, and leave x and out alone until it says that it is done.
        """
        name = self.algorithm if algorithm is None else algorithm
        code = native.dtype_code(x, self._summable)
        if out is not None:
            self._check_out(x, out)
        into = x if out is None else out
        if self._native is None:
            self._known(name)
            if out is not None:
                out.detach().view(-1).copy_(x.detach().view(-1))
            return Handle(None, 0, into) if async_op else into
        numel = x.numel()
        chosen = self._algorithms[self._costs.choose(numel * x.itemsize) if name == "auto" else self._known(name)]
        operation = self._operations["all_reduce"]
        # A tensor may be given other memory while it is under way: what is kept has the old one, and the same version.
        written, others = (into.detach(), (x.detach(), into)) if async_op else (into, x)
        number = self._native.sum(
            operation, x.data_ptr(), into.data_ptr(), numel, code, chosen, written, others, async_op
        )
        return Handle(self._native, number, into) if async_op else into

    def reduce_scatter(self, x: torch.Tensor, algorithm: str | None = None) -> torch.Tensor:
        """Sum `x` over the ranks and return this rank's slice of the sum, [numel / size]: a view of x, 1-d.

        x: as for `all_reduce`, of the same numel on all ranks. Its slices, flattened, are `torch.tensor_split`'s: the
        first numel % size ranks get one element more. In place: what is outside the slice holds anything afterwards,
        and `all_gather(slice, out=x)` makes x whole again without a copy.
        algorithm: "shared" or "ring"; "auto", and what has no reduce-scatter, takes the first where there is one host.
        Guarantee: bitwise the slice of `all_reduce` by the same algorithm.
        Raises CommError on every rank when ranks differ in numel, dtype or operation.
        """
        code = native.dtype_code(x, self._summable)
        name = self._known(self.algorithm if algorithm is None else algorithm)
        if self._native is not None:
            if name not in ("shared", "ring"):
                name = "shared" if self.meets_in_memory else "ring"
            address, operation = x.data_ptr(), self._operations["reduce_scatter"]
            self._native.sum(operation, address, address, x.numel(), code, self._algorithms[name], x, None, False)
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
        native.dtype_code(part, self._codes, "part")
        if out is not None:
            native.dtype_code(out, self._codes, "out")
            require(out.dtype == part.dtype, "out.dtype", out.dtype, f"that of part, {part.dtype}")
        if self._native is None:
            total = part.numel()
            out = torch.empty_like(part).view(-1) if out is None else out
            require(out.numel() == total, "out.numel()", out.numel(), f"{total}, that of all parts together")
            out.detach().view(-1).copy_(part.detach().view(-1))
            return out
        if out is None:
            return self.gather(part, -1, lambda elements: torch.empty(elements, dtype=part.dtype))
        self.gather(part, out.numel(), lambda _: out)
        torch.autograd.graph.increment_version(out)
        return out

    def gather(self, part: torch.Tensor, numel: int, room: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """`all_gather` to what room(elements of all parts) returns. numel: of that, or -1 for as many as it takes."""
        kept = [part]

        def result(elements: int) -> int:
            kept.append(room(elements))
            return kept[-1].data_ptr()

        assert self._native is not None
        self._native.all_gather(part.data_ptr(), part.numel(), self._codes[part.dtype], numel, result, kept)
        return kept[-1]

    def sparse_all_reduce(
        self, indices: torch.Tensor, values: torch.Tensor, numel: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over ranks of tables of `numel` rows that are zero but for values [K, width] (float32 or float64) in
        rows indices [K] (int64, in any order; rows that come twice are added up): the indices of all rows that any
        rank has, ascending, and their sums. K may differ between ranks and be 0; width and numel may not.

        Exact: what `all_reduce` of the tables gives, but for the order of sums, which is that of ranks; the same bits
        on all ranks. Source: Zhao & Canny 2013.
        """
        return self._sparse_sum(self._native, indices, values, numel)

    def shard(self, optimizer: torch.optim.Optimizer, spans: Sequence[Span]) -> Sharded:
        """The parameters of `optimizer`, at `spans`, and a flat buffer for their gradients, to be stepped by
        `reduce_noise_step`. All ranks call it with parameters that are equal.

        Its state, momentum for example, is one for all ranks of a host: whoever changes it in place does so on one.
        """
        from fastdp.sharded import Sharded

        require(self.shares_memory, "comm", repr(self), "of several ranks that share memory")
        return Sharded(self, optimizer, spans)

    def reduce_noise_step(
        self,
        sharded: Sharded,
        *,
        noise_std: float,
        batch_size: int,
        key: torch.Tensor,
        step: int,
        tables: Mapping[Span, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """One DP-SGD step on the sum over ranks of `sharded.flat`: noise of standard deviation noise_std, once, then
        1 / batch_size, then the optimizer. Each rank of a host does it for a slice, in one pass over memory, and gives
        the result to the others: afterwards all hold the same parameters. The noise is bitwise that of
        `ops.gaussian_noise_` on the flat buffer, for any number of ranks and hosts.

        tables: of parameters of two dimensions, the rows, int64, outside which this rank's gradient is 0: between hosts
        only those travel. All ranks name the same ones.

        key, step: of all ranks; a pair gives one noise. batch_size: the expected one, of all ranks together.

        Raises ArgumentError before anything is sent; CommError on every rank where they differ in one of these or in
        the optimizer's settings, stall or die; ArgumentError where the optimizer's state is not what it made itself,
        and then this communicator fails on the others.
        """
        from fastdp.sharded import check_step, digest

        check_step(self, sharded, noise_std, batch_size, key, step, tables)
        with self.whole("reduce_noise_step"):
            sharded.prepare()
            self.agree(sharded.flat, digest(noise_std, batch_size, key, step, sharded.groups(), tables))
            if self.hosts > 1:
                sparse.sum_flat(self, sharded.flat, tables)
                self.meet("reduce_noise_step_end")
            sharded.step(noise_std, batch_size, key, step)
            self.meet("reduce_noise_step_end")

    def agree(self, flat: torch.Tensor, digest: int) -> None:
        """Return when all ranks have called this for a step on as many elements of that dtype, and with the same digest
        (`sharded.digest`); CommError on all if they differ."""
        self.meet("reduce_noise_step", flat.numel(), flat.dtype, digest)

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[None]:
        """What is one thing to its caller, and several collectives here. Whoever leaves it by an exception fails it for
        all ranks, or its next collective would meet the rest of theirs."""
        try:
            yield
        except window.Refused:
            raise
        except BaseException as error:  # nothing is done where all know already
            if self._native is not None:
                self._native.fail(f"{name} on rank {self.rank}: {type(error).__name__}: {error}")
            raise

    def _known(self, algorithm: str) -> str:
        if not isinstance(algorithm, str) or (algorithm != "auto" and algorithm not in self._algorithms):
            raise ArgumentError("algorithm", algorithm, f"one of {', '.join(('auto', *self._algorithms))}")
        return algorithm

    def broadcast(self, x: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Copy `x` (contiguous, on the CPU) from rank `root` to the others, in place; returns x."""
        self._check_root(root)
        code = native.dtype_code(x, self._codes)
        if self._native is not None:
            self._native.broadcast(x.data_ptr(), x.numel(), code, root, x)
        return x

    def wish(self, value: bool) -> None:
        """Say "stop", for example, with this rank's next collectives: all ranks learn of it by `wished` after each. It
        travels in their headers, and costs nothing."""
        require(isinstance(value, bool), "value", value, "a bool")
        if self._native is not None:
            self._native.set_note(value)
        else:
            self._wish = value

    @property
    def wished(self) -> bool:
        """Whether any rank wished it in the last collective that has ended; the same on all ranks."""
        return self._wish if self._native is None else self._native.noted

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self.meet("barrier")

    def bcast_object(self, obj: Any, root: int = 0) -> Any:
        """What `root` passed, on every rank. By pickle: ranks trust each other. Not for inner loops."""
        self._check_root(root)
        if self.size == 1:
            return obj
        data = bytearray(pickle.dumps(obj)) if self.rank == root else bytearray()
        with self.whole("bcast_object"):
            numel = int(self.broadcast(torch.tensor([len(data)]), root))
            data.extend(bytes(numel - len(data)))
            self.broadcast(torch.frombuffer(data, dtype=torch.uint8), root)
        return obj if self.rank == root else pickle.loads(data)

    def allgather_object(self, obj: Any) -> list[Any]:
        """What each rank passed, in order of rank, on every rank."""
        if self.size == 1:
            return [obj]
        data = pickle.dumps(obj)
        with self.whole("allgather_object"):
            lengths = self.all_gather(torch.tensor([len(data)])).tolist()
            together = bytes(self.all_gather(torch.frombuffer(bytearray(data), dtype=torch.uint8)).numpy())
        ends = [sum(lengths[: rank + 1]) for rank in range(self.size)]
        return [pickle.loads(together[end - length : end]) for end, length in zip(ends, lengths, strict=True)]

    def abort(self, code: int = 1) -> NoReturn:
        """End all ranks at once with exit status `code`; does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(0.5)  # MPICH's launcher drops what it has not relayed yet when a rank aborts
        self._mpi_comm.Abort(code)
        os._exit(code)  # MPICH's Abort may return while the launcher is still at work, and the caller would go on

    def explain(self, nbytes: int) -> str:
        """What "auto" takes for an all-reduce of so many bytes, and the seconds that it and the others are expected to
        take. All ranks call it: the first time, costs may have to be measured (some tenths of a second)."""
        require(_is_int(nbytes) and nbytes >= 0, "nbytes", nbytes, "an int >= 0")
        return self._costs.explain(nbytes)

    def meet(self, operation: str, count: int = 0, dtype: torch.dtype = torch.float32, width: int = 0) -> None:
        """Return when all ranks have called this with the same arguments; CommError on all if they differ."""
        if self._native is not None:
            self._native.meet(self._operations[operation], count, self._codes[dtype], width)

    def _check_out(self, x: torch.Tensor, out: torch.Tensor) -> None:
        native.dtype_code(out, self._summable, "out")
        require(out.dtype == x.dtype, "out.dtype", out.dtype, f"that of x, {x.dtype}")
        require(out.numel() == x.numel(), "out.numel()", out.numel(), f"{x.numel()}, that of x")
        begin, other, nbytes = x.data_ptr(), out.data_ptr(), x.nbytes
        apart = nbytes == 0 or begin == other or begin + nbytes <= other or other + nbytes <= begin
        require(apart, "out", "overlaps x", "x itself, or apart from it")

    def _check_root(self, root: int) -> None:
        require(_is_int(root) and 0 <= root < self.size, "root", root, f"a rank in [0, {self.size - 1}]")


def _is_int(x: object) -> bool:
    """NumPy's among them."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)
