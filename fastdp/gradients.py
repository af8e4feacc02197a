"""What is known of a parameter's per-sample gradients, and what clipping needs of them: norms, and the weighted sum.

Three kinds: formed, one after the other; the products of inputs and output gradients that they are sums of, for linear
layers; and the rows that are not zero, for embeddings. `of_parameters` brings what all uses of a parameter say into one
of them, since the per-sample gradients of a parameter used more than once are summed before the norm.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdp.device import add_rows, kernels, on_gpu, zeros_in
from fastdp.precision import wide

# Output gradients are scaled so many numbers at once, 256 KiB of float32, or 256 rows: less memory, and in the cache.
SCALED_AT_ONCE = 1 << 16
SCALED_AT_ONCE_ON_GPU = 1 << 26  # where a launch costs as much as a MiB, and caches are out of reach

CPU = torch.device("cpu")

# Of each parameter, in its shape: where sums are kept.
Views = Mapping[Tensor, Tensor]


# A parameter, the first of the rows that are meant, and how many.
Block = tuple[Tensor, int, int]


def rows_in(p: Tensor) -> int:
    return p.shape[0] if p.dim() else 1


def whole(p: Tensor | None) -> Block | None:
    return None if p is None else (p, 0, rows_in(p))


class Scratch:
    """Memory kept from step to step, for one use after the other."""

    def __init__(self, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self._kept = torch.empty(0, dtype=dtype, device=device)

    def rows(self, count: int, width: int) -> Tensor:
        if self._kept.numel() < count * width:
            # A quarter more than asked for: Poisson batches grow past their first size again and again.
            self._kept = self._kept.new_empty(count * width * 5 // 4)
        return self._kept[: count * width].view(count, width)


class Norms:
    """Squared norms of a group of parameters, and what a record may gain beyond its norm by rounding."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.sq = torch.zeros(rows, dtype=torch.float64, device=device)
        self._dtype, self._limits = dtype, torch.finfo(dtype)
        # Of sums of products a_t b_t over positions t, whose terms may cancel but for their rounding: the sum of their
        # lengths, the largest b_t, and sqrt(O) sum |a_t|, of which the kernel loses a part where b_t is subnormal.
        self._bounds: Tensor | None = None
        self._roundings = 0.0  # of a sum over positions, at most, in halves of an epsilon
        self._gram_roundings = 0.0  # of a norm by Gram matrices, in double

    def add(self, parts: Iterable[PerSample]) -> None:
        """Of all parts. Products of one position come together: a call each is a tenth of a small model's step."""
        together: dict[torch.dtype, list[tuple[Tensor, Tensor, bool]]] = {}
        for part in parts:
            if isinstance(part, Product) and part.a.dim() == 2:
                together.setdefault(part.a.dtype, []).append((part.a, part.b, part.bias is not None))
            else:
                part.add_sq_norms(self)
        for products in together.values():
            kernels(self.sq).add_linear_sq_norms(products, self.sq)

    def add_sequence(self, a: Tensor, b: Tensor) -> None:
        """Of sum_t b_t a_t^T, or its transpose; a [B, T, I], b [B, T, O], b being what is scaled by the factors."""
        if self._bounds is None:
            self._bounds = self.sq.new_zeros(len(self.sq), 3)
        positions = a.shape[1]
        # Each term of a sum of T is rounded at most T times, in whatever order; and the factor, and its product with b.
        self._roundings = max(self._roundings, positions + 4.0)
        # <a_t, a_u> <b_t, b_u>: I, O and one roundings, and those of sums over tiles of 4 by 4 or more of them.
        self._gram_roundings = max(self._gram_roundings, a.shape[2] + b.shape[2] + positions**2 / 16 + 32.0)
        kernels(self.sq).add_linear_sq_norms([(a, b, False)], self.sq, self._bounds)

    def factors(self, scale: float, max_grad_norm: float, gamma: float | None) -> tuple[Tensor, int]:
        """scale * min(1, C / (scale * norm)) of each record, float64 [B], and how many of them are 0.

        With a gamma, of automatic clipping: scale * C / (scale * norm + gamma).
        """
        of = self._widened(max_grad_norm), self._dtype, scale, max_grad_norm, gamma
        factors: Tensor
        factors, zeros = kernels(self.sq).clip_factors(*of)
        if self._bounds is None:
            return factors, zeros
        # 0 where a product may be too large: the kernel would drop single positions.
        factors.masked_fill_(~(factors * self._bounds[:, 1] <= self._limits.max), 0.0)
        return factors, zeros_in(factors)

    def _widened(self, max_grad_norm: float) -> Tensor:
        """Squares of norms that leave room for all that, or are infinite: errors are a part of `slack`, the sum of the
        lengths of the terms (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1)."""
        if self._bounds is None or max_grad_norm == 0.0:
            return self.sq
        slack, _, inputs = self._bounds.unbind(1)
        room = (1.0 - self._limits.tiny / max_grad_norm * inputs).clamp_min(0.0)
        norm = (self.sq + self._gram_roundings * 2.0**-53 * slack.square()).sqrt()
        return ((norm + self._roundings * self._limits.eps / 2 * slack) / room).square()


