"""The user's own lines of a traceback, and Python calls in place of shell commands."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from functools import cache
from types import TracebackType

SHOWN_FRAMES = 3
"""Most lines of the user that a message shows: the last ones."""
_COMMAND = re.compile(
    r"python -m pipeline (?P<verb>[a-z]+)(?: (?P<job>@last|[A-Za-z0-9][\w.-]*))?(?P<errors> --errors)?"
    r"(?: --accept (?P<reason>\"[^\"]*\"))?"
)
_CALLS = {
    "resume": 'pipeline.resume("{job}")',
    "retry": 'pipeline.retry("{job}")',
    "publish": 'pipeline.publish("{job}", accept={reason})',
    "verify": 'pipeline.verify("{job}")',
    "rejects": 'pipeline.attach("{job}").report().rejects()',
    "status": 'pipeline.attach("{job}").report()',
    "watch": 'pipeline.attach("{job}").watch()',
    "cancel": 'pipeline.attach("{job}").cancel()',
    "logs": 'pipeline.attach("{job}").logs({errors})',
}
_OWN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
_NOT_OWN = tuple(os.path.join(_OWN, name, "") for name in ("demo", "testing"))


@cache
def _libraries() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple(os.path.join(paths[name], "") for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def is_user_file(path: str) -> bool:
    """True for code of the user: neither of Python, nor of an installed package, nor of this one."""
    if path.startswith("<"):
        # Code that travels by value has such names: <cell 1a2b3c4d>, <features.py 1a2b3c4d>.
        return re.fullmatch(r"<\S+ [0-9a-f]{8}>", path) is not None
    if path.startswith(_OWN):
        return path.startswith(_NOT_OWN)
    return not path.startswith(_libraries()) and "site-packages" not in path


def user_lines(trace: TracebackType | None) -> list[str]:
    """Return the last lines of a traceback that are the user's, as Python formats them; empty if there is none."""
    frames = [frame for frame in traceback.extract_tb(trace) if is_user_file(frame.filename)]
    lines = "".join(traceback.format_list(frames[-SHOWN_FRAMES:])).rstrip().splitlines()
    return [line for line in lines if line.strip(" ^~")]


def python_calls(text: str) -> str:
    """Return ``text`` with calls of Python in place of commands of a shell, where there is one."""

    def call(match: re.Match[str]) -> str:
        if match["verb"] == "list":
            return "pipeline.list_jobs()"
        form = _CALLS.get(match["verb"])
        if form is None or match["job"] is None:
            return match[0]
        return form.format(job=match["job"], errors="errors=True" if match["errors"] else "", reason=match["reason"])

    return _COMMAND.sub(call, text)
