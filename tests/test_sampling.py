"""Poisson batches: the law, the cost, the oracle, and the loader that slices them (P2, P4, P5)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fastdp import ArgumentError, PrivacyError, ops, reference
from fastdp.plan import Plan
from fastdp.sampling import BatchSampler, PrivateLoader, check_loader
from fastdp.secret import SecretKey


@pytest.mark.parametrize(
    ("n", "rate"),
    [(0, 0.5), (1, 0.5), (10_000, 0.01), (4096, 1.0), (5000, 0.5), (9000, 0.3), (4097, 0.999), (100, 0.0)],
)
def test_ids_are_the_oracles(key: torch.Tensor, n: int, rate: float) -> None:
    got = ops.poisson_sample(n, rate, key=key, step=9)
    assert got.dtype == torch.int64
    want = [] if rate == 0 else reference.poisson_sample(n, rate, bytes(key.tolist()), 9)
    assert got.tolist() == want


def test_law_of_batches(key: torch.Tensor) -> None:
    """Sizes are binomial, every record is as likely as any other, and pairs of records are independent."""
    n, rate, steps = 10_000, 0.01, 3000
    sizes, counts, both, block_sizes = [], np.zeros(n), 0, []
    for step in range(steps):
        ids = ops.poisson_sample(n, rate, key=key, step=step).numpy()
        assert len(np.unique(ids)) == len(ids) and (np.diff(ids) > 0).all()
        sizes.append(len(ids))
        counts[ids] += 1
        both += np.isin(np.arange(0, n, 2)[np.isin(np.arange(0, n, 2), ids)] + 1, ids).sum()
        block_sizes.append([(ids < 4096).sum(), ((ids >= 4096) & (ids < 8192)).sum()])
    sd = math.sqrt(n * rate * (1 - rate))
    assert abs(np.mean(sizes) - n * rate) < 5 * sd / math.sqrt(steps)
    assert abs(np.var(sizes) / sd**2 - 1) < 5 * math.sqrt(2 / steps)
    dispersion = ((counts - steps * rate) ** 2).sum() / (steps * rate * (1 - rate))
    assert stats.chi2.sf(dispersion, n) > 1e-4 and stats.chi2.cdf(dispersion, n) > 1e-4
    pairs = steps * n / 2 * rate**2  # neighbours 2i, 2i+1 both in
    assert abs(both - pairs) < 5 * math.sqrt(pairs)
    a, b = np.array(block_sizes).T
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(steps)
    assert abs(np.corrcoef(sizes[:-1], sizes[1:])[0, 1]) < 5 / math.sqrt(steps)


def test_gaps_are_geometric(key: torch.Tensor) -> None:
    ids = ops.poisson_sample(3_000_000, 0.02, key=key, step=0).numpy()
    gaps = np.diff(ids)
    observed = np.bincount(np.minimum(gaps, 200), minlength=201)[1:]
    p = 0.02 * 0.98 ** np.arange(199)
    p = np.append(p, 1 - p.sum())
    assert stats.chisquare(observed, p * len(gaps)).pvalue > 1e-4


def secret(key: torch.Tensor) -> SecretKey:
    return SecretKey(bytes(key.tolist()))


def plan(n: int, batch: int, poisson: bool = True) -> Plan:
    return Plan(n, batch, noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=poisson)


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_ranks_slices_are_the_global_batch(key: torch.Tensor, poisson: bool, size: int) -> None:
    p = plan(1000, 37, poisson)
    samplers = [BatchSampler(p, 1000, secret(key), rank, size) for rank in range(size)]
    whole = BatchSampler(p, 1000, secret(key))
    for step in range(2 * p.steps_per_epoch):
        epoch, position = divmod(step, p.steps_per_epoch)
        parts = [s.local_batch(step, epoch, position) for s in samplers]
        assert torch.equal(torch.cat(parts), whole.global_batch(step, epoch, position))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shuffled_epochs_hold_every_record_once(key: torch.Tensor) -> None:
    p = plan(100, 30, poisson=False)
    sampler = BatchSampler(p, 100, secret(key))
    epochs = [torch.cat([sampler.global_batch(4 * e + i, e, i) for i in range(4)]) for e in range(2)]
    for order in epochs:
        assert order.sort().values.tolist() == list(range(100))
    assert not torch.equal(epochs[0], epochs[1])


class Words(Dataset):
    """Dict records, so that the default fast path for TensorDataset is not taken."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, i: int) -> dict[str, object]:
        return {"x": torch.full((3,), float(i)), "y": i, "name": f"record {i}"}


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_yields_the_sampled_records(key: torch.Tensor, workers: int) -> None:
    p = plan(50, 5)
    loader = PrivateLoader(DataLoader(Words(), batch_size=5, num_workers=workers), BatchSampler(p, 50, secret(key)))
    assert len(loader) == 10
    for epoch in range(2):
        for i, batch in enumerate(loader):
            step = 10 * epoch + i
            want = ops.poisson_sample(50, 0.1, key=key, step=step)
            assert loader.drawn == step + 1 and loader.rows == len(want)
            if len(want):
                assert torch.equal(batch["y"], want)
                assert torch.equal(batch["x"][:, 0], want.float())
                assert batch["name"] == [f"record {j}" for j in want]
            else:
                assert batch["x"].tolist() == [[0.0] * 3] and batch["name"] == [""]


