"""The oracle: what the kernels and the engine must compute, in float64 and written like the papers.

Slow on purpose, shares no code with the native kernels, and is not used outside tests.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def sq_norms(g: Tensor) -> Tensor:
    """[B, D] -> [B]."""
    return torch.stack([torch.dot(row, row) for row in g.double()]) if len(g) else torch.zeros(0).double()


def clip_sum(g: Tensor, max_norm: float) -> Tensor:
    """Abadi et al. 2016 (arXiv:1607.00133), algorithm 1: sum of g_i / max(1, ||g_i|| / C), [B, D] -> [D]."""
    total = torch.zeros(g.shape[1], dtype=torch.float64)
    for row in g.double():
        norm = torch.linalg.vector_norm(row).item()
        if math.isfinite(norm):
            total += row * (1.0 if norm <= max_norm else max_norm / norm)
    return total


def linear_sq_norms(a: Tensor, b: Tensor, bias: bool = True) -> Tensor:
    """[B, T, I], [B, T, O] -> [B]: by forming each record's gradient b^T a."""
    if a.dim() == 2:
        a, b = a[:, None], b[:, None]
    a, b = a.double(), b.double()
    out = torch.zeros(len(a), dtype=torch.float64)
    for i in range(len(a)):
        out[i] = (b[i].T @ a[i]).square().sum()
        if bias:
            out[i] += b[i].sum(0).square().sum()
    return out


def embedding_sq_norms(index: Tensor, b: Tensor, padding_index: int | None = None) -> Tensor:
    """[B, T], [B, T, E] -> [B]: by forming the rows of each record's gradient."""
    out = torch.zeros(len(b), dtype=torch.float64)
    for i, (ids, gradients) in enumerate(zip(index.tolist(), b.double(), strict=True)):
        for row in set(ids) - {padding_index}:
            out[i] += gradients[[t for t, used in enumerate(ids) if used == row]].sum(0).square().sum()
    return out


