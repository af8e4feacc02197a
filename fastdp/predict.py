"""Apply the model of a finished run to new rows: `python -m fastdp.predict RUN --data new.csv`.

From Python, `load` gives the run's schema and model, `fastdp.files.read` rows by that schema, `predict` the columns
that the command prints.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import cyclopts
import torch
from torch import Tensor, nn

import fastdp
from fastdp import files, folder, metrics
from fastdp.columns import Array, Batch, Schema
from fastdp.disk import write_whole
from fastdp.errors import ArgumentError, require
from fastdp.job import INTERRUPTED, USAGE_ERROR, tell
from fastdp.models import build_model
from fastdp.schema import parse_schema

HELP = """Apply the model of a finished run of fastdp.train to new rows; a line of CSV for each, in their order.

For classes: `prediction`, and the probability of each class as `p(CLASS)`. For a target: `prediction` in the target's
own unit, clamped to the bounds that its schema declares.

Predictions are post-processing of the differentially private model: they cost no epsilon, however many there are, for
the rows it was trained on as for others. Epsilon covers what they tell through the model; each is also computed from
its own row's cells, so publish none of rows that must stay secret.
"""

app = cyclopts.App(name="fastdp.predict", help=HELP, version=fastdp.__version__, suppress_keyboard_interrupt=False)


def load(run: str | Path) -> tuple[Schema, nn.Module]:
    """Schema, for rows without labels, and model of a finished run, in evaluation mode.

    run: the folder. The model takes features float32 [n, D], and categories int32 [n, K] if the schema has any, as
        `files.read` gives them; its outputs are [n, 1] (two classes: the logit of the second; a target: scaled to
        [0, 1]) or [n, classes] logits.

    Raises:
        ArgumentError: naming the folder, and what it lacks or what in it cannot be used.
    """
    path, name = Path(run), str(run)
    require((path / folder.OPTIONS).is_file(), "run", name, f"the folder of a run, with its {folder.OPTIONS}")
    for file in (folder.MODEL, folder.REPORT):
        bound = f"a finished run: it has no {file}; finish it with --resume {name}"
        require((path / file).is_file(), "run", name, bound)
    there = (path / folder.SCHEMA).is_file()
    bound = f"a run with a {folder.SCHEMA}; where code made the table, apply {folder.MODEL} in Python"
    require(there, "run", name, bound)
    try:
        schema = dataclasses.replace(parse_schema((path / folder.SCHEMA).read_text(encoding="utf-8")), labelled=False)
    except (OSError, UnicodeError) as error:
        raise ArgumentError("run", name, f"a run whose {folder.SCHEMA} can be read ({error})") from error
    spec: Any = folder.options_of(path, "run").get("model")
    require(isinstance(spec, str), "run", name, f"a run whose {folder.OPTIONS} names its model")
    classes = len(schema.label.values)
    sizes = [len(column.values) for column in schema.coded]
    model = build_model(spec, [len(schema.feature_names)], classes if classes > 2 else 1, sizes)
    try:
        model.load_state_dict(torch.load(path / folder.MODEL, weights_only=True))
    except Exception as error:  # whatever a damaged file, or the state of another model, makes of torch
        reason = " ".join(str(error).split())
        raise ArgumentError(
            "run", name, f"a run whose {folder.MODEL} is the state of its model {spec} ({reason})"
        ) from error
    return schema, model.eval()


def warn(run: Path) -> None:
    """If the predictions are not covered by an epsilon."""
    try:
        private = json.loads((run / folder.REPORT).read_text(encoding="utf-8"))["private"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError("run", str(run), f"a run whose {folder.REPORT} can be read ({error})") from error
    if not private:
        tell("fastdp.predict: warning: NOT PRIVATE: as the report of the run says, and so is what it predicts\n")


def predict(schema: Schema, model: nn.Module, rows: Batch) -> dict[str, Array | list[str]]:
    """Columns of the model's predictions for `rows` of n, by name, in the rows' order.

    For classes: "prediction", n class names, and "p(CLASS)" float64 [n] for each class. For a target: "prediction"
    float64 [n] in the target's own unit; what lies outside of its bounds is clamped, as targets are in training.

    Privacy: post-processing of the model, which costs no epsilon, for rows it was trained on too. Epsilon covers what
    predictions tell through the model, not what each tells of the cells of its own row.

    Raises:
        ArgumentError: naming the first row for which an output of the model is not finite.
    """
    outputs = _outputs(model, rows)
    bad = ~outputs.isfinite().all(1)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise ArgumentError(f"outputs of the model for row {row}", outputs[row].tolist(), "finite")
    if schema.label.type == "target":
        return {"prediction": schema.label.unscaled(outputs.squeeze(1).numpy())}
    names = schema.label.values
    if len(names) == 2:
        outputs = torch.cat([torch.zeros_like(outputs), outputs], 1)  # sigmoid(z) is softmax(0, z)
    chosen = outputs.argmax(1).tolist()
    shares = zip(names, outputs.softmax(1).numpy().T, strict=True)
    return {"prediction": [names[i] for i in chosen], **{f"p({name})": share for name, share in shares}}


@torch.no_grad()
def _outputs(model: nn.Module, rows: Batch) -> Tensor:
    """float64 [n, outputs]."""
    inputs = [torch.from_numpy(rows.features)] + (
        [torch.from_numpy(rows.categories)] if rows.categories.shape[1] else []
    )
    blocks = zip(*(x.split(metrics.ROWS) for x in inputs), strict=True)
    return torch.cat([model(*block).double() for block in blocks])


def to_csv(columns: dict[str, Array | list[str]]) -> bytes:
    """A header and a line for each row; numbers with the nine digits that tell float32 apart."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    cells = [[x if isinstance(x, str) else f"{x:.9g}" for x in column] for column in columns.values()]
    writer.writerows(zip(*cells, strict=True))
    return text.getvalue().encode()


@app.default
def apply(run: Path, /, *, data: Path, output: Path | None = None) -> None:
    """
    Parameters
    ----------
    run
        Folder of a finished run, whose table came from files or was adult.
    data
        New rows: a CSV, Parquet or Arrow file, or a folder of such, with the columns of the run's schema. The column of
        the label or target may be absent; if it is there, it is not read.
    output
        File for the predictions, which must not exist; standard output if not given.
    """
    if output is not None:
        require(not os.path.lexists(output), "output", str(output), "a file that does not exist")
        require(output.parent.is_dir(), "output", str(output), "in a folder that exists")
    schema, model = load(run)
    warn(run)
    content = to_csv(predict(schema, model, files.read("data", data, schema)))
    try:
        if output is not None:
            write_whole(output, lambda file: file.write(content))
        else:
            # Not sys.stdout, which under PYTHONUNBUFFERED may write a part and say nothing.
            with open(sys.stdout.fileno(), "wb", closefd=False) as file:
                file.write(content)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            return  # `| head` has seen enough
        where = "standard output" if output is None else str(output)
        raise ArgumentError("output", where, f"a place that can be written to ({error.strerror})") from error


def main(arguments: list[str] | None = None) -> int:
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (cyclopts.CycloptsError, ArgumentError) as error:
        tell(f"fastdp.predict: error: {' '.join(str(error).split())}\n")
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
