"""Hooks by which each layer's input and the gradient of its output are kept: fastdp/uses.py.

During a forward the managed parameters do not require gradients, so autograd computes no weight gradient. A layer keeps
its input a, and a hook on its output receives the output's gradient b. For nn.Linear the gradient of record i is
sum_t b_it a_it^T: "book-keeping", Bu et al. 2022 (arXiv:2210.00038), the same two matrix products as without privacy.
For some others it has a formula, too: fastdp/formulas.py. Any other module with parameters of its own is run again
record by record on what was kept: fastdp/persample.py.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from fastdp.device import stream_of
from fastdp.errors import PrivacyError, refuse_compiled
from fastdp.persample import Call, Unit
from fastdp.precision import Autocast
from fastdp.rules import Slot, is_embedding, is_linear
from fastdp.uses import EmbeddingUse, FormulaUse, LayerUse, LinearUse, Use

# What a module may return beside tensors.
PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device)


class Recorder:
    """The uses of one backward, in the order in which their gradients arrived."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.backward: int | None = None  # autograd's number of the backward that is being recorded
        self.batch = 0  # which of the loader's batches is current; below 0: a replay of one
        self.streams: set[int] = set()  # of a GPU, that the backward was on
        self.depth = 0  # of calls of the module given to make_private that are going on
        self.paused = False  # a forward that is run again
        self.settle: Callable[[Use], None] = lambda use: None  # what is done with each use of a training step at once

    @property
    def place(self) -> int | None:
        """Where a use belongs: the batch; None if it is of no batch, since it was called beside the module."""
        return self.batch if self.depth else None

    def clear(self) -> None:
        for use in self.uses:
            use.spend()
        self.uses.clear()
        self.streams.clear()
        self.backward = None

    def keep(self, use: Use, b: Any) -> None:
        """Note that the backward has brought b, the gradients of the use's outputs."""
        if use.is_spent:
            raise PrivacyError(f"{use.layer}: a second backward() through the same forward: call the module again")
        current = torch._C._current_graph_task_id()
        if self.backward is not None and self.backward != current:
            raise PrivacyError(
                f"{use.layer}: a second backward() before optimizer.step(); call step() of the optimizer that "
                "make_private returned, or zero_grad(), first (larger batches: batch_size of the loader, in pieces of "
                "max_physical_batch_size)"
            )
        self.backward = current
        if torch.is_grad_enabled():
            raise PrivacyError(f"{use.layer}: backward(create_graph=True) cannot be clipped per record")
        if use.batch is None:
            raise PrivacyError(
                f"{use.layer}: a loss made of it beside the module given to make_private, which would not be probed; "
                "call that module, not a part of it"
            )
        if self.batch < 0 and use.batch != self.batch:
            raise PrivacyError(
                f"{use.layer}: a part of the loss is made in the module and does not come with its output, so that it "
                "cannot be probed for coupled records: return it, too"
            )
        if use.batch != self.batch:
            raise PrivacyError(f"{use.layer}: backward() through a forward of an earlier batch")
        use.check_unchanged()
        use.b = b
        self.streams.update(stream_of(x) for x in (b if isinstance(b, list) else [b]) if x is not None)
        use.versions = [*use.versions, *((x, x._version) for x in (b if isinstance(b, list) else [b]) if x is not None)]
        self.uses.append(use)
        if self.batch >= 0:
            self.settle(use)

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


