"""References to secrets: ``env:NAME`` and ``file:PATH`` stand where a secret itself must not be written.

They are resolved by the process that uses the secret, a worker for the most part. What they resolve to is known to
`pipeline.common.secrets` from then on, so that it turns up in no log, message or report of that process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.common.secrets import redact, remember_secret, says_secret
from pipeline.errors import SpecError

SCHEMES = ("env:", "file:")
_SECRET_OPTIONS = {"key", "sas", "connection_string", "auth", "authorization"}
"""Names of options that hold a secret, or half of one, without saying so."""


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


def resolve_options(options: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """``options`` with every reference in them resolved, however deep it lies."""
    return {str(name): _resolve(value, where=f"{where}.{name}") for name, value in options.items()}


def _resolve(value: Any, *, where: str) -> Any:
    if isinstance(value, str):
        return resolve_reference(value, where=where)
    if isinstance(value, Mapping):
        return resolve_options(value, where=where)
    if isinstance(value, (list, tuple)):
        return [_resolve(item, where=where) for item in value]
    return value


def written_secret(options: Mapping[str, Any]) -> str:
    """Name of the first option that holds a secret itself instead of a reference to it; empty when none does."""
    for name, value in options.items():
        inner = written_secret(value) if isinstance(value, Mapping) else ""
        if inner:
            return f"{name}.{inner}"
        is_named = says_secret(str(name)) or str(name).lower() in _SECRET_OPTIONS
        texts = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else ()
        if any(isinstance(text, str) and _is_written(text, is_named=is_named) for text in texts):
            return str(name)
    return ""


def _is_written(text: str, *, is_named: bool) -> bool:
    return bool(text) and not is_reference(text) and (is_named or redact(text) != text)


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
