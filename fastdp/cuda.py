"""The kernels on CUDA tensors: every argument of one is checked here, as native.py does for the CPU, then passed on by
address, on the current stream of the tensor's device. Nothing here waits for the GPU.

Compiled for GPUs, and run by an emulator of one on the CPU (tests/cuda): no GPU has run them yet. Where torch's own
functions do as well, they do.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdp import native
from fastdp.errors import ArgumentError, PrivacyError, require

if TYPE_CHECKING:
    from fastdp import _cuda, _kernels

DEVICE = "cuda"  # "cpu" where tests put the emulator in the kernels' place, "meta" where tensors hold nothing

WINDOWS_AT_ONCE = 1 << 26  # numbers, 256 MiB: what convolutions' weights see, of as many records at once

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of `Element`, in this order


def kernels() -> ModuleType:
    """fastdp._cuda, or an error that says how to have it."""
    try:
        from fastdp import _cuda
    except ImportError as error:
        raise ArgumentError(
            "device",
            "cuda",
            f"cpu: this build has no CUDA kernels ({error}); pip install with "
            "--config-settings=cmake.define.FASTDP_CUDA=ON",
        ) from None
    return _cuda


@contextlib.contextmanager
def _on(x: Tensor) -> Iterator[tuple[ModuleType, _cuda.Place]]:
    """The kernels, and where they run: on the stream that torch has chosen, with scratch from its allocator, which
    gives the memory again only to what comes later on that stream."""
    module = kernels()
    kept: list[Tensor] = []

    def memory(nbytes: int) -> int:
        kept.append(torch.empty(nbytes, dtype=torch.uint8, device=x.device))
        return kept[-1].data_ptr()

    if DEVICE != "cuda":
        yield module, module.Place(0, memory)
        return
    with torch.cuda.device(x.device):
        yield module, module.Place(torch.cuda.current_stream().cuda_stream, memory)


def sq_norms(g: Tensor) -> Tensor:
    """[B, D] -> float64 [B]."""
    table = _table("g", g)
    out = torch.empty(g.shape[0], dtype=torch.float64, device=g.device)
    with _on(g) as (module, place):
        module.sq_norms(place, _element(module, g), table, out.data_ptr())
    return out


def clip_sum(g: Tensor, max_norm: float, out: Tensor | None = None) -> Tensor:
    """[B, D] -> float32 [D]: sum of the rows, each scaled to a norm of at most max_norm. Reads each row once if the
    GPU's shared memory holds one."""
    table = _table("g", g)
    native.check_range("max_norm", max_norm)
    out = torch.empty(g.shape[1], dtype=torch.float32, device=g.device) if out is None else out
    _check_out(g, out)
    with _on(g) as (module, place):
        module.clip_sum(place, _element(module, g), table, max_norm, out.data_ptr())
    return out


def clip_factors(
    sq_norms: Tensor, dtype: torch.dtype, scale: float, max_norm: float, gamma: float | None = None
) -> tuple[Tensor, int]:
    """float64 [B]: `native.clip_factors` of float32 gradients, on a GPU; and B, as how many of them may be 0."""
    require(dtype == torch.float32, "dtype", dtype, "torch.float32 on a GPU")
    if sq_norms.dtype != torch.float64 or sq_norms.dim() != 1 or not sq_norms.is_contiguous():
        raise ArgumentError("sq_norms", f"{sq_norms.dtype}{list(sq_norms.shape)}", "contiguous torch.float64[B]")
    native.check_range("scale", scale)
    native.check_range("max_norm", max_norm)
    out = torch.empty_like(sq_norms)
    with _on(sq_norms) as (module, place):
        wanted = -1.0 if gamma is None else gamma
        module.clip_factors(place, sq_norms.data_ptr(), len(out), scale, max_norm, wanted, out.data_ptr())
    return out, len(out)


