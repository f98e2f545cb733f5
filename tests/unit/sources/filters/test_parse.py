"""Row filters: selected rows, row groups ruled out by statistics, and rejected filters."""

from __future__ import annotations

import datetime
import decimal
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SpecError
from pipeline.sources import discover, parse_filter
from pipeline.sources.filters.prune import Bounds
from pipeline.spec.parts import Source
from pipeline.testing.examples import choose

NAN = float("nan")
TABLE = pa.table(
    {
        "i": pa.array([1, 2, None, 2**62 + 1], pa.int64()),
        "u": pa.array([1, 2, None, 2**63 + 5], pa.uint64()),
        "f": [1.0, NAN, None, 3.0],
        "s": ["x", "y", None, "z"],
        "c": pa.array(["a", "b", None, "a"]).dictionary_encode(),
        "b": [True, False, None, True],
        "d": pa.array([datetime.date(2024, 1, day) for day in (1, 2, 3, 4)]),
        "t": pa.array([datetime.datetime(2024, 1, day) for day in (1, 2, 3, 4)], pa.timestamp("us")),
        "z": pa.array([datetime.datetime(2024, 1, day) for day in (1, 2, 3, 4)], pa.timestamp("ms", "Europe/Berlin")),
        "m": pa.array([decimal.Decimal("1.10"), decimal.Decimal("2.20"), None, decimal.Decimal("3.30")]),
        "odd name": [1, 2, 3, 4],
        "n": pa.nulls(4),
    }
)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("i == 1", [0]),
        ("1 == i", [0]),
        ("2 <= i", [1, 3]),
        ("i > 1.5", [1, 3]),
        ("i >= 1.5", [1, 3]),
        ("i < 1.5", [0]),
        ("i == 1.5", []),
        ("i != 1.5", [0, 1, 3]),
        ("i == 4611686018427387904.0", []),
        ("i < 99999999999999999999", [0, 1, 3]),
        ("i > -5", [0, 1, 3]),
        ("u > -1", [0, 1, 3]),
        ("u == 9223372036854775813", [3]),
        ("1 < i <= 2", [1]),
        ("f > 0", [0, 3]),
        ("f != 1", [1, 3]),
        ("not f < 2", [1, 3]),
        ("isnan(f)", [1]),
        ("f is None", [2]),
        ("f is not None", [0, 1, 3]),
        ("isnull(s)", [2]),
        ("notnull(s)", [0, 1, 3]),
        ("s in ['x', 'q']", [0]),
        ("s not in ('x', 'q')", [1, 3]),
        ("s in ['x', '1', '2', '3', '4', '5', '6', '7', '8', '9']", [0]),
        ("i in [1, 2.0, 2.5]", [0, 1]),
        ("c == 'a'", [0, 3]),
        ("c in ['a', '1', '2', '3', '4', '5', '6', '7', '8', '9']", [0, 3]),
        ("b", [0, 3]),
        ("not b", [1]),
        ("b == True and i == 1", [0]),
        ("b or i == 2", [0, 1, 3]),
        ("d >= '2024-01-03'", [2, 3]),
        ("t < '2024-01-02'", [0]),
        ("t <= '2024-01-02T00:00:00'", [0, 1]),
        ("z >= '2024-01-03'", [2, 3]),
        ("z >= '2024-01-03T00:00:00+00:00'", [2, 3]),
        ("m > 2.2", [3]),
        ("m == 2.2", [1]),
        ("i + 1 == 2 or f * 2 == 6", [0, 3]),
        ("i / 2 == 0.5", [0]),
        ("-i < -1", [1, 3]),
        ("i - 1 < f", [0]),
        ("column('odd name') > 3", [3]),
        ("n == 1", []),
        ("n is None", [0, 1, 2, 3]),
        ("True", [0, 1, 2, 3]),
        ("i == 1 and s == 'nothing' or d == '2024-01-04'", [3]),
    ],
)
def test_rows_that_a_filter_keeps(text, kept):
    condition = parse_filter(text)
    condition.check(TABLE.schema)
    mask = condition.mask(TABLE)
    assert mask.null_count == 0
    assert [row for row, keep in enumerate(mask.to_pylist()) if keep] == kept


def test_a_time_without_offset_is_in_the_zone_of_the_column():
    zoned = pa.table({"z": pa.array([datetime.datetime(2024, 1, 1, 23)], pa.timestamp("us", "Europe/Berlin"))})
    # 23:00 in UTC is midnight in Berlin.
    assert parse_filter("z >= '2024-01-02'").mask(zoned).to_pylist() == [True]
    assert parse_filter("z >= '2024-01-02T00:00:00+00:00'").mask(zoned).to_pylist() == [False]


def test_filter_names_its_columns():
    text = "a > 1 and (b in [1] or not isnull(c)) and d + e < 3 and column('f g') is None"
    assert parse_filter(text).columns == {"a", "b", "c", "d", "e", "f g"}


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 1),
        ("i ==", 1),
        ("i.x > 1", 1),
        ("i > 1 and __import__('os').system('true')", 11),
        ("i == None", 6),
        ("i in s", 6),
        ("i > 1e999", 5),
        ("i if b else s", 1),
        ("i is 3", 6),
        ("(x := 3) > 1", 2),
        ("f'{i}' == 'x'", 1),
        ("i ** 2 > 1", 1),
        ("[i for i in s]", 1),
        ("lambda: 1", 1),
        ("i & 1", 1),
        ("isnull(i, s)", 1),
        ("column(i)", 8),
        ("i[0] > 1", 1),
        ("~b", 1),
        ("i in [None]", 7),
        ("b'x' == s", 1),
    ],
)
def test_anything_else_is_refused_with_its_position(text, position):
    with pytest.raises(SpecError) as caught:
        parse_filter(text)
    assert f"character {position} of" in caught.value.where
    assert caught.value.expected
    assert caught.value.next_step


