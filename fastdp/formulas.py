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

from fastdp import native
from fastdp.device import kernels

Gradients = tuple[Tensor | None, Tensor | None]
Formula = Callable[[Any, Tensor, Tensor, bool, bool], Gradients]  # module, a, b, weight and bias wanted


def convolution(m: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor, b: Tensor, weight: bool, bias: bool) -> Gradients:
    """a [B, C, ...], b [B, O, ...]."""
    found, b = None, b.contiguous()
    if weight:
        padding = m.padding
        if m.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
            a, padding = F.pad(a, m._reversed_padding_repeated_twice, mode), (0,) * len(m.stride)
        found = a.new_empty(len(a), *m.weight.shape)
        kernels(a).convolution_gradients(a.contiguous(), b, m.groups, m.stride, padding, m.dilation, found)
    return found, b.flatten(2).sum(2) if bias else None


def layer_norm(m: nn.LayerNorm | nn.RMSNorm, a: Tensor, b: Tensor, weight: bool, bias: bool) -> Gradients:
    """a, b [B, ..., *normalized_shape]."""
    n = math.prod(m.normalized_shape)
    eps = torch.finfo(a.dtype).eps if m.eps is None else m.eps  # RMSNorm's
    a, b = (
        x.reshape(len(x), math.prod(x.shape[1 : x.dim() - len(m.normalized_shape)]), n).contiguous() for x in (a, b)
    )
    found = _empty(a, n, weight), _empty(a, n, bias)
    kernels(a).layer_norm_gradients(a, b, eps, isinstance(m, nn.LayerNorm), *found)
    return found


def group_norm(m: nn.GroupNorm, a: Tensor, b: Tensor, weight: bool, bias: bool) -> Gradients:
    """a, b [B, C, ...]."""
    a, b = (x.reshape(*x.shape[:2], math.prod(x.shape[2:])).contiguous() for x in (a, b))
    found = _empty(a, m.num_channels, weight), _empty(a, m.num_channels, bias)
    kernels(a).group_norm_gradients(a, b, m.num_groups, m.eps, *found)
    return found


def _empty(a: Tensor, n: int, wanted: bool) -> Tensor | None:
    return a.new_empty(len(a), n, dtype=native.sum_dtype(a.dtype)) if wanted else None


# How many dimensions a batch has, at least: with one less, its first dimension would not be records.
FORMULAS: Final[dict[type[nn.Module], tuple[Formula, Callable[[Any], int]]]] = {
    nn.Conv1d: (convolution, lambda m: 3),
    nn.Conv2d: (convolution, lambda m: 4),
    nn.Conv3d: (convolution, lambda m: 5),
    nn.LayerNorm: (layer_norm, lambda m: 1 + len(m.normalized_shape)),
    nn.RMSNorm: (layer_norm, lambda m: 1 + len(m.normalized_shape)),
    nn.GroupNorm: (group_norm, lambda m: 2),
}
