"""Half of a batch's records replaced by synthetic ones, and what must not move of the other half."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdp.errors import PrivacyError
from fastdp.persample import Call
from fastdp.precision import coarsest
from fastdp.uses import LayerUse, Use

# Rows of a matrix product may be rounded differently when another row changes. With half of the records replaced, a
# coupling moves the others by a sizeable part of themselves. bfloat16 makes of such a difference one of an epsilon,
# 2^-7, in some elements, and a layer further down two.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2.0**-6}

# Of the largest element of all, in epsilons.
ROUNDING = {torch.float64: 8, torch.float32: 8, torch.bfloat16: 0.5}

# Synthetic records are multiples of the ones they replace: mild ones, and ones that a maximum would notice.
STRENGTHS = (-0.5, -8.0, -0.5, -8.0)


def compare(base: list[Use], other: list[Use], same: Tensor) -> None:
    if [u.layer for u in base] != [u.layer for u in other]:
        raise PrivacyError("module: which layers are used depends on the records")
    rows = len(same)
    each = (coarsest(u.layer, (x.dtype for x in (*u.inputs(rows), *u.gradients(rows)))) for u in base)
    precision = coarsest("module", each)
    for u, v in zip(reversed(base), reversed(other), strict=True):  # in the order of the forward
        for x, y in zip(u.inputs(rows), v.inputs(rows), strict=True):
            has_records = x.dim() > 0 and len(x) == rows
            if not has_records and isinstance(u, LayerUse):
                continue  # refused by step(), by its shape
            if has_records and x.shape == y.shape:  # what records share must not move at all
                x, y = x[same], y[same]
            if x.shape != y.shape or not _close(x, y, precision):
                raise PrivacyError(
                    f"{u.layer}: its input for a record depends on the other records of the batch, "
                    "so clipping one record's gradient does not bound its influence"
                )
    for u, v in zip(base, other, strict=True):
        for x, y in zip(u.gradients(rows), v.gradients(rows), strict=True):
            if len(x) == rows and not _close(x[same], y[same], precision):
                raise PrivacyError(
                    f"{u.layer}: a record's gradient depends on the other records (class weights under a mean, a "
                    "normaliser computed from the data: use reduction='sum' and loss_reduction='sum'; or [B, 1] "
                    "broadcast against [B])"
                )


def compare_half(base: list[Use], smaller: list[Use], rows: int, half: int) -> None:
    """A model that divides by the number of records: without half of them, the others' inputs would be far away."""
    for u, v in zip(base, smaller, strict=False):
        arguments = (tree_leaves(w.arguments if isinstance(w, Call) else w.inputs(rows)) for w in (u, v))
        for x, y in zip(*arguments, strict=False):
            if not isinstance(x, Tensor) or not x.is_floating_point() or u.layer != v.layer:
                continue
            if x.shape[:1] == (rows,) and y.shape == (half, *x.shape[1:]):
                x = x[:half]
                if bool((x - y).abs().max() > (0.05 if x.dtype != torch.bfloat16 else 0.2) * x.abs().max()):
                    raise PrivacyError(
                        f"{u.layer}: its input for a record depends on the number of records in the batch"
                    )


def size(x: Tensor) -> float:
    return x.nan_to_num(0, 0, 0).abs().double().sum().item()


def replace_rows(x: Tensor, changed: Tensor, strength: float) -> Tensor:
    """A copy of a tensor of one row per record with synthetic rows where `changed`, of values that its kind allows."""
    if x.dim() == 0 or x.shape[0] != len(changed):
        return x
    x = x.clone()
    old = x[changed]
    if x.dtype == torch.bool:
        x[changed] = ~old
    elif not x.is_floating_point():  # other records' labels or tokens; where all are alike, the neighbouring one
        columns = x.reshape(len(x), -1)
        if bool((columns == columns.flatten()[:1]).all()):
            x[changed] = torch.where(old == 0, old + 1, old - 1)
        else:  # of its own column: each may have a vocabulary of its own
            shape, generator = (len(old), columns.shape[1]), torch.Generator().manual_seed(int(strength))
            picks = torch.randint(len(columns), shape, generator=generator).to(x.device)
            x[changed] = columns.gather(0, picks).view(old.shape)
    else:
        old = old.nan_to_num(0.0, 0.0, 0.0)
        probabilities = bool((x >= 0).all()) and bool((x <= 1).all())
        x[changed] = 0.75 - 0.5 * old if probabilities else 0.25 + strength * old
    return x


def _close(x: Tensor, y: Tensor, precision: torch.dtype) -> bool:
    if not x.is_floating_point():
        return bool((x == y).all())
    finite = x.isfinite()
    if x.numel() == 0 or not torch.equal(finite, y.isfinite()):
        return x.numel() == 0
    # Hostile records are dropped later; here they only must not spread.
    sizes, differences = x.abs().masked_fill(~finite, 0.0), (x - y).abs().masked_fill(~finite, 0.0)
    # Each column by itself, so that a large one does not hide the others; to rounding of the largest.
    columns = sizes.amax(0) if x.dim() else sizes
    limits = TOLERANCE[precision] * columns + ROUNDING[precision] * torch.finfo(precision).eps * sizes.max()
    alike = precision != torch.bfloat16 or _moved_together(sizes * x.sign(), differences * (y - x).sign()) <= 1
    return alike and bool((differences <= limits).all())


def _moved_together(x: Tensor, by: Tensor) -> float:
    """How far all of x moved in its own direction, as what a loss is divided by moves it, by the limit for bfloat16.

    Class weights of 1, 2, 2 move b by 0.3 / sqrt(records), some hundredths, which the roundings of single elements
    would hide. Those have either sign: 4 epsilons / sqrt(records) for all together.
    """
    along, square = (x.double() * by.double()).sum().item(), x.double().square().sum().item()
    limit = 4 * torch.finfo(torch.bfloat16).eps * square / max(1, len(x) if x.dim() else 1) ** 0.5
    return abs(along) / limit if limit else 0.0
