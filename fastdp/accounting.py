"""Privacy accounting: what a run of the Poisson-subsampled Gaussian mechanism costs, and which noise a budget buys.

Two data sets are neighbours if one is the other with one record added or removed. All the mathematics is the library
dp-accounting's; here are its discretisation, the calibration, the ledger of a run, and the cost of cut Gaussian tails.

PLD is the discretised privacy loss distribution (Meiser & Mohammadi 2018; Koskela, Jälkö & Honkela 2020) with the
pessimistic "connect the dots" rounding of Doroshenko et al. 2022 (arXiv:2207.04380): ε is an upper bound on every
grid, and the grid decides only how tight. RDP is Mironov, Talwar & Zhang 2019 (arXiv:1908.10530). Not covered: float64
rounding inside dp-accounting (its FFT makes δ below 1e-10 doubtful), and that samplers draw floating-point numbers.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import numbers
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal

from fastdp.errors import ArgumentError, require

AccountantName = Literal["pld", "rdp"]
Event = tuple[float, float]  # noise multiplier, sample rate; rate 1 is the plain Gaussian, without amplification

# Box-Muller with u >= 2^-65: no pair of noise values lies outside the disc of this radius, in standard deviations.
TAIL_RADIUS: Final = math.sqrt(2 * 65 * math.log(2))

# In secure mode a noise value is the sum of so many such normals over the root of their number.
SECURE_NORMALS: Final = 4

# dp-accounting visits each point of a single step's grid in Python, about 10 µs a point, and transforms the composed
# grid by FFT, 16 bytes a point and about 1 s at the limit.
_MAX_STEP_POINTS: Final = 40_000
_MAX_COMPOSED_POINTS: Final = 2_000_000


def epsilon(
    *, noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: AccountantName = "pld"
) -> float:
    """ε of `steps` steps of DP-SGD with Poisson sampling.

    Args:
        noise_multiplier: standard deviation of the noise over the clipping norm, no unit; 0 gives inf.
        sample_rate: probability in (0, 1] that a record is in a step's batch; 1 is the plain Gaussian mechanism.
        steps: number of steps; 0 gives 0.0.
        delta: in (0, 1).
        accountant: "pld" (tight; hands runs whose ε exceeds some 1e5 to RDP) or "rdp" (looser by 5 to 15 % or more).

    Returns:
        ε >= 0 in nats such that the run is (ε, delta)-DP under adding or removing one record; inf if there is none.

    Raises:
        ArgumentError: an argument is out of its bounds.
    """
    _check_steps(steps)
    ledger = Ledger(accountant)
    ledger.step(noise_multiplier, sample_rate, count=steps)
    return ledger.epsilon(delta)


def noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    accountant: AccountantName = "pld",
    prior: Mapping[Event, int] | None = None,
) -> float:
    """The smallest noise for a budget, to half a per cent of ε: 0.995 target < epsilon(result) <= target.

    Args: as `epsilon`, with target_epsilon > 0 in nats; steps >= 1. Answers are cached.
        prior: what was spent on the same records before, {(noise multiplier, sample rate): count}; ε includes it.

    Raises:
        ArgumentError: an argument is out of its bounds, or no noise multiplier in [1e-2, 1e6] lands in that interval:
            at very large δ, a step can cost ε = 0 at one noise multiplier and more than the target just below it.
    """
    return _noise_multiplier(
        target_epsilon, target_delta, sample_rate, steps, accountant, tuple(_checked(prior or {}).items())
    )


@functools.lru_cache(maxsize=256)
def _noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    accountant: AccountantName,
    prior: tuple[tuple[Event, int], ...],
) -> float:
    require(0 < target_epsilon < math.inf, "target_epsilon", target_epsilon, "finite and > 0")
    require(0 < target_delta < 1, "target_delta", target_delta, "in (0, 1)")
    _check_steps(steps)
    require(steps >= 1, "steps", steps, ">= 1")

    def cost(log_sigma: float) -> float:
        ledger = Ledger(accountant, dict(prior))
        ledger.step(math.exp(log_sigma), sample_rate, steps)
        return ledger.epsilon(target_delta)

    smallest, largest = math.log(1e-2), math.log(1e6)
    # The central limit's guess (Abadi et al. 2016, theorem 1, without its constant), then a bracket by doubling.
    guess = sample_rate * math.sqrt(-2 * steps * math.log(target_delta)) / target_epsilon
    low = high = min(max(math.log(max(guess, 0.5)), smallest), largest)
    low_cost = high_cost = cost(low)
    while low_cost <= target_epsilon and low > smallest:
        high, high_cost = low, low_cost
        low = max(low - math.log(2), smallest)
        low_cost = cost(low)
    while high_cost > target_epsilon and high < largest:
        low, low_cost = high, high_cost
        high = min(high + math.log(2), largest)
        high_cost = cost(high)
    # ε falls with σ, and log ε against log σ is nearly straight: secants aimed at the middle of the allowed interval
    # need two to four evaluations. Where one fails to halve the bracket, bisect: 40 rounds reach 1e-6 even then.
    halved = True
    for _ in range(40):
        if 0.995 * target_epsilon < high_cost <= target_epsilon:
            return math.exp(high)
        if not low_cost > target_epsilon >= high_cost:
            break
        width = high - low
        middle = (low + high) / 2
        if halved and high_cost > 0 and low_cost < math.inf:
            fraction = math.log(low_cost / (0.9975 * target_epsilon)) / math.log(low_cost / high_cost)
            middle = low + width * min(max(fraction, 1e-3), 1 - 1e-3)
        middle_cost = cost(middle)
        if middle_cost > target_epsilon:
            low, low_cost = middle, middle_cost
        else:
            high, high_cost = middle, middle_cost
        halved = high - low <= width / 2
    raise ArgumentError(
        "target_epsilon",
        target_epsilon,
        f"reachable by a noise multiplier in [0.01, 1e6] at target_delta={target_delta!r}, "
        f"sample_rate={sample_rate!r}, steps={steps!r} ({accountant}: nearest ε {high_cost:.6g} and {low_cost:.6g})",
    )


class Ledger:
    """What a run has spent: how many steps of which (noise multiplier, sample rate).

    Recording is O(1) and loads no library; ε is computed when asked for, and once for each state of the ledger and δ.
    Composition does not depend on the order, so equal events share one count.
    """

    def __init__(self, accountant: AccountantName = "pld", prior: Mapping[Event, int] | None = None) -> None:
        """prior: what was spent on the same records before the run, by true Gaussians: in ε, and no steps of it."""
        require(accountant in ("pld", "rdp"), "accountant", accountant, "'pld' or 'rdp'")
        self.accountant: Final = accountant
        self._counts: Counter[Event] = Counter()
        self.prior: Final = _checked(prior or {})

    def step(self, noise_multiplier: float, sample_rate: float, count: int = 1) -> None:
        """Record `count` steps; call it BEFORE anything of them is released.

        Args:
            noise_multiplier: >= 0, no unit; a step without noise (0) makes ε infinite for good.
            sample_rate: in (0, 1], the Poisson rate. Pass 1 for steps whose batches are not Poisson samples: the plain
                Gaussian mechanism, no amplification claimed. Then "neighbour" can only mean one record's gradients
                replaced by zero, since a removed record also moves the others between shuffled batches.
            count: >= 0.
        """
        _check_event(noise_multiplier, sample_rate, count)
        if count:
            self._counts[(float(noise_multiplier), float(sample_rate))] += count

    @property
    def steps(self) -> int:
        """Number of steps recorded."""
        return self._counts.total()

    @property
    def events(self) -> dict[Event, int]:
        """A copy of the counts: {(noise multiplier, sample rate): steps}, in order of first use."""
        return dict(self._counts)

    def epsilon(self, delta: float) -> float:
        """ε >= 0 spent so far at δ = `delta` in (0, 1): 0.0 for nothing, inf once a step had no noise."""
        whole = Counter(self.prior) + self._counts
        return _epsilon(tuple(whole.items()), float(delta), self.accountant)

    def tail_delta(self, dimension: int) -> float:
        """The δ that cut tails add to this run (`tail_delta`), for `dimension` noised numbers a step."""
        return min(1.0, sum(tail_delta(sigma, n, dimension) for (sigma, _), n in self._counts.items()))

    def epsilon_of_sampler(self, delta: float, dimension: int) -> float:
        """ε of the run with the sampler's cut Gaussian, `epsilon(delta - tail_delta)`; inf if tails use up delta."""
        require(0 < delta < 1, "delta", delta, "in (0, 1)")
        left = delta - self.tail_delta(dimension)
        return self.epsilon(left) if left > 0 else math.inf


