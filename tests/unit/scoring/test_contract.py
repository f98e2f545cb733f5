"""Checks of the contract on batches."""

from __future__ import annotations

import datetime as dt
import decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import SpecError, StepFailed
from pipeline.models.model import Feature, ModelVersion
from pipeline.plan.recipe import ColumnRule
from pipeline.scoring import contract
from pipeline.scoring.contract import beyond_finite, check, check_matrix, check_rules, feature_rules
from pipeline.scoring.rows import Failures
from pipeline.sources.types import is_dtype

NAN, INF = float("nan"), float("inf")


def failing(column: pa.Array | pa.ChunkedArray, **rule: Any) -> dict[int, str]:
    """Row -> name of the rule it breaks."""
    failures = check(pa.table({"x": column}), [ColumnRule("x", **rule)])
    assert all(reason.startswith("contract:x:") for reason in failures.reasons)
    return {int(row): reason.split(":")[2] for row, reason in zip(failures.rows, failures.reasons, strict=True)}


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.float16()])
def test_finite_rejects_infinities_and_nothing_else(kind: pa.DataType) -> None:
    values = pa.array([1.0, INF, -INF, NAN, 0.0]).cast(kind)
    assert failing(values, finite=True) == {1: "finite", 2: "finite"}
    with_null = pa.chunked_array([pa.array([INF, None]).cast(kind), values])
    assert failing(with_null, finite=True) == {0: "finite", 3: "finite", 4: "finite"}
    assert failing(values[3:], finite=True) == {}


def test_finite_does_not_apply_to_integers() -> None:
    assert failing(pa.array([1, 2, None]), finite=True) == {}


def test_nullable_rejects_nulls_and_nan() -> None:
    assert failing(pa.array([1.0, None, NAN]), nullable=False) == {1: "nullable", 2: "nullable"}
    assert failing(pa.array(["a", None]), nullable=False) == {1: "nullable"}
    assert failing(pa.array([[1], None]), nullable=False) == {1: "nullable"}
    assert failing(pa.array(["a", None])) == {}


@pytest.mark.parametrize(
    ("column", "low", "high"),
    [
        (pa.array([1, 5, 9, None]), 2, 8),
        (pa.array([1, 5, 9, None]), 1.5, 8.5),
        (pa.array([1, 5, 9, None], pa.uint8()), 2, 8),
        (pa.array([1.0, 5.0, 9.0, NAN]), 2, 8),
        (pa.array([1.0, 5.0, 9.0, None], pa.float32()), 2.5, 8.5),
        (pa.array([decimal.Decimal(n) for n in ("1.00", "5.00", "9.00")]), 2, 8),
        (pa.array(["b", "m", "x", None]), "c", "w"),
        (pa.array(["b", "m", "x", None]).dictionary_encode(), "c", "w"),
        (pa.array([dt.date(2026, 1, 1), dt.date(2026, 5, 1), dt.date(2026, 9, 1)]), "2026-02-01", "2026-08-01"),
        (
            pa.array([dt.datetime(2026, 1, 1), dt.datetime(2026, 5, 1), dt.datetime(2026, 9, 1), None]),
            "2026-02-01 00:00:00",
            "2026-08-01 00:00:00",
        ),
    ],
)
def test_limits_are_inclusive_and_leave_missing_values_alone(column: pa.Array, low: Any, high: Any) -> None:
    assert failing(column, min=low, max=high) == {0: "min", 2: "max"}
    if isinstance(low, int) and not pa.types.is_decimal(column.type):
        assert failing(column, min=1, max=9) == {}


@pytest.mark.parametrize(
    ("column", "allowed"),
    [
        (pa.array(["a", "z", None, "b"]), ("a", "b")),
        (pa.array(["a", "z", None, "b"]).dictionary_encode(), ("a", "b")),
        (pa.array(["a", "z", None, "b"]).cast(pa.large_string()), ("a", "b")),
        (pa.array([1, 26, None, 2], pa.int16()), (1, 2)),
        (pa.array([1.0, 26.0, NAN, 2.0]), (1, 2)),
        (pa.array([True, False, None, True]), (True,)),
    ],
)
def test_allowed_rejects_strangers(column: pa.Array, allowed: tuple[Any, ...]) -> None:
    assert failing(column, allowed=allowed) == {1: "allowed"}
    assert failing(pa.chunked_array([column[:1], column[1:]]), allowed=allowed) == {1: "allowed"}


