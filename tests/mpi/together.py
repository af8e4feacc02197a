"""For the scripts of this folder: an exception on one rank ends all, and test data with known sums."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import torch
from mpi4py import MPI


def _abort(kind: Any, error: Any, trace: Any) -> None:
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    MPI.COMM_WORLD.Abort(1)


sys.excepthook = _abort


def data(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Depends on rank and index: segments or ranks cannot be swapped unseen. 8 ranks sum exactly in float32."""
    index = torch.arange(count)
    x = (index * 31 + rank * 17) % 1009 * (rank + 1) - 400 * rank
    if dtype == torch.int64:
        x += (1 << 61) + (index << 20)  # beyond float64, and wraps from 4 ranks on
    return x.to(dtype)


def expected(size: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """bfloat16 is summed in float32, exactly, and rounded once."""
    total = torch.zeros(count, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    for rank in range(size):
        total += data(rank, count, dtype)
    return total.to(dtype)


def rough(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Every sum rounds: another order of summation gives other bits."""
    generator = torch.Generator().manual_seed(1000 * count + rank)
    x = torch.randn(count, dtype=torch.float64, generator=generator)
    return (x * 2.0 ** torch.randint(-6, 6, (count,), generator=generator)).to(dtype)
