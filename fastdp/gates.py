"""The arithmetic of recurrent layers, both ways through time, with the gradients of their gates.

Before its nonlinearity a gate is W_ih x_t + b_ih + W_hh h_(t-1) + b_hh, so that a layer is two linear layers on
sequences. With g_t the gate's gradient, those of record i are sum_t g_it x_it^T and sum_t g_it h_i(t-1)^T, and sum_t
g_it for both biases. torch's own functions do not give g_t, so both ways through time are made here, of the same
products: one t after the other, what the cell does element by element and a product with W_hh. Where torch's functions
make the former, how g_t depends on the gradient of h_t is a factor for each element, made for all t at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdp.device import kernels

sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward

# Of weights and their biases, by their kinds, the first with "ih": a [B, T, I] and g [B, T, O] of which sum_t g_t a_t^T
# is the gradient, that of each weight after the other in its columns.
Sums = list[tuple[tuple[str, ...], Tensor, Tensor]]


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

    def inputs(self, y: Tensor) -> Tensor:
        """x and beside it h [B, T, I + P], where W_ih and W_hh have the same g: one pass over it is of both."""
        return torch.cat([self.x, self.before(y, self.states[0])], 2)

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
        self.c = self.gates.new_empty(*y.shape[:2], w_hh.shape[1] // 4)
        m = y if w_hr is None else torch.empty_like(self.c)  # o tanh(c)
        of = kernels(self.c)
        for t, c_t, m_t, y_t in self.times(self.gates, self.c, m, y):
            of.lstm_forward(t.addmm_(h, w_hh), c, c_t, m_t)
            if w_hr is not None:
                torch.mm(m_t, w_hr.t(), out=y_t)
            h, c = y_t, c_t
        self.a, self.m = self.inputs(y), None if w_hr is None else m
        return [h, c]

    def backward(self, b: Tensor, gradients: list[Tensor]) -> Sums:
        (dh, dc), w_hh, w_hr = gradients, self.weights["weight_hh"], self.weights.get("weight_hr")
        dy = b if w_hr is None else torch.empty_like(b)
        times = self.times(self.gates, self.c, b, dy)
        before = [self.states[1], *(c for _, c, _, _ in times)]
        of = kernels(self.c)
        for (t, c_t, b_t, dy_t), c in reversed(list(zip(times, before[:-1], strict=True))):
            dh += b_t
            dm = dh if w_hr is None else dy_t.copy_(dh) @ w_hr
            of.lstm_backward(t, c, c_t, dm, dc)
            torch.mm(t, w_hh, out=dh)
        sums: Sums = [(("ih", "hh"), self.a, self.gates)]
        return sums if self.m is None else [*sums, (("hr",), self.m, dy)]


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
        return [(("ih",), self.x, self.of_x), (("hh",), self.h, self.of_h)]


class Tanh(Way):
    """h_t = tanh(gate)."""

    def forward(self, y: Tensor) -> list[Tensor]:
        (h,), w_hh = self.states, self.weights["weight_hh"].t()
        self.gates = self.linear(self.x, "bias_ih", "bias_hh")
        for t, y_t in self.times(self.gates, y):
            h = y_t.copy_(self.nonlinear(t.addmm_(h, w_hh)))
        self.a = self.inputs(y)
        return [h]

    def backward(self, b: Tensor, gradients: list[Tensor]) -> Sums:
        (dh,) = gradients
        self.differentiate(self.gates)
        for t, b_t in reversed(self.times(self.gates, b)):
            t *= dh.add_(b_t)
            torch.mm(t, self.weights["weight_hh"], out=dh)
        return [(("ih", "hh"), self.a, self.gates)]

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