def per_sample_gradients(
    module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> list[list[Tensor]]:
    """One backward a record: [record][parameter that requires a gradient]."""
    params = [p for p in module.parameters() if p.requires_grad]
    gradients = []
    for i in range(len(x)):
        value = loss(module(x[i : i + 1]), y[i : i + 1])
        got = torch.autograd.grad(value, params, allow_unused=True)
        gradients.append([torch.zeros_like(p) if g is None else g for p, g in zip(params, got, strict=True)])
    return gradients


def clipped_gradient(gradients: list[list[Tensor]], max_norm: float, like: Iterable[Tensor]) -> list[Tensor]:
    """sum_i g_i min(1, C / ||g_i||) over records, the norm taken over all parameters together."""
    total = [torch.zeros_like(p, dtype=torch.float64) for p in like]
    for record in gradients:
        norm = math.sqrt(sum(g.double().square().sum().item() for g in record))
        if math.isfinite(norm):
            for t, g in zip(total, record, strict=True):
                t += g.double() * (1.0 if norm <= max_norm else max_norm / norm)
    return total


def per_layer_gradient(
    gradients: list[list[Tensor]], layer_of: list[str], bounds: dict[str, float], like: Iterable[Tensor]
) -> list[Tensor]:
    """McMahan et al. 2018 (arXiv:1710.06963), section 3: sum_i g_il min(1, C_l / ||g_il||) of each layer l by itself.

    layer_of: of each parameter. A record that is not finite in one layer is left out of all.
    """
    total = [torch.zeros_like(p, dtype=torch.float64) for p in like]
    for record in gradients:
        norms = {
            layer: math.sqrt(
                sum(g.double().square().sum().item() for g, of in zip(record, layer_of, strict=True) if of == layer)
            )
            for layer in bounds
        }
        if all(math.isfinite(norm) for norm in norms.values()):
            for t, g, of in zip(total, record, layer_of, strict=True):
                t += g.double() * (1.0 if norms[of] <= bounds[of] else bounds[of] / norms[of])
    return total


def automatic_gradient(
    gradients: list[list[Tensor]], max_norm: float, like: Iterable[Tensor], gamma: float = 0.01
) -> list[Tensor]:
    """Bu et al. 2023 (arXiv:2206.07136), AUTO-S: sum_i g_i C / (||g_i|| + gamma), the norm of all parameters."""
    total = [torch.zeros_like(p, dtype=torch.float64) for p in like]
    for record in gradients:
        norm = math.sqrt(sum(g.double().square().sum().item() for g in record))
        if math.isfinite(norm):
            for t, g in zip(total, record, strict=True):
                t += g.double() * max_norm / (norm + gamma)
    return total


def adam_step(
    theta: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kingma & Ba 2015 (arXiv:1412.6980), algorithm 1; decoupled: Loshchilov & Hutter 2019 (arXiv:1711.05101)."""
    if not decoupled:
        g = g + weight_decay * theta
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g.square()
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    decay = lr * weight_decay * theta if decoupled else 0.0
    return theta - decay - lr * m_hat / (v_hat.sqrt() + eps), m, v


def chacha20_block(key: bytes, counter: int, nonce: bytes) -> bytes:
    """RFC 8439, section 2.3: 32-byte key, 32-bit counter, 12-byte nonce -> 64 bytes."""

    def rotate(v: int, n: int) -> int:
        return ((v << n) | (v >> (32 - n))) & 0xFFFFFFFF

    def quarter_round(s: list[int], a: int, b: int, c: int, d: int) -> None:
        for x, y, z, n in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = (s[x] + s[y]) & 0xFFFFFFFF
            s[z] = rotate(s[z] ^ s[x], n)

    start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574]
    start += [*struct.unpack("<8I", key), counter, *struct.unpack("<3I", nonce)]
    s = list(start)
    for _ in range(10):
        for i in range(4):
            quarter_round(s, i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter_round(s, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return struct.pack("<16I", *((x + y) & 0xFFFFFFFF for x, y in zip(s, start, strict=True)))


def stream_words(key: bytes, domain: int, step: int, block: int) -> tuple[int, ...]:
    """The 16 words of a block of one of fastdp's streams: counter = the block's low 32 bits, nonce = the rest."""
    nonce = struct.pack("<IQ", (block >> 32) | domain << 16, step)
    return struct.unpack("<16I", chacha20_block(key, block & 0xFFFFFFFF, nonce))


def near_an_end(high: int) -> bool:
    """Is u, whose first 32 bits are `high`, within 2^-13 of 0 or of 1?"""
    return high < 2**19 or high >= 2**32 - 2**19


def normal_pair(high: int, low: int, angle: int) -> tuple[float, float]:
    """Box & Muller 1958: sqrt(-2 log u) (cos, sin), u from 32 or 64 bits, the angle from 30 bits, a swap and a sign."""
    # u is the middle of its cell: 2^-32 wide, and 2^-64 wide near 0 and 1.
    k, bits = (high << 32 | low, 64) if near_an_end(high) else (high, 32)
    # log(u) from the side that keeps its digits
    below, above = (2 * k + 1) / 2 ** (bits + 1), (2 * ((1 << bits) - 1 - k) + 1) / 2 ** (bits + 1)  # u and 1 - u
    log_u = math.log(below) if below < above else math.log1p(-above)
    radius = math.sqrt(-2.0 * log_u) * (-1.0 if angle >> 30 & 1 else 1.0)
    part = angle & 0x3FFFFFFF
    part -= (part >> 29) << 30  # as a signed number of 30 bits
    x = math.pi / 4 * (part + 0.5) / 2**29
    c, s = radius * math.cos(x), radius * math.sin(x)
    return (s, c) if angle >> 31 else (c, s)


def gaussian_noise(n: int, key: bytes, step: int, offset: int = 0, domain: int = 2, tail_domain: int = 5) -> Tensor:
    """N(offset), ..., N(offset + n - 1): index 256 c + 16 j + lane is output j of block 16 c + lane.

    Pair p of a block, outputs 2 p and 2 p + 1, takes the block's words 2 p and 2 p + 1; where the radius needs 64 bits,
    the other 32 are word p of the block of the same number in the tail's domain.
    """
    out = torch.empty(n, dtype=torch.float64)
    for i in range(n):
        chunk, rest = divmod(offset + i, 256)
        j, lane = divmod(rest, 16)
        block, pair = 16 * chunk + lane, j // 2
        high, angle = stream_words(key, domain, step, block)[2 * pair : 2 * pair + 2]
        low = stream_words(key, tail_domain, step, block)[pair] if near_an_end(high) else 0
        out[i] = normal_pair(high, low, angle)[j % 2]
    return out


def secure_grid(std: float) -> float:
    """The largest power of two that is at most std / 1024."""
    return 2.0 ** (math.frexp(std)[1] - 1) / 1024


def secure_noise(x: Tensor, std: float, key: bytes, step: int, offset: int = 0) -> Tensor:
    """Holohan & Braghin 2021 (arXiv:2107.10138): (N_1 + ... + N_2n) / sqrt(2 n) with n = 2, on the grid with x.

    N_j of element i has the index i + (j - 1) 2^50, in domains of their own; x [n] -> [n].
    """
    n = 2
    total = torch.zeros(len(x), dtype=torch.float64)
    for j in range(2 * n):
        total += gaussian_noise(len(x), key, step, offset + j * 2**50, domain=6, tail_domain=7)
    grid = secure_grid(std)
    return torch.round((x.double() + std * total / math.sqrt(2 * n)) / grid) * grid


def poisson_sample(n: int, rate: float, key: bytes, step: int, domain: int = 1) -> list[int]:
    """Geometric skips within blocks of 4096 ids; block k draws from ChaCha blocks 1024 k, 1024 k + 1, ..."""
    ids: list[int] = []
    for start in range(0, n, 4096):
        end = min(n, start + 4096)
        at, draw = start, 0
        while at < end:
            words = stream_words(key, domain, step, start // 4096 * 1024 + draw // 8)
            low, high = words[2 * (draw % 8) : 2 * (draw % 8) + 2]
            u = (((high << 32 | low) >> 12) + 0.5) / 2**52
            at += 0 if rate == 1.0 else min(4096, math.floor(math.log(u) / math.log1p(-rate)))
            if at < end:
                ids.append(at)
            at, draw = at + 1, draw + 1
    return ids
