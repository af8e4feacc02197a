"""Which MPI this process runs under: mpi4py, the launcher and fastdp._mpi must mean the same one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from fastdp.errors import CommError


def load_mpi(alone: bool = False) -> Any:
    """mpi4py.MPI, initialised, once mpi4py, the launcher and fastdp._mpi are known to mean the same MPI.

    alone: one process on purpose, whatever the launcher started.
    """
    try:
        MPI, initialize = _import_mpi4py()
    except (ImportError, RuntimeError) as error:
        raise CommError(
            f"mpi4py cannot load MPI ({_one_line(error)}): "
            "install the wheels `mpi4py` and `mpich`, or build mpi4py for your own MPI"
        ) from error
    theirs = _one_line(MPI.Get_library_version())
    launcher, launched = _launcher()
    parties = f"mpi4py uses {_name(theirs)}, the launcher is {launcher}"
    cure = "install fastdp with FASTDP_MPI=<prefix of mpi4py's MPI>, and start with the mpirun of that MPI"
    try:
        from fastdp import _mpi
    except ImportError as error:
        raise CommError(f"fastdp._mpi cannot load its MPI ({_one_line(error)}), {parties}: {cure}") from error
    ours = _one_line(_mpi.loaded_library())
    if ours != theirs or _family(ours) != _mpi.built_for:
        raise CommError(f"fastdp._mpi was built for {_mpi.built_for} and loads {_name(ours)}, {parties}: {cure}")

    # MPICH ends the process when initialised under Open MPI's launcher, unless it was built for that and told so.
    refuses = _family(ours) == "MPICH" and launcher.startswith("Open MPI") and "MPIR_CVAR_PMI_VERSION" not in os.environ
    if initialize and not refuses:
        initialize()
    if not refuses and (not MPI.Is_initialized() or MPI.Is_finalized()):
        raise CommError("MPI is not initialised, or finalized: call fastdp.comm.init between MPI_Init and MPI_Finalize")
    if refuses or (not alone and launched > 1 and MPI.COMM_WORLD.Get_size() == 1):
        raise CommError(
            f"{launcher} started {launched} processes, but each is alone: mpi4py and fastdp._mpi use {_name(ours)}, "
            f"which does not know that launcher; start with the mpirun of that MPI{_mpirun_hint()}"
        )
    return MPI


def _import_mpi4py() -> tuple[Any, Callable[[], object] | None]:
    """mpi4py.MPI, and how to initialise it where its import would have: the library is asked its name before."""
    import mpi4py

    if "mpi4py.MPI" in sys.modules or not mpi4py.rc.initialize:
        from mpi4py import MPI

        return MPI, None
    mpi4py.rc.initialize = False
    if mpi4py.rc.finalize is None:
        mpi4py.rc.finalize = True
    try:
        from mpi4py import MPI
    finally:
        mpi4py.rc.initialize = True
    if MPI.Is_initialized():
        return MPI, None
    level = mpi4py.rc.thread_level if mpi4py.rc.threads else "single"
    return MPI, lambda: MPI.Init_thread(getattr(MPI, f"THREAD_{level.upper()}"))


def _family(library: str) -> str:
    return "Open MPI" if "Open MPI" in library or "Spectrum MPI" in library else "MPICH"


def _name(library: str) -> str:
    return library.split(", package")[0]  # Open MPI goes on with who built it where


def launched_ranks() -> int:
    """As one of how many processes this one was started, by what the launcher left in the environment; 1 if alone."""
    return _launcher()[1]


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
