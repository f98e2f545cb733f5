"""`Parser`: the protocol of text formats, and what they share: rows in place of those that cannot be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipeline.common.reasons import Reason, ReasonKind
from pipeline.errors import SpecError
from pipeline.sources.batch import Problem
from pipeline.sources.text.scan import Dialect

MOST_SHOWN = 80
"""Characters of a value in a message."""


@dataclass(frozen=True)
class Unreadable:
    """A row that cannot be read."""

    row: int
    """Position among the rows that were parsed together."""
    kind: ReasonKind
    column: str
    """Column of the value; empty if the whole line is at fault."""
    expected: str
    """Type of the column, or rule that the line breaks."""
    found: str

    def problem(self, line: int) -> Problem:
        """Return the cause for the rejects.

        :param line: number of the row's first line in the file, from 1.
        """
        reason = str(Reason(self.kind, self.expected, self.column))
        where = f"line {line:,}, column {self.column!r}" if self.column else f"line {line:,}"
        return Problem(reason, f"{where}: {self.found}")


@dataclass(frozen=True)
class Parsed:
    """Rows of text as columns."""

    table: pa.Table
    """One row for each row of the text; columns that could not be read are null."""
    unreadable: tuple[Unreadable, ...] = ()
    """By row; at most one for each."""


class Parser(Protocol):
    """A parser of one text format."""

    dialect: Dialect
    has_header: bool

    def body(self, head: bytes) -> int:
        """Return the offset of the first row, after a byte order mark and the header.

        :param head: first bytes of a file.
        """

    def names(self, head: bytes) -> tuple[str, ...] | None:
        """Return the columns of a file by its first bytes; None if rows name their columns themselves."""

    def infer(self, head: bytes, *, path: str) -> pa.Schema:
        """Return the columns and types of a file by its first bytes, which end with a whole row.

        :raises InputError: for text that cannot be parsed.
        """

    def parse(self, data: bytes, schema: pa.Schema, names: Sequence[str] | None) -> Parsed:
        """Parse whole rows.

        :param schema: columns to read.
        :param names: columns of the file, see `names`.
        """


def given_types(types: Mapping[str, str]) -> dict[str, pa.DataType]:
    """Return the Arrow types of ``source.types``.

    :raises SpecError: for a name of another kind than a type.
    """
    found = {}
    for column, name in types.items():
        try:
            found[column] = arrow_type(name)
        except (ValueError, KeyError) as error:
            raise SpecError(
                "a type of the source is unknown",
                where=f"source.types.{column}",
                found=name,
                expected="a type of Arrow, such as int64, float32, string, date32, timestamp[us] or decimal128(10, 2)",
                next_step="fix source.types",
            ) from error
    return found


def arrow_type(name: str) -> pa.DataType:
    """Return the Arrow type of a name, decimals included.

    :raises ValueError: for an unknown name.
    """
    if name.startswith("decimal128(") and name.endswith(")"):
        precision, _, scale = name[len("decimal128(") : -1].partition(",")
        return pa.decimal128(int(precision), int(scale or 0))
    return pa.type_for_alias(name)


def with_gaps(table: pa.Table, gaps: Sequence[int], rows: int) -> pa.Table:
    """Return ``table`` with a row of nulls at each of the positions ``gaps`` of ``rows`` rows."""
    if not gaps:
        return table
    keep = np.ones(rows, bool)
    keep[list(gaps)] = False
    places = np.zeros(rows, np.int64)
    places[keep] = np.arange(table.num_rows)
    return table.take(pa.array(places, mask=~keep))


def shown(value: str) -> str:
    """Return a value for a message."""
    return repr(value if len(value) <= MOST_SHOWN else value[:MOST_SHOWN] + "…")
