"""Statistics of the training rows: exact sums, the noise on them, and what they cost."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import scipy.stats
import torch
from dp_accounting import pld
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdp import pieces, prepared, shards, statistics, train
from fastdp.errors import ArgumentError
from fastdp.schema import parse_schema
from fastdp.statistics import GRID

CONTRACT = """
format = 1
name = "people"
[prepare]
stats = "STATS"
[[column]]
name = "age"
type = "number"
bounds = [20, 70]
missing = "mean"
standardize = true
[[column]]
name = "debt"
type = "number"
bounds = [0, 1000]
scale = "log"
missing = "mean"
[[column]]
name = "height"
type = "number"
bounds = [1, 2]
standardize = true
[[column]]
name = "job"
type = "category"
values = ["clerk", ["none", "?"], "nurse"]
missing = "mode"
other = "rest"
[[column]]
name = "town"
type = "category"
values = ["a", "b"]
[[column]]
name = "repaid"
type = "label"
values = ["no", "yes"]
"""
NAMES = ("age", "debt", "height", "job", "town", "repaid")


def contract(stats: str = "dp", noise: float = 4.0) -> str:
    return CONTRACT.replace('"STATS"', f'"{stats}"' + f"\nnoise_multiplier = {noise}" * (stats == "dp"))


NUMBERS = st.none() | st.floats(-1e6, 1e6)
ROWS = st.lists(
    st.tuples(NUMBERS, NUMBERS, st.floats(0.5, 2.5), st.none() | st.sampled_from(["clerk", "?", "nurse", "astronaut"])),
    min_size=1,
    max_size=40,
)


def values_of(rows: list[Any]) -> dict[str, np.ndarray]:
    """As parsing leaves them."""
    codes = {None: -1, "clerk": 0, "?": 1, "none": 1, "nurse": 2, "astronaut": 3}
    age, debt, height, job = zip(*rows, strict=True)
    numbers = {"age": age, "debt": debt, "height": height}
    parsed = {name: np.array([math.nan if x is None else x for x in some]) for name, some in numbers.items()}
    return {**parsed, "job": np.array([codes[text] for text in job]), "town": np.zeros(len(rows), np.int64)}


def row_loop(rows: list[Any]) -> dict[str, list[Fraction]]:
    """The same with exact numbers, except for the logarithm; nothing is rounded to the grid."""
    low_high = {"age": (20, 70), "debt": (0, 1000), "height": (1, 2)}
    found = {name: [Fraction(0)] * 3 for name in low_high} | {"job": [Fraction(0)] * 4}
    for row in rows:
        for name, cell in zip(low_high, row, strict=False):
            if cell is not None:
                low, high = low_high[name]
                inside = Fraction(min(max(cell, low), high)) - low
                scaled = inside / (high - low)
                if name == "debt":
                    scaled = Fraction(math.log(1 + float(inside)) / math.log(1001))
                found[name] = [a + b for a, b in zip(found[name], (1, scaled, scaled**2), strict=True)]
        if row[3] is not None:
            found["job"][{"clerk": 0, "?": 1, "nurse": 2, "astronaut": 3}[row[3]]] += 1
    return found


@settings(deadline=None)
@given(ROWS, st.integers(0, 40))
def test_sums_are_exact_however_the_rows_are_cut(rows: list[Any], cut: int) -> None:
    schema = parse_schema(contract())
    whole = statistics.sums(values_of(rows), schema)
    parts = [statistics.sums(values_of(some), schema) for some in (rows[cut:], rows[:cut]) if some]
    assert statistics.added(parts) == whole == json.loads(json.dumps(whole))
    for name, numbers in row_loop(rows).items():
        for found, wanted in zip(whole[name], numbers, strict=True):
            assert abs(Fraction(found, GRID) - wanted) <= len(rows) * Fraction(6, 10 * GRID)


@settings(deadline=None)
@given(ROWS)
def test_no_row_adds_more_than_the_sensitivity(rows: list[Any]) -> None:
    schema = parse_schema(contract())
    for row in rows:
        added = [n / GRID for numbers in statistics.sums(values_of([row]), schema).values() for n in numbers]
        assert math.hypot(*added) <= statistics.sensitivity(schema) == math.sqrt(10)
    largest = statistics.sums(values_of([(70.0, 1e9, 3.0, "nurse")]), schema)
    assert math.hypot(*(n / GRID for numbers in largest.values() for n in numbers)) == pytest.approx(math.sqrt(10))


def test_the_noise_is_gaussian_of_its_size_and_never_the_same() -> None:
    total = {"age": [5 * GRID] * 4000, "debt": [-3 * GRID] * 4000}
    first, second = statistics.noisy(total, 12.5), statistics.noisy(total, 12.5)
    noise = [(n - 5 * GRID) / GRID for n in first["age"]] + [(n + 3 * GRID) / GRID for n in first["debt"]]
    assert scipy.stats.kstest(noise, "norm", args=(0, 12.5)).pvalue > 1e-6
    assert all(isinstance(n, int) for n in first["age"]) and first["age"] != second["age"]
    assert abs(np.corrcoef(first["age"], first["debt"])[0, 1]) < 0.1


def test_every_sum_has_noise_to_the_last_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each place, of numbers and of counts; from the system's generator; finer than what it hides."""
    schema = parse_schema(contract("dp", 1.0))
    total = statistics.sums(values_of([(30.0, 10.0, 1.5, "nurse")] * 5), schema)
    draws = [statistics.noisy(total, 3.0) for _ in range(200)]
    for name, numbers in total.items():
        for i, exact in enumerate(numbers):
            noise = np.array([draw[name][i] - exact for draw in draws]) / GRID
            assert 2 < noise.std() < 4 and abs(noise.mean()) < 1.5
            assert scipy.stats.kstest(noise % 1, "uniform").pvalue > 1e-6
    seen: list[Any] = []
    real = statistics.noisy
    monkeypatch.setattr(
        statistics, "noisy", lambda total, deviation: seen.append(dict(total)) or real(total, deviation)
    )
    statistics.release(total, schema)
    assert seen == [total]
    monkeypatch.setattr(statistics.secrets, "SystemRandom", None)
    with pytest.raises(TypeError):
        statistics.release(total, schema)


