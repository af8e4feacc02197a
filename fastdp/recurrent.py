"""Per-sample gradients of nn.LSTM, nn.GRU and nn.RNN, from the gradients of their gates.

Before its nonlinearity a gate is W_ih x_t + b_ih + W_hh h_(t-1) + b_hh, so that a layer is two linear layers on
sequences. With g_t the gate's gradient, those of record i are sum_t g_it x_it^T and sum_t g_it h_i(t-1)^T, and sum_t
g_it for both biases. torch's own functions do not give g_t, so both ways through time are made here, of the same
products. How g_t depends on the gradient of h_t is a factor for each element, made for all t at once; what the backward
has to do one t after the other is a few products of elements and one with W_hh.

No record's gates depend on other records, whatever the options are, so nothing is checked as in fastdp/persample.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdp.errors import PrivacyError
from fastdp.gradients import Formed, PerSample, Product
from fastdp.layers import Hooks
from fastdp.persample import Use

sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward

# Of a weight and its bias, by their kind: a [B, T, I] and g [B, T, O] of which sum_t g_t a_t^T is the gradient.
Sums = dict[str, tuple[Tensor, Tensor]]


def tanh_(x: Tensor) -> Tensor:
    """In place; torch's goes row by row where rows lie apart (100 us for [64, 128], where packed it is 33)."""
    return x.copy_(x.contiguous().tanh_())


class Way:
    """One layer in one direction: x [B, T, I] to y [B, T, P], in the order of the input; P = H, or proj_size.

    weights: weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, as far as it has them; states: h [B, P], and c [B, H] of
    an LSTM, before the first time.
    """

    def __init__(self, weights: dict[str, Tensor], x: Tensor, states: list[Tensor], is_reverse: bool) -> None:
        self.weights, self.x, self.states, self.is_reverse = weights, x, states, is_reverse

    def forward(self, y: Tensor) -> list[Tensor]:
        """Fill y; the states after the last time."""
        raise NotImplementedError

    def backward(self, b: Tensor, gradients: list[Tensor]) -> Sums:
        """b: of y. gradients: those of the last states become those of the first. What forward kept is used up."""
        raise NotImplementedError

    def before(self, states: Tensor, first: Tensor) -> Tensor:
        """[B, T, P] of what came after each time -> of what was before it."""
        first = first.unsqueeze(1)
        return torch.cat([states[:, 1:], first] if self.is_reverse else [first, states[:, :-1]], 1)

    def times(self, *sequences: Tensor) -> list[tuple[Tensor, ...]]:
        """What sequences hold at each time, in the order of the forward."""
        steps = list(zip(*(s.unbind(1) for s in sequences), strict=True))
        return steps[::-1] if self.is_reverse else steps

    def linear(self, x: Tensor, *biases: str) -> Tensor:
        """W_ih x + biases [B, T, gates H]"""
        found = [self.weights[key] for key in biases if key in self.weights]
        return F.linear(x, self.weights["weight_ih"], sum(found[1:], found[0]) if found else None)


