"""Comparison with literals: one meaning for short and long lists, for pruning and for contracts, in every type."""

from __future__ import annotations

import datetime as dt
import itertools
import math
import operator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SpecError
from pipeline.sources import discover, parse_filter
from pipeline.sources.filters.compare import compare, is_one_of
from pipeline.sources.filters.literals import typed_literal
from pipeline.sources.types import storage_type
from pipeline.spec.parts import Source
from pipeline.testing.arrow_types import typed_columns
from pipeline.testing.examples import choose

COLUMNS = typed_columns()
OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
NUMBERS = [0, -0.0, 0.1, 0.5, 1, -1, -1.5, 5, 5.0, 127, 128, -129, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 1e10]
NUMBERS += [65504, 65505.0, 3.5e38, 1e300, 16777217, 999.995, 9999999.995]
TEXTS = ["", "a", "b", "Köln", "zz", "2024-01-01", "1969-12-31", "0001-01-01", "9999-12-31", "1677-09-21"]
TEXTS += ["2024-01-01T00:00:00.5", "2024-01-01T00:00:00.000000001", "2024-01-01T00:00:00+01:00", "9999-12-31T23:59:59Z"]
TEXTS += ["00:00", "00:30:00", "00:00:00.000001", "00:00:00.0000000015", "23:59:59.999999999"]
LITERALS: list[Any] = [*NUMBERS, *TEXTS, True, False]


def accepted(kind: pa.DataType) -> list[Any]:
    """The literals that compare with ``kind``."""
    return [literal for literal in LITERALS if _is_accepted(literal, kind)]


def _is_accepted(literal: Any, kind: pa.DataType) -> bool:
    try:
        typed_literal(literal, kind)
    except SpecError:
        return False
    return True


def exact(value: Any) -> Any:
    """A number as a fraction, so that Python compares it exactly; infinities and NaN as they are."""
    return Fraction(value) if math.isfinite(value) else value


def rounded(literal: Any, kind: pa.DataType) -> Any:
    """A literal in the precision of a float column, unless it is too large for it."""
    if not pa.types.is_floating(kind):
        return Decimal(str(literal))
    with np.errstate(over="ignore"):
        value = float(kind.to_pandas_dtype()(literal))
    return float(literal) if math.isinf(value) else value


def is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)


@pytest.mark.parametrize("name", [name for name in COLUMNS if is_number(storage_type(COLUMNS[name].type))])
def test_numbers_compare_as_exact_fractions_do(name: str) -> None:
    column = COLUMNS[name]
    kind = storage_type(column.type)
    values = [None if value is None else exact(value) for value in column.cast(kind).to_pylist()]
    for literal in accepted(kind):
        wanted = exact(rounded(literal, kind))
        for symbol, function in OPERATORS.items():
            expected = [None if value is None else function(value, wanted) for value in values]
            assert compare(symbol, column, literal).to_pylist() == expected, (symbol, literal)


def ticks(array: pa.Array) -> list[int | None]:
    return array.cast(pa.int32() if array.type.bit_width == 32 else pa.int64()).to_pylist()


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2024-01-01", Fraction(1704067200)),
        ("2024-01-01T00:00:00.5", Fraction(3408134401, 2)),
        ("2024-01-01T00:00:00.000000001", 1704067200 + Fraction(1, 10**9)),
        ("1969-12-31T23:59:59.9999999999", -Fraction(1, 10**10)),
        ("9999-12-31", Fraction(253402214400)),
        ("0001-01-01", Fraction(-62135596800)),
    ],
)
def test_instants_compare_exactly_whatever_their_unit_holds(unit: str, text: str, seconds: Fraction) -> None:
    """Also where the unit cannot hold the literal: nanoseconds end in the year 2262."""
    column = COLUMNS[f"timestamp[{unit}]"]
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    for symbol, function in OPERATORS.items():
        expected = [None if tick is None else function(Fraction(tick, scale), seconds) for tick in ticks(column)]
        assert compare(symbol, column, text).to_pylist() == expected, symbol


def test_times_of_a_day_compare_to_the_nanosecond() -> None:
    column = pa.array([123456789, 1, None], pa.int64()).cast(pa.time64("ns"))
    assert compare(">", column, "00:00:00.123456").to_pylist() == [True, False, None]
    assert compare("==", column, "00:00:00.123456789").to_pylist() == [True, False, None]
    assert compare(">=", column, "00:00:00.1234567891").to_pylist() == [False, False, None]


def test_a_float_literal_has_the_precision_of_the_column() -> None:
    """Beside float32 values 0.1 is a float32 0.1, like in NumPy, pandas and Polars."""
    for kind in (pa.float16(), pa.float32(), pa.float64()):
        column = pa.array([np.dtype(kind.to_pandas_dtype()).type(0.1), None], kind)
        assert compare("==", column, 0.1).to_pylist() == [True, None]
        assert is_one_of(column, [0.1]).to_pylist() == [True, None]
        assert compare(">", column, 0.1).to_pylist() == [False, None]
    huge = pa.array([math.inf, 3e38], pa.float32())
    assert compare("<", huge, 1e300).to_pylist() == [False, True]
    assert is_one_of(huge, [1e300]).to_pylist() == [False, False]


@pytest.mark.fault(90)
@pytest.mark.parametrize("name", COLUMNS)
def test_a_list_equals_its_comparisons_joined_by_or(name: str) -> None:
    """Lists of 1, 3 and all literals; NaN is in none, -0.0 is 0.0."""
    column = COLUMNS[name]
    literals = accepted(column.type)
    for some in ([], literals[:1], literals[:3], literals):
        equal = [compare("==", column, literal).to_pylist() for literal in some]
        expected = [
            None if not valid or pa.types.is_null(column.type) else any(flags[row] for flags in equal)
            for row, valid in enumerate(column.is_valid().to_pylist())
        ]
        assert is_one_of(column, some).to_pylist() == expected, some


