"""The column contract of a table: what each column may hold, and how it becomes features, declared in a TOML file.

Nothing is computed from the records: bounds, vocabularies, bins and fill values are declared and public, so that the
encoding of a row depends on that row alone and costs no privacy (P11). datasets/adult.toml is a complete example.

    format = 1                      # of this file
    name = "loans"
    size_is_public = false          # whether the number of rows is known anyway
    # title = "..."                 # for readers

    [file]                          # how cells are written; all of it may be left out
    header = true                   # CSV: the first line names the columns, in any order; false: they come as below
    delimiter = ","                 # CSV
    comment = ""                    # CSV: lines at the top of a file that begin so are passed over
    strip = true                    # blanks around texts do not count
    nulls = [""]                    # texts that mean "missing", like nulls, unless a vocabulary has them; in number
                                    # columns of Parquet and Arrow, too: nulls = ["-999"] means the number as well
    quotes = true                   # CSV: quotation marks enclose cells; false: they are characters like others
    multiline = false               # CSV: cells in quotation marks may hold line feeds. Then a stray mark swallows the
                                    # rows after it, so that one record decides about others

    [[column]]                      # one per column of the file, under its name
    name = "age"
    type = "number"                 # also texts that are numbers; NaN and infinities are errors
    bounds = [18, 90]               # values outside are clamped
    scale = "linear"                # maps bounds to [0, 1]; "log": so for log(1 + value - low); "none": bins only
    bins = [30, 60]                 # k edges, k + 1 indicator features: value < 30, 30 <= value < 60, value >= 60
    missing = 40                    # stands for a missing value; "indicator": a feature of its own, the others are 0;
                                    # "mean": see [statistics]
    standardize = false             # true: what `scale` gives, less its mean and divided by its deviation

    [[column]]
    name = "job"
    type = "category"               # texts, integers or booleans, as texts: "1", "true"
    values = ["clerk", ["none", "?"]]   # one indicator feature each; a list holds spellings of one value
    missing = "none"                # one of the values; or "mode", the most frequent one: see [statistics]
    other = "none"                  # the value, or one more, that texts outside the vocabulary count as
    encode = "one-hot"              # "code": no feature, but a column of `categories`, for models that embed it

    [[column]]
    name = "member"
    type = "boolean"                # one feature, 0 or 1
    values = [["false", "0"], ["true", "1"]]    # these are taken if there are none here
    missing = "false"               # one of the values

    [[column]]
    name = "zip"
    type = "ignore"                 # not a feature; the file may lack it

    [[column]]                      # exactly one column is a label or a target
    name = "repaid"
    type = "label"                  # classification; two classes or more
    values = ["no", "yes"]          # as for categories: class 0, class 1, ...

    # [[column]]
    # name = "amount"
    # type = "target"               # regression
    # bounds = [0, 50000]           # targets are clamped; the model is trained on the scaled ones
    # scale = "linear"              # or "log"

    [prepare]                       # for spark_jobs/prepare.py only, as columns of type "user" are
    test = 0.2                      # share of the rows that are held out, by a hash
    key = "a public text"           # of that hash
    split_by = "content"            # hash of what the row holds: no row then decides about another, and equal rows go
                                    # together. "place": of the file's name and the row's place in it, for tables with
                                    # few different rows; neighbouring tables are then those in which one row is blank
    # records_per_user = 1          # with a column of type "user", which then decides what is held out: rows of a user
                                    # that are kept, by a hash of what they hold
    # privacy_unit = "user"         # what epsilon protects; "record" must be said if several of a user are kept
    stats = "declared"              # where [statistics] come from that are not declared: "dp": from the training rows,
                                    # with Gaussian noise, which is part of every epsilon of that table; each folder
                                    # that is prepared is a release of its own. "non-private": without noise, and
                                    # there is no epsilon
    # noise_multiplier = 20         # for "dp": the noise's standard deviation over the sensitivity of all sums together

    # [statistics.age]              # for `missing = "mean"` and `standardize`: of the numbers scaled to [0, 1]
    # mean = 0.3
    # deviation = 0.2

    # [statistics.job]              # for `missing = "mode"`
    # mode = "clerk"

A missing value without `missing`, and always in a label or target, is an error, as is a column that is not declared.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Mapping
from typing import Any, Final

from fastdp.columns import Column, Layout, Preparation, Schema
from fastdp.errors import ArgumentError, require

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]


def parse_schema(text: str) -> Schema:
    """A column contract from the text of its TOML file.

    Raises:
        ArgumentError: naming the column, and the field that is missing, unknown or out of its bounds.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError("schema", " ".join(str(error).split()), "TOML") from None
    require(document.get("format") == 1, "format", document.get("format"), "1, the format that this version reads")
    known = {"format", "name", "title", "size_is_public", "file", "column", "prepare", "statistics"}
    _only(document, "schema", known)
    name: Any = document.get("name")
    require(isinstance(name, str) and name != "", "name", name, "a name for the table")
    size_is_public: Any = document.get("size_is_public", False)
    require(isinstance(size_is_public, bool), "size_is_public", size_is_public, "true or false")
    layout = _parse_layout(document.get("file", {}))
    tables: Any = document.get("column", [])
    good = isinstance(tables, list) and all(isinstance(fields, dict) for fields in tables)
    require(good, "column", tables, "[[column]] tables")
    columns = tuple(_parse_column(fields, layout) for fields in tables)
    names = [column.name for column in columns]
    require(len(set(names)) == len(names), "column", names, "of different names")
    columns = _with_statistics(columns, document.get("statistics", {}))
    labels = [column.name for column in columns if column.type in ("label", "target")]
    require(len(labels) == 1, "label", labels, "exactly one column of type label or target")
    users = [column.name for column in columns if column.type == "user"]
    require(len(users) <= 1, "user", users, "at most one column")
    preparation = _parse_preparation(document.get("prepare", {}), users)
    schema = Schema(name, size_is_public, columns, layout, preparation)
    declared = not schema.unknown or preparation.statistics != "declared"
    require(declared, "prepare.stats", "declared", f"'dp' or 'non-private', or [statistics] with {schema.unknown}")
    require(len(schema.feature_names) + len(schema.coded) > 0, "column", names, "such that there is a feature")
    return schema