def tail_delta(noise_multiplier: float, steps: int, dimension: int) -> float:
    """δ to add to that of the true Gaussian because ours is cut at TAIL_RADIUS = R = 9.49 standard deviations.

    Args:
        noise_multiplier: σ > 0, no unit; steps >= 0; dimension: normals drawn per step, >= 0; one for each noised
            number, SECURE_NORMALS for each in secure mode.

    Returns:
        min(1, steps (exp(-(R - 1/σ)²/2) + dimension 2^-64)), and 1 where 1/σ > sqrt(R² - 4), that is σ < 0.108.
        At σ = 1, 1000 steps and a million parameters: 5e-11.

    Guarantee: if the run with true Gaussians is (ε, δ)-DP, with or without Poisson sampling, then the run with
    Gaussians whose Box-Muller pairs are conditioned on a radius <= R is (ε, δ + tail_delta)-DP.

    Derivation. In units of the noise's standard deviation, adding a record shifts the mean of a step's output by a
    vector Δ, |Δ| <= s = 1/σ; Δ_i is its part in pair i. Pair i's noise has the true density over 1 - p on the disc of
    radius R, p = P(|z| > R) = exp(-R²/2) = 2^-65.
    (a) Where an output lies in both neighbours' supports, both densities are those of the true Gaussians times the same
        (1-p)^-(pairs), Poisson mixtures included. There, P - e^ε Q sums to at most δ (1-p)^-(steps pairs) over the
        run: the factor adds less than steps dimension 2^-65.
    (b) An output in only one of the supports counts in full. For pair i that has probability
        P(|z+Δ_i| > R and |z| <= R) <= G(|Δ_i|²) + p with G(t) = Q1(√t, R) - Q1(0, R), where Q1 is Marcum's function
        P(|z+Δ| > R). G is convex up to t = R² - 4: 4 G'' = Q3 - 2 Q2 + Q1 has the sign of I2(x)/I1(x) - x/R² at
        x = R√t, and I2(x)/I1(x) >= x / (2 + sqrt(4 + x²)) (Amos 1974). Since G(0) = 0, the pairs' G(|Δ_i|²) sum to
        at most G(s²) <= exp(-(R-s)²/2), for |z+Δ| > R needs |z| > R - s. So the shift is paid once a step, not once a
        dimension.
    (c) Union over steps, with pairs <= dimension: (a) and the p of (b), 2^-65 a pair each, fit in dimension 2^-64.
    Secure mode: the noise is Z = (W_1 + ... + W_4) / 2 of cut W_j. Publish U_j = W_j + Δ/2 for all four instead: 4d
    normals a step, each cut as above, shifted by a vector of length sqrt(4 |Δ/2|²) = |Δ|; so (a) to (c) hold with 4d
    for the dimension d and the same σ. What is published is (U_1 + ... + U_4) / 2 = Z + Δ rounded to a grid that
    depends on σC only: post-processing. And with true normals, the U_j are a Gaussian mechanism of the same σ.
    The grid of radii (u in steps of 2^-64 within 2^-13 of 0 and of 1, 2^-32 between; smallest u 2^-65), of 2^32 angles
    and float32 is rounding, which no accountant here covers.
    """
    require(noise_multiplier >= 0, "noise_multiplier", noise_multiplier, ">= 0")
    _check_steps(steps)
    require(dimension >= 0, "dimension", dimension, ">= 0")
    if steps == 0 or dimension == 0:
        return 0.0
    if noise_multiplier == 0 or noise_multiplier**-2 > TAIL_RADIUS**2 - 4:
        return 1.0
    shift = math.exp(-((TAIL_RADIUS - 1 / noise_multiplier) ** 2) / 2)
    return min(1.0, steps * (shift + dimension * 2 * math.exp(-(TAIL_RADIUS**2) / 2)))