def test_no_rows_and_noise_that_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = parse_schema(contract())
    for total in ({}, statistics.sums(values_of([(30.0, 10.0, 1.5, "nurse")]), schema)):
        parse_schema(statistics.declared(contract(), statistics.release(total, schema)))
    monkeypatch.setattr(statistics, "noisy", lambda total, _: {name: [-5 * GRID] * len(n) for name, n in total.items()})
    age = statistics.release({}, schema)["columns"]["age"]
    assert age == {"mean": 0.0, "deviation": 1.0}


def test_what_is_made_of_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(30.0, 10.0, 1.5, "nurse"), (50.0, None, 1.5, "nurse"), (None, 99.0, 1.5, "?"), (0.0, 0.0, 1.5, None)]
    schema = parse_schema(contract("non-private"))
    released = statistics.release(statistics.sums(values_of(rows), schema), schema)
    assert released["dp"] is False and "noise_multiplier" not in released
    age, debt = released["columns"]["age"], released["columns"]["debt"]
    assert age["mean"] == pytest.approx((0.2 + 0.6 + 0) / 3, abs=1e-6)
    assert age["deviation"] == pytest.approx(np.std([0.2, 0.6, 0.0]), abs=1e-6)
    assert debt == {"mean": pytest.approx((math.log(11) + math.log(100)) / 3 / math.log(1001), abs=1e-6)}
    assert released["columns"]["height"] == {"mean": 0.5, "deviation": statistics.SMALLEST_DEVIATION}
    assert released["columns"]["job"] == {"mode": "nurse"}

    given_noise: list[float] = []
    monkeypatch.setattr(statistics, "noisy", lambda total, deviation: given_noise.append(deviation) or total)
    released = statistics.release(statistics.sums(values_of(rows), schema), parse_schema(contract("dp", 4.0)))
    assert given_noise == [4 * math.sqrt(10)]
    assert {**released, "columns": 0} == {
        "dp": True,
        "mechanism": "Gaussian",
        "sensitivity": math.sqrt(10),
        "noise_multiplier": 4.0,
        "columns": 0,
    }
    # Noise of 12.6 on sums over three rows may have made any deviation.
    assert released["columns"]["age"]["deviation"] == 1.0


@settings(max_examples=30, deadline=None)
@given(*[st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)] * 2)
@example("j\U0001f600", "\U00020bb7")
def test_the_contract_with_its_statistics_is_one_whatever_the_names(name: str, value: str) -> None:
    escaped = {ord(c): f"\\U{ord(c):08x}" for c in map(chr, [*range(32), 127, ord('"'), ord("\\")])}
    quoted = [f'"{text.translate(escaped)}"' for text in (name, value.strip())]
    text = contract().replace('"height"', quoted[0]).replace('"nurse"', quoted[1])
    if name in NAMES or value.strip() in ("clerk", "none", "?", "rest"):
        return
    schema = parse_schema(text)
    total = statistics.sums({**values_of([(30.0, 10.0, 1.5, "nurse")]), name: np.array([1.5])}, schema)
    known = parse_schema(statistics.declared(text, statistics.release(total, schema)))
    assert known.unknown == () and statistics.declared(text, None) == text
    assert {column.name for column in known.columns if column.statistics} == {"age", "debt", name, "job"}


