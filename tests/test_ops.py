"""The kernels against the float64 oracle, at every instruction set, and as torch.library operators."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fastdp import ArgumentError, _kernels, native, ops, reference

# Largest relative error of a sum or norm against float64: rounding of the inputs is the oracle's too.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float64: 1e-13}
SHAPES = [(0, 5), (3, 0), (1, 1), (2, 15), (5, 16), (7, 33), (64, 1000), (3, 40_000), (300, 7)]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    scale = want.abs().max().item() if want.numel() else 1.0
    return ((got.double() - want).abs().max().item() if want.numel() else 0.0) / max(scale, 1e-300)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_and_clipped_sums(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = torch.randn(shape, dtype=torch.float64).to(dtype)
    want = reference.clip_sum(g, 2.0)
    assert ops.sq_norms(g).dtype == torch.float64
    assert relative(ops.sq_norms(g), reference.sq_norms(g)) < 1e-13
    got = ops.clip_sum(g, 2.0)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(got, want) < LIMITS[dtype]
    out = torch.full_like(got, math.nan)
    assert ops.clip_sum(g, 2.0, out=out) is out
    assert torch.equal(out, got)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 9, 4), (64, 130, 50), (1, 1, 1)])
def test_linear_norms(shape: tuple[int, int, int], bias: bool, dtype: torch.dtype) -> None:
    batch, fan_in, fan_out = shape
    for positions in ((), (1,), (6,)):
        a = torch.randn(batch, *positions, fan_in).to(dtype)
        b = torch.randn(batch, *positions, fan_out).to(dtype)
        assert relative(ops.linear_sq_norms(a, b, bias), reference.linear_sq_norms(a, b, bias)) < 1e-12
    assert ops.linear_sq_norms(torch.ones(2, 0, 3), torch.ones(2, 0, 4)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 9, 4), (3, 0, 4), (30, 40, 50), (1, 1, 1)])
def test_embedding_norms(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    index, b = torch.randint(0, 12, shape[:2]), torch.randn(shape).to(dtype)
    index *= 2**59  # ids may be as great as they come
    for padding in (None, 2**59, -1):
        got = ops.embedding_sq_norms(index, b, padding)
        torch.testing.assert_close(got, reference.embedding_sq_norms(index, b, padding), rtol=1e-12, atol=0)


def test_strided_rows_are_read_in_place_and_others_refused() -> None:
    wide = torch.randn(6, 20)
    assert torch.equal(ops.clip_sum(wide[:, :7], 1.0), ops.clip_sum(wide[:, :7].contiguous(), 1.0))
    assert torch.equal(ops.sq_norms(wide[::2, :7]), ops.sq_norms(wide[::2, :7].contiguous()))
    assert torch.equal(ops.sq_norms(torch.ones(1, 9).expand(4, 9)), torch.full((4,), 9.0).double())
    for bad in (wide.t(), wide[:, ::2]):
        with pytest.raises(ArgumentError, match="packed rows"):
            ops.sq_norms(bad)
    a, b = torch.randn(4, 6, 5).transpose(0, 1), torch.randn(6, 8, 9)[:, ::2, :3]  # positions first; every second
    assert torch.equal(ops.linear_sq_norms(a, b), ops.linear_sq_norms(a.contiguous(), b.contiguous()))
    with pytest.raises(ArgumentError, match="packed rows"):
        ops.linear_sq_norms(a, torch.randn(6, 3, 4).transpose(1, 2))
    with pytest.raises(ArgumentError, match="out="):
        ops.clip_sum(wide, 1.0, out=torch.empty(20, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, k: ops.sq_norms(g[0]), "g.shape"),
        (lambda g, k: ops.sq_norms(g.int()), "g.dtype"),
        (lambda g, k: ops.clip_sum(g.numpy(), 1.0), "g='ndarray': must be a torch.Tensor"),
        (lambda g, k: ops.clip_sum(g, -1.0), "max_norm=-1.0: must be finite and >= 0"),
        (lambda g, k: ops.clip_sum(g, math.nan), "max_norm=nan"),
        (lambda g, k: ops.clip_noise(g, 1.0, -0.5, key=k, step=0), "noise_multiplier=-0.5"),
        (lambda g, k: ops.clip_noise(g, 1.0, 1.0, key=k[:31], step=0), "key="),
        (lambda g, k: ops.clip_noise(g, 1.0, 1.0, key=k), "step=None"),
        (lambda g, k: ops.clip_noise(g, 1.0, 1.0, key=k, step=-1), "step=-1: must be in [0, 2^63)"),
        (lambda g, k: ops.gaussian_noise_(g.t(), 1.0, key=k, step=0), "contiguous"),
        (lambda g, k: ops.gaussian_noise_(g, 1.0, key=k, step=0, offset=-1), "offset=-1"),
        (lambda g, k: ops.poisson_sample(10, 1.5, key=k, step=0), "rate=1.5"),
        (lambda g, k: ops.poisson_sample(-1, 0.5, key=k, step=0), "n=-1"),
        (lambda g, k: ops.linear_sq_norms(g, g[:2]), "b="),
        (lambda g, k: ops.embedding_sq_norms(g.long(), g), "b.shape=[3, 4]"),
        (lambda g, k: ops.embedding_sq_norms(g, g[:, :, None]), "index='torch.float32[3, 4] on cpu'"),
        (lambda g, k: ops.embedding_sq_norms(g.long()[:, 1:], g[:, :, None]), "index='torch.int64[3, 3] on cpu'"),
    ],
)
def test_bad_arguments_are_named(call, message: str, key: torch.Tensor) -> None:
    with pytest.raises(ArgumentError) as error:
        call(torch.randn(3, 4), key)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


finite_or_not = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=300, deadline=None)
@example(np.full((1, 1), 6.5626e19, np.float32), 1e-20)  # a subnormal factor once let 1.000005 C through
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=finite_or_not),
    st.one_of(st.just(0.0), st.floats(1e-20, 1e20)),
)
def test_each_contribution_is_at_most_max_norm_or_dropped(values: np.ndarray, max_norm: float) -> None:
    g = torch.from_numpy(values)
    for row in g:  # the sum over one row is its contribution
        got = ops.clip_sum(row[None], max_norm).double()
        if row.isfinite().all():
            assert got.norm().item() <= max_norm * (1 + 1e-15)
            want = reference.clip_sum(row[None], max_norm)
            # Below 1e-37 a float has no 24 bits left.
            assert (got - want).norm().item() <= 2e-6 * want.norm().item() + 1e-37
        else:
            assert not got.any()
    total = ops.clip_sum(g, max_norm)
    assert total.isfinite().all()


@pytest.mark.parametrize("dtype", LIMITS)
def test_hostile_rows(dtype: torch.dtype) -> None:
    huge = torch.finfo(dtype).max
    rows = torch.tensor([[0.0, 0.0], [huge, -huge], [math.nan, 1.0], [math.inf, 1.0], [3.0, 4.0]], dtype=dtype)
    contributions = torch.stack([ops.clip_sum(r[None], 1.0) for r in rows]).double()
    half = math.sqrt(0.5) if dtype != torch.float64 else 0.0  # the square overflows float64: dropped
    want = torch.tensor([[0, 0], [half, -half], [0, 0], [0, 0], [0.6, 0.8]], dtype=torch.float64)
    assert (contributions - want).abs().max() < 1e-6
    assert (contributions.norm(dim=1) <= 1.0).all()
    assert not ops.clip_sum(rows, 0.0).any()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [*SHAPES, (9, 70_000)])
def test_sums_of_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = torch.randn(shape, dtype=torch.float64).to(dtype)
    factors = torch.rand(len(g), dtype=torch.float64)
    factors[1::3] = 0.0
    g[1::3] = math.nan
    want = torch.zeros(shape[1], dtype=torch.float64)
    for row, factor in zip(g, factors, strict=True):
        if factor:
            want += factor * row.double()
    out = torch.full((shape[1],), math.nan, dtype=native.sum_dtype(dtype))
    native.sum_rows(g, factors, out, False)
    assert relative(out, want) < LIMITS[dtype]
    native.sum_rows(g, factors, out, True)
    assert relative(out, 2 * want) < LIMITS[dtype]


def test_sums_of_rows_whose_factors_are_no_floats() -> None:
    factors = torch.tensor([1e-60, 1e-45, 0.0, 1e40, 5e-39, 1.0, 1e-40], dtype=torch.float64)
    values = torch.tensor([1e38, -3e38, math.inf, 1e-30, 7e37, 2.0, 1e-5])
    out = torch.empty(1)
    for factor, value in zip(factors, values, strict=True):
        native.sum_rows(value.view(1, 1), factor.view(1), out, False)
        exact = float(factor * value.double()) if factor else 0.0
        want = exact if abs(exact) >= torch.finfo(torch.float32).tiny else 0.0
        assert out.item() == pytest.approx(want, rel=2e-7, abs=0.0)
    g = values[:, None].repeat(1, 5000)
    out = torch.ones(5000)
    native.sum_rows(g, factors, out, True)
    assert relative(out, 1.0 + (factors * values.double())[factors > 0].sum().expand(5000)) < 1e-6
    for factors, out in ((torch.ones(7), torch.empty(5000)), (torch.ones(6).double(), torch.empty(5000))):
        with pytest.raises(ArgumentError, match="factors="):
            native.sum_rows(g, factors, out, False)
    with pytest.raises(ArgumentError, match="out="):
        native.sum_rows(g, torch.ones(7).double(), torch.empty(4999), False)


@pytest.mark.parametrize("n", [1, 7, 40, 513])
def test_scaled_rows(n: int) -> None:
    """Factors in float32 and beyond; products that are subnormal become 0, a record with one too great is dropped."""
    factors = torch.tensor([1.0, 0.3, 0.0, 1e-60, 3.0, 1e-38, 1e40, 1e-7, 1.0, 2.0], dtype=torch.float64)
    g = torch.randn(10, n, dtype=torch.float64) * torch.tensor([1, 1, 1, 1e32, 1, 1, 1e-30, 1, 1, 1])[:, None]
    g = g.float()
    g[2], g[4, -1], g[8, 0], g[9, n // 2] = math.nan, 3e38, math.inf, math.nan
    want = factors[:, None] * g.double()
    want[want.abs() < torch.finfo(torch.float32).tiny] = 0.0
    for row in (2, 4, 8, 9):
        want[row] = 0.0
    out, sums = torch.full_like(g, math.nan), torch.full((n,), math.nan)
    native.scale_rows(g, factors, out, sums)
    assert ((out.double() - want).abs() <= 1.2e-7 * want.abs()).all()  # twice half an epsilon
    assert relative(sums, out.double().sum(0)) < 1e-6
    again = torch.empty_like(out)
    native.scale_rows(g, factors, again, None)
    assert torch.equal(again, out)
    native.scale_rows(g.view(5, 2, n).transpose(0, 1), factors.view(5, 2).t().reshape(-1), again, None)
    assert torch.equal(again.view(2, 5, n), out.view(5, 2, n).transpose(0, 1))


@pytest.mark.parametrize("shape", [(40, 100_000), (300, 3000), (5, 1_000_000)])
def test_thread_count_changes_no_bit(shape: tuple[int, int], key: torch.Tensor) -> None:
    g = torch.randn(shape)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append((ops.sq_norms(g), ops.clip_noise(g, 1.0, 1.0, key=key, step=1)))
    finally:
        torch.set_num_threads(before)
    assert _kernels.threads_available()
    for norms, total in results[1:]:
        assert torch.equal(norms, results[0][0])
        assert torch.equal(total, results[0][1])


def test_instruction_sets_agree_with_the_oracle(at_isa) -> None:
    printed = at_isa(
        "import torch; from fastdp import native, ops, reference as r, _kernels\n"
        "import os; assert _kernels.isa() == os.environ['FASTDP_ISA']\n"
        "torch.manual_seed(0)\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float64):\n"
        "    g = torch.randn(13, 1037).to(dtype)\n"
        "    a, b = torch.randn(3, 5, 21).to(dtype), torch.randn(3, 5, 9).to(dtype)\n"
        "    for got, want in ((ops.sq_norms(g), r.sq_norms(g)), (ops.clip_sum(g, 3.0), r.clip_sum(g, 3.0)),\n"
        "                      (ops.linear_sq_norms(a, b), r.linear_sq_norms(a, b))):\n"
        "        assert ((got.double() - want).norm() / want.norm()).item() < 1e-6\n"
        "    factors, out = torch.rand(13).double(), torch.zeros_like(ops.clip_sum(g, 1.0))\n"
        "    native.sum_rows(g, factors, out, True)\n"
        "    want = factors @ g.double()\n"
        "    assert ((out - want).norm() / want.norm()).item() < 1e-6\n"
        "print('agree')"
    )
    assert printed == "agree\n"


AT_A_PAGES_END = """
import ctypes, mmap, torch
from fastdp import ops

