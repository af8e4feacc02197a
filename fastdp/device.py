"""Where training runs: whose kernels a tensor takes, and which GPU a rank has."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastdp import cuda, native
from fastdp.errors import ArgumentError


def on_gpu(x: Tensor) -> bool:
    return x.device.type == cuda.DEVICE


def kernels(x: Tensor) -> ModuleType:
    """native.py, or cuda.py: they have the same functions for what the engine does."""
    return cuda if on_gpu(x) else native


def zeros_in(factors: Tensor) -> int:
    """How many are 0; of a GPU's, where to count would be to wait for them, at most how many."""
    return len(factors) if on_gpu(factors) else int((factors == 0.0).sum())


def random_states() -> list[Tensor]:
    """Of torch's generators, the CPU's and those of GPUs that are in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def restore_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


def of_rank(name: str, local_rank: int, local_size: int) -> torch.device:
    """ "cpu", or with "cuda" a GPU for each rank of a host. Raises ArgumentError where there are too few."""
    if name == "cpu":
        return torch.device("cpu")
    cuda.kernels()
    if not torch.cuda.is_available():
        raise ArgumentError("device", name, f"cpu: torch {torch.__version__} sees no GPU")
    there = torch.cuda.device_count()
    if local_size > there:
        raise ArgumentError("device", name, f"cpu, or {there} ranks on this host, one for each GPU: {local_size} are")
    return torch.device("cuda", local_rank)
