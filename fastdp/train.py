"""Train a differentially private model on a table: `mpirun -n 2 python -m fastdp.train`, or without mpirun.

Read `train` from top to bottom for the whole run. Everything on the command line can stand in a TOML file too
(--config FILE, keys as the options without dashes: `batch_size = 1024`); the command line wins.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
import torch
import torch.nn.functional as F
from cyclopts import Parameter
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastdp
from fastdp import data, metrics, report
from fastdp.comm import Communicator
from fastdp.errors import ArgumentError, CommError, require
from fastdp.job import INTERRUPTED, USAGE_ERROR, agree, complain, end_all_ranks, interrupted, together, usage_error
from fastdp.models import build_model
from fastdp.optimizer import PrivateOptimizer
from fastdp.sampling import PrivateLoader

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]


def _whole(type_: Any, tokens: Sequence[cyclopts.Token]) -> int:
    """An integer as it stands: 1.5 epochs are not rounded to 2."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not an integer") from None


Whole = Annotated[int, Parameter(converter=_whole)]


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be chosen. The defaults were tuned on a split of Adult's training rows, not on its test rows."""

    data: str = "adult"
    """Table to train on: adult (UCI Adult, which ships with the package); a CSV, Parquet or Arrow file, or a folder of
    such, with --schema; or module:attribute, a fastdp.data.Table or a pair (training, evaluation) of datasets."""
    schema: Path | None = None
    "TOML file that declares the columns of a table in files: types, public bounds, vocabularies, label or target."
    evaluation_data: Path | None = None
    "File or folder of evaluation rows. Without it, rows of the table are held out, and epsilon does not protect them."
    evaluation_fraction: float | None = None
    "Share of rows held out where there is no --evaluation-data; 0.2 if not given. Row numbers decide which."
    model: str = "mlp:32"
    """mlp:H1,H2,... (hidden layers), logistic, or module:attribute, an nn.Module or a callable(inputs, outputs) that
    returns one."""
    target_epsilon: float | None = None
    "Privacy budget; the noise is calibrated to it. 1.0 if no noise multiplier is given."
    delta: float = 1e-5
    "Probability with which the guarantee may fail; well below 1/n."
    noise_multiplier: float | None = None
    "Noise standard deviation over max_grad_norm, instead of a target epsilon."
    epochs: Whole = 20
    "Expected passes over the training table."
    batch_size: Whole = 1024
    "Expected records per step, over all ranks."
    max_grad_norm: float = 4.0
    "Bound on each record's gradient norm."
    lr: float = 1.5
    "Learning rate at the start."
    lr_schedule: Literal["linear", "constant"] = "linear"
    "Linear falls to zero over the run."
    momentum: float = 0.0
    "Momentum of SGD."
    accountant: Literal["pld", "rdp"] = "pld"
    "How epsilon is computed; both are upper bounds, pld is tighter."
    shuffle: bool = False
    "Shuffled batches instead of Poisson samples: no amplification by sampling is claimed."
    all_reduce: Literal["auto", "ring", "tree", "mpi"] = "auto"
    "Algorithm that sums gradients over ranks."
    timeout: float = 60.0
    "Seconds that a rank waits for the others before it gives up with an error."
    seed: Annotated[int | None, Parameter(converter=_whole)] = None
    "For tests: reproducible and therefore NOT private."
    output: Path | None = None
    "Folder for report.json, metrics.jsonl, model.pt and curves.png; runs/DATA-TIME if not given."


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch of each record's log-loss, or of its squared error where labels are targets."""
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(1), labels)
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits.squeeze(1), labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def check_options(options: Options) -> None:
    """Bounds that neither the table nor the engine knows."""
    require(0 < options.delta < 1, "delta", options.delta, "in (0, 1)")
    require(options.epochs >= 1, "epochs", options.epochs, ">= 1")
    require(0 < options.lr < float("inf"), "lr", options.lr, "finite and > 0")
    require(0 <= options.momentum < 1, "momentum", options.momentum, "in [0, 1)")
    require(options.max_grad_norm != 0, "max_grad_norm", options.max_grad_norm, "> 0: at 0 nothing is learned")
    seeded = options.seed is not None
    require(not seeded or 0 <= (options.seed or 0) < 2**63, "seed", options.seed, "in [0, 2^63)")
    both = options.target_epsilon is not None and options.noise_multiplier is not None
    require(not both, "noise_multiplier", options.noise_multiplier, "absent when target_epsilon is given")


def load_table(options: Options) -> data.Table:
    check_options(options)
    table = data.load(options.data, options.schema, options.evaluation_data, options.evaluation_fraction)
    data.check(table)
    n = len(table.train_labels)
    require(1 <= options.batch_size <= n, "batch_size", options.batch_size, f"in [1, {n}], the training records")
    return table


