"""The trainer on tables and models of the user: every task, its figures, and what the report says of them.

In this process: starting `python -m fastdp.train` takes longer than these runs.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_tables import toml

from fastdp import data, metrics, models, train
from fastdp.errors import ArgumentError
from fastdp.schema import parse_schema

SCHEMA = toml(
    "flats in/town",
    {
        "size": {"type": "number", "bounds": [0, 100]},
        "kind": {"type": "category", "values": ["old", "new"]},
        "outcome": {},
    },
)
TASKS = {
    "regression": 'type = "target"\nbounds = [0, 3000]\n',
    "multi-class": 'type = "label"\nvalues = ["low", "middle", "high"]\n',
    "binary": 'type = "label"\nvalues = ["low", "high"]\n',
}


def outcome(task: str, size: float, kind: str) -> Any:
    rent = 10 * size + (500 if kind == "new" else 100)
    if task == "regression":
        return rent
    return "low" if rent < 700 else "middle" if task == "multi-class" and rent < 1100 else "high"


def write(folder: Path, task: str, rows: int, name: str) -> Path:
    path = folder / name
    lines = [f"{s},{k},{outcome(task, s, k)}" for s, k in ((i * 37 % 101, ("old", "new")[i % 2]) for i in range(rows))]
    path.write_text("\n".join(["size,kind,outcome", *lines, ""]))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    common = ["--accountant", "rdp", "--noise-multiplier", "0.5", "--seed", "1"]
    for name, value in (("--epochs", "2"), ("--batch-size", "100")):
        common += [] if name in arguments else [name, value]
    status = 0
    try:
        status = train.main([*common, *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "user_models", raising=False)
    return tmp_path


@pytest.mark.parametrize("task", TASKS)
def test_each_task_from_its_schema_to_its_report(task: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "s.toml").write_text(SCHEMA + TASKS[task])
    table = write(here, task, 1500, "t.csv")
    status, out, err = run(capsys, "--data", "t.csv", "--schema", "s.toml", "--output", "out", "--epochs", "8")
    assert status == 0, err
    summary = json.loads((here / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert summary["task"] == task
    keys = {
        "regression": ["rmse", "r2"],
        "multi-class": ["accuracy", "log_loss"],
        "binary": ["accuracy", "auc", "log_loss"],
    }
    assert [k for k in summary if k in metrics.NAMES] == keys[task]
    n, m = summary["training_records"], summary["evaluation_records"]
    assert n + m == 1500 and summary["sample_rate"] == 100 / n  # of what is trained on
    assert "held out of the table by row number" in summary["evaluation"]
    assert "not covered by epsilon" in summary["evaluation"]
    assert any("not protected by epsilon" in line for line in summary["assumptions"])
    assert "not covered by epsilon" in " ".join(out.split())
    # The figures are those of the saved model, in the target's own unit.
    loaded = data.load(str(table), here / "s.toml")
    model = models.build_model("mlp:32", (3,), 3 if task == "multi-class" else 1)
    model.load_state_dict(torch.load(here / "out" / "model.pt", weights_only=True))
    outputs = model(loaded.test_features).detach().double()
    if task == "regression":
        sizes, new = loaded.test_features[:, 0].double() * 100, loaded.test_features[:, 2].double()
        rent = 10 * sizes + 100 + 400 * new
        error = ((outputs.squeeze(1).clamp(0, 1) * 3000 - rent) ** 2).mean()
        assert summary["rmse"] == pytest.approx(error.sqrt().item(), rel=1e-4) and summary["rmse"] < 350
        assert summary["r2"] == pytest.approx(1 - (error / rent.var(correction=0)).item(), rel=1e-3)
        assert "in the unit of 'outcome'" in summary["evaluation"] and "RMSE" in out
    else:
        answer = outputs.argmax(1) if task == "multi-class" else (outputs.squeeze(1) > 0).long()
        right = (answer == loaded.test_labels).double().mean().item()
        assert summary["accuracy"] == pytest.approx(right, abs=1e-9) and right > 0.6
    assert (here / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_one_class_in_evaluation_is_null(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "s.toml").write_text(SCHEMA + TASKS["binary"])
    write(here, "binary", 300, "t.csv")
    (here / "one.csv").write_text("kind,size,outcome\nold,1,low\nnew,2,low\n")
    status, out, err = run(capsys, "--data", "t.csv", "--schema", "s.toml", "--evaluation-data", "one.csv")
    assert status == 0, err
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("flats-in-town-")
    for text in [(folder / "report.json").read_text(), *(folder / "metrics.jsonl").read_text().splitlines()]:
        assert json.loads(text, parse_constant=pytest.fail)["auc"] is None
    summary = json.loads((folder / "report.json").read_text())
    assert (summary["training_records"], summary["evaluation_records"]) == (300, 2)
    assert "2 rows of one.csv" in summary["evaluation"]
    assert "undefined" in out


def test_figures_of_regression_by_hand() -> None:
    model = torch.nn.Linear(1, 1)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(model.bias)
    target = parse_schema(SCHEMA + TASKS["regression"]).label
    x = torch.tensor([[0.0], [0.5], [2.0]])  # 0, 1500, and 3000 after clamping
    figures = metrics.evaluate(model, x, torch.tensor([0.0, 0.4, 0.9]), target)
    assert figures["rmse"] == pytest.approx(math.sqrt((300**2 + 300**2) / 3), rel=1e-5)
    truth = torch.tensor([0.0, 1200.0, 2700.0])
    assert figures["r2"] == pytest.approx(1 - (60000 / truth.var(correction=0)).item(), rel=1e-5)
    constant = metrics.evaluate(model, x, torch.full((3,), 0.3), target)
    assert math.isnan(constant["r2"]) and constant["rmse"] > 0
    without = metrics.evaluate(model, x, torch.tensor([0.0, 0.5, 1.0]))
    assert without["rmse"] == pytest.approx(math.sqrt(1 / 3))


def test_large_tables_are_evaluated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = torch.nn.Linear(3, 4), torch.randn(50, 3), torch.randint(0, 4, (50,))
    whole = metrics.evaluate(model, x, y)
    monkeypatch.setattr(metrics, "ROWS", 7)
    assert metrics.evaluate(model, x, y) == pytest.approx(whole)


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_leaves_the_models_mode_alone(training: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5)).train(training)
    metrics.evaluate(model, torch.randn(5, 3), torch.randint(0, 4, (5,)))
    assert all(m.training is training for m in model.modules())


USER = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
train, test = (TensorDataset(torch.rand(200, 4), torch.randint(0, 3, (200,))) for _ in range(2))
train.classes = ["a", "b", "c"]
pair = train, test
class Net(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
    def forward(self, x):
        return self.layer(x)
ready = nn.Linear(4, 3)
def one_argument(inputs): return ready
def no_module(inputs, outputs): return 7
def swapped(inputs, outputs): return nn.Linear(outputs, inputs)
def too_many(inputs, outputs): return nn.Linear(inputs, outputs + 1)
def squeezed(inputs, outputs): return nn.Sequential(nn.Linear(inputs, 3), nn.Flatten(0))
"""


