"""What is kept of one call of a layer, and what it says of per-sample gradients when the backward has come by."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from fastdp.device import on_gpu
from fastdp.errors import PrivacyError
from fastdp.formulas import FORMULAS
from fastdp.gradients import Block, Formed, PerSample, Product, Rows, are_small, whole
from fastdp.precision import wide, without_autocast


@dataclasses.dataclass(eq=False)
class Use:
    """One call of a layer in a forward, and b, when the backward has come by."""

    layer: str
    batch: int | None
    versions: list[tuple[Tensor, int]]
    b: Any = dataclasses.field(init=False)
    is_spent: bool = dataclasses.field(default=False, init=False)

    def check_unchanged(self) -> None:
        if any(x._version != version for x, version in self.versions):
            raise PrivacyError(f"{self.layer}: its input or output gradient was changed in place after it was used")

    def parts(self, managed: Container[Tensor], rows: int, dtype: torch.dtype) -> list[PerSample]:
        """What this call says of the per-sample gradients of the `managed` parameters; PrivacyError if it is not exact.

        rows: records in the batch; dtype: of the parameters.
        """
        raise NotImplementedError

    def settle(self, managed: Container[Tensor], rows: int, dtype: torch.dtype) -> None:
        """During the backward: make parts() now if they take no more memory than what they are made of, and let go of
        that, which the graph's hooks, and the user's loss through them, would keep alive."""

    def spend(self) -> None:
        """Let all tensors go: the graph's hooks, and the user's loss through them, keep this use alive."""
        self.is_spent, self.versions = True, []
        for name in [name for name in vars(self) if name not in ("layer", "batch", "versions", "is_spent")]:
            delattr(self, name)

    def inputs(self, rows: int) -> list[Tensor]:
        """The input tensors; records first in those that have one in each row."""
        raise NotImplementedError

    def gradients(self, rows: int) -> list[Tensor]:
        """Of the outputs, records first."""
        raise NotImplementedError


@dataclasses.dataclass(eq=False)
class LayerUse(Use):
    """One call of a layer of one input a and one output, of which b is the gradient; records first."""

    module: nn.Module
    a: Tensor
    b: Tensor = dataclasses.field(init=False)
    _settled: list[PerSample] | None = dataclasses.field(default=None, init=False)

    def parts(self, managed: Container[Tensor], rows: int, dtype: torch.dtype) -> list[PerSample]:
        return self.made(managed, rows, dtype) if self._settled is None else self._settled

    def settle(self, managed: Container[Tensor], rows: int, dtype: torch.dtype) -> None:
        if self.fits(rows):
            with without_autocast():
                self._settled = self.made(managed, rows, dtype)
            self.versions = []
            del self.a, self.b

    def made(self, managed: Container[Tensor], rows: int, dtype: torch.dtype) -> list[PerSample]:
        """What parts() gives."""
        raise NotImplementedError

    def fits(self, rows: int) -> bool:
        """Whether that is `Formed`, and no larger than a and b."""
        return False

    def inputs(self, rows: int) -> list[Tensor]:
        return [self.a]

    def gradients(self, rows: int) -> list[Tensor]:
        return [self.b]

    def check(self, rows: int, dtype: torch.dtype, dims: int) -> None:
        """Raise PrivacyError unless the shapes and types are those of one record a row, in the parameters' type."""
        if self.a.dim() < dims or self.a.shape[0] != rows:
            raise PrivacyError(
                f"{self.layer}: the first dimension of its input is not the batch's records, one each: "
                "batch_first=True where it has one, the whole batch, `positions.expand(len(x), -1)` for positions that "
                "all share"
            )
        narrow = torch.bfloat16 if dtype == torch.float32 else dtype
        if any(x.dtype not in (dtype, narrow) for x in (self.a, self.b) if x.is_floating_point()):
            bound = "float32 or bfloat16" if dtype == torch.float32 else f"{dtype} as its parameters"
            raise PrivacyError(f"{self.layer}: input {self.a.dtype}, output gradient {self.b.dtype}: must be {bound}")

    def operands(self, rows: int, dtype: torch.dtype, dims: int) -> tuple[Tensor, Tensor]:
        """a and b, checked. An a of float32 whose output is bfloat16 was rounded by autocast, and so is it here."""
        self.check(rows, dtype, dims)
        return (self.a if self.a.dtype == self.b.dtype else self.a.to(self.b.dtype)), self.b


