"""What a run needs to go on: model, optimizer, and how far they came. All of it is DP output or public.

A checkpoint is one file that appears whole or not at all. The last two are kept, for a disk may damage one.
"""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path
from typing import Any, Final

import torch

from fastdp.disk import make_folder, write_whole

FORMAT: Final = "fastdp checkpoint 2"
KEPT: Final = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `state` as the checkpoint of `step`, and remove older ones. OSError: there is no room."""
    make_folder(folder)
    write_whole(folder / f"step-{step:010d}.pt", lambda file: torch.save({"format": FORMAT, **state}, file))
    for old in _newest_first(folder)[KEPT:]:
        old.unlink(missing_ok=True)


def load_newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest undamaged checkpoint, if there is any, and a line about each that was passed over."""
    passed_over: list[str] = []
    for path in _newest_first(folder):
        try:
            return _load(path), passed_over
        except Exception as error:  # whatever a damaged file makes of zipfile and torch.load
            passed_over.append(f"{path} is damaged ({type(error).__name__}: {str(error).splitlines()[0]})")
    return None, passed_over


def remove_all(folder: Path) -> None:
    """Of a finished run, whose model stands by itself."""
    for path in folder.glob("*step-*.pt*"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # what is not ours stays
        folder.rmdir()


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)


def _load(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch.load does not look at the checksums
    if damaged is not None:
        raise ValueError(f"checksum of {damaged}")
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    if state["format"] != FORMAT:
        raise ValueError(f"format {state['format']}")
    return state
