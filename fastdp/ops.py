"""The kernels, on plain tensors: registered with torch.library.

All of them work under `torch.compile(fullgraph=True)`. CPU tensors of float32, bfloat16 or float64, or, in a build with
CUDA kernels, CUDA tensors of float32, bfloat16 or float16 (but for `poisson_sample`, which gives CPU tensors); rows
must be packed (elements of a row adjacent), which is checked, never assumed. None of them is differentiable: what they
give does not require a gradient.

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

from fastdp import cuda, native
from fastdp.errors import ArgumentError, PrivacyError, require

__all__ = [
    "clip_noise",
    "clip_sum",
    "embedding_sq_norms",
    "gaussian_noise_",
    "linear_sq_norms",
    "poisson_sample",
    "random_key",
    "sq_norms",
]


def _detached(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise ArgumentError(name, type(x).__name__, "a torch.Tensor")
    return x.detach()


def sq_norms(g: Tensor) -> Tensor:
    """Squared L2 norms of the rows of `g` [B, D] -> float64 [B].

    Float64 because the square of a float32 above 1.8e19 is no float32. Squares of float64 elements beyond 1e154
    overflow to inf.
    """
    out: Tensor = torch.ops.fastdp.sq_norms(_detached("g", g))
    return out


def clip_sum(g: Tensor, max_norm: float, out: Tensor | None = None) -> Tensor:
    """Sum of the rows of `g` [B, D], each scaled down to L2 norm <= `max_norm` -> [D].

    Equation: sum_i g_i * min(1, max_norm / ||g_i||), Abadi et al. 2016 (arXiv:1607.00133), algorithm 1. The result is
    float32 for float32 and bfloat16 input, float64 for float64.

    Guarantee: each row's contribution has norm <= max_norm, the rounding of its elements included, or is left out: a
    row with a NaN, an infinity or a norm that overflows contributes nothing. `max_norm=0` gives zeros.
    """
    if out is None:
        result: Tensor = torch.ops.fastdp.clip_sum(_detached("g", g), max_norm)
        return result
    torch.ops.fastdp.clip_sum.out(_detached("g", g), max_norm, out=out)
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

    key, step: as for `gaussian_noise_`: a pair gives one noise.

    Guarantee: one Gaussian mechanism of that noise multiplier under add/remove adjacency of rows (account for it with
    `fastdp.accounting`), up to float arithmetic and the cut at 9.49 standard deviations.
    """
    key, step = _key_and_step(key, step)
    out: Tensor = torch.ops.fastdp.clip_noise(_detached("g", g), max_norm, noise_multiplier, key, step)
    return out


def linear_sq_norms(a: Tensor, b: Tensor, bias: bool = True) -> Tensor:
    """Squared norms of a linear layer's per-sample gradients, which are not formed -> float64 [B].

    a: the layer's inputs [B, I] or [B, T, I]; b: the gradients of its outputs [B, O] or [B, T, O], of the same dtype.
    Equation: ||sum_t b_t a_t^T||^2 (+ ||sum_t b_t||^2 if `bias`); Goodfellow 2015 (arXiv:1510.01799) for T = 1, Li et
    al. 2022 (arXiv:2110.05679) for sequences, in O(T^2 (I + O)) per record.
    """
    out: Tensor = torch.ops.fastdp.linear_sq_norms(_detached("a", a), _detached("b", b), bias)
    return out


def embedding_sq_norms(index: Tensor, b: Tensor, padding_index: int | None = None) -> Tensor:
    """Squared norms of an embedding's per-sample gradients, whose tables are not formed -> float64 [B].

    index: int64 [B, T], >= 0: the rows that each record used; b [B, T, E]: the gradients of what came of them.
    Equation: sum_r ||sum_{t: index_t = r} b_t||^2 over rows r other than `padding_index`.
    """
    out: Tensor = torch.ops.fastdp.embedding_sq_norms(index, _detached("b", b), padding_index)
    return out


def gaussian_noise_(
    x: Tensor, std: float, *, key: Tensor | None = None, step: int | Tensor | None = None, offset: int = 0
) -> Tensor:
    """Add N(0, std^2) to `x` in place; element i gets the noise of index `offset + i`.

    key, step: as `random_key()` gives it, and a number that was never used with it: two tensors with the same (key,
    step) get equal noise, which cancels out, unless their ranges of `offset` are apart. None: a fresh key.

    Source: ChaCha20 (RFC 8439) and Box-Muller in float32, on 32 bits for the angle and 32 for the radius, of which the
    grid is then finer than float32's, or 64 where it would not be: in the tail from 4.24 standard deviations on and
    near 0. Exact in law there down to 2^-65 in the logarithm's argument; cut at sqrt(130 log 2) = 9.49 deviations.
    """
    key, step = _key_and_step(key, step)
    torch.ops.fastdp.gaussian_noise_(x, std, key, step, offset)
    return x


def poisson_sample(n: int, rate: float, *, key: Tensor | None = None, step: int | Tensor | None = None) -> Tensor:
    """Ids of a Poisson sample: each of 0..n-1 with probability `rate`, independently -> int64, ascending.

    key, step: a pair gives one sample; the noise of that pair comes from another stream. None: a fresh key.

    Costs O(n / 4096 + n * rate): geometric skips within blocks of 4096 ids, each block from a stream of its own. Under
    torch.compile it needs `torch._dynamo.config.capture_dynamic_output_shape_ops = True`, as torch.nonzero does.
    """
    key, step = _key_and_step(key, step)
    out: Tensor = torch.ops.fastdp.poisson_sample(n, rate, key, step)
    return out


