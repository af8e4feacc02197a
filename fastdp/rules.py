"""Which modules can be trained privately, and by which rule: `validate` lists it, `fix` replaces what cannot."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastdp.device import on_gpu
from fastdp.errors import ArgumentError, require
from fastdp.formulas import FORMULAS


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the per-sample gradients of one module are found; `refused` is empty, or what it must be instead."""

    module: str
    type: str
    parameters: int
    how: str
    refused: str = ""

    def __str__(self) -> str:
        return f"{self.module} ({self.type}, {self.parameters:,} parameters): " + (
            f"refused, must be {self.refused}" if self.refused else self.how
        )


def validate(module: nn.Module) -> list[Rule]:
    """What each part of `module` will use under `make_private`: one rule for each module that owns trained parameters
    or is refused, in order of `named_modules`.

    What can only be seen in a training step (a loss that couples records, a module that draws random numbers) is found
    there, by a PrivacyError that names it.
    """
    rules = []
    owned = {name: parameters for name, _, parameters in owners(module)}
    for name, m in module.named_modules():
        refused, parameters = refusal(m), owned.get(name, [])
        if refused or parameters:
            how = f"run again record by record, with all in it, for {', '.join(key for _, key, _ in parameters)}"
            if is_linear(m):
                how = "norms from inputs and output gradients"
            elif is_attention(m):
                how = "norms from inputs and output gradients of its projections"
            elif is_embedding(m):
                how = "the rows that a record uses, from inputs and output gradients"
            elif has_formula(m):
                how = "per-sample gradients from inputs and output gradients"
            elif is_recurrent(m):
                how = "norms from inputs and gradients of the gates"
            count = sum(0 if nn.parameter.is_lazy(p) else p.numel() for _, _, p in parameters)
            rules.append(Rule(_path(name), type(m).__name__, count, how, refused))
    return rules


def check(module: nn.Module) -> None:
    """Raise ArgumentError, naming the module, unless all of `module` can be trained exactly."""
    for name, m in module.named_modules():
        refused = refusal(m)
        if refused:
            raise ArgumentError(_path(name), type(m).__name__, refused)
    managed = [p for p in module.parameters() if p.requires_grad]
    if not managed:
        raise ArgumentError("module", type(module).__name__, "with at least one parameter that requires a gradient")
    for p in managed:
        if p._backward_hooks:
            raise ArgumentError("module.parameters()", "a parameter with gradient hooks", "without: they would not run")
        first = managed[0]
        wide = torch.float64 in (p.dtype, first.dtype) and (p.dtype != first.dtype or on_gpu(p))
        elsewhere = p.device != first.device or (p.device.type != "cpu" and not on_gpu(p))
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float64) or wide or elsewhere:
            bound = "all float64, or float32 and bfloat16, on cpu; or these on one GPU"
            raise ArgumentError("module.parameters()", f"{p.dtype} on {p.device}", bound)