@dataclasses.dataclass(eq=False)
class LinearUse(LayerUse):
    """Of a linear layer: a [B, (T,) I], b [B, (T,) O]."""

    def made(self, managed: Container[Tensor], rows: int, dtype: torch.dtype) -> list[PerSample]:
        a, b = self.operands(rows, dtype, 2)
        weight, bias = (self.module._parameters[key] for key in ("weight", "bias"))
        return products(whole(weight), whole(bias), a, b, managed)

    def fits(self, rows: int) -> bool:
        return are_small(self.a, self.b)


def products(
    weight: Block | None, bias: Block | None, a: Tensor, b: Tensor, managed: Container[Tensor]
) -> list[PerSample]:
    """What b = weight a + bias says of the rows of weight and bias; a [B, ..., I], b [B, ..., O]."""
    a, b = (x.contiguous() if x.dim() == 2 else x.reshape(len(x), -1, x.shape[-1]) for x in (a, b))
    if a.dim() == 3 and a.shape[1] == 1:
        a, b = a.squeeze(1).contiguous(), b.squeeze(1).contiguous()
    of_bias = None
    if bias is not None and bias[0] in managed:
        of_bias = Formed(*bias, b if b.dim() == 2 else wide(b).sum(1))
    if weight is None or weight[0] not in managed:
        return [] if of_bias is None else [of_bias]
    if of_bias is None or b.dim() == 2:
        return [Product(*weight, a, b, of_bias)]
    product = Product(*weight, a, b)
    return [product.joined([product]), of_bias]


@dataclasses.dataclass(eq=False)
class EmbeddingUse(LayerUse):
    """Of nn.Embedding: indices a [B, ...], b [B, ..., E]. A record's gradient has a row for each index that it used."""

    def made(self, managed: Container[Tensor], rows: int, dtype: torch.dtype) -> list[PerSample]:
        assert isinstance(self.module, nn.Embedding)
        weight, padding = self.module.weight, self.module.padding_idx
        if weight not in managed:
            return []
        self.check(rows, dtype, 1)
        record = torch.arange(rows, device=self.a.device).repeat_interleave(self.a[:1].numel())
        index, b = self.a.flatten().long(), self.b.reshape(record.numel(), self.b.shape[-1])
        if padding is not None and on_gpu(b):  # which is not waited for to learn how many are left
            b = b.masked_fill((index == padding).unsqueeze(1), 0.0)
        elif padding is not None:
            counts = index != padding
            record, index, b = record[counts], index[counts], b[counts]
        return [Rows(weight, 0, len(weight), rows, record, index, b)]


@dataclasses.dataclass(eq=False)
class FormulaUse(LayerUse):
    """Of a layer whose per-sample gradients have a formula."""

    def made(self, managed: Container[Tensor], rows: int, dtype: torch.dtype) -> list[PerSample]:
        formula, dims = FORMULAS[type(self.module)]
        a, b = self.operands(rows, dtype, dims(self.module))
        parameters = [self.module._parameters.get(key) for key in ("weight", "bias")]
        wanted = [p is not None and p in managed for p in parameters]
        with torch.no_grad():
            gradients = formula(self.module, wide(a), wide(b), *wanted)
        return [
            Formed(p, 0, len(p), g.reshape(rows, -1))
            for p, g in zip(parameters, gradients, strict=True)
            if p is not None and g is not None
        ]

    def fits(self, rows: int) -> bool:
        sizes = [p.numel() for p in self.module._parameters.values() if p is not None]
        return rows * sum(sizes) <= self.a.numel() + self.b.numel()
