"""The sum of clipped per-sample gradients, from what the layers kept, straight into one flat buffer.

The norm over all parameters first, then the sum. For linear layers the norms come without the gradients ("ghost norms")
and the sum is one matrix product per weight, (factor * b)^T a. For other modules the per-sample gradients are formed,
those of embeddings as the rows that are not zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from fastdp import native, rules
from fastdp.errors import ArgumentError, PrivacyError, require
from fastdp.layers import EmbeddingUse, FormulaUse, LinearUse
from fastdp.persample import Call, Use

# A record's rounded products may exceed its norm by 2^-23 of the sum of their lengths when they cancel (sequences).
ROUNDING = {torch.float32: 2.0**-22, torch.float64: 2.0**-51}

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
        self._scratch: dict[Tensor, Tensor] = {}

    def fill(self, uses: list[Use], rows: int, real_rows: int, scale: float, add: bool) -> None:
        """Overwrite the buffer with the clipped sum over this rank's records, or add it to what is there.

        rows: records in the batch as the model saw it; real_rows: 0 if it was the stand-in of an empty batch.
        scale: what the loss divided each record's gradient by (the row count for a mean).
        """
        if add and not self.whole:
            raise PrivacyError("a piece of this batch failed while it was added: the batch cannot be continued")
        for use in uses:
            use.check_unchanged()
        formed, linear, embeddings = _formed(uses, self.views, rows, self.dtype)
        weights, paired, lone = _group(linear, self.views, rows, self.dtype)
        tables = {p: _merged(of) for p, of in embeddings.items()}
        factors, zeros = self._factors(formed, tables, weights, paired, lone, rows, scale)
        if real_rows == 0:
            factors.zero_()
            zeros = rows
        self.whole = False
        if not add:
            for p in self.views.keys() - weights.keys() - lone.keys() - set(paired.values()):
                self.views[p].zero_()
        for p, (a, b) in weights.items():
            scaled = self._scaled(p, b, factors, self.views[paired[p]] if p in paired else None, add)
            if zeros:  # selected, not multiplied by 0: a may hold NaN too
                a = a.masked_fill((factors == 0.0).view(-1, *[1] * (a.dim() - 1)), 0.0)
            a = a if a.dim() == 2 else a.flatten(0, 1)
            if add:
                self.views[p].addmm_(scaled.t(), a)
            else:
                torch.mm(scaled.t(), a, out=self.views[p])
        for p, b in lone.items():
            self._scaled(p, b, factors, self.views[p], add)
        for p, g in formed.items():
            # Not a product with float32 factors: the rounding of a subnormal one would take a record beyond C.
            self._scaled(p, g, factors, self.views[p].view(-1), add)
        for p, (record, index, g) in tables.items():
            self.views[p].index_add_(0, index, self._scaled(p, g, factors[record], None, add))
        self.whole = True

    def _factors(
        self,
        formed: dict[Tensor, Tensor],
        tables: dict[Tensor, Rows],
        weights: dict[Tensor, tuple[Tensor, Tensor]],
        paired: dict[Tensor, Tensor],
        lone: dict[Tensor, Tensor],
        rows: int,
        scale: float,
    ) -> tuple[Tensor, int]:
        """scale * min(1, C / (scale * norm)) of each record, and how many of them are 0."""
        sq = torch.zeros(rows, dtype=torch.float64)
        margin = _Margin(self.dtype)
        for g in formed.values():
            sq += native.sq_norms(g)
        for record, _, g in tables.values():
            sq.index_add_(0, record, native.sq_norms(g))
        for p, (a, b) in weights.items():
            native.add_linear_sq_norms(a, b, p in paired, sq)
            if a.dim() == 3:
                lengths = _lengths(a)
                margin.add((lengths.square() + 1.0).sqrt() if p in paired else lengths, b)
        for b in lone.values():
            sq += native.sq_norms(b if b.dim() == 2 else b.sum(1))
            if b.dim() == 3:
                margin.add(torch.ones(b.shape[:2], dtype=torch.float64), b)
        sq = margin.widen(sq, self._max_grad_norm)
        factors, zeros = native.clip_factors(sq, self.dtype, scale, self._max_grad_norm)
        return margin.drop(factors, zeros)

    def _scaled(self, p: Tensor, b: Tensor, factors: Tensor, sums: Tensor | None, add: bool) -> Tensor:
        """factors * b as a matrix [B T, O], in memory kept from step to step; its column sums into or onto `sums`."""
        if b.dim() == 3:
            factors = factors.repeat_interleave(b.shape[1])
            b = b.flatten(0, 1)
        scratch = self._scratch.get(p)
        if scratch is None or len(scratch) < len(b):
            # A quarter more than asked for: Poisson batches grow past their first size again and again.
            scratch = self._scratch[p] = torch.empty(len(b) * 5 // 4 + 1, b.shape[1], dtype=self.dtype)
        scaled = scratch[: len(b)]
        if sums is None or not add:
            native.scale_rows(b, factors, scaled, sums)
        else:
            part = torch.empty_like(sums)
            native.scale_rows(b, factors, scaled, part)
            sums += part
        return scaled


class _Margin:
    """What a record may gain when the terms of its sums over positions cancel, but for their rounding."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._rounding, self._limits = ROUNDING[dtype], torch.finfo(dtype)
        self._slack: Tensor | None = None  # of the norm, relative to the factor
        self._lost: Tensor  # at most, of what is added: products that the kernel makes 0, being subnormal
        self._peak: Tensor  # the largest output gradient, or more

    def add(self, a: Tensor, b: Tensor) -> None:
        """a float64 [B, T], the lengths of what the output gradients b [B, T, O] are multiplied with."""
        lengths = _lengths(b)
        slack, peak = (a * lengths).sum(1), lengths.amax(1) if b.shape[1] else lengths.sum(1)
        lost = self._limits.tiny * b.shape[2] ** 0.5 * a.sum(1)
        if self._slack is None:
            self._slack, self._lost, self._peak = slack, lost, peak
        else:
            self._slack, self._lost = self._slack + slack, self._lost + lost
            self._peak = torch.maximum(self._peak, peak)

    def widen(self, sq: Tensor, max_grad_norm: float) -> Tensor:
        """Squares of norms that leave room for all that, or are infinite."""
        if self._slack is None or max_grad_norm == 0.0:
            return sq
        room = (1.0 - self._lost / max_grad_norm).clamp_min(0.0)
        return ((sq.sqrt() + self._rounding * self._slack) / room).square()

    def drop(self, factors: Tensor, zeros: int) -> tuple[Tensor, int]:
        """Factors with 0 where a product may be too large: the kernel drops single positions."""
        if self._slack is None:
            return factors, zeros
        factors = factors.masked_fill(~(factors * self._peak <= self._limits.max), 0.0)
        return factors, int((factors == 0.0).sum())


