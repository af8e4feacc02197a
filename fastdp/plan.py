"""The one description of a run that sampler, normaliser, noise and accountant are all derived from."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from fastdp.accounting import SECURE_NORMALS, Event
from fastdp.errors import ArgumentError, require

Clipping = Literal["flat", "per_layer", "automatic"]
CLIPPINGS: tuple[str, ...] = get_args(Clipping)

# Of automatic clipping: what Bu et al. 2023 (arXiv:2206.07136) take everywhere, for gradients of a record's own loss.
GAMMA = 0.01


@dataclasses.dataclass(frozen=True)
class Plan:
    """Immutable: nothing that privacy depends on can change during a run (P4).

    dataset_size: number of records n that the sampling rate is derived from; public.
    batch_size: expected records per step over all ranks; the sum of clipped gradients is divided by it.
    noise_multiplier: standard deviation of the noise over `max_grad_norm`.
    max_grad_norm: C, the bound on the norm of what a record adds to the sum, over all layers: in each mode of clipping
        the sensitivity under add/remove adjacency.
    poisson_sampling: False means shuffled batches of `batch_size`, accounted without amplification.
    size_from_data: n was taken from the data, not declared.
    steps: the number of steps that the noise was calibrated for; None if the noise was given.
    clipping: what a record adds of its gradient g.
        flat: g min(1, C / |g|); Abadi et al. 2016 (arXiv:1607.00133).
        per_layer: of each layer, g_l min(1, C_l / |g_l|), sum C_l^2 = C^2; McMahan et al. 2018 (arXiv:1710.06963).
        automatic: g C / (|g| + gamma), of a norm below C; Bu et al. 2023 (arXiv:2206.07136).
    layer_bounds: name and C_l of each layer, if it is per_layer.
    secure_mode: noise that is hardened against floating-point attacks, with no guarantee (native.add_noise).
    """

    dataset_size: int
    batch_size: int
    noise_multiplier: float
    max_grad_norm: float
    poisson_sampling: bool = True
    size_from_data: bool = True
    steps: int | None = None
    clipping: Clipping = "flat"
    layer_bounds: tuple[tuple[str, float], ...] = ()
    secure_mode: bool = False

    def __post_init__(self) -> None:
        n, sigma, c = self.dataset_size, self.noise_multiplier, self.max_grad_norm
        require(isinstance(n, numbers.Integral), "dataset_size", n, "an int")
        for name in ("noise_multiplier", "max_grad_norm"):
            require(isinstance(getattr(self, name), numbers.Real), name, getattr(self, name), "a number")
        require(n >= 1, "dataset_size", n, ">= 1")
        require(1 <= self.batch_size <= n, "batch_size", self.batch_size, f"in [1, dataset_size={n}]")
        require(0.0 <= sigma < math.inf, "noise_multiplier", sigma, "finite and >= 0")
        require(0.0 <= c < math.inf, "max_grad_norm", c, "finite and >= 0")
        # Where float32 has all its digits, for the noise and for what it hides.
        require(c == 0 or 1e-30 <= c <= 1e30, "max_grad_norm", c, "0 or in [1e-30, 1e30]")
        std = sigma * c
        require(std == 0 or 1e-30 <= std <= 1e30, "noise_multiplier * max_grad_norm", std, "0 or in [1e-30, 1e30]")
        require(self.clipping in CLIPPINGS, "clipping", self.clipping, f"one of {', '.join(map(repr, CLIPPINGS))}")
        require(isinstance(self.secure_mode, bool), "secure_mode", self.secure_mode, "True or False")
        bounds, needed = self.layer_bounds, self.clipping == "per_layer"
        require(bool(bounds) == needed, "layer_bounds", bounds, "given for clipping='per_layer', and only for it")
        whole = math.hypot(*(bound for _, bound in bounds))
        require(whole <= c * (1 + 1e-15), "layer_bounds", bounds, f"of a root of the sum of squares <= {c}")

    @property
    def sample_rate(self) -> float:
        """Probability that a record is in a step's batch."""
        return self.batch_size / self.dataset_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each record is expected once, rounded; shuffled batches: in which each is seen once."""
        n, b = self.dataset_size, self.batch_size
        return max(1, round(n / b)) if self.poisson_sampling else math.ceil(n / b)

    @property
    def event(self) -> Event:
        """What is accounted: a step of Poisson batches; an epoch of shuffled ones, one of which has a given record.

        It is the same for each mode of clipping: with or without a record, the sum of all layers moves by C at most,
        and the noise on each of its elements is sigma C. Scaled by 1 / C that is one Gaussian mechanism of sigma.
        """
        return float(self.noise_multiplier), self.sample_rate if self.poisson_sampling else 1.0

    @property
    def events(self) -> int | None:
        """How many of them the noise was calibrated for."""
        return self.steps if self.steps is None or self.poisson_sampling else self.steps // self.steps_per_epoch

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise that is added to the sum of clipped gradients, once per step in total."""
        return self.noise_multiplier * self.max_grad_norm

    def normals(self, values: int) -> int:
        """Normals that the generator makes for the noise of a step on so many numbers: what its cut tails count."""
        return SECURE_NORMALS * values if self.secure_mode else values

    @property
    def gamma(self) -> float | None:
        """Automatic clipping's."""
        return GAMMA if self.clipping == "automatic" else None

    def assumptions(self) -> list[str]:
        """What a reader of an epsilon must know about it."""
        lines = ["a record is one row of the data set", self._says_of_clipping()]
        size = "n treated as public; " if self.size_from_data else ""
        if self.poisson_sampling:
            lines.append(size + "add/remove adjacency")
        else:
            lines.append(size + "zero-out adjacency: a record's gradients count or are zero")
            lines.append("shuffled batches, not Poisson samples: no amplification by sampling is claimed")
        if self.secure_mode:
            lines.append("secure mode: the noise is hardened against floating-point attacks, no guarantee")
        return lines

    def _says_of_clipping(self) -> str:
        how = {
            "flat": "flat clipping",
            "per_layer": f"per-layer clipping ({len(self.layer_bounds)} layers)",
            "automatic": f"automatic clipping (gamma = {GAMMA:g})",
        }
        return (
            f"{how[self.clipping]}: a record adds a vector of norm at most C = {self.max_grad_norm:g} to a step's sum"
        )