MARK: Final = "# private: declare it or make it DP"  # of a draft by suggest.py


def check_marks(text: str) -> None:
    """ArgumentError while a draft's text holds what was taken from the rows and nobody has declared since."""
    for number, line in enumerate(text.splitlines(), 1):
        require(MARK not in line, f"line {number}", line, f"declared, and without the mark {MARK!r}")


def _parse_layout(fields: Any) -> Layout:
    require(isinstance(fields, dict), "file", fields, "a [file] table")
    _only(fields, "file", {"header", "delimiter", "comment", "strip", "nulls", "quotes", "multiline"})
    header, strip, quotes = (fields.get(key, True) for key in ("header", "strip", "quotes"))
    multiline = fields.get("multiline", False)
    for key, value in (("header", header), ("strip", strip), ("quotes", quotes), ("multiline", multiline)):
        require(isinstance(value, bool), f"file.{key}", value, "true or false")
    delimiter, comment, nulls = fields.get("delimiter", ","), fields.get("comment", ""), fields.get("nulls", [""])
    one = isinstance(delimiter, str) and len(delimiter.encode()) == 1 and delimiter not in '"\r\n'
    require(one, "file.delimiter", delimiter, "one ASCII character, not a quotation mark or a line's end")
    require(isinstance(comment, str), "file.comment", comment, "a text")
    require(isinstance(nulls, list) and all(isinstance(n, str) for n in nulls), "file.nulls", nulls, "a list of texts")
    bare = not strip or all(text == text.strip() for text in nulls)
    require(bare, "file.nulls", nulls, "without blanks around them, or [file] strip = false")
    return Layout(header, delimiter, comment, strip, tuple(nulls), quotes, multiline)