def _checked(prior: Mapping[Event, int]) -> dict[Event, int]:
    try:
        events = {
            (float(0.0 + sigma), float(0.0 + rate)): operator.index(count) for (sigma, rate), count in prior.items()
        }
    except (AttributeError, TypeError, ValueError):
        raise ArgumentError(
            "prior", prior, "{(noise multiplier, sample rate): count}, numbers and an integer"
        ) from None
    for (sigma, rate), count in events.items():
        _check_event(sigma, rate, count)
    return events


def _check_event(noise_multiplier: float, sample_rate: float, count: int) -> None:
    require(0 <= noise_multiplier < math.inf, "noise_multiplier", noise_multiplier, "finite and >= 0")
    require(0 < sample_rate <= 1, "sample_rate", sample_rate, "in (0, 1]")
    _check_steps(count, "count")


def _check_steps(steps: int, name: str = "steps") -> None:
    integral = isinstance(steps, numbers.Integral) and not isinstance(steps, bool)
    require(integral and steps >= 0, name, steps, "an integer >= 0")


@functools.lru_cache(maxsize=256)
def _epsilon(counts: tuple[tuple[Event, int], ...], delta: float, accountant: AccountantName) -> float:
    require(0 < delta < 1, "delta", delta, "in (0, 1)")
    if not counts:
        return 0.0
    # Below σ = 1e-3 a single release costs ε > 4e5 (rate 1), and squares of 1/σ overflow near 1e-154: no protection.
    if any(sigma < 1e-3 for (sigma, _), _ in counts):
        return math.inf
    # About a second of import, so not at the top: `import fastdp` stays light.
    import dp_accounting
    from dp_accounting import pld, rdp

    grid = _grid(counts) if accountant == "pld" else None
    ledger: Any = rdp.RdpAccountant() if grid is None else pld.PLDAccountant(value_discretization_interval=grid)
    with _quiet_absl():
        for (sigma, rate), count in counts:
            event = dp_accounting.GaussianDpEvent(sigma)
            ledger.compose(event if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, event), count)
        found = float(ledger.get_epsilon(delta))
    # A NaN is no bound, and a negative ε is a rounding artefact: at a generous δ the answer is 0.
    return math.inf if math.isnan(found) else max(0.0, found)


