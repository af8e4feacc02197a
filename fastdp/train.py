"""Train a differentially private model on a table: `mpirun -n 2 python -m fastdp.train`, or without mpirun.

Read `train` from top to bottom for the whole run; fastdp/options.py has what can be chosen.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from typing import Any

import cyclopts
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdp
from fastdp import data, device, metrics, report
from fastdp.errors import ArgumentError, CommError
from fastdp.folder import RunFolder
from fastdp.job import (
    INTERRUPTED,
    USAGE_ERROR,
    StopOnSignal,
    agree,
    complain,
    end_all_ranks,
    interrupted,
    tell,
    together,
    usage_error,
)
from fastdp.options import Options, parse
from fastdp.run import (
    Run,
    announce,
    check_same,
    choose_folder,
    load_table,
    make_run,
    open_folder,
    summarise,
    write_profile,
)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch of each record's log-loss, or of its squared error where labels are targets."""
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(1), labels)
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits.squeeze(1), labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def train(run: Run, folder: RunFolder | None) -> dict[str, Any] | None:
    """The training loop: forward, one backward, one private step; evaluation after each epoch.

    Returns the summary; None if a rank was asked to stop, which all do at the same step. All ranks evaluate, though
    rank 0 alone speaks and has the folder: it would keep the others waiting, and their patience has an end.
    """
    options, model, optimizer, loader = run.options, run.model, run.optimizer, run.loader
    progress = report.Progress(folder is not None, run.steps, optimizer.steps, options.batch_size)
    begun, mark = optimizer.steps, run.mark
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 - (begun + step) / run.steps if options.lr_schedule == "linear" else 1.0
    )
    seconds, saved_at = 0.0, time.monotonic()
    if run.profile is not None:
        run.profile.start()
    with progress, StopOnSignal(optimizer.ask_to_stop):
        while optimizer.steps < run.steps:
            started = time.perf_counter()
            for batch in loader:
                *inputs, labels = run.placed(batch)
                mark("data")
                optimizer.zero_grad()
                loss = loss_of(model(*inputs), labels)
                mark("forward")
                loss.backward()
                mark("backward")
                optimizer.step()
                if optimizer.is_accumulating:
                    continue
                run.steps_trained += 1
                schedule.step()
                progress.advance()
                if optimizer.asked_to_stop and optimizer.steps < run.steps:
                    return None
                if folder is not None and time.monotonic() - saved_at > options.checkpoint_every:
                    folder.save_checkpoint(optimizer.steps, run.state)
                    saved_at = time.monotonic()
                    mark("checkpoint")
            seconds += time.perf_counter() - started
            if folder is not None and optimizer.steps == run.steps:
                folder.save_checkpoint(optimizer.steps, run.state)  # what is left to do may fail
            figures = evaluate(run)
            if folder is not None:
                folder.append_metrics(figures)
            mark("evaluation")
            progress.epoch(figures, seconds / (optimizer.steps - begun))
    if begun >= run.steps:  # nothing was left: ended between its last step and its report, or all the rest was lost
        return summarise(run, evaluate(run), math.nan)
    return summarise(run, figures, seconds / (optimizer.steps - begun))


def evaluate(run: Run) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    table, steps = run.table, run.optimizer.steps
    return {
        "epoch": math.ceil(steps / len(run.loader)),
        "step": steps,
        "epsilon": run.engine.get_epsilon(run.options.chosen_delta),
        "private": run.is_private,
        **metrics.evaluate(run.model, table.test_features, table.test_labels, table.target, table.test_categories),
    }


def finish(run: Run, folder: RunFolder, summary: dict[str, Any]) -> int:
    """Results to the screen first: the files may not fit on the disk. Returns the exit status."""
    report.print_summary(summary)
    try:
        folder.finish(summary, run.model)
    except ArgumentError as error:
        complain(str(error))
        return USAGE_ERROR
    report.say(f"{', '.join(folder.written)} and metrics.jsonl are in {folder.path}")
    return 0


def stop(run: Run, folder: RunFolder) -> None:
    """Leave what the run can be resumed from."""
    saved = folder.save_checkpoint(run.optimizer.steps, run.state)
    how = f"; go on with --resume {folder.path}" if saved else ""
    tell(f"fastdp.train: stopped {run.spent}{how}\n")


def run_on_all_ranks(options: Options) -> int:
    """Returns the exit status."""
    try:
        comm = fastdp.comm.init(timeout=options.timeout, algorithm=options.all_reduce)
    except ArgumentError as error:
        return usage_error(error)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.local_size))
    run: Run | None = None
    try:
        agree(comm, None)  # ranks whose command line is wrong come here with what is wrong
        together(comm, lambda: check_same(comm, options))
        place = together(comm, lambda: device.of_rank(options.device, comm))
        options, table = together(comm, lambda: load_table(options))
        together(comm, lambda: data.check_same(comm, table))
        announce(options, comm, table)
        path = together(comm, lambda: choose_folder(options, comm, table))
        run = made = together(comm, lambda: make_run(options, comm, table, path, place))
        folder = together(comm, lambda: open_folder(made, path))
        summary = train(made, folder)
        if made.profile is not None:
            together(comm, lambda: write_profile(made, path))
        # On rank 0 alone: a slow disk does not try the others' patience.
        status = 0
        if folder is not None and summary is not None:
            status = finish(made, folder, summary)
        elif folder is not None:
            stop(made, folder)
        if folder is not None:
            folder.close()
        return INTERRUPTED if summary is None else status
    except KeyboardInterrupt:
        return interrupted(comm, "before the first step" if run is None else run.interrupted(path))
    except Exception as error:
        return end_all_ranks(comm, error)
    finally:
        if run is not None:
            run.engine.close()


def main(arguments: list[str] | None = None) -> int:
    report.print_what_can_be_printed()
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options = parse(arguments)
        return 0 if options is None else run_on_all_ranks(options)
    except (cyclopts.CycloptsError, ArgumentError, CommError) as error:
        return usage_error(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
