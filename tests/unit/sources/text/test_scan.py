"""Rows of text are found block by block, the same as Python's csv module finds them."""

from __future__ import annotations

import csv
import io
import random

import pytest

from pipeline.sources.text.scan import LINES, Dialect, Group, Malformed, assemble, last_row_stop, row_stops, scan_block

CSV = Dialect(quote=ord('"'), delimiter=ord(","))
CELLS = ("", "a", 'say "x"', "two\nlines", "a\r\nb", "c,d", "\n\n", '"', "ü" * 30)


def groups_of(data: bytes, block: int, dialect: Dialect = CSV) -> tuple[Group, ...]:
    blocks = [
        scan_block(data[max(0, start - 256) : start + block], start, before=min(start, 256), dialect=dialect)
        for start in range(0, len(data), block)
    ]
    return assemble(blocks, size=len(data))


def text(rows: list[list[str]], newline: str) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator=newline).writerows(rows)
    return buffer.getvalue().encode()


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("block", [1, 7, 64, 1000, 1 << 20])
def test_blocks_find_the_rows_of_the_csv_module(block: int, newline: str) -> None:
    rng = random.Random(block)
    rows = [[str(number), rng.choice(CELLS), rng.choice(CELLS)] for number in range(60)]
    data = text(rows, newline)
    groups = groups_of(data, block)
    assert sum(group.rows for group in groups) == len(rows)
    assert sum(group.bytes for group in groups) == len(data)
    assert sum(group.lines for group in groups) == data.count(b"\n")
    start = 0
    for group in groups:  # each group is whole rows by itself
        part = data[start : start + group.bytes].decode()
        assert sum(1 for row in csv.reader(io.StringIO(part, newline="")) if row) == group.rows
        start += group.bytes


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (b"", 0),
        (b"\n\n", 0),
        (b"a", 1),
        (b"a\n\n\nb", 2),
        (b"\r\n\r\na\r\n\r\nb\r\n", 2),
        (b'"\n\n"\n', 1),
        (b'a,""\n"",b\n', 2),
        (b'""""\n1\n', 2),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_empty_lines_are_no_rows(data: bytes, rows: int, block: int) -> None:
    assert sum(group.rows for group in groups_of(data, block)) == rows
    assert len(row_stops(data, CSV)) == rows


@pytest.mark.parametrize("block", [1, 2, 5, 100])
def test_escaped_characters_end_nothing(block: int) -> None:
    dialect = Dialect(quote=ord('"'), escape=ord("\\"), delimiter=ord(","))
    data = b'"a\\"b\n",1\nc\\\nd,2\n"x\\\\",3\n'
    assert sum(group.rows for group in groups_of(data, block, dialect)) == 3
    assert row_stops(data, dialect).tolist() == [10, 17, 25]
    assert last_row_stop(data[:-3], dialect) == 17


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'1,5" wide\n2,"x\n', "a quote inside of a cell without quotes, at byte 3"),
        (b'1,2\n"3,4\n5,6\n', "a quote that is not closed, after byte 4"),
        (b"1,2\r3,4\r", "a line that ends with a carriage return alone, at byte 3"),
    ],
)
@pytest.mark.parametrize("block", [1, 4, 100])
def test_ambiguous_text_is_refused(data: bytes, found: str, block: int) -> None:
    with pytest.raises(Malformed, match=found.replace("(", r"\(")):
        groups_of(data, block)


@pytest.mark.parametrize("stop", range(0, 40, 3))
def test_last_whole_row(stop: int) -> None:
    data = b'a,"b\nc"\nd,"e\n\nf"\n"g\nh",i\nj,k\n'
    whole = [0, 8, 17, 25, 29]
    assert last_row_stop(data[:stop], CSV) == max(edge for edge in whole if edge <= min(stop, len(data)))
    assert last_row_stop(data[:stop], LINES) == data[:stop].rfind(b"\n") + 1
