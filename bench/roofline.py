"""How fast the kernels of csrc/cuda can be at most, and, where there is a GPU, how fast they are.

`python bench/roofline.py PAGE.md` writes roofline.md with its table made anew. With a GPU, all kernels are checked
first: one that is wrong ends the script with status 1, before anything is timed.

Counted by hand from the sources: bytes of inputs and outputs, as often as they are read or written (scratch of a few MB
stays in the second-level cache); operations as one thread's instructions: a multiply-add, comparison, conversion,
square root or division is one; nothing of addresses and loops. So these are floors, not estimates.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdp import _kernels, cuda, native, reference

Tensors = tuple[Tensor, ...]
Amounts = dict[str, float]  # of memory in bytes, of fp32, fp64 and int32 operations
KEY, STEP, MAX_NORM, SAMPLE_RATE = torch.arange(32, dtype=torch.uint8), 1, 1.0, 4096 / 10_000_000
# Of a value and their mean size together. float32: sums of 31 rows, and clip factors have 4 roundings of room.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.int64: 0.0}
FLUSH_BYTES = 1 << 30  # beyond all caches; to read them takes an H100 0.3 ms, in which the CPU queues the call

# Operations/s of each kind: half of NVIDIA's figures, which count a multiply-add twice. The L4's fp64 is a 64th, its
# int32 half of fp32. Two simplifications: an H100 converts from and to double at a quarter of fp64's rate, which limits
# no case here; and a compiler may give additions of integers to the lanes that multiply, and undershoot int32.
H100 = {"memory": 3.35e12, "fp32": 67e12 / 2, "fp64": 34e12 / 2, "int32": 33.5e12 / 2}  # SXM
L4 = {"memory": 0.3e12, "fp32": 30.3e12 / 2, "fp64": 30.3e12 / 128, "int32": 30.3e12 / 4}
A100 = {"memory": 2.04e12, "fp32": 19.5e12 / 2, "fp64": 9.7e12 / 2, "int32": 19.5e12 / 2}  # not on the page


def floor(work: Amounts, rates: Amounts) -> tuple[float, str]:
    """Microseconds, and what takes them."""
    return max((1e6 * amount / rates[kind], kind) for kind, amount in work.items())


@dataclass(frozen=True)
class Case:
    name: str
    sizes: Mapping[str, tuple[int, ...]]  # timed; checked, by the same path; checked on a GPU, if its path needs more
    work: Callable[..., Amounts]  # of sizes
    inputs: Callable[..., Tensors]  # on a device, of sizes
    call: Callable[..., Tensors]  # of fastdp.cuda or fastdp.native, on inputs
    want: Callable[..., Tensors] | None = None  # on inputs, to TOLERANCE; None: native's call, bit for bit

    def at(self, which: int) -> list[int]:
        return [size[which] for size in self.sizes.values()]


def check(case: Case, device: torch.device) -> None:
    """Raise AssertionError if a result is not the CPU's."""
    torch.manual_seed(0)
    inputs = case.inputs(torch.device("cpu"), *case.at(-1 if device.type == "cuda" else 1))
    found = case.call(cuda, *(x.to(device, copy=True) for x in inputs))
    wanted = case.want(*inputs) if case.want else case.call(native, *inputs)
    for got, want in zip(found, wanted, strict=True):
        got = got.cpu()[: len(want)]  # a GPU's batch has room for more ids
        if case.want:
            tolerance = TOLERANCE[got.dtype]
            slack = tolerance * want.double().abs().mean().item()
            torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=slack)
        else:
            bits = torch.int32 if want.element_size() == 4 else torch.int64
            torch.testing.assert_close(got.view(bits), want.view(bits), rtol=0, atol=0)


def clip_work(reads: int, b: int, d: int) -> Amounts:  # to double, squared there; then a multiply-add in float
    return dict(memory=4 * d * (reads * b + 1), fp32=b * d, fp64=2 * b * d)


