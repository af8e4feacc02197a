"""Tables as tensors: the embedded one, files with a declared schema (fastdp/schema.py), or what the user's code makes.

Nothing here is computed from the records (P11); which rows are held out for evaluation depends on their numbers only.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastdp import attributes, files, ops, prepared, shards
from fastdp.columns import Batch, Schema
from fastdp.errors import ArgumentError, require
from fastdp.schema import check_marks, parse_schema
from fastdp.table import Table, check, check_finite, check_same

__all__ = ["Table", "check", "check_finite", "check_same", "held_out_rows", "load"]

EMBEDDED: Final = ("adult",)

# Public and the same for ever, so that the same rows are held out in every run and on every rank.
HELD_OUT_KEY: Final = hashlib.sha256(b"fastdp: rows held out for evaluation").digest()
HELD_OUT: Final = 0.2


def load(
    data: str,
    schema: str | Path | None = None,
    evaluation_data: str | Path | None = None,
    evaluation_fraction: float | None = None,
    verify: bool = False,
) -> Table:
    """A table by name, path or module:attribute.

    data: "adult" (UCI Adult, 32,561 training and 16,281 test rows, shipped with the package); a CSV, Parquet or Arrow
        file, or a folder of such; a folder that spark_jobs/prepare.py wrote; or module:attribute, a Table, a pair
        (training, evaluation) of map-style datasets of (features, label), or a callable that returns one of them.
    schema: the TOML file that declares the columns, for files.
    evaluation_data: file or folder of evaluation rows; without it, about `evaluation_fraction` (0.2) of the rows are
        held out, by their number in the table.
    verify: read a prepared folder's files, and compare with the checksums in its manifest.

    Raises:
        ArgumentError: naming the argument, or the column, row and value.
    """
    path = Path(data)
    is_prepared = data not in EMBEDDED and prepared.is_prepared(path)
    cut_off = data not in EMBEDDED and not is_prepared and (path / shards.MARKER).exists()
    require(not cut_off, "data", data, "a whole prepared table: spark_jobs/prepare.py was cut off, run it again")
    require(is_prepared or not verify, "verify", verify, f"absent for data={data!r}: it is for prepared folders")
    if data not in EMBEDDED and not is_prepared and (path.exists() or files.kind_of(data) is not None):
        require(schema is not None, "schema", None, f"a TOML file that declares the columns of {data}")
        assert schema is not None
        evaluation = None if evaluation_data is None else Path(evaluation_data)
        return _from_files(path, Path(schema), evaluation, evaluation_fraction)
    for name, value in (
        ("schema", schema and str(schema)),
        ("evaluation_data", evaluation_data and str(evaluation_data)),
        ("evaluation_fraction", evaluation_fraction),
    ):
        own = ", and a prepared table has its own" if is_prepared else ""
        require(value is None, name, value, f"absent for data={data!r}: it is for files{own}")
    if is_prepared:
        return prepared.load(path, verify)
    if data in EMBEDDED:
        return _embedded(data)
    if attributes.is_spec(data):
        return _from_attribute(data)
    known = ", ".join(map(repr, EMBEDDED))
    raise ArgumentError("data", data, f"{known}, a file or folder that exists, or module:attribute")


def _embedded(name: str) -> Table:
    folder = resources.files("fastdp") / "datasets"
    text = (folder / f"{name}.toml").read_text(encoding="utf-8")
    schema = parse_schema(text)
    with (folder / f"{name}.npz").open("rb") as file, np.load(file, allow_pickle=False) as cells:
        train, test = (
            schema.encode({column.name: cells[f"{split}.{column.name}"] for column in schema.used})
            for split in ("train", "test")
        )
    return _of_schema(schema, train, test, schema=text)


def _of_schema(contract: Schema, train: Batch, test: Batch, **more: Any) -> Table:
    target = contract.label if contract.label.type == "target" else None
    names, classes = contract.feature_names, contract.label.values
    x, y, test_x, test_y = map(torch.from_numpy, (train.features, train.labels, test.features, test.labels))
    return Table(contract.name, x, y, test_x, test_y, names, classes, contract.size_is_public, target, **more)


def _from_files(path: Path, schema_path: Path, evaluation: Path | None, fraction: float | None) -> Table:
    files.list_files("data", path)
    require(schema_path.is_file(), "schema", str(schema_path), "a TOML file that exists")
    both = evaluation is not None and fraction is not None
    require(not both, "evaluation_fraction", fraction, "absent when evaluation_data is given")
    fraction = HELD_OUT if fraction is None else fraction
    require(0 < fraction < 1, "evaluation_fraction", fraction, "in (0, 1)")
    try:
        text = schema_path.read_text(encoding="utf-8")
        check_marks(text)
        schema = parse_schema(text)
    except ArgumentError as error:
        raise ArgumentError(f"{schema_path.name}: {error.name}", error.value, error.bound) from None
    except (OSError, UnicodeError) as error:
        raise ArgumentError("schema", str(schema_path), f"a TOML file that can be read ({error})") from error
    for column in schema.columns:
        plain = column.type != "user" and not column.is_code
        kind = f"of type {column.type!r}" if column.type == "user" else "encoded as codes"
        require(plain, f"column {column.name!r}", kind, "prepared by spark_jobs/prepare.py first")
    bound = "declared in [statistics], or computed by spark_jobs/prepare.py"
    require(not schema.unknown, "statistics", list(schema.unknown), bound)
    if evaluation is not None:
        files.list_files("evaluation_data", evaluation)  # before minutes are spent on the other
    declared = f"bounds, vocabularies and fill values are those of {schema_path.name}, taken to be public"
    whole = files.read("data", path, schema)
    if evaluation is not None:
        test = files.read("evaluation_data", evaluation, schema)
        where = f"{len(test):,} rows of {evaluation.name}"
        return _of_schema(schema, whole, test, evaluation=where, assumptions=(declared,), schema=text)
    held_out = held_out_rows(len(whole), fraction).numpy()
    for rows, what in ((held_out, "evaluation"), (~held_out, "training")):
        require(bool(rows.any()), "evaluation_fraction", fraction, f"such that a row is left for {what}")
    m = int(held_out.sum())
    return _of_schema(
        schema,
        whole.rows(~held_out),
        whole.rows(held_out),
        evaluation=f"{m:,} rows held out of the table by row number (evaluation_fraction={fraction:g})",
        assumptions=(
            declared,
            f"the {m:,} rows held out for evaluation are not trained on and not protected by epsilon; row numbers "
            "decide, so neighbouring tables differ in one training row, and the other rows keep their numbers",
        ),
        schema=text,
    )


def held_out_rows(rows: int, fraction: float) -> Tensor:
    """bool [rows]: each row with probability `fraction`, by its number alone and the same in every run.

    Not by content: a row's own values would decide whether epsilon protects it. The key is public.
    """
    key = torch.frombuffer(bytearray(HELD_OUT_KEY), dtype=torch.uint8)
    chosen = torch.zeros(rows, dtype=torch.bool)
    chosen[ops.poisson_sample(rows, fraction, key=key, step=0)] = True
    return chosen


CODE_MAKES: Final = (
    "a fastdp.data.Table, a pair (training, evaluation) of map-style datasets of (features, label), or a callable "
    "without arguments that returns one of them"
)


def _from_attribute(spec: str) -> Table:
    made = attributes.find("data", spec)
    if callable(made) and not isinstance(made, Table):
        made = attributes.call("data", spec, made, CODE_MAKES)
    if isinstance(made, Table):
        return dataclasses.replace(made, schema=None, digest=None)  # the code may have changed what a schema made
    pair = isinstance(made, (tuple, list)) and len(made) == 2
    require(pair, "data", spec, f"{CODE_MAKES}; it is a {type(made).__name__}")
    (train_features, train_labels), (test_features, test_labels) = (_tensors(spec, dataset) for dataset in made)
    classes: tuple[str, ...] = ()
    if not train_labels.is_floating_point():
        names = getattr(made[0], "classes", None)  # as torchvision's datasets have them
        # Counting the classes that occur would be a statistic of private records.
        declared = isinstance(names, Sequence) and len(names) >= 2
        require(
            declared, "data", spec, "a pair whose training dataset declares its class names in `classes`, or a Table"
        )
        classes = tuple(map(str, names or ()))
    return Table(
        spec.partition(":")[2],
        train_features,
        train_labels,
        test_features,
        test_labels,
        feature_names=(),
        class_names=classes,
        size_is_public=False,
        evaluation="the evaluation dataset",
        assumptions=(f"what {spec} computed from the records while it prepared them is not covered by epsilon",),
    )


def _tensors(spec: str, dataset: Any) -> tuple[Tensor, Tensor]:
    """All records of a map-style dataset, drawn once: random transforms are not drawn again in later epochs."""
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        features, labels = dataset.tensors
    else:
        sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        require(sized, "data", spec, f"{CODE_MAKES}; of the pair, one is a {type(dataset).__name__}")
        require(len(dataset) > 0, "data", spec, "a pair of datasets with at least one record each")
        try:
            parts = [(x, y) for x, y in DataLoader(dataset, batch_size=1024)]
            features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ArgumentError("data", spec, f"datasets of (features, label) of one shape ({reason})") from error
    return features.float(), labels.float() if labels.is_floating_point() else labels.long()
