"""bfloat16: how coarse it is, what is widened to float32, and the state of torch.autocast that a forward ran in."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdp.errors import PrivacyError

DEVICES = ("cpu", "cuda")
ORDER = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2}


def wide(x: Tensor) -> Tensor:
    """x, in float32 if it was bfloat16: what products and sums are made in."""
    return x.float() if x.dtype == torch.bfloat16 else x


def coarsest(layer: str, dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one that rounds most: what was computed by way of it is no more exact, whatever type it comes in.

    PrivacyError that names the layer if one of them is not known here: float16, whose gradients vanish below 6e-8, and
    whose users scale the loss against that.
    """
    found = torch.float64
    for dtype in dtypes:
        if dtype.is_floating_point and dtype not in ORDER:
            raise PrivacyError(
                f"{layer}: an input, output or autocast of {dtype}: must be bfloat16, float32 or float64"
            )
        found = max(found, dtype, key=lambda d: ORDER.get(d, -1))
    return found


class Autocast:
    """Whether torch.autocast is on now, for which device, and to which types."""

    def __init__(self) -> None:
        self.dtypes = {of: torch.get_autocast_dtype(of) for of in DEVICES if torch.is_autocast_enabled(of)}

    def again(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        for of in DEVICES:
            # Its cache of rounded weights would keep those that a forward run again has put in their places.
            if of in self.dtypes:
                stack.enter_context(torch.autocast(of, self.dtypes[of], cache_enabled=False))
            elif torch.is_autocast_enabled(of):
                stack.enter_context(torch.autocast(of, enabled=False))
        return stack


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """To which type torch.autocast rounds what is made of x now; None: it is off."""
    of = x.device.type
    return torch.get_autocast_dtype(of) if of in DEVICES and torch.is_autocast_enabled(of) else None


def without_autocast() -> AbstractContextManager[Any]:
    """For sums of contributions: a loop may have all of its step within autocast, which would round them."""
    on = [of for of in DEVICES if torch.is_autocast_enabled(of)]
    if not on:
        return nullcontext()
    stack = ExitStack()
    for of in on:
        stack.enter_context(torch.autocast(of, enabled=False))
    return stack
