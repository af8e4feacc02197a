"""The folder of a run: what it leaves behind, what it can be resumed from, and which run that is.

run.json (the options), schema.toml (by which rows became features; none if code made the table), ledger.jsonl
(fastdp/ledger.py), checkpoints/ (fastdp/checkpoint.py) until the run is finished, metrics.jsonl (a line per epoch),
then model.pt, report.json and curves.png. All of it may be published (P12), unless its report says NOT PRIVATE.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import nn

from fastdp import checkpoint, ledger
from fastdp.disk import make_folder, write_whole
from fastdp.errors import ArgumentError, require
from fastdp.report import draw, say

DEFAULT: Final = Path("runs")
OPTIONS, LEDGER, METRICS, REPORT = "run.json", "ledger.jsonl", "metrics.jsonl", "report.json"
CHECKPOINTS, SCHEMA, MODEL = "checkpoints", "schema.toml", "model.pt"
PARTIAL: Final = {f".{OPTIONS}.partial", f".{SCHEMA}.partial"}
BEFORE_OPTIONS: Final = {LEDGER, METRICS, CHECKPOINTS, SCHEMA, "tensorboard", *PARTIAL}


def find(resume: str, output: Path | None) -> Path | None:
    """The folder of the run that --resume names. None: auto found none that was begun and not finished."""
    try:
        return _find(resume, output)
    except OSError as error:
        raise ArgumentError("resume", resume, f"a folder that can be read ({error.strerror})") from error


def _find(resume: str, output: Path | None) -> Path | None:
    if resume == "auto":
        begun = [p for p in ([output] if output else DEFAULT.glob("*")) if (p / OPTIONS).is_file()]
        unfinished = [p for p in begun if not (p / REPORT).exists()]
        return max(unfinished, key=lambda p: (p / OPTIONS).stat().st_mtime, default=None)
    path = Path(resume)
    require((path / OPTIONS).is_file(), "resume", resume, f"the folder of a run, with its {OPTIONS}, or auto")
    require(not (path / REPORT).exists(), "resume", resume, f"a run that was not finished: it has a {REPORT}")
    same = output is None or output.resolve() == path.resolve()
    require(same, "output", str(output), "absent, or the folder that is resumed")
    return path


def options_of(path: Path, argument: str = "resume") -> dict[str, Any]:
    """What the run was begun with; `argument` is what the folder was given as, for messages."""
    try:
        options: dict[str, Any] = json.loads((path / OPTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(argument, str(path), f"a run whose {OPTIONS} can be read ({error})") from error
    require(isinstance(options, dict), argument, str(path), f"a run whose {OPTIONS} holds its options")
    return options


def check_new(path: Path) -> None:
    """Nothing of anybody's is written over, but for what a run left that was cut off before it was begun."""
    try:
        names = {each.name for each in path.iterdir()} if path.exists() else set()
        taken = not names <= BEFORE_OPTIONS
        taken = taken or (SCHEMA in names and CHECKPOINTS not in names)  # a run leaves it after its first checkpoint
        if not taken and METRICS in names:
            taken = (path / METRICS).stat().st_size > 0
        if not taken and CHECKPOINTS in names:
            taken = any("step-0000000000.pt" not in each.name for each in (path / CHECKPOINTS).iterdir())
    except OSError as error:
        raise ArgumentError("output", str(path), f"a folder that can be read ({error.strerror})") from error
    if not taken and LEDGER in names:
        taken = bool(ledger.read(path / LEDGER))
    require(not taken, "output", str(path), "a folder that is empty or does not exist")
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    require(os.access(nearest, os.W_OK), "output", str(path), f"a folder that can be written to, as {nearest} cannot")


class RunFolder:
    """Of one rank. Files appear whole or not at all, metrics.jsonl a line at a time."""

    def __init__(self, path: Path, tensorboard: bool = False) -> None:
        self.path = path
        self.written: list[str] = []
        self._history: list[dict[str, Any]] = []
        self._has_room = True
        try:
            make_folder(path)
            with open(path / METRICS, "ab+") as file:
                self._read_metrics(file)
            self._board = _board(path / "tensorboard") if tensorboard else None
        except OSError as error:
            raise ArgumentError("output", str(path), f"a folder that can be written to ({error.strerror})") from error

    def begin(self, options: dict[str, Any], state: dict[str, Any], schema: str | None = None) -> None:
        """Make the run one that can be resumed: its first checkpoint, and then what says that there is one.

        schema: the text of the table's schema, for those who apply the model to other rows.
        """
        try:
            checkpoint.save(self.path / CHECKPOINTS, 0, state)
            if schema is not None:
                write_whole(self.path / SCHEMA, lambda file: file.write(schema.encode()))
            write_whole(self.path / OPTIONS, lambda file: file.write(_json(options)))
        except OSError as error:
            raise ArgumentError("output", str(self.path), f"a folder with room ({error.strerror})") from error

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> bool:
        """Whether there was room for it; a warning if not: the run goes on, and the ledger knows what it spends."""
        try:
            checkpoint.save(self.path / CHECKPOINTS, step, state)
        except OSError as error:
            say(f"warning: no checkpoint of step {step} in {self.path} ({error.strerror})")
            return False
        return True

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl; where there is no room for it, a warning, once: training goes on."""
        self._history.append(metrics)
        if self._board is not None:
            for key in metrics.keys() - {"step", "private"}:
                self._board.add_scalar(key, metrics[key], metrics["step"])
            self._board.flush()
        if not self._has_room:
            return
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        try:
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
        except OSError as error:
            say(f"warning: {METRICS} ends at epoch {len(self._history) - 1} ({error.strerror})")
            self._has_room = False

    def finish(self, summary: dict[str, Any], model: nn.Module) -> None:
        """The model, what it cost, and last the picture, without which the run is a success all the same.

        Raises ArgumentError where there is no room; `written` names what is there.
        """
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
        weights = {name: x.cpu() for name, x in model.state_dict().items()}  # for a machine without a GPU, too
        self._whole(MODEL, lambda file: torch.save(weights, file))
        self._whole(REPORT, lambda file: file.write(_json(finite)))
        checkpoint.remove_all(self.path / CHECKPOINTS)
        try:
            self._whole("curves.png", lambda file: draw(self._history, summary, file))
        except Exception as error:  # of matplotlib, of which a setting of the user's may ask for anything
            say(f"warning: curves.png was not drawn ({type(error).__name__}: {error})")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _read_metrics(self, file: IO[bytes]) -> None:
        """Those of the run that is resumed; a line that was being written when it ended is cut off."""
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        file.truncate(len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            self._history = [{k: math.nan if v is None else v for k, v in line.items()} for line in lines]
        except (ValueError, AttributeError) as error:
            say(f"warning: curves.png will lack what was before: {self.path / METRICS} is damaged ({error})")
            self._history = []

    def _whole(self, name: str, write: Callable[[IO[bytes]], Any]) -> None:
        try:
            write_whole(self.path / name, write)
        except OSError as error:
            bound = f"a folder with room for {name} ({error.strerror})"
            raise ArgumentError("output", str(self.path), bound) from error
        self.written.append(name)


def _board(path: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

    return SummaryWriter(path)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
