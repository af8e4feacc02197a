"""CSV bytes to rows: where each begins and ends, which cannot be read, and the cells of the others.

Only what is here decides that, so that a file gives the same rows to the trainer as to the preparation, however that
cuts it into pieces. A row ends with a line feed, or where the file ends; a row without a character is none. A cell may
be put in quotation marks, which are doubled inside it; one that stands elsewhere, or is not closed, makes its row a bad
one, as do a carriage return that no line feed follows, bytes that are not UTF-8, and more than `ROW_BYTES`.

Line feeds within quotation marks end no row if the layout is `multiline`. Then a single stray mark turns the rows after
it into one: a record may decide about others, which no accountant knows of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fastdp.columns import Layout, Reason

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.csv

ROW_BYTES: Final = 1 << 20  # of a row; what is not closed must not fill the memory

READ_BYTES: Final = 1 << 16
BOM: Final = b"\xef\xbb\xbf"
_QUOTE, _LF, _CR = b'"\n\r'
_NONE: Final = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Rows:
    """The rows in a piece of a file, in order."""

    data: bytes
    starts: npt.NDArray[np.int64]  # of each row in data
    ends: npt.NDArray[np.int64]  # after its line feed
    reasons: npt.NDArray[np.uint8]  # why a row cannot be read; Reason.GOOD

    def __len__(self) -> int:
        return len(self.starts)

    def text(self, row: int | np.signedinteger[Any]) -> bytes:
        """A row as it is written, without its end."""
        line = self.data[self.starts[row] : self.ends[row]]
        return line[:-1].removesuffix(b"\r") if line.endswith(b"\n") else line

    def texts(self, some: npt.NDArray[np.int64]) -> pa.Array:
        """Of several rows, as binary."""
        import pyarrow as pa

        if not len(some):
            return pa.array([], pa.binary())
        raw, starts, ends = np.frombuffer(self.data, np.uint8), self.starts[some], self.ends[some]
        fed = raw[ends - 1] == _LF
        ends = ends - fed - (fed & (ends - starts > 1) & (raw[ends - 2] == _CR))
        # Every second one of the texts that begin and end where these do.
        edges = np.column_stack((starts, ends)).reshape(-1)
        parts = pa.Array.from_buffers(
            pa.large_binary(), len(edges) - 1, [None, pa.py_buffer(edges), pa.py_buffer(self.data)]
        )
        return parts.take(pa.array(np.arange(0, len(edges), 2))).cast(pa.binary())


def split(data: bytes, layout: Layout) -> Rows:
    """The rows of `data`, which begins with a row."""
    raw = np.frombuffer(data, np.uint8)
    ends = _feeds(raw, _enclosing(data, layout), False) + 1
    if len(raw) and (not len(ends) or ends[-1] < len(raw)):
        ends = np.append(ends, len(raw))
    starts = np.concatenate(([0], ends[:-1])) if len(ends) else ends
    reasons = np.full(len(ends), Reason.GOOD, np.uint8)
    quotes = _quotes(data) if layout.quotes else _NONE
    before = np.searchsorted(quotes, starts)  # how many
    if len(quotes):
        counts = np.diff(before, append=len(quotes))
        unclosed = counts % 2 == 1
        reasons[unclosed] = Reason.QUOTES
        pairs = quotes[np.repeat(~unclosed, counts)] if unclosed.any() else quotes
        reasons[np.searchsorted(ends, _misplaced(raw, pairs, layout), side="right")] = Reason.QUOTES
    if b"\r" in data:
        returns = _lone_returns(raw)
        within = np.searchsorted(ends, returns, side="right")
        outside = (np.searchsorted(quotes, returns) - before[within]) % 2 == 0
        reasons[within[outside]] = Reason.QUOTES
    reasons[ends - starts > ROW_BYTES] = Reason.LONG
    empty = (raw[starts] == _LF) | ((ends - starts == 2) & (raw[starts] == _CR) & (raw[ends - 1] == _LF))
    if empty.any():
        starts, ends, reasons = starts[~empty], ends[~empty], reasons[~empty]
    rows = Rows(data, starts, ends, reasons)
    if not _is_utf8(data):
        for row in np.flatnonzero(reasons == Reason.GOOD):
            if not _is_utf8(rows.text(row)):
                reasons[row] = Reason.ENCODING
    return rows


def cells(rows: Rows, names: list[str], used: dict[str, pa.DataType], layout: Layout) -> pa.Table:
    """The cells of all rows that have no reason; those of a wrong number of cells get one.

    names: of all columns, in the file's order. used: the columns to read, with their types.
    Raises ArrowInvalid if a cell cannot be of its column's type.
    """
    import pyarrow as pa
    import pyarrow.csv

    good = np.flatnonzero(rows.reasons == Reason.GOOD)
    if not len(good):
        return pa.table({name: pa.array([], kind) for name, kind in used.items()})
    wrong: list[int] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        wrong.append(row.number - 1)
        return "skip"

    data = _without_the_others(rows, good)
    table = pa.csv.read_csv(
        pa.BufferReader(data),
        pa.csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=names),
        _parse_options(layout, skip),
        pa.csv.ConvertOptions(
            include_columns=list(used),
            column_types=used,
            null_values=list(layout.nulls),
            strings_can_be_null=False,
            check_utf8=False,  # the rows were
        ),
    )
    rows.reasons[good[wrong]] = Reason.WIDTH
    assert table.num_rows + len(wrong) == len(good), "pyarrow finds other rows than fastdp.csvrows"
    return table


def cells_of(text: bytes, layout: Layout) -> list[str]:
    """The cells of one row that can be read, without its end; they may be of any number."""
    import pyarrow as pa
    import pyarrow.csv

    row = (BOM + text if text.startswith(BOM) else text) + b"\n"  # Arrow takes one off
    options = pa.csv.ReadOptions(use_threads=False, block_size=len(row) + 1)
    # As names of columns: those are not converted.
    found: list[str] = pa.csv.read_csv(pa.BufferReader(row), options, _parse_options(layout)).column_names
    return found


def _parse_options(layout: Layout, invalid_row_handler: Callable[[Any], str] | None = None) -> pa.csv.ParseOptions:
    import pyarrow as pa
    import pyarrow.csv

    return pa.csv.ParseOptions(
        delimiter=layout.delimiter,
        quote_char='"' if layout.quotes else False,
        newlines_in_values=layout.quotes and layout.multiline,
        invalid_row_handler=invalid_row_handler,
    )


def piece(file: IO[bytes], start: int, stop: int, inside: bool | None, layout: Layout) -> tuple[bytes, int]:
    """The rows that begin in the bytes [start, stop) of a file, each to its end if that is near, and where they begin.

    inside: whether byte `start` stands within quotation marks; None: a row begins there.
    """
    before = 0 if inside is None else 1
    file.seek(start - before)
    data, first = file.read(stop - start + before), start
    if inside is not None:
        inside ^= len(_enclosing(data[:before], layout)) == 1
        after = _after_feed(data, inside, layout)
        if after is None or after >= len(data):
            return b"", stop
        data, first = data[after:], start - before + after
    while data and (len(_enclosing(data, layout)) % 2 or not data.endswith(b"\n")):
        more = file.read(READ_BYTES)
        after = _after_feed(more, len(_enclosing(data, layout)) % 2 == 1, layout)
        data += more[:after]
        if after is not None or not more or len(data) > stop - start + ROW_BYTES:
            break
    return data, first


def blocks(stream: IO[bytes], layout: Layout, size: int) -> Iterator[tuple[int, bytes]]:
    """A stream's rows from where it stands, about `size` bytes at a time, with their places after that.

    Of a row that is too long, the beginning comes.
    """
    offset, carry = 0, b""
    while chunk := stream.read(size):
        data = carry + chunk
        cut = _after_last_feed(data, layout)
        if cut:
            yield offset, data[:cut]
        offset, carry = offset + cut, data[cut:]
        if len(carry) > ROW_BYTES:
            yield offset, carry[: ROW_BYTES + 1]
            inside, after = len(_enclosing(carry, layout)) % 2 == 1, None
            offset += len(carry)
            while after is None and (chunk := stream.read(READ_BYTES)):
                after = _after_feed(chunk, inside, layout)
                inside ^= len(_enclosing(chunk, layout)) % 2 == 1
                offset += len(chunk) if after is None else after
            carry = b"" if after is None else chunk[after:]
    if carry:
        yield offset, carry


def head(stream: IO[bytes], layout: Layout) -> tuple[list[str] | None, int]:
    """The cells of a file's first row, and where its records begin: after it, if it names the columns.

    None: there is no row, or it cannot be read. A byte order mark and comments stand before everything.
    """
    start = stream.read(READ_BYTES + ROW_BYTES)
    offset = len(BOM) if start.startswith(BOM) else 0
    while layout.comment and start.startswith(layout.comment.encode(), offset):
        feed = start.find(b"\n", offset)
        offset = len(start) if feed < 0 else feed + 1
    rows = split(start[offset:], layout)
    if not len(rows) or rows.reasons[0] != Reason.GOOD:
        return None, offset
    first = [cell.strip() if layout.strip else cell for cell in cells_of(rows.text(0), layout)]
    return first, offset + int(rows.ends[0]) if layout.header else offset


def _after_last_feed(data: bytes, layout: Layout) -> int:
    """Where the last row ends in a text that begins with a row; 0: none does."""
    if not (layout.quotes and layout.multiline):
        return data.rfind(b"\n") + 1
    for tail in (data[-READ_BYTES:], data):  # the first will mostly do
        start = len(data) - len(tail)
        feeds = _feeds(np.frombuffer(tail, np.uint8), _quotes(tail), data.count(b'"', 0, start) % 2 == 1)
        if len(feeds):
            return start + int(feeds[-1]) + 1
    return 0


def _after_feed(data: bytes, inside: bool, layout: Layout) -> int | None:
    """After the first that ends a row."""
    for head in (data[:READ_BYTES], data):  # the first will mostly do
        feeds = _feeds(np.frombuffer(head, np.uint8), _enclosing(head, layout), inside)
        if len(feeds):
            return int(feeds[0]) + 1
    return None


def _quotes(data: bytes) -> npt.NDArray[np.int64]:
    return np.flatnonzero(np.frombuffer(data, np.uint8) == _QUOTE) if b'"' in data else _NONE


def _enclosing(data: bytes, layout: Layout) -> npt.NDArray[np.int64]:
    """Quotation marks between which line feeds end no row."""
    return _quotes(data) if layout.quotes and layout.multiline else _NONE


def _feeds(raw: npt.NDArray[np.uint8], quotes: npt.NDArray[np.int64], inside: bool) -> npt.NDArray[np.int64]:
    """Line feeds outside quotation marks."""
    feeds = np.flatnonzero(raw == _LF)
    return feeds[(np.searchsorted(quotes, feeds) + inside) % 2 == 0] if len(quotes) or inside else feeds


def _misplaced(raw: npt.NDArray[np.uint8], quotes: npt.NDArray[np.int64], layout: Layout) -> npt.NDArray[np.int64]:
    """Of quotation marks, an even number in each row: those that neither begin nor end a cell nor are one of a pair."""
    padded = np.pad(raw, (1, 2), constant_values=_LF)
    delimiter = ord(layout.delimiter)
    opening, closing = quotes[::2], quotes[1::2]
    before, after = padded[opening], padded[closing + 2]
    begins = (before == delimiter) | (before == _LF) | (before == _QUOTE)
    ends = (after == delimiter) | (after == _LF) | (after == _QUOTE)
    returns = np.flatnonzero(after == _CR)
    ends[returns] = padded[closing[returns] + 3] == _LF
    return np.concatenate((opening[~begins], closing[~ends]))


def _lone_returns(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Carriage returns that no line feed follows: outside quotation marks, Arrow would end the row there."""
    returns = np.flatnonzero(raw == _CR)
    lone: npt.NDArray[np.int64] = returns[raw[np.minimum(returns + 1, len(raw) - 1)] != _LF]
    return lone


def _without_the_others(rows: Rows, good: npt.NDArray[np.int64]) -> bytes:
    starts, ends = rows.starts[good], rows.ends[good]
    breaks = np.flatnonzero(starts[1:] != ends[:-1])
    if not len(breaks) and starts[0] == 0 and ends[-1] == len(rows.data):
        data = rows.data
    else:
        firsts, lasts = np.concatenate(([0], breaks + 1)), np.append(breaks, len(good) - 1)
        data = b"".join(rows.data[starts[a] : ends[b]] for a, b in zip(firsts, lasts, strict=True))
    return BOM + data if data.startswith(BOM) else data  # Arrow takes one off


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
