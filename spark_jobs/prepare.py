"""Raw tables to Arrow files that any number of ranks map into memory, on this machine or on a cluster.

    spark-submit spark_jobs/prepare.py --config loans.toml --input raw/ --output prepared/
    python spark_jobs/prepare.py --config loans.toml --input 'raw/*.csv.gz' --output prepared/
    python spark_jobs/prepare.py --suggest --input raw/ > loans.toml

The last line drafts the configuration, from the first rows; see fastdp/suggest.py. It needs neither Spark nor Java.
Input and output must be folders that all machines see under the same names. Spark distributes pieces of the files; what
becomes of a piece is in fastdp/pieces.py and fastdp/transform.py, and what the output holds in fastdp/shards.py.
Without a master (spark-submit's, or spark.master in Spark's configuration), all cores of this machine are used.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import cyclopts
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fastdp
from fastdp import pieces, shards, statistics, suggest, users
from fastdp.columns import Schema
from fastdp.errors import ArgumentError, require
from fastdp.pieces import Piece, Source
from fastdp.schema import check_marks, parse_schema

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark import SparkContext
    from pyspark.sql import DataFrame

JAVA: Final = 17  # the oldest that Spark 4 runs on

# What executors need of fastdp, which need not be installed there; pyarrow and numpy must be.
SHIPPED: Final = (
    *("errors", "disk", "columns", "schema", "cells", "csvrows", "files"),
    *("statistics", "arrowfiles", "shards", "transform", "users", "pieces"),
)


def prepare(config: str, inputs: list[str], test_inputs: list[str], output: Path) -> str:
    """What `main` does; returns a sentence about it."""
    check_marks(config)
    schema = parse_schema(config)
    check_pyspark()
    check_java()
    sources = list_sources(inputs, "input", "train" if test_inputs else None)
    trained_on = {identity(Path(source.path)) for source in sources}
    for source in list_sources(test_inputs, "test_input", "test") if test_inputs else []:
        again = identity(Path(source.path)) in trained_on
        require(not again, "test_input", source.path, "without files that are also input: they are trained on")
        sources.append(source)
    origin = origin_of(config, sources)
    for source in sources:
        apart = output.resolve() not in Path(source.path).resolve().parents
        require(apart, "output", str(output), f"a folder without input, as {source.path} is")
    for text in (*inputs, *test_inputs):
        apart = not Path(text).is_dir() or Path(text).resolve() not in (output.resolve(), *output.resolve().parents)
        require(apart, "output", str(output), f"outside of the input {text}, or it is input the next time")
    parse_with(config, statistics.placeholders(schema))  # before anything is computed
    cut = [piece for source in sources for piece in pieces.cut(source, schema)]
    with shards.locked(output):
        if shards.is_done(output, origin):
            return f"{output} is there already, of the same input and configuration"
        shards.begin(output)
        with connected() as spark:
            write(spark, cut, schema, origin, output)
    counts = shards.read_manifest(output)["rows"]
    if sum(counts["bad"].values()) >= counts["read"] / 10:
        sys.stderr.write(f"prepare: warning: many rows cannot be used; {output / 'private'} has them, and why\n")
    ready = f"{output} is ready for python -m fastdp.train --data {output}"
    return f"{ready}; its manifest.json says how many rows it has, and why others cannot be used"


def write(spark: SparkContext, cut: list[Piece], schema: Schema, origin: shards.Origin, output: Path) -> None:
    """Make the prepared table of pieces in an empty folder; see fastdp/shards.py."""
    work = [replace(piece, number=number) for number, piece in enumerate(know_quotes(spark, cut, schema))]
    make = write_rows if schema.user is None else write_users
    try:
        done, released = make(spark, work, schema, origin, output)
    except OSError as error:
        raise unwritable(output, error) from error
    for source in {piece.source for piece in work}:
        same = pieces.source(Path(source.path), source.name, source.split) == source
        require(same, "input", source.path, "left as it is while it is prepared")
    shards.finish(output, schema, origin, done, released)


def write_rows(
    spark: SparkContext, work: list[Piece], schema: Schema, origin: shards.Origin, output: Path
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """What was done, and what statistics were released."""

    def sums() -> list[statistics.Sums]:
        return distribute(spark, work, lambda piece: pieces.sums(piece, schema), "statistics")

    released = release(sums, schema, origin, output)
    known = parse_with(origin.config, released)
    return distribute(spark, work, lambda piece: pieces.prepare(piece, known, output), "rows to Arrow"), released


def write_users(
    spark: SparkContext, work: list[Piece], schema: Schema, origin: shards.Origin, output: Path
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """As `write_rows`, of the records that are kept of each user; see fastdp/users.py."""
    from pyspark import TaskContext
    from pyspark.sql import SparkSession

    by_hash = origin.evaluation != shards.FILES

    def records(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        try:
            for number in (number for batch in batches for number in batch.column(0).to_pylist()):
                yield from pieces.records(work[number], schema, output)
        except ArgumentError as error:  # would be the same again
            yield users.result(users.RECORDS, as_result(error))
        except OSError as error:
            yield users.result(users.RECORDS, as_result(unwritable(output, error)))

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        context = TaskContext.get()
        assert context is not None
        try:
            yield from users.write(batches, context.partitionId(), known, output)
        except OSError as error:
            yield users.result(users.KEPT, as_result(unwritable(output, error)))

    order = [name for name in users.RECORDS.replace(",", "").split()[::2] if name != "result"]
    partitions = 1 + sum(source.bytes for source in {piece.source for piece in work}) // pieces.PIECE_BYTES
    numbers = SparkSession(spark).range(0, len(work), 1, max(1, len(work)))
    together = numbers.mapInArrow(records, users.RECORDS).repartition(partitions, "user")
    kept = together.sortWithinPartitions(*order).mapInArrow(lambda rows: users.keep(rows, schema, by_hash), users.KEPT)
    if schema.unknown:
        kept = kept.persist()  # read twice

    def sums() -> list[statistics.Sums]:
        found = collect(spark, kept.mapInArrow(lambda rows: users.sums(rows, schema), users.KEPT), "statistics", 0)
        return [each["sums"] for each in found if "sums" in each]

    released = release(sums, schema, origin, output)
    known = parse_with(origin.config, released)
    done = collect(spark, kept.mapInArrow(write, users.KEPT), "users to Arrow", len(work) + partitions)
    kept.unpersist()
    return done, released


def parse_with(config: str, released: dict[str, Any] | None) -> Schema:
    """The schema with what was computed for it."""
    try:
        return parse_schema(statistics.declared(config, released))
    except ArgumentError as error:
        bound = f"such that [statistics.COLUMN] tables can follow at its end ({error})"
        raise ArgumentError("config", "statistics", bound) from error


def release(
    sums: Callable[[], list[statistics.Sums]], schema: Schema, origin: shards.Origin, output: Path
) -> dict[str, Any] | None:
    """The statistics that the schema leaves open, noise and all: once for an input and a folder."""
    released = shards.recorded(output, origin)  # or those of another table, which may not stay there
    if not schema.unknown:
        return None
    if released is None:
        released = statistics.release(statistics.added(sums()), schema)
        shards.record(output, origin, released)
    return released


def origin_of(config: str, sources: list[Source]) -> shards.Origin:
    """What the table is made of."""
    schema = parse_schema(config)
    by = {"content": "what they hold", "place": "their place in the input"}[schema.preparation.split_by]
    held_out = f"rows held out by a hash of {by}" if schema.user is None else "rows of users held out by a hash of them"
    of_files = any(source.split is not None for source in sources)
    return shards.Origin(config, shards.fingerprint(sources), versions(), shards.FILES if of_files else held_out)


def list_sources(inputs: list[str], argument: str, split: Literal["train", "test"] | None) -> list[Source]:
    """The input's files in order of their names, which say where in a folder they lie; or ArgumentError."""
    found: dict[str, Path] = {}
    seen: set[tuple[int, int]] = set()
    for text in inputs:
        matching = [Path(text)] if Path(text).exists() else sorted(map(Path, glob.glob(text, recursive=True)))
        require(bool(matching), argument, text, "a file, a folder or a pattern that matches some")
        for path in matching:
            for file in sorted(files_in(path)) if path.is_dir() else [path]:
                name = file.relative_to(path if path.is_dir() else path.parent).as_posix()
                if file != Path(text) and any(part[0] in "._" for part in Path(name).parts):
                    continue  # Spark writes _SUCCESS and .part-0.crc
                try:
                    which = identity(file)
                except OSError as error:
                    raise ArgumentError(argument, str(file), f"a file that can be read ({error.strerror})") from error
                if which in seen:
                    continue  # it has several names, of which a pattern may match a folder and what is in it
                seen.add(which)
                require(name not in found, "input", str(file), "of another name than other files")
                found[name] = file
    require(bool(found), argument, inputs, "with at least one file")
    return [pieces.source(found[name], name, split) for name in sorted(found)]


