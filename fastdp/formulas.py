"""Per-sample gradients by a layer's own formula, of its input a and the gradient b of its output, records first.

These layers treat records one by one whatever their options are, so nothing is run again and nothing need be checked.
a and b are of one type, float32 or float64. Each formula gives [B, ...] for the weight and for the bias, in the shape
of the parameter; None for what is not wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gradients = tuple[Tensor | None, Tensor | None]
Formula = Callable[[Any, Tensor, Tensor, bool, bool], Gradients]  # module, a, b, weight and bias wanted


def convolution(m: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor, b: Tensor, weight: bool, bias: bool) -> Gradients:
    """a [B, C, ...], b [B, O, ...]. vmap makes one grouped convolution of all, of as many flops as that of their sum
    (Rochette, Manoel & Tramel 2019, arXiv:1912.06015)."""
    found = None
    if weight:
        spatial = a.dim() - 2
        padding = m.padding
        if m.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
            a, padding = F.pad(a, m._reversed_padding_repeated_twice, mode), (0,) * spatial
        w = m.weight.detach().to(a.dtype)

        def one(x: Tensor, g: Tensor) -> Tensor:
            how = m.stride, padding, m.dilation, False, [0] * spatial, m.groups
            backward = torch.ops.aten.convolution_backward
            grad: Tensor = backward(g.unsqueeze(0), x.unsqueeze(0), w, None, *how, [False, True, False])[1]
            return grad

        found = torch.func.vmap(one)(a, b)
    return found, b.flatten(2).sum(2) if bias else None


def layer_norm(m: nn.LayerNorm | nn.RMSNorm, a: Tensor, b: Tensor, weight: bool, bias: bool) -> Gradients:
    """a, b [B, ..., *normalized_shape]."""
    shape = m.normalized_shape
    found = None
    if weight:
        normalised = (
            F.layer_norm(a, shape, eps=m.eps) if isinstance(m, nn.LayerNorm) else F.rms_norm(a, shape, eps=m.eps)
        )
        found = _over_positions(b * normalised, len(shape))
    return found, _over_positions(b, len(shape)) if bias else None


def _over_positions(x: Tensor, kept: int) -> Tensor:
    """[B, ..., *shape] -> [B, *shape], of `kept` dimensions."""
    return x.reshape(len(x), math.prod(x.shape[1 : x.dim() - kept]), *x.shape[x.dim() - kept :]).sum(1)


def group_norm(m: nn.GroupNorm, a: Tensor, b: Tensor, weight: bool, bias: bool) -> Gradients:
    """a, b [B, C, ...]."""
    found = None
    if weight:
        product = b * F.group_norm(a, m.num_groups, eps=m.eps)
        found = product.flatten(2).sum(2) if product.dim() > 2 else product
    # A loss that is a sum has an expanded gradient, which is not packed.
    return found, (b.flatten(2).sum(2) if b.dim() > 2 else b.contiguous()) if bias else None


# How many dimensions a batch has, at least: with one less, its first dimension would not be records.
FORMULAS: Final[dict[type[nn.Module], tuple[Formula, Callable[[Any], int]]]] = {
    nn.Conv1d: (convolution, lambda m: 3),
    nn.Conv2d: (convolution, lambda m: 4),
    nn.Conv3d: (convolution, lambda m: 5),
    nn.LayerNorm: (layer_norm, lambda m: 1 + len(m.normalized_shape)),
    nn.RMSNorm: (layer_norm, lambda m: 1 + len(m.normalized_shape)),
    nn.GroupNorm: (group_norm, lambda m: 2),
}