def sum_rows(g: Tensor, factors: Tensor, out: Tensor, add: bool) -> None:
    """out float32 [D] = sum of factors [B] * rows of g [B, D], or that added to it; rows of factor 0 are not read."""
    table = _table("g", g)
    if factors.dtype != torch.float64 or factors.shape != g.shape[:1] or not factors.is_contiguous():
        raise ArgumentError("factors", f"{factors.dtype}{list(factors.shape)}", f"contiguous float64[{len(g)}]")
    require(factors.device == g.device, "factors.device", str(factors.device), str(g.device))
    _check_out(g, out)
    with _on(g) as (module, place):
        module.sum_rows(place, _element(module, g), table, factors.data_ptr(), out.data_ptr(), add)


def scale_rows(x: Tensor, factors: Tensor, out: Tensor, sums: Tensor | None) -> None:
    """`native.scale_rows` of float32, on a GPU: out [B, n] = factors [B] * x [B, n] or [B / k, k, n], rows of factor 0
    unread; their sum over rows into `sums` [n]."""
    require(x.dtype == torch.float32, "x.dtype", x.dtype, "torch.float32")
    sequences = _sequences("x", x.unsqueeze(1) if x.dim() == 2 else x)
    rows = sequences[1] * sequences[2]
    if factors.dtype != torch.float64 or factors.shape != (rows,) or not factors.is_contiguous():
        raise ArgumentError("factors", f"{factors.dtype}{list(factors.shape)}", f"contiguous float64[{rows}]")
    require(factors.device == x.device, "factors.device", str(factors.device), str(x.device))
    if out.dtype != x.dtype or out.shape != (rows, x.shape[-1]) or not out.is_contiguous() or out.device != x.device:
        raise ArgumentError("out", f"{out.dtype}{list(out.shape)}", f"contiguous {x.dtype}[{rows}, {x.shape[-1]}]")
    with _on(x) as (module, place):
        module.scale_rows(place, sequences, factors.data_ptr(), out.data_ptr())
    if sums is not None:
        sum_rows(x, factors, sums, add=False)


def add_linear_sq_norms(layers: list[tuple[Tensor, Tensor, bool]], out: Tensor, bounds: Tensor | None = None) -> None:
    """`native.add_linear_sq_norms` on a GPU: out float64 [B] += those of each of a [B, (T,) I], b [B, (T,) O], bias."""
    for a, b, bias in layers:
        sequences = [_sequences(name, x) for name, x in (("a", a), ("b", b))]
        if a.shape[:-1] != b.shape[:-1] or a.dtype != b.dtype or a.device != b.device:
            found, want = (f"{x.dtype}{list(x.shape)} on {x.device}" for x in (b, a))
            raise ArgumentError("b", found, f"as a, {want}, but for the last dimension")
        for name, to, shape in (("out", out, [len(a)]), ("bounds", bounds, [len(a), 3])):
            if to is not None and (to.dtype != torch.float64 or list(to.shape) != shape or not to.is_contiguous()):
                raise ArgumentError(name, f"{to.dtype}{list(to.shape)}", f"contiguous torch.float64{shape}")
            if to is not None:
                require(to.device == a.device, f"{name}.device", str(to.device), str(a.device))
        if a.dim() == 3 and a.shape[1] == 0:
            continue
        with _on(a) as (module, place):
            at = 0 if bounds is None else bounds.data_ptr()
            module.linear_sq_norms(place, _element(module, a), *sequences, bias, out.data_ptr(), at)


def linear_sq_norms(a: Tensor, b: Tensor, bias: bool) -> Tensor:
    """Squared norms of per-sample gradients of a linear layer -> float64 [B]; a [B, (T,) I], b [B, (T,) O]."""
    out = torch.zeros(a.shape[:1], dtype=torch.float64, device=a.device)
    add_linear_sq_norms([(a, b, bias)], out)
    return out


def embedding_sq_norms(index: Tensor, b: Tensor, padding_index: int | None) -> Tensor:
    """float64 [B]: `ops.embedding_sq_norms`."""
    sequences = _sequences("b", b)
    require(b.dim() == 3, "b.shape", list(b.shape), "[B, T, E]")
    native.check_indices(index, b)
    require(index.is_contiguous(), "index.stride()", index.stride(), "contiguous")
    out = torch.zeros(b.shape[0], dtype=torch.float64, device=b.device)
    padding = -(2**63) if padding_index is None else padding_index
    with _on(b) as (module, place):
        module.embedding_sq_norms(place, _element(module, b), index.data_ptr(), sequences, padding, out.data_ptr())
    return out


