"""Bisection of a batch down to the rows that fail."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ModelError
from pipeline.scoring.bisection import MAX_FAILED_ROWS, SAMPLED_ROWS, NoRowWorksError, RowsError, bisect, blame_rows


class Calls:
    """A function that raises on ranges with a bad row, and counts."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad
        self.count = 0

    def __call__(self, start: int, stop: int) -> list[int]:
        self.count += 1
        with blame_rows("step:f:g"):
            for row in range(start, stop):
                if row in self.bad:
                    raise ValueError(f"row {row}")
        return list(range(start, stop))


@given(st.integers(0, 300), st.sets(st.integers(0, 299), max_size=60))
def test_every_row_is_found_bad_or_returned_once(rows: int, bad: set[int]) -> None:
    calls = Calls(bad)
    found = bisect(calls, 0, rows)
    good = [row for part in found.parts for row in part.result]
    assert good == [row for row in range(rows) if row not in bad]
    assert [failure.row for failure in found.failures] == sorted(row for row in bad if row < rows)
    failing = len(found.failures)
    assert calls.count <= 1 + 2 * failing * math.ceil(math.log2(max(rows, 2)))


def test_a_call_that_works_is_made_once() -> None:
    calls = Calls(set())
    assert len(bisect(calls, 0, 100_000).parts) == 1
    assert calls.count == 1


def test_a_known_error_saves_a_call() -> None:
    calls = Calls({3})
    with pytest.raises(RowsError) as caught:
        calls(0, 8)
    found = bisect(calls, 0, 8, error=caught.value)
    assert [failure.row for failure in found.failures] == [3]
    assert calls.count == 1 + 6


def test_reason_and_message_tell_who_raised_what_and_where() -> None:
    found = bisect(Calls({1, 2, 3, 4}), 0, 6)
    assert {failure.reason for failure in found.failures} == {"step:f:g:ValueError"}
    first, *_, last = found.failures
    assert first.message.startswith("ValueError: row 1\n")
    assert "in __call__" in first.message
    assert last.message == "ValueError: row 4", "only the first few carry a traceback"


def test_when_no_row_works_it_stops_early() -> None:
    calls = Calls(set(range(100_000)))
    with pytest.raises(NoRowWorksError) as caught:
        bisect(calls, 0, 100_000)
    assert caught.value.tried == MAX_FAILED_ROWS + SAMPLED_ROWS
    assert caught.value.example.reason == "step:f:g:ValueError"
    assert calls.count < 400


def test_bad_rows_at_the_start_do_not_make_it_stop() -> None:
    bad = set(range(500))
    found = bisect(Calls(bad), 0, 1000)
    assert {failure.row for failure in found.failures} == bad
    assert sum(len(part.result) for part in found.parts) == 500


def test_no_early_stop_if_the_function_has_worked_before() -> None:
    assert len(bisect(Calls(set(range(400))), 0, 400, any_worked=True).failures) == 400


def test_no_early_stop_if_rows_fail_in_different_ways() -> None:
    def call(start: int, stop: int) -> None:
        with blame_rows("score"):
            raise (ValueError if start % 2 else KeyError)(start)

    assert len(bisect(call, 0, 300).failures) == 300


@pytest.mark.parametrize(
    "error", [MemoryError(), ModelError("x"), OSError(28, "full"), ConnectionError(), KeyboardInterrupt()]
)
def test_other_errors_pass(error: BaseException) -> None:
    calls = 0

    def call(start: int, stop: int) -> None:
        nonlocal calls
        calls += 1
        with blame_rows("step:f:g"):
            raise error

    with pytest.raises(type(error)) as caught:
        bisect(call, 0, 8)
    assert caught.value is error
    assert calls == 1


def test_a_missing_file_may_be_about_rows() -> None:
    with pytest.raises(RowsError, match="FileNotFoundError"), blame_rows("step:f:g"):
        Path("/does/not/exist").read_bytes()


@pytest.mark.fault(78)
@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit(), BaseException("b")])
def test_death_of_the_process_is_blamed_on_rows_like_any_error(error: BaseException) -> None:
    with pytest.raises(RowsError) as caught, blame_rows("step:f:g"):
        raise error
    assert caught.value.reason == f"step:f:g:{type(error).__name__}"
    with pytest.raises(KeyboardInterrupt), blame_rows("step:f:g"):
        raise KeyboardInterrupt
