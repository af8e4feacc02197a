"""Collectives between the ranks of an MPI job: our own ring all-reduce and broadcast on MPI point-to-point.

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
from typing import TYPE_CHECKING, Any

import torch

from fastdp.errors import ArgumentError, CommError, require

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi4py import MPI

    from fastdp import _mpi

# Two receive buffers and the piece of the tensor they are added to stay in a second-level cache of 1 MiB.
SEGMENT_BYTES = 256 * 1024
MAX_SEGMENT_BYTES = 1 << 30  # MPI counts are ints

# What late peers may still read or write after a failure: kept until the process ends, on purpose.
_kept_for_late_peers: list[object] = []


def init(
    mpi_comm: MPI.Intracomm | None = None, timeout: float = 60.0, *, segment_bytes: int = SEGMENT_BYTES
) -> Communicator:
    """A communicator over the ranks of `mpi_comm` (mpi4py; None: COMM_WORLD). All of its ranks call this.

    timeout: seconds that a rank waits with nothing arriving before it raises CommError.
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
    mpi = _load_mpi()
    if mpi_comm is None:
        mpi_comm = mpi.COMM_WORLD
    require(
        isinstance(mpi_comm, mpi.Intracomm) and mpi_comm != mpi.COMM_NULL,
        "mpi_comm",
        mpi_comm,
        "an mpi4py intracommunicator other than COMM_NULL",
    )
    return Communicator(mpi_comm, timeout, segment_bytes)


class Communicator:
    """Ranks that call the same collectives in the same order, from one thread at a time. Made by `init`.

    rank, size: among all ranks. local_rank, local_size: among those on this host.
    Collectives raise ArgumentError on the rank whose argument is bad, before anything is sent.
    """

    def __init__(self, mpi_comm: MPI.Intracomm, timeout: float, segment_bytes: int) -> None:
        from fastdp import _mpi

        self.timeout = timeout
        self.rank = mpi_comm.Get_rank()
        self.size = mpi_comm.Get_size()
        self._mpi_comm = mpi_comm
        self._algorithms = _mpi.algorithms
        self._codes = {getattr(torch, name): code for code, name in enumerate(_mpi.dtypes)}
        self._summable = {
            dtype: self._codes[dtype] for dtype in (getattr(torch, n) for n in _mpi.summable_dtypes)
        }
        self._native: _mpi.Communicator | None = None
        if self.size > 1:
            try:
                self._native = _mpi.Communicator(mpi_comm.py2f(), timeout, segment_bytes)
            except BaseException:
                _kept_for_late_peers.append(mpi_comm)
                raise
        hosts = self.allgather_object(_host())
        self.local_rank = hosts[: self.rank].count(hosts[self.rank])
        self.local_size = hosts.count(hosts[self.rank])

    def __repr__(self) -> str:
        return f"<fastdp.comm.Communicator: rank {self.rank} of {self.size}, timeout {self.timeout} s>"

    def all_reduce(self, x: torch.Tensor, algorithm: str = "auto") -> torch.Tensor:
        """Sum `x` (contiguous, on the CPU; float32, float64 or int64) over the ranks, in place; returns x.

        algorithm: "ring" (the order of summation depends on numel and size only), "mpi" (MPI_Iallreduce; the
        order is the library's choice), or "auto", which is ring.
        """
        choices = ("auto", *self._algorithms)
        require(algorithm in choices, "algorithm", algorithm, f"one of {', '.join(choices)}")
        code = _dtype_code(x, self._summable)
        if self._native is not None:
            chosen = self._algorithms.index("ring" if algorithm == "auto" else algorithm)
            self._in_place(self._native.all_reduce, x, code, chosen)
        return x

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
            self._native.barrier()

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

    def abort(self, code: int = 1) -> None:
        """End all ranks at once with exit status `code`; does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._mpi_comm.Abort(code)

    def _in_place(self, collective: Callable[..., None], x: torch.Tensor, *codes: int) -> None:
        assert self._native is not None
        failed_before = bool(self._native.failure)
        try:
            collective(x.data_ptr(), x.numel(), *codes)
        except BaseException:
            if self._native.pending and not failed_before:
                _kept_for_late_peers.append((self, x))
            raise
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)  # or autograd would use a saved tensor that has changed

    def _check_root(self, root: int) -> None:
        require(
            isinstance(root, int) and 0 <= root < self.size, "root", root, f"a rank in [0, {self.size - 1}]"
        )


def _dtype_code(x: torch.Tensor, codes: dict[torch.dtype, int]) -> int:
    require(isinstance(x, torch.Tensor), "x", type(x).__name__, "a torch.Tensor")
    code = codes.get(x.dtype)
    if code is None:
        raise ArgumentError("x.dtype", x.dtype, f"one of {', '.join(map(str, codes))}")
    require(x.device.type == "cpu", "x.device", str(x.device), "cpu")
    require(x.layout == torch.strided, "x.layout", x.layout, "torch.strided")
    if not x.is_contiguous():
        raise ArgumentError(
            "x.stride()", x.stride(), f"that of a contiguous tensor of shape {tuple(x.shape)}"
        )
    return code


def _host() -> tuple[str, str]:
    """Names the machine. Containers with names of their own count as hosts: they need not share memory."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
    except OSError:  # not Linux
        boot_id = ""
    return platform.node(), boot_id


