"""The one description of a run that sampler, normaliser, noise and accountant are all derived from."""

from __future__ import annotations

import dataclasses
import math
import numbers

from fastdp.accounting import Event
from fastdp.errors import require


@dataclasses.dataclass(frozen=True)
class Plan:
    """Immutable: nothing that privacy depends on can change during a run (P4).

    dataset_size: number of records n that the sampling rate is derived from; public.
    batch_size: expected records per step over all ranks; the sum of clipped gradients is divided by it.
    noise_multiplier: standard deviation of the noise over `max_grad_norm`.
    max_grad_norm: C, the bound on each record's gradient norm.
    poisson_sampling: False means shuffled batches of `batch_size`, accounted without amplification.
    size_from_data: n was taken from the data, not declared.
    steps: the number of steps that the noise was calibrated for; None if the noise was given.
    """

    dataset_size: int
    batch_size: int
    noise_multiplier: float
    max_grad_norm: float
    poisson_sampling: bool = True
    size_from_data: bool = True
    steps: int | None = None

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
        """What is accounted: a step of Poisson batches; an epoch of shuffled ones, one of which has a given record."""
        return float(self.noise_multiplier), self.sample_rate if self.poisson_sampling else 1.0

    @property
    def events(self) -> int | None:
        """How many of them the noise was calibrated for."""
        return self.steps if self.steps is None or self.poisson_sampling else self.steps // self.steps_per_epoch

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise that is added to the sum of clipped gradients, once per step in total."""
        return self.noise_multiplier * self.max_grad_norm

    def assumptions(self) -> list[str]:
        """What a reader of an epsilon must know about it."""
        lines = ["a record is one row of the data set"]
        size = "n treated as public; " if self.size_from_data else ""
        if self.poisson_sampling:
            lines.append(size + "add/remove adjacency")
        else:
            lines.append(size + "zero-out adjacency: a record's gradients count or are zero")
            lines.append("shuffled batches, not Poisson samples: no amplification by sampling is claimed")
        return lines
