"""A run: made of options, a table and ranks, begun or resumed in its folder."""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastdp
from fastdp import accounting, checkpoint, data, folder, metrics, report
from fastdp.comm import Communicator
from fastdp.errors import ArgumentError, require
from fastdp.folder import RunFolder
from fastdp.job import tell
from fastdp.models import build_model
from fastdp.optimizer import PrivateOptimizer
from fastdp.options import Options, check_options
from fastdp.profile import Profile
from fastdp.sampling import PrivateLoader

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def load_table(options: Options) -> tuple[Options, data.Table]:
    """The table, and the options with what its size decides."""
    check_options(options)
    table = data.load(
        options.data, options.schema, options.evaluation_data, options.evaluation_fraction, options.verify
    )
    data.check(table)
    n = len(table.train_labels)
    require(1 <= options.batch_size <= n, "batch_size", options.batch_size, f"in [1, {n}], the training records")
    if options.delta is None:
        options = dataclasses.replace(options, delta=min(1e-5, 10.0 ** -(math.floor(math.log10(n)) + 1)))
    if table.prior:
        check_prior(options, table)
    return options, table


def check_prior(options: Options, table: data.Table) -> None:
    """ArgumentError if what the table's statistics cost leaves no noise to be found for the target."""
    before = accounting.Ledger(options.accountant, table.prior).epsilon(options.chosen_delta)
    if options.noise_multiplier is None:
        bound = f"given: no epsilon can be reached, since statistics in {options.data} have no noise"
        require(math.isfinite(before), "noise_multiplier", None, bound)
        target = 1.0 if options.target_epsilon is None else options.target_epsilon
        bound = f"above {before:.4g}, what the table's statistics cost alone"
        require(before < target, "target_epsilon", target, bound)


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
    profile: Profile | None
    device: torch.device
    steps_trained: int = 0  # that the model has seen; others were spent, and lost by a crash

    def placed(self, batch: list[Tensor]) -> list[Tensor]:
        return batch if self.device.type == "cpu" else [x.to(self.device, non_blocking=True) for x in batch]

    def mark(self, phase: str) -> None:
        """What the time since the last mark was, if that is wanted."""
        if self.profile is not None:
            self.profile.mark(phase)

    @property
    def is_private(self) -> bool:
        """Whether epsilon means anything; if not, `assumptions` say why."""
        engine, options = self.engine, self.options
        assert engine.plan is not None
        small_delta = options.chosen_delta < 1 / len(self.table.train_labels)
        return self.has_epsilon and small_delta and engine.seed is None and engine.plan.noise_multiplier > 0

    @property
    def has_epsilon(self) -> bool:
        """What was done so far costs a finite one, and so did what the table's statistics cost."""
        before = accounting.Ledger(self.options.accountant, self.table.prior).epsilon(self.options.chosen_delta)
        return math.isfinite(before) and math.isfinite(self.engine.get_epsilon(self.options.chosen_delta))

    @property
    def assumptions(self) -> list[str]:
        """Of the engine, and what the engine does not know."""
        too_large = self.options.chosen_delta >= 1 / len(self.table.train_labels)
        lines = [delta_too_large(self.options)] * too_large
        if not self.has_epsilon:
            lines.append("NOT PRIVATE: epsilon is infinite")
        return [*lines, *self.engine.assumptions(), *self.table.assumptions]

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.options.epochs * len(self.loader)

    @property
    def spent(self) -> str:
        """For those who end the run: what it cost."""
        epsilon = report.upper(self.engine.get_epsilon(self.options.chosen_delta), 4)
        mark = "" if self.is_private else " (NOT PRIVATE)"
        return f"after {self.optimizer.steps} steps, which cost epsilon={epsilon}{mark}"

    def interrupted(self, path: Path) -> str:
        """For a user who would not wait: what it cost, and what to do now."""
        finished = (path / folder.REPORT).exists()
        return f"{self.spent}; " + (f"{path} has its report" if finished else f"go on with --resume {path}")

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; the steps it lacks are in the ledger."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.optimizer.steps,
            "steps_trained": self.steps_trained,
            "training_records": len(self.table.train_labels),
            "declaration": self.table.declaration,
        }