class Lstm(Way):
    """Gates i, f, g, o; c_t = f c_(t-1) + i g; h_t = o tanh(c_t), or W_hr times that."""

    def forward(self, y: Tensor) -> list[Tensor]:
        (h, c), w_hh, w_hr = self.states, self.weights["weight_hh"].t(), self.weights.get("weight_hr")
        self.gates = self.linear(self.x, "bias_ih", "bias_hh")
        each = self.gates.unflatten(2, (4, -1))
        i, f, g, o = each.unbind(2)
        # Each time packed, for tanh; m = tanh(c).
        self.c, self.m = i.new_empty(2, i.shape[1], len(i), i.shape[2]).transpose(1, 2)
        for t, i_f, i_t, f_t, g_t, o_t, c_t, m_t, y_t in self.times(
            self.gates, each[:, :, :2], i, f, g, o, self.c, self.m, y
        ):
            t.addmm_(h, w_hh)
            i_f.sigmoid_()
            tanh_(g_t)
            o_t.sigmoid_()
            torch.mul(i_t, g_t, out=c_t).addcmul_(f_t, c)
            torch.tanh(c_t, out=m_t)
            if w_hr is None:
                torch.mul(m_t, o_t, out=y_t)
            else:
                torch.mm(m_t * o_t, w_hr.t(), out=y_t)
            h, c = y_t, c_t
        self.h = self.before(y, self.states[0])
        return [h, c]

    def backward(self, b: Tensor, gradients: list[Tensor]) -> Sums:
        (dh, dc), w_hh, w_hr = gradients, self.weights["weight_hh"], self.weights.get("weight_hr")
        each = self.gates.unflatten(2, (4, -1))
        i, f, g, o = each.unbind(2)
        forget, m = f.clone(), self.m if w_hr is None else o * self.m
        dy = b if w_hr is None else torch.empty_like(b)
        # From here on, the gates are what the gradients of c_t are multiplied by, or those of m_t for the last one.
        of_i, of_c = sigmoid_backward(g, i), tanh_backward(o, self.m)
        tanh_backward(i, g, grad_input=g)
        sigmoid_backward(self.before(self.c, self.states[1]), f, grad_input=f)
        sigmoid_backward(self.m, o, grad_input=o)
        i.copy_(of_i)
        for t, ifg, o_t, f_t, of_c_t, b_t, dy_t in reversed(
            self.times(self.gates, each[:, :, :3], o, forget, of_c, b, dy)
        ):
            dh += b_t
            dm = dh if w_hr is None else dy_t.copy_(dh) @ w_hr
            dc.addcmul_(dm, of_c_t)
            ifg *= dc.unsqueeze(1)
            o_t *= dm
            dc *= f_t
            torch.mm(t, w_hh, out=dh)
        sums = {"ih": (self.x, self.gates), "hh": (self.h, self.gates)}
        return sums if w_hr is None else {**sums, "hr": (m, dy)}


class Gru(Way):
    """Gates r, z; n = tanh(W_in x_t + b_in + r q) where q = W_hn h_(t-1) + b_hn; h_t = (1 - z) n + z h_(t-1)."""

    def forward(self, y: Tensor) -> list[Tensor]:
        (h,), w_hh, bias = self.states, self.weights["weight_hh"].t(), self.weights.get("bias_hh")
        self.of_x = self.linear(self.x, "bias_ih")
        self.of_h = torch.empty_like(self.of_x)
        size = w_hh.shape[1] // 3
        r_z, n = self.of_x.split([2 * size, size], 2)
        by_r_z, q = self.of_h.split([2 * size, size], 2)
        r, z = r_z.chunk(2, 2)
        for t, r_z_t, by_r_z_t, r_t, z_t, n_t, q_t, y_t in self.times(self.of_h, r_z, by_r_z, r, z, n, q, y):
            torch.mm(h, w_hh, out=t) if bias is None else torch.addmm(bias, h, w_hh, out=t)
            r_z_t.add_(by_r_z_t).sigmoid_()
            tanh_(n_t.addcmul_(r_t, q_t))
            h = torch.lerp(n_t, h, z_t, out=y_t)
        self.h = self.before(y, self.states[0])
        return [h]

    def backward(self, b: Tensor, gradients: list[Tensor]) -> Sums:
        (dh,), w_hh = gradients, self.weights["weight_hh"]
        each = self.of_h.unflatten(2, (3, -1))
        r, z, n = self.of_x.unflatten(2, (3, -1)).unbind(2)
        by_r, by_z, q = each.unbind(2)
        # From here on, `of_h` and n are what the gradient of h_t is multiplied by.
        sigmoid_backward(self.h - n, z, grad_input=by_z)
        tanh_backward(1 - z, n, grad_input=n)
        sigmoid_backward(n * q, r, grad_input=by_r)
        torch.mul(n, r, out=q)
        for t, r_z_n, n_t, z_t, b_t in reversed(self.times(self.of_h, each, n, z, b)):
            dh += b_t
            r_z_n *= dh.unsqueeze(1)
            n_t *= dh
            dh.mul_(z_t).addmm_(t, w_hh)
        r.copy_(by_r)
        z.copy_(by_z)
        return {"ih": (self.x, self.of_x), "hh": (self.h, self.of_h)}


class Tanh(Way):
    """h_t = tanh(gate)."""

    def forward(self, y: Tensor) -> list[Tensor]:
        (h,), w_hh = self.states, self.weights["weight_hh"].t()
        self.gates = self.linear(self.x, "bias_ih", "bias_hh")
        for t, y_t in self.times(self.gates, y):
            h = y_t.copy_(self.nonlinear(t.addmm_(h, w_hh)))
        self.h = self.before(y, self.states[0])
        return [h]

    def backward(self, b: Tensor, gradients: list[Tensor]) -> Sums:
        (dh,) = gradients
        self.differentiate(self.gates)
        for t, b_t in reversed(self.times(self.gates, b)):
            t *= dh.add_(b_t)
            torch.mm(t, self.weights["weight_hh"], out=dh)
        return {"ih": (self.x, self.gates), "hh": (self.h, self.gates)}

    def nonlinear(self, gate: Tensor) -> Tensor:
        return tanh_(gate)

    def differentiate(self, h: Tensor) -> None:
        h.square_().neg_().add_(1)