def are_small(a: Tensor, b: Tensor) -> bool:
    """Whether gradients that are sums over positions, I O numbers a record, take no more memory than a and b.

    Then they also take less time: the same multiplications as the weighted sum, which is two passes over them then,
    where Gram matrices take T^2 (I + O) / 2 beside it (T = 64, I = O = 128 on AVX2: 1.0 ms for 3.1 of 64 records).
    """
    return a.dim() > 2 and a.shape[0] * a.shape[-1] * b.shape[-1] <= a.numel() + b.numel()


@dataclasses.dataclass(eq=False)
class PerSample:
    """The per-sample gradients of `count` rows of a parameter from row `start` on; those of its other rows are 0."""

    p: Tensor
    start: int
    count: int

    def add_sq_norms(self, norms: Norms) -> None:
        raise NotImplementedError

    def add_to(self, views: Views, factors: Tensor, zeros: int, scratch: Scratch, add: bool) -> None:
        """Overwrite these rows in the parameter's view with the sum of factors[i] * gradient i, or add it to them.

        factors: float64 [B], of which `zeros` are 0: those records' gradients may be NaN.
        """
        raise NotImplementedError

    def formed(self) -> Tensor:
        """[B, elements of these rows]."""
        raise NotImplementedError

    def expanded(self) -> Formed:
        """Formed, with the parameter's other rows."""
        g, count = self.formed(), rows_in(self.p)
        if self.count == count:
            return Formed(self.p, 0, count, g)
        every = g.new_zeros(len(g), *self.p.shape)
        every[:, self.start : self.start + self.count] = g.view(len(g), self.count, *self.p.shape[1:])
        return Formed(self.p, 0, count, every.flatten(1))

    def blocks(self) -> list[PerSample]:
        """This, or the parts that it does in one, each of rows of one parameter."""
        return [self]

    @staticmethod
    def joined(of: list[Any]) -> PerSample:
        """What all of the same kind and rows say together."""
        raise NotImplementedError

    def rows_of(self, views: Views) -> Tensor:
        view = views[self.p]
        return view if self.count == rows_in(self.p) else view[self.start : self.start + self.count]


@dataclasses.dataclass(eq=False)
class Formed(PerSample):
    """g [B, elements of these rows], packed."""

    g: Tensor

    def add_sq_norms(self, norms: Norms) -> None:
        norms.sq += kernels(self.g).sq_norms(self.g)

    def add_to(self, views: Views, factors: Tensor, zeros: int, scratch: Scratch, add: bool) -> None:
        kernels(self.g).sum_rows(self.formed(), factors, self.rows_of(views).view(-1), add)

    def formed(self) -> Tensor:
        return wide(self.g)

    @staticmethod
    def joined(of: list[Formed]) -> Formed:
        first = of[0]
        if len(of) == 1:
            return first
        return Formed(first.p, first.start, first.count, functools.reduce(torch.add, (part.formed() for part in of)))