def test_empty_batches_come_as_one_record_of_zeros(key: torch.Tensor) -> None:
    x, y = torch.ones(4, 3), torch.ones(4, dtype=torch.int64)
    p = Plan(1000, 1, noise_multiplier=1.0, max_grad_norm=1.0, size_from_data=False)
    loader = PrivateLoader(DataLoader(TensorDataset(x, y), batch_size=1), BatchSampler(p, 4, secret(key)))
    empty = 0
    for got_x, got_y in loader:
        if loader.rows == 0:
            empty += 1
            assert got_x.tolist() == [[0.0] * 3] and got_y.tolist() == [0]
    assert empty > 900


def test_two_iterations_at_once_are_refused(key: torch.Tensor) -> None:
    loader = PrivateLoader(DataLoader(Words(), batch_size=5), BatchSampler(plan(50, 5), 50, secret(key)))
    first, second = iter(loader), iter(loader)
    next(first)
    next(first)
    with pytest.raises(PrivacyError, match="two iterations at once"):
        next(second)
        next(first)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.ones(1)


def test_loaders_whose_sampling_would_not_be_replaced_are_refused() -> None:
    data = TensorDataset(torch.ones(10, 1))
    assert check_loader(DataLoader(data, batch_size=4, shuffle=True)) == (10, 4)
    for sampler in (
        WeightedRandomSampler([1.0] * 10, 10),
        RandomSampler(data, replacement=True),
        DistributedSampler(data, num_replicas=2, rank=0),
    ):
        with pytest.raises(ArgumentError, match=f"data_loader.sampler='{type(sampler).__name__}'"):
            check_loader(DataLoader(data, batch_size=4, sampler=sampler))
    with pytest.raises(ArgumentError, match="map-style"):
        check_loader(DataLoader(Stream(), batch_size=4))
    with pytest.raises(ArgumentError, match="batch_size=None"):
        check_loader(DataLoader(data, batch_size=None))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 11}, r"batch_size=11: must be in \[1, dataset_size=10\]"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"dataset_size": 0}, "dataset_size=0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0: must be finite and >= 0"),
        ({"max_grad_norm": math.inf}, "max_grad_norm=inf"),
        ({"clipping": "none"}, "clipping='none': must be one of"),
        ({"clipping": "per_layer"}, r"layer_bounds=\(\): must be given"),
        ({"layer_bounds": (("0", 1.0),)}, "layer_bounds=.*: must be given for clipping='per_layer', and only for it"),
        ({"clipping": "per_layer", "layer_bounds": (("0", 1.0), ("1", 0.1))}, "a root of the sum of squares <= 1.0"),
    ],
)
def test_plans_with_bad_numbers_are_refused(changed: dict[str, float], message: str) -> None:
    good = {"dataset_size": 10, "batch_size": 5, "noise_multiplier": 1.0, "max_grad_norm": 1.0}
    Plan(**good)
    with pytest.raises(ArgumentError, match=message):
        Plan(**{**good, **changed})


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        plan(10, 5).noise_multiplier = 0.0  # type: ignore[misc]