def add_noise(x: Tensor, std: float, key: Tensor, step: int, offset: int, secure: bool = False) -> None:
    """x [...] += std * N(offset + i), the bits of the CPU's noise."""
    require(not secure, "secure_mode", secure, "False on a GPU: the hardened noise is the CPU's only")
    _check("x", x)
    require(x.is_contiguous(), "x.stride()", x.stride(), "contiguous")
    native.check_range("std", std)
    require(std == 0 or 1e-30 <= std <= 1e30, "std", std, "0 or in [1e-30, 1e30]")
    native.check_key(key, step)
    require(0 <= offset <= native.MAX_OFFSET - x.numel(), "offset", offset, f"in [0, {native.MAX_OFFSET} - x.numel()]")
    _refuse_capture(x)
    with _on(x) as (module, place):
        module.gaussian_noise(place, _element(module, x), x.data_ptr(), x.numel(), std, key.data_ptr(), step, offset)


def noise_step(
    h: _kernels.SgdStep | _kernels.AdamStep,
    parameters: list[tuple[int, int, int, int, int]],
    flat: Tensor,
    key: Tensor,
    step: int,
) -> None:
    """`native.noise_step` for float32 parameters on flat's device: one step of each on the noised sum."""
    _check("flat", flat)
    require(flat.dtype == torch.float32, "flat.dtype", flat.dtype, "torch.float32")
    require(flat.is_contiguous(), "flat.stride()", flat.stride(), "contiguous")
    native.check_key(key, step)
    _refuse_capture(flat)
    with _on(flat) as (module, place):
        module.noise_step(place, h, parameters, flat.data_ptr(), key.data_ptr(), step)


