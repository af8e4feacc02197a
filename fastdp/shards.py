"""Prepared tables: a folder of Arrow files that ranks map into memory, and the manifest that says what they hold.

    manifest.json     what is there, with counts and checksums: private, like the records
    summary.json      the same without what is computed from the records: may be published (P12)
    train/, test/     part-00000.arrow, ...: `features` fixed_size_list<float32>[D], `categories`
                      fixed_size_list<int32>[K] if the schema leaves categories as codes, `label` int64 or float32
    private/          rows that cannot be used, with the reason
    .fastdp           says that the folder is prepare's, who may remove what a killed run left
    statistics.json   those of the training rows, if the schema asks for some: the same after a run that was killed

The files are described in fastdp/arrowfiles.py. A record's id is its place in the order of the manifest.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fastdp import statistics
from fastdp.arrowfiles import FORMAT, SPLITS
from fastdp.columns import Schema
from fastdp.disk import make_folder, write_whole
from fastdp.errors import ArgumentError, require

if TYPE_CHECKING:  # Spark's workers have no torch; and only tables from files need pyarrow
    from fastdp.transform import Source

MANIFEST: Final = "manifest.json"
SUMMARY: Final = "summary.json"
STATISTICS: Final = "statistics.json"
MARKER: Final = ".fastdp"  # what is in a folder that has it may be removed
FILES: Final = "rows of files of their own"  # an `evaluation`
FOLDERS: Final = (*SPLITS, "private")
PARTIALS: Final = {f".{name}.partial" for name in (MARKER, MANIFEST, SUMMARY, STATISTICS)}  # of a run that was killed


@dataclass(frozen=True)
class Origin:
    """What a prepared table was made of."""

    config: str  # the schema's text
    input: str  # its fingerprint
    versions: Mapping[str, str]
    evaluation: str  # where test rows come from


def fingerprint(sources: Iterable[Source]) -> str:
    """Of the input's files: names, sizes, and when they were changed."""
    files = [(source.name, source.bytes, source.changed, source.split) for source in sources]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made if it is missing, for no other job. ArgumentError if one is at work there."""
    make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArgumentError("output", str(folder), "a folder that no other job writes at this time") from None
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP):  # network file systems have no locks
                raise
        yield
    finally:
        os.close(descriptor)


def is_done(folder: Path, origin: Origin) -> bool:
    """Whether the folder holds this table already. ArgumentError if it holds another, or what is not ours."""
    if not folder.exists():
        return False
    names = {path.name for path in folder.iterdir()} - PARTIALS
    ours = not names or (MARKER in names and names <= {MARKER, MANIFEST, SUMMARY, STATISTICS, *FOLDERS})
    require(ours, "output", str(folder), "a folder that is empty or does not exist")
    if MANIFEST not in names:
        return False  # a run that was killed: its files are written again
    manifest = read_manifest(folder)
    same = manifest["config"] == origin.config and manifest["input"] == origin.input
    require(same, "output", str(folder), "a new folder: it holds a table of another input or configuration")
    check_files(folder, manifest)
    return True


def begin(folder: Path) -> None:
    """An empty folder; what a run left that was killed is removed, for it may have cut its input in other pieces.

    ArgumentError if there is something, and nothing says that it is ours.
    """
    make_folder(folder)
    ours = (folder / MARKER).exists() or not any(path.name not in PARTIALS for path in folder.iterdir())
    require(ours, "output", str(folder), "a folder that is empty or does not exist")
    write_whole(folder / MARKER, lambda file: file.write(b"written by spark_jobs/prepare.py\n"), mode=0o600)
    for name in (SUMMARY, *PARTIALS):
        (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        make_folder(folder / name)
        (folder / name).chmod(0o700)  # the sizes of files tell how many rows they have
        for left in (folder / name).glob("*part-*"):
            left.unlink()


def finish(
    folder: Path, schema: Schema, origin: Origin, done: list[dict[str, Any]], released: Mapping[str, Any] | None
) -> None:
    """Add up what was done; the manifest comes last, and says that the table is whole.

    done: of pieces, `rows` that were read and `reasons` for those that cannot be used; a file of each split; how many
    rows are a `surplus` of their user.
    """
    splits = {split: [each[split] for each in done if split in each] for split in SPLITS}
    rows = {split: sum(file["rows"] for file in files) for split, files in splits.items()}
    reasons = sum((Counter(each.get("reasons", {})) for each in done), Counter())
    read, surplus = (sum(each.get(what, 0) for each in done) for what in ("rows", "surplus"))
    whole = read == sum(rows.values()) + reasons.total() + surplus
    assert whole, f"rows were lost: {read} read, {rows}, {reasons}, {surplus} more than are kept of a user"
    require(rows["train"] > 0, "input", "no row to train on", "with one; private/ says what is wrong with the others")
    public = {
        "format": FORMAT,
        "name": schema.name,
        "config": origin.config,
        "privacy_unit": schema.unit,
        "evaluation": origin.evaluation,
        "versions": dict(origin.versions),
        # Not those of the splits: a hash of a row decides, and whether it can be used; and users have several.
        **({"rows_read": read} if schema.size_is_public and schema.user is None else {}),
        **({"statistics": released} if released is None or released["dp"] else {}),
    }
    counts = {"read": read, **rows, "bad": dict(reasons), "surplus": surplus}
    private = {"input": origin.input, "rows": counts, "statistics": released, "files": splits}
    for left in (left for name in FOLDERS for left in (folder / name).glob(".*.partial")):
        left.unlink(missing_ok=True)  # of a worker that was killed, and whose work another did
    check_files(folder, private)
    write_whole(folder / SUMMARY, lambda file: file.write(_json(public)))
    write_whole(folder / MANIFEST, lambda file: file.write(_json({**public, **private})), mode=0o600)


def contract(manifest: Mapping[str, Any]) -> str:
    """The schema's text, with the statistics that were computed."""
    return statistics.declared(manifest["config"], manifest["statistics"])


