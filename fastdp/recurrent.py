"""Per-sample gradients of nn.LSTM, nn.GRU and nn.RNN, from the gradients of their gates: fastdp/gates.py makes those,
of bfloat16 in float32.

No record's gates depend on other records, whatever the options are, so nothing is checked as in fastdp/persample.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdp.errors import PrivacyError
from fastdp.gates import WAYS, Sums, Way
from fastdp.gradients import Formed, PerSample, Product, are_small
from fastdp.layers import Hooks
from fastdp.precision import autocast_dtype, coarsest, wide, without_autocast
from fastdp.uses import Use


@dataclasses.dataclass(eq=False)
class RecurrentUse(Use):
    """One call of such a module: x [B, T, I], initial states [L, B, ...], and the gradients of what it returned.

    b: of y [B, T, O] and of the last states [L, B, ...]; None where there was none.
    """

    module: nn.RNNBase
    x: Tensor
    states: list[Tensor]
    b: list[Tensor | None] = dataclasses.field(init=False)
    sums: list[tuple[dict[str, Tensor], Sums]] = dataclasses.field(default_factory=list)  # with the weights they are of

    def parts(self, managed: Container[Tensor], rows: int, dtype: torch.dtype) -> list[PerSample]:
        if len(self.x) != rows:
            raise PrivacyError(
                f"{self.layer}: dimension {1 - self.module.batch_first} of its input is not the batch's records, one "
                "each (batch_first says which one it is)"
            )
        parts: list[PerSample] = []
        for weights, sums in self.sums:
            for kinds, a, g in sums:
                a, g = (s.squeeze(1).contiguous() if s.shape[1] == 1 else s for s in (a, g))
                of = [weights[f"weight_{kind}"] for kind in kinds]
                inputs = a.split([p.shape[1] for p in of], -1)
                if all(p in managed for p in of) and not any(are_small(x, g) for x in inputs):
                    parts.append(Product(of[0], 0, len(of[0]), a, g, beside=(*of[1:],)))
                else:
                    parts += [Product(p, 0, len(p), x, g) for p, x in zip(of, inputs, strict=True) if p in managed]
                biases = [weights[f"bias_{kind}"] for kind in kinds if f"bias_{kind}" in weights]
                biases = [p for p in biases if p in managed]
                over_times = (g.sum(1) if g.dim() == 3 else g) if biases else g
                parts += [Formed(p, 0, len(p), over_times) for p in biases]
        return parts

    def inputs(self, rows: int) -> list[Tensor]:
        return [self.x, *(s.transpose(0, 1) for s in self.states)]

    def gradients(self, rows: int) -> list[Tensor]:
        y, *states = self.b
        return ([] if y is None else [y]) + [s.transpose(0, 1) for s in states if s is not None]


class Layers:
    """All layers of a module on one batch."""

    def __init__(self, use: RecurrentUse) -> None:
        self.use, self.module = use, use.module
        self.ways: list[list[Way]] = []  # of each layer

    def forward(self) -> list[Tensor]:
        """y [B, T, O] and the last states."""
        m, x = self.module, wide(self.use.x)
        last: list[list[Tensor]] = []
        for layer in range(m.num_layers):
            ways = []
            y = x.new_empty(*x.shape[:2], (1 + m.bidirectional) * (m.proj_size or m.hidden_size))
            for way, y_way in enumerate(y.chunk(1 + m.bidirectional, 2)):
                states = [wide(s[len(last)]).contiguous() for s in self.use.states]
                weights = {kind: wide(p.detach()) for kind, p in self._weights(layer, way).items()}
                ways.append(WAYS[m.mode][1](weights, x, states, way == 1))
                last.append(ways[way].forward(y_way))
            self.ways.append(ways)
            x = y
        # The last layer's output is the user's to change in place; torch's layouts.
        return [x, *(torch.stack(states) for states in zip(*last, strict=True))]

    def backward(self, wants_x: bool) -> tuple[Tensor | None, list[Tensor]]:
        """The gates' gradients into `use.sums`; the gradients of x and of the initial states."""
        use = self.use
        b, *last = (None if g is None else wide(g) for g in use.b)
        gradients = [
            wide(s.new_zeros(s.shape) if g is None else g.clone(memory_format=torch.contiguous_format))
            for s, g in zip(use.states, last, strict=True)
        ]
        k = len(gradients[0])
        for layer in reversed(range(len(self.ways))):
            ways, dx = self.ways.pop(), None
            if b is None:
                b = ways[0].x.new_zeros(()).expand(*use.x.shape[:2], len(ways) * gradients[0].shape[2])
            k -= len(ways)
            for j, (way, b_way) in enumerate(zip(ways, b.chunk(len(ways), 2), strict=True)):
                sums = way.backward(b_way, [g[k + j] for g in gradients])
                use.sums.append((self._weights(layer, j), sums))
                if layer or wants_x:
                    part = sums[0][2] @ way.weights["weight_ih"]
                    dx = part if dx is None else dx.add_(part)
            b = dx
        return b, gradients

    def _weights(self, layer: int, way: int) -> dict[str, Tensor]:
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        found = {kind: self.module._parameters.get(f"{kind}_l{layer}{'_reverse' * way}") for kind in kinds}
        return {kind: p for kind, p in found.items() if p is not None}


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, use: RecurrentUse, keep: Callable[[Use, Any], None], anchor: Tensor, *inputs: Tensor) -> Any:
        ctx.use, ctx.layers, ctx.keep = use, Layers(use), keep
        ctx.set_materialize_grads(False)
        dtype = autocast_dtype(use.x) or use.x.dtype
        with without_autocast():
            y, *last = (out.to(dtype) for out in ctx.layers.forward())
        return _turned(use.module, y), *last

    @staticmethod
    def backward(ctx: Any, *b: Tensor | None) -> tuple[Tensor | None, ...]:
        use, layers = ctx.use, ctx.layers
        if layers is None:
            raise PrivacyError(f"{use.layer}: a second backward() through the same forward: call the module again")
        ctx.layers = None  # what it kept is used up, and must not live as long as the user's loss does
        ctx.keep(use, [None if b[0] is None else _turned(use.module, b[0]), *b[1:]])
        with without_autocast():
            x, states = layers.backward(ctx.needs_input_grad[3])
        return None, None, None, None if x is None else _turned(use.module, x), *states


