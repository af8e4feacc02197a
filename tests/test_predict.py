"""Predictions for new rows: those of the saved model on rows that are encoded here by hand."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from raw_tables import COLUMNS, toml

from fastdp import arrowfiles, data, files, metrics, models, predict, shards, train
from fastdp.columns import Batch
from fastdp.errors import ArgumentError
from fastdp.schema import parse_schema

SCHEMA = toml(
    "loans",
    {
        "age": {"type": "number", "bounds": [18, 90], "missing": 40},
        "debt": COLUMNS["debt"],
        "job": {"type": "category", "values": ["clerk", "nurse"], "other": "other"},
        "zip": {"type": "ignore"},
        "outcome": {},
    },
)
TASKS = {
    "binary": 'type = "label"\nvalues = ["no", ["yes", "y"]]\n',
    "multi-class": 'type = "label"\nvalues = ["low", "middle, or so", "high"]\n',
    "regression": 'type = "target"\nbounds = [100, 10000]\nscale = "log"\n',
}
CLASSES = {"binary": ["no", "yes"], "multi-class": ["low", "middle, or so", "high"]}
NEW = [("30", "", "nurse"), ("", "99", "pilot"), ("200", "0", " clerk "), ("18", "5000", "nurse")]
FEATURES = [
    [12 / 72, 0, 1, 0, 1, 0],
    [22 / 72, math.log(100) / math.log(1001), 0, 0, 0, 1],
    [1, 0, 0, 1, 0, 0],
    [0, 1, 0, 0, 1, 0],
]
MODELS = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self, inputs, outputs):
        super().__init__(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, outputs), nn.Dropout(0.5))
class Embedded(nn.Module):
    def __init__(self, inputs, outputs, sizes):
        super().__init__()
        self.job, self.last = nn.Embedding(sizes[0], 2), nn.Linear(inputs + 2, outputs)
    def forward(self, x, codes):
        import torch
        return self.last(torch.cat([x, self.job(codes[:, 0])], 1))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "user_models", raising=False)
    (tmp_path / "user_models.py").write_text(MODELS)
    return tmp_path


def write(path: str, outcome: str | None = None, rows: Sequence[tuple[str, ...]] = NEW) -> None:
    """`outcome` in each row, or no such column."""
    lines = [("age", "debt", "job", "outcome"), *((*row, outcome or "") for row in rows)]
    Path(path).write_text("".join(",".join(line[: 3 if outcome is None else 4]) + "\n" for line in lines))


def leave_run(name: str, *arguments: str) -> dict[str, np.ndarray]:
    """The parameters that training on the table `name` leaves in run/."""
    common = ["--epochs", "2", "--batch-size", "100", "--noise-multiplier", "0.5", "--accountant", "rdp"]
    assert train.main(["--data", name, "--output", "run", *common, *arguments]) == 0
    return {k: v.double().numpy() for k, v in torch.load("run/model.pt", weights_only=True).items()}


def trained(task: str, model: str = "mlp:32") -> dict[str, np.ndarray]:
    """The parameters of a run on a table of 300 rows."""
    Path("s.toml").write_text(SCHEMA + TASKS[task])
    answers = CLASSES.get(task, ["100", "2000", "10000"])
    cells = [(i * 37 % 73 + 18, i * 53 % 1000, ("clerk", "nurse", "x")[i % 3]) for i in range(300)]
    lines = [f'{age},{debt},{job},"{answers[age * len(answers) // 91]}"\n' for age, debt, job in cells]
    Path("t.csv").write_text("age,debt,job,outcome\n" + "".join(lines))
    return leave_run("t.csv", "--schema", "s.toml", "--model", model)


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    status = predict.main(list(arguments))
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def columns(text: str) -> dict[str, list[Any]]:
    names, *rows = csv.reader(io.StringIO(text))
    found = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    return {name: cells if name == "prediction" else [float(cell) for cell in cells] for name, cells in found.items()}


@pytest.mark.parametrize(("task", "model"), [*((task, "mlp:32") for task in TASKS), ("binary", "user_models:Net")])
def test_each_task_by_hand(task: str, model: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = trained(task, model)
    assert Path("run/schema.toml").read_text() == SCHEMA + TASKS[task]
    write("new.csv")
    status, out, err = run(capfd, "run", "--data", "new.csv")
    assert (status, err) == (0, "")
    hidden = np.tanh(np.array(FEATURES) @ state["0.weight"].T + state["0.bias"])
    outputs = hidden @ state["2.weight"].T + state["2.bias"]
    found = columns(out)
    if task == "regression":
        expected = 100 + np.expm1(outputs[:, 0].clip(0, 1) * math.log(9901))
        assert list(map(float, found.pop("prediction"))) == pytest.approx(expected, rel=1e-5) and not found
    else:
        if task == "binary":
            outputs = np.hstack([0 * outputs, outputs])
        names, shares = CLASSES[task], np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
        assert found.pop("prediction") == [names[i] for i in shares.argmax(1)]
        assert list(found) == [f"p({name})" for name in names]
        assert np.stack(list(found.values()), 1) == pytest.approx(shares, rel=1e-5)


def test_the_labels_column_is_not_read(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absent, right, or garbage; in files of each kind, and in blocks of rows."""
    trained("binary")
    write("new.csv")
    expected = columns(run(capfd, "run", "--data", "new.csv")[1])
    assert len(expected["prediction"]) == 4
    Path("parts").mkdir()
    for i in range(2):
        write(f"parts/{i}.csv", "yes", NEW[2 * i : 2 * i + 2])
    write("garbage.csv", "\t?")
    age, debt, job = ([cell.strip() or None for cell in column] for column in zip(*NEW, strict=True))
    numbers = [None if cell is None else float(cell) for cell in debt]
    table = pa.table({"outcome": [[1.5]] * 4, "job": job, "debt": numbers, "age": age})
    pyarrow.parquet.write_table(table, "new.parquet")
    monkeypatch.setattr(metrics, "ROWS", 3)
    for name in ("parts", "garbage.csv", "new.parquet"):
        status, _, err = run(capfd, "run", "--data", name, "--output", f"{name}.out")
        assert (status, err) == (0, "")
        found = columns(Path(f"{name}.out").read_text())
        assert found.pop("prediction") == expected["prediction"]
        for share, cells in found.items():  # a matrix of other rows is multiplied in another order
            assert cells == pytest.approx(expected[share], rel=1e-6)
    status, _, err = run(capfd, "run", "--data", "parts", "--output", "parts.out")
    assert status == 2 and err == "fastdp.predict: error: output='parts.out': must be a file that does not exist\n"