def record(folder: Path, origin: Origin, released: Mapping[str, Any]) -> None:
    """Before anything is made of them, so that a run that is begun again takes the same, and no new noise."""
    content = {"format": FORMAT, "config": origin.config, "input": origin.input, "released": released}
    write_whole(folder / STATISTICS, lambda file: file.write(_json(content)), mode=0o600)


def recorded(folder: Path, origin: Origin) -> dict[str, Any] | None:
    """The statistics that were computed of this input already. ArgumentError if they are of another, or altered."""
    path = folder / STATISTICS
    if not path.exists():
        return None
    content = _read(path, "output")
    same = content["config"] == origin.config and content["input"] == origin.input
    require(same, "output", str(folder), f"a new folder: its {STATISTICS} is of another input or configuration")
    released: dict[str, Any] = content["released"]
    return released


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder holds; ArgumentError unless that is a whole table."""
    return _read(folder / MANIFEST, "data")


def _read(path: Path, argument: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = content["sha256"] == _digest(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        bound = f"a prepared table whose {path.name} can be read ({error})"
        raise ArgumentError(argument, str(path.parent), bound) from error
    require(content.get("format") == FORMAT, argument, content.get("format"), f"of the format {FORMAT!r}")
    require(whole, argument, str(path), "unaltered: it is not what was written")
    return content


def check_files(folder: Path, manifest: Mapping[str, Any], sums: bool = False) -> None:
    """ArgumentError unless all files of the manifest are there, of its sizes, and if `sums`, of its checksums."""
    for each in (file for split in SPLITS for file in manifest["files"][split]):
        path = folder / each["file"]
        size = path.stat().st_size if path.is_file() else None
        require(size == each["bytes"], f"data: size of {path}", size, f"{each['bytes']}, as its {MANIFEST} says")
        if sums:
            found, known = _sha256(path), each["sha256"]
            require(found == known, f"data: sha256 of {path}", found, f"{known}, as its {MANIFEST} says")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n").encode()