def test_very_deep_or_long_text_is_refused():
    for text in ("(" * 300 + "i" + ")" * 300 + " > 1", "i > 1 and " * 2000 + "i > 1", "-" * 9000 + "i > 1"):
        with pytest.raises(SpecError):
            parse_filter(text)


@pytest.mark.parametrize(
    "text",
    ["b == 1", "s > 1", "i == '1'", "d > 'soon'", "t > '2024-01-01T00:00:00+00:00'", "i", "i + s > 1", "not s",
     "s in [1]", "b < 2", "isnan(s)", "i in ['1']", "m == 'x'", "s + 'a' == 'b'"],
)  # fmt: skip
def test_types_that_do_not_fit_are_refused_before_reading(text):
    with pytest.raises(SpecError) as caught:
        parse_filter(text).check(TABLE.schema)
    assert caught.value.where == "source.filter"
    assert caught.value.found


def test_an_unknown_column_names_the_nearest():
    with pytest.raises(SpecError, match="did you mean income"):
        parse_filter("incme > 1").check(pa.schema([("income", pa.int64())]))


def test_integer_overflow_is_an_error():
    table = pa.table({"i": [2**63 - 1]})
    with pytest.raises(SpecError, match="overflow"):
        parse_filter("i + 1 > 0").mask(table)


# ---- pruning

FILTERS = [
    "i > {n}", "i >= {n}", "i < {n}", "i <= {n}", "i == {n}", "i != {n}", "i > {n}.5", "not i > {n}", "not (i != {n})",
    "i in [{n}, 90]", "i not in [{n}]", "not (i not in [{n}])", "i is None", "i is not None", "not isnull(i)",
    "f > {n}", "f < {n}", "f == {n}", "f != {n}", "not f < {n}", "not f == {n}", "not (f in [{n}])", "isnan(f)",
    "s > 'k{n}'", "s == 'k{n}'", "s != 'k{n}'", "not s < 'k{n}'", "s in ['k{n}', 'zz']", "s is None",
    "d >= '2024-01-0{d}'", "d == '2024-01-0{d}'", "t > '2024-01-0{d}'", "z <= '2024-01-0{d}'", "m > {n}.5", "m == {n}",
    "b", "not b", "b == False", "i > {n} and f < {n}", "i > {n} or s == 'k{n}'", "not (i > {n} or f > {n})",
    "not (i > {n} and isnan(f))", "i + 1 > {n}", "i > f", "i8 > {n}", "u >= {n}", "g < {n}", "{n} < i < 9",
]  # fmt: skip


@st.composite
def tables(draw) -> pa.Table:
    rows = draw(st.integers(1, 12))

    def column(values, arrow_type):
        return pa.array(draw(st.lists(st.none() | values, min_size=rows, max_size=rows)), arrow_type)

    small = st.integers(0, 9)
    days = st.integers(1, 9).map(lambda day: datetime.datetime(2024, 1, day))
    floats = small.map(float) | st.sampled_from([NAN, math.inf, -math.inf, -0.0])
    return pa.table(
        {
            "i": column(small, pa.int64()),
            "i8": column(small, pa.int8()),
            "u": column(small, pa.uint64()),
            "f": column(floats, pa.float64()),
            "g": column(floats, pa.float32()),
            "s": column(small.map(lambda n: f"k{n}"), pa.string()),
            "d": column(days.map(lambda moment: moment.date()), pa.date32()),
            "t": column(days, pa.timestamp("ns")),
            "z": column(days, pa.timestamp("ms", "America/New_York")),
            "m": column(small.map(decimal.Decimal), pa.decimal128(9, 2)),
            "b": column(st.booleans(), pa.bool_()),
        }
    )


@settings(max_examples=choose(60, of=2000), deadline=None)
@given(table=tables(), text=st.sampled_from(FILTERS), n=st.integers(0, 9), group=st.integers(1, 4))
def test_a_wanted_row_is_never_pruned(tmp_path_factory, table, text, n, group):
    text = text.format(n=n, d=max(n, 1))
    path = tmp_path_factory.mktemp("prune") / "a.parquet"
    pq.write_table(table, path, row_group_size=group)
    (file,) = discover(Source(path=str(path), filter=text)).files
    keep = parse_filter(text).mask(table).to_pylist()
    for number, one in enumerate(file.row_groups):
        assert one.selected or not any(keep[number * group : number * group + one.rows])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("i > 100", False),
        ("i > 15", True),
        ("not i < 100", False),
        ("i == 5", False),
        ("i in [1, 2]", False),
        ("i in [1, 12]", True),
        ("i is None", False),
        ("i > 100 or s == 'a'", False),
        ("i > 15 and s == 'a'", False),
        ("s == 'n'", True),
        ("not (i >= 10)", False),
        ("k == 2", False),
        ("k == 1 and i > 15", True),
        ("h is not None", False),
        ("h == 1", False),
        ("unknown > 5", True),
    ],
)
def test_row_groups_that_bounds_rule_out(text, wanted):
    bounds = {
        "i": Bounds(pa.int64(), 10, 20, nulls=False),
        "s": Bounds(pa.string(), "m", "p"),
        "k": Bounds(pa.int64(), 1, 1, nulls=False),
        "h": Bounds(pa.int64(), None, None, only_nulls=True),
    }
    assert parse_filter(text).may_keep(bounds) is wanted