def _turned(module: nn.RNNBase, x: Tensor) -> Tensor:
    """[B, T, F] of the module's layout, or the other way round."""
    return x if module.batch_first else x.transpose(0, 1)


class RecurrentHooks(Hooks):
    """Of one nn.LSTM, nn.GRU or nn.RNN. While it is called, torch's function for all its layers is ours."""

    _mode: _Instead | None = None  # of the call that is going on
    _was_called = False

    def before(self, module: nn.Module, args: Any) -> None:
        super().before(module, args)
        if module is self.module and not self.recorder.paused:
            self._mode = _Instead(self._layers)
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if module is self.module and self._mode is not None:  # None: a hook before ours raised
            mode, self._mode = self._mode, None
            self._was_called = mode.was_called
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return super().after(module, args, kwargs, output)

    def watch(self, args: Any, kwargs: Any, output: Any) -> None:
        if not self._was_called:
            raise PrivacyError(f"{self.name}: {type(self.module).__name__} did not run as torch's does")

    def _layers(self, func: Any, args: Any) -> Any:
        """Instead of torch's func(x, initial states, weights, ...) -> y and last states; None of any other function."""
        m = self.module
        assert isinstance(m, nn.RNNBase)
        if func is not WAYS[m.mode][0] or not torch.is_grad_enabled():
            return None
        if args[2] is not m._flat_weights:
            if args[3] is not m._flat_weights:
                return None  # another module's: an interrupt, which ends no hooks, left the mode on
            # (data, batch sizes, initial states, weights, ...)
            raise PrivacyError(
                f"{self.name}: a PackedSequence: must be padded to a tensor, one sequence of each record"
            )
        x, given = args[0], list(args[1]) if m.mode == "LSTM" else [args[1]]
        dtype = m._flat_weights[0].dtype
        rounded = autocast_dtype(x)
        coarsest(self.name, [x.dtype, *([] if rounded is None else [rounded])])
        if x.dtype != dtype and rounded is None:
            raise PrivacyError(f"{self.name}: input {x.dtype}: must be {dtype} as its parameters")
        versions = [(s, s._version) for s in (x, *given, *m._flat_weights)]
        states = [s.detach() for s in given]
        use = RecurrentUse(self.name, self.recorder.place, versions, m, _turned(m, x.detach()), states)
        return _Gates.apply(use, self.recorder.keep, self._anchor, x, *given)  # type: ignore[no-untyped-call]


class _Instead(TorchFunctionMode):
    """While it is on, torch's functions are `instead` on this thread where that does not give None."""

    def __init__(self, instead: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.instead, self.was_called = instead, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.instead(func, args)
        if result is None:
            return func(*args, **(kwargs or {}))
        self.was_called = True
        return result