def bounds_of_layers(max_grad_norm: object, layers: Iterable[str]) -> tuple[float, tuple[tuple[str, float], ...]]:
    """C, and name and C_l of each layer, for per-layer clipping (McMahan et al. 2018, arXiv:1710.06963, section 3).

    max_grad_norm: C, of which each of L layers gets C / sqrt(L); or C_l of each layer by its name, where
    C = sqrt(sum C_l^2). Rounding, 1e-16 of C, is in what the clip factors leave room for.
    """
    names = list(layers)
    if isinstance(max_grad_norm, numbers.Real):
        return float(max_grad_norm), tuple((name, float(max_grad_norm) / math.sqrt(len(names))) for name in names)
    if not isinstance(max_grad_norm, Mapping):
        raise ArgumentError("max_grad_norm", max_grad_norm, "a number, or a mapping of layers' names to their bounds")
    for name, bound in max_grad_norm.items():
        require(name in names, f"max_grad_norm[{name!r}]", bound, f"of a layer with trained parameters: {names}")
        require(isinstance(bound, numbers.Real), f"max_grad_norm[{name!r}]", bound, "a number")
        require(1e-30 <= bound <= 1e30, f"max_grad_norm[{name!r}]", bound, "in [1e-30, 1e30]")
    for name in names:
        require(name in max_grad_norm, f"max_grad_norm[{name!r}]", "absent", "given, as that of every layer")
    bounds = tuple((name, float(max_grad_norm[name])) for name in names)
    return math.hypot(*(bound for _, bound in bounds)), bounds