def identity(file: Path) -> tuple[int, int]:
    """The same for all names of a file, links of either kind among them."""
    about = file.stat()
    return about.st_dev, about.st_ino


def files_in(folder: Path) -> Iterator[Path]:
    """Of all folders in it, links to such, too."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        yield from (Path(root, name) for name in names)


def know_quotes(spark: SparkContext, work: list[Piece], schema: Schema) -> list[Piece]:
    """Pieces of CSV files with whether each begins within quotation marks: their numbers before it, added up."""
    unknown = {piece.source.path for piece in work if piece.inside is not None and piece.source.kind == "csv"}
    if not unknown or not (schema.layout.quotes and schema.layout.multiline):
        return work
    counted = [piece for piece in work if piece.source.path in unknown]
    counts = iter(distribute(spark, counted, pieces.quotes, "quotation marks"))
    known, before, path = [], 0, ""
    for piece in work:
        if piece.source.path in unknown:
            before, path = before if piece.source.path == path else 0, piece.source.path
            piece = piece if piece.inside is None else replace(piece, inside=before % 2 == 1)
            before += next(counts)
        known.append(piece)
    return known


def distribute(spark: SparkContext, work: list[Piece], function: Callable[[Piece], Any], what: str) -> list[Any]:
    """function(piece) for each, in order, on Spark's executors; or the first error."""

    def run(piece: Piece) -> Any:
        try:
            return function(piece)
        except (ArgumentError, OSError) as error:  # would be the same again: no matter for Spark's retries
            return error

    with progress(spark, what, len(work)):  # not a frame: Spark SQL takes 6 s to get ready
        return checked(spark.parallelize(work, max(1, len(work))).map(run).collect())