def product_work(b: int, n: int) -> Amounts:  # to double, and a multiply-add
    return dict(memory=8 * b * n + 16 * b, fp64=4 * b * n)


def gram_work(b: int, t: int, n: int) -> Amounts:
    pairs = math.comb(math.ceil(t / 64) + 1, 2)  # of tiles: multiply-adds, conversions of both panels, products
    pair, bias = 64 * 64 * 2 * n + 2 * 64 * 2 * n + 64 * 64, 2 * t * n + n
    return dict(memory=8 * b * t * n + 16 * b, fp64=b * (pairs * pair + bias))


def embedding_work(b: int, t: int, n: int, ids: int) -> Amounts:
    different = ids * (1 - (1 - 1 / ids) ** t)  # of a record, on average: as many sums are squared, t added in double
    compared = 2 * t * t * math.ceil(n / 256)  # each id with each other, in two words, by each warp of 256 columns
    return dict(memory=4 * b * t * n + 8 * b * t + 16 * b, fp64=b * n * (2 * t + different), int32=b * compared)


# ChaCha20, 16 words or 8 draws: 10 double rounds of 8 quarter rounds of 12 operations, and 16 additions.
CHACHA = 10 * 8 * 12 + 16


def noise_work(nbytes: int, fp32: int, n: int) -> Amounts:
    # A normal's word; of a warp, one in 16 makes a second block, for words near an end (noise.h). Box-Muller (normal.h)
    # of a pair: from_end, least and comparison 3, minus_two_log 7, normal_pair 7, signed_uniform 1; of float,
    # signed_uniform 1, minus_two_log 15, root 1, angle 2, sine 4, cosine 4, products 2.
    return dict(memory=nbytes * n, fp32=(29 / 2 + fp32) * n, int32=(CHACHA / 16 * (1 + 1 / 16) + 18 / 2) * n)


def sample_work(n: int) -> Amounts:
    draws = 2 * (n * SAMPLE_RATE + n / 4096)  # all twice; of each 4096 records, one goes beyond them
    # open_unit 3, portable_log 31 (two_atanh 25, around it 6), division, comparison, 2 conversions
    return dict(memory=8 * n * SAMPLE_RATE, fp64=38 * draws, int32=CHACHA / 8 * draws)


def table(device: torch.device, rows: int, columns: int) -> Tensors:
    """Rows of norms from 0 to 2: half of them are clipped."""
    norms = torch.linspace(0, 2, rows, device=device) / math.sqrt(columns)
    return (torch.randn(rows, columns, device=device).mul_(norms[:, None]),)


def normal(count: int, device: torch.device, *shape: int) -> Tensors:
    return tuple(torch.randn(shape, device=device) for _ in range(count))


def moments(device: torch.device, n: int) -> Tensors:
    return tuple(x.abs_() for x in normal(4, device, n))  # no root of less than 0


def factors(device: torch.device, rows: int) -> Tensor:
    """None is 0, whose row would not be read."""
    return torch.rand(rows, dtype=torch.float64, device=device).add_(0.1)


def written(_: object, *tensors: Tensor) -> Tensors:
    """What a call has written, whatever it returned."""
    return tensors


def add_noise(by: ModuleType, x: Tensor) -> Tensors:
    return written(by.add_noise(x, 1.0, KEY, STEP, 0), x)


def noise_step(h: Any, by: ModuleType, flat: Tensor, p: Tensor, *states: Tensor) -> Tensors:
    first, second = [*(x.data_ptr() for x in states), 0][:2]
    return written(by.noise_step(h, [(p.data_ptr(), first, second, len(p), 0)], flat, KEY, STEP), p, *states)


def cpus_batch(records: Tensor) -> Tensors:
    ids = native.poisson_sample(len(records), SAMPLE_RATE, KEY, STEP)
    return ids, torch.tensor([len(ids)])


