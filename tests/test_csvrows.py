"""CSV bytes to rows, against a reader that goes from byte to byte; and the same rows however a file is cut."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdp import csvrows
from fastdp.columns import Layout, Reason

Row = tuple[bytes, list[str] | Reason]


def lines(data: bytes, quotes: bool) -> Iterator[bytes]:
    """Rows with their ends: line feeds outside quotation marks end them."""
    start, inside = 0, False
    for i, byte in enumerate(data):
        inside ^= quotes and byte == ord('"')
        if byte == ord("\n") and not inside:
            yield data[start : i + 1]
            start = i + 1
    if start < len(data):
        yield data[start:]


def cells_of(text: bytes, delimiter: str, quotes: bool) -> list[str] | Reason:
    """The cells of a row without its end, by a machine of four states."""
    cells, cell, state = [], bytearray(), "start"
    for byte in text:
        char = chr(byte)
        if state == "quoted":
            state = "closed" if char == '"' else state
            if char != '"':
                cell.append(byte)
        elif char == delimiter:
            cells.append(bytes(cell))
            cell, state = bytearray(), "start"
        elif char == '"' and quotes:
            if state == "plain":
                return Reason.QUOTES
            if state == "closed":
                cell.append(byte)
            state = "quoted"
        elif state == "closed" or char == "\r":
            return Reason.QUOTES
        else:
            cell.append(byte)
            state = "plain"
    if state == "quoted":
        return Reason.QUOTES
    try:
        return [each.decode() for each in (*cells, bytes(cell))]
    except UnicodeDecodeError:
        return Reason.ENCODING


def oracle(data: bytes, layout: Layout, width: int) -> list[Row]:
    rows: list[Row] = []
    for line in lines(data, layout.quotes and layout.multiline):
        text = line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line
        if not text:
            continue
        cells = Reason.LONG if len(line) > csvrows.ROW_BYTES else cells_of(text, layout.delimiter, layout.quotes)
        wrong = isinstance(cells, list) and len(cells) != width
        rows.append((text, Reason.WIDTH if wrong else cells))
    return rows


def read(data: bytes, layout: Layout, width: int) -> list[Row]:
    names = [f"c{i}" for i in range(width)]
    rows = csvrows.split(data, layout)
    table = csvrows.cells(rows, names, dict.fromkeys(names, pa.string()), layout)
    good = iter(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return [
        (rows.text(i), Reason(reason) if reason else list(next(good))) for i, reason in enumerate(rows.reasons.tolist())
    ]


PIECES = [b"a", b"bc", b"1.5", b",", b",", b";", b'"', b'"', b'""', b"\n", b"\n", b"\r\n", b"\r", b" ", b"\0"]
PIECES += [b"\xff", "é".encode(), csvrows.BOM, b'"x,y"', b'"x\ny"', b"a,b\n", b'a,"b"\n', b"NA"]
CSV = st.lists(st.sampled_from(PIECES), max_size=25).map(b"".join)
LAYOUTS = st.builds(Layout, delimiter=st.sampled_from(",;\t"), quotes=st.booleans(), multiline=st.booleans())


@given(CSV, LAYOUTS, st.integers(1, 3))
@settings(max_examples=1000, deadline=None)
@example(b'a,"b\nc', Layout(), 2)  # never closed
@example(b"\xef\xbb\xbfa,b\n", Layout(), 2)
@example(b"", Layout(), 1)
@example(b"\n\r\n\n", Layout(), 1)
@example(b'"a""b","\r\n"\r\n', Layout(multiline=True), 2)
@example(b'"1,2\n3,4\n5,6\n', Layout(), 2)  # a stray mark costs one row
def test_rows_and_cells_are_those_of_a_plain_reader(data: bytes, layout: Layout, width: int) -> None:
    assert read(data, layout, width) == oracle(data, layout, width)


@given(CSV, LAYOUTS, st.data())
@settings(max_examples=300, deadline=None)
def test_a_file_that_is_cut_gives_the_same_rows(data: bytes, layout: Layout, draw: st.DataObject) -> None:
    """Each piece takes the rows that begin in it; whether a piece begins within quotation marks is counted before."""
    whole = csvrows.split(data, layout)
    cuts = sorted(draw.draw(st.sets(st.integers(0, len(data)), max_size=4)) | {0, len(data)})
    rows: list[bytes] = []
    for start, stop in itertools.pairwise(cuts):
        inside = (layout.quotes and layout.multiline and data[:start].count(b'"') % 2 == 1) if start else None
        piece, first = csvrows.piece(io.BytesIO(data), start, stop, inside, layout)
        assert not piece or (start <= first < stop and data.startswith(piece, first))
        part = csvrows.split(piece, layout)
        rows += [part.text(i) for i in range(len(part))]
    assert rows == [whole.text(i) for i in range(len(whole))]


@given(CSV, LAYOUTS, st.integers(1, 40), st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_a_stream_in_blocks_gives_the_same_rows(data: bytes, layout: Layout, size: int, read_bytes: int) -> None:
    whole = csvrows.split(data, layout)
    rows: list[bytes] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csvrows, "READ_BYTES", read_bytes)
        for offset, block in csvrows.blocks(io.BytesIO(data), layout, size):
            assert data.startswith(block, offset)
            part = csvrows.split(block, layout)
            rows += [part.text(i) for i in range(len(part))]
    assert rows == [whole.text(i) for i in range(len(whole))]


@pytest.mark.parametrize("length", [csvrows.ROW_BYTES - 3, csvrows.ROW_BYTES - 2])
def test_rows_may_be_long_but_not_longer(length: int) -> None:
    data = b"1,2\n" + b"x" * length + b",3\n4,5\n"
    assert read(data, Layout(), 2) == oracle(data, Layout(), 2)
    assert csvrows.split(data, Layout()).reasons.tolist() == [0, (length > csvrows.ROW_BYTES - 3) * Reason.LONG, 0]


def test_a_long_row_is_in_the_piece_where_it_begins() -> None:
    """Its end may be farther than one read, from a piece's beginning as from its end; and pieces longer than a row."""
    few, long = b"1\n" * (csvrows.ROW_BYTES // 2), b"x" * 3 * csvrows.READ_BYTES + b"\n"
    file, cut, end = io.BytesIO(few + long + few), len(few) + 1, len(few + long + few)
    assert csvrows.piece(file, 0, cut, None, Layout()) == (few + long, 0)
    assert csvrows.piece(file, cut, end, False, Layout()) == (few, len(few + long))


def test_cells_that_are_not_of_their_type_are_an_error() -> None:
    rows = csvrows.split(b"1\nx\n", Layout())
    with pytest.raises(pa.ArrowInvalid):
        csvrows.cells(rows, ["a"], {"a": pa.float64()}, Layout())
    assert np.array_equal(rows.reasons, [0, 0])
