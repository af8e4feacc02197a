"""The rule of nn.MultiheadAttention: its projections are linear layers that it calls without their being modules.

torch's forward hands the weights, or rows of them, to `torch.nn.functional.linear`. While the module is called, that
name is ours, so that each projection is seen with its input and the gradient of its output; attention itself is left to
torch, with whatever kernel, mask and dropout it takes.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Container
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdp.errors import PrivacyError
from fastdp.gradients import Block, PerSample, are_small
from fastdp.layers import Hooks
from fastdp.uses import LayerUse, products

LINEAR: Final = F.linear  # torch's own


@dataclasses.dataclass(eq=False)
class ProjectionUse(LayerUse):
    """Of rows of a weight and of a bias: a [B, T, I], b [B, T, O]."""

    weight: Block | None
    bias: Block | None

    def made(self, managed: Container[Tensor], rows: int, dtype: torch.dtype) -> list[PerSample]:
        return products(self.weight, self.bias, *self.operands(rows, dtype, 3), managed)

    def fits(self, rows: int) -> bool:
        return are_small(self.a, self.b)


class AttentionHooks(Hooks):
    """Of one nn.MultiheadAttention without bias_k and bias_v."""

    _is_entered = False

    def before(self, module: nn.Module, args: Any) -> None:
        super().before(module, args)
        if module is self.module and not self.recorder.paused and torch.is_grad_enabled():
            self._records: int | None = None  # of the call that begins: its first projection tells
            _enter(self._linear)
            self._is_entered = True

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._is_entered and not self.recorder.paused and self.has_begun(module):
            self._is_entered = False
            _leave()
        return super().after(module, args, kwargs, output)

    def watch(self, args: Any, kwargs: Any, output: Any) -> None:
        if self._records is None:
            raise PrivacyError(f"{self.name}: MultiheadAttention did not run as torch's does")

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """torch's, of x [T, B, I], or [T * B, I] after attention."""
        y = LINEAR(x, weight, bias)
        if self._records is None:
            self._records = x.shape[1]
        found, of_bias = self._block(weight), self._block(bias)
        if found is None and of_bias is None:
            return y
        y = self.attached(y)
        a, records = _by_record(x.detach(), self._records), self._records
        recorder, versions = self.recorder, [(x.detach(), x._version)]
        use = ProjectionUse(self.name, recorder.place, versions, self.module, a, found, of_bias)
        self.on_gradient(y, lambda b: recorder.keep(use, _by_record(b, records)))
        return y

    def _block(self, x: Tensor | None) -> Block | None:
        """Of which managed parameter x is, or is some of the rows."""
        if x is None:
            return None
        for p in self.managed:
            begin = x.storage_offset() - p.storage_offset()  # parameters may lie in one storage
            inside = 0 <= begin <= p.numel() - x.numel() and x.stride() == p.stride()
            if inside and x.untyped_storage().data_ptr() == p.untyped_storage().data_ptr():
                return p, begin // p.stride(0), len(x)
        return None


def _by_record(x: Tensor, records: int) -> Tensor:
    """[T, B, F] or [T * B, F] -> [B, T, F]"""
    return x.view(-1, records, x.shape[-1]).transpose(0, 1)


class _Calls(threading.local):
    """What F.linear is on this thread, in the calls that are going on."""

    def __init__(self) -> None:
        self.instead: list[Callable[..., Tensor]] = []


_calls, _lock = _Calls(), threading.Lock()
_count = 0  # of calls that are going on, on any thread
_fast_path = True  # torch's setting before them: a kernel without F.linear, in eval() where nothing requires a gradient


def _linear(*args: Any, **kwargs: Any) -> Tensor:
    return (_calls.instead[-1] if _calls.instead else LINEAR)(*args, **kwargs)


def _enter(instead: Callable[..., Tensor]) -> None:
    global _count, _fast_path
    with _lock:
        if _count == 0:
            _fast_path = torch.backends.mha.get_fastpath_enabled()
        _count += 1
        F.linear = _linear
        torch.backends.mha.set_fastpath_enabled(False)
    _calls.instead.append(instead)


def _leave() -> None:
    global _count
    _calls.instead.pop()
    with _lock:
        _count -= 1
        if _count == 0:
            F.linear = LINEAR
            torch.backends.mha.set_fastpath_enabled(_fast_path)