@dataclasses.dataclass
class Run:
    """What `train` trains."""

    options: Options
    comm: Communicator
    table: data.Table
    engine: fastdp.PrivacyEngine
    model: nn.Module
    optimizer: PrivateOptimizer
    loader: PrivateLoader

    @property
    def is_private(self) -> bool:
        """Whether epsilon means anything."""
        return not any(line.startswith("NOT PRIVATE") for line in self.assumptions)

    @property
    def assumptions(self) -> list[str]:
        """Of the engine, and what the engine does not know."""
        too_large = self.options.delta >= 1 / len(self.table.train_labels)
        return [delta_too_large(self.options)] * too_large + [*self.engine.assumptions(), *self.table.assumptions]

    def so_far(self, output: report.Output | None) -> str:
        """For those who end the run: what it cost, and what there is of it."""
        spent = report.upper(self.engine.get_epsilon(self.options.delta), 4)
        mark = "" if self.is_private else " (NOT PRIVATE)"
        there = " and ".join(output.written) if output is not None and output.written else "no model"
        return f"after {self.optimizer.steps} steps, which cost epsilon={spent}{mark}; {there} was written"


def make_run(options: Options, comm: Communicator, table: data.Table) -> Run:
    """Model, optimizer and loader, made private."""
    if options.seed is None:
        torch.seed()
    else:
        torch.manual_seed(options.seed)
    model = build_model(options.model, table.train_features.shape[1:], table.outputs)
    engine = fastdp.PrivacyEngine(accountant=options.accountant, seed=options.seed)
    common: dict[str, Any] = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=options.lr, momentum=options.momentum),
        "data_loader": DataLoader(
            TensorDataset(table.train_features, table.train_labels), batch_size=options.batch_size
        ),
        "max_grad_norm": options.max_grad_norm,
        "poisson_sampling": not options.shuffle,
        "comm": comm,
    }
    if options.noise_multiplier is not None:
        made = engine.make_private(noise_multiplier=options.noise_multiplier, **common)
    else:
        made = engine.make_private_with_epsilon(
            target_epsilon=1.0 if options.target_epsilon is None else options.target_epsilon,
            target_delta=options.delta,
            epochs=options.epochs,
            **common,
        )
    return Run(options, comm, table, engine, *made)


def make_output(options: Options, comm: Communicator, table: data.Table) -> report.Output | None:
    """The folder of results; on rank 0 only."""
    now = f"{datetime.datetime.now():%Y-%m-%dT%H-%M-%S.%f}"[:-3]
    name = re.sub(r"[^\w-]+", "-", table.name)
    return report.Output(options.output or Path("runs") / f"{name}-{now}") if comm.rank == 0 else None


def check_same(comm: Communicator, options: Options) -> None:
    """Ranks on other hosts may have another command line or configuration file."""
    everywhere = comm.allgather_object(dataclasses.asdict(dataclasses.replace(options, output=None)))
    for rank, theirs in enumerate(everywhere):
        for name, value in theirs.items():
            bound = f"{everywhere[0][name]!r} as on rank 0"
            require(value == everywhere[0][name], f"rank {rank}: {name}", value, bound)


def announce(options: Options, comm: Communicator, table: data.Table) -> None:
    """Before the noise is calibrated, which takes seconds."""
    if comm.rank == 0:
        report.say(
            f"{options.data}: {len(table.train_labels):,} training records, {options.model}, "
            f"{comm.size} {'rank' if comm.size == 1 else 'ranks'}; preparing the noise ..."
        )
        if options.delta >= 1 / len(table.train_labels):
            report.say(f"warning: {delta_too_large(options)}")
        if options.seed is not None:
            report.say(f"warning: NOT PRIVATE: the noise is reproducible from seed {options.seed}")


def delta_too_large(options: Options) -> str:
    return f"NOT PRIVATE: delta={options.delta:g} is not below 1/n: it allows a whole record to be published"


def train(run: Run, output: report.Output | None) -> dict[str, Any]:
    """The training loop: forward, one backward, one private step; evaluation after each epoch. Returns the summary.

    All ranks evaluate, though rank 0 alone speaks: it would keep the others waiting, and their patience has an end.
    """
    options, table, model, optimizer, loader = run.options, run.table, run.model, run.optimizer, run.loader
    steps = options.epochs * len(loader)
    progress = report.Progress(output is not None, steps, options.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 - step / steps if options.lr_schedule == "linear" else 1.0
    )
    seconds = 0.0
    with progress:
        for epoch in range(1, options.epochs + 1):
            started = time.perf_counter()
            for features, labels in loader:
                optimizer.zero_grad()
                loss_of(model(features), labels).backward()
                optimizer.step()
                schedule.step()
                progress.advance()
            seconds += time.perf_counter() - started
            figures = {
                "epoch": epoch,
                "step": optimizer.steps,
                "epsilon": run.engine.get_epsilon(options.delta),
                "private": run.is_private,
                **metrics.evaluate(model, table.test_features, table.test_labels, table.target),
            }
            if output is not None:
                output.append_metrics(figures)
            progress.epoch(figures, seconds / optimizer.steps)
    return summarise(run, figures, seconds)