def test_data_and_models_from_code(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "user_models.py").write_text(USER)
    arguments = ["--data", "user_models:pair", "--model", "user_models:Net", "--output", "out"]
    status, _, err = run(capsys, *arguments)
    assert status == 0, err
    assert set(torch.load("out/model.pt")) == {"layer.weight", "layer.bias"}
    summary = json.loads((here / "out" / "report.json").read_text())
    assert (summary["task"], summary["training_records"], summary["evaluation_records"]) == ("multi-class", 200, 200)
    assert any("what user_models:pair computed from the records" in line for line in summary["assumptions"])
    status, _, err = run(capsys, "--data", "user_models:pair", "--output", "again", "--batch-size", "500")
    assert (status, err) == (2, "fastdp.train: error: batch_size=500: must be in [1, 200], the training records\n")
    assert not (here / "again").exists()

    import user_models

    built = models.build_model("user_models:ready", (4,), 3)
    assert built is not user_models.ready and torch.equal(built.weight, user_models.ready.weight)
    for name, message in (
        ("one_argument", "an nn.Module, or a callable(inputs: int, outputs: int) that returns one (too many"),
        ("no_module", "it returned a int"),
        ("swapped", "a model of records of 4 features (mat1 and mat2"),
        ("too_many", "[rows, 3] for [rows, 4]; for 2 rows it gave (2, 4)"),
        ("squeezed", "for 2 rows it gave (6,)"),
    ):
        with pytest.raises(ArgumentError) as error:
            models.build_model(f"user_models:{name}", (4,), 3)
        assert str(error.value).startswith(f"model='user_models:{name}': must be ") and message in str(error.value)


def test_models_by_name_take_records_of_any_shape() -> None:
    model = models.build_model("mlp:5", (1, 2, 3), 2)
    assert model(torch.zeros(7, 1, 2, 3)).shape == (7, 2)
    assert list(dict(models.build_model("logistic", (4,), 1).named_parameters())) == ["0.weight", "0.bias"]


def test_a_bad_cell_is_one_line_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "s.toml").write_text(SCHEMA + TASKS["binary"])
    (here / "t.csv").write_text("size,kind,outcome\n1,old,low\nbig,new,high\n")
    status, out, err = run(capsys, "--data", "t.csv", "--schema", "s.toml")
    assert (status, out) == (2, "")
    assert (
        err
        == "fastdp.train: error: column 'size', row 1 of t.csv='big': must be a finite number, or one of [file] nulls\n"
    )
    assert sorted(p.name for p in here.iterdir()) == ["s.toml", "t.csv"]
