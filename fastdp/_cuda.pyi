"""Typed twin of csrc/cuda/bindings.cpp. Addresses are of memory that the GPU reaches, but for keys (the CPU's)."""

from collections.abc import Callable
from typing import overload

from fastdp._kernels import AdamStep, SgdStep

__version__: str

Table = tuple[int, int, int, int]  # address, rows, length of a row, elements from row to row
Sequences = tuple[
    int, int, int, int, int, int
]  # address, records, positions, n, how far records and positions are apart
StepTensor = tuple[
    int, int, int, int, int
]  # addresses of a parameter and two states or 0, length, offset in the buffer

class Element:
    f32: Element
    bf16: Element
    f16: Element
    def __init__(self, value: int) -> None: ...

class Place:
    """Where it runs: a CUDA stream, and what gives memory of the device, so many bytes, until the call has run."""
    def __init__(self, stream: int, memory: Callable[[int], int]) -> None: ...

def sq_norms(place: Place, type: Element, g: Table, out: int) -> None: ...
def clip_sum(place: Place, type: Element, g: Table, max_norm: float, out: int) -> None: ...
def clip_factors(
    place: Place, sq_norms: int, batch: int, scale: float, max_norm: float, gamma: float, factors: int
) -> None:
    """gamma: negative for none."""

def sum_rows(place: Place, type: Element, g: Table, factors: int, out: int, add: bool) -> None: ...
def scale_rows(place: Place, x: Sequences, factors: int, out: int) -> None: ...
def linear_sq_norms(
    place: Place, type: Element, a: Sequences, b: Sequences, bias: bool, out: int, bounds: int
) -> None: ...
def embedding_sq_norms(place: Place, type: Element, index: int, b: Sequences, padding_index: int, out: int) -> None: ...
def gaussian_noise(
    place: Place, type: Element, x: int, n: int, std: float, key: int, step: int, offset: int
) -> None: ...
@overload
def noise_step(place: Place, h: SgdStep, parameters: list[StepTensor], flat: int, key: int, step: int) -> None: ...
@overload
def noise_step(place: Place, h: AdamStep, parameters: list[StepTensor], flat: int, key: int, step: int) -> None: ...
def poisson_sample(place: Place, n: int, rate: float, key: int, step: int, ids: int, room: int, total: int) -> None: ...
