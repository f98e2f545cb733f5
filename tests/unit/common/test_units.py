"""Sizes and times in the form that people write and read."""

from __future__ import annotations

import pytest

from pipeline.common.units import format_bytes, format_count, format_seconds, parse_bytes, plural
from pipeline.errors import SpecError


@pytest.mark.parametrize(
    ("text", "size"),
    [("256 MiB", 256 << 20), ("1.5GB", 1_500_000_000), (" 10 kb ", 10_000), (7, 7), ("7", 7), ("1 gib", 1 << 30)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("bad", ["", "0", "many", "-1", "1 XB", "1 2", "0 MiB", True, "1e3"])
def test_bad_sizes(bad: str | int) -> None:
    with pytest.raises(SpecError, match="not a valid size") as caught:
        parse_bytes(bad, where="sink.target_file_size")
    assert caught.value.where == "sink.target_file_size"


def test_formats() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 150 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "150 MiB",
        "3.0 TiB",
    ]
    assert [format_seconds(s) for s in (0.431, 12.34, 59.97, 185, 7620)] == [
        "0.43 s",
        "12.3 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 07 min",
    ]
    assert format_count(1234567.0) == "1,234,567"


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "partition", "0 partitions"),
        (1, "partition", "1 partition"),
        (1000, "row", "1,000 rows"),
        (1, "retry", "1 retry"),
        (2, "retry", "2 retries"),
        (3, "more reason", "3 more reasons"),
    ],
)
def test_plural(count: int, noun: str, text: str) -> None:
    assert plural(count, noun) == text


def test_irregular_plural() -> None:
    assert (plural(1, "child", "children"), plural(2, "child", "children")) == ("1 child", "2 children")
