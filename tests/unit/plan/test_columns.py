"""Contracts of columns: what the plan accepts, every worker can check."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import SchemaDrift, SpecError
from pipeline.plan.columns import check_contract
from pipeline.plan.recipe import ColumnRule
from pipeline.scoring.contract import check
from pipeline.spec.parts import ColumnContract
from pipeline.testing.arrow_types import typed_columns

COLUMNS = typed_columns()
DAY, MOMENT = dt.date(2024, 1, 1), dt.datetime(2024, 1, 1)
BERLIN, TEXT_CODES = pa.timestamp("us", "Europe/Berlin"), pa.dictionary(pa.int8(), pa.string())


def accepts(kind: pa.DataType, **contract: Any) -> bool:
    """True if the plan accepts the contract for a column of type ``kind``."""
    try:
        check_contract("x", ColumnContract(**contract), pa.field("x", kind), path="a.parquet")
    except (SpecError, SchemaDrift):
        return False
    return True


def rejected(column: pa.Array, **rule: Any) -> list[int]:
    return check(pa.table({"x": column}), [ColumnRule("x", **rule)]).rows.tolist()


@pytest.mark.fault(89)
@pytest.mark.parametrize(
    ("kind", "values", "contract", "rows"),
    [
        (pa.int64(), [2**60 + 1, 0, None], {"min": 0.5}, [1]),
        (pa.int64(), [2**60 + 1, 5], {"max": 1e18}, [0]),
        (pa.int64(), [2**53 + 1, 2**53], {"max": float(2**53)}, [0]),
        (pa.int64(), [5], {"min": 2**63}, [0]),
        (pa.uint64(), [2**64 - 1, 1], {"min": -1}, []),
        (pa.uint64(), [2**64 - 1, 0], {"max": 0.5}, [0]),
        (pa.uint32(), [1], {"min": -1}, []),
        (pa.int8(), [1], {"max": 1000}, []),
        (pa.float32(), [0.1, 0.2], {"max": 0.1}, [1]),
        (pa.float16(), [1.0, 3.0], {"max": 2}, [1]),
        (pa.decimal128(9, 2), [Decimal("1.00"), Decimal("0.10")], {"min": 0.5}, [1]),
        (pa.decimal128(38, 2), [Decimal("1.00"), Decimal("-1.00")], {"min": 0}, [1]),
        (pa.decimal256(70, 2), [Decimal("1.00"), Decimal("0.00")], {"min": 0.001}, [1]),
        (pa.decimal128(38, 30), [Decimal("1.00")], {"min": 1e10}, [0]),
        (pa.decimal32(9, 2), [Decimal("1.00"), Decimal("3.00")], {"max": 2}, [1]),
        (pa.date32(), [DAY, dt.date(2023, 1, 1)], {"min": "2024-01-01"}, [1]),
        (pa.date64(), [DAY, dt.date(2023, 1, 1)], {"min": "2024-01-01"}, [1]),
        (pa.timestamp("us"), [MOMENT], {"min": "2024-01-01"}, []),
        (pa.timestamp("s"), [MOMENT], {"min": "2024-01-01T00:00:00.5"}, [0]),
        (pa.timestamp("ns"), [MOMENT], {"max": "9999-12-31"}, []),
        (BERLIN, [MOMENT, dt.datetime(2023, 12, 31, 22)], {"min": "2024-01-01"}, [1]),
        (BERLIN, [MOMENT, dt.datetime(2023, 12, 31, 22)], {"min": "2024-01-01T00:00:00+01:00"}, [1]),
        (pa.timestamp("ns", "UTC"), [MOMENT], {"min": "2024-01-01T00:00:00Z"}, []),
        (pa.time32("s"), [dt.time(1), dt.time(0)], {"min": "00:30:00"}, [1]),
        (pa.time64("us"), [dt.time(1), dt.time(0)], {"min": "00:30"}, [1]),
        (pa.time64("ns"), [dt.time(1), dt.time(3)], {"max": "02:00"}, [1]),
        (pa.bool_(), [True, False], {"allowed": (True,)}, [1]),
        (pa.bool_(), [True, False], {"min": True}, [1]),
        (pa.string(), ["b", "A"], {"min": "a"}, [1]),
        (pa.large_string(), ["b", "c"], {"allowed": ("a", "b")}, [1]),
        (pa.string_view(), ["b", "c"], {"allowed": ("a", "b")}, [1]),
        (pa.string_view(), ["b", "A"], {"min": "a"}, [1]),
        (TEXT_CODES, ["b", "c"], {"allowed": ("b",)}, [1]),
        (TEXT_CODES, ["b", "A"], {"min": "a"}, [1]),
        (pa.dictionary(pa.int32(), pa.int64()), [5, 6], {"allowed": (5,), "min": 0}, [1]),
        (pa.int32(), [1, 2, 3], {"allowed": (1, 2.0)}, [2]),
        (pa.int32(), [1, 2], {"allowed": (1, 2.5)}, [1]),
        (pa.float32(), [0.1, 0.2], {"allowed": (0.1,)}, [1]),
        (pa.float64(), [1.0, 3.0, float("nan")], {"allowed": (1, 2)}, [1]),
        (pa.float64(), [-0.0, 0.0, 1.0, 2.0], {"allowed": (0.0, 1.0)}, [3]),
        (pa.float32(), [-0.0, 0.5], {"allowed": (0, 1)}, [1]),
        (pa.decimal128(9, 2), [Decimal("1.00"), Decimal("2.50"), Decimal("2.00")], {"allowed": (1, 2.5)}, [2]),
        (pa.date32(), [DAY, dt.date(2023, 1, 1)], {"allowed": ("2024-01-01",)}, [1]),
        (pa.timestamp("us", "UTC"), [MOMENT, dt.datetime(2023, 1, 1)], {"allowed": ("2024-01-01",)}, [1]),
        (pa.uint64(), [2**64 - 1, 1], {"allowed": (1,)}, [0]),
        (pa.int64(), [2**62, 2], {"allowed": (1.5, 2)}, [0]),
        (pa.null(), [None], {"min": 1}, []),
        (pa.null(), [None], {"allowed": ("a",)}, []),
        (pa.null(), [None], {"finite": True}, []),
        (pa.binary(), [b"a", None], {"nullable": False}, [1]),
        (pa.list_(pa.int64()), [[1], None], {"nullable": False}, [1]),
    ],
)
def test_a_contract_that_the_plan_accepts_rejects_the_same_rows_on_a_worker(
    kind: pa.DataType, values: list[Any], contract: dict[str, Any], rows: list[int]
) -> None:
    assert accepts(kind, **contract)
    assert rejected(pa.array(values, kind), **contract) == rows
    assert rejected(pa.array([], kind), **contract) == []


@pytest.mark.fault(89)
@pytest.mark.parametrize("name", COLUMNS)
def test_no_contract_fails_on_a_worker_after_the_plan_accepted_it(name: str) -> None:
    """Every type beside every kind of literal: the plan refuses it, or workers check it."""
    column = COLUMNS[name]
    literals = [0, -1, 0.5, 2**53 + 1, 1e18, 1e300, -0.0, True, "a", "2024-01-01", "9999-12-31", "00:30:00"]
    literals += ["2024-01-01T00:00:00+01:00", 10**400]
    outcomes = set()
    for literal in literals:
        for contract in ({"min": literal}, {"max": literal}, {"allowed": (literal,)}):
            is_accepted = accepts(column.type, **contract)
            outcomes.add(is_accepted)
            if is_accepted:
                rejected(column, **contract)
            else:
                with pytest.raises(SpecError, match="contract"):
                    rejected(column, **contract)
    for contract in ({"nullable": False}, {"finite": True}):
        if accepts(column.type, **contract):
            rejected(column, **contract)
    assert outcomes


@pytest.mark.parametrize("name", COLUMNS)
def test_a_dtype_that_the_plan_accepts_rejects_no_row(name: str) -> None:
    for dtype in ("string", "large_string", "string_view", "int64", "float32", "date32", "timestamp[us]", name):
        if accepts(COLUMNS[name].type, dtype=dtype):
            assert rejected(COLUMNS[name], dtype=dtype, min=None) == []


@pytest.mark.parametrize(
    ("kind", "contract", "where"),
    [
        (pa.duration("s"), {"min": 1}, "contract.x.min"),
        (pa.string(), {"max": 1}, "contract.x.max"),
        (pa.int64(), {"allowed": ("a",)}, "contract.x.allowed"),
        (pa.list_(pa.int64()), {"allowed": (1,)}, "contract.x.allowed"),
        (pa.string(), {"finite": True}, "contract.x.finite"),
    ],
)
def test_a_contract_that_does_not_fit_names_its_place(kind: pa.DataType, contract: dict[str, Any], where: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_contract("x", ColumnContract(**contract), pa.field("x", kind), path="a.parquet")
    assert caught.value.where == where
    assert str(kind) in caught.value.found