class Relu(Tanh):
    def nonlinear(self, gate: Tensor) -> Tensor:
        return gate.relu_()

    def differentiate(self, h: Tensor) -> None:
        h.gt_(0)


WAYS: Final[dict[str, tuple[Callable[..., Any], type[Way]]]] = {
    "LSTM": (torch.lstm, Lstm),
    "GRU": (torch.gru, Gru),
    "RNN_TANH": (torch.rnn_tanh, Tanh),
    "RNN_RELU": (torch.rnn_relu, Relu),
}


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
            over_times: dict[Tensor, Tensor] = {}  # both biases of an LSTM have the same
            for kind, (a, g) in sums.items():
                a, g = (s.squeeze(1) if s.shape[1] == 1 else s for s in (a, g))
                weight, bias = weights[f"weight_{kind}"], weights.get(f"bias_{kind}")
                if weight in managed:
                    parts.append(Product(weight, 0, len(weight), a, g))
                if bias is not None and bias in managed:
                    if g not in over_times:
                        over_times[g] = g.sum(1) if g.dim() == 3 else g
                    parts.append(Formed(bias, 0, len(bias), over_times[g]))
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
        m, x = self.module, self.use.x
        last: list[list[Tensor]] = []
        for layer in range(m.num_layers):
            ways = []
            y = x.new_empty(*x.shape[:2], (1 + m.bidirectional) * (m.proj_size or m.hidden_size))
            for way, y_way in enumerate(y.chunk(1 + m.bidirectional, 2)):
                states = [s[len(last)] for s in self.use.states]
                ways.append(WAYS[m.mode][1](self._weights(layer, way), x, states, way == 1))
                last.append(ways[way].forward(y_way))
            self.ways.append(ways)
            x = y
        # The last layer's output is the user's to change in place; torch's layouts.
        return [x, *(torch.stack(states) for states in zip(*last, strict=True))]

    def backward(self, wants_x: bool) -> tuple[Tensor | None, list[Tensor]]:
        """The gates' gradients into `use.sums`; the gradients of x and of the initial states."""
        use = self.use
        b, *last = use.b
        gradients = [torch.zeros_like(s) if g is None else g.clone() for s, g in zip(use.states, last, strict=True)]
        k = len(gradients[0])
        for layer in reversed(range(len(self.ways))):
            ways, dx = self.ways.pop(), None
            if b is None:
                b = ways[0].x.new_zeros(()).expand(*use.x.shape[:2], len(ways) * gradients[0].shape[2])
            k -= len(ways)
            for j, (way, b_way) in enumerate(zip(ways, b.chunk(len(ways), 2), strict=True)):
                sums = way.backward(b_way, [g[k + j] for g in gradients])
                use.sums.append((way.weights, sums))
                if layer or wants_x:
                    part = sums["ih"][1] @ way.weights["weight_ih"]
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
        y, *last = ctx.layers.forward()
        return _turned(use.module, y), *last

    @staticmethod
    def backward(ctx: Any, *b: Tensor | None) -> tuple[Tensor | None, ...]:
        use, layers = ctx.use, ctx.layers
        if layers is None:
            raise PrivacyError(f"{use.layer}: a second backward() through the same forward: call the module again")
        ctx.layers = None  # what it kept is used up, and must not live as long as the user's loss does
        ctx.keep(use, [None if b[0] is None else _turned(use.module, b[0]), *b[1:]])
        with torch.autocast("cpu", enabled=False):
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
        if args[2] is not m._flat_weights:  # (data, batch sizes, initial states, weights, ...)
            raise PrivacyError(
                f"{self.name}: a PackedSequence: must be padded to a tensor, one sequence of each record"
            )
        x, given = args[0], list(args[1]) if m.mode == "LSTM" else [args[1]]
        dtype = m._flat_weights[0].dtype
        if x.dtype != dtype or torch.is_autocast_enabled("cpu"):
            raise PrivacyError(
                f"{self.name}: input {x.dtype}: must be {dtype} as its parameters (no autocast in this version)"
            )
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