def collect(spark: SparkContext, frame: DataFrame, what: str, tasks: int) -> list[Any]:
    """The results in a frame's JSON, or the first ArgumentError in it."""
    with progress(spark, what, tasks):
        results = [json.loads(row.result) for row in frame.collect()]
    return checked([ArgumentError(*each["error"]) if "error" in each else each["result"] for each in results])


def as_result(error: ArgumentError) -> str:
    """For `collect`, which raises it again."""
    return json.dumps({"error": [error.name, str(error.value), error.bound]})


def unwritable(output: Path, error: OSError) -> ArgumentError:
    return ArgumentError("output", str(output), f"a folder that can be written to ({error.strerror})")


def checked(results: list[Any]) -> list[Any]:
    """The results, or the first error among them."""
    for result in results:
        if isinstance(result, (ArgumentError, OSError)):
            raise result
    return results


@contextmanager
def progress(spark: SparkContext, what: str, total: int) -> Iterator[None]:
    """A line on a terminal that says how many pieces are done."""
    tracker, ended = spark.statusTracker(), threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)

        def watch() -> None:
            while not ended.wait(0.3):
                stages = [tracker.getStageInfo(stage) for stage in tracker.getActiveStageIds()]
                bar.update(task, completed=sum(stage.numCompletedTasks for stage in stages if stage is not None))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


class SparkError(RuntimeError):
    """Spark gave up, and not for a reason that our own code gave."""


