"""The embedded table, its column contract (P11), and the refusal of bad cells (P6, P10)."""

from __future__ import annotations

import io
import math
import os
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from raw_tables import toml

from fastdp import pieces
from fastdp.cells import parse_or_raise
from fastdp.columns import Column, Schema
from fastdp.data import Table, check_finite, load
from fastdp.errors import ArgumentError
from fastdp.schema import parse_schema

DATASETS = resources.files("fastdp") / "datasets"


@pytest.fixture(scope="module")
def adult() -> Table:
    return load("adult")


@pytest.fixture(scope="module")
def schema() -> Schema:
    return parse_schema((DATASETS / "adult.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def uci() -> dict[str, bytes]:
    """UCI's two files, by name."""
    if "FASTDP_DATA" not in os.environ:
        pytest.skip("FASTDP_DATA is not set: UCI's raw files are not here to compare with")
    folder = Path(os.environ["FASTDP_DATA"]) / "adult"
    return {name: (folder / name).read_bytes() for name in ("adult.data", "adult.test")}


def test_shapes_and_types(adult: Table) -> None:
    width = len(adult.feature_names)
    assert adult.train_features.shape == (32561, width)
    assert adult.test_features.shape == (16281, width)
    assert adult.train_labels.shape == (32561,)
    assert adult.test_labels.shape == (16281,)
    assert adult.train_features.dtype == adult.test_features.dtype == torch.float32
    assert adult.train_labels.dtype == adult.test_labels.dtype == torch.int64
    assert adult.train_features.is_contiguous()
    assert adult.class_names == ("<=50K", ">50K")
    assert adult.num_classes == 2
    assert adult.size_is_public
    assert len(set(adult.feature_names)) == width
    # As counted by grep in UCI's files; the percentages in adult.names agree.
    assert int(adult.train_labels.sum()) == 7841
    assert int(adult.test_labels.sum()) == 3846


def test_features_are_bounded(adult: Table) -> None:
    for features in (adult.train_features, adult.test_features):
        check_finite(features, adult.feature_names)
        assert float(features.min()) == 0.0
        assert float(features.max()) == 1.0


def test_each_group_of_indicators_sums_to_one(adult: Table, schema: Schema) -> None:
    start = 0
    for column in schema.columns:
        width = len(column.feature_names)
        indicators = slice(start + (column.type == "number" and column.scale != "none"), start + width)
        if indicators.start < indicators.stop:
            for features in (adult.train_features, adult.test_features):
                group = features[:, indicators]
                assert bool(((group == 0) | (group == 1)).all())
                assert bool((group.sum(1) == 1).all()), column.name
        start += width
    assert start == len(adult.feature_names)


def test_nothing_but_the_row_decides_its_features(adult: Table, schema: Schema) -> None:
    with (DATASETS / "adult.npz").open("rb") as file, np.load(file) as cells:
        for row in (0, 1234, 32560):
            one = {c.name: cells[f"train.{c.name}"][row : row + 1] for c in schema.columns}
            encoded = schema.encode(one)
            assert np.array_equal(encoded.features[0], adult.train_features[row])
            assert encoded.labels[0] == adult.train_labels[row]


def test_file_is_small_and_loads_fast() -> None:
    assert len((DATASETS / "adult.npz").read_bytes()) <= 1_000_000
    start = time.process_time()
    load("adult")
    assert time.process_time() - start < 0.3


def test_every_raw_row_is_there(uci: dict[str, bytes], schema: Schema) -> None:
    with (DATASETS / "adult.npz").open("rb") as file, np.load(file) as cells:
        for split, name in (("train", "adult.data"), ("test", "adult.test")):
            lines = [line.rstrip(".") for line in uci[name].decode().splitlines() if line.count(",") == 14]
            columns = []
            for column in schema.columns:
                codes = cells[f"{split}.{column.name}"].tolist()
                columns.append([column.values[c] for c in codes] if column.values else list(map(str, codes)))
            assert [", ".join(row) for row in zip(*columns, strict=True)] == lines


@pytest.mark.usefixtures("uci")
def test_the_preparation_reads_ucis_files_as_they_are(schema: Schema, adult: Table) -> None:
    for name, split in (("adult.data", "train"), ("adult.test", "test")):
        path = Path(os.environ["FASTDP_DATA"]) / "adult" / name
        (piece,) = pieces.cut(pieces.source(path, name, split), schema)
        (part,) = pieces.refined(piece, schema)
        assert part.quarantined == 0
        assert torch.equal(torch.from_numpy(getattr(part, split).features), getattr(adult, f"{split}_features"))
        assert torch.equal(torch.from_numpy(getattr(part, split).labels), getattr(adult, f"{split}_labels"))


def test_features_of_raw_rows(uci: dict[str, bytes], adult: Table) -> None:
    # The first row of adult.data, encoded by hand.
    first = uci["adult.data"].decode().splitlines()[0]
    expected = (
        "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40,"
    )
    assert first == f"{expected} United-States, <=50K"
    features = dict(zip(adult.feature_names, adult.train_features[0].tolist(), strict=True))
    scaled = {
        "age": (39 - 17) / 73,
        "education-num": 12 / 15,
        "capital-gain": math.log(2175) / math.log(100000),
        "capital-loss": 0.0,
        "hours-per-week": 39 / 98,
    }
    for name, value in scaled.items():
        assert features.pop(name) == pytest.approx(value, rel=1e-6)
    assert {name for name, value in features.items() if value} == {
        "age in [35, 40)",
        "workclass=State-gov",
        "education=Bachelors",
        "marital-status=Never-married",
        "occupation=Adm-clerical",
        "relationship=Not-in-family",
        "race=White",
        "sex=Male",
        "capital-gain in [1600, 2500)",
        "capital-loss in [-inf, 1)",
        "hours-per-week in [40, 45)",
        "native-country=United-States",
    }


def test_file_is_rebuilt_from_the_raw_files(uci: dict[str, bytes], schema: Schema) -> None:
    from fastdp.datasets.make_adult import pack

    # Bytes depend on zlib, and on Python's zipfile (3.11.4 writes other headers).
    with np.load(io.BytesIO(pack(uci, schema))) as made, np.load(DATASETS / "adult.npz") as ours:
        assert made.files == ours.files
        for name in ours.files:
            assert made[name].dtype == ours[name].dtype and np.array_equal(made[name], ours[name])


@pytest.mark.parametrize("name", ["adlut", "/nowhere/table", "a:b:c", "7:x"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ArgumentError) as error:
        load(name)
    assert str(error.value).startswith(f"data={name!r}: must be 'adult', a file or folder that exists")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused(value: float) -> None:
    features = torch.zeros(5, 3)
    check_finite(features)
    check_finite(features[:0])
    features[3, 1] = value
    with pytest.raises(ArgumentError) as error:
        check_finite(features, ("age", "hours", "gain"))
    assert str(error.value) == f"column 'hours', row 3={value!r}: must be finite"
    with pytest.raises(ArgumentError, match="column 1, row 3"):
        check_finite(features)


SMALL = toml(
    "small",
    {
        "x": {"type": "number", "bounds": [0, 10], "scale": "linear", "bins": [5]},
        "colour": {"type": "category", "values": ["red", "?"]},
        "note": {"type": "ignore"},
        "y": {"type": "label", "values": ["no", "yes"]},
    },
)


def column(name: str) -> Column:
    return next(c for c in parse_schema(SMALL).columns if c.name == name)


def cells_of(name: str, texts: list[str]) -> np.ndarray:
    return parse_or_raise({name: pa.array(texts)}, Schema("one", False, (column(name),)))[name]


def test_small_contract() -> None:
    small = parse_schema(SMALL)
    assert not small.size_is_public  # a table's size is private unless declared
    assert small.feature_names == ("x", "x in [-inf, 5)", "x in [5, inf)", "colour=red", "colour=?")
    cells = {
        "x": cells_of("x", ["-3", "2.5", "5", "1e6"]),
        "colour": cells_of("colour", ["red", "?", "red", "?"]),
        "y": cells_of("y", ["no", "yes", "no", "yes"]),
    }
    encoded = small.encode(cells)
    expected = [[0, 1, 0, 1, 0], [0.25, 1, 0, 0, 1], [0.5, 0, 1, 1, 0], [1, 0, 1, 0, 1]]  # -3 and 1e6 clamped
    assert encoded.features.tolist() == expected and encoded.categories.shape == (4, 0)
    assert encoded.labels.tolist() == [0, 1, 0, 1]
    empty = small.encode({name: cell[:0] for name, cell in cells.items()})
    assert empty.features.shape == (0, 5)
    assert empty.labels.shape == (0,)


@pytest.mark.parametrize(
    ("name", "texts", "message"),
    [
        ("colour", ["red", "blue"], "column 'colour', row 1='blue': must be one of 'red', '?'"),
        ("y", ["no", "maybe"], "column 'y', row 1='maybe': must be one of 'no', 'yes'"),
        ("x", ["1", "2", "three"], "column 'x', row 2='three': must be a finite number, or one of [file] nulls"),
        ("x", ["1", ""], "column 'x', row 1='': must be there: no value is declared for missing cells of this column"),
        ("x", ["1", "nan"], "column 'x', row 1='nan': must be a finite number, or one of [file] nulls"),
        ("x", ["-inf"], "column 'x', row 0='-inf': must be a finite number, or one of [file] nulls"),
    ],
)
def test_bad_cells_are_named(name: str, texts: list[str], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        cells_of(name, texts)
    assert str(error.value) == message


def test_bad_codes_are_named() -> None:
    good = {"x": np.array([1.0]), "colour": np.array([0]), "y": np.array([1])}
    for name, value, bound in (
        ("colour", 2, "a code in [0, 2)"),
        ("y", -1, "a code in [0, 2)"),
        ("x", math.nan, "a finite number"),
    ):
        with pytest.raises(ArgumentError) as error:
            parse_schema(SMALL).encode({**good, name: np.array([value])})
        assert str(error.value) == f"column {name!r}, row 0={value!r}: must be {bound}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format = 1", "format = 2", "format=2: must be 1"),
        ('type = "ignore"', 'type = "integer"', "note.type='integer': must be one of 'number', "),
        ('type = "ignore"', 'type = "ignore"\nbounds = [0, 1]', "note=['bounds']: must be of these fields only"),
        ("bounds = [0, 10]", "bounds = [10, 0]", "x.bounds=[10, 0]: must be [low, high], finite, low < high"),
        ("bounds = [0, 10]", "bounds = [100000000000000000, 100000000000000001]", "x.bounds=[1000"),
        ("bounds = [0, 10]", "bounds = [0, inf]", "x.bounds=[0, inf]: must be"),
        ("bounds = [0, 10]", "", "x.bounds=None: must be"),
        ("bins = [5]", "bins = [5, 5]", "x.bins=[5, 5]: must be increasing and strictly inside [0, 10]"),
        ("bins = [5]", "bins = [10]", "x.bins=[10]: must be"),
        ('scale = "linear"', 'scale = "sqrt"', "x.scale='sqrt': must be 'linear', 'log' or 'none'"),
        ('["red", "?"]', '["red", "red"]', "colour.values=['red', 'red']: must be two or more different texts"),
        ('["red", "?"]', "[1, 2]", "colour.values=[1, 2]: must be two or more different texts"),
        ('name = "note"', 'name = "x"', "column=['x', 'colour', 'x', 'y']: must be of different names"),
        ('type = "label"', 'type = "category"', "label=[]: must be exactly one column"),
    ],
)
def test_bad_contracts_are_named(old: str, new: str, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        parse_schema(SMALL.replace(old, new))
    assert str(error.value).startswith(message)
