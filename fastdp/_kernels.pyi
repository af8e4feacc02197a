import enum
from typing import overload

import numpy as np
import numpy.typing as npt

__version__: str

class DType(enum.Enum):
    f32 = 0
    bf16 = 1
    f64 = 2

class SgdStep:
    def __init__(
        self,
        *,
        std: float,
        scale: float,
        weight_decay: float,
        lr: float,
        momentum: float,
        dampening: float,
        nesterov: bool,
        first: bool,
    ) -> None: ...

class AdamStep:
    def __init__(
        self,
        *,
        std: float,
        scale: float,
        weight_decay: float,
        beta1: float,
        beta2: float,
        eps: float,
        keep: float,
        step_size: float,
        root: float,
    ) -> None: ...

def isa() -> str: ...
def threads_available() -> bool: ...

# Tensors are passed as addresses (`data_ptr()`), lengths and strides count elements; nothing is checked here.
def sq_norms(g: int, dtype: DType, batch: int, n: int, stride: int, out: int, threads: int) -> None: ...
def linear_sq_norms(
    layers: list[tuple[tuple[int, int, int, int], tuple[int, int, int, int], bool]],
    dtype: DType,
    batch: int,
    positions: int,
    out: int,
    bounds: int,
    threads: int,
) -> None: ...
def layer_norm_gradients(
    a: int,
    b: int,
    dtype: DType,
    batch: int,
    positions: int,
    n: int,
    eps: float,
    centre: bool,
    weight: int,
    bias: int,
    threads: int,
) -> None: ...
def group_norm_gradients(
    a: int,
    b: int,
    dtype: DType,
    batch: int,
    channels: int,
    positions: int,
    groups: int,
    eps: float,
    weight: int,
    bias: int,
    threads: int,
) -> None: ...
def convolution_gradients(
    a: int,
    b: int,
    dtype: DType,
    batch: int,
    groups: int,
    channels: int,
    outputs: int,
    sizes: list[tuple[int, ...]],
    out: int,
    threads: int,
) -> None: ...
def clip_factors(
    sq_norms: int, dtype: DType, batch: int, scale: float, max_norm: float, factors: int, gamma: float | None
) -> int: ...
def clip_sum(
    g: int, dtype: DType, batch: int, n: int, stride: int, max_norm: float, out: int, threads: int
) -> None: ...
def sum_rows(
    g: int, dtype: DType, batch: int, n: int, stride: int, factors: int, out: int, add: bool, threads: int
) -> None: ...
def scale_rows(
    x: int,
    dtype: DType,
    records: int,
    positions: int,
    n: int,
    records_apart: int,
    apart: int,
    factors: int,
    out: int,
    sums: int,
    threads: int,
) -> None: ...

# `tensors`: the address of each, and elements from row to row.
def lstm_forward(dtype: DType, batch: int, n: int, tensors: list[tuple[int, int]], threads: int) -> None: ...
def lstm_backward(dtype: DType, batch: int, n: int, tensors: list[tuple[int, int]], threads: int) -> None: ...
def gaussian_noise(x: int, dtype: DType, n: int, std: float, key: int, step: int, first: int, threads: int) -> None: ...
def secure_noise(x: int, dtype: DType, n: int, std: float, key: int, step: int, first: int, threads: int) -> None: ...

class StepShare:
    """Which part of the flat buffer is stepped, and what the ranks of a host have of it (csrc/ops.h); none: all."""

    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(
        self, *, begin: int, end: int, sums: int, sums_apart: int, copies: int, copies_apart: int, first_copy: int
    ) -> None: ...

def noise_step(
    h: SgdStep | AdamStep,
    parameters: list[tuple[int, int, int, int, int]],  # address, two addresses of state or 0, length, offset
    flat: int,
    dtype: DType,
    key: int,
    step: int,
    share: StepShare,
    threads: int,
) -> None: ...
def poisson_sample(n: int, rate: float, key: int, step: int) -> npt.NDArray[np.int64]: ...

class Stack:
    def __init__(self, parts: list[int], starts: list[int], row_bytes: int) -> None: ...
    def gather(self, ids: int, n: int, out: int, threads: int) -> bool: ...

def read_memory(words: int, n: int, threads: int) -> int: ...
def keystream(key: int, domain: int, step: int, first: int, blocks: int, words: int) -> None: ...
def normals_from_words(words: int, n: int, z: int) -> None: ...