def make_run(options: Options, comm: Communicator, table: data.Table, path: Path, device: torch.device) -> Run:
    """Model, optimizer and loader, made private; as the folder's newest checkpoint has them if it is resumed."""
    if options.seed is None:
        torch.seed()
    else:
        torch.manual_seed(options.seed)
    model = build_model(options.model, table.train_features.shape[1:], table.outputs, table.category_sizes).to(device)
    engine = fastdp.PrivacyEngine(options.accountant, options.seed, path / folder.LEDGER, prior=table.prior)
    momentum = {"momentum": options.momentum} if options.optimizer == "sgd" else {}
    optimizer = OPTIMIZERS[options.optimizer](model.parameters(), lr=options.learning_rate, **momentum)
    common: dict[str, Any] = {
        "module": model,
        "optimizer": optimizer,
        "data_loader": DataLoader(table.training, batch_size=options.batch_size),
        "max_grad_norm": options.max_grad_norm,
        "clipping": options.clipping,
        "secure_mode": options.secure_mode,
        "poisson_sampling": not options.shuffle,
        "max_physical_batch_size": options.max_physical_batch_size,
        "comm": comm,
    }
    if options.noise_multiplier is not None:
        made = engine.make_private(noise_multiplier=options.noise_multiplier, **common)
    else:
        made = engine.make_private_with_epsilon(
            target_epsilon=1.0 if options.target_epsilon is None else options.target_epsilon,
            target_delta=options.chosen_delta,
            epochs=options.epochs,
            **common,
        )
    trained = 0
    if options.resume:
        try:
            trained = _restore(comm, model, made[1], table, path)
        except ArgumentError:
            engine.close()
            raise
    profile = Profile(comm) if options.profile else None
    made[1].profile = profile
    return Run(options, comm, table, engine, *made, profile, device, trained)


def _restore(comm: Communicator, model: nn.Module, optimizer: PrivateOptimizer, table: data.Table, path: Path) -> int:
    """What the newest checkpoint has, on every rank; returns how many steps the model was trained.

    The ledger is held by now: no other process, about to end, writes a newer one.
    """
    state = _load_checkpoint(comm, path)
    n, had = len(table.train_labels), state["training_records"]
    require(n == had, "data", f"{n} training records", f"the table of the run that is resumed, of {had}")
    same = table.declaration == state["declaration"]
    require(same, "schema", "changed", f"as the run was begun with, see {path / folder.SCHEMA}")
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ArgumentError("resume", str(path), f"a run of this table and model ({reason})") from error
    whole = f"a run with its whole {folder.LEDGER}: the checkpoint is of step {state['steps']}"
    known = optimizer.steps >= state["steps"]
    require(known, "resume", f"{path}, whose ledger holds {optimizer.steps} steps", whole)
    trained: int = state["steps_trained"]
    return trained


def _load_checkpoint(comm: Communicator, path: Path) -> dict[str, Any]:
    """Rank 0's newest undamaged one, on every rank."""
    state: dict[str, Any] | None = None
    if comm.rank == 0:
        state, passed_over = checkpoint.load_newest(path / folder.CHECKPOINTS)
        for line in passed_over:
            tell(f"warning: {line}{'' if state is None else '; going on from one before it'}\n")
    state = comm.bcast_object(state, 0)
    if state is None:
        raise ArgumentError("resume", str(path), "a run with an undamaged checkpoint")
    return state


def choose_folder(options: Options, comm: Communicator, table: data.Table) -> Path:
    """Where the run lies; the same on all ranks, though rank 0 alone writes there."""
    now = f"{datetime.datetime.now():%Y-%m-%dT%H-%M-%S.%f}"[:-3]
    name = re.sub(r"[^\w-]+", "-", table.name)
    path: Path = comm.bcast_object(options.output or folder.DEFAULT / f"{name}-{now}", 0)
    if comm.rank == 0 and not options.resume:
        folder.check_new(path)
    elif comm.rank == 0:
        there = (path / folder.LEDGER).is_file()
        require(there, "resume", str(path), f"a run with its {folder.LEDGER}: what it spent cannot be told")
    return path


