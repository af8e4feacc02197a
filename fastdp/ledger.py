"""The ledger on disk: what a run may have spent is there before it is spent, whatever ends the process (P8).

A file of lines, only ever appended to. A line of JSON reserves a number of steps of one (noise multiplier, sample rate)
and is on disk, by fsync, before the first of them; a run that ends in good order appends how many it did not use. After
a crash everything reserved counts as spent.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fastdp.accounting import AccountantName, Event, Ledger
from fastdp.comm import Communicator
from fastdp.disk import make_folder, sync_folder
from fastdp.errors import ArgumentError, PrivacyError, require

FORMAT: Final = "fastdp ledger 1"

# An fsync takes from 0.1 to 20 ms, a step may take 0.5: reserve about a second's worth at a time. A crash wastes that.
BLOCK_SECONDS: Final = 1.0

# A DataLoader's workers hold what their parent held, and notice its death after up to 5 s.
LOCK_SECONDS: Final = 10.0


class DurableLedger(Ledger):
    """A ledger whose steps are reserved in a file before they are counted. One process at a time holds the file.

    path: created if it does not exist; otherwise what it reserved is spent already.
    limit: never reserve more than so many in all, those of earlier runs included, unless they are asked for.
    seeded: the noise is reproducible; the file says so for good, since its epsilon means nothing.
    prior: as of `Ledger`; the file keeps it.

    Raises ArgumentError if the file is in use, damaged, or cannot be written, if it is of another prior, or if one is
    seeded and the other not.
    """

    def __init__(
        self,
        path: Path,
        accountant: AccountantName = "pld",
        limit: int | None = None,
        seeded: bool = False,
        prior: Mapping[Event, int] | None = None,
    ) -> None:
        super().__init__(accountant, prior)
        self.path, self._limit, self._seeded = path, limit, seeded
        self._process = os.getpid()
        self._block, self._reserved_at = 1, -BLOCK_SECONDS
        try:
            self._open()
        except OSError as error:
            raise ArgumentError("ledger", str(path), f"a file that can be written ({error.strerror})") from error
        self._reserved = Counter(self._counts)
        atexit.register(self.close)

    def step(self, noise_multiplier: float, sample_rate: float, count: int = 1) -> None:
        """As `Ledger.step`; returns when the steps are on disk. PrivacyError if they cannot be."""
        if not self._is_open or os.getpid() != self._process:
            raise PrivacyError(f"{self.path}: the ledger was closed, or belongs to the process that forked this one")
        event = (float(noise_multiplier), float(sample_rate))
        checked = Ledger(self.accountant)
        checked.step(*event, count)  # its bounds, before anything is written
        missing = self._counts[event] + count - self._reserved[event]
        if missing > 0:
            self._reserve(event, missing)
        super().step(*event, count)

    def close(self) -> None:
        """Give back what was reserved and not used. No step can be recorded after it."""
        if not self._is_open or os.getpid() != self._process:
            return
        atexit.unregister(self.close)
        # If there is no room for a line, what was reserved stays spent: an upper bound all the same.
        with contextlib.suppress(OSError):
            for event, reserved in list(self._reserved.items()):
                if unused := reserved - self._counts[event]:
                    self._reserved[event] -= unused  # first: an interrupt must not give it back twice
                    self._append(_entry("unused", event, unused))
        self._shut()

    def _open(self) -> None:
        make_folder(self.path.parent)
        new = not self.path.exists()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._is_open = True
        try:
            self._lock()
            self._lines = _read(self.path, self._file, self._counts)
            prior = [[*event, count] for event, count in sorted(self.prior.items())]
            if self._lines == 0:
                self._append({"format": FORMAT, "seeded": self._seeded, "prior": prior})
            else:
                self._check_first(prior)
            if new:
                sync_folder(self.path.parent)
        except BaseException:
            self._shut()
            raise

    def _check_first(self, prior: list[list[float]]) -> None:
        with open(self.path, "rb") as file:
            first = json.loads(file.readline())
        was_seeded = first.get("seeded", False)
        bound = "of a run without a seed: this one was NOT PRIVATE" if was_seeded else "of a run with a seed"
        require(was_seeded == self._seeded, "ledger", str(self.path), bound)
        known = first.get("prior", [])
        as_given = {(sigma, rate): count for sigma, rate, count in known}
        given = {(sigma, rate): count for sigma, rate, count in prior}
        require(known == prior, "ledger: prior", given, f"{as_given}, as {self.path} has it: give that as prior")

    def _shut(self) -> None:
        if self._is_open:
            self._is_open = False
            os.close(self._file)

    def _lock(self) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    bound = "of no run that is still going on (in this process, engine.close() ends one)"
                    raise ArgumentError("ledger", str(self.path), bound) from None
            time.sleep(0.1)

    def _reserve(self, event: Event, missing: int) -> None:
        now = time.monotonic()
        lasted, self._reserved_at = now - self._reserved_at, now
        if lasted < BLOCK_SECONDS / 2:
            self._block *= 2
        elif lasted > 2 * BLOCK_SECONDS:
            self._block = max(1, self._block // 2)
        block = self._block
        if self._limit is not None:
            block = min(block, self._limit - self._reserved.total())
        block = max(block, missing)
        try:
            self._append(_entry("reserve", event, block))
        except OSError as error:  # nothing rests on the line, but whether the file has it is uncertain now
            raise PrivacyError(f"{self.path}: the ledger cannot be written ({error.strerror})") from error
        self._reserved[event] += block

    def _append(self, entry: dict[str, Any]) -> None:
        line = _encode({"line": self._lines, **entry})
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except BaseException:  # KeyboardInterrupt too: whether the file has the line, its next one would not know
            self._shut()
            raise
        self._lines += 1


def hold(path: Path, like: Ledger, limit: int | None, seeded: bool, comm: Communicator | None) -> Ledger:
    """The run's ledger on every rank, with the accountant and the prior of `like`; ArgumentError on all ranks.

    Rank 0's holds the file: no step is released before rank 0's part of its sum, which comes after the record.
    """
    held = Ledger(like.accountant, like.prior)
    events: dict[Event, int] | ArgumentError = {}
    if comm is None or comm.rank == 0:
        try:
            held = DurableLedger(path, like.accountant, limit, seeded, like.prior)
            events = held.events
        except ArgumentError as error:
            events = error
    if comm is not None:
        events = comm.bcast_object(events, 0)
    if isinstance(events, ArgumentError):
        raise events
    if comm is not None and comm.rank != 0:
        for event, count in events.items():
            held.step(*event, count)
    return held


def read(path: Path) -> dict[Event, int]:
    """{(noise multiplier, sample rate): steps} that the ledger of a run holds as spent, open or not; no prior."""
    counts: Counter[Event] = Counter()
    try:
        with open(path, "rb") as file:
            _read(path, file.fileno(), counts, mend=False)
    except OSError as error:
        raise ArgumentError("ledger", str(path), f"a file that can be read ({error.strerror})") from error
    return dict(counts)


def _read(path: Path, file: int, counts: Counter[Event], mend: bool = True) -> int:
    """Add up the lines; returns how many. A last line without its end was being written when the process died.

    Its fsync had not returned, so no step rests on it, and it is cut off.
    """
    size = os.fstat(file).st_size
    content = os.pread(file, size, 0)
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines(keepends=True)
    for number, line in enumerate(lines):
        entry = _decode(line)
        if entry is None or entry.get("line") != number or (number == 0) != ("format" in entry):
            raise ArgumentError("ledger", str(path), f"undamaged: what was spent cannot be told (line {number + 1})")
        if number == 0:
            require(entry["format"] == FORMAT, "ledger", entry["format"], f"of the format {FORMAT!r}")
            continue
        event = (entry["noise_multiplier"], entry["sample_rate"])
        counts[event] += entry["reserve"] if "reserve" in entry else -entry["unused"]
        if counts[event] == 0:
            del counts[event]  # no noise would make epsilon infinite, even of no steps
    if mend and whole < size:
        os.ftruncate(file, whole)
        os.fsync(file)
    return len(lines)


def _entry(kind: str, event: Event, count: int) -> dict[str, Any]:
    return {kind: count, "noise_multiplier": event[0], "sample_rate": event[1]}


def _encode(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry)
    return json.dumps({**entry, "crc32": zlib.crc32(text.encode())}).encode() + b"\n"


def _decode(line: bytes) -> dict[str, Any] | None:
    """The entry of a line; None if it is not what `_encode` wrote."""
    try:
        entry = json.loads(line)
        entry.pop("crc32")
        return entry if _encode(entry) == line else None
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
