"""One time of an LSTM by the kernels: its functions of a number over all floats, and the cell, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastdp import ArgumentError, native

# Every 4099th float: all exponents, both signs, subnormals, infinities and NaN; what sigmoid and tanh make of it.
OF_ALL_FLOATS = """
import numpy as np, torch
from fastdp import _kernels, native
bits = np.arange(0, 2**32, 4099, dtype=np.uint32)
bits = np.append(bits[: len(bits) // 64 * 64 - 64], np.repeat(np.uint32([0, 1 << 31, 0x7f800000, 0xff800000]), 16))
x = torch.from_numpy(bits.view(np.float32)).view(-1, 64)
gates, zero = torch.zeros(len(x), 4 * 64), torch.zeros(len(x), 64)
gates[:, :64] = gates[:, 128:192] = x
native.lstm_forward(gates, zero, torch.empty_like(zero), torch.empty_like(zero))
for got, want, limit in ((gates[:, :64], x.double().sigmoid(), 2.5), (gates[:, 128:192], x.double().tanh(), 1.5)):
    assert torch.equal(got.isnan(), x.isnan()) and x.isnan().any() and x.isinf().any()
    ulp = torch.ldexp(torch.tensor(1.0).double(), torch.frexp(want)[1] - 24)
    # Where the result is subnormal, sigmoid ends at 1 / (1 + e^88).
    wrong = (got.double() - want).abs() > torch.where(want.abs() < 2.0**-126, 6.1e-39, limit * ulp)
    assert not wrong.any(), (x[wrong], got[wrong], want[wrong])
print(_kernels.isa())
"""


def test_sigmoid_and_tanh_of_all_floats(at_isa: Callable[[str], str]) -> None:
    assert at_isa(OF_ALL_FLOATS).strip() in ("scalar", "avx2", "avx512")


def strided(x: Tensor) -> Tensor:
    """The same rows, apart, with NaN between them."""
    apart = torch.full((len(x), 2, x.shape[1]), math.nan, dtype=x.dtype)
    apart[:, 1] = x
    return apart[:, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 7), (3, 16), (70, 33), (64, 128)])
def test_the_cell_is_torch_s(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, n = shape
    cell = nn.LSTMCell(2, n).double()
    x, h, c = (torch.randn(rows, k, dtype=torch.float64) for k in (2, n, n))
    c.requires_grad_()
    want_h, want_c = cell(x, (h, c))
    gates = x @ cell.weight_ih.t() + cell.bias_ih + h @ cell.weight_hh.t() + cell.bias_hh
    dh, dc = torch.randn(2, rows, n, dtype=torch.float64)
    want_dc, want_bias = torch.autograd.grad([want_h, want_c], [c, cell.bias_ih], [dh, dc])

    got, before, dh, dc = (strided(v.detach().to(dtype)) for v in (gates, c, dh, dc))
    got_h, got_c = strided(before), strided(before)
    native.lstm_forward(got, before, got_c, got_h)
    native.lstm_backward(got, before, got_c, dh, dc)
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    for found, want in ((got_h, want_h), (got_c, want_c), (dc, want_dc), (got.double().sum(0), want_bias)):
        torch.testing.assert_close(found.double(), want, rtol=limit * max(1, rows), atol=limit * max(1, rows))


def test_a_cell_s_record_stays_where_it_is_whatever_the_threads() -> None:
    gates, (before, dh, dc) = torch.randn(301, 4 * 33), torch.randn(3, 301, 33)
    results = []
    threads = torch.get_num_threads()
    try:
        for count, hostile in ((1, 0.0), (2, math.nan), (3, math.inf), (8, -math.inf)):
            torch.set_num_threads(count)
            g, c, h, d = gates.clone(), torch.empty_like(before), torch.empty_like(before), dc.clone()
            g[200] = hostile
            native.lstm_forward(g, before, c, h)
            native.lstm_backward(g, before, c, dh, d)
            results.append([torch.cat([t[:200], t[201:]]) for t in (g, c, h, d)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_other_states_are_refused() -> None:
    gates, state = torch.zeros(3, 8), torch.zeros(3, 2)
    for bad in (torch.zeros(3, 3), torch.zeros(2, 2), state.double(), torch.zeros(2, 3).t()):
        with pytest.raises(ArgumentError, match="states="):
            native.lstm_forward(gates, state, state.clone(), bad)
    with pytest.raises(ArgumentError, match="gates="):
        native.lstm_backward(torch.zeros(3, 6), *[state.clone() for _ in range(4)])
    with pytest.raises(ValueError, match="dtype"):
        native.lstm_forward(gates.bfloat16(), *[state.bfloat16() for _ in range(3)])
