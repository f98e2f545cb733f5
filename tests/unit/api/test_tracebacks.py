"""Errors as a notebook shows them."""

from __future__ import annotations

import pytest

import pipeline
from pipeline.api.tracebacks import error_lines, interruptible, render
from pipeline.errors import Interrupted, PipelineError, StepFailed


def failed() -> StepFailed:
    try:
        try:
            {}["no such column"]
        except KeyError as error:
            raise StepFailed(
                "a step failed", where="clean", found="KeyError", next_step="python -m pipeline resume j-1"
            ) from error
    except StepFailed as error:
        return error


def plain(lines: list[str]) -> str:
    text = "\n".join(lines)
    for code in ("\x1b[31m", "\x1b[1m", "\x1b[2m", "\x1b[0m"):
        text = text.replace(code, "")
    return text


def test_an_error_is_its_message_the_users_line_and_the_next_call() -> None:
    text = plain(error_lines(failed()))
    assert text.startswith("StepFailed: a step failed\n  where:    clean\n  found:    KeyError\n")
    assert 'next:     pipeline.resume("j-1")' in text
    assert "python -m pipeline" not in text
    assert '{}["no such column"]' in text
    assert text.endswith("full traceback: pipeline.traceback()")
    assert len(text.splitlines()) < 10


def test_the_whole_traceback_is_one_call_away(capsys: pytest.CaptureFixture[str]) -> None:
    render(failed())
    pipeline.traceback()
    shown = capsys.readouterr().out
    assert "Traceback (most recent call last)" in shown
    assert "KeyError: 'no such column'" in shown


def test_ipython_finds_the_method() -> None:
    assert plain(failed()._render_traceback_()).startswith("StepFailed")  # type: ignore[attr-defined]
    assert hasattr(PipelineError, "_render_traceback_")


def test_an_interrupt_says_how_to_go_on() -> None:
    with pytest.raises(Interrupted, match="interrupted while the job ran") as caught, interruptible("the job ran"):
        raise KeyboardInterrupt
    assert 'pipeline.resume("@last")' in caught.value.next_step
    assert caught.value.exit_code == 130
