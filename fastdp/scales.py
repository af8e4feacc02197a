"""Finds losses that are multiplied or divided by a number that follows the number of records in the batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdp.errors import PrivacyError
from fastdp.tape import Tape, Taped

UNDECIDED_BATCHES = 10

_SCALINGS = {"div", "div_", "true_divide", "divide", "__truediv__", "__itruediv__", "__rtruediv__"}
_SCALINGS |= {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"}
_SCALINGS |= {"matmul", "__matmul__", "__rmatmul__", "dot", "vdot", "inner", "mv", "einsum"}

# Of the number of records, by which a loss may be scaled: its square root, itself, its square.
_POWERS = (0.5, 1.0, 2.0)


class Scales:
    """Of the probed batches' losses. sizes: expected batch sizes, which are constants, whatever the batch."""

    def __init__(self, sizes: frozenset[int]) -> None:
        self.sizes = sizes
        self.undecided = False  # whether the loss is scaled by the number of records: the next batch may tell
        self._last: tuple[int, list[float]] | None = None  # number of records and the scales of the last probed batch

    def check(self, tape: Tape, gradient: Tensor | None, batch: int) -> None:
        """A loss scaled by a number that follows len(batch): one record more, and the gradients of all others change.

        A replay has such a number as a constant. It is known by its value, or by how it follows the number of records
        from one probed batch to the next.
        """
        found = [] if gradient is None else [gradient]
        for func, args, kwargs, _ in tape.calls:
            if getattr(func, "__name__", "") in _SCALINGS:
                found += [x for x in tree_leaves((args, kwargs)) if not isinstance(x, Taped)]
        rows, scales = tape.rows, [scale for x in found if (scale := _scale_of(x)) is not None]
        counts = [c for count in (rows, 1 / rows) for c in (count, _rounded(count))]
        is_count = rows > 1 and any(math.isclose(x, count, rel_tol=1e-6) for x in scales for count in counts)
        before, self._last = self._last, (rows, scales)
        compared = before is not None and before[0] != rows and len(before[1]) == len(scales)
        follows = (
            compared
            and before is not None
            and any(_follows(x, y, rows / before[0]) for x, y in zip(scales, before[1], strict=True))
        )
        # Batches of one size (shuffled ones) never tell, and are not coupled by it.
        self.undecided = bool(scales) and batch < UNDECIDED_BATCHES and (not compared or is_count)
        if follows or (is_count and rows not in self.sizes):
            raise PrivacyError(
                f"loss: it is multiplied or divided by a number that follows {rows}, the number of records in the "
                "batch, which couples them: use reduction='mean' and loss_reduction='mean', or the expected batch size"
            )


def _scale_of(x: Any) -> float | None:
    """The size of what a loss may be multiplied by, other than its records."""
    if isinstance(x, Tensor) and x.numel() and x.is_floating_point():
        x = x.detach().abs().max().item()
    if isinstance(x, bool) or not isinstance(x, (int, float)) or x == 0 or not math.isfinite(x):
        return None
    return abs(float(x))


def _rounded(x: float) -> float:
    return torch.tensor(x, dtype=torch.bfloat16).item()


def _follows(x: float, y: float, of_rows: float) -> bool:
    """Whether x / y grew as a power of the rows; rounding of float32 included, and of bfloat16 where it was that."""
    limit = 2.0**-8 if x != y and x == _rounded(x) and y == _rounded(y) else 1e-6
    return any(math.isclose(x / y, of_rows**power, rel_tol=limit) for p in _POWERS for power in (p, -p))