def test_missing_cells_and_scales_by_declared_statistics() -> None:
    text = contract("declared") + "[statistics.age]\nmean = 0.5\ndeviation = 0.25\n[statistics.debt]\nmean = 0.4\n"
    text += '[statistics.height]\nmean = 0.0\ndeviation = 0.5\n[statistics.job]\nmode = "none"\n'
    rows = [(20.0, 1e9, 2.0, "nurse"), (None, None, 1.0, None)]
    cells = {**values_of(rows), "repaid": np.array([0, 1])}
    found = parse_schema(text).encode(cells).features
    np.testing.assert_allclose(
        found, [[-2, 1, 2, 0, 0, 1, 0, 1, 0], [0, 0.4, 0, 0, 1, 0, 0, 1, 0]], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"dp"', '"declared"', "prepare.noise_multiplier=4.0: must be absent"),
        ("noise_multiplier = 4.0", "", "prepare.noise_multiplier=None: must be in [0.5, 1e6]"),
        ("noise_multiplier = 4.0", "noise_multiplier = 0.4", "prepare.noise_multiplier=0.4: must be in [0.5, 1e6]"),
        ('stats = "dp"\nnoise_multiplier = 4.0', "", "prepare.stats='declared': must be 'dp' or 'non-private', or"),
        ('"dp"', '"exact"', "prepare.stats='exact': must be 'declared', 'dp' or 'non-private'"),
        ('scale = "log"', 'scale = "none"\nbins = [2]\nstandardize = true', "debt.standardize=True: must be"),
        ("format = 1", "format = 1\n[statistics.town]\nmode = 'a'", "statistics=['town']: must be of columns that"),
        ("format = 1", "format = 1\n[statistics.age]\nmean = 2", "statistics.age.mean=2: must be in [0, 1]"),
        ("format = 1", "format = 1\n[statistics.age]\nmean = 0", "statistics.age.deviation=None: must be in [1e-6, 1]"),
        ("format = 1", "format = 1\n[statistics.job]\nmode = 'x'", "statistics.job.mode='x': must be one of"),
        ("format = 1", "format = 1\n[statistics.job]\nmean = 1", "statistics.job=['mean']: must be of these fields"),
        ('missing = "mode"', 'missing = "mean"', "job.missing='mean': must be one of the column's values, or 'mode'"),
    ],
)
def test_bad_contracts_are_named(old: str, new: str, message: str) -> None:
    text = contract()
    moved = text.replace(old, new, 1)
    if "[statistics" in new:  # tables come after what is not in one
        moved = text + new.removeprefix("format = 1\n")
    with pytest.raises(ArgumentError) as error:
        parse_schema(moved)
    assert str(error.value).startswith(message)


def prepare(folder: Path, text: str) -> Path:
    """As the job does it, without Spark."""
    draw = np.random.default_rng(0)
    csv = folder / "t.csv"
    jobs, answers = ("", "clerk", "clerk"), ("yes", "no")
    rows = [
        f"{draw.integers(20, 70)},{draw.choice(['', '5', '500'])},1.{i % 10},{jobs[i % 3]},a,{answers[i % 2]}"
        for i in range(600)
    ]
    csv.write_text("\n".join([",".join(NAMES), *rows, ""]))
    schema, output, origin = parse_schema(text), folder / "prepared", shards.Origin(text, "", {}, "rows")
    shards.begin(output)
    (piece,) = pieces.cut(pieces.source(csv, csv.name), schema)
    released = None
    if schema.unknown:
        released = statistics.release(pieces.sums(piece, schema), schema)
        shards.record(output, origin, released)
    known = parse_schema(statistics.declared(text, released))
    shards.finish(output, known, origin, [pieces.prepare(piece, known, output)], released)
    return output


def run(table: Path, folder: Path, capsys: Any, *arguments: str) -> tuple[int, dict[str, Any], str]:
    output = folder / f"run{len(list(folder.iterdir()))}"
    common = ["--data", str(table), "--output", str(output), "--epochs", "1", "--batch-size", "100", "--delta", "1e-4"]
    capsys.readouterr()
    try:
        status = train.main([*common, *arguments])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    report = json.loads((output / "report.json").read_text()) if status == 0 else {}
    return status, report, said.out + said.err


