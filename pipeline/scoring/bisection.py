"""Find the rows on which a function raises, by halving."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from pipeline.common.secrets import redact
from pipeline.common.user_code import user_lines
from pipeline.errors import PipelineError
from pipeline.scoring.rows import Failures

Result = TypeVar("Result")

MAX_FAILED_ROWS = 100
"""Rows that may fail alone, all with one error, before `bisect` checks whether any row works."""
SAMPLED_ROWS = 32
"""Rows, spread over the rest, that this check tries."""
TRACED = 3
"""Failures of one bisection whose messages include the last lines of the traceback."""
TRACE_LINES = 6

_ABOUT_A_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class RowsError(Exception):
    """User code or the model raised an error that its rows may have caused."""

    def __init__(self, source: str, error: BaseException) -> None:
        super().__init__(f"{source}: {type(error).__name__}")
        self.source = source
        """Source of the error: ``step:<entrypoint>``, ``frame:<column>`` or ``score``."""
        self.error = error

    @property
    def reason(self) -> str:
        """Short and stable text for counting: ``<source>:<exception>``."""
        return f"{self.source}:{type(self.error).__name__}"

    def signature(self) -> tuple[str, str, int]:
        """Return the reason and the line that raised."""
        trace = self.error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        return (self.reason, trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace else (self.reason, "", 0)

    def message(self, *, lines: int = 0) -> str:
        """Return type and text of the error (at most 200 characters) and the last ``lines`` lines of its traceback.

        If lines of the user's own code are in it, those of libraries are left out. Secrets are masked.
        """
        text = redact(f"{type(self.error).__name__}: {self.error}")[:200]
        if not lines:
            return text
        own = user_lines(self.error.__traceback__)
        trace = own or "".join(traceback.format_tb(self.error.__traceback__)).rstrip().splitlines()[-lines:]
        return redact("\n".join([text, *trace]))


class NoRowWorksError(Exception):
    """Every row that was tried failed with the same error."""

    def __init__(self, example: RowsError, *, tried: int) -> None:
        super().__init__(f"{example.reason} on each of {tried} rows")
        self.example = example
        self.tried = tried


@contextmanager
def blame_rows(source: str, *, never: Callable[[BaseException], bool] | None = None) -> Iterator[None]:
    """Turn an exception that rows may have caused into `RowsError`, and let any other exception pass.

    Rows never cause errors of memory, storage and network, and the errors of this package. A step that calls
    ``sys.exit``, or raises another BaseException, raises like any other: the process must not end with a success.

    :param never: tells further errors that rows never cause.
    """
    try:
        yield
    except (MemoryError, PipelineError, RowsError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if never is not None and never(error):
            raise
        if isinstance(error, OSError) and not isinstance(error, _ABOUT_A_FILE):
            raise
        raise RowsError(source, error) from error


@dataclass(frozen=True)
class RowRange(Generic[Result]):
    """A range of rows on which the function returned."""

    start: int
    stop: int
    """First row after the range."""
    result: Result


@dataclass(frozen=True)
class RowFailure:
    """A row on which the function raises."""

    row: int
    reason: str
    message: str


@dataclass(frozen=True)
class Bisection(Generic[Result]):
    """Result for a range of rows; each row is in exactly one of the two fields."""

    parts: tuple[RowRange[Result], ...]
    """Ranges, in order."""
    failures: tuple[RowFailure, ...]
    """Failed rows, in order."""

    def to_failures(self) -> Failures:
        """Return the failures as one table of rows."""
        rows = np.array([failure.row for failure in self.failures], dtype=np.int64)
        reasons = tuple(failure.reason for failure in self.failures)
        return Failures(rows, reasons, tuple(failure.message for failure in self.failures))


def bisect(
    call: Callable[[int, int], Result],
    start: int,
    stop: int,
    *,
    error: RowsError | None = None,
    any_worked: bool = False,
) -> Bisection[Result]:
    """Call ``call(start, stop)`` on ranges, and halve those on which it raises `RowsError` down to single rows.

    A row is a failure when ``call`` raises on it alone. With k such rows of n this takes O(k log n) calls, in an order
    that depends only on which ranges fail. Every other exception passes.

    :param error: error that ``call(start, stop)`` raised before; the call is not repeated.
    :param any_worked: True if the function is known to work on some row; `NoRowWorksError` is then not raised.
    :raises NoRowWorksError: when `MAX_FAILED_ROWS` rows failed alone, none worked, and `SAMPLED_ROWS` others, spread
        over the rest, fail too: then the rows are not the cause, and to try each of them would take long.
    """
    parts: list[RowRange[Result]] = []
    failures: list[RowFailure] = []
    signatures: set[tuple[str, str, int]] = set()
    waiting: list[tuple[int, int, RowsError | None]] = [(start, stop, error)]
    while waiting:
        first, end, raised = waiting.pop()
        if first >= end:
            continue
        if raised is None:
            try:
                parts.append(RowRange(first, end, call(first, end)))
                continue
            except RowsError as caught:
                raised = caught
        if end - first > 1:
            middle = (first + end) // 2
            waiting += [(middle, end, None), (first, middle, None)]
            continue
        lines = TRACE_LINES if len(failures) < TRACED else 0
        failures.append(RowFailure(first, raised.reason, raised.message(lines=lines)))
        signatures.add(raised.signature())
        if not (any_worked or parts or len(failures) < MAX_FAILED_ROWS or len(signatures) > 1):
            any_worked = _any_row_works(call, first + 1, stop, raised)
    return Bisection(tuple(parts), tuple(failures))


def _any_row_works(call: Callable[[int, int], Result], start: int, stop: int, example: RowsError) -> bool:
    if stop - start < SAMPLED_ROWS:
        return True
    for index in range(SAMPLED_ROWS):
        row = start + (stop - start) * index // SAMPLED_ROWS
        try:
            call(row, row + 1)
        except RowsError as error:
            if error.signature() == example.signature():
                continue
        return True
    raise NoRowWorksError(example, tried=MAX_FAILED_ROWS + SAMPLED_ROWS)
