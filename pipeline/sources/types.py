"""Column types of Parquet files: the type in which a column is read, and comparison of the types of two files."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pyarrow as pa

_CODES = pa.int32()
"""Index type of every dictionary that is read. A narrower type could not number the values of several files."""
_READ_AS = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
_NARROW = {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}


def same_kind(one: pa.DataType, other: pa.DataType) -> bool:
    """True if two types hold the same values.

    Inner nullability, names of list items, and the width of offsets and dictionary indices depend on the writer and do
    not count.
    """
    return bool(one.equals(other) or plain_type(one).equals(plain_type(other)))


def is_dtype(arrow_type: pa.DataType, name: str) -> bool:
    """True if ``name`` names a type of the same kind, such as ``float32`` or ``timestamp[us]``."""
    if str(arrow_type) == name:
        return True
    try:
        return same_kind(arrow_type, pa.type_for_alias(name))
    except ValueError:
        return False


@lru_cache(maxsize=4096)
def read_type(arrow_type: pa.DataType) -> pa.DataType:
    """Return the type in which a column of a file is read: no views, and one width of indices.

    Few kernels of Arrow take views. Dictionaries get int32 indices, so that values of any number of files can be
    numbered together. Inside lists and structs they are decoded: pyarrow reads such columns of one row group only.
    """
    types = pa.types
    if types.is_dictionary(arrow_type):
        return pa.dictionary(_CODES, read_type(arrow_type.value_type), arrow_type.ordered)
    if isinstance(arrow_type, pa.JsonType):
        return pa.json_(read_type(arrow_type.storage_type))
    if types.is_nested(arrow_type):
        return _nested(arrow_type, lambda field: field.with_type(_decoded(read_type(field.type))))
    return _READ_AS.get(arrow_type, arrow_type)


@lru_cache(maxsize=4096)
def plain_type(arrow_type: pa.DataType) -> pa.DataType:
    """Return the plain form of ``arrow_type``, to which every type of its kind can be cast."""
    types, kind = pa.types, read_type(arrow_type)
    if types.is_dictionary(kind):
        return pa.dictionary(_CODES, plain_type(kind.value_type), kind.ordered)
    if types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), kind.list_size)
    if types.is_list(kind) or types.is_large_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if types.is_nested(kind):
        return _nested(kind, plain_field)
    return _NARROW.get(kind, kind)


def plain_field(field: pa.Field) -> pa.Field:
    """Return ``field`` as nullable, without metadata, with the plain form of its type."""
    return pa.field(field.name, plain_type(field.type))


def empty_table(schema: pa.Schema) -> pa.Table:
    """Return a table without rows, of every type. `pyarrow.Schema.empty_table` fails for nested extension types."""
    return pa.table([pa.nulls(0, field.type) for field in schema], schema=schema)


def storage_type(arrow_type: pa.DataType) -> pa.DataType:
    """Return the type of the values: without dictionary, and without extension such as ``arrow.uuid``."""
    if pa.types.is_dictionary(arrow_type):
        return storage_type(arrow_type.value_type)
    if isinstance(arrow_type, pa.BaseExtensionType):
        return storage_type(arrow_type.storage_type)
    return arrow_type


def without_extensions(arrow_type: pa.DataType) -> pa.DataType:
    """Return the type with the types of storage, such as binary for ``arrow.uuid``, at every depth."""
    if isinstance(arrow_type, pa.BaseExtensionType):
        return without_extensions(arrow_type.storage_type)
    if not has_inner_extension(arrow_type):
        return arrow_type
    return _nested(arrow_type, lambda field: field.with_type(without_extensions(field.type)))


def inner_types(arrow_type: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Return the type with ``change`` applied to every type that is inside of a list, a struct or a map."""

    def inside(field: pa.Field) -> pa.Field:
        kind = inner_types(field.type, change) if pa.types.is_nested(field.type) else change(field.type)
        return field if kind == field.type else field.with_type(kind)

    return _nested(arrow_type, inside)


def has_inner_extension(arrow_type: pa.DataType) -> bool:
    """True if a list, struct or map holds extension types, of which pandas makes no lists."""
    inside = [arrow_type.field(number).type for number in range(arrow_type.num_fields)]
    return any(isinstance(kind, pa.BaseExtensionType) or has_inner_extension(kind) for kind in inside)


def has_inner_dictionary(arrow_type: pa.DataType) -> bool:
    """True if a list, struct or map holds dictionaries. pyarrow reads them only one row group at a time."""
    inside = [arrow_type.field(number).type for number in range(arrow_type.num_fields)]
    return any(pa.types.is_dictionary(kind) or has_inner_dictionary(kind) for kind in inside)


def has_empty_struct(arrow_type: pa.DataType) -> bool:
    """True if a struct without fields is in ``arrow_type``. Parquet stores nothing of it, and pyarrow leaves it out."""
    if pa.types.is_struct(arrow_type) and not arrow_type.num_fields:
        return True
    return any(has_empty_struct(arrow_type.field(number).type) for number in range(arrow_type.num_fields))


def as_type(array: pa.Array, arrow_type: pa.DataType) -> pa.Array:
    """Return ``array`` as ``arrow_type``, a type of the same kind.

    :raises pyarrow.ArrowException: if a value does not fit.
    """
    if array.type.equals(arrow_type):
        return array
    if isinstance(arrow_type, pa.BaseExtensionType):
        storage = array.storage if isinstance(array.type, pa.BaseExtensionType) else array
        return pa.ExtensionArray.from_storage(arrow_type, as_type(storage, arrow_type.storage_type))
    return array.cast(arrow_type)


def _decoded(arrow_type: pa.DataType) -> pa.DataType:
    return arrow_type.value_type if pa.types.is_dictionary(arrow_type) else arrow_type


def _nested(arrow_type: pa.DataType, inside: Callable[[pa.Field], pa.Field]) -> pa.DataType:
    """Return a nested type with ``inside`` applied to its fields. Lists of views become lists."""
    types = pa.types
    if types.is_struct(arrow_type):
        return pa.struct([inside(arrow_type.field(number)) for number in range(arrow_type.num_fields)])
    if types.is_map(arrow_type):
        return pa.map_(inside(arrow_type.key_field), inside(arrow_type.item_field), arrow_type.keys_sorted)
    if types.is_fixed_size_list(arrow_type):
        return pa.list_(inside(arrow_type.value_field), arrow_type.list_size)
    if types.is_list(arrow_type) or types.is_list_view(arrow_type):
        return pa.list_(inside(arrow_type.value_field))
    if types.is_large_list(arrow_type) or types.is_large_list_view(arrow_type):
        return pa.large_list(inside(arrow_type.value_field))
    return arrow_type
