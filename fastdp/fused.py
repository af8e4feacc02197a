"""Optimizers whose step is taken in the pass that makes the noise: torch.optim.SGD, Adam and AdamW.

What the formulas need is read from torch's own param_groups and state and kept there, under torch's names, so that
schedulers and state_dict work as without fastdp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastdp import _kernels
from fastdp.clipping import Span
from fastdp.errors import ArgumentError

# What the kernels read and write beside the parameter.
BUFFERS = {SGD: ("momentum_buffer",), Adam: ("exp_avg", "exp_avg_sq"), AdamW: ("exp_avg", "exp_avg_sq")}

# Address, two buffers' addresses (or 0), length, offset in the flat buffer.
Parameter = tuple[int, int, int, int, int]
NewState = Callable[[Tensor, str], Tensor]
Step = tuple[_kernels.SgdStep | _kernels.AdamStep, list[Parameter]]


def is_fused(inner: Optimizer) -> bool:
    """Whether the kernels do all that `inner.step()` would: no subclass, no hook, no group that needs more."""
    if type(inner) not in BUFFERS or inner._optimizer_step_pre_hooks or inner._optimizer_step_post_hooks:
        return False
    return not any(_needs_torch(inner, group) for group in inner.param_groups)


def _needs_torch(inner: Optimizer, group: dict[str, Any]) -> bool:
    if group.get("differentiable") or group.get("amsgrad"):
        return True
    # Adam rounds what is computed from a tensor to that tensor's dtype; SGD takes the number in it as it is.
    tensors = () if type(inner) is SGD else (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    return any(isinstance(x, Tensor) for x in tensors)


def buffers(inner: Optimizer) -> tuple[str, ...]:
    """Names of the state that `steps` needs now."""
    needed = type(inner) is not SGD or any(group["momentum"] != 0 for group in inner.param_groups)
    return BUFFERS[type(inner)] if needed else ()


def steps(
    inner: Optimizer,
    spans: Mapping[nn.Parameter, Span],
    std: float,
    batch_size: int,
    new_state: NewState | None = None,
) -> list[Step]:
    """What the kernels must do for `inner.step()` on the noised sum / batch_size; state is made and counted here.

    new_state: makes the zeros that a parameter's state of that name begins as.
    Raises ArgumentError before anything is changed.
    """
    sgd = type(inner) is SGD
    new_state = new_state or _zeros
    for p, s in spans.items():
        check_state(inner, p, s.name)
    out: list[Step] = []
    for group in inner.param_groups:
        # Parameters of one group whose formula differs go apart: the first step of momentum, other steps of Adam.
        parts: dict[float, list[Parameter]] = {}
        for p in group["params"]:
            if p in spans:  # else frozen
                which, *buffers = (_sgd_state if sgd else _adam_state)(inner, group, p, new_state)
                s = spans[p]
                parts.setdefault(which, []).append((p.data_ptr(), *buffers, s.numel, s.offset))
        scale = (-1.0 if group["maximize"] else 1.0) / batch_size
        # Before torch 2.7 AdamW is a class of its own and its groups lack the key.
        decoupled = group.get("decoupled_weight_decay", type(inner) is AdamW)
        for which, parameters in parts.items():
            h = _sgd_step(group, which, std, scale) if sgd else _adam_step(group, which, decoupled, std, scale)
            out.append((h, parameters))
    return out


def check_state(inner: Optimizer, p: Tensor, name: str) -> None:
    state = inner.state.get(p)
    if not state:
        return
    sgd = type(inner) is SGD
    for buffer in BUFFERS[type(inner)]:
        x = state.get(buffer)
        if sgd and x is None:
            continue
        like = isinstance(x, Tensor) and (x.dtype, x.shape, x.device) == (p.dtype, p.shape, p.device)
        if not like or not x.is_contiguous():
            found = f"{x.dtype}{list(x.shape)} on {x.device}" if isinstance(x, Tensor) else x
            raise ArgumentError(f"{buffer} of {name}", found, f"contiguous {p.dtype}{list(p.shape)} on {p.device}")
    t = state.get("step")
    if not sgd and not (isinstance(t, Tensor) and t.numel() == 1):
        raise ArgumentError(f"step of {name}", t, "a tensor of one number")


def _zeros(p: Tensor, name: str) -> Tensor:
    return torch.zeros_like(p, memory_format=torch.contiguous_format)


def _sgd_state(inner: Optimizer, group: dict[str, Any], p: Tensor, new_state: NewState) -> tuple[float, int, int]:
    """Whether the momentum buffer holds nothing yet, and the buffers' addresses."""
    if group["momentum"] == 0:
        return True, 0, 0
    state = inner.state[p]
    first = state.get("momentum_buffer") is None
    if first:
        state["momentum_buffer"] = new_state(p, "momentum_buffer")
    return first, state["momentum_buffer"].data_ptr(), 0


def _sgd_step(group: dict[str, Any], first: float, std: float, scale: float) -> _kernels.SgdStep:
    return _kernels.SgdStep(
        std=std,
        scale=scale,
        weight_decay=group["weight_decay"],
        lr=float(group["lr"]),
        momentum=group["momentum"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        first=bool(first),
    )


def _adam_state(inner: Optimizer, group: dict[str, Any], p: Tensor, new_state: NewState) -> tuple[float, int, int]:
    """The number of this step, from 1, and the buffers' addresses."""
    state = inner.state[p]
    if not state:
        # torch counts in float64 where that is the default dtype, unless its own fused kernel counts.
        wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
        state["step"] = torch.zeros((), dtype=torch.float64 if wide else torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = new_state(p, "exp_avg"), new_state(p, "exp_avg_sq")
    elif not state["step"].is_cpu:
        # Once: where torch's own fused step would have it, each would be waited for.
        state["step"] = state["step"].cpu()
    state["step"] += 1
    return state["step"].item(), state["exp_avg"].data_ptr(), state["exp_avg_sq"].data_ptr()


def _adam_step(group: dict[str, Any], t: float, decoupled: bool, std: float, scale: float) -> _kernels.AdamStep:
    (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
    return _kernels.AdamStep(
        std=std,
        scale=scale,
        weight_decay=0.0 if decoupled else decay,
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        keep=1.0 - lr * decay if decoupled else 1.0,
        step_size=lr / (1.0 - beta1**t),
        root=(1.0 - beta2**t) ** 0.5,
    )
