"""Mask secrets in all output for people: logs, messages, events, reports, JSON. Resolve references to secrets.

Three kinds of text are masked:

- Known secrets: resolved references, and values of environment variables and of fsspec's configuration with the name
  of a secret (``AWS_SECRET_ACCESS_KEY``, ``…_TOKEN``).
- Texts in the form of a secret: passwords in URLs, keys of known services, bearer tokens, signed URLs, private keys.
- Values after the name of a secret: ``password=…``, ``"token": "…"``.

References ``env:NAME`` and ``file:PATH`` are used where a secret itself must not be written. The process that uses
the secret, mostly a worker, resolves the reference. From then on, the value is masked in all output of that process.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.errors import PipelineError, SpecError

MASK = "[secret]"
SHORTEST = 8
"""Shortest value that is masked everywhere. A shorter value would match ordinary words."""

_NAME = (
    r"(?:secret|passw(?:or)?d|passphrase|token|api[_-]?key|access[_-]?key|account[_-]?key|private[_-]?key|credentials?)"
)
_SAYS_SECRET = re.compile(_NAME, re.IGNORECASE)
_IS_REFERENCE = r"(?!env:|file:|\[secret\])"
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), MASK),
    (re.compile(r"(?<=://)([^\s/:@'\"]*):(?!\[secret\]@)[^\s/'\"]+@"), rf"\1:{MASK}@"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), MASK),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/-]{8,}=*", re.IGNORECASE), rf"\1 {MASK}"),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), MASK),
    (re.compile(r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|xox[abprs]-[\w-]{10,}|hf_\w{20,}|AIza[\w-]{30,})"), MASK),
    (
        re.compile(r"([?&;](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|sig|signature)=)[^\s&'\"]+", re.I),
        rf"\1{MASK}",
    ),
    # A quoted name with its value, as in JSON and the repr of a dict; then a folder of a path such as ``/token=…/``,
    # whose value ends at the next "/"; then any other bare name before "=", where "/" may be part of the secret.
    (
        re.compile(rf"""(["'][\w.-]*{_NAME}[\w.-]*["']\s*[:=]\s*b?(["'])){_IS_REFERENCE}.+?(?<!\\)\2""", re.I),
        rf"\1{MASK}\2",
    ),
    (re.compile(rf"""((?<=/)[\w.-]*{_NAME}[\w.-]*=){_IS_REFERENCE}[^\s"',;&)}}\]/]{{4,}}""", re.I), rf"\1{MASK}"),
    (
        re.compile(rf"""((?<![/\w.-])[\w.-]*{_NAME}[\w.-]*\s*=\s*b?["']?){_IS_REFERENCE}[^\s"',;&)}}\]]{{4,}}""", re.I),
        rf"\1{MASK}",
    ),
    (
        re.compile(
            rf"""(\b[\w.-]*(?:secret|passw(?:or)?d)[\w.-]*\s*:\s*["']?){_IS_REFERENCE}[^\s"',;&)}}\]]{{8,}}""", re.I
        ),
        rf"\1{MASK}",
    ),
)

_HINT = re.compile(
    "://|private key|akia|asia|bearer|basic|eyj|gh[pousr]_|github_pat_|xox|hf_|aiza|sig|secret|passw|passphrase|token"
    "|key|credential",
    re.IGNORECASE,
)
"""Matches every text that a pattern could match. Most texts do not match, and need no further check."""

_secrets: set[str] = set()
_lock = threading.Lock()


def remember_secret(value: str) -> None:
    """Mask ``value`` in all output of this process from now on."""
    parts = {line.strip() for line in (value, *value.splitlines()) if not line.startswith("-----")}
    with _lock:
        _secrets.update(part for part in parts if len(part) >= SHORTEST)


def redact(text: str) -> str:
    """Return ``text`` with every secret masked."""
    return _redact(text, _known())


def _redact(text: str, known: Sequence[str]) -> str:
    for secret in known:
        if secret in text:
            text = text.replace(secret, MASK)
    if _HINT.search(text):
        for pattern, mask in _PATTERNS:
            text = pattern.sub(mask, text)
    return text


def redact_values(value: Any, *, name: str = "") -> Any:
    """Return ``value`` (of a JSON type) with every secret in its texts masked. Keys are unchanged.

    :param name: key of ``value``. If the key is the name of a secret, the whole text is masked.
    """
    # The environment is read once: a report has hundreds of texts.
    return _redact_values(value, name, _known())


def _redact_values(value: Any, name: str, known: Sequence[str]) -> Any:
    if isinstance(value, str):
        is_named = bool(value) and says_secret(name) and re.match(_IS_REFERENCE, value) is not None
        return MASK if is_named else _redact(value, known)
    if isinstance(value, Mapping):
        return {key: _redact_values(item, str(key), known) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_redact_values(item, name, known) for item in value)
    return value


def says_secret(name: str) -> bool:
    """True if ``name`` is the name of a secret, such as ``aws_secret_access_key``, ``PASSWORD`` or ``sas_token``."""
    return _SAYS_SECRET.search(name) is not None


def redact_error(error: BaseException) -> BaseException:
    """Return ``error`` with every secret masked, also in its notes, cause and context.

    The error is changed in place. `InputError.place`, which only code reads, stays. If the text of the error cannot be
    changed, a RuntimeError with its type and text is returned.
    """
    return _redact_error(error, seen=set())