page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
begin = ctypes.addressof((ctypes.c_char * (2 * page)).from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + page), ctypes.c_size_t(page), 0) == 0
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for rows in (1, 3, 4, 5):
        for n in (1, 7, 9, 16, 17, 31):
            size = rows * n * dtype.itemsize
            x = torch.frombuffer(memory, dtype=dtype, count=rows * n, offset=page - size).view(rows, n).fill_(2.0)
            assert ops.sq_norms(x).tolist() == [4.0 * n] * rows
            assert (ops.linear_sq_norms(x, x, False) - 16.0 * n * n).abs().max() <= 1e-10
            together = x.view(1, rows, n)
            assert abs(ops.linear_sq_norms(together, together, False).item() - (4.0 * n * rows) ** 2) <= 1e-9
            assert ops.clip_sum(x, 1e9).tolist() == [2.0 * rows] * n
print("within", flush=True)
"""


def test_nothing_beyond_the_last_row_is_read(at_isa) -> None:
    """The next page of memory may not be read: a process that does is killed."""
    assert at_isa(AT_A_PAGES_END) == "within\n"


def test_operators_pass_opcheck(key: torch.Tensor) -> None:
    step = torch.tensor(3)
    g, a, b = torch.randn(5, 9), torch.randn(5, 4, 9), torch.randn(5, 4, 3)
    fast = torch.ops.fastdp
    for op, args, kwargs in (
        (fast.sq_norms.default, (g,), {}),
        (fast.clip_sum.default, (g, 1.0), {}),
        (fast.clip_sum.out, (g, 1.0), {"out": torch.empty(9)}),
        (fast.clip_noise.default, (g, 1.0, 1.0, key, step), {}),
        (fast.linear_sq_norms.default, (a, b, True), {}),
        (fast.embedding_sq_norms.default, (torch.randint(3, (5, 4)), b, None), {}),
        (fast.gaussian_noise_.default, (g, 1.0, key, step, 0), {}),
        (fast.poisson_sample.default, (1000, 0.1, key, step), {}),
    ):
        opcheck(op, args, kwargs)


# Inductor itself warns on import, in another wording with each torch.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_functions_call_them_in_one_graph(backend: str, key: torch.Tensor) -> None:
    def everything(g, a, b, key, step):
        noisy = ops.clip_noise(g, 1.0, 1.0, key=key, step=step)
        x = g.clone()
        ops.gaussian_noise_(x, 0.5, key=key, step=step + 1, offset=7)
        out = torch.empty(g.shape[1])
        ops.clip_sum(g, 1.0, out=out)
        ids = ops.poisson_sample(1000, 0.1, key=key, step=step)
        return noisy * 2, x, out + ops.clip_sum(g, 2.0), ids + 1, ops.linear_sq_norms(a, b), ops.sq_norms(g)

    arguments = (torch.randn(5, 9), torch.randn(5, 4, 9), torch.randn(5, 4, 3), key, torch.tensor(5))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(everything, fullgraph=True, backend=backend)
        for got, want in zip(compiled(*arguments), everything(*arguments), strict=True):
            assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore")
def test_fresh_keys_are_refused_under_compile() -> None:
    compiled = torch.compile(lambda g: ops.clip_noise(g, 1.0, 1.0), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="random_key"):
        compiled(torch.randn(3, 4))


def test_fresh_keys_differ() -> None:
    assert not torch.equal(ops.random_key(), ops.random_key())
    g = torch.zeros(1, 50)
    assert not torch.equal(ops.clip_noise(g, 1.0, 1.0), ops.clip_noise(g, 1.0, 1.0))


def test_linear_norms_of_doubles_whose_squares_vanish() -> None:
    a, b = torch.full((1, 2), 1e-163, dtype=torch.float64), torch.full((1, 3), 1e153, dtype=torch.float64)
    assert ops.linear_sq_norms(a, b, bias=False).sqrt().item() == pytest.approx(1e-10 * math.sqrt(6), rel=1e-12)
    assert ops.linear_sq_norms(a * 0, b, bias=False).item() == 0.0


def test_results_do_not_require_gradients() -> None:
    g = torch.randn(4, 6, requires_grad=True)
    of_rows = ops.embedding_sq_norms(torch.zeros(4, 1, dtype=torch.int64), g[:, None])
    for found in (
        ops.sq_norms(g),
        ops.clip_sum(g, 1.0),
        ops.clip_noise(g, 1.0, 1.0),
        ops.linear_sq_norms(g, g),
        of_rows,
    ):
        assert not found.requires_grad
