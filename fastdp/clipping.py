"""The sum of clipped per-sample gradients, from what the layers kept, straight into one flat buffer.

The norm over all parameters first, then the sum: fastdp/gradients.py has both for each kind of layer.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from fastdp import rules
from fastdp.errors import ArgumentError, PrivacyError, require
from fastdp.gradients import Norms, PerSample, Scratch, of_parameters, rows_in
from fastdp.persample import Use

# Parameters start on cache lines of the flat buffer: 16 floats.
ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class Span:
    """Where a parameter's gradient lies in the flat buffer; `offset` is also its first noise index."""

    name: str
    param: nn.Parameter
    offset: int
    shape: torch.Size  # at make_private

    @property
    def numel(self) -> int:
        return self.shape.numel()


class GradientSum:
    """The sum of clipped per-sample gradients of all managed parameters in one flat buffer."""

    def __init__(self, spans: list[Span], max_grad_norm: float) -> None:
        self.spans = spans
        self.dtype = spans[0].param.dtype
        # One element more than the gradients: what travels with them over the ranks (`note`), without noise.
        self.flat = torch.zeros(spans[-1].offset + spans[-1].numel + 1, dtype=self.dtype)
        self.note = self.flat[-1]
        self.views: dict[Tensor, Tensor] = {
            s.param: self.flat[s.offset : s.offset + s.numel].view(s.param.shape) for s in spans
        }
        self.whole = True  # not in the middle of being filled
        self._max_grad_norm = max_grad_norm
        self._scratch = Scratch(self.dtype)

    def fill(self, uses: list[Use], rows: int, real_rows: int, scale: float, add: bool) -> None:
        """Overwrite the buffer with the clipped sum over this rank's records, or add it to what is there.

        rows: records in the batch as the model saw it; real_rows: 0 if it was the stand-in of an empty batch.
        scale: what the loss divided each record's gradient by (the row count for a mean).
        """
        if add and not self.whole:
            raise PrivacyError("a piece of this batch failed while it was added: the batch cannot be continued")
        for use in uses:
            use.check_unchanged()
        parts = of_parameters(part for use in uses for part in use.parts(self.views, rows, self.dtype))
        norms = Norms(rows, self.dtype)
        for part in parts:
            part.add_sq_norms(norms)
        factors, zeros = norms.factors(scale, self._max_grad_norm)
        if real_rows == 0:
            factors.zero_()
            zeros = rows
        self.whole = False
        if not add:
            self._zero_unused(parts)
        for part in parts:
            part.add_to(self.views, factors, zeros, self._scratch, add)
        self.whole = True

    def _zero_unused(self, parts: list[PerSample]) -> None:
        filled = dict.fromkeys(self.views, 0)
        for part in parts:
            for block in part.blocks():
                filled[block.p] += block.count
        for p, view in self.views.items():
            if filled[p] < rows_in(p):
                view.zero_()


def spans_of(module: nn.Module, optimizer: Optimizer) -> list[Span]:
    """The managed parameters' places in the flat buffer; they must be just the ones that the optimizer steps."""
    require(isinstance(module, nn.Module), "module", module, "an nn.Module")
    require(isinstance(optimizer, Optimizer), "optimizer", optimizer, "a torch.optim.Optimizer")
    if isinstance(optimizer, LBFGS):
        raise ArgumentError("optimizer", "LBFGS", "one that does not evaluate a batch more than once")
    rules.check(module)
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    spans, offset = [], 0
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        require(p in stepped, f"optimizer: parameter {name}", "absent", "in the optimizer, or not require a gradient")
        require(p.is_contiguous(), f"{name}.stride()", p.stride(), "contiguous")
        stepped.discard(p)
        spans.append(Span(name, p, offset, p.shape))
        offset += math.ceil(p.numel() / ALIGNMENT) * ALIGNMENT
    if any(p.requires_grad for p in stepped):
        raise ArgumentError("optimizer", f"{len(stepped)} parameters", "parameters of the module only")
    return spans
