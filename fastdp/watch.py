"""Hooks every layer of a module, by the rule that fits it."""

from __future__ import annotations

from torch import nn

from fastdp import rules
from fastdp.attention import AttentionHooks
from fastdp.errors import ArgumentError
from fastdp.layers import Hooks, LayerHooks, ModuleHooks, Recorder
from fastdp.recurrent import RecurrentHooks


def check_new(module: nn.Module) -> None:
    """ArgumentError if an engine has hooked a part of it before."""
    for m in module.modules():
        hooked = (getattr(hook, "__self__", None) for hook in m._forward_hooks.values())
        if any(isinstance(h, Hooks) and h.module is m for h in hooked):
            raise ArgumentError("module", "one that is private already", "new, or a copy.deepcopy: one run, one engine")


def attach(module: nn.Module, recorder: Recorder) -> None:
    """Hook every module that has parameters to be trained."""
    for name, m, slots in rules.owners(module):
        _kind(m)(f"layer '{name}'" if name else "module", m, slots, recorder)


def _kind(m: nn.Module) -> type[Hooks]:
    if rules.is_linear(m) or rules.is_embedding(m) or rules.has_formula(m):
        return LayerHooks
    if rules.is_recurrent(m):
        return RecurrentHooks
    return AttentionHooks if rules.is_attention(m) else ModuleHooks
