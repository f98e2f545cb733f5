"""Prints and warnings of the user's code: by place, in full, bounded."""

from __future__ import annotations

import logging
import sys
import threading
import warnings

import pytest

from pipeline.common import step_output, warn_once
from pipeline.common.step_output import MAX_BYTES, MAX_PLACES, MessageCount, OutputLine, StepOutput, capture, of_step


@pytest.fixture(autouse=True)
def as_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "lastResort", logging.StreamHandler())
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(warnings, "filters", [])
    warn_once.install()


def noisy_step(rows: int) -> None:
    for row in range(rows):
        print("row", row)
        warnings.warn(f"old feature {row % 2}", stacklevel=1)


def test_lines_are_kept_in_full_and_counted_by_place(capsys: pytest.CaptureFixture[str]) -> None:
    lines, before = list[OutputLine](), sys.stdout
    with capture(StepOutput(lines.append)) as output, of_step("features:build"):
        noisy_step(4)
    assert sys.stdout is before
    print("behind it")
    assert [line.text for line in lines if line.kind == "print"] == [f"row {row}" for row in range(4)]
    assert {line.step for line in lines} == {"features:build"}
    printed, warned = output.counts
    assert (printed.count, printed.text) == (4, "row 0")
    assert (warned.count, warned.text.partition(" ")[2]) == (4, "UserWarning: old feature 0")
    assert printed.place.startswith("test_step_output.py:")
    assert printed.place != warned.place
    assert capsys.readouterr().out == "behind it\n"


def test_the_first_line_of_a_place_is_told() -> None:
    told: list[OutputLine] = []
    with capture(StepOutput(on_first=told.append)):
        noisy_step(3)
    assert [line.kind for line in told] == ["print", "warning"]


def test_other_threads_print_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[OutputLine] = []
    with capture(StepOutput(lines.append)):
        other = threading.Thread(target=print, args=("of another",))
        other.start()
        other.join()
    assert (lines, capsys.readouterr().out) == ([], "of another\n")


def test_a_progress_bar_is_one_line() -> None:
    lines: list[OutputLine] = []
    with capture(StepOutput(lines.append)):
        for percent in range(0, 101, 20):
            print(f"\r{percent} %", end="")
        print("\nrest without an end", end="")
    assert [line.text for line in lines] == ["100 %", "rest without an end"]


def test_a_logger_without_handler_belongs_to_the_step() -> None:
    handler = logging.lastResort
    assert handler is not None
    with capture(StepOutput()) as output:
        for row in (1, 2):
            handler.handle(logging.LogRecord("mine", logging.WARNING, "f.py", 9, "row %d is odd", (row,), None))
    (count,) = output.counts
    assert count == MessageCount("", "warning", "f.py:9", "WARNING mine: row 1 is odd", 2)


def test_lines_beyond_the_size_are_only_counted() -> None:
    lines: list[OutputLine] = []
    with capture(StepOutput(lines.append)) as output:
        for _ in range(1000):
            print("x" * 1000)
    assert sum(len(line.text) for line in lines) <= MAX_BYTES
    assert output.counts[0].count == len(lines) + output.left_out == 1000


def test_endless_places_are_one_in_the_end() -> None:
    counts: dict[tuple[str, str, str], MessageCount] = {}
    step_output.add_counts(counts, [MessageCount("m:f", "print", f"f.py:{n}", "x", 2) for n in range(100)])
    assert len(counts) == MAX_PLACES + 1
    assert sum(count.count for count in counts.values()) == 200


def test_secrets_are_masked() -> None:
    lines: list[OutputLine] = []
    with capture(StepOutput(lines.append)):
        print("s3://bucket/x?password=hunter2hunter2")
    assert "hunter2" not in lines[0].text


def test_filters_are_as_before() -> None:
    before = warnings.defaultaction  # type: ignore[attr-defined]
    with capture(StepOutput()), capture(StepOutput()):
        pass
    assert warnings.defaultaction == before  # type: ignore[attr-defined]