def test_the_statistics_of_a_table_are_part_of_epsilon(tmp_path: Path, capsys: Any) -> None:
    table = prepare(tmp_path, contract("dp", 5.0))
    status, report, said = run(table, tmp_path, capsys, "--noise-multiplier", "1.5")
    assert status == 0 and report["private"] and "includes the table's own statistics" in " ".join(said.split())
    accountant = pld.PLDAccountant()
    step = dp_accounting.PoissonSampledDpEvent(report["sample_rate"], dp_accounting.GaussianDpEvent(1.5))
    accountant.compose(step, report["steps"])
    alone = accountant.get_epsilon(1e-4)
    accountant.compose(dp_accounting.GaussianDpEvent(5.0))
    assert report["epsilon"] == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-3)
    assert report["epsilon"] > alone * 1.01

    status, report, _ = run(table, tmp_path, capsys, "--target-epsilon", "2")
    assert status == 0 and 1.99 < report["epsilon"] <= 2
    summary = json.loads((table / shards.SUMMARY).read_text())
    assert summary["statistics"]["noise_multiplier"] == 5.0 and set(summary["statistics"]["columns"]["age"]) == {
        "mean",
        "deviation",
    }
    features = prepared.load(table).train_features[torch.arange(300)]
    assert torch.isfinite(features).all()


def test_statistics_are_of_the_training_rows_only(tmp_path: Path) -> None:
    table = prepared.load(prepare(tmp_path, contract("non-private")))
    scaled = table.train_features[torch.arange(len(table.train_labels))][:, table.feature_names.index("height")]
    assert abs(float(scaled.mean())) < 1e-4 and float(scaled.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert any("held out" in line or "not trained on" in line for line in table.assumptions)


def test_tables_whose_epsilon_is_infinite_or_beyond_the_target(tmp_path: Path, capsys: Any) -> None:
    table = prepare(tmp_path, contract("dp", 0.5))
    status, _, said = run(table, tmp_path, capsys, "--target-epsilon", "1")
    assert status == 2 and "target_epsilon=1.0: must be above" in said and "statistics cost alone" in said
    (tmp_path / "open.toml").write_text(contract("dp"))
    status, _, said = run(tmp_path / "t.csv", tmp_path, capsys, "--schema", str(tmp_path / "open.toml"))
    assert status == 2 and "statistics=['age', 'debt', 'height', 'job']: must be declared" in said


def test_other_statistics_are_another_table(tmp_path: Path) -> None:
    """A run that code made the table of must not go on with a second release of the same records."""
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(prepared.load(prepare(tmp_path / name, contract("dp", 1.0))))
    of_code = [dataclasses.replace(table, schema=None, digest=None) for table in made]
    assert of_code[0].prior == of_code[1].prior and of_code[0].declaration != of_code[1].declaration


def test_no_epsilon_is_printed_for_statistics_without_noise(tmp_path: Path, capsys: Any) -> None:
    table = prepare(tmp_path, contract("non-private"))
    summary = json.loads((table / shards.SUMMARY).read_text())
    assert "statistics" not in summary and "mean =" not in str(summary)
    status, _, said = run(table, tmp_path, capsys)
    assert status == 2 and "noise_multiplier=None: must be given: no epsilon can be reached, since" in said
    status, report, said = run(table, tmp_path, capsys, "--noise-multiplier", "1")
    assert status == 0 and report["epsilon"] is None and not report["private"]
    said = " ".join(said.split())
    assert "infinite: NOT PRIVATE" in said and "without noise" in said


def test_what_was_released_is_released_again_and_not_for_another_input(tmp_path: Path) -> None:
    text = contract()
    here, other = shards.Origin(text, "a", {}, "rows"), shards.Origin(text, "b", {}, "rows")
    shards.begin(tmp_path)
    assert shards.recorded(tmp_path, here) is None
    schema = parse_schema(text)
    released = statistics.release(statistics.sums(values_of([(30.0, 10.0, 1.5, "nurse")]), schema), schema)
    shards.record(tmp_path, here, released)
    shards.begin(tmp_path)  # as the run after one that was killed
    assert shards.recorded(tmp_path, here) == released
    assert (tmp_path / shards.STATISTICS).stat().st_mode & 0o777 == 0o600
    changed = shards.Origin(text.replace("4.0", "5.0"), "a", {}, "rows")
    for another in (other, changed):
        with pytest.raises(ArgumentError, match=r"a new folder: its statistics\.json is of another input"):
            shards.recorded(tmp_path, another)
    content = json.loads((tmp_path / shards.STATISTICS).read_text())
    content["released"]["noise_multiplier"] = 1e6
    (tmp_path / shards.STATISTICS).write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match="unaltered"):
        shards.recorded(tmp_path, here)