def refusal(m: nn.Module) -> str:
    """What `m` must be instead of what it is, as far as can be told without running it; empty if nothing is wrong."""
    if isinstance(m, nn.modules.batchnorm._BatchNorm):
        return "replaced: it mixes records. fastdp.fix(model) puts nn.GroupNorm in its place"
    if isinstance(m, torch._dynamo.eval_frame.OptimizedModule) or m._compiled_call_impl is not None:
        return "not compiled: hooks do not reach inside"
    if isinstance(m, (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "the plain module: hooks do not reach inside (for several ranks, comm=fastdp.comm.init())"
    if type(m) is nn.Linear and "forward" in vars(m):
        return "nn.Linear with its own forward"
    if parametrize.is_parametrized(m):
        return "without parametrizations: their gradient is not a sum over records of one module's inputs"
    if any(nn.parameter.is_lazy(p) for p in m.parameters(recurse=False)):
        return "initialised: run one batch through it first"
    if isinstance(m, (nn.Embedding, nn.EmbeddingBag)):
        if m.max_norm is not None:
            return "without max_norm: it changes weights by the records, without noise"
        if m.sparse or m.scale_grad_by_freq:
            return "without sparse and scale_grad_by_freq"
    if isinstance(m, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d) and m.track_running_stats:
        return "without track_running_stats: they are computed from the records"
    if isinstance(m, nn.RNNBase) and m.dropout > 0 and m.num_layers > 1:
        return "without dropout inside: use single layers with nn.Dropout between them"
    if isinstance(m, nn.MultiheadAttention) and m.dropout > 0 and not is_attention(m):
        return (
            "without dropout of attention weights, which cannot be drawn again record by record: set its .dropout = 0.0"
        )
    return ""


def is_linear(m: nn.Module) -> bool:
    return type(m) is nn.Linear and m._parameters.keys() == {"weight", "bias"}


def is_embedding(m: nn.Module) -> bool:
    return type(m) is nn.Embedding and m._parameters.keys() == {"weight"} and "forward" not in vars(m)


def is_attention(m: nn.Module) -> bool:
    """Whether its projections are all that has parameters, so that fastdp/attention.py knows its rule."""
    keys = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v"}
    return (
        type(m) is nn.MultiheadAttention
        and m._parameters.keys() <= keys
        and m.bias_k is None
        and m.bias_v is None
        and isinstance(m.out_proj, nn.Linear)
        and "forward" not in vars(m)
    )


def has_formula(m: nn.Module) -> bool:
    """Whether the layer's own formula gives its per-sample gradients."""
    return type(m) in FORMULAS and m._parameters.keys() <= {"weight", "bias"} and "forward" not in vars(m)


def is_recurrent(m: nn.Module) -> bool:
    """Whether the gradients of its gates are known."""
    if type(m) not in (nn.LSTM, nn.GRU, nn.RNN) or "forward" in vars(m):
        return False
    assert isinstance(m, nn.RNNBase)
    return m._parameters.keys() == set(m._flat_weights_names) and None not in m._parameters.values()


Slot = tuple[nn.Module, str, nn.Parameter]  # holder, its key, and what hangs there


def owners(module: nn.Module) -> Iterator[tuple[str, nn.Module, list[Slot]]]:
    """Each module that has trained parameters of its own, with its name and those.

    Its own are the direct ones. Attention also uses those of its out_proj, which it never calls.
    """
    inside = {m.out_proj for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, m in module.named_modules():
        holders = [m, m.out_proj] if isinstance(m, nn.MultiheadAttention) else [] if m in inside else [m]
        slots = [(h, key, p) for h in holders for key, p in h._parameters.items() if p is not None and p.requires_grad]
        if slots:
            yield name, m, slots


def _path(name: str) -> str:
    return f"module.{name}" if name else "module"


def fix(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm by a GroupNorm, which normalises each record by itself, and warn of each.

    Returns `module`, changed in place, or its replacement if it is a BatchNorm itself. Groups: the largest divisor of
    the channels that also divides 32 (Wu & He 2018, arXiv:1803.08494); one for BatchNorm1d, whose input may be [B, C],
    where a group of one channel would be constant. Weight and bias are kept, running statistics are dropped. Call it
    before the optimizer is made.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _group_norm("module", module)
    for name, m in list(module.named_modules()):
        for key, child in list(m.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(m, key, _group_norm(_path(f"{name}.{key}" if name else key), child))
    return module


def _group_norm(name: str, old: nn.modules.batchnorm._BatchNorm) -> nn.GroupNorm:
    channels = old.num_features
    require(channels > 0, name, type(old).__name__, "initialised: run one batch through it first")
    groups = 1 if isinstance(old, nn.BatchNorm1d) else math.gcd(32, channels)
    new = nn.GroupNorm(groups, channels, old.eps, old.affine)
    if old.affine:
        new.weight, new.bias = old.weight, old.bias
    new.train(old.training)
    warnings.warn(f"fastdp.fix: {name}: {type(old).__name__} replaced by {new}", stacklevel=3)
    return new
