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
from fastdp import pieces, shards, suggest
from fastdp.columns import Schema
from fastdp.errors import ArgumentError, require
from fastdp.pieces import Piece, Source
from fastdp.schema import parse_schema

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

JAVA: Final = 17  # the oldest that Spark 4 runs on

# What executors need of fastdp, which need not be installed there; pyarrow and numpy must be.
SHIPPED: Final = ("errors", "disk", "columns", "schema", "files", "csvrows", "shards", "transform", "pieces")


def prepare(config: str, inputs: list[str], test_inputs: list[str], output: Path) -> str:
    """What `main` does; returns a sentence about it."""
    schema = parse_schema(config)
    user = None if schema.user is None else schema.user.name
    require(user is None, "type of column", user, "another than user: this version protects rows")
    check_java()
    sources = list_sources(inputs, "input", "train" if test_inputs else None)
    trained_on = {os.path.realpath(source.path) for source in sources}
    for source in list_sources(test_inputs, "test_input", "test") if test_inputs else []:
        again = os.path.realpath(source.path) in trained_on
        require(not again, "test_input", source.path, "without files that are also input: they are trained on")
        sources.append(source)
    origin = origin_of(config, sources)
    cut = [piece for source in sources for piece in pieces.cut(source, schema)]
    with shards.locked(output):
        if shards.is_done(output, origin):
            return f"{output} is there already, of the same input and configuration"
        shards.begin(output)
        with session() as spark:
            write(spark, cut, schema, origin, output)
    return f"{output} is ready for python -m fastdp.train --data {output}; how many rows it has is in its manifest.json"


def write(spark: SparkSession, cut: list[Piece], schema: Schema, origin: shards.Origin, output: Path) -> None:
    """Make the prepared table of pieces in an empty folder; see fastdp/shards.py."""
    work = [replace(piece, number=number) for number, piece in enumerate(know_quotes(spark, cut, schema))]
    written = distribute(spark, work, lambda piece: pieces.prepare(piece, schema, output), "rows to Arrow")
    shards.finish(output, schema, origin, written)


def origin_of(config: str, sources: list[Source]) -> shards.Origin:
    """What the table is made of."""
    by = {"content": "what they hold", "place": "their place in the input"}[parse_schema(config).preparation.split_by]
    of_files = any(source.split is not None for source in sources)
    evaluation = shards.FILES if of_files else f"rows held out by a hash of {by}"
    return shards.Origin(config, shards.fingerprint(sources), versions(), evaluation)


def list_sources(inputs: list[str], argument: str, split: Literal["train", "test"] | None) -> list[Source]:
    """The input's files in order of their names, which say where in a folder they lie; or ArgumentError."""
    found: dict[str, Path] = {}
    for text in inputs:
        matching = [Path(text)] if Path(text).exists() else sorted(map(Path, glob.glob(text, recursive=True)))
        require(bool(matching), argument, text, "a file, a folder or a pattern that matches some")
        for path in matching:
            inside = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in inside:
                name = file.relative_to(path if path.is_dir() else path.parent).as_posix()
                if file.is_dir() or any(part[0] in "._" for part in Path(name).parts):
                    continue  # Spark writes _SUCCESS and .part-0.crc
                require(
                    name not in found or found[name] == file, "input", str(file), "of another name than other files"
                )
                found[name] = file
    require(bool(found), argument, inputs, "with at least one file")
    return [pieces.source(found[name], name, split) for name in sorted(found)]


def know_quotes(spark: SparkSession, work: list[Piece], schema: Schema) -> list[Piece]:
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


def distribute(spark: SparkSession, work: list[Piece], function: Callable[[Piece], Any], what: str) -> list[Any]:
    """function(piece) for each, in order, on Spark's executors; the results travel as JSON."""

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        for batch in batches:
            for number in batch.column(0).to_pylist():
                try:
                    result = {"result": function(work[number])}
                except ArgumentError as error:  # would be the same again
                    result = {"error": [error.name, str(error.value), error.bound]}
                yield pa.RecordBatch.from_pydict({"number": [number], "result": [json.dumps(result)]})

    numbers = spark.range(0, len(work), 1, max(1, len(work)))
    with progress(spark, what, len(work)):
        rows = numbers.mapInArrow(run, "number long, result string").collect()
    results = [json.loads(row.result) for row in sorted(rows, key=lambda row: row.number)]
    for result in results:
        if "error" in result:
            raise ArgumentError(*result["error"])
    return [result["result"] for result in results]


@contextmanager
def progress(spark: SparkSession, what: str, total: int) -> Iterator[None]:
    """A line on a terminal that says how many pieces are done."""
    tracker, ended = spark.sparkContext.statusTracker(), threading.Event()
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


@contextmanager
def session() -> Iterator[SparkSession]:
    """A Spark session that ends with the block, and has what executors need."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else the workers are the `python3` of PATH
    from pyspark import SparkConf, SparkContext
    from pyspark.sql import SparkSession

    SparkContext._ensure_initialized()  # a SparkConf made before knows nothing of spark-submit's options
    conf = SparkConf()
    for key, value in {
        "spark.master": "local[*]",
        "spark.app.name": "fastdp prepare",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.catalogImplementation": "in-memory",
        "spark.pyspark.driver.python": sys.executable,
        "spark.pyspark.python": sys.executable,
    }.items():
        conf.setIfMissing(key, value)
    spark = SparkSession.builder.config(conf=conf).getOrCreate()
    try:
        spark.sparkContext.setLogLevel("ERROR")
        with tempfile.TemporaryDirectory() as folder:
            if not spark.sparkContext.master.startswith("local"):
                spark.sparkContext.addPyFile(str(pack(Path(folder))))
            yield spark
    finally:
        spark.stop()


def pack(folder: Path) -> Path:
    """The modules that executors need, as a package without the rest."""
    path = folder / "fastdp_executor.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fastdp/__init__.py", "")
        for name in SHIPPED:
            archive.write(Path(fastdp.__path__[0]) / f"{name}.py", f"fastdp/{name}.py")
    return path


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


def main(
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
) -> int:
    """Prepare a table for `python -m fastdp.train --data FOLDER`."""
    started = time.monotonic()
    try:
        if suggest:
            require(output is None, "output", str(output), "left out with --suggest, which prepares nothing")
            write_draft([*input, *test_input], config)
            return 0
        require(config is not None and config.is_file(), "config", config and str(config), "a TOML file that exists")
        require(output is not None, "output", output, "a folder")
        assert config is not None and output is not None
        done = prepare(config.read_text(encoding="utf-8"), input, test_input, output.absolute())
    except (ArgumentError, OSError, UnicodeError) as error:
        sys.stderr.write(f"prepare: error: {' '.join(str(error).split())}\n")
        return 2
    print(f"{done} ({time.monotonic() - started:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(cyclopts.run(main))
