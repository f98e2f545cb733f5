"""Filters keep their meaning when their columns are renamed."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.sources.filters.parse import parse_filter
from pipeline.sources.filters.rename import rename_columns

TABLE = pa.table({"a": [1, 2, 3, None], "b": [3.0, 2.0, float("nan"), 1.0], "odd name": ["x", "y'", None, "z"]})
NAMES = {"p": "a", "q": "b", "isnull": "odd name"}


@pytest.mark.parametrize(
    ("renamed", "original"),
    [
        ("p > 1 and not q < 3", "a > 1 and not b < 3"),
        ("1 <= p < 3 or isnan(q)", "1 <= a < 3 or isnan(b)"),
        ("isnull(p) or column('isnull') in ['x', \"y'\"]", "isnull(a) or column('odd name') in ['x', \"y'\"]"),
        ("p * 2 - 1 >= -q", "a * 2 - 1 >= -b"),
        ("column('isnull') is not None", "column('odd name') is not None"),
        ("a > 1", "a > 1"),
    ],
)
def test_a_renamed_filter_keeps_the_same_rows(renamed: str, original: str) -> None:
    text = rename_columns(renamed, NAMES)
    assert parse_filter(text).root == parse_filter(original).root
    assert parse_filter(text).mask(TABLE).equals(parse_filter(original).mask(TABLE))
