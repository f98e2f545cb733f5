"""Fast pickling of dataclasses with slots, for the thousands of partitions and receipts sent to and from workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type[Any])


def fast_pickle(cls: Class) -> Class:
    """Pickle objects of ``cls`` as the class and the values of the fields, in order. A class decorator.

    The default of ``dataclass(slots=True)`` looks up the names of the fields for each object, and takes 2 to 3 times as
    long in both directions.

    :raises TypeError: for a class with fewer than two fields, or with fields that are not positional arguments.
    """
    members = fields(cls)
    if len(members) < 2 or not all(member.init and not member.kw_only for member in members):
        raise TypeError(f"{cls.__name__} needs two fields or more, all of them arguments by position")
    values: Callable[[Any], tuple[Any, ...]] = attrgetter(*(member.name for member in members))

    def reduce(self: Any) -> tuple[Any, tuple[Any, ...]]:
        return cls, values(self)

    cls.__reduce__ = reduce  # type: ignore[assignment]
    return cls