CLIP: dict[str, Any] = {
    "inputs": table,
    "call": lambda by, g: written(by.clip_sum(g, MAX_NORM, out := g.new_empty(g.shape[1])), out),
    "want": lambda g: (reference.clip_sum(g, MAX_NORM),),
}
LINEAR: dict[str, Any] = {
    "inputs": partial(normal, 2),
    "call": lambda by, a, b: (by.linear_sq_norms(a, b, True),),
    "want": lambda a, b: (reference.linear_sq_norms(a, b),),
}
SUM: dict[str, Any] = {"std": 1.0, "scale": 0.1, "weight_decay": 0.01}
SGD = _kernels.SgdStep(**SUM, lr=0.1, momentum=0.9, dampening=0.0, nesterov=False, first=False)
ADAM = _kernels.AdamStep(**SUM, beta1=0.9, beta2=0.999, eps=1e-8, keep=1.0, step_size=1e-3, root=0.05)
MANY = {"N": (100_000_000, 40_000)}  # of 40,000 normals, ten are near an end

CASES = [
    Case(
        "sq_norms",
        {"B": (256, 5), "D": (1_000_000, 20_000)},
        lambda b, d: dict(memory=4 * b * d + 8 * b, fp64=2 * b * d),  # to double, and a multiply-add
        table,
        lambda by, g: (by.sq_norms(g),),
        lambda g: (reference.sq_norms(g),),
    ),
    Case(
        "clip_factors",
        {"B": (4096, 600)},
        lambda b: dict(memory=16 * b, fp64=9 * b),  # 4 products, root, sum, division, 2 comparisons
        lambda device, b: (factors(device, b).sub_(0.2).mul_(4.0),),  # the root of less than 0 is a NaN
        lambda by, sq: (by.clip_factors(sq, torch.float32, 0.5, MAX_NORM)[0],),
    ),
    Case("clip_sum, rows held", {"B": (16_384, 9), "D": (4096, 3000)}, partial(clip_work, 1), **CLIP),
    # The emulator has two multiprocessors of 96 KiB, for up to 16,000 columns; GPUs of 1 to 3 million at most.
    Case("clip_sum, rows staged", {"B": (256, 23), "D": (200_000, 7000, 200_000)}, partial(clip_work, 1), **CLIP),
    Case("clip_sum, read twice", {"B": (64, 3), "D": (8_000_000, 20_000, 8_000_000)}, partial(clip_work, 2), **CLIP),
    Case(
        "sum_rows",
        {"B": (256, 31), "D": (1_000_000, 3000)},
        lambda b, d: dict(memory=4 * b * d + 8 * b + 4 * d, fp32=b * d),  # a multiply-add
        lambda device, b, d: (*table(device, b, d), factors(device, b)),
        lambda by, g, f: written(by.sum_rows(g, f, out := g.new_empty(g.shape[1]), add=False), out),
        lambda g, f: (f @ g.double(),),
    ),
    Case(
        "scale_rows",
        {"B": (256, 6), "T": (64, 5), "I": (1024, 130)},
        lambda b, t, n: dict(memory=8 * b * t * (n + 1), fp32=3 * b * t * n),  # a product, two comparisons
        lambda device, b, t, n: (*normal(1, device, b, t, n), factors(device, b * t)),
        lambda by, x, f: written(by.scale_rows(x, f, out := x.new_empty(len(f), x.shape[2]), None), out),
    ),
    Case("linear_sq_norms, one position", {"B": (4096, 6), "I = O": (4096, 700)}, product_work, **LINEAR),
    Case("linear_sq_norms, Gram matrices", {"B": (64, 2), "T": (256, 70), "I = O": (768, 40)}, gram_work, **LINEAR),
    Case(
        "embedding_sq_norms",
        {"B": (256, 6), "T": (256, 40), "E": (768, 300), "ids": (30_522, 10)},
        embedding_work,
        lambda device, b, t, n, ids: (torch.randint(ids, (b, t), device=device), *normal(1, device, b, t, n)),
        lambda by, index, b: (by.embedding_sq_norms(index, b, None),),
        lambda index, b: (reference.embedding_sq_norms(index, b),),
    ),
    Case("gaussian_noise", MANY, partial(noise_work, 8, 2), partial(normal, 1), add_noise),
    # The gradient takes 5 operations, the update 5 or 14.
    Case("noise_step, SGD", MANY, partial(noise_work, 20, 10), partial(normal, 3), partial(noise_step, SGD)),
    Case("noise_step, Adam", MANY, partial(noise_work, 28, 19), moments, partial(noise_step, ADAM)),
    Case(
        "poisson_sample",
        {"records": (10_000_000, 1_000_000)},
        sample_work,
        lambda device, n: (torch.empty(n, dtype=torch.bool, device=device),),  # for its length and its place
        lambda by, records: by.poisson_sample(len(records), SAMPLE_RATE, KEY, STEP, records.device),
        cpus_batch,
    ),
]