def open_folder(run: Run, path: Path) -> RunFolder | None:
    """On rank 0 only."""
    if run.comm.rank != 0:
        return None
    # Once more: until this rank held the ledger, another run may have been at work here.
    if run.options.resume:
        folder.find(run.options.resume, path)
        lost = run.optimizer.steps - run.steps_trained
        report.say(
            f"resuming {path} after step {run.optimizer.steps}; {lost} steps are lost, since no checkpoint has them"
        )
    else:
        folder.check_new(path)
    opened = RunFolder(path, run.options.tensorboard)
    if not run.options.resume:
        opened.begin(run.options.plain(), run.state, run.table.schema)
    return opened


def write_profile(run: Run, path: Path) -> None:
    """Call it on all ranks."""
    assert run.profile is not None
    try:
        run.profile.write(path)
        if run.comm.rank == 0:
            report.say(f"the profile is in {path / 'private'}, and not to be published")
    except OSError as error:
        report.say(f"warning: the profile in {path} is not complete ({error.strerror})")


def check_same(comm: Communicator, options: Options) -> None:
    """Ranks on other hosts may have another command line or configuration file."""
    everywhere = comm.allgather_object(dataclasses.asdict(dataclasses.replace(options, output=None)))
    for rank, theirs in enumerate(everywhere):
        for name, value in theirs.items():
            first = repr(everywhere[0][name])  # repr: nan is itself
            require(repr(value) == first, f"rank {rank}: {name}", value, f"{first} as on rank 0")


def announce(options: Options, comm: Communicator, table: data.Table) -> None:
    """Before the noise is calibrated, which takes seconds."""
    if comm.rank == 0:
        report.say(
            f"{options.data}: {len(table.train_labels):,} training records, {options.model}, "
            f"{comm.size} {'rank' if comm.size == 1 else 'ranks'}; preparing the noise ..."
        )
        if options.chosen_delta >= 1 / len(table.train_labels):
            report.say(f"warning: {delta_too_large(options)}")
        if options.seed is not None:
            report.say(f"warning: NOT PRIVATE: the noise is reproducible from seed {options.seed}")


def delta_too_large(options: Options) -> str:
    return f"NOT PRIVATE: delta={options.chosen_delta:g} is not below 1/n: it allows a whole record to be published"


def summarise(run: Run, last: dict[str, float], seconds_per_step: float) -> dict[str, Any]:
    """What the report holds: DP outputs, or figures on the evaluation table, and what to know about both."""
    options, plan = run.options, run.engine.plan
    assert plan is not None
    table, shown = run.table, [key for key in metrics.NAMES if key in last]
    steps = run.optimizer.steps
    return {
        **{key: last[key] for key in shown},
        "epsilon": last["epsilon"] if math.isfinite(last["epsilon"]) else None,  # JSON knows no infinity
        "delta": options.chosen_delta,
        "noise_multiplier": plan.noise_multiplier,
        "max_grad_norm": plan.max_grad_norm,
        "clipping": plan.clipping,
        "secure_mode": plan.secure_mode,
        "sample_rate": plan.sample_rate if plan.poisson_sampling else None,
        "steps": steps,
        "steps_lost": steps - run.steps_trained,
        "epochs": options.epochs,
        "batch_size": plan.batch_size,
        "training_records": plan.dataset_size,
        "evaluation_records": len(table.test_labels),
        "optimizer": options.optimizer,
        "lr": options.learning_rate,
        "lr_schedule": options.lr_schedule,
        "momentum": options.momentum,
        "seconds_per_epoch": seconds_per_step * len(run.loader),
        "records_per_second": plan.batch_size / seconds_per_step,
        "ranks": run.comm.size,
        "all_reduce": options.all_reduce if run.comm.size > 1 else None,
        "device": options.device,
        "accountant": options.accountant,
        "privacy_unit": table.unit,
        "private": run.is_private,
        "assumptions": run.assumptions,
        "evaluation": metrics.describe(shown, table.evaluation, table.target),
        "task": table.task,
        "data": options.data,
        "model": options.model,
        "fastdp": fastdp.__version__,
        "torch": torch.__version__,
    }
