"""Compare the values of a column with literals; the same for filters and for contracts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.sources.filters.literals import typed_literal
from pipeline.sources.filters.nodes import Comparison, Value
from pipeline.sources.types import as_type, read_type, storage_type

COMPARE: dict[Comparison, Callable[..., Any]] = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def compare(comparison: Comparison, values: Any, literal: Value) -> Any:
    """Return ``values comparison literal`` without loss: integers, decimals and times are compared as such.

    :param values: Arrow array [rows], chunked array or scalar.
    :returns: bool of the same shape, null for null.
    :raises SpecError: if ``literal`` cannot be compared with the values.
    """
    typed = typed_literal(literal, values.type)
    comparison, answer = typed.decide(comparison)
    if answer is not None:
        return constant_where_valid(values, answer)
    return COMPARE[comparison](comparable(values), typed.scalar)


def is_one_of(values: Any, literals: Sequence[Value]) -> Any:
    """Return True where a value equals one of ``literals``, as `compare` has it.

    :returns: bool of the same shape, null for null.
    :raises SpecError: if a literal cannot be compared with the values.
    """
    typed = [typed_literal(value, values.type) for value in literals]
    values = comparable(values)
    scalars = [literal.scalar for literal in typed if literal.scalar is not None and literal.is_exact]
    known = [scalar for scalar in scalars if scalar.type == values.type]
    if not known:
        return constant_where_valid(values, False)
    if pa.types.is_floating(values.type):
        # Hashing tells -0.0 from 0.0, which are equal. The sum is 0.0 for both.
        values = pc.add(values, pa.scalar(0.0, values.type))
    inside = pc.is_in(values, value_set=pa.array(known, values.type))
    return pc.if_else(pc.is_valid(values), inside, pa.scalar(None, pa.bool_()))


def constant_where_valid(values: Any, answer: bool) -> Any:
    """Return ``answer`` for every value, null for null."""
    return pc.if_else(pc.is_valid(values), pa.scalar(answer), pa.scalar(None, pa.bool_()))


def comparable(values: Any) -> Any:
    """Return equal values of a type that Arrow's kernels take: no dictionaries, extensions, views or float16."""
    kind = values.type
    wanted = _KERNEL_TYPES.get(kind, read_type(storage_type(kind)))
    if pa.types.is_decimal32(wanted) or pa.types.is_decimal64(wanted):
        wanted = pa.decimal128(wanted.precision, wanted.scale)
    if wanted == kind:
        return values
    if isinstance(kind, pa.BaseExtensionType):
        return comparable(values.cast(kind.storage_type))
    if isinstance(values, pa.Array) and not pa.types.is_decimal(kind):
        return as_type(values, wanted)
    return pc.cast(values, wanted)


_KERNEL_TYPES = {pa.float16(): pa.float32()}