def test_bounds_beyond_the_type_of_the_column_are_compared() -> None:
    small = pa.array([1, 200, None], pa.uint8())
    assert failing(small, min=-5, max=1000) == {}
    assert failing(small, min=300) == {0: "min", 1: "min"}
    assert failing(small, allowed=(-1, 200, 70000)) == {0: "allowed"}
    assert failing(pa.array([1, 2**63 + 5], pa.uint64()), max=2**62, min=-1) == {1: "max"}
    assert failing(pa.array([1, 2**63 + 5], pa.uint64()), allowed=(-1, 2**63 + 5)) == {0: "allowed"}
    assert failing(pa.array([decimal.Decimal("1.50")]), max=1000, min=-1000) == {}
    assert failing(pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.00")]), allowed=(2, 1000)) == {0: "allowed"}


def test_a_dtype_that_is_not_the_one_rejects_every_row() -> None:
    assert failing(pa.array([1, 2]), dtype="float32") == {0: "dtype", 1: "dtype"}
    assert failing(pa.array([1, 2]), dtype="int64") == {}


@pytest.mark.parametrize(
    ("kind", "name", "is_it"),
    [
        (pa.float32(), "float32", True),
        (pa.float32(), "float", True),
        (pa.float64(), "double", True),
        (pa.float64(), "float32", False),
        (pa.timestamp("us"), "timestamp[us]", True),
        (pa.timestamp("us", "UTC"), "timestamp[us]", False),
        (pa.timestamp("us", "UTC"), "timestamp[us, tz=UTC]", True),
        (pa.date32(), "date32", True),
        (pa.decimal128(9, 2), "decimal128(9, 2)", True),
        (pa.list_(pa.int64()), "nonsense", False),
    ],
)
def test_dtypes_go_by_their_arrow_names(kind: pa.DataType, name: str, is_it: bool) -> None:
    assert is_dtype(kind, name) is is_it


def test_the_first_rule_that_fails_is_the_reason() -> None:
    table = pa.table({"a": [5, None, 1, 9], "b": [INF, INF, 1.0, None]})
    rules = [ColumnRule("a", nullable=False, max=8), ColumnRule("b", finite=True, nullable=False)]
    failures = check(table, rules)
    assert failures.rows.tolist() == [0, 1, 3]
    assert failures.reasons == ("contract:b:finite", "contract:a:nullable", "contract:a:max")
    assert failures.messages == (
        "b is inf, which is not a finite float32",
        "a is None, but must not be missing",
        "a is 9, above 8",
    )


def test_messages_show_at_most_200_characters_of_a_value() -> None:
    failures = check(pa.table({"x": ["y" * 5000]}), [ColumnRule("x", allowed=("z" * 5000,))])
    assert len(failures.messages[0]) < 450


def test_a_column_that_is_not_there_is_no_reject() -> None:
    with pytest.raises(StepFailed, match="names the column 'y'"):
        check(pa.table({"x": [1]}), [ColumnRule("y")])


def test_values_that_do_not_compare_are_an_error_of_the_spec() -> None:
    with pytest.raises(SpecError, match="cannot be compared") as caught:
        check(pa.table({"x": [1]}), [ColumnRule("x", allowed=("a", "b"))])
    assert caught.value.where == "contract.x"


def test_all_is_fine_for_no_rows_and_no_rules() -> None:
    empty = pa.table({"x": pa.array([], pa.float32())})
    assert len(check(empty, [ColumnRule("x", nullable=False, finite=True, min=0, max=1, allowed=(1,))])) == 0
    assert len(check(pa.table({"x": [INF]}), [])) == 0


def test_value_that_overflows_float32_is_infinite_to_the_model() -> None:
    table = pa.table({"a": [1e300, 1.0, 2.0], "b": [INF, INF, NAN]})
    matrix = np.array([[INF, INF], [1, INF], [2, NAN]], "f4")
    failures = check_matrix(matrix, table, ("a", "b"), frozenset({"a"}))
    assert failures.rows.tolist() == [0]
    assert failures.reasons == ("contract:a:finite",)
    assert failures.messages == ("a is 1e+300, which is not a finite float32",)
    both = check_matrix(matrix, table, ("a", "b"), frozenset({"a", "b"}))
    assert both.reasons == ("contract:a:finite", "contract:b:finite")


def test_rules_that_the_matrix_is_checked_for_are_not_checked_again() -> None:
    plain, more, other = ColumnRule("a", finite=True), ColumnRule("a", finite=True, max=8), ColumnRule("b", finite=True)
    assert beyond_finite([plain, more, other], {"a"}) == (more, other)
    assert beyond_finite([plain, more, other], ()) == (plain, more, other)


def test_a_model_asks_for_finite_numbers_and_known_categories() -> None:
    features = (Feature("a"), Feature("b", "category", ("x",)), Feature("c", "category"))
    version = ModelVersion("m", "1", "m.ubj", "0" * 64, "xgboost", 1, features, "binary", 1)
    assert feature_rules(version, ("A", "B", "C")) == (
        ColumnRule("A", finite=True),
        ColumnRule("B", allowed=("x",)),
        ColumnRule("C", finite=True),
    )


def test_failures_merge_in_row_order() -> None:
    one = Failures(np.array([0, 5]), ("a", "b"), ("1", "2"))
    other = Failures(np.array([3]), ("c",), ("3",))
    merged = Failures.merged([one, Failures(), other])
    assert merged.rows.tolist() == [0, 3, 5]
    assert merged.reasons == ("a", "c", "b")
    assert merged.renumber(np.arange(10, 20)).rows.tolist() == [10, 13, 15]


class TestCheckRules:
    def test_columns_are_looked_up_once_a_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Once a rule, the look-up took 8 seconds of planning 2,000 columns."""
        looked_up: list[int] = []
        columns = contract._columns

        def counted(table: pa.Table) -> dict[str, pa.ChunkedArray]:
            looked_up.append(table.num_rows)
            return columns(table)

        monkeypatch.setattr(contract, "_columns", counted)
        names = [f"f{number}" for number in range(50)]
        sample = pa.table({name: pa.array([1.0, INF], pa.float32()) for name in names})
        check_rules(sample.schema, [ColumnRule(name, finite=True) for name in names], sample=sample)
        assert sorted(looked_up) == [0, 2]

    def test_rule_that_fails_on_the_sample_only_is_named(self) -> None:
        """Among many rules, the one whose values cannot be compared with a column's is in the error."""
        sample = pa.table({"x": [1.5], "y": ["a"]})
        rules = [ColumnRule("x", min=0.0), ColumnRule("y", min=3.0)]
        with pytest.raises(SpecError) as caught:
            check_rules(sample.schema, rules, sample=sample)
        assert "contract.y" in str(caught.value) or "'y'" in str(caught.value)
