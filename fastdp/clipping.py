"""The sum of clipped per-sample gradients, from what the layers kept, straight into one flat buffer.

The norm over all parameters of a group first, then the sum: fastdp/gradients.py has both for each kind of layer. There
is one group, or one for each layer where clipping is per layer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from fastdp import native, rules
from fastdp.device import on_gpu, zeros_in
from fastdp.errors import ArgumentError, PrivacyError, require
from fastdp.gradients import Norms, PerSample, Rows, Scratch, of_parameters, rows_in
from fastdp.precision import without_autocast
from fastdp.uses import Use

# Parameters start on cache lines of the flat buffer: 16 floats.
ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class Span:
    """Where a parameter's gradient lies in the flat buffer; `offset` is also its first noise index."""

    name: str
    param: nn.Parameter
    offset: int
    shape: torch.Size  # at make_private
    layer: str = ""  # name of the first module that owns it
    dtype: torch.dtype = torch.float32  # at make_private
    is_table: bool = False  # of embeddings, and of nothing else: few of its rows have a gradient

    @functools.cached_property
    def numel(self) -> int:
        return self.shape.numel()


def flat_numel(spans: Sequence[Span]) -> int:
    return spans[-1].offset + spans[-1].numel


class GradientSum:
    """The sum of clipped per-sample gradients of all managed parameters in one flat buffer.

    Guarantee: a record adds a vector of norm <= max_grad_norm to it, rounding included, whatever its gradient is.
    layer_bounds: name and bound of each layer that is clipped by itself, of which max_grad_norm is the root of the sum
    of squares; none: all layers are clipped together. gamma: automatic clipping's; None: clipping leaves gradients
    within the bound as they are. flat: zeros to be the buffer, where it shall lie in memory that ranks share.
    """

    def __init__(
        self,
        spans: list[Span],
        max_grad_norm: float,
        layer_bounds: Sequence[tuple[str, float]] = (),
        gamma: float | None = None,
        flat: Tensor | None = None,
    ) -> None:
        self.spans = spans
        self.dtype = native.sum_dtype(spans[0].param.dtype)  # float32 for bfloat16, too
        device = spans[0].param.device
        self.flat = torch.zeros(flat_numel(spans), dtype=self.dtype, device=device) if flat is None else flat
        self.views: dict[Tensor, Tensor] = {
            s.param: self.flat[s.offset : s.offset + s.numel].view(s.param.shape) for s in spans
        }
        self.whole = True  # not in the middle of being filled
        self._bounds = [bound for _, bound in layer_bounds] or [max_grad_norm]
        number = {name: i for i, (name, _) in enumerate(layer_bounds)}
        self._group: dict[Tensor, int] = {s.param: number[s.layer] if number else 0 for s in spans}
        self._gamma = gamma
        self._rows = sum(rows_in(p) for p in self.views)
        self._scratch = Scratch(self.dtype, self.flat.device)
        # A GPU is not waited for to learn which rows those are.
        tables = [s for s in spans if s.is_table and not on_gpu(self.flat)]
        self._rows_of_tables: dict[Tensor, list[Tensor]] = {s.param: [] for s in tables}

    @property
    def tables(self) -> dict[Span, Tensor]:
        """The rows of each table of embeddings that this rank's records have used, ascending: its others are 0. None on
        a GPU."""
        rows = self._rows_of_tables
        none = torch.empty(0, dtype=torch.int64)
        return {s: torch.unique(torch.cat([none, *rows[s.param]])) for s in self.spans if s.param in rows}

    def fill(self, uses: list[Use], rows: int, real_rows: int, scale: float, add: bool) -> None:
        """Overwrite the buffer with the clipped sum over this rank's records, or add it to what is there.

        rows: records in the batch as the model saw it; real_rows: 0 if it was the stand-in of an empty batch.
        scale: what the loss divided each record's gradient by (the row count for a mean).
        """
        if add and not self.whole:
            raise PrivacyError("a piece of this batch failed while it was added: the batch cannot be continued")
        for use in uses:
            use.check_unchanged()
        with without_autocast():
            self._fill(uses, rows, real_rows, scale, add)

    def _fill(self, uses: list[Use], rows: int, real_rows: int, scale: float, add: bool) -> None:
        group = self._group
        parts = of_parameters(self._parts(uses, rows))
        norms = [Norms(rows, self.dtype, self.flat.device) for _ in self._bounds]
        for number, of in enumerate(norms):
            of.add(parts if len(norms) == 1 else [part for part in parts if group[part.p] == number])
        factors = self._factors(norms, scale, real_rows)
        self.whole = False
        if not add:
            self._zero_unused(parts)
            for used in self._rows_of_tables.values():
                used.clear()
        for part in parts:
            self._note_rows(part)
            part.add_to(self.views, *factors[group[part.p]], self._scratch, add)
        self.whole = True

    def _note_rows(self, part: PerSample) -> None:
        """Only where ranks sum tables row by row is it asked for: no copy is made of what the layers kept."""
        used = self._rows_of_tables.get(part.p)
        if used is not None:
            used.append(part.index if isinstance(part, Rows) else torch.arange(rows_in(part.p)))

    def _factors(self, norms: list[Norms], scale: float, real_rows: int) -> list[tuple[Tensor, int]]:
        """Of each group, the records' factors, float64 [B], and how many of them are 0.

        A record that one group drops is dropped by all: where a layer's gradient is no number, the others' tell nothing
        either. (Bounds of layers are not 0, unless all are: no other record has the factor 0.)
        """
        found = [of.factors(scale, bound, self._gamma) for of, bound in zip(norms, self._bounds, strict=True)]
        if real_rows == 0:
            return [(factors.zero_(), len(factors)) for factors, _ in found]
        if len(found) == 1 or not any(zeros for _, zeros in found):
            return found
        dropped = torch.stack([factors == 0.0 for factors, _ in found]).any(0)
        kept = [factors.masked_fill_(dropped, 0.0) for factors, _ in found]
        return [(factors, zeros_in(kept[0])) for factors in kept]

    def _parts(self, uses: list[Use], rows: int) -> Iterator[PerSample]:
        for use in uses:
            parts = use.parts(self.views, rows, self.dtype)
            use.spend()
            yield from parts if len(self._bounds) == 1 else self._of_one_group(parts)

    def _of_one_group(self, parts: Iterable[PerSample]) -> Iterator[PerSample]:
        """Each of one group: a weight and a bias that other layers share may be of two."""
        for part in parts:
            blocks = part.blocks()
            yield from [part] if len({self._group[block.p] for block in blocks}) == 1 else blocks

    def _zero_unused(self, parts: list[PerSample]) -> None:
        blocks = [block for part in parts for block in part.blocks()]  # of which no two are about the same rows
        if sum(block.count for block in blocks) == self._rows:
            return
        filled = dict.fromkeys(self.views, 0)
        for block in blocks:
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
    layer: dict[Tensor, str] = {}
    elsewhere: set[Tensor] = set()  # used by what is no embedding
    for name, owner, slots in rules.owners(module):
        for _, _, p in slots:
            layer.setdefault(p, name)
            if not rules.is_embedding(owner):
                elsewhere.add(p)
    spans, offset = [], 0
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        require(p in stepped, f"optimizer: parameter {name}", "absent", "in the optimizer, or not require a gradient")
        require(p.is_contiguous(), f"{name}.stride()", p.stride(), "contiguous")
        stepped.discard(p)
        spans.append(Span(name, p, offset, p.shape, layer[p], p.dtype, p not in elsewhere))
        offset += math.ceil(p.numel() / ALIGNMENT) * ALIGNMENT
    if any(p.requires_grad for p in stepped):
        raise ArgumentError("optimizer", f"{len(stepped)} parameters", "parameters of the module only")
    return spans
