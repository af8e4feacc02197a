"""Per-sample gradients of linear layers from one backward: what each layer keeps, and what is made of it.

During a forward the managed parameters do not require gradients, so autograd computes no weight gradient. A layer keeps
its input a, and a hook on its output receives the output's gradient b; the gradient of record i is sum_t b_it a_it^T.
"Book-keeping", Bu et al. 2022 (arXiv:2210.00038): the same two matrix products as without privacy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdp.errors import ArgumentError, PrivacyError


@dataclasses.dataclass(eq=False)
class Use:
    """One call of a linear layer: input [B, (T,) I], gradient of the output [B, (T,) O]."""

    layer: str
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    version: int
    batch: int
    b: Tensor | None = None


class Recorder:
    """The uses of one backward, in the order in which their gradients arrived."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.backward: int | None = None  # autograd's number of the backward that is being recorded
        self.batch = 0  # which of the loader's batches is current

    def clear(self) -> None:
        self.uses.clear()
        self.backward = None

    def keep(self, use: Use, b: Tensor) -> None:
        current = torch._C._current_graph_task_id()
        if self.backward is not None and self.backward != current:
            raise PrivacyError(
                f"{use.layer}: a second backward() before optimizer.step(); call step() of the optimizer that "
                "make_private returned, or zero_grad(), first"
            )
        self.backward = current
        if torch.is_grad_enabled():
            raise PrivacyError(f"{use.layer}: backward(create_graph=True) cannot be clipped per record")
        if use.batch != self.batch:
            raise PrivacyError(f"{use.layer}: backward() through a forward of an earlier batch")
        if use.a._version != use.version:
            raise PrivacyError(f"{use.layer}: its input was changed in place after the layer used it")
        self.uses.append(dataclasses.replace(use, b=b))


class _Attach(torch.autograd.Function):
    """The identity, which makes the first layer's output part of the graph though nothing before it is."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[None, None]:
        return None, None


class LinearHooks:
    """Forward hooks of one nn.Linear. A copy of the module, or one loaded from a file, is not managed by them."""

    def __init__(self, name: str, module: nn.Linear, recorder: Recorder) -> None:
        self.name, self.module, self.recorder = name, module, recorder
        self.managed: list[Tensor] = [p for p in (module.weight, module.bias) if p is not None and p.requires_grad]
        self._paused: list[Tensor] = []
        self._anchor = torch.zeros((), requires_grad=True)
        module.register_forward_pre_hook(self.before)
        # First of all: hooks of the user's then act on an output that is already watched.
        module.register_forward_hook(self.after, with_kwargs=True, always_call=True, prepend=True)

    def before(self, module: nn.Module, args: Any) -> None:
        if module is self.module:
            self._paused = [p for p in self.managed if p.requires_grad]
            for p in self._paused:
                p.requires_grad_(False)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor | None) -> Tensor | None:
        if module is not self.module:
            return None
        for p in self._paused:
            p.requires_grad_(True)
        if output is None or not torch.is_grad_enabled():  # an exception in forward; evaluation
            return None
        a = (args[0] if args else kwargs["input"]).detach()
        if not output.requires_grad:
            attached: Tensor = _Attach.apply(output, self._anchor)  # type: ignore[no-untyped-call]
            output = attached
        use = Use(self.name, self.module.weight, self.module.bias, a, a._version, self.recorder.batch)
        keep = self.recorder.keep
        output.register_hook(lambda b: keep(use, b))
        return output

    def __deepcopy__(self, memo: Any) -> LinearHooks:
        return self  # the copied module is another one, for which these hooks do nothing

    def __reduce__(self) -> tuple[Callable[[], Inert], tuple[()]]:
        return Inert, ()


class Inert:
    """What hooks become in a pickled module: nothing."""

    def before(self, *args: Any) -> None: ...

    def after(self, *args: Any) -> None: ...


def check(module: nn.Module) -> None:
    """Raise ArgumentError, naming the module, unless everything with parameters is an nn.Linear."""
    for name, m in module.named_modules():
        where = f"module.{name}" if name else "module"
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            raise ArgumentError(
                where,
                type(m).__name__,
                "removed: it mixes records, and so far no other norm with parameters is supported",
            )
        if type(m) is not nn.Linear and any(p.requires_grad for p in m.parameters(recurse=False)):
            raise ArgumentError(where, type(m).__name__, "an nn.Linear, the only kind with parameters in this version")
        if isinstance(m, torch._dynamo.eval_frame.OptimizedModule) or m._compiled_call_impl is not None:
            raise ArgumentError(where, "a compiled module", "not compiled: hooks do not reach inside")
        if type(m) is nn.Linear and "forward" in vars(m):
            raise ArgumentError(f"{where}.forward", "replaced", "nn.Linear's own")
    managed = [p for p in module.parameters() if p.requires_grad]
    if not managed:
        raise ArgumentError("module", type(module).__name__, "with at least one parameter that requires a gradient")
    for p in managed:
        if p._backward_hooks:
            raise ArgumentError("module.parameters()", "a parameter with gradient hooks", "without: they would not run")
        if p.dtype not in (torch.float32, torch.float64) or p.dtype != managed[0].dtype or p.device.type != "cpu":
            raise ArgumentError("module.parameters()", f"{p.dtype} on {p.device}", "all float32 or all float64, on cpu")


def attach(module: nn.Module, recorder: Recorder) -> None:
    """Hook every nn.Linear of `module`; ArgumentError if an engine did so before."""
    for m in module.modules():
        owners = (getattr(hook, "__self__", None) for hook in m._forward_hooks.values())
        if any(isinstance(owner, LinearHooks) and owner.module is m for owner in owners):
            raise ArgumentError("module", "one that is private already", "new, or a copy.deepcopy: one run, one engine")
    for name, m in module.named_modules():
        if type(m) is nn.Linear:
            LinearHooks(f"layer '{name}'" if name else "module", m, recorder)