@contextmanager
def connected() -> Iterator[SparkContext]:
    """A connection to Spark that ends with the block, and has what executors need."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else the workers are the `python3` of PATH
    from py4j.protocol import Py4JError
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkException

    # A SparkConf made before knows nothing of spark-submit's options. What Java writes to its temporary folders, users
    # and their records say, is for nobody else.
    before = os.umask(0o077)
    try:
        SparkContext._ensure_initialized()
    finally:
        os.umask(before)
    conf = SparkConf()
    for key, value in {
        "spark.master": "local[*]",
        "spark.app.name": "fastdp prepare",
        "spark.ui.enabled": "false",
        "spark.sql.catalogImplementation": "in-memory",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "65536",  # what becomes a batch of a file
        "spark.pyspark.driver.python": sys.executable,
        "spark.pyspark.python": sys.executable,
    }.items():
        conf.setIfMissing(key, value)
    conf.set("spark.ui.showConsoleProgress", "false")  # which is on for whatever does not run under spark-submit
    spark = SparkContext(conf=conf)
    try:
        spark.setLogLevel("ERROR")
        with tempfile.TemporaryDirectory() as folder:
            if not re.match(r"local(\[|$)", spark.master):
                spark.addPyFile(str(pack(Path(folder))))
            yield spark
    except (Py4JError, PySparkException) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise SparkError(next((line for line in lines if "Job aborted" in line), lines[0])) from error
    finally:
        spark.stop()


def pack(folder: Path) -> Path:
    """The modules that executors need, as a package without the rest."""
    path = folder / "fastdp_executor.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fastdp/__init__.py", "")
        for name in SHIPPED:
            module = importlib.util.find_spec(f"fastdp.{name}")  # one folder has them all, but for `pip install -e`
            assert module is not None and module.origin is not None
            archive.write(module.origin, f"fastdp/{name}.py")
    return path


def check_pyspark() -> None:
    try:
        import pyspark  # noqa: F401
    except ImportError as error:
        raise ArgumentError("pyspark", f"absent ({error})", "installed: pip install 'fastdp[spark]'") from None


def check_java() -> None:
    """ArgumentError unless there is a Java that Spark runs on."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    cure = f"Java {JAVA} or newer, which Spark runs on: install openjdk-{JAVA}-jre-headless, or set JAVA_HOME"
    require(java is not None, "java", home, cure)
    assert java is not None
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    require(version is not None and int(version[1]) >= JAVA, java, said.split("\n")[0], cure)


def versions() -> dict[str, str]:
    """Of what the output may depend on."""
    import pyarrow
    import pyspark

    return {
        "fastdp": fastdp.__version__,
        "pyspark": pyspark.__version__,
        "pyarrow": pyarrow.__version__,
        "python": platform.python_version(),
    }


def write_draft(inputs: list[str], config: Path | None) -> None:
    """A draft of a configuration for these inputs, to a file that is not there yet, or to standard output."""
    there = config is not None and config.exists()
    require(not there, "config", str(config), "a file that does not exist yet: the draft overwrites none")
    draft = suggest.draft(list_sources(inputs, "input", None))
    if config is None:
        print(draft, end="")
        return
    with config.open("x", encoding="utf-8") as file:
        file.write(draft)


app = cyclopts.App(name="prepare.py", version=fastdp.__version__, suppress_keyboard_interrupt=False)


@app.default
def command(
    *,
    config: Annotated[
        Path | None, cyclopts.Parameter(help="the TOML file that declares the columns (see fastdp/schema.py)")
    ] = None,
    input: Annotated[list[str], cyclopts.Parameter(consume_multiple=True, help="files, folders or patterns")],
    test_input: Annotated[
        list[str], cyclopts.Parameter(consume_multiple=True, help="such, all of whose rows are test rows")
    ] = [],  # noqa: B006 cyclopts copies it
    output: Annotated[Path | None, cyclopts.Parameter(help="a new folder, or one of a run that was killed")] = None,
    suggest: Annotated[
        bool, cyclopts.Parameter(negative="", help="only draft such a TOML file, from the first rows of the input")
    ] = False,
) -> None:
    """Prepare a table for `python -m fastdp.train --data FOLDER`."""
    started = time.monotonic()
    if suggest:
        require(output is None, "output", str(output), "left out with --suggest, which prepares nothing")
        write_draft([*input, *test_input], config)
        return
    require(config is not None and config.is_file(), "config", config and str(config), "a TOML file that exists")
    require(output is not None and not output.is_file(), "output", output and str(output), "a folder")
    assert config is not None and output is not None
    done = prepare(config.read_text(encoding="utf-8"), input, test_input, output.absolute())
    print(f"{done} ({time.monotonic() - started:.1f} s)")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (cyclopts.CycloptsError, ArgumentError, OSError, UnicodeError, SparkError) as error:
        sys.stderr.write(f"prepare: error: {' '.join(str(error).split())}\n")
        return 1 if isinstance(error, SparkError) else 2
    except KeyboardInterrupt:
        sys.stderr.write("prepare: interrupted; the same command again begins anew\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
