"""`python -m fastdp.train`: results, files, the same run on any number of ranks, and every way to misuse it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi import launch

from fastdp import data, folder, metrics, report, run, train
from fastdp.models import build_model
from fastdp.options import Options

FILES = ["curves.png", "ledger.jsonl", "metrics.jsonl", "model.pt", "report.json", "run.json", "schema.toml"]


def train_cli(
    *arguments: str, ranks: int = 0, timeout: float = 120, **environ: str
) -> subprocess.CompletedProcess[str]:
    """`python -m fastdp.train`, under mpirun if ranks > 0."""
    prefix = []
    if ranks:
        mpirun = launch.find_mpirun()
        if mpirun is None:
            pytest.skip("no mpirun")
        prefix = [mpirun, *(["--oversubscribe"] if launch.is_open_mpi() else []), "-n", str(ranks)]
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} | environ
    return subprocess.run(
        [*prefix, sys.executable, "-m", "fastdp.train", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {}
    for ranks in (0, 2, 4):
        folders[ranks] = tmp_path_factory.mktemp("train") / "run"
        done = train_cli("--seed", "3", "--epochs", "3", "--output", str(folders[ranks]), ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "NOT PRIVATE" in done.stdout
    return folders


def test_a_run_leaves_its_files(seeded: dict[int, Path]) -> None:
    folder = seeded[2]
    assert sorted(p.name for p in folder.iterdir()) == FILES
    summary = json.loads((folder / "report.json").read_text())
    assert summary["accuracy"] > 0.84 and 0.9 < summary["auc"] < 0.92 and summary["log_loss"] < 0.45
    assert 0.99 < summary["epsilon"] <= 1.0 and summary["delta"] == 1e-5
    assert summary["steps"] == 3 * 32 and summary["ranks"] == 2 and summary["private"] is False
    assert "not covered by epsilon" in summary["evaluation"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == [32, 64, 96]
    assert 0 < lines[0]["epsilon"] < lines[1]["epsilon"] < lines[2]["epsilon"] == summary["epsilon"]
    assert set(lines[0]) == {"epoch", "step", "epsilon", "private", "accuracy", "auc", "log_loss"}
    assert lines[0]["private"] is False
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    state = torch.load(folder / "model.pt", weights_only=True)
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "0.weight": (32, 166),
        "0.bias": (32,),
        "2.weight": (1, 32),
        "2.bias": (1,),
    }
    assert (folder / "model.pt").stat().st_size < 4 * sum(v.numel() for v in state.values()) + 4096


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_run_on_more_ranks(seeded: dict[int, Path], ranks: int) -> None:
    one, many = (torch.load(seeded[r] / "model.pt", weights_only=True) for r in (0, ranks))
    for name, value in one.items():
        assert ((many[name] - value).abs().max() / value.abs().max()).item() < 1e-5


def test_the_saved_model_gives_the_reported_figures(seeded: dict[int, Path]) -> None:
    table = data.load("adult")
    model = build_model("mlp:32", table.train_features.shape[1:], table.outputs)
    model.load_state_dict(torch.load(seeded[0] / "model.pt", weights_only=True))
    summary = json.loads((seeded[0] / "report.json").read_text())
    logits = model(table.test_features).detach().squeeze(1).double()
    wrong = ((logits > 0).long() != table.test_labels).double().mean().item()
    assert summary["accuracy"] == pytest.approx(1 - wrong, abs=1e-9)
    p = torch.sigmoid(logits)
    likelihood = torch.where(table.test_labels == 1, p, 1 - p)
    assert summary["log_loss"] == pytest.approx(-likelihood.log().mean().item(), rel=1e-6)


def test_area_under_roc_by_counting_pairs() -> None:
    score, labels = torch.randint(0, 10, (60,)).double(), torch.randint(0, 2, (60,))
    positive, negative = score[labels == 1], score[labels == 0]
    wins = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    assert metrics.area_under_roc(score, labels) == pytest.approx(wins.mean().item(), abs=1e-12)
    assert math.isnan(metrics.area_under_roc(score, torch.ones(60)))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "run"
    more = ["--profile", "--tensorboard", "--max-physical-batch-size", "100", "--optimizer", "adamw"]
    done = train_cli("--seed", "3", "--epochs", "2", *more, "--output", str(folder), ranks=2)
    assert done.returncode == 0, done.stderr
    return folder


def test_profiles_are_private(watched: Path) -> None:
    private = watched / "private"
    assert sorted(p.name for p in private.iterdir()) == ["profile.json", "profile.png"]
    assert private.stat().st_mode & 0o777 == 0o700
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in private.iterdir())
    profile = json.loads((private / "profile.json").read_text())
    assert profile["notice"].startswith("PRIVATE")
    ranks = profile["seconds of ranks"]
    assert len(ranks) == 2 and ranks[1].pop("checkpoint") == 0.0
    # The sum is a part of the step where ranks share memory.
    assert all(
        seconds > 0 for rank in ranks for phase, seconds in rank.items() if phase not in ("checkpoint", "reduce")
    )
    assert sum(ranks[0].values()) == pytest.approx(sum(ranks[1].values()), rel=0.2)
    assert (private / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_has_the_lines_of_metrics(watched: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(watched / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    assert set(board.Tags()["scalars"]) == lines[0].keys() - {"step", "private"}
    for key in board.Tags()["scalars"]:
        shown = [(event.step, event.value) for event in board.Scalars(key)]
        assert shown == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]


def test_adamw_in_pieces_on_two_ranks_is_adamw(watched: Path, tmp_path: Path) -> None:
    seeded = ["--seed", "3", "--epochs", "2", "--optimizer", "adamw"]
    assert train.main([*seeded, "--output", str(tmp_path / "run")]) == 0
    ours, theirs = torch.load(watched / "model.pt"), torch.load(tmp_path / "run" / "model.pt")
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4)


def test_toml_config_and_shuffled_batches(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('epochs = 5\nbatch_size = 2048\nmodel = "logistic"\nnoise_multiplier = 20.0\nshuffle = true\n')
    output = tmp_path / "out"
    done = train_cli("--config", str(config), "--epochs", "1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    summary = json.loads((output / "report.json").read_text())
    assert (summary["epochs"], summary["steps"], summary["model"]) == (1, 16, "logistic")
    assert summary["sample_rate"] is None and summary["private"] is True
    assert "no amplification by sampling is claimed" in done.stdout
    assert summary["accuracy"] > 0.75


BAD = {
    "data='nope': must be 'adult', a file or folder that exists": ["--data", "nope"],
    "data='missing.csv': must be a file or folder that exists": ["--data", "missing.csv", "--schema", "/dev/null"],
    "schema=None: must be a TOML file that declares the columns of missing.csv": ["--data", "missing.csv"],
    "schema='s.toml': must be absent for data='adult': it is for files": ["--schema", "s.toml"],
    "evaluation_fraction=0.5: must be absent for data='adult'": ["--evaluation-fraction", "0.5"],
    "data='no_such_module:table': must be module:attribute": ["--data", "no_such_module:table"],
    "data='math:table': must be module:attribute, of a module that can be imported from here; math has no": [
        "--data",
        "math:table",
    ],
    "model='math:pi': must be an nn.Module, or a callable(inputs: int, outputs: int)": ["--model", "math:pi"],
    "model='math:nope'": ["--model", "math:nope"],
    "target_epsilon=0.0: must be finite and > 0": ["--target-epsilon", "0"],
    "target_epsilon=-1.0: must be finite and > 0": ["--target-epsilon=-1"],
    "max_grad_norm=-1.0: must be finite and >= 0": ["--max-grad-norm=-1"],
    "batch_size=40000: must be in [1, 32561]": ["--batch-size", "40000"],
    "batch_size=0": ["--batch-size", "0"],
    "noise_multiplier=-1.0: must be finite and >= 0": ["--noise-multiplier=-1"],
    "noise_multiplier=1.0: must be absent": ["--noise-multiplier", "1", "--target-epsilon", "1"],
    "delta=1.5: must be in (0, 1)": ["--delta", "1.5"],
    "epochs=0": ["--epochs", "0"],
    "lr=0.0": ["--lr", "0"],
    "lr=nan: must be finite and > 0": ["--lr", "nan"],
    "timeout=-1.0": ["--timeout=-1"],
    "model='mlp:0': must be mlp:H1,H2": ["--model", "mlp:0"],
    "model='cnn'": ["--model", "cnn"],
    "seed=-1: must be in [0, 2^63)": ["--seed=-1"],
    "seed=99999999999999999999: must be in": ["--seed", "99999999999999999999"],
    "'1.5' is not an integer": ["--epochs", "1.5"],
    "max_grad_norm=0.0: must be > 0": ["--max-grad-norm", "0"],
    "config='/dev': must be a TOML file": ["--config", "/dev"],
    "ledger='/dev/null/x/ledger.jsonl': must be a file that can be written": ["--output", "/dev/null/x"],
    "--bogus": ["--bogus", "1"],
    "--epochs": ["--epochs", "many"],
    "--all-reduce": ["--all-reduce", "carrier-pigeon"],
    "--clipping": ["--clipping", "never"],
    "config='missing.toml': must be a TOML file": ["--config", "missing.toml"],
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_arguments_are_one_line_and_status_2_on_all_ranks(ranks: int, tmp_path: Path) -> None:
    unused = tmp_path / "unused"
    cases = [[*case, "--output", str(unused)] if "--output" not in case else case for case in BAD.values()]
    printed = launch.run("train_errors.py", json.dumps(cases), str(tmp_path), ranks=ranks)
    results = json.loads(printed)
    messages = [*BAD, "column", "module.0='BatchNorm1d'"]
    messages += ["data='rank 1 has 32561 training and 16281 evaluation rows': must be the same"] if ranks > 1 else []
    assert len(results) == len(messages)
    for (arguments, statuses, stderr), message in zip(results, messages, strict=True):
        assert statuses == [2] * ranks, arguments
        assert stderr.startswith("fastdp.train: error: ") and stderr.count("\n") == 1, stderr
        assert message in stderr, (arguments, stderr)
    assert "nan" in results[len(BAD)][2] and "row 7" in results[len(BAD)][2]
    assert list(tmp_path.iterdir()) == []


def test_status_2_reaches_the_shell() -> None:
    for ranks in (0, 2):
        done = train_cli("--target-epsilon", "0", ranks=ranks)
        assert done.returncode == 2
        said = done.stderr.partition("-" * 74)[0]  # Open MPI's mpirun rules a notice off
        assert said == "fastdp.train: error: target_epsilon=0.0: must be finite and > 0\n"
        assert done.stdout.count("\n") <= 1  # which table, how many ranks; before the noise is calibrated


def test_a_terminal_without_greek_letters_costs_no_results(tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = train_cli("--epochs", "1", "--output", str(output), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "epoch 1  step 32/32  ? " in done.stdout
    assert sorted(p.name for p in output.iterdir()) == FILES


def test_a_reader_who_leaves_costs_no_results(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "fastdp.train", "--epochs", "2", "--output", str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        errors = run.stderr.read()
        assert run.wait(timeout=120) == 0, errors
    assert sorted(p.name for p in output.iterdir()) == FILES


def test_a_run_without_noise_is_valid_json_and_not_private(tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = train_cli("--epochs", "1", "--noise-multiplier", "0", "--delta", "0.1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "NOT PRIVATE: no noise is added" in done.stdout
    assert "warning: NOT PRIVATE: delta=0.1 is not below 1/n" in done.stdout
    assert "infinite NOT PRIVATE  accuracy" in done.stdout
    summary = json.loads((output / "report.json").read_text(), parse_constant=pytest.fail)
    assert summary["epsilon"] is None and summary["private"] is False
    assert [line[:30] for line in summary["assumptions"][:3]] == [
        "NOT PRIVATE: delta=0.1 is not ",
        "NOT PRIVATE: epsilon is infini",
        "NOT PRIVATE: no noise is added",
    ]


def test_secure_mode_is_in_the_report(tmp_path: Path) -> None:
    how = ("--secure-mode", "--epochs", "3", "--noise-multiplier", "1")
    done = train_cli(*how, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "report.json").read_text())
    assert summary["secure_mode"] is True and summary["private"] is True and summary["accuracy"] > 0.8
    said = "secure mode: the noise is hardened against floating-point attacks, no guarantee"
    assert said in summary["assumptions"] and said in " ".join(done.stdout.split())


@pytest.mark.parametrize("clipping, said", [("per_layer", "per-layer clipping (2 layers)"), ("automatic", "automatic")])
def test_the_report_says_how_gradients_were_clipped(clipping: str, said: str, tmp_path: Path) -> None:
    how = ("--clipping", clipping, "--epochs", "3", "--noise-multiplier", "1", "--lr", "0.5")
    done = train_cli(*how, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out/report.json").read_text())
    assert summary["clipping"] == clipping and summary["accuracy"] > 0.8
    assert any(line.startswith(said) and "at most C = 4 " in line for line in summary["assumptions"])


@pytest.mark.parametrize(
    "option, said",
    [
        (("--delta", "0.1"), "delta=0.1 is not below 1/n"),
        (("--noise-multiplier", "0.01"), "epsilon is infinite"),  # no accountant gives less
    ],
)
def test_an_epsilon_that_means_nothing_is_not_private(option: tuple[str, str], said: str, tmp_path: Path) -> None:
    done = train_cli("--epochs", "1", *option, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["private"] is False and report["assumptions"][0].startswith(f"NOT PRIVATE: {said}")


@pytest.mark.parametrize("records, delta", [(2, 1e-5), (99_999, 1e-5), (100_000, 1e-6), (10**6, 1e-7)])
def test_delta_is_below_one_in_n_unless_it_is_given(records: int, delta: float, monkeypatch: Any) -> None:
    table = types.SimpleNamespace(train_labels=range(records), prior={})
    monkeypatch.setattr(run.data, "load", lambda *arguments: table)
    monkeypatch.setattr(run.data, "check", lambda table: None)
    options, _ = run.load_table(Options(batch_size=1))
    assert options.chosen_delta == pytest.approx(delta, rel=1e-12) and options.chosen_delta < 1 / records
    assert run.load_table(Options(batch_size=1, delta=0.1))[0].chosen_delta == 0.1


def test_slow_evaluation_does_not_exhaust_the_peers_patience(tmp_path: Path) -> None:
    done = launch.start("train_slow_evaluation.py", str(tmp_path / "out"), ranks=2, timeout=100)
    assert done.returncode == 0, done.stdout


def test_printed_epsilons_are_upper_bounds() -> None:
    assert (report.upper(0.99741, 3), report.upper(0.5, 4), report.upper(math.inf, 3)) == (
        "0.998",
        "0.5000",
        "infinite",
    )


@pytest.mark.parametrize(
    ("second", "message"),
    [(["--config", "missing.toml"], "config='missing.toml'"), (["--lr", "0.5"], "rank 1: lr=0.5: must be ")],
)
def test_ranks_with_other_command_lines_end_together(second: list[str], message: str, tmp_path: Path) -> None:
    mpirun = launch.find_mpirun() or pytest.skip("no mpirun")
    here = ["-n", "1", sys.executable, "-m", "fastdp.train", "--output", str(tmp_path / "out")]
    flags = ["--oversubscribe"] if launch.is_open_mpi() else []
    done = subprocess.run(
        [mpirun, *flags, *here, ":", *here, *second],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert f"fastdp.train: error: {message}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    done = train_cli("--output", str(tmp_path), "--epochs", "1")
    assert done.returncode == 2 and "empty or does not exist" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("failing", ["1", "0", "0,1,2"])
def test_an_exception_ends_all_ranks_and_is_printed_once(failing: str, tmp_path: Path) -> None:
    done = launch.start("train_fails.py", failing, str(tmp_path / "out"), ranks=3, timeout=60)
    assert done.returncode != 0
    assert done.stdout.count("RuntimeError: this rank has had enough") == 1, done.stdout
    assert not (tmp_path / "out" / "report.json").exists()


class Coupled(torch.nn.Module):
    """A model that standardises the batch: found when it is first run."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x - x.mean(0))


@pytest.mark.parametrize("ranks", [0, 2])
def test_what_is_refused_while_it_trains_is_one_line(ranks: int, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    more = ["--epochs", "1", "--noise-multiplier", "1", "--output", str(tmp_path / "run")]
    done = train_cli("--model", "test_train:Coupled", *more, ranks=ranks, PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("fastdp.train: error: layer 'layer': its input for a record depends on the other rec") == 1


def test_an_interrupt_after_the_report_asks_for_no_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "draw", interrupted)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    output = tmp_path / "run"
    assert train.main(["--epochs", "1", "--noise-multiplier", "1", "--output", str(output)]) == 130
    assert f"; {output} has its report" in capsys.readouterr().err and (output / "report.json").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(SystemExit, match="2"):
        train.main(["--output", str(tmp_path / "a" / "run")])
    assert f"output='{tmp_path}/a/run': must be a folder that can be written to" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
