"""Where a run's time goes, phase by phase and rank by rank. Private: batches' sizes show in it (P12)."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import IO, Final

import torch

from fastdp.comm import Communicator
from fastdp.disk import write_whole

# "reduce": the sum over ranks, but where they share memory: there it is a part of "step".
PHASES: Final = ("data", "forward", "backward", "clip", "ledger", "idle", "reduce", "step", "evaluation", "checkpoint")
NOTICE: Final = "PRIVATE: not covered by epsilon; timings depend on the sizes of batches"


class Profile:
    """A stopwatch: `mark(phase)` says what the time since the last mark was."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.start()

    def start(self) -> None:
        """Time before it is nobody's."""
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what was asked of a GPU belongs to the phase that asked
        now = time.perf_counter()
        self._seconds[phase] += now - self._last
        self._last = now

    def wait(self) -> None:
        """For the other ranks, so that `idle` is told from `reduce`: only a run that is profiled does this."""
        self._comm.barrier()
        self.mark("idle")

    def write(self, folder: Path) -> None:
        """All ranks' seconds into folder/private, as JSON and as a picture; call it on all ranks."""
        seconds = self._comm.allgather_object(self._seconds)
        if self._comm.rank != 0:
            return
        private = folder / "private"
        private.mkdir(mode=0o700, exist_ok=True)
        os.chmod(private, 0o700)
        content = {"notice": NOTICE, "seconds of ranks": seconds}
        write_whole(private / "profile.json", lambda file: file.write(json.dumps(content, indent=2).encode()), 0o600)
        write_whole(private / "profile.png", lambda file: draw(seconds, file), 0o600)


def draw(seconds: list[dict[str, float]], file: IO[bytes]) -> None:
    """A stacked bar for each rank, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.4 * len(seconds)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ranks = [f"rank {rank}" for rank in range(len(seconds))]
    left = [0.0] * len(seconds)
    for phase in PHASES:
        widths = [of_rank[phase] for of_rank in seconds]
        axes.barh(ranks, widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="seconds", title=NOTICE)
    axes.title.set_fontsize(9)
    axes.legend(ncols=len(PHASES), loc="upper center", bbox_to_anchor=(0.5, -0.35), fontsize=8, frameon=False)
    figure.savefig(file, format="png", dpi=110)