def _parse_preparation(fields: Any, users: list[str]) -> Preparation:
    require(isinstance(fields, dict), "prepare", fields, "a [prepare] table")
    known = {"test", "key", "split_by", "records_per_user", "privacy_unit", "stats", "noise_multiplier"}
    _only(fields, "prepare", known)
    test, key = fields.get("test", 0.2), fields.get("key", "fastdp")
    require(_is_number(test) and 0 <= test < 1, "prepare.test", test, "in [0, 1)")
    require(isinstance(key, str) and key != "", "prepare.key", key, "a text")
    split_by: Any = fields.get("split_by", "content")
    require(split_by in ("content", "place"), "prepare.split_by", split_by, "'content' or 'place'")
    count: Any = _parse_unit(fields, users)
    stats, noise = fields.get("stats", "declared"), fields.get("noise_multiplier")
    require(stats in ("declared", "dp", "non-private"), "prepare.stats", stats, "'declared', 'dp' or 'non-private'")
    if stats == "dp":
        # From 0.5 on, what the generator's tails lack (they end at 8.5 deviations) is less than 1e-10 of delta.
        require(_is_number(noise) and 0.5 <= noise <= 1e6, "prepare.noise_multiplier", noise, "in [0.5, 1e6]")
    else:
        require(noise is None, "prepare.noise_multiplier", noise, "absent unless stats = 'dp'")
    return Preparation(float(test), key, split_by, count, stats, 0.0 if noise is None else float(noise))


def _parse_unit(fields: Mapping[str, Any], users: list[str]) -> int:
    """Records that are kept of a user."""
    count, unit = fields.get("records_per_user"), fields.get("privacy_unit")
    for name, value in (("records_per_user", count), ("privacy_unit", unit)):
        require(value is None or bool(users), f"prepare.{name}", value, "absent: no column has the type user")
    count, unit = 1 if count is None else count, "user" if unit is None else unit
    whole = isinstance(count, int) and not isinstance(count, bool) and 1 <= count < 2**31
    require(whole, "prepare.records_per_user", count, "an integer >= 1")
    expected = "user" if count == 1 else "record"
    bound = f"{expected!r}: with records_per_user = {count}, epsilon protects one {expected}"
    require(unit == expected, "prepare.privacy_unit", unit, bound)
    return int(count)


def _with_statistics(columns: tuple[Column, ...], tables: Any) -> tuple[Column, ...]:
    require(isinstance(tables, dict), "statistics", tables, "[statistics.COLUMN] tables")
    unused = sorted(set(tables) - {column.name for column in columns if column.statistics})
    require(not unused, "statistics", unused, "of columns that use them only")
    return tuple(_with_its_own(column, tables[column.name]) if column.name in tables else column for column in columns)


def _with_its_own(column: Column, fields: Any) -> Column:
    where = f"statistics.{column.name}"
    require(isinstance(fields, dict), where, fields, "a table")
    _only(fields, where, set(column.statistics))
    mean, deviation, mode = (fields.get(name) for name in ("mean", "deviation", "mode"))
    if column.spellings is not None:
        known = isinstance(mode, str) and mode in column.spellings
        require(known, f"{where}.mode", mode, "one of the column's values")
        return dataclasses.replace(column, mode=column.spellings[str(mode)])
    require(_is_number(mean) and 0 <= mean <= 1, f"{where}.mean", mean, "in [0, 1]")
    if not column.standardize:
        return dataclasses.replace(column, mean=float(mean))
    require(_is_number(deviation) and 1e-6 <= deviation <= 1, f"{where}.deviation", deviation, "in [1e-6, 1]")
    return dataclasses.replace(column, mean=float(mean), deviation=float(deviation))


_FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "number": frozenset({"bounds", "scale", "bins", "missing", "standardize"}),
    "category": frozenset({"values", "missing", "other", "encode"}),
    "boolean": frozenset({"values", "missing"}),
    "label": frozenset({"values"}),
    "target": frozenset({"bounds", "scale"}),
    "ignore": frozenset(),
    "user": frozenset(),
}

# What a boolean is written as, unless it is declared.
_BOOLEAN: Final = [["false", "0"], ["true", "1"]]


def _parse_column(fields: Mapping[str, Any], layout: Layout) -> Column:
    name: Any = fields.get("name")
    kind: Any = fields.get("type")
    require(isinstance(name, str) and name != "", "column.name", name, "a name")
    require(isinstance(kind, str) and kind in _FIELDS, f"{name}.type", kind, f"one of {', '.join(map(repr, _FIELDS))}")
    _only(fields, name, {"name", "type"} | _FIELDS[kind])
    if kind in ("ignore", "user"):
        return Column(name, kind)
    return _parse_number(name, kind, fields) if "bounds" in _FIELDS[kind] else _parse_values(name, kind, fields, layout)