def _grid(counts: Iterable[tuple[Event, int]]) -> float | None:
    """Interval of the privacy loss grid, in nats; None where ε is beyond some 1e5 and a grid would be useless.

    Rounding a step's loss to a grid of interval h adds up to h²/6 to its variance on average, so h is 1/50 of the
    smallest standard deviation among the events (0.007 % of the variance), unless that takes too many points.
    """
    finest, step_span, composed_span = 1e-4, 0.0, 0.0
    for (sigma, rate), count in counts:
        # χ² of the mixture against the Gaussian, the variance of a small loss; the exponent is capped before overflow.
        chi2 = rate**2 * math.expm1(min(sigma**-2, 600.0))
        finest = min(finest, math.sqrt(chi2) / 50)
        # dp-accounting follows the Gaussian to 10 standard deviations (mass e^-50) either way.
        reach = 0.5 / sigma**2 + 10 / sigma
        span = reach + math.log(rate + (1 - rate) * math.exp(-reach)) if reach < 700 else reach + math.log(rate)
        step_span = max(step_span, span)
        # The mean loss is at most rate / (2 σ²), by convexity, and log(1 + χ²); its spread goes with the root.
        mean = count * min(rate * 0.5 / sigma**2, math.log1p(chi2))
        composed_span += 2 * mean + 10 * math.sqrt(2 * mean)
    finest = max(finest, step_span / _MAX_STEP_POINTS)
    coarsest = (step_span + composed_span) / _MAX_COMPOSED_POINTS
    # With fewer than ten points a step, the rounding would dominate and the composed grid outgrow its limit: RDP then.
    return max(finest, coarsest) if coarsest < step_span / 10 else None


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Hold back dp-accounting's warnings about RDP orders it leaves out: leaving one out keeps an upper bound."""
    logger = logging.getLogger("absl")

    def drop(record: logging.LogRecord) -> bool:
        return "_compute_log_a_frac" not in record.getMessage()

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
