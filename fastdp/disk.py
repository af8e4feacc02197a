"""Files that appear whole or not at all, and stay when the machine stops."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], mode: int = 0o644) -> None:
    """`path` gets what `write` writes, by a file beside it, fsync and rename; if that fails, it stays as it was.

    mode: of a new file, before the umask. Raises OSError. The content is made in memory: torch.save and matplotlib turn
    a full disk into errors of their own.
    """
    content = io.BytesIO()
    write(content)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """`path` and what it lies in, there after a stop of the machine too."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """The name of a new file to disk, too; some network file systems refuse, and have it there anyway."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