def _lengths(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return norms


def _formed(
    uses: list[Use], managed: Container[Tensor], rows: int, dtype: torch.dtype
) -> tuple[dict[Tensor, Tensor], list[LinearUse], dict[Tensor, list[EmbeddingUse]]]:
    """Per-sample gradients [rows, numel] of the parameters that a module other than a linear layer or an embedding
    used, and the uses that have nothing to do with those.

    What linear layers and embeddings add to such a parameter is formed as well, since per-sample gradients are summed
    before the norm; and of a parameter that is both a linear layer's and an embedding's.
    """
    formed: dict[Tensor, Tensor] = {}

    def add(p: Tensor | None, g: Tensor) -> None:
        if p is not None and p in managed:
            formed[p] = formed[p] + g if p in formed else g

    for use in uses:
        if isinstance(use, (Call, FormulaUse)):
            of = use.unit.formed(use, rows) if isinstance(use, Call) else use.formed(managed, rows, dtype)
            for p, g in of.items():
                add(p, g)
    linear = [u for u in uses if isinstance(u, LinearUse)]
    shared = {*formed, *(p for u in linear for p in (u.weight, u.bias))}
    embeddings: dict[Tensor, list[EmbeddingUse]] = {}
    for use in uses:
        if isinstance(use, EmbeddingUse) and use.weight in managed:
            use.check(rows, dtype, 1)
            if use.weight in shared:
                add(use.weight, _dense(*use.positions(), rows, use.weight))
            else:
                embeddings.setdefault(use.weight, []).append(use)
    # A layer of which one parameter is formed has the other formed too, which further layers may share.
    while touched := [u for u in linear if u.weight in formed or u.bias in formed]:
        linear = [u for u in linear if u not in touched]
        for use in touched:
            use.check(rows, dtype, 2)
            a, b = (x.reshape(rows, -1, x.shape[-1]) for x in (use.a, use.b))
            add(use.weight, torch.bmm(b.transpose(1, 2), a).flatten(1))
            add(use.bias, b.sum(1))
    return formed, linear, embeddings


# Per-sample gradients of a table of embeddings: record [U], which of the table's rows [U], and the gradient [U, E].
Rows = tuple[Tensor, Tensor, Tensor]


def _merged(uses: list[EmbeddingUse]) -> Rows:
    """Each row of the table once for a record that used it several times: what it adds is summed before the norm."""
    record, index, b = (torch.cat(parts) for parts in zip(*(use.positions() for use in uses), strict=True))
    size = len(uses[0].weight)
    keys, which = torch.unique(record * size + index, return_inverse=True)
    if len(keys) == len(record):
        return record, index, b
    return keys // size, keys % size, torch.zeros(len(keys), b.shape[1], dtype=b.dtype).index_add_(0, which, b)


def _dense(record: Tensor, index: Tensor, b: Tensor, rows: int, weight: Tensor) -> Tensor:
    g = torch.zeros(rows, *weight.shape, dtype=b.dtype)
    return g.index_put_((record, index), b, accumulate=True).flatten(1)


def _group(
    uses: list[LinearUse], managed: Container[Tensor], rows: int, dtype: torch.dtype
) -> tuple[dict[Tensor, tuple[Tensor, Tensor]], dict[Tensor, Tensor], dict[Tensor, Tensor]]:
    """(a, b) of each weight, the bias that was used with it every time, and b of each bias without such a weight.

    Joined over all uses: the per-sample gradients of a parameter used more than once are summed before the norm.
    """
    weight_uses: dict[Tensor, list[LinearUse]] = {}
    bias_uses: dict[Tensor, list[LinearUse]] = {}
    for use in uses:
        use.check(rows, dtype, 2)
        if use.weight in managed:
            weight_uses.setdefault(use.weight, []).append(use)
        if use.bias is not None and use.bias in managed:
            bias_uses.setdefault(use.bias, []).append(use)
    weights = {p: (_join([u.a for u in of]), _join([u.b for u in of])) for p, of in weight_uses.items()}
    paired, lone = {}, {}
    for p, of in bias_uses.items():
        if weight_uses.get(of[0].weight) == of:
            paired[of[0].weight] = p
        else:
            lone[p] = _join([u.b for u in of])
    return weights, paired, lone


def _join(parts: list[Any]) -> Tensor:
    """[B, ..., F] of each use -> [B, F], or [B, T, F] with the positions of all uses one after the other."""
    if len(parts) == 1 and parts[0].dim() == 2:
        joined: Tensor = parts[0]
    else:
        joined = torch.cat([x.reshape(x.shape[0], -1, x.shape[-1]) for x in parts], dim=1)
    return joined.contiguous()


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
