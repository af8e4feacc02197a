"""The folder of a run (P8, P10): which run it is of, and what is left in it when there is no room."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fastdp import ArgumentError, folder, train
from fastdp.folder import RunFolder
from fastdp.ledger import DurableLedger
from fastdp.options import parse

SUMMARY = {"delta": 1e-5, "data": "d", "model": "m", "private": True}
METRICS = {"epoch": 1, "step": 1, "epsilon": 0.1, "private": True, "accuracy": 0.5, "auc": 0.5, "log_loss": 0.7}


LEFT = ["run.json", "metrics.jsonl", "ledger.jsonl", "checkpoints/step-0000000040.pt"]


@pytest.mark.parametrize("name", LEFT)
def test_what_another_run_left_is_not_taken_for_that(name: str, tmp_path: Path) -> None:
    """Each alone, beside the checkpoint that a run leaves which was cut off before it was begun."""
    path = tmp_path / "run"
    output = RunFolder(path)
    output.begin({}, {})
    output.save_checkpoint(40, {})
    output.append_metrics(METRICS)
    spent = DurableLedger(path / "ledger.jsonl")
    spent.step(1.0, 0.1)
    spent.close()
    content = (path / name).read_bytes()
    for each in LEFT:
        (path / each).unlink()
    folder.check_new(path)
    (path / name).write_bytes(content)
    with pytest.raises(ArgumentError, match="must be a folder that is empty"):
        folder.check_new(path)


def test_a_schema_is_a_runs_only_beside_its_first_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunFolder(path).begin({}, {}, "name = 'été'\n")
    assert (path / "schema.toml").read_text(encoding="utf-8") == "name = 'été'\n"
    (path / "run.json").unlink()
    folder.check_new(path)
    (tmp_path / "schema.toml").write_text("a user's own")
    with pytest.raises(ArgumentError, match="must be a folder that is empty"):
        folder.check_new(tmp_path)


def test_auto_takes_the_newest_unfinished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for age, (name, finished) in enumerate([("newest", True), ("new", False), ("old", False)]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps({"epochs": 7 + age}))
        os.utime(tmp_path / "runs" / name / "run.json", (1e9 - age, 1e9 - age))
        if finished:
            (tmp_path / "runs" / name / "report.json").write_text("{}")
    (tmp_path / "runs" / "empty").mkdir()
    options = parse(["--resume", "auto"])
    assert options is not None
    assert (options.resume, options.output, options.epochs) == ("runs/new", Path("runs/new"), 8)
    options = parse(["--resume", "auto", "--output", "runs/old", "--timeout", "5"])
    assert options is not None and (options.output, options.epochs, options.timeout) == (Path("runs/old"), 9, 5.0)
    options = parse(["--resume", "auto", "--output", "runs/empty"])
    assert options is not None and options.resume is None and options.output == Path("runs/empty")
    for finished in ("runs/newest", "runs/empty", "runs/missing"):
        with pytest.raises(ArgumentError, match="resume="):
            parse(["--resume", finished])


def test_a_checkpoint_without_room_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = RunFolder(tmp_path / "out")
    output.begin({}, {"steps_trained": 0})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert not output.save_checkpoint(5, {"steps_trained": 5})
    assert "warning: no checkpoint of step 5" in capsys.readouterr().out
    assert [p.name for p in (output.path / "checkpoints").iterdir()] == ["step-0000000000.pt"]


def test_lines_of_metrics_that_were_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "epsilon": null}\n{"epoch": 2, "eps')
    output = RunFolder(tmp_path)
    output.append_metrics({"epoch": 2, "epsilon": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1, "epsilon": null}\n{"epoch": 2, "epsilon": 0.5}\n'
    for damaged in (b"{{{\n", b"\xff\n", b"[1]\n"):
        (tmp_path / "metrics.jsonl").write_bytes(damaged)
        RunFolder(tmp_path)
        assert "warning: curves.png will lack what was before" in capsys.readouterr().out


def test_options_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("[]", "3", "{", ""):
        (tmp_path / "run.json").write_text(content)
        assert train.main(["--resume", str(tmp_path)]) == 2
        assert "must be a run whose run.json" in capsys.readouterr().err
    for arguments in (["--resume", "a" * 300], ["--resume", "auto", "--output", "a" * 300]):
        assert train.main(arguments) == 2
        assert "a folder that can be read (File name too long)" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = RunFolder(tmp_path / "out")
    output.append_metrics(METRICS)
    sizes: list[int] = []

    def full(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        if len(sizes) == 3:  # model.pt, its folder, then report.json
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArgumentError, match=r"a folder with room for report.json \(No space left on device\)"):
        output.finish(SUMMARY, torch.nn.Linear(2, 1))
    assert output.written == ["model.pt"]
    assert sorted(p.name for p in output.path.iterdir()) == ["metrics.jsonl", "model.pt"]


def test_a_picture_that_fails_or_is_interrupted_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str, error: BaseException) -> RunFolder:
        def fail(*_: object) -> None:
            raise error

        output = RunFolder(tmp_path / name)
        output.append_metrics(METRICS)
        monkeypatch.setattr(folder, "draw", fail)
        output.finish(SUMMARY, torch.nn.Linear(2, 1))
        return output

    output = write("failed", ValueError("bogus is not a backend"))
    assert "warning: curves.png was not drawn (ValueError: bogus is not a backend)" in capsys.readouterr().out
    assert output.written == ["model.pt", "report.json"]
    with pytest.raises(KeyboardInterrupt):
        write("interrupted", KeyboardInterrupt())
    for name in ("failed", "interrupted"):
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["metrics.jsonl", "model.pt", "report.json"]


def test_metrics_without_room_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = RunFolder(tmp_path / "out")
    output.append_metrics(METRICS)
    (output.path / "metrics.jsonl").unlink()
    (output.path / "metrics.jsonl").symlink_to("/dev/full")
    output.append_metrics(METRICS)
    output.append_metrics(METRICS)
    assert capsys.readouterr().out == "warning: metrics.jsonl ends at epoch 1 (No space left on device)\n"
    output.finish(SUMMARY, torch.nn.Linear(2, 1))