# ---- on a GPU


def microseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of 20 by CUDA events, with other memory in the caches: read, since writes would still have to leave."""
    flush = torch.zeros(FLUSH_BYTES // 4, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(20)]
    for _ in range(3):
        call()
    for begin, end in events:
        flush.sum()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return 1e3 * statistics.median(float(begin.elapsed_time(end)) for begin, end in events)


def this_gpu(device: torch.device) -> tuple[str, Amounts]:
    """Its name, and the rates of the machine of its compute capability, but for its own bandwidth of a copy."""
    of, machines = torch.cuda.get_device_properties(device), {(9, 0): H100, (8, 9): L4, (8, 0): A100}
    if (of.major, of.minor) not in machines:
        sys.exit(f"{of.name}: compute capability {of.major}.{of.minor}: must be one of {list(machines)}")
    x, y = normal(2, device, FLUSH_BYTES // 4)
    bandwidth = 2e6 * x.nbytes / microseconds(lambda: y.copy_(x), device)
    return of.name, machines[of.major, of.minor] | {"memory": bandwidth}


def short(x: float) -> str:
    return f"{x:.3g}" if x < 999.5 else f"{x:,.0f}"


def row(case: Case, rates: Amounts, took: dict[str, float]) -> str:
    work = case.work(*case.at(0))
    cells = [case.name, ", ".join(f"{axis} = {size[0]:_}" for axis, size in case.sizes.items())]
    cells += [short(work.get(kind, 0) / 1e6) for kind in H100]
    cells += [f"{short(us)}, {kind}" for us, kind in (floor(work, H100), floor(work, L4))]
    cells.append(f"{short(took[case.name])}, {floor(work, rates)[0] / took[case.name]:.0%}" if took else "not run")
    return f"| {' | '.join(cells)} |"


HEAD = """| kernel | shape | MB | M fp32 | M fp64 | M int32 | H100 floor, µs | L4 floor, µs | measured, µs, floor / it |
|---|---|--:|--:|--:|--:|--:|--:|--:|"""


def page(name: str, rates: Amounts, took: dict[str, float]) -> str:
    """The table made anew; what roofline.md says below it, as it is there."""
    status = "No GPU has run these kernels yet: the measured column says so."
    if took:
        status = f"Measured on {name}, copies at {rates['memory'] / 1e12:.3g} TB/s, after all checks had passed."
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    rows = [row(case, rates, took) for case in CASES]
    return "\n".join(["# Roofline of the CUDA kernels", "", status, "", HEAD, *rows, text[text.index("\n## ") :]])


def main(path: Path) -> None:
    name, rates, took, device = "", H100, dict[str, float](), torch.device(cuda.DEVICE)
    if torch.cuda.is_available():
        for case in CASES:
            try:
                check(case, device)
            except Exception as error:  # whatever it is, the case's name belongs to it
                sys.exit(f"{case.name}: {type(error).__name__}: {error}")
        name, rates = this_gpu(device)
        for case in CASES:
            took[case.name] = microseconds(partial(case.call, cuda, *case.inputs(device, *case.at(0))), device)
    path.write_text(page(name, rates, took), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