def poisson_sample(n: int, rate: float, key: Tensor, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [room] int64 and how many of them are meant, int64 [1]: the CPU's batch, on a GPU without waiting for it.

    room: six standard deviations above the mean. A batch beyond it, rarer than 1e-9, has a count above `len(ids)`: then
    draw it on the CPU.
    """
    require(0 <= n <= native.MAX_RECORDS, "n", n, f"in [0, {native.MAX_RECORDS}]")
    require(0.0 <= rate <= 1.0, "rate", rate, "in [0, 1]")
    native.check_key(key, step)
    room = min(n, math.ceil(n * rate + 6.0 * math.sqrt(n * rate) + 16.0))
    ids = torch.empty(room, dtype=torch.int64, device=device)
    total = torch.empty(1, dtype=torch.int64, device=device)
    _refuse_capture(total)
    with _on(total) as (module, place):
        module.poisson_sample(place, n, rate, key.data_ptr(), step, ids.data_ptr(), room, total.data_ptr())
    return ids, total


# ---- what torch does on a GPU, with the arguments of native.py


def layer_norm_gradients(
    a: Tensor, b: Tensor, eps: float, centre: bool, weight: Tensor | None, bias: Tensor | None
) -> None:
    if weight is not None:
        a = a - a.mean(2, keepdim=True) if centre else a
        normal = a * (a.square().mean(2, keepdim=True) + eps).rsqrt()
        torch.sum(b * normal, 1, out=weight)
    if bias is not None:
        torch.sum(b, 1, out=bias)


def group_norm_gradients(
    a: Tensor, b: Tensor, groups: int, eps: float, weight: Tensor | None, bias: Tensor | None
) -> None:
    if weight is not None:
        of_group = a.reshape(len(a), groups, -1)
        centred = of_group - of_group.mean(2, keepdim=True)
        normal = centred * (centred.square().mean(2, keepdim=True) + eps).rsqrt()
        torch.sum(b * normal.view_as(a), 2, out=weight)
    if bias is not None:
        torch.sum(b, 2, out=bias)


def convolution_gradients(
    a: Tensor,
    b: Tensor,
    groups: int,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    out: Tensor,
) -> None:
    """By matrix products, of what the weights see at each position: of cuDNN's convolutions, TF32 would have to be
    switched off for the process."""
    native.convolution_positions(a, b, groups, stride, padding, dilation, out)
    dims, kernel = a.dim() - 2, out.shape[3:]
    a = F.pad(a, [pad for pad in reversed(padding) for _ in range(2)])
    for d in range(dims):
        a = a.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])[..., :: dilation[d]]
    windows = a.unflatten(1, (groups, -1))  # [B, groups, C / groups, positions of each dimension, kernel]
    windows = windows.permute(0, 1, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    gradients, sums = b.unflatten(1, (groups, -1)).flatten(3), out.unflatten(1, (groups, -1)).flatten(3)
    each = max(1, WINDOWS_AT_ONCE * len(a) // max(1, windows.numel()))  # records
    for x, g, to in zip(windows.split(each), gradients.split(each), sums.split(each), strict=True):
        torch.matmul(g, x.flatten(2 + dims).flatten(2, 1 + dims), out=to)


def lstm_forward(gates: Tensor, before: Tensor, c: Tensor, h: Tensor) -> None:
    i, f, g, o = gates.chunk(4, 1)
    for gate in (i, f, o):
        gate.sigmoid_()
    g.tanh_()
    torch.mul(f, before, out=c).addcmul_(i, g)
    torch.mul(o, c.tanh(), out=h)


def lstm_backward(gates: Tensor, before: Tensor, c: Tensor, dh: Tensor, dc: Tensor) -> None:
    i, f, g, o = gates.chunk(4, 1)
    t = c.tanh()
    dc.addcmul_(dh * o, 1 - t.square())
    di, df, dg, do = dc * g, dc * before, dc * i, dh * t
    dc *= f
    for gate, gradient in ((i, di), (f, df), (o, do)):
        gate.mul_(1 - gate).mul_(gradient)
    g.copy_(dg * (1 - g.square()))


def _refuse_capture(x: Tensor) -> None:
    if not x.is_cuda:
        return
    with torch.cuda.device(x.device):
        is_capturing = torch.cuda.is_current_stream_capturing()
    if is_capturing:
        raise PrivacyError("a CUDA graph would replay one step's noise or batch: leave it out of what is captured")


def _check(name: str, x: Tensor, dims: tuple[int, ...] = ()) -> None:
    require(x.device.type == DEVICE, f"{name}.device", str(x.device), DEVICE)
    require(not dims or x.dim() in dims, f"{name}.shape", list(x.shape), f"of {dims} dimensions")
    require(x.dtype in DTYPES, f"{name}.dtype", x.dtype, "float32, bfloat16 or float16 on a GPU")


def _element(module: ModuleType, x: Tensor) -> _cuda.Element:
    return module.Element(DTYPES.index(x.dtype))  # type: ignore[no-any-return]


def _table(name: str, g: Tensor) -> tuple[int, int, int, int]:
    _check(name, g, (2,))
    native.check_packed(name, g)
    return g.data_ptr(), g.shape[0], g.shape[1], g.stride(0)


def _sequences(name: str, x: Tensor) -> tuple[int, int, int, int, int, int]:
    """As the kernels see [B, T, n], or [B, n] as T = 1."""
    _check(name, x, (2, 3))
    native.check_packed(name, x)
    positions = x.shape[1] if x.dim() == 3 else 1
    return x.data_ptr(), x.shape[0], positions, x.shape[-1], x.stride(0), x.stride(-2)


def _check_out(g: Tensor, out: Tensor) -> None:
    if out.dtype != torch.float32 or out.shape != g.shape[1:] or not out.is_contiguous() or out.device != g.device:
        found = f"{out.dtype}{list(out.shape)} on {out.device}"
        raise ArgumentError("out", found, f"contiguous torch.float32{list(g.shape[1:])} on {g.device}")
    if g.numel() and out.untyped_storage()._cdata == g.untyped_storage()._cdata:
        raise ArgumentError("out", "in g's memory", "memory of its own")