UCI = "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40"
UCI += ", United-States"


def test_adult_without_header(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """UCI's first row, which is the embedded table's first."""
    leave_run("adult", "--model", "mlp:3")
    table = data.load("adult")
    model = models.build_model("mlp:3", (166,), 1)
    model.load_state_dict(torch.load("run/model.pt", weights_only=True))
    share = torch.sigmoid(model(table.train_features[:1]).double()).item()
    for label in ("", ", <=50K", ", ?!"):
        Path("new.csv").write_text(f"|one row\n{UCI}{label}\n")
        status, out, err = run(capfd, "run", "--data", "new.csv")
        assert (status, err) == (0, "")
        found = columns(out)
        assert found["prediction"] == ["<=50K" if share < 0.5 else ">50K"]
        assert found["p(<=50K)"] == pytest.approx([1 - share], rel=1e-6)
        assert found["p(>50K)"] == pytest.approx([share], rel=1e-6)
    Path("new.csv").write_text(UCI.rpartition(",")[0] + "\n")
    status, _, err = run(capfd, "run", "--data", "new.csv")
    assert status == 2 and "cells in row 0 of new.csv=13: must be 15, one for each column" in err
    Path("new.csv").write_text(UCI + ', "x"\n')
    status, _, err = run(capfd, "run", "--data", "new.csv")
    assert status == 2 and "row 0 of new.csv='quotes': must be without stray quotation marks" in err


def test_without_a_header_nothing_is_guessed_of_users(tmp_path: Path) -> None:
    text = '[[column]]\nname = "who"\ntype = "user"\n[[column]]\nname = "age"\ntype = "number"\nbounds = [0, 100]\n'
    text = 'format = 1\nname = "t"\n[file]\nheader = false\n' + text
    text += '[[column]]\nname = "back"\ntype = "label"\nvalues = ["0", "1"]\n'
    schema, path = dataclasses.replace(parse_schema(text), labelled=False), tmp_path / "n.csv"
    path.write_text("u,50,1\nv,20,0\n")
    assert files.read("data", path, schema).features.tolist() == [[0.5], [pytest.approx(0.2)]]
    path.write_text("50,1\n20,0\n")
    with pytest.raises(ArgumentError, match="it would not be known whether 'who' or the label is left out"):
        files.read("data", path, schema)


def test_a_run_that_is_not_private_is_told(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained("binary")
    write("new.csv")
    assert run(capfd, "run", "--data", "new.csv")[2] == ""
    report = json.loads(Path("run/report.json").read_text())
    assert report["private"]
    Path("run/report.json").write_text(json.dumps({**report, "private": False}))
    status, out, err = run(capfd, "run", "--data", "new.csv")
    assert status == 0 and out and err.startswith("fastdp.predict: warning: NOT PRIVATE")
    Path("run/report.json").write_text("{")
    status, _, err = run(capfd, "run", "--data", "new.csv")
    assert status == 2 and "a run whose report.json can be read" in err and err.count("\n") == 1


def test_a_prepared_table_with_codes(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (SCHEMA + TASKS["binary"]).replace('other = "other"', 'other = "other"\nencode = "code"')
    text += '[[column]]\nname = "who"\ntype = "user"\n'
    schema, generator = parse_schema(text), np.random.default_rng(0)
    folder = here / "prepared"
    shards.begin(folder)
    rows = Batch(
        generator.random((200, 3), np.float32), generator.integers(0, 3, (200, 1), np.int32), np.arange(200) % 2
    )
    with arrowfiles.SplitWriter(folder, "part-0.arrow", schema) as writer:
        for split in arrowfiles.SPLITS:
            writer.add(split, rows)
    done = [{"rows": 400, **writer.written()}]
    shards.finish(folder, schema, shards.Origin(text, "", {}, "rows"), done, None)
    state = leave_run("prepared", "--model", "user_models:Embedded")
    assert Path("run/schema.toml").read_text() == text
    write("new.csv")
    status, out, err = run(capfd, "run", "--data", "new.csv")
    assert (status, err) == (0, "")
    x = np.hstack([np.array(FEATURES)[:, :3], state["job.weight"][[1, 2, 0, 1]]])
    logits = x @ state["last.weight"].T + state["last.bias"]
    assert columns(out)["p(yes)"] == pytest.approx(1 / (1 + np.exp(-logits[:, 0])), rel=1e-5)


def test_targets_are_clamped_and_outputs_must_be_finite() -> None:
    schema, model = parse_schema(SCHEMA + TASKS["regression"]), torch.nn.Identity()
    rows = Batch(np.array([[-1], [0.5], [2]], np.float32), np.empty((3, 0), np.int32), np.empty(3))
    found = predict.predict(schema, model, rows)["prediction"]
    assert found.tolist() == pytest.approx([100, 100 + math.sqrt(9901) - 1, 10000], rel=1e-9)
    rows.features[1] = math.nan
    with pytest.raises(ValueError, match=r"outputs of the model for row 1=\[nan\]: must be finite"):
        predict.predict(schema, model, rows)


def test_what_cannot_be_predicted_is_one_line(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained("binary")
    write("new.csv")

    def refused(*arguments: str) -> str:
        status, out, err = run(capfd, *(arguments or ("run", "--data", "new.csv", "--output", "out.csv")))
        assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("fastdp.predict: error: ")
        assert not Path("out.csv").exists()
        return err.removeprefix("fastdp.predict: error: ").rstrip()

    write("bad.csv", rows=[("30", "1", "nurse"), ("old", "1", "nurse")])
    bound = "a finite number, or one of [file] nulls"
    assert refused("run", "--data", "bad.csv") == f"column 'age', row 1 of bad.csv='old': must be {bound}"
    Path("bad.csv").write_text("age,job,outcome\n1,nurse,yes\n")
    assert refused("run", "--data", "bad.csv").startswith("column 'debt' of bad.csv='absent': must be there")
    assert refused("run", "--data", "no.csv") == "data='no.csv': must be a file or folder that exists"
    assert "must be in a folder that exists" in refused("run", "--data", "new.csv", "--output", "no/out.csv")
    assert refused("here", "--data", "new.csv") == "run='here': must be the folder of a run, with its run.json"
    assert "--data" in refused("run")

    damaged = {
        "schema.toml": "a run with a schema.toml; where code made the table, apply model.pt in Python",
        "report.json": "a finished run: it has no report.json; finish it with --resume run",
        "model.pt": "a finished run: it has no model.pt; finish it with --resume run",
    }
    for name, bound in damaged.items():
        content = Path("run", name).read_bytes()
        Path("run", name).unlink()
        assert refused() == f"run='run': must be {bound}"
        Path("run", name).write_bytes(content[:100])
        if name == "model.pt":
            assert refused().startswith("run='run': must be a run whose model.pt is the state of its model mlp:32 (")
        Path("run", name).write_bytes(content)
    Path("run/run.json").write_text(json.dumps({"model": "mlp:31"}))
    assert "size mismatch" in refused()
    Path("run/run.json").write_text("{}")
    assert refused() == "run='run': must be a run whose run.json names its model"


def test_a_table_from_code_leaves_no_schema(here: Path) -> None:
    """The code may have changed what another table's schema made."""
    Path("user_models.py").write_text("import dataclasses\nfrom fastdp import data\ntable = data.load('adult')\n")
    assert data.load("adult").schema is not None and data.load("user_models:table").schema is None


def test_the_readmes_lines(here: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "predict.load(" in block)
    trained("binary")
    write("new.csv")
    names: dict[str, Any] = {}
    exec(compile(re.sub(r'"runs/[^"]*"', '"run"', code), "README.md", "exec"), names)
    assert list(names["predictions"]) == ["prediction", "p(no)", "p(yes)"] and not names["model"].training
    assert len(names["predictions"]["prediction"]) == 4


def test_the_command_as_its_users_meet_it(here: Path) -> None:
    trained("binary")
    write("new.csv", rows=NEW * 50000)  # more than a pipe holds
    command = f"{sys.executable} -m fastdp.predict run --data new.csv"
    shell = [f"{command} | head -1", f"{command} > /dev/full; echo $?", f"{sys.executable} -m fastdp.predict --help"]
    few, full, text = (subprocess.run(line, shell=True, capture_output=True, text=True) for line in shell)
    assert (few.stdout, few.stderr) == ("prediction,p(no),p(yes)\n", "")
    assert full.stdout == "2\n" and full.stderr.startswith("fastdp.predict: error: output='standard output': must be")
    assert "cost no epsilon" in " ".join(text.stdout.split())
