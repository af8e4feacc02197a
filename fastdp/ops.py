"""The kernels, on plain tensors: checked, registered with torch.library, dispatched to the native module.

All of them work under `torch.compile(fullgraph=True)`. CPU tensors of float32, bfloat16 or float64; rows must be
packed (elements of a row adjacent), which is checked, never assumed. None of them is differentiable.

Randomness is a function of `(key, step)` and of an index, and of nothing else: the same on every machine, instruction
set and thread count. `key` is a uint8[32] tensor and a secret. With `key=None` a fresh one is drawn from the operating
system; a given key wants a `step` that was never used with it for other data, since equal noise cancels out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdp import _kernels
from fastdp.errors import ArgumentError, require

__all__ = [
    "clip_noise",
    "clip_sum",
    "gaussian_noise_",
    "linear_sq_norms",
    "poisson_sample",
    "random_key",
    "sq_norms",
]

KEY_BYTES = 32

DTYPES = {
    torch.float32: _kernels.DType.f32,
    torch.bfloat16: _kernels.DType.bf16,
    torch.float64: _kernels.DType.f64,
}


def sq_norms(g: Tensor) -> Tensor:
    """Squared L2 norms of the rows of `g` [B, D] -> float64 [B].

    Float64 because the square of a float32 above 1.8e19 is no float32. Squares of float64 elements beyond 1e154
    overflow to inf.
    """
    out: Tensor = torch.ops.fastdp.sq_norms(g)
    return out


def clip_sum(g: Tensor, max_norm: float, out: Tensor | None = None) -> Tensor:
    """Sum of the rows of `g` [B, D], each scaled down to L2 norm <= `max_norm` -> [D].

    Equation: sum_i g_i * min(1, max_norm / ||g_i||), Abadi et al. 2016 (arXiv:1607.00133), algorithm 1. The result is
    float32 for float32 and bfloat16 input, float64 for float64.

    Guarantee: each row's contribution has norm <= max_norm, the rounding of its elements included, or is left out: a
    row with a NaN, an infinity or a norm that overflows contributes nothing. `max_norm=0` gives zeros.
    """
    if out is None:
        result: Tensor = torch.ops.fastdp.clip_sum(g, max_norm)
        return result
    torch.ops.fastdp.clip_sum.out(g, max_norm, out=out)
    return out


def clip_noise(
    g: Tensor,
    max_norm: float,
    noise_multiplier: float,
    *,
    key: Tensor | None = None,
    step: int | Tensor | None = None,
) -> Tensor:
    """`clip_sum(g, max_norm)` plus Gaussian noise of standard deviation `noise_multiplier * max_norm` -> [D].

    Guarantee: one Gaussian mechanism of that noise multiplier under add/remove adjacency of rows (account for it with
    `fastdp.accounting`), up to float arithmetic and the cut at 9.49 standard deviations.
    """
    key, step = _key_and_step(key, step)
    out: Tensor = torch.ops.fastdp.clip_noise(g, max_norm, noise_multiplier, key, step)
    return out


def linear_sq_norms(a: Tensor, b: Tensor, bias: bool = True) -> Tensor:
    """Squared norms of a linear layer's per-sample gradients, which are not formed -> float64 [B].

    a: the layer's inputs [B, I] or [B, T, I]; b: the gradients of its outputs [B, O] or [B, T, O], of the same dtype.
    Equation: ||sum_t b_t a_t^T||^2 (+ ||sum_t b_t||^2 if `bias`); Goodfellow 2015 (arXiv:1510.01799) for T = 1, Li et
    al. 2022 (arXiv:2110.05679) for sequences, in O(T^2 (I + O)) per record.
    """
    out: Tensor = torch.ops.fastdp.linear_sq_norms(a, b, bias)
    return out


def gaussian_noise_(
    x: Tensor, std: float, *, key: Tensor | None = None, step: int | Tensor | None = None, offset: int = 0
) -> Tensor:
    """Add N(0, std^2) to `x` in place; element i gets the noise of index `offset + i`.

    Source: ChaCha20 (RFC 8439) and Box-Muller on 64 + 32 bits a pair, in float32: exact in law down to a step of
    2^-65 in the logarithm's argument, cut at sqrt(130 log 2) = 9.49 standard deviations.
    """
    key, step = _key_and_step(key, step)
    torch.ops.fastdp.gaussian_noise_(x, std, key, step, offset)
    return x


def poisson_sample(n: int, rate: float, *, key: Tensor | None = None, step: int | Tensor | None = None) -> Tensor:
    """Ids of a Poisson sample: each of 0..n-1 with probability `rate`, independently -> int64, ascending.

    Costs O(n / 4096 + n * rate): geometric skips within blocks of 4096 ids, each block from a stream of its own. Under
    torch.compile it needs `torch._dynamo.config.capture_dynamic_output_shape_ops = True`, as torch.nonzero does.
    """
    key, step = _key_and_step(key, step)
    out: Tensor = torch.ops.fastdp.poisson_sample(n, rate, key, step)
    return out


def random_key() -> Tensor:
    """A fresh key from the operating system: uint8[32]. It is the secret that privacy rests on: do not store it."""
    return torch.frombuffer(bytearray(os.urandom(KEY_BYTES)), dtype=torch.uint8)


def _key_and_step(key: Tensor | None, step: int | Tensor | None) -> tuple[Tensor, Tensor]:
    if key is None:
        # A compiler may fold two equal calls without inputs into one, and equal keys are equal noise.
        require(not torch.compiler.is_compiling(), "key", None, "a tensor under torch.compile: ops.random_key()")
        key = random_key()
        step = 0 if step is None else step
    if step is None:
        raise ArgumentError("step", step, "given with a key, and never used with it before")
    if not isinstance(step, Tensor):
        step = torch.scalar_tensor(step, dtype=torch.int64)
    return key, step


# ---- checks


# Each message is made only when it is needed: formatting a shape costs more than the check.


def _check_device(name: str, x: Tensor) -> None:
    if not x.is_cpu:
        raise ArgumentError(f"{name}.device", str(x.device), "cpu: this build has no CUDA kernels")


def _check_rows(name: str, x: Tensor, dims: tuple[int, ...] = (2,)) -> None:
    if x.dim() not in dims:
        raise ArgumentError(f"{name}.shape", list(x.shape), f"of {' or '.join(map(str, dims))} dimensions")
    if x.dtype not in DTYPES:
        raise ArgumentError(f"{name}.dtype", x.dtype, "float32, bfloat16 or float64")


def _check_packed(name: str, x: Tensor) -> None:
    """Rows may lie apart, or on each other (an expanded tensor); the elements of a row must be adjacent."""
    if x.is_contiguous():
        return
    ok = x.shape[-1] <= 1 or x.stride(-1) == 1
    if x.dim() == 3 and x.shape[0] > 1 and x.shape[1] > 1:
        ok = ok and x.stride(0) == x.shape[1] * x.stride(1)
    require(ok, f"{name}.stride()", x.stride(), "packed rows (call .contiguous())")


def _check_range(name: str, value: float) -> None:
    require(0.0 <= value < float("inf"), name, value, "finite and >= 0")


def _check_key_step(key: Tensor, step: Tensor) -> int:
    require(
        key.dtype == torch.uint8 and key.shape == (KEY_BYTES,) and key.is_contiguous() and key.device.type == "cpu",
        "key",
        f"{key.dtype}{list(key.shape)} on {key.device}",
        "a contiguous uint8[32] tensor on cpu",
    )
    require(step.dtype == torch.int64 and step.numel() == 1, "step", step.dtype, "an int or one int64")
    value = int(step.item())
    require(value >= 0, "step", value, ">= 0")
    return value


def _row_stride(x: Tensor) -> int:
    """Elements from one row of the last dimension to the next."""
    if x.dim() == 3 and x.shape[1] == 1:
        return x.stride(0)
    return x.stride(-2)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over records of `dtype` come in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- kernels for the CPU, as torch.library calls them


def _sq_norms(g: Tensor) -> Tensor:
    _check_rows("g", g)
    _check_packed("g", g)
    out = torch.empty(g.shape[0], dtype=torch.float64)
    _kernels.sq_norms(
        g.data_ptr(), DTYPES[g.dtype], g.shape[0], g.shape[1], g.stride(0), out.data_ptr(), torch.get_num_threads()
    )
    return out


def _clip_sum_out(g: Tensor, max_norm: float, *, out: Tensor) -> None:
    _check_rows("g", g)
    _check_packed("g", g)
    _check_range("max_norm", max_norm)
    want = sum_dtype(g.dtype)
    require(
        out.dtype == want and out.shape == g.shape[1:] and out.is_contiguous() and out.device.type == "cpu",
        "out",
        f"{out.dtype}{list(out.shape)}",
        f"contiguous {want}{list(g.shape[1:])} on cpu",
    )
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


def _clip_sum(g: Tensor, max_norm: float) -> Tensor:
    _check_rows("g", g)
    out = torch.empty(g.shape[1], dtype=sum_dtype(g.dtype))
    _clip_sum_out(g, max_norm, out=out)
    return out


def _clip_noise(g: Tensor, max_norm: float, noise_multiplier: float, key: Tensor, step: Tensor) -> Tensor:
    _check_range("noise_multiplier", noise_multiplier)
    _check_key_step(key, step)
    out = _clip_sum(g, max_norm)
    _gaussian_noise_(out, noise_multiplier * max_norm, key, step, 0)
    return out


def _linear_sq_norms(a: Tensor, b: Tensor, bias: bool) -> Tensor:
    out = torch.zeros(a.shape[0], dtype=torch.float64)
    add_linear_sq_norms(a, b, bias, out)
    return out


def add_linear_sq_norms(a: Tensor, b: Tensor, bias: bool, out: Tensor) -> None:
    """out [B] += linear_sq_norms(a, b, bias)."""
    for name, x in (("a", a), ("b", b)):
        _check_rows(name, x, (2, 3))
        _check_packed(name, x)
        _check_device(name, x)
    if a.shape[:-1] != b.shape[:-1] or a.dtype != b.dtype:
        raise ArgumentError("b", f"{b.dtype}{list(b.shape)}", f"{a.dtype}{[*a.shape[:-1], 'O']}, as a")
    positions = a.shape[1] if a.dim() == 3 else 1
    if positions == 0:
        return
    _kernels.linear_sq_norms(
        a.data_ptr(),
        b.data_ptr(),
        DTYPES[a.dtype],
        a.shape[0],
        positions,
        a.shape[-1],
        b.shape[-1],
        _row_stride(a),
        _row_stride(b),
        bias,
        out.data_ptr(),
        torch.get_num_threads(),
    )


def _gaussian_noise_(x: Tensor, std: float, key: Tensor, step: Tensor, offset: int) -> None:
    require(x.dtype in DTYPES, "x.dtype", x.dtype, "float32, bfloat16 or float64")
    require(x.is_contiguous(), "x.stride()", x.stride(), "contiguous")
    _check_range("std", std)
    require(offset >= 0, "offset", offset, ">= 0")
    _kernels.gaussian_noise(
        x.data_ptr(),
        DTYPES[x.dtype],
        x.numel(),
        std,
        key.data_ptr(),
        _check_key_step(key, step),
        offset,
        torch.get_num_threads(),
    )


def _poisson_sample(n: int, rate: float, key: Tensor, step: Tensor) -> Tensor:
    require(n >= 0, "n", n, ">= 0")
    require(0.0 <= rate <= 1.0, "rate", rate, "in [0, 1]")
    value = _check_key_step(key, step)
    return torch.from_numpy(_kernels.poisson_sample(n, rate, key.data_ptr(), value))


# ---- registration

_library = torch.library.Library("fastdp", "DEF")


def _refuse_cuda(*args: object, **kwargs: object) -> None:
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            _check_device("tensor", x)


def _register(schema: str, cpu: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(schema)
    name = schema.split("(")[0]
    _library.impl(name, cpu, "CPU")
    _library.impl(name, _refuse_cuda, "CUDA")
    torch.library.register_fake(f"fastdp::{name}", fake, lib=_library)


def _fake_poisson(n: int, rate: float, key: Tensor, step: Tensor) -> Tensor:
    return torch.empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


_register("sq_norms(Tensor g) -> Tensor", _sq_norms, lambda g: g.new_empty(g.shape[0], dtype=torch.float64))
_register(
    "clip_sum(Tensor g, float max_norm) -> Tensor",
    _clip_sum,
    lambda g, max_norm: g.new_empty(g.shape[1], dtype=sum_dtype(g.dtype)),
)
_register(
    "clip_sum.out(Tensor g, float max_norm, *, Tensor(a!) out) -> ()",
    _clip_sum_out,
    lambda g, max_norm, *, out: None,
)
_register(
    "clip_noise(Tensor g, float max_norm, float noise_multiplier, Tensor key, Tensor step) -> Tensor",
    _clip_noise,
    lambda g, max_norm, noise_multiplier, key, step: g.new_empty(g.shape[1], dtype=sum_dtype(g.dtype)),
)
_register(
    "linear_sq_norms(Tensor a, Tensor b, bool bias) -> Tensor",
    _linear_sq_norms,
    lambda a, b, bias: a.new_empty(a.shape[0], dtype=torch.float64),
)
_register(
    "gaussian_noise_(Tensor(a!) x, float std, Tensor key, Tensor step, SymInt offset) -> ()",
    _gaussian_noise_,
    lambda x, std, key, step, offset: None,
)
_register("poisson_sample(SymInt n, float rate, Tensor key, Tensor step) -> Tensor", _poisson_sample, _fake_poisson)
