"""What a run shows: progress, the summary table and a picture.

Nothing here is computed from training records except through the private model (P12): no training loss, no batch
sizes; throughput counts expected records.
"""

from __future__ import annotations

import io
import math
import os
import sys
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from fastdp import metrics as figures


def print_what_can_be_printed() -> None:
    """A terminal that knows no Greek letters gets question marks, not an error after the budget was spent."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def say(text: str) -> None:
    """Print a line. Where it cannot be (`| head -1`, a full disk), go on in silence: the run matters, not the line."""
    try:
        print(text, flush=True)
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def upper(epsilon: float, digits: int) -> str:
    """An upper bound stays one when it is printed."""
    if not math.isfinite(epsilon):
        return "infinite"
    return f"{math.ceil(epsilon * 10**digits) / 10**digits:.{digits}f}"


def figure(value: float) -> str:
    """Four decimals for shares, six digits for what has a unit."""
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.6g}"


class Progress:
    """A bar on a terminal, a line per epoch elsewhere; nothing on ranks that do not speak."""

    def __init__(self, speaks: bool, steps: int, done: int, batch_size: int) -> None:
        self._batch_size = batch_size
        self._console = Console() if speaks else None
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        if self._console is not None and self._console.is_terminal:
            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=steps, completed=done, text="")
        self._steps = steps

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)

    def epoch(self, metrics: dict[str, Any], seconds_per_step: float) -> None:
        speed = f"{self._batch_size / seconds_per_step:,.0f} records/s"
        mark = "" if metrics["private"] else " NOT PRIVATE"
        headline = next(key for key in figures.NAMES if key in metrics)
        shown = f"{figures.NAMES[headline]} {figure(metrics[headline])}"
        text = f"ε {upper(metrics['epsilon'], 3)}{mark}  {shown}  {speed}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, text=text)
        elif self._console is not None:
            say(f"epoch {metrics['epoch']:.0f}  step {metrics['step']:.0f}/{self._steps}  {text}")


def draw(history: list[dict[str, Any]], summary: dict[str, Any], file: IO[bytes]) -> None:
    """Headline, another figure and epsilon over epochs, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [m["epoch"] for m in history]
    headline, *_, other = [key for key in figures.NAMES if key in history[0]]
    for axes, (key, label) in zip(
        figure.subplots(1, 3),
        (
            (headline, figures.NAMES[headline]),
            (other, figures.NAMES[other]),
            ("epsilon", f"ε at δ = {summary['delta']:g}"),
        ),
        strict=True,
    ):
        axes.plot(epochs, [m[key] for m in history], marker=".")
        axes.set(xlabel="epoch", title=label)
        axes.grid(alpha=0.3)
    note = "" if summary["private"] else "  NOT PRIVATE"
    figure.suptitle(
        f"{summary['data']}, {summary['model']}: figures on evaluation rows, not covered by ε{note}", fontsize=10
    )
    figure.savefig(file, format="png", dpi=110)


def print_summary(summary: dict[str, Any]) -> None:
    """The table at the end of a run."""
    lost = f", of which {summary['steps_lost']} were lost when the run was cut off" if summary["steps_lost"] else ""
    shown = {
        **{f"{name} *": figure(summary[key]) for key, name in figures.NAMES.items() if key in summary},
        "ε": "infinite: NOT PRIVATE"
        if summary["epsilon"] is None
        else f"{upper(summary['epsilon'], 4)} ({summary['accountant']})",
        "δ": f"{summary['delta']:g}",
        "noise multiplier": f"{summary['noise_multiplier']:.4f}",
        "sample rate": "none: shuffled" if summary["sample_rate"] is None else f"{summary['sample_rate']:.5f}",
        "steps": f"{summary['steps']}{lost}",
        "seconds per epoch": figure(summary["seconds_per_epoch"]),
        "records/s (expected)": figure(summary["records_per_second"]),
        "ranks": str(summary["ranks"]),
        "all-reduce": summary["all_reduce"] or "none",
    }
    table = Table(show_header=False, title=f"{summary['data']}, {summary['model']}", title_justify="left")
    for name, value in shown.items():
        table.add_row(name, value)
    console = Console()
    with console.capture() as captured:
        console.print(table)
        console.print(f"* {summary['evaluation']}", highlight=False)
        for line in summary["assumptions"]:
            console.print(line, highlight=False)
    say(captured.get().rstrip("\n"))
