"""The native kernels on tensors: every argument is checked here, then passed on as address, lengths and strides.

What the engine calls. `fastdp.ops` wraps these for everybody else, and says what they compute.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastdp import _kernels
from fastdp.errors import ArgumentError, require

KEY_BYTES = 32

# A stream has 2^48 blocks of ChaCha20: 16 normals each, or 4 records each at the sampler's 1024 blocks per 4096.
MAX_OFFSET = 16 * 2**48
MAX_RECORDS = 4 * 2**48
MAX_SECURE_OFFSET = MAX_OFFSET // 4  # secure noise takes four normals a value, each from a quarter of the stream

ALL = _kernels.StepShare()

DTYPES = {
    torch.float32: _kernels.DType.f32,
    torch.bfloat16: _kernels.DType.bf16,
    torch.float64: _kernels.DType.f64,
}


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over records of `dtype` come in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sq_norms(g: Tensor) -> Tensor:
    """[B, D] -> float64 [B]."""
    check_rows("g", g)
    check_packed("g", g)
    out = torch.empty(g.shape[0], dtype=torch.float64)
    _kernels.sq_norms(
        g.data_ptr(), DTYPES[g.dtype], g.shape[0], g.shape[1], g.stride(0), out.data_ptr(), torch.get_num_threads()
    )
    return out


def add_linear_sq_norms(layers: list[tuple[Tensor, Tensor, bool]], out: Tensor, bounds: Tensor | None = None) -> None:
    """out float64 [B] += squared per-sample gradient norms of linear layers: of a [B, (T,) I], b [B, (T,) O], and
    whether there is a bias. All have the same B, T and dtype.

    bounds: float64 [B, 3]. Of T > 1, gains sum_t |a_t| |b_t|, the greatest |b_t|, and sqrt(O) sum_t |a_t|.
    """
    first = layers[0][0]
    if out.shape != first.shape[:1] or out.dtype != torch.float64 or not out.is_contiguous():
        raise ArgumentError("out", f"{out.dtype}{list(out.shape)}", f"contiguous float64[{len(first)}]")
    if bounds is not None and (
        bounds.shape != (len(first), 3) or bounds.dtype != torch.float64 or not bounds.is_contiguous()
    ):
        raise ArgumentError("bounds", f"{bounds.dtype}{list(bounds.shape)}", f"contiguous float64[{len(first)}, 3]")
    for a, b, _ in layers:
        for name, x in (("a", a), ("b", b)):
            check_rows(name, x, (2, 3))
            check_packed(name, x)
        if a.shape[:-1] != first.shape[:-1] or a.dtype != first.dtype:
            raise ArgumentError("a", f"{a.dtype}{list(a.shape)}", f"{first.dtype}{[*first.shape[:-1], 'I']}, as others")
        if a.shape[:-1] != b.shape[:-1] or a.dtype != b.dtype:
            raise ArgumentError("b", f"{b.dtype}{list(b.shape)}", f"{a.dtype}{[*a.shape[:-1], 'O']}, as a")
    positions = first.shape[1] if first.dim() == 3 else 1
    if positions == 0:
        return
    _kernels.linear_sq_norms(
        [(_operand(a), _operand(b), bias) for a, b, bias in layers],
        DTYPES[first.dtype],
        first.shape[0],
        positions,
        out.data_ptr(),
        0 if bounds is None else bounds.data_ptr(),
        torch.get_num_threads(),
    )


def embedding_sq_norms(index: Tensor, b: Tensor, padding_index: int | None) -> Tensor:
    """float64 [B]: `ops.embedding_sq_norms`, by torch's own functions, in float64."""
    check_rows("b", b, (3,))
    check_packed("b", b)
    check_indices(index, b)
    ids, which = torch.unique(index, return_inverse=True)
    keys = torch.arange(len(b))[:, None] * len(ids) + which
    used = torch.ones_like(index, dtype=torch.bool) if padding_index is None else index != padding_index
    keys, which = torch.unique(keys[used], return_inverse=True)
    sums = torch.zeros(len(keys), b.shape[2], dtype=torch.float64).index_add_(0, which, b[used].double())
    out = torch.zeros(len(b), dtype=torch.float64)
    return out.index_add_(0, keys // max(1, len(ids)), sums.square().sum(1))


def _operand(x: Tensor) -> tuple[int, int, int, int]:
    """Address, row length, and how far records and positions are apart."""
    return x.data_ptr(), x.shape[-1], x.stride(0), x.stride(-2)


def layer_norm_gradients(
    a: Tensor, b: Tensor, eps: float, centre: bool, weight: Tensor | None, bias: Tensor | None
) -> None:
    """Per-sample gradients [B, n] of a layer norm's weight and bias (RMS norm's: not centre) from a, b [B, P, n]."""
    _check_same(a, b)
    sizes, outs = _three(a), _addresses(a, weight, bias, a.shape[2])
    _kernels.layer_norm_gradients(
        a.data_ptr(), b.data_ptr(), DTYPES[a.dtype], *sizes, eps, centre, *outs, torch.get_num_threads()
    )


def group_norm_gradients(
    a: Tensor, b: Tensor, groups: int, eps: float, weight: Tensor | None, bias: Tensor | None
) -> None:
    """Per-sample gradients [B, C] of a group norm's weight and bias from a, b [B, C, P]."""
    _check_same(a, b)
    require(groups >= 1 and a.shape[1] % groups == 0, "groups", groups, f"a divisor of {a.shape[1]} channels")
    sizes, outs = _three(a), _addresses(a, weight, bias, a.shape[1])
    _kernels.group_norm_gradients(
        a.data_ptr(), b.data_ptr(), DTYPES[a.dtype], *sizes, groups, eps, *outs, torch.get_num_threads()
    )


def convolution_gradients(
    a: Tensor,
    b: Tensor,
    groups: int,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    out: Tensor,
) -> None:
    """out [B, O, C / groups, *kernel] = per-sample gradients of a convolution's weight, of its input a [B, C, ...] and
    the gradient b [B, O, ...] of its output; stride, padding and dilation in each of the 1 to 3 dimensions."""
    check_rows("a", a, (3, 4, 5))
    require(a.dtype != torch.bfloat16, "a.dtype", a.dtype, "float32 or float64")
    positions = convolution_positions(a, b, groups, stride, padding, dilation, out)
    for name, x in (("a", a), ("b", b)):
        require(x.is_contiguous(), f"{name}.stride()", x.stride(), "contiguous")
    dims, outputs, channels, kernel = a.dim() - 2, out.shape[1], out.shape[2], out.shape[3:]

    def three(of: Iterable[int], filled: int) -> tuple[int, ...]:
        return (filled,) * (3 - dims) + tuple(of)

    ones = [three(of, 1) for of in (a.shape[2:], kernel, positions, stride)]
    sizes = [*ones, three(padding, 0), three(dilation, 1)]
    of = len(a), groups, channels, outputs // groups
    threads = torch.get_num_threads()
    _kernels.convolution_gradients(a.data_ptr(), b.data_ptr(), DTYPES[a.dtype], *of, sizes, out.data_ptr(), threads)


def convolution_positions(
    a: Tensor,
    b: Tensor,
    groups: int,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    out: Tensor,
) -> list[int]:
    """Of the output in each dimension; ArgumentError where what convolution_gradients is given does not fit."""
    dims = a.dim() - 2
    require(out.dim() == a.dim() + 1, "out.dim()", out.dim(), f"{a.dim() + 1}")
    for name, of, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        require(len(of) == dims and min(of) >= least, name, of, f"{dims} integers >= {least}")
    outputs, channels, kernel = out.shape[1], out.shape[2], out.shape[3:]
    of_group = groups >= 1 and outputs % groups == 0
    require(of_group and a.shape[1] == channels * groups, "groups", groups, f"such that a is {channels} channels each")
    require(min(kernel) >= 1, "kernel", kernel, ">= 1")
    each = zip(a.shape[2:], kernel, stride, padding, dilation, strict=True)
    positions = [(n + 2 * pad - reach * (k - 1) - 1) // step + 1 for n, k, step, pad, reach in each]
    require(min(positions) >= 1, "kernel", kernel, "within the padded input")
    for name, x, shape in (("b", b, (len(a), outputs, *positions)), ("out", out, (len(a), *out.shape[1:]))):
        if x.shape != shape or x.dtype != a.dtype or x.device != a.device:
            found = f"{x.dtype}{list(x.shape)} on {x.device}"
            raise ArgumentError(name, found, f"{a.dtype}{list(shape)} on {a.device}")
    require(out.is_contiguous(), "out.stride()", out.stride(), "contiguous")
    return positions


def clip_factors(
    sq_norms: Tensor, dtype: torch.dtype, scale: float, max_norm: float, gamma: float | None = None
) -> tuple[Tensor, int]:
    """scale * min(1, max_norm / (scale * norm)) of each record -> float64 [B], and how many of them are 0.

    sq_norms: float64 [B]; dtype: of the gradients, whose rounding the factors leave room for. 0 if not finite.
    gamma: > 0; then scale * max_norm / (scale * norm + gamma).
    """
    factors = torch.empty_like(sq_norms)
    sq, out = sq_norms.data_ptr(), factors.data_ptr()
    zeros = _kernels.clip_factors(sq, DTYPES[dtype], len(factors), scale, max_norm, out, gamma)
    return factors, zeros


def clip_sum(g: Tensor, max_norm: float, out: Tensor) -> None:
    """out [D] = sum of the rows of g [B, D], each scaled down to norm <= max_norm."""
    check_rows("g", g)
    check_packed("g", g)
    check_range("max_norm", max_norm)
    _check_sums(g, out)
    _kernels.clip_sum(
        g.data_ptr(),
        DTYPES[g.dtype],
        g.shape[0],
        g.shape[1],
        g.stride(0),
        max_norm,
        out.data_ptr(),
        torch.get_num_threads(),
    )


def sum_rows(g: Tensor, factors: Tensor, out: Tensor, add: bool) -> None:
    """out [D] = sum of factors [B] * rows of g [B, D], in order, or that added to out; rows of factor 0 are not read.

    factors: float64, >= 0, such that no product is too great for out's dtype: those of `clip_factors`.
    """
    check_rows("g", g)
    check_packed("g", g)
    if factors.dtype != torch.float64 or factors.shape != g.shape[:1] or not factors.is_contiguous():
        raise ArgumentError("factors", f"{factors.dtype}{list(factors.shape)}", f"contiguous float64[{len(g)}]")
    _check_sums(g, out)
    _kernels.sum_rows(
        g.data_ptr(),
        DTYPES[g.dtype],
        g.shape[0],
        g.shape[1],
        g.stride(0),
        factors.data_ptr(),
        out.data_ptr(),
        add,
        torch.get_num_threads(),
    )


def scale_rows(x: Tensor, factors: Tensor, out: Tensor, sums: Tensor | None) -> None:
    """out [B, n] = factors [B] * x [B, n], rows of factor 0 unread; column sums of out into `sums` [n].

    x may be [B / k, k, n], with any strides but the last.
    """
    inner = x.shape[1] if x.dim() == 3 else 1
    if out.shape != (x.shape[0] * inner, x.shape[-1]) or out.dtype != x.dtype or not out.is_contiguous():
        raise ArgumentError("out", f"{out.dtype}{list(out.shape)}", f"contiguous {x.dtype}, as x {list(x.shape)}")
    if sums is not None and (x.dim() == 3 or sums.numel() != x.shape[-1] or not sums.is_contiguous()):
        raise ArgumentError("sums", list(sums.shape), f"[{x.shape[-1]}], and x of two dimensions")
    if factors.shape != out.shape[:1] or not factors.is_contiguous():
        raise ArgumentError("factors", f"{list(factors.shape)}, {factors.stride()}", f"contiguous [{out.shape[0]}]")
    _kernels.scale_rows(
        x.data_ptr(),
        DTYPES[x.dtype],
        x.shape[0],
        inner,
        x.shape[-1],
        x.stride(0),
        x.stride(-2),
        factors.data_ptr(),
        out.data_ptr(),
        0 if sums is None else sums.data_ptr(),
        torch.get_num_threads(),
    )


def lstm_forward(gates: Tensor, before: Tensor, c: Tensor, h: Tensor) -> None:
    """One time of an LSTM. gates [B, 4H]: W x + biases, in place what they are after it; c, h [B, H]: out.

    before [B, H]: c one time earlier.
    """
    places = _cell(gates, before, c, h)
    _kernels.lstm_forward(DTYPES[c.dtype], c.shape[0], c.shape[1], places, torch.get_num_threads())


def lstm_backward(gates: Tensor, before: Tensor, c: Tensor, dh: Tensor, dc: Tensor) -> None:
    """gates [B, 4H]: as lstm_forward left them, in place the gradients of what they were.

    dh [B, H]: the gradient of h. dc: of c, but for what comes by way of h; in place that of `before`.
    """
    places = _cell(gates, before, c, dh, dc)
    _kernels.lstm_backward(DTYPES[c.dtype], c.shape[0], c.shape[1], places, torch.get_num_threads())


def add_noise(x: Tensor, std: float, key: Tensor, step: int, offset: int, secure: bool = False) -> None:
    """x [...] += std * N(offset + i).

    secure: of noise that is the sum of four normals over 2, formed in float64 and rounded to a multiple of the largest
    power of two <= std / 1024 (Holohan & Braghin 2021, arXiv:2107.10138; Mironov 2012): hardening, no guarantee.
    Beyond 2^24 of them float32 (2^8: bfloat16) holds every second, fourth, ... only; a zero has no sign.
    """
    require(x.dtype in DTYPES, "x.dtype", x.dtype, "float32, bfloat16 or float64")
    require(x.is_contiguous(), "x.stride()", x.stride(), "contiguous")
    check_device("x", x)
    check_range("std", std)
    if x.dtype != torch.float64:  # where float32 has all its digits
        require(std == 0 or 1e-30 <= std <= 1e30, "std", std, "0 or in [1e-30, 1e30]")
    check_key(key, step)
    last = MAX_SECURE_OFFSET if secure else MAX_OFFSET
    require(0 <= offset <= last - x.numel(), "offset", offset, f"in [0, {last} - x.numel()]")
    add = _kernels.secure_noise if secure else _kernels.gaussian_noise
    threads = torch.get_num_threads()
    add(x.data_ptr(), DTYPES[x.dtype], x.numel(), std, key.data_ptr(), step, offset, threads)


def noise_step(
    h: _kernels.SgdStep | _kernels.AdamStep,
    parameters: list[tuple[int, int, int, int, int]],
    flat: Tensor,
    key: Tensor,
    step: int,
    share: _kernels.StepShare = ALL,
    first_sum: int = 0,
) -> None:
    """One step of each parameter on the noised sum in `flat`, or of a share of them for all ranks of this host.

    parameters: (address, two addresses of state or 0, length, offset in `flat`) of each, of flat's dtype.
    first_sum: where the first rank has what this rank has at flat's address.
    """
    threads, sums = torch.get_num_threads(), first_sum or flat.data_ptr()
    _kernels.noise_step(h, parameters, sums, DTYPES[flat.dtype], key.data_ptr(), step, share, threads)


def poisson_sample(n: int, rate: float, key: Tensor, step: int) -> Tensor:
    """Ids of 0..n-1, each with probability `rate` -> int64, ascending."""
    require(0 <= n <= MAX_RECORDS, "n", n, f"in [0, {MAX_RECORDS}]")
    require(0.0 <= rate <= 1.0, "rate", rate, "in [0, 1]")
    check_key(key, step)
    return torch.from_numpy(_kernels.poisson_sample(n, rate, key.data_ptr(), step))


# ---- checks; a message is made only when it is needed, since formatting a shape costs more than the check


def check_device(name: str, x: Tensor) -> None:
    if not x.is_cpu:
        raise ArgumentError(f"{name}.device", str(x.device), "cpu")


def check_rows(name: str, x: Tensor, dims: tuple[int, ...] = (2,)) -> None:
    check_device(name, x)
    if x.dim() not in dims:
        raise ArgumentError(f"{name}.shape", list(x.shape), f"of {' or '.join(map(str, dims))} dimensions")
    if x.dtype not in DTYPES:
        raise ArgumentError(f"{name}.dtype", x.dtype, "float32, bfloat16 or float64")


def check_indices(index: Tensor, b: Tensor) -> None:
    if index.dtype != torch.int64 or index.shape != b.shape[:2] or index.device != b.device:
        found = f"{index.dtype}{list(index.shape)} on {index.device}"
        raise ArgumentError("index", found, f"torch.int64{list(b.shape[:2])} on {b.device}")


def check_packed(name: str, x: Tensor) -> None:
    """Rows may lie apart, or on each other (an expanded tensor); the elements of a row must be adjacent."""
    if x.is_contiguous():
        return
    if not (x.shape[-1] <= 1 or x.stride(-1) == 1):
        raise ArgumentError(f"{name}.stride()", x.stride(), "packed rows (call .contiguous())")


def _check_sums(g: Tensor, out: Tensor) -> None:
    want = sum_dtype(g.dtype)
    if out.dtype != want or out.shape != g.shape[1:] or not out.is_contiguous() or not out.is_cpu:
        raise ArgumentError("out", f"{out.dtype}{list(out.shape)}", f"contiguous {want}{list(g.shape[1:])} on cpu")
    if g.numel() and out.untyped_storage().data_ptr() == g.untyped_storage().data_ptr():
        raise ArgumentError("out", "in g's memory", "memory of its own")


def check_range(name: str, value: float) -> None:
    require(0.0 <= value < float("inf"), name, value, "finite and >= 0")


def check_key(key: Tensor, step: int) -> None:
    if key.dtype != torch.uint8 or key.shape != (KEY_BYTES,) or not key.is_contiguous() or not key.is_cpu:
        found = f"{key.dtype}{list(key.shape)} on {key.device}"
        raise ArgumentError("key", found, "a contiguous uint8[32] tensor on cpu")
    require(0 <= step < 2**63, "step", step, "in [0, 2^63)")


def _cell(gates: Tensor, *states: Tensor) -> list[tuple[int, int]]:
    """Addresses, and elements from row to row."""
    rows, n = states[0].shape
    for x, width in ((gates, 4 * n), *((s, n) for s in states)):
        if x.shape != (rows, width) or x.dtype != gates.dtype or not (n == 1 or x.stride(1) == 1) or not x.is_cpu:
            found = f"{x.dtype}{list(x.shape)}, stride {x.stride()}"
            raise ArgumentError("gates" if x is gates else "states", found, f"packed rows [{rows}, {width}]")
    return [(x.data_ptr(), x.stride(0)) for x in (gates, *states)]


def _check_same(a: Tensor, b: Tensor) -> None:
    check_rows("a", a, (3,))
    if not a.is_contiguous() or not b.is_contiguous() or b.shape != a.shape or b.dtype != a.dtype or not b.is_cpu:
        raise ArgumentError("b", f"{b.dtype}{list(b.shape)}", f"contiguous {a.dtype}{list(a.shape)}, as a")


def _three(a: Tensor) -> tuple[int, int, int]:
    return a.shape[0], a.shape[1], a.shape[2]


def _addresses(a: Tensor, weight: Tensor | None, bias: Tensor | None, n: int) -> tuple[int, int]:
    """Of results [B, n], or 0 of what is not wanted."""
    for name, out in (("weight", weight), ("bias", bias)):
        if out is not None and (
            out.shape != (a.shape[0], n) or out.dtype != sum_dtype(a.dtype) or not out.is_contiguous()
        ):
            found = f"{out.dtype}{list(out.shape)}"
            raise ArgumentError(name, found, f"contiguous {sum_dtype(a.dtype)}[{a.shape[0]}, {n}]")
    return tuple(0 if out is None else out.data_ptr() for out in (weight, bias))  # type: ignore[return-value]


def dtype_code(x: torch.Tensor, codes: dict[torch.dtype, int], name: str = "x") -> int:
    """codes[x.dtype] of a packed tensor with memory, on the CPU."""
    # One expression for the good case: this is on the path of every collective.
    if isinstance(x, torch.Tensor) and x.is_cpu and x.layout is torch.strided and x.is_contiguous():
        code = codes.get(x.dtype)
        if code is not None and (x.data_ptr() or not x.numel()) and not x.is_neg():
            return code
    require(isinstance(x, torch.Tensor), name, type(x).__name__, "a torch.Tensor")
    known = ", ".join(map(str, codes))
    require(x.dtype in codes, f"{name}.dtype", x.dtype, f"one of {known}" if len(codes) > 1 else known)
    require(x.is_cpu, f"{name}.device", str(x.device), "cpu")
    require(x.layout is torch.strided, f"{name}.layout", x.layout, "torch.strided")
    require(x.data_ptr() != 0 or x.numel() == 0, f"{name}.untyped_storage().nbytes()", 0, f"enough for {x.numel()}")
    require(not x.is_neg(), f"{name}.is_neg()", True, "False: call resolve_neg()")
    raise ArgumentError(f"{name}.stride()", x.stride(), f"that of a contiguous tensor of shape {tuple(x.shape)}")
