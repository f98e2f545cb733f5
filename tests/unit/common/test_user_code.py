"""The user's own lines of a traceback, and commands as calls of Python."""

from __future__ import annotations

import json

import pytest

from pipeline.common.user_code import is_user_file, python_calls, user_lines


def test_only_lines_of_the_user_are_shown() -> None:
    def step(text: str) -> object:
        return json.loads(text)  # this line

    try:
        step("{")
    except ValueError as error:
        lines = user_lines(error.__traceback__)
    assert lines[-1].strip() == "return json.loads(text)  # this line"
    assert not any("json/decoder.py" in line for line in lines)
    assert user_lines(None) == []


@pytest.mark.parametrize(
    ("path", "is_users"),
    [
        ("<cell 0a1b2c3d>", True),
        ("<features.py 0a1b2c3d>", True),
        ("<string>", False),
        ("<frozen importlib._bootstrap>", False),
        ("/home/you/features.py", True),
        (json.__file__, False),
        (pytest.__file__, False),
    ],
)
def test_files_of_the_user(path: str, is_users: bool) -> None:
    assert is_user_file(path) is is_users


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python -m pipeline resume j-1", 'pipeline.resume("j-1")'),
        ("undo it and run: python -m pipeline retry @last; or not", 'undo it and run: pipeline.retry("@last"); or not'),
        ("python -m pipeline logs j-1 --errors", 'pipeline.attach("j-1").logs(errors=True)'),
        ('python -m pipeline publish j-1 --accept "why" now', 'pipeline.publish("j-1", accept="why") now'),
        ("python -m pipeline list", "pipeline.list_jobs()"),
        ("python -m pipeline init", "python -m pipeline init"),
        ("no command", "no command"),
    ],
)
def test_commands_become_calls(text: str, expected: str) -> None:
    assert python_calls(text) == expected