def random_key() -> Tensor:
    """A fresh key from the operating system: uint8[32]. It is the secret that privacy rests on: do not store it."""
    return torch.frombuffer(bytearray(os.urandom(native.KEY_BYTES)), dtype=torch.uint8)


def _key_and_step(key: Tensor | None, step: int | Tensor | None) -> tuple[Tensor, Tensor]:
    if key is None:
        # A compiler may fold two equal calls without inputs into one, and equal keys are equal noise. An error that
        # Dynamo can trace: ArgumentError's own __init__ would hide the message.
        if torch.compiler.is_compiling():
            raise PrivacyError("key=None: must be a tensor under torch.compile: key=ops.random_key()")
        key = random_key()
        step = 0 if step is None else step
    if step is None:
        raise ArgumentError("step", step, "given with a key, and never used with it before")
    if not isinstance(step, Tensor):
        step = torch.scalar_tensor(step, dtype=torch.int64)
    return key, step


# ---- what torch.library calls on CPU tensors


def _clip_sum(g: Tensor, max_norm: float) -> Tensor:
    native.check_rows("g", g)
    out = torch.empty(g.shape[1], dtype=native.sum_dtype(g.dtype))
    native.clip_sum(g, max_norm, out)
    return out


def _clip_sum_out(g: Tensor, max_norm: float, *, out: Tensor) -> None:
    native.clip_sum(g, max_norm, out)


def _clip_noise(g: Tensor, max_norm: float, noise_multiplier: float, key: Tensor, step: Tensor) -> Tensor:
    native.check_range("noise_multiplier", noise_multiplier)
    out = _clip_sum(g, max_norm)
    native.add_noise(out, noise_multiplier * max_norm, key, _value(step), 0)
    return out


def _linear_sq_norms(a: Tensor, b: Tensor, bias: bool) -> Tensor:
    native.check_rows("a", a, (2, 3))
    out = torch.zeros(a.shape[0], dtype=torch.float64)
    native.add_linear_sq_norms([(a, b, bias)], out)
    return out


def _gaussian_noise_(x: Tensor, std: float, key: Tensor, step: Tensor, offset: int) -> None:
    native.add_noise(x, std, key, _value(step), offset)


def _poisson_sample(n: int, rate: float, key: Tensor, step: Tensor) -> Tensor:
    return native.poisson_sample(n, rate, key, _value(step))


def _value(step: Tensor) -> int:
    require(step.dtype == torch.int64 and step.numel() == 1, "step", step.dtype, "an int or one int64")
    return int(step.item())


# ---- what it calls on CUDA tensors


def _cuda_clip_sum_out(g: Tensor, max_norm: float, *, out: Tensor) -> None:
    cuda.clip_sum(g, max_norm, out)


def _cuda_clip_noise(g: Tensor, max_norm: float, noise_multiplier: float, key: Tensor, step: Tensor) -> Tensor:
    native.check_range("noise_multiplier", noise_multiplier)
    out = cuda.clip_sum(g, max_norm)
    cuda.add_noise(out, noise_multiplier * max_norm, key, _value(step), 0)
    return out


def _cuda_gaussian_noise_(x: Tensor, std: float, key: Tensor, step: Tensor, offset: int) -> None:
    cuda.add_noise(x, std, key, _value(step), offset)


# ---- registration

_library = torch.library.Library("fastdp", "DEF")


def _register(schema: str, cpu: Callable[..., Any], on_cuda: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(schema)
    name = schema.split("(")[0]
    _library.impl(name, cpu, "CPU")
    _library.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"fastdp::{name}", fake, lib=_library)


def _fake_poisson(n: int, rate: float, key: Tensor, step: Tensor) -> Tensor:
    return torch.empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


_register(
    "sq_norms(Tensor g) -> Tensor",
    native.sq_norms,
    cuda.sq_norms,
    lambda g: g.new_empty(g.shape[0], dtype=torch.float64),
)
_register(
    "clip_sum(Tensor g, float max_norm) -> Tensor",
    _clip_sum,
    cuda.clip_sum,
    lambda g, max_norm: g.new_empty(g.shape[1], dtype=native.sum_dtype(g.dtype)),
)
_register(
    "clip_sum.out(Tensor g, float max_norm, *, Tensor(a!) out) -> ()",
    _clip_sum_out,
    _cuda_clip_sum_out,
    lambda g, max_norm, *, out: None,
)
_register(
    "clip_noise(Tensor g, float max_norm, float noise_multiplier, Tensor key, Tensor step) -> Tensor",
    _clip_noise,
    _cuda_clip_noise,
    lambda g, max_norm, noise_multiplier, key, step: g.new_empty(g.shape[1], dtype=native.sum_dtype(g.dtype)),
)
_register(
    "linear_sq_norms(Tensor a, Tensor b, bool bias) -> Tensor",
    _linear_sq_norms,
    cuda.linear_sq_norms,
    lambda a, b, bias: a.new_empty(a.shape[0], dtype=torch.float64),
)
_register(
    "embedding_sq_norms(Tensor index, Tensor b, SymInt? padding_index) -> Tensor",
    native.embedding_sq_norms,
    cuda.embedding_sq_norms,
    lambda index, b, padding_index: b.new_empty(b.shape[0], dtype=torch.float64),
)
_register(
    "gaussian_noise_(Tensor(a!) x, float std, Tensor key, Tensor step, SymInt offset) -> ()",
    _gaussian_noise_,
    _cuda_gaussian_noise_,
    lambda x, std, key, step, offset: None,
)
_register(
    "poisson_sample(SymInt n, float rate, Tensor key, Tensor step) -> Tensor",
    _poisson_sample,
    _poisson_sample,  # refuses a key that is not the CPU's
    _fake_poisson,
)