def finish(run: Run, output: report.Output, summary: dict[str, Any]) -> int:
    """Results to the screen first: the files may not fit on the disk. Returns the exit status."""
    report.print_summary(summary)
    try:
        output.write(summary, run.model)
    except ArgumentError as error:
        complain(str(error))
        return USAGE_ERROR
    report.say(f"{', '.join(output.written)} and metrics.jsonl are in {output.folder}")
    return 0


def summarise(run: Run, last: dict[str, float], seconds: float) -> dict[str, Any]:
    """What the report holds: DP outputs, or figures on the evaluation table, and what to know about both."""
    options, plan = run.options, run.engine.plan
    assert plan is not None
    table, shown = run.table, [key for key in metrics.NAMES if key in last]
    steps = run.optimizer.steps
    return {
        **{key: last[key] for key in shown},
        "epsilon": last["epsilon"] if math.isfinite(last["epsilon"]) else None,  # JSON knows no infinity
        "delta": options.delta,
        "noise_multiplier": plan.noise_multiplier,
        "max_grad_norm": plan.max_grad_norm,
        "sample_rate": plan.sample_rate if plan.poisson_sampling else None,
        "steps": steps,
        "epochs": options.epochs,
        "batch_size": plan.batch_size,
        "training_records": plan.dataset_size,
        "evaluation_records": len(table.test_labels),
        "lr": options.lr,
        "lr_schedule": options.lr_schedule,
        "momentum": options.momentum,
        "seconds_per_epoch": seconds / options.epochs,
        "records_per_second": steps * plan.batch_size / seconds,
        "ranks": run.comm.size,
        "all_reduce": run.comm.algorithm if run.comm.size > 1 else None,
        "accountant": options.accountant,
        "private": run.is_private,
        "assumptions": run.assumptions,
        "evaluation": metrics.describe(shown, table.evaluation, table.target),
        "task": table.task,
        "data": options.data,
        "model": options.model,
        "fastdp": fastdp.__version__,
        "torch": torch.__version__,
    }


HELP = "Train a differentially private model on a table, alone or under mpirun."

app = cyclopts.App(name="fastdp.train", help=HELP, version=fastdp.__version__, suppress_keyboard_interrupt=False)


@app.default
def run_from_options(*, options: Annotated[Options, Parameter(name="*")] = Options()) -> int:
    try:
        comm = fastdp.comm.init(timeout=options.timeout, algorithm=options.all_reduce)
    except ArgumentError as error:
        return usage_error(error)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.local_size))
    run: Run | None = None
    output: report.Output | None = None
    try:
        agree(comm, None)  # ranks whose command line is wrong come here with what is wrong
        together(comm, lambda: check_same(comm, options))
        table = together(comm, lambda: load_table(options))
        together(comm, lambda: data.check_same(comm, table))
        announce(options, comm, table)
        run = made = together(comm, lambda: make_run(options, comm, table))
        output = together(comm, lambda: make_output(options, comm, table))
        summary = train(made, output)
        # On rank 0 alone: a slow disk does not try the others' patience.
        return 0 if output is None else finish(made, output, summary)
    except KeyboardInterrupt:
        return interrupted(comm, "before the first step" if run is None else run.so_far(output))
    except Exception:
        end_all_ranks(comm)
        raise


@app.meta.default
def read_config(
    *arguments: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None, Parameter(help="TOML file of options, `batch_size = 1024`; the command line wins.")
    ] = None,
) -> Any:
    if config is not None:
        require(config.is_file(), "config", str(config), "a TOML file")
        try:
            tomllib.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArgumentError("config", str(config), f"valid TOML ({error})") from error
        app.config = (cyclopts.config.Toml(config, must_exist=True),)
    return app(arguments, **HANDLED_HERE)


# Errors and interrupts come to main, not to the library's panels.
HANDLED_HERE: dict[str, Any] = {
    "exit_on_error": False,
    "print_error": False,
    "result_action": "return_value",
}


def main(arguments: list[str] | None = None) -> int:
    app.config = ()  # of an earlier call in this process
    report.print_what_can_be_printed()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = app.meta(arguments, **HANDLED_HERE)
        return result if isinstance(result, int) else 0
    except (cyclopts.CycloptsError, ArgumentError, CommError) as error:
        return usage_error(error)
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