def _parse_number(name: str, kind: Any, fields: Mapping[str, Any]) -> Column:
    bounds, scale, bins = fields.get("bounds"), fields.get("scale", "linear"), fields.get("bins", [])
    pair = isinstance(bounds, list) and len(bounds) == 2 and all(map(_is_number, bounds))
    ordered = pair and bounds is not None and float(bounds[0]) < float(bounds[1])  # two integers may be one float
    require(ordered, f"{name}.bounds", bounds, "[low, high], finite, low < high")
    assert bounds is not None
    scales = ("linear", "log", "none") if kind == "number" else ("linear", "log")
    require(scale in scales, f"{name}.scale", scale, " or ".join((", ".join(map(repr, scales[:-1])), repr(scales[-1]))))
    inside = isinstance(bins, list) and all(map(_is_number, bins))
    inside = inside and all(float(a) < float(b) for a, b in itertools.pairwise([bounds[0], *bins, bounds[1]]))
    require(inside, f"{name}.bins", bins, f"increasing and strictly inside {bounds}")
    missing, standardize = fields.get("missing"), fields.get("standardize", False)
    good = missing in (None, "indicator", "mean") or (_is_number(missing) and bounds[0] <= missing <= bounds[1])
    require(good, f"{name}.missing", missing, f"a number in {bounds}, 'indicator' or 'mean'")
    whole = isinstance(standardize, bool) and not (standardize and scale == "none")
    require(whole, f"{name}.standardize", standardize, "true or false, and not true for scale = 'none'")
    fill: Any = missing if missing in ("indicator", "mean") else "declared"
    return Column(
        name,
        kind,
        (float(bounds[0]), float(bounds[1])),
        scale,
        tuple(map(float, bins)),
        missing=math.nan if fill != "declared" else None if missing is None else float(missing),
        fill=fill,
        standardize=standardize,
    )


def _parse_values(name: str, kind: Any, fields: Mapping[str, Any], layout: Layout) -> Column:
    values: Any = fields.get("values", _BOOLEAN if kind == "boolean" else None)
    groups = [v if isinstance(v, list) else [v] for v in values] if isinstance(values, list) else []
    texts = [text for group in groups for text in group]
    unique = all(groups) and all(isinstance(text, str) for text in texts) and len(set(texts)) == len(texts)
    enough = len(groups) == 2 if kind == "boolean" else len(groups) >= 2
    bound = f"two{'' if kind == 'boolean' else ' or more'} different texts, numbers too in quotation marks"
    require(enough and unique, f"{name}.values", values, bound)
    bare = not layout.strip or all(text == text.strip() for text in texts)
    require(bare, f"{name}.values", values, "without blanks around them, or [file] strip = false")
    spellings = {text: code for code, group in enumerate(groups) for text in group}
    missing = fields.get("missing")
    is_mode = missing == "mode" and kind == "category" and missing not in spellings
    good = missing is None or is_mode or (isinstance(missing, str) and missing in spellings)
    require(good, f"{name}.missing", missing, "one of the column's values" + ", or 'mode'" * (kind == "category"))
    other, encode = fields.get("other"), fields.get("encode", "one-hot")
    require(other is None or (isinstance(other, str) and other != ""), f"{name}.other", other, "a text")
    require(encode in ("one-hot", "code"), f"{name}.encode", encode, "'one-hot' or 'code'")
    names = [group[0] for group in groups]
    if other is not None and other not in spellings:
        names.append(other)
    return Column(
        name,
        kind,
        values=tuple(names),
        spellings=spellings,
        other=None if other is None else spellings.get(other, len(groups)),
        missing=None if missing is None else -1 if is_mode else spellings[missing],
        fill="mode" if is_mode else "declared",
        is_code=encode == "code",
    )


def _is_number(value: Any) -> bool:
    # Not isfinite: TOML has integers that no float holds, and high - low must be finite, too.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _only(fields: Mapping[str, Any], name: str, known: set[str]) -> None:
    unknown = sorted(set(fields) - known)
    require(not unknown, name, unknown, f"of these fields only: {', '.join(sorted(known))}")