class _Attach(torch.autograd.Function):
    """The identity, which makes the first layer's output part of the graph though nothing before it is."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[None, None]:
        return None, None


class Hooks:
    """Forward hooks of one module. A copy of the module, or one loaded from a file, is not managed by them."""

    def __init__(self, name: str, module: nn.Module, slots: list[Slot], recorder: Recorder) -> None:
        self.name, self.module, self.recorder = name, module, recorder
        self.managed = [p for _, _, p in slots]
        self._slots = slots
        self._paused: list[list[Tensor]] = []  # of each call that is going on: a module may call itself
        self._thread: int | None = None  # that they are on
        self._anchor = torch.zeros((), requires_grad=True)
        self._handle = module.register_forward_pre_hook(self.before)
        # First of all: hooks of the user's then act on an output that is already watched.
        module.register_forward_hook(self.after, with_kwargs=True, always_call=True, prepend=True)

    def before(self, module: nn.Module, args: Any) -> None:
        if module is not self.module or self.recorder.paused:
            return
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            refuse_compiled()
        self._check_call()
        self._paused.append([p for p in self.managed if p.requires_grad])
        for p in self._paused[-1]:
            p.requires_grad_(False)

    def _check_call(self) -> None:
        """PrivacyError where a gradient would be lost while parameters do not require one."""
        if self._paused and self._thread != threading.get_ident():
            raise PrivacyError(f"{self.name}: called on two threads at once: give evaluation a copy.deepcopy(model)")
        self._thread = threading.get_ident()
        if not torch.is_grad_enabled():
            return
        path = self.name.removeprefix("layer ").strip("'")
        for holder, key, p in self._slots:
            if holder._parameters.get(key) is not p:
                raise PrivacyError(f"{path}.{key}: removed or replaced after make_private")
        for number, hook in reversed(self.module._forward_pre_hooks.items()):
            if number == self._handle.id:
                break
            if not type(getattr(hook, "__self__", None)).__module__.startswith("fastdp."):
                raise PrivacyError(
                    f"{self.name}: a forward pre-hook registered after make_private, from which gradients of the "
                    "layer's parameters would be lost: register it before"
                )

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self.has_begun(module):
            return None
        for p in self._paused.pop():
            p.requires_grad_(True)
        # An exception in forward; evaluation; a call within its own, which is a part of that.
        if output is None or not torch.is_grad_enabled() or self._paused:
            return None
        return self.watch(args, kwargs, output)

    def has_begun(self, module: nn.Module) -> bool:
        """Whether before() did its part of the call that ends now: it, or a hook before it, may have raised."""
        return module is self.module and bool(self._paused) and self._thread == threading.get_ident()

    def watch(self, args: Any, kwargs: Any, output: Any) -> Any:
        """Keep what is needed of this call, and see to it that the gradient of the output is kept."""
        raise NotImplementedError

    def attached(self, y: Tensor) -> Tensor:
        if y.requires_grad:
            return y
        attached: Tensor = _Attach.apply(y, self._anchor)  # type: ignore[no-untyped-call]
        return attached

    @staticmethod
    def on_gradient(y: Tensor, keep: Callable[[Tensor], None]) -> None:
        """Call keep(b) when the backward brings y's gradient, what the user's own hooks make of it."""

        def before(gradients: tuple[Tensor | None, ...]) -> None:
            b = gradients[y_number]
            if b is not None:
                keep(b)

        y_number = y.output_nr
        assert y.grad_fn is not None
        y.grad_fn.register_prehook(before)  # a third of the time of y.register_hook

    def __deepcopy__(self, memo: Any) -> Hooks:
        return self  # the copied module is another one, for which these hooks do nothing

    def __reduce__(self) -> tuple[Callable[[], Inert], tuple[()]]:
        return Inert, ()


class LayerHooks(Hooks):
    """Of a layer of one input and one output, whose formula is known."""

    def watch(self, args: Any, kwargs: Any, output: Any) -> Tensor:
        a = (args[0] if args else kwargs["input"]).detach()
        # For [B, T, I] the output is a view, and an in-place function that follows would take the graph past the hook.
        # Nobody else has the tensor that it is a view of, and no backward needs it.
        output = torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output
        y = self.attached(output)
        recorder, m = self.recorder, self.module
        kind: type[LayerUse] = LinearUse if is_linear(m) else EmbeddingUse if is_embedding(m) else FormulaUse
        use = kind(self.name, recorder.place, [(a, a._version)], m, a)
        self.on_gradient(y, functools.partial(recorder.keep, use))
        return y


class ModuleHooks(Hooks):
    """Of any other module with parameters of its own."""

    def __init__(self, name: str, module: nn.Module, slots: list[Slot], recorder: Recorder) -> None:
        super().__init__(name, module, slots, recorder)
        self.unit = Unit(name, module, slots, recorder.pause)

    def watch(self, args: Any, kwargs: Any, output: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        leaves, spec = tree_flatten(output)
        for y in leaves:
            if not isinstance(y, (Tensor, *PLAIN)) or (isinstance(y, Tensor) and y.is_complex()):
                kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
                raise PrivacyError(
                    f"{self.name}: {type(self.module).__name__} returns a {kind}, through which gradients cannot be "
                    "seen: return real tensors, in tuples, lists or dicts"
                )
        places = [i for i, y in enumerate(leaves) if isinstance(y, Tensor) and y.is_floating_point()]
        for i in places:
            # Where one output is made of another, or is an input, its gradient would be counted twice: a node each.
            # And where it is a view, an in-place function that follows would take the graph past the hook.
            shared = len(places) > 1 or leaves[i]._is_view()
            shared = shared or any(leaves[i].data_ptr() == x.data_ptr() for x in inputs)
            leaves[i] = self.attached(leaves[i].clone() if shared else leaves[i])
        watched = [leaves[i] for i in places]
        if not watched:
            return None
        recorder = self.recorder
        versions = [(x, x._version) for x in (*inputs, *self.managed)]
        values = [y.detach().clone() for y in watched]  # a user's in-place function may follow
        call = Call(self.name, recorder.place, versions, self.unit, (args, kwargs), values, Autocast())
        torch.autograd.graph.register_multi_grad_hook(watched, lambda b: recorder.keep(call, list(b)))
        return tree_unflatten(leaves, spec)


class Inert:
    """What hooks become in a pickled module: nothing."""

    def before(self, *args: Any) -> None: ...

    def after(self, *args: Any) -> None: ...
