"""References to secrets: ``env:NAME`` and ``file:PATH`` stand where a secret itself must not be written.

They are resolved by the process that uses the secret, a worker for the most part. What they resolve to is known to
`pipeline.redaction` from then on, so that it turns up in no log, message or report of that process.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import SpecError
from pipeline.redaction import remember_secret

SCHEMES = ("env:", "file:")


def is_reference(text: str) -> bool:
    """Whether ``text`` says where a secret is, instead of what it is."""
    return text.startswith(SCHEMES) and not text.startswith("file://")


def resolve_reference(text: str, *, where: str) -> str:
    """What ``text`` refers to; a text that is no reference is given back as it is.

    :param where: field that holds it, for the message.
    :raises SpecError: when the variable is not set in this process, or the file cannot be read.
    """
    if not is_reference(text):
        return text
    scheme, _, name = text.partition(":")
    value = _variable(name, where=where) if scheme == "env" else _content(name, where=where)
    remember_secret(value)
    return value


def _variable(name: str, *, where: str) -> str:
    value = os.environ.get(name)
    if value:
        return value
    raise SpecError(
        "an environment variable that is to hold a secret is not set",
        where=where,
        found=f"env:{name}, empty or not there",
        expected="a value in the environment of the driver and of every worker",
        next_step=f"export {name}=…, for workers before they are started",
    )


def _content(path: str, *, where: str) -> str:
    try:
        value = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            "a file that is to hold a secret cannot be read", where=where, found=f"{type(error).__name__}: {path}"
        ) from error
    if value:
        return value
    raise SpecError("a file that is to hold a secret is empty", where=where, found=path)
