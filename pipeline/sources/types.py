"""Compare the column types of two Parquet files."""

from __future__ import annotations

import pyarrow as pa


def same_kind(one: pa.DataType, other: pa.DataType) -> bool:
    """True if two types hold the same values.

    Inner nullability, names of list items and the width of offsets depend on the writer and do not count.
    """
    return bool(one.equals(other) or plain_type(one).equals(plain_type(other)))


def plain_type(arrow_type: pa.DataType) -> pa.DataType:
    """Return the plain form of ``arrow_type``, to which every type of its kind can be cast."""
    types = pa.types
    if types.is_large_string(arrow_type) or types.is_string_view(arrow_type):
        return pa.string()
    if types.is_large_binary(arrow_type) or types.is_binary_view(arrow_type):
        return pa.binary()
    if types.is_dictionary(arrow_type):
        return pa.dictionary(arrow_type.index_type, plain_type(arrow_type.value_type), arrow_type.ordered)
    if types.is_struct(arrow_type):
        return pa.struct([plain_field(arrow_type.field(number)) for number in range(arrow_type.num_fields)])
    if types.is_map(arrow_type):
        return pa.map_(plain_type(arrow_type.key_type), plain_type(arrow_type.item_type))
    if types.is_fixed_size_list(arrow_type):
        return pa.list_(plain_type(arrow_type.value_type), arrow_type.list_size)
    if types.is_list(arrow_type) or types.is_large_list(arrow_type):
        return pa.list_(plain_type(arrow_type.value_type))
    return arrow_type


def plain_field(field: pa.Field) -> pa.Field:
    """Return ``field`` as nullable, without metadata, with the plain form of its type."""
    return pa.field(field.name, plain_type(field.type))
