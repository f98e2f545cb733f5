"""Check the contract of columns: find the rows that break a rule, column by column.

A rule that every row satisfies costs at most one pass over the column. Messages are made only for rows that break a
rule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.common.arrow_arrays import float_values
from pipeline.common.reasons import Reason, ReasonKind
from pipeline.errors import PipelineError, SpecError, StepFailed
from pipeline.models.model import ModelVersion
from pipeline.plan.recipe import ColumnRule
from pipeline.scoring.arrow import take_values
from pipeline.scoring.rows import Failures
from pipeline.scoring.value_text import value_text
from pipeline.sources.filters.compare import comparable, compare, is_one_of
from pipeline.sources.filters.literals import typed_literal
from pipeline.sources.filters.nodes import Comparison
from pipeline.sources.types import empty_table, is_dtype

SHOWN = 200
"""Maximum characters of a value in a message."""


def feature_rules(version: ModelVersion, columns: Sequence[str]) -> tuple[ColumnRule, ...]:
    """Return the rules that a model implies: finite numbers and known categories. Missing values are allowed.

    :param columns: column for each feature of the model, in the model's order.
    """
    return tuple(
        ColumnRule(column, allowed=feature.categories)
        if feature.kind in ("category", "text", "any")
        and (feature.categories is not None or feature.kind != "category")
        else ColumnRule(column, finite=True)
        for column, feature in zip(columns, version.features, strict=True)
    )


def beyond_finite(rules: Sequence[ColumnRule], columns: Collection[str]) -> tuple[ColumnRule, ...]:
    """Return ``rules`` without those that only require one of ``columns`` to be finite: `check_matrix` checks that.

    Every rule takes time for each batch, even one that reads no row.
    """
    return tuple(rule for rule in rules if rule.column not in columns or rule != ColumnRule(rule.column, finite=True))


def check(table: pa.Table, rules: Sequence[ColumnRule], *, skip_finite: Collection[str] = ()) -> Failures:
    """Find the rows of ``table`` that break a rule.

    :param skip_finite: columns whose ``finite`` is checked elsewhere (see `check_matrix`).
    :raises StepFailed: when a rule's column is not in the table.
    """
    return _check_columns(table, _columns(table), rules, skip_finite=skip_finite)


def _columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    """Return the columns of ``table`` by name.

    To be called once a table: with thousands of columns, Arrow's own look-up by name takes longer than scoring.
    """
    return dict(zip(table.column_names, table.columns, strict=True))


def _check_columns(
    table: pa.Table,
    columns: Mapping[str, pa.ChunkedArray],
    rules: Sequence[ColumnRule],
    *,
    skip_finite: Collection[str] = (),
) -> Failures:
    first = np.full(0, -1, dtype=np.int32)
    broken: list[tuple[ColumnRule, str]] = []
    for rule in rules:
        if rule.column not in columns:
            raise StepFailed(
                f"the contract names the column {rule.column!r}, which the rows do not have here",
                found=", ".join(table.column_names),
                next_step="keep it in the map steps, or take it out of the contract",
            )
        column = columns[rule.column]
        for name, test in _tests(rule, column.type, skip_finite=rule.column in skip_finite):
            fails = test(column)
            if fails is None:
                continue
            if not len(first):
                first = np.full(table.num_rows, -1, dtype=np.int32)
            first[fails & (first < 0)] = len(broken)
            broken.append((rule, name))
    rows = np.flatnonzero(first >= 0)
    if not len(rows):
        return Failures()
    return _explain(table, rows, [broken[index] for index in first[rows]])


def check_rules(schema: pa.Schema, rules: Sequence[ColumnRule], *, sample: pa.Table | None = None) -> None:
    """Make every check of ``rules`` without rows and on a sample, so that none fails for its types on a worker.

    Rows of the sample that break a rule are no error: workers reject them.

    :raises SpecError: for values that cannot be compared with their column.
    """
    tables = [empty_table(schema), *([] if sample is None else [sample])]
    for rule, (table, columns) in product(rules, [(table, _columns(table)) for table in tables]):
        try:
            _check_columns(table, columns, [rule])
        except PipelineError:
            raise
        except Exception as error:
            raise SpecError(
                f"the contract of the column {rule.column!r} cannot be checked",
                where=f"contract.{rule.column}",
                found=f"{type(error).__name__}: {error}, in {table.num_rows:,} rows of a sample",
                expected="a rule that can be checked for every value of the column",
                next_step=f"take the rule out of contract.{rule.column}, or change the type of the column",
            ) from error


def has_values(rules: Iterable[ColumnRule]) -> bool:
    """True if a rule compares a column with values."""
    return any(rule.min is not None or rule.max is not None or rule.allowed is not None for rule in rules)


def check_matrix(matrix: np.ndarray, table: pa.Table, columns: Sequence[str], finite: Collection[str]) -> Failures:
    """Find the rows in which a column of ``finite`` is infinite in float32, in the input or by overflow.

    :param matrix: float32 [rows, columns], the rows of ``table`` as the model gets them.
    """
    if not finite or not (infinite := np.isinf(matrix)).any():
        return Failures()
    infinite[:, [column not in finite for column in columns]] = False
    rows = np.flatnonzero(infinite.any(axis=1))
    where = infinite[rows].argmax(axis=1)
    return _explain(table, rows, [(ColumnRule(columns[index], finite=True), "finite") for index in where])


Test = Callable[[pa.ChunkedArray], "np.ndarray | None"]


def _tests(rule: ColumnRule, kind: pa.DataType, *, skip_finite: bool) -> list[tuple[str, Test]]:
    """Return name and test of each rule; a test returns a mask of the rows that fail, or None if none does."""
    if rule.dtype is not None and not is_dtype(kind, rule.dtype):
        return [("dtype", lambda column: np.ones(len(column), dtype=bool))]
    tests: list[tuple[str, Test]] = []
    if not rule.nullable:
        tests.append(("nullable", _nulls))
    if rule.finite and not skip_finite and pa.types.is_floating(kind):
        tests.append(("finite", _infinities))
    if rule.min is not None:
        tests.append(("min", _compares("<", rule, rule.min, kind)))
    if rule.max is not None:
        tests.append(("max", _compares(">", rule, rule.max, kind)))
    if rule.allowed is not None:
        tests.append(("allowed", _not_allowed(rule, kind)))
    return tests


def _nulls(column: pa.ChunkedArray) -> np.ndarray | None:
    if not pa.types.is_floating(column.type):
        return _mask(pc.is_null(column)) if column.null_count else None
    return _mask(pc.is_null(column, nan_is_null=True))


def _infinities(column: pa.ChunkedArray) -> np.ndarray | None:
    if column.null_count:
        return _mask(pc.is_inf(column))
    # Several times faster than Arrow's kernel; every value of every float feature passes through this test.
    parts = [np.isinf(float_values(chunk)) for chunk in column.chunks]
    return np.concatenate(parts) if any(part.any() for part in parts) else None


def _compares(comparison: Comparison, rule: ColumnRule, limit: Any, kind: pa.DataType) -> Test:
    _check_literals(rule, [limit], kind)
    return lambda column: _mask(compare(comparison, column, limit))


def _not_allowed(rule: ColumnRule, kind: pa.DataType) -> Test:
    allowed = list(rule.allowed or ())
    _check_literals(rule, allowed, kind)

    def test(column: pa.ChunkedArray) -> np.ndarray | None:
        outside = pc.invert(is_one_of(column, allowed))
        values = comparable(column)
        if pa.types.is_floating(values.type):
            outside = pc.and_not(outside, pc.is_nan(values))
        return _mask(outside)

    return test


def _check_literals(rule: ColumnRule, literals: Sequence[Any], kind: pa.DataType) -> None:
    try:
        for literal in literals:
            typed_literal(literal, kind)
    except SpecError as error:
        raise SpecError(
            f"the contract of the column {rule.column!r} has values that cannot be compared with it",
            where=f"contract.{rule.column}",
            found=error.found,
            expected=error.expected,
            next_step=f"fix contract.{rule.column}, or the type of the column in the map steps",
        ) from error


def _mask(fails: pa.ChunkedArray) -> np.ndarray | None:
    if not pc.any(fails).as_py():
        return None
    return np.asarray(fails.fill_null(False).to_numpy())


def _explain(table: pa.Table, rows: np.ndarray, broken: list[tuple[ColumnRule, str]]) -> Failures:
    names = {rule.column for rule, _ in broken}
    values = {name: take_values(table.column(name), rows) for name in names}
    reasons = tuple(str(Reason(ReasonKind.CONTRACT, name, rule.column)) for rule, name in broken)
    messages = tuple(
        f"{rule.column} is {value_text(values[rule.column], index, limit=SHOWN)}, {_words(rule, name, table)}"
        for index, (rule, name) in enumerate(broken)
    )
    return Failures(rows.astype(np.int64), reasons, messages)


def _words(rule: ColumnRule, name: str, table: pa.Table) -> str:
    if name == "dtype":
        return f"of type {table.schema.field(rule.column).type}, not {rule.dtype}"
    if name == "nullable":
        return "but must not be missing"
    if name == "finite":
        return "which is not a finite float32"
    if name == "min":
        return f"below {rule.min!r}"
    if name == "max":
        return f"above {rule.max!r}"
    return f"not one of {', '.join(map(repr, rule.allowed or ()))[:SHOWN]}"