def _load_mpi() -> Any:
    """mpi4py.MPI, once mpi4py, the launcher and fastdp._mpi are known to mean the same MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise CommError(
            f"mpi4py cannot load MPI ({_one_line(error)}): "
            "install the wheels `mpi4py` and `mpich`, or build mpi4py for your own MPI"
        ) from error
    theirs = _one_line(MPI.Get_library_version())
    launcher, launched = _launcher()
    parties = f"mpi4py uses {theirs}, the launcher is {launcher}"
    cure = "install fastdp with FASTDP_MPI=<prefix of mpi4py's MPI>, and start with the mpirun of that MPI"
    try:
        from fastdp import _mpi
    except ImportError as error:
        raise CommError(f"fastdp._mpi cannot load its MPI ({_one_line(error)}), {parties}: {cure}") from error
    ours = _one_line(_mpi.loaded_library())
    family = "Open MPI" if "Open MPI" in ours or "Spectrum MPI" in ours else "MPICH"
    if ours != theirs or family != _mpi.built_for:
        raise CommError(f"fastdp._mpi was built for {_mpi.built_for} and loads {ours}, {parties}: {cure}")
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise CommError(
            "MPI is not initialised, or finalized: call fastdp.comm.init between MPI_Init and MPI_Finalize"
        )
    if launched > 1 and MPI.COMM_WORLD.Get_size() == 1:
        raise CommError(
            f"{launcher} started {launched} processes, but each is alone: mpi4py and fastdp._mpi use "
            f"{theirs}, which does not know that launcher; start with the mpirun of that MPI{_mpirun_hint()}"
        )
    return MPI


def _launcher() -> tuple[str, int]:
    """Who started this process, and as one of how many. A Slurm step counts where no mpirun ran inside it."""
    for variable, name in (
        ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
        ("PMI_SIZE", "MPICH's mpirun"),  # Intel MPI, Cray and `srun --mpi=pmi2` set it too
        ("SLURM_STEP_NUM_TASKS", "srun"),
    ):
        value = os.environ.get(variable, "")
        if value.isdecimal():
            return f"{name} ({variable}={value})", int(value)
    return "none", 1


def _mpirun_hint() -> str:
    beside_python = os.path.join(os.path.dirname(sys.executable), "mpirun")
    return f" ({beside_python})" if os.path.exists(beside_python) else ""


def _one_line(text: object) -> str:
    """The first line, without the padding that MPI libraries add: 'MPICH Version: 5.0.2'."""
    lines = str(text).replace("\0", " ").strip().splitlines() or [type(text).__name__]
    return " ".join(lines[0].split())


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
