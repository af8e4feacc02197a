"""bfloat16: how coarse it is, what is widened to float32, and the state of torch.autocast that a forward ran in."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x, in float32 if it was bfloat16: what products and sums are made in."""
    return x.float() if x.dtype == torch.bfloat16 else x


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one that rounds most: what was computed by way of it is no more exact, whatever type it comes in."""
    return max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps, default=torch.float32)


class Autocast:
    """Whether torch.autocast is on now, and to which type."""

    def __init__(self) -> None:
        self.on, self.dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def again(self) -> AbstractContextManager[Any]:
        # Its cache of rounded weights would keep those that a forward that is run again has put in their places.
        return torch.autocast("cpu", self.dtype, enabled=self.on, cache_enabled=False)


def without_autocast() -> AbstractContextManager[Any]:
    """For sums of contributions: a loop may have all of its step within autocast, which would round them."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