@pytest.mark.parametrize("name", COLUMNS)
def test_a_literal_that_is_accepted_never_fails_later(name: str) -> None:
    """A filter that the plan accepts on no rows is accepted on any rows, also on scalars and on chunks."""
    column = pa.chunked_array([COLUMNS[name][:5], COLUMNS[name][5:]], COLUMNS[name].type)
    for literal in accepted(column.type):
        for symbol in OPERATORS:
            assert compare(symbol, column, literal).to_pylist() == compare(symbol, COLUMNS[name], literal).to_pylist()
            assert len(compare(symbol, column[:0], literal)) == 0
        assert is_one_of(column, [literal]).to_pylist() == compare("==", column, literal).to_pylist()


@pytest.mark.parametrize(
    ("kind", "literal"),
    [
        (pa.string(), 1),
        (pa.int64(), "1"),
        (pa.int64(), True),
        (pa.bool_(), 1),
        (pa.date32(), "soon"),
        (pa.date32(), 5),
        (pa.timestamp("us"), "2024-01-01T00:00:00Z"),
        (pa.float64(), "1"),
        (pa.float64(), math.nan),
        (pa.binary(), "a"),
        (pa.duration("s"), 1),
        (pa.list_(pa.int64()), 1),
        (pa.uuid(), "a"),
        (pa.string(), "\ud800"),
        (pa.float64(), 10**400),
        (pa.timestamp("us", "Mars/Phobos"), "2024-01-01"),
    ],
)
def test_a_literal_of_another_type_is_refused(kind: pa.DataType, literal: Any) -> None:
    with pytest.raises(SpecError, match="another type") as caught:
        typed_literal(literal, kind)
    assert str(kind) in caught.value.found
    assert caught.value.expected


def test_short_and_long_lists_and_pruning_agree_on_float32(tmp_path: Path) -> None:
    table = pa.table({"x": pa.array([0.1, 0.2, 3.0, -0.0], pa.float32())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    short = "x in [0.1, 3.0, 0]"
    long = "x in [0.1, 3.0, 0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.0]"
    for text in (short, long):
        assert parse_filter(text).mask(table).to_pylist() == [True, False, True, True]
        (file,) = discover(Source(path=str(tmp_path / "a.parquet"), filter=text)).files
        assert [group.selected for group in file.row_groups] == [True, False, True, True]


def test_a_far_date_keeps_every_nanosecond(tmp_path: Path) -> None:
    """The usual "valid for ever" of history tables is no error for timestamps that cannot hold it."""
    table = pa.table({"until": pa.array([dt.datetime(2024, 1, 1), None], pa.timestamp("ns"))})
    for text, kept in (("until < '9999-12-31'", [True, False]), ("until == '9999-12-31'", [False, False])):
        parse_filter(text).check(table.schema)
        assert parse_filter(text).mask(table).to_pylist() == kept
    pq.write_table(table, tmp_path / "a.parquet")
    (file,) = discover(Source(path=str(tmp_path), filter="until >= '9999-12-31'")).files
    assert not file.row_groups[0].selected


def as_text(literal: Any) -> str:
    return repr(literal)


PRUNED = sorted(name for name in COLUMNS if accepted(COLUMNS[name].type) and not pa.types.is_null(COLUMNS[name].type))


@st.composite
def cases(draw: st.DrawFn) -> tuple[pa.Array, str]:
    """Some values of one type, and a filter on them."""
    column = COLUMNS[draw(st.sampled_from(PRUNED))]
    rows = draw(st.lists(st.integers(0, len(column) - 1), min_size=1, max_size=10))
    literals = accepted(column.type)
    one = st.sampled_from(literals).map(as_text)
    comparison = st.tuples(st.sampled_from(sorted(OPERATORS)), one).map(lambda pair: f"x {pair[0]} {pair[1]}")
    flipped = st.tuples(one, st.sampled_from(sorted(OPERATORS))).map(lambda pair: f"{pair[0]} {pair[1]} x")
    lists = st.lists(one, min_size=1, max_size=12).map(lambda some: f"x in [{', '.join(some)}]")
    simple = comparison | flipped | lists | st.sampled_from(["x is None", "x is not None"])
    if pa.types.is_boolean(column.type):
        simple |= st.just("x")
    negated = simple | simple.map(lambda text: f"not ({text})")
    joined = st.tuples(negated, st.sampled_from(["and", "or"]), negated).map(" ".join)
    picked = pa.concat_arrays([column.slice(row, 1) for row in rows])
    return picked, draw(negated | joined)


@pytest.mark.fault(90)
@settings(max_examples=choose(100, of=10_000), deadline=None)
@given(case=cases(), group=st.integers(1, 4))
def test_a_wanted_row_of_any_type_is_never_pruned(
    tmp_path_factory: Any, case: tuple[pa.Array, str], group: int
) -> None:
    column, text = case
    path = tmp_path_factory.mktemp("prune") / "a.parquet"
    pq.write_table(pa.table({"x": column}), path, row_group_size=group)
    (file,) = discover(Source(path=str(path), filter=text)).files
    # The mask is of what is read: Parquet keeps some types in another unit.
    keep = parse_filter(text).mask(pq.read_table(path, partitioning=None)).to_pylist()
    for number, row_group in enumerate(file.row_groups):
        start = number * group
        assert row_group.selected or not any(itertools.islice(keep, start, start + row_group.rows)), text
