"""Where training runs: whose kernels a tensor takes, and which GPU a rank has."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdp import cuda, native
from fastdp.errors import ArgumentError

if TYPE_CHECKING:
    from fastdp.comm import Communicator


def on_gpu(x: Tensor) -> bool:
    # Asked some twenty times in a step: is_cuda takes 40 ns, device.type 200.
    return x.is_cuda or (cuda.DEVICE != "cuda" and x.device.type == cuda.DEVICE)


def kernels(x: Tensor) -> ModuleType:
    """native.py, or cuda.py: they have the same functions for what the engine does."""
    return cuda if on_gpu(x) else native


def zeros_in(factors: Tensor) -> int:
    """How many are 0; of a GPU's, where to count would be to wait for them, at most how many."""
    return len(factors) if on_gpu(factors) else int((factors == 0.0).sum())


def add_rows(out: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """out[index[i]] += rows[i], in the order of i, which a GPU's index_add_ does not keep."""
    return out.index_put_((index,), rows, accumulate=True) if on_gpu(out) else out.index_add_(0, index, rows)


def stream_of(x: Tensor) -> int:
    """Where what is done with x now is done; 0 on the CPU, or by default."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def done_so_far(x: Tensor) -> torch.cuda.Event | None:
    """All that has been asked of x's GPU, on the current stream, for `follow`."""
    return torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None


def follow(done: torch.cuda.Event | None, x: Tensor) -> None:
    """What is asked of x's GPU from now on comes after it, whatever the stream."""
    if done is not None:
        torch.cuda.current_stream(x.device).wait_event(done)


def random_states() -> list[Tensor]:
    """Of torch's generators, the CPU's and those of GPUs that are in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def restore_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


def of_rank(name: str, comm: Communicator) -> torch.device:
    """ "cpu", or with "cuda" a GPU that no other rank has. All ranks call it; ArgumentError where there are too few."""
    if name == "cpu":
        return torch.device("cpu")
    number, mine, error = 0, "", None
    try:
        number, mine = _gpu(comm.local_rank)
    except ArgumentError as raised:
        error = raised
    everywhere = [(host, gpu) for host, gpu in zip(comm.host, comm.allgather_object(mine), strict=True)]
    if error is not None:
        raise error
    ranks = [rank for rank, gpu in enumerate(everywhere) if gpu == everywhere[comm.rank]]
    if len(ranks) > 1:
        raise ArgumentError("device", name, f"cpu, or one GPU for each rank: ranks {ranks} have the same")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _gpu(local_rank: int) -> tuple[int, str]:
    """A rank's number of it, and what it is on its host. A launcher may have given each rank one, all number 0."""
    cuda.kernels()
    if not torch.cuda.is_available():
        raise ArgumentError("device", "cuda", f"cpu: torch {torch.__version__} sees no GPU")
    number = local_rank % torch.cuda.device_count()
    return number, str(torch.cuda.get_device_properties(number).uuid)