@dataclasses.dataclass(eq=False)
class Product(PerSample):
    """sum_t b_it a_it^T of record i: a [B, I] and b [B, O], or a [B, T, I] and b [B, T, O]; O = count.

    The norms come without the gradients ("ghost norms"), the weighted sum is one matrix product, (factor * b)^T a.
    bfloat16 is widened where it is used, one layer at a time.
    """

    a: Tensor
    b: Tensor
    bias: Formed | None = None  # of which b [B, O] is the gradient: normed and summed in the passes over b
    beside: tuple[Tensor, ...] = ()  # parameters [O, ...] whose inputs follow those of p in a: of the same b

    @property
    def _scales_a(self) -> bool:
        """What the factors are multiplied to: the narrower one, of sequences. Of b, the sum is the bias's."""
        return self.a.dim() == 3 and self.a.shape[2] < self.b.shape[2]

    def add_sq_norms(self, norms: Norms) -> None:
        """Of sequences; `Norms.add` has those of single positions."""
        self.a, self.b = (x if x.stride(-1) == 1 else x.contiguous() for x in (self.a, self.b))
        norms.add_sequence(*((self.b, self.a) if self._scales_a else (self.a, self.b)))

    def add_to(self, views: Views, factors: Tensor, zeros: int, scratch: Scratch, add: bool) -> None:
        scaled, other = (self.a, self.b) if self._scales_a else (self.b, self.a)
        if zeros:  # selected, not multiplied by 0: it may hold NaN too
            other = other.masked_fill((factors == 0.0).view(-1, *[1] * (other.dim() - 1)), 0.0)
        if other.dim() == 3:
            factors = factors.unsqueeze(1).expand(other.shape[:2])
            if other.transpose(0, 1).is_contiguous():  # attention's: positions first
                scaled, other, factors = (x.transpose(0, 1) for x in (scaled, other, factors))
        rows = factors.numel()
        # Of one size: a product of a few rows more would take as long to add to the sum.
        at_once = SCALED_AT_ONCE_ON_GPU if on_gpu(scaled) else SCALED_AT_ONCE
        pieces = max(1, round(rows / max(256, at_once // max(1, scaled.shape[-1]))))
        pieces = min(pieces, max(1, len(scaled)))
        ends = [len(scaled) * i // pieces for i in range(pieces + 1)]
        for start, end in itertools.pairwise(ends):
            piece = slice(start, end)
            self._add_rows(scaled[piece], other[piece], factors[piece], views, scratch, add or start > 0)

    def _add_rows(self, x: Tensor, other: Tensor, factors: Tensor, views: Views, scratch: Scratch, add: bool) -> None:
        x, other = wide(x), wide(other).flatten(0, -2)
        scaled = scratch.rows(other.shape[0], x.shape[-1])
        sums = None if self.bias is None else self.bias.rows_of(views)
        part = torch.empty_like(sums) if sums is not None and add else sums
        kernels(x).scale_rows(x, factors.reshape(-1).contiguous(), scaled, part)
        if sums is not None and part is not None and add:
            sums += part
        a, b = (scaled, other) if self._scales_a else (other, scaled)
        outs = [self.rows_of(views), *(views[p] for p in self.beside)]
        for out, inputs in zip(outs, self._inputs(a), strict=True):
            if add:
                out.addmm_(b.t(), inputs)
            else:
                torch.mm(b.t(), inputs, out=out)

    def _inputs(self, a: Tensor) -> Sequence[Tensor]:
        """Of each parameter."""
        return a.split([p.shape[1] for p in (self.p, *self.beside)], -1) if self.beside else [a]

    def blocks(self) -> list[PerSample]:
        if self.bias is None and not self.beside:
            return [self]
        inputs = zip((self.p, *self.beside), self._inputs(self.a), strict=True)
        blocks: list[PerSample] = [Product(p, self.start, self.count, a, self.b) for p, a in inputs]
        return blocks if self.bias is None else [*blocks, self.bias]

    def formed(self) -> Tensor:
        a, b = wide(self.a), wide(self.b)
        if a.dim() == 2:
            return torch.bmm(b.unsqueeze(2), a.unsqueeze(1)).flatten(1)
        return torch.bmm(b.transpose(1, 2), a).flatten(1)

    @staticmethod
    def joined(of: list[Product]) -> Product | Formed:
        """With the positions of all uses one after the other."""
        joined = of[0]
        if len(of) > 1:
            a, b = _join([u.a for u in of]), _join([u.b for u in of])
            joined = Product(joined.p, joined.start, joined.count, a, b)
        if not joined.beside and are_small(joined.a, joined.b):
            return Formed(joined.p, joined.start, joined.count, joined.formed())
        return joined


@dataclasses.dataclass(eq=False)
class Rows(PerSample):
    """Of a table of embeddings: at each position, the record [P] and the row [P] that it used, and b [P, E]."""

    batch: int
    record: Tensor
    index: Tensor
    b: Tensor

    def add_sq_norms(self, norms: Norms) -> None:
        add_rows(norms.sq, self.record, kernels(self.b).sq_norms(self.b))

    def add_to(self, views: Views, factors: Tensor, zeros: int, scratch: Scratch, add: bool) -> None:
        view = self.rows_of(views)
        if not add:
            view.zero_()
        scaled = scratch.rows(*self.b.shape)
        kernels(self.b).scale_rows(wide(self.b), factors[self.record], scaled, None)
        add_rows(view, self.index, scaled)

    def formed(self) -> Tensor:
        b = wide(self.b)
        g = b.new_zeros(self.batch, *self.p.shape)
        return g.index_put_((self.record, self.index), b, accumulate=True).flatten(1)

    @staticmethod
    def joined(of: list[Rows]) -> Rows:
        """A row that a record used several times comes once: what the uses add is summed before the norm."""
        first, size = of[0], len(of[0].p)
        record, index, b = (torch.cat([getattr(u, name) for u in of]) for name in ("record", "index", "b"))
        keys = record * size + index
        if on_gpu(b):
            keys, b = _added_up(keys, wide(b), first.batch * size)
            return Rows(first.p, first.start, first.count, first.batch, keys // size, keys % size, b)
        keys, which = torch.unique(keys, return_inverse=True)
        if len(keys) < len(record):
            record, index = keys // size, keys % size
            b = torch.zeros(len(keys), b.shape[1], dtype=wide(b).dtype).index_add_(0, which, wide(b))
        return Rows(first.p, first.start, first.count, first.batch, record, index, b)


def _added_up(keys: Tensor, b: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Rows of b [P, E] of one key in 0..room-1 summed, in their order: the different keys, and sums, then zeros up to
    P. Unlike torch.unique, which tells how many there are, this does not wait for a GPU."""
    keys, order = torch.sort(keys, stable=True)
    begins = torch.ones_like(keys)
    begins[1:] = keys[1:] != keys[:-1]
    place = begins.cumsum(0) - 1
    sums = add_rows(torch.zeros_like(b), place, b[order])
    # The zeros' keys are spread: rows of one key are added up by one warp, one after the other.
    spread = torch.arange(len(keys), device=keys.device) % max(1, room)
    return spread.scatter_(0, place, keys), sums


def of_parameters(parts: Iterable[PerSample]) -> list[PerSample]:
    """What uses say of each parameter, brought together: no two of the result are about the same rows of one."""
    parts = list(parts)
    blocks = [block for part in parts for block in part.blocks()]
    if len({id(block.p) for block in blocks}) == len(blocks):
        return [part.joined([part]) for part in parts]
    uses: dict[Tensor, list[PerSample]] = {}
    for part in parts:
        for block in part.blocks():
            uses.setdefault(block.p, []).append(block)
    return [joined for of in uses.values() for joined in _joined(of)]


def _joined(of: list[PerSample]) -> list[PerSample]:
    """Of one parameter."""
    blocks: dict[tuple[int, int], list[Any]] = {}
    for part in of:
        blocks.setdefault((part.start, part.count), []).append(part)
    ends = sorted((start, start + count) for start, count in blocks)
    if any(end > start for (_, end), (start, _) in itertools.pairwise(ends)):
        blocks = {ends[0]: of}  # rows of one use are a part of another's
    return [_one(parts) for parts in blocks.values()]


def _one(parts: list[Any]) -> PerSample:
    kinds = {(type(part), part.start, part.count) for part in parts}
    if len(kinds) > 1:
        parts = [part.expanded() for part in parts]
    joined: PerSample = parts[0].joined(parts)
    return joined


def _join(parts: list[Tensor]) -> Tensor:
    """[B, (T,) F] of each use -> [B, T, F] with the positions of all one after the other."""
    return torch.cat([x.unsqueeze(1) if x.dim() == 2 else x for x in parts], dim=1)