def _redact_error(error: BaseException, *, seen: set[int]) -> BaseException:
    seen.add(id(error))
    for link in ("__cause__", "__context__"):
        other = getattr(error, link)
        if other is not None and id(other) not in seen:
            is_suppressed = error.__suppress_context__
            setattr(error, link, _redact_error(other, seen=seen))
            error.__suppress_context__ = is_suppressed
    if isinstance(error, PipelineError):
        for field in ("message", "where", "found", "expected", "next_step"):
            setattr(error, field, redact(str(getattr(error, field))))
        error.args = (error.message,)
    if not _has_secret(error):
        return error
    _redact_fields(error)
    if not _has_secret(error):
        return error
    told = RuntimeError(f"{type(error).__name__}: {redact(_text(error))}")
    return told.with_traceback(error.__traceback__)


def _redact_fields(error: BaseException) -> None:
    error.args = tuple(redact_values(item) for item in error.args)
    for field in ("filename", "filename2", "strerror", "msg", "message", "reason", "__notes__"):
        value = getattr(error, field, None)
        if isinstance(value, (str, list)):
            # Some attributes are computed and cannot be set.
            try:
                setattr(error, field, redact_values(value))
            except (AttributeError, TypeError):
                continue


def _has_secret(error: BaseException) -> bool:
    texts = (_text(error), *(str(item) for item in error.args), *map(str, getattr(error, "__notes__", ())))
    return any(redact(text) != text for text in texts)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return ""


def _known() -> Sequence[str]:
    """Return the known secrets of this process, longest first."""
    with _lock:
        remembered = frozenset(_secrets)
    # Another thread may be importing the module.
    config = getattr(sys.modules.get("fsspec.config"), "conf", {})
    configured = frozenset(_secrets_in(config)) if config else frozenset()
    return _spellings(remembered | configured | _secrets_of(tuple(os.environ.items())))


@lru_cache(maxsize=4)
def _secrets_of(variables: tuple[tuple[str, str], ...]) -> frozenset[str]:
    return frozenset(value for name, value in variables if says_secret(name) and _is_secret(value))


@lru_cache(maxsize=4)
def _spellings(secrets: frozenset[str]) -> Sequence[str]:
    """Return ``secrets`` with their spellings in URLs and in Python's repr, longest first."""
    written = {quote(secret, safe="") for secret in secrets} | {repr(secret)[1:-1] for secret in secrets}
    return sorted(secrets | written, key=len, reverse=True)


def _is_secret(value: str) -> bool:
    """True if the value of a variable with a secret's name can be a secret: not a path, a number or a short word."""
    return len(value) >= SHORTEST and not value.startswith(("/", "~", "./")) and not value.isdigit()


def _secrets_in(config: Mapping[str, Any]) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _secrets_in(value)
        elif isinstance(value, str) and says_secret(str(name)) and _is_secret(value):
            yield value


# Logs and streams


class _Records:
    """Make log records like ``make``, with secrets masked, also for handlers that other code has set up."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = self.make(*args, **kwargs)
        try:
            text = record.getMessage()
        except Exception:  # the handler reports the wrong format
            return record
        masked = redact(text)
        if masked != text:
            record.msg, record.args = masked, None
        if record.exc_info and record.exc_info[0] is not None:
            # A formatter uses this text instead of formatting the exception itself.
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
        return record


@contextmanager
def masking_logs() -> Iterator[None]:
    """Mask secrets in every log record that this process makes inside the block."""
    before = logging.getLogRecordFactory()
    mask_logs()
    try:
        yield
    finally:
        if isinstance(logging.getLogRecordFactory(), _Records):
            logging.setLogRecordFactory(before)


def mask_logs() -> None:
    """Mask secrets in every log record of this process from now on."""
    factory = logging.getLogRecordFactory()
    if not isinstance(factory, _Records):
        logging.setLogRecordFactory(_Records(factory))


class _Stream:
    """A text stream that masks secrets in the written text. All else is delegated to the underlying stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def mask_streams() -> None:
    """Mask secrets in stdout and stderr of this process from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Stream):
            setattr(sys, name, _Stream(stream))


SCHEMES = ("env:", "file:")
_SECRET_OPTIONS = {"key", "sas", "connection_string", "auth", "authorization"}
"""Names of options that hold a secret, or a part of one, and are not matched by `says_secret`."""


def is_reference(text: str) -> bool:
    """True if ``text`` is a reference to a secret."""
    return text.startswith(SCHEMES) and not text.startswith("file://")


def resolve_reference(text: str, *, where: str) -> str:
    """Return the secret to which ``text`` refers; a text that is not a reference is returned unchanged.

    :param where: field that holds ``text``, for the message.
    :raises SpecError: if the variable is not set in this process, or the file is empty or cannot be read.
    """
    if not is_reference(text):
        return text
    scheme, _, name = text.partition(":")
    value = _variable(name, where=where) if scheme == "env" else _content(name, where=where)
    remember_secret(value)
    return value


def resolve_options(options: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return ``options`` with every reference resolved, at any depth."""
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
    """Return the name of the first option that holds a secret instead of a reference; empty if there is none."""
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
        found=f"env:{name}, empty or not set",
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
