"""P2 and P3 over ranks: the same batches, the same bits of noise, its variance once, equal parameters."""

from __future__ import annotations

import json
import math

import pytest
import torch
from mpi import launch


@pytest.fixture(scope="module")
def facts() -> dict[int, dict]:
    return {ranks: json.loads(launch.run("training.py", ranks=ranks)) for ranks in (1, 2, 4)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_batches_noise_and_epsilon_do_not_depend_on_ranks(facts: dict[int, dict], ranks: int) -> None:
    assert sum(map(len, facts[1]["batches"])) > 60
    for fact in ("batches", "noise", "epsilon"):
        assert facts[ranks][fact] == facts[1][fact]


@pytest.mark.parametrize("ranks", [2, 4])
def test_parameters_are_equal_to_rounding(facts: dict[int, dict], ranks: int) -> None:
    one, many = (torch.tensor(facts[r]["parameters"], dtype=torch.float64) for r in (1, ranks))
    assert ((many - one).abs().max() / one.abs().max()).item() < 1e-5


@pytest.mark.parametrize("algorithm", ["ring", "mpi"])
def test_batches_and_noise_do_not_depend_on_the_algorithm(facts: dict[int, dict], algorithm: str) -> None:
    other = json.loads(launch.run("training.py", algorithm, ranks=3))
    for fact in ("batches", "noise", "epsilon"):
        assert other[fact] == facts[1][fact]
    one, many = (torch.tensor(of["parameters"], dtype=torch.float64) for of in (facts[1], other))
    assert ((many - one).abs().max() / one.abs().max()).item() < 1e-5


@pytest.mark.parametrize("clipping", ["per_layer", "automatic"])
def test_modes_of_clipping_train_alike_on_two_ranks(facts: dict[int, dict], clipping: str) -> None:
    one, two = (json.loads(launch.run("training.py", clipping, ranks=ranks)) for ranks in (1, 2))
    for fact in ("batches", "noise", "epsilon"):
        assert one[fact] == two[fact] == facts[1][fact]
    flat, a, b = (torch.tensor(of["parameters"], dtype=torch.float64) for of in (facts[1], one, two))
    assert (a - b).abs().max() < 1e-5 * a.abs().max() < 0.1 * (a - flat).abs().max()


def test_secure_noise_has_the_same_bits_on_any_number_of_ranks_and_the_variance_of_one_draw(
    facts: dict[int, dict],
) -> None:
    one, *more = (json.loads(launch.run("training.py", "secure", ranks=ranks)) for ranks in (1, 2, 4))
    assert one["noise"] != facts[1]["noise"] and one["batches"] == facts[1]["batches"]
    assert abs(one["variance"] - 1) < 5 * math.sqrt(2 / one["draws"])
    for many in more:
        assert many["noise"] == one["noise"] and many["epsilon"] == one["epsilon"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_noise_has_the_variance_of_one_draw(facts: dict[int, dict], ranks: int) -> None:
    assert abs(facts[ranks]["variance"] - 1) < 5 * math.sqrt(2 / facts[ranks]["draws"])


def test_some_ranks_had_nothing_to_do(facts: dict[int, dict]) -> None:
    assert facts[4]["empty_slices"] > 5


def test_ranks_with_different_plans_are_found_at_start() -> None:
    assert launch.run("plans.py", ranks=2).count("done: rank") == 2


def test_ranks_agree_without_a_seed() -> None:
    assert launch.run("unseeded.py", ranks=2).count("equal: rank") == 2


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_step_taken_together_is_the_step_of_torch(ranks: int) -> None:
    assert launch.run("sharded.py", ranks=ranks).count("done: rank") == ranks


def test_what_one_rank_leaves_in_the_middle_ends_on_all() -> None:
    result = launch.start("interrupted.py", ranks=3, timeout=120)
    assert result.stdout.count("done: rank") == 3, result.stdout
