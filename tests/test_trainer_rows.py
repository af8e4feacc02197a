"""The trainer's reader of CSV finds the rows that the preparation finds, and names the first one it cannot use."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from raw_tables import HOSTILE, NAMES, contract, joined, refine
from test_csvrows import lines

from fastdp import csvrows, files
from fastdp.errors import ArgumentError
from fastdp.schema import parse_schema


def flag(name: str, value: bool) -> str:
    return f"{name} = {str(value).lower()}"


SECRET = "s3cret"


@given(
    body=HOSTILE,
    size=st.integers(1, 200),
    header=st.booleans(),
    quotes=st.booleans(),
    multiline=st.booleans(),
    strip=st.booleans(),
    top=st.sampled_from([b"", csvrows.BOM, b'# "a comment\n', csvrows.BOM + b"#\r\n#\n"]),
    packed=st.booleans(),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(
    body=b"25,10,1.7,clerk,A,1,x,no\n25,10,1.7,clerk,A,1,x,no\n25,10,1.7,clerk,A,1,x,no\n",
    size=30,
    header=True,
    quotes=True,
    multiline=False,
    strip=True,
    top=b"",
    packed=False,
)
@example(
    body=b"\n\r\n25,10,1.7,clerk,A,1,x,no",
    size=1,
    header=False,
    quotes=False,
    multiline=False,
    strip=False,
    top=csvrows.BOM,
    packed=True,
)
@example(
    body=b'25,10,1.7,clerk,A,1,"x,no\n25,10,1.7,cl,A,1,x,no\n',
    size=90,
    header=True,
    quotes=True,
    multiline=False,
    strip=True,
    top=b"",
    packed=False,
)
def test_the_trainer_and_the_preparation_find_the_same_rows(
    body: bytes,
    size: int,
    header: bool,
    quotes: bool,
    multiline: bool,
    strip: bool,
    top: bytes,
    packed: bool,
    tmp_path: Path,
) -> None:
    layout = [flag("header", header), flag("quotes", quotes), flag("multiline", multiline), 'comment = "#"']
    text = contract(strip=strip).replace("multiline = true", "\n".join(layout))
    schema = parse_schema(text)
    body = body.replace(b",x,", b"," + SECRET.encode() + b",")
    head = top + (",".join(NAMES).encode() + b"\n") * header
    path = tmp_path / ("t.csv.gz" if packed else "t.csv")
    path.write_bytes(gzip.compress(head + body) if packed else head + body)
    parts = refine(path, schema)
    bad: list[dict[str, Any]] = [b for part in parts for b in part.bad.to_pylist()]
    wanted = joined(parts)
    starts = itertools.accumulate((len(line) for line in lines(body, quotes and multiline)), initial=len(head))
    places = [
        p for p, line in zip(starts, lines(body, quotes and multiline), strict=False) if line not in (b"\n", b"\r\n")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CSV_BLOCK_BYTES", size)
        if not bad and len(wanted["train labels"]):
            found = files.read("data", path, schema)
            for field in dataclasses.fields(found):
                np.testing.assert_array_equal(getattr(found, field.name), wanted[f"train {field.name}"])
            return
        with pytest.raises(ArgumentError) as error:
            files.read("data", path, schema)
    message = str(error.value)
    assert "\n" not in message and SECRET not in message
    if not bad:
        assert message.endswith("must be a table with at least one row")
        return
    row = f"row {places.index(bad[0]['place'])} of {path.name}="
    if bad[0]["column"]:
        row = f"column {bad[0]['column']!r}, {row}"
    else:
        row = f"cells in {row}" if bad[0]["reason"] == "width" else f"{row}'{bad[0]['reason']}': "
    assert message.startswith(row)
