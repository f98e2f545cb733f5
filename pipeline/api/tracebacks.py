"""Errors in notebooks: the message with found, expected and next; the whole traceback on request."""

from __future__ import annotations

import sys
import traceback as traces
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.common.user_code import python_calls, user_lines
from pipeline.errors import Interrupted, PipelineError

_RED, _BOLD, _DIM, _RESET = "\x1b[31m", "\x1b[1m", "\x1b[2m", "\x1b[0m"
_last: list[PipelineError] = []
"""The error that was shown last."""


def error_lines(error: PipelineError) -> list[str]:
    """Return what a notebook shows of an error, a line each: with Python calls, and the user's own line."""
    head, *rest = python_calls(str(error)).splitlines()
    lines = [f"{_RED}{_BOLD}{error.kind}{_RESET}: {head}", *rest]
    cause: BaseException | None = error
    while cause is not None:
        own = user_lines(cause.__traceback__) if cause is not error else []
        if own and own[-1].strip() not in "\n".join(rest):
            lines += [f"  {'line:':<10}{own[0].strip()}", *(f"            {line}" for line in own[1:])]
            break
        cause = cause.__cause__
    return [*lines, f"{_DIM}full traceback: pipeline.traceback(){_RESET}"]


def render(error: PipelineError) -> list[str]:
    """Return the lines of `error_lines`, and keep the error for `traceback`."""
    _last[:] = [error]
    return error_lines(error)


# IPython calls this method of an exception instead of showing its traceback.
PipelineError._render_traceback_ = render  # type: ignore[attr-defined]


def traceback() -> None:
    """Print the full traceback of the last error that a notebook showed in short."""
    if not _last:
        sys.stdout.write("no error of a job was shown in this session\n")
        return
    error = _last[0]
    sys.stdout.write("".join(traces.format_exception(type(error), error, error.__traceback__)))


@contextmanager
def interruptible(doing: str) -> Iterator[None]:
    """Turn a KeyboardInterrupt into an error of one screen, which says what was done and how to go on.

    :param doing: activity, such as ``planning``.
    :raises Interrupted: for a KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted while {doing}",
            next_step='completed partitions are kept: pipeline.list_jobs() shows the job, pipeline.resume("@last") '
            "continues it",
        ) from error
