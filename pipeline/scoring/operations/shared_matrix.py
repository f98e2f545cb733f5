"""Share one feature matrix between the models of a chain that encode the same columns in the same way."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.models.flavors import find_flavor
from pipeline.plan.recipe import ColumnRule, ScoreRecipe


@dataclass(frozen=True)
class EncodedRows:
    """A matrix of rows that keep some rules, and the columns of which it was made."""

    columns: pa.Table
    """Holds the memory of the columns, so that no other column gets its address."""
    position: np.ndarray
    matrix: np.ndarray
    rules: tuple[ColumnRule, ...]
    """Rules that every row keeps."""
    finite: frozenset[str]
    """Features without infinite values."""


class SharedMatrix:
    """The matrix of one of several models with equal encodings: made by the first, dropped behind the last."""

    def __init__(self, place: list[EncodedRows], *, is_first: bool, is_last: bool) -> None:
        """:param place: holds the matrix; the same list for all these models."""
        self._place = place
        self._is_first = is_first
        self._is_last = is_last

    def find(self, columns: pa.Table, position: np.ndarray) -> EncodedRows | None:
        """Return the matrix if it was made of the same rows and memory; None if not, or if this model is the first.

        :param columns: the features, in order.
        """
        if not self._place:
            return None
        found = self._place[0]
        if self._is_first or self._is_last:
            self._place.clear()  # at a second attempt at a batch, the memory of the first is needed
        is_same = not self._is_first and np.array_equal(position, found.position)
        return found if is_same and _is_same_memory(columns, found.columns) else None

    def keep(self, encoded: EncodedRows) -> None:
        """Keep a matrix for the models behind this one."""
        if not self._is_last:
            self._place[:] = [encoded]


def share_matrices(scores: Sequence[ScoreRecipe]) -> list[SharedMatrix | None]:
    """Return what each model shares with others; None for a model whose encoding no other has.

    :param scores: models that score the same rows one after the other, in order.
    """
    keys = list(map(encoding_key, scores))
    places: dict[Hashable, list[EncodedRows]] = {}
    shared: list[SharedMatrix | None] = []
    for number, key in enumerate(keys):
        is_first, is_last = key not in keys[:number], key not in keys[number + 1 :]
        if key is None or (is_first and is_last):
            shared.append(None)
            continue
        shared.append(SharedMatrix(places.setdefault(key, []), is_first=is_first, is_last=is_last))
    return shared


def encoding_key(score: ScoreRecipe) -> Hashable:
    """Return a key that is equal for models which make equal matrices of the same table; None if that is not known."""
    version = score.model
    if not find_flavor(version.flavor).encodes_by_features:
        return None
    kinds = tuple(
        (feature.kind, feature.categories, feature.category_bytes, feature.category_offsets)
        for feature in version.features
    )
    return version.flavor, score.features, repr(kinds)  # as text, 1 and True are different categories


def _is_same_memory(one: pa.Table, other: pa.Table) -> bool:
    """Return True if both tables have the same columns in memory, whatever their names."""
    return all(
        first.type == second.type and first.num_chunks == second.num_chunks and _addresses(first) == _addresses(second)
        for first, second in zip(one.columns, other.columns, strict=True)
    )


def _addresses(column: pa.ChunkedArray) -> list[tuple[object, ...]]:
    return [_address(chunk) for chunk in column.chunks]


def _address(chunk: pa.Array) -> tuple[object, ...]:
    if isinstance(chunk, pa.ExtensionArray):
        return _address(chunk.storage)
    values = _address(chunk.dictionary) if isinstance(chunk, pa.DictionaryArray) else ()
    return (chunk.offset, len(chunk), *(buffer and buffer.address for buffer in chunk.buffers()), values)
