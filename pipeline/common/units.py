"""Parse and format sizes, times and counts for people."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import UTC, datetime

from pipeline.errors import SpecError

Clock = Callable[[], datetime]
"""A function that returns the current time; tests pass their own."""

_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)\s*")
_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_DURATION = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)\s*")
_DURATIONS = {
    **dict.fromkeys(("", "s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
}
MAX_SIZE = 1 << 63
"""Size that no file or memory has, in bytes."""
MAX_SECONDS = 100 * 366 * 86400.0
"""Longest duration, in seconds: calendars end soon after."""
_LONGEST_SHOWN = 80
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_bytes(text: str | int, *, where: str = "") -> int:
    """Return the bytes of ``text``: ``256 MiB`` (1024 × 1024 each), ``1.5GB`` (10**9), or a plain number.

    :param where: field that holds ``text``, for the message.
    :raises SpecError: for any other text, for 0, and for 8 EiB and more.
    """
    match = _SIZE.fullmatch(_text(text))
    unit = _UNITS.get(match["unit"].lower()) if match else None
    value = float(match["number"]) * unit if match and unit else 0.0
    if not 1 <= value < MAX_SIZE or isinstance(text, bool):
        raise SpecError(
            "not a valid size", where=where, found=_shown(text), expected="such as 256 MiB, 1.5 GB or 1000000"
        )
    return int(value)


def format_cost(amount: float) -> str:
    """Return an amount of money with two decimals, or three significant digits if it is small."""
    return f"{amount:,.2f}" if abs(amount) >= 1 or not amount else f"{amount:.3g}"


def parse_seconds(text: str | float, *, where: str = "") -> float:
    """Return the seconds of ``text``: ``90 s``, ``15 min``, ``2 h``, ``1 d``, or a plain number of seconds, also 0.

    :param where: field that holds ``text``, for the message.
    :raises SpecError: for any other text, and for more than 100 years.
    """
    match = _DURATION.fullmatch(_text(text))
    unit = _DURATIONS.get(match["unit"].lower()) if match else None
    value = float(match["number"]) * unit if match and unit else math.inf
    if value > MAX_SECONDS or isinstance(text, bool):
        raise SpecError(
            "not a valid duration",
            where=where,
            found=_shown(text),
            expected="such as 90 s, 15 min, 2 h or 1 d; at most 100 years",
        )
    return value


def _text(value: object) -> str:
    """Return ``str(value)``; empty for an integer of too many digits."""
    try:
        return str(value)
    except ValueError:
        return ""


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str) else _text(value) or "a number of many digits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def format_bytes(count: float) -> str:
    """Return ``1.5 GiB``: powers of 1024, with one decimal below 100."""
    value, step = float(count), 0
    while abs(value) >= 1024 and step < len(_BINARY) - 1:
        value, step = value / 1024, step + 1
    return f"{value:.0f} {_BINARY[step]}" if step == 0 or abs(value) >= 100 else f"{value:.1f} {_BINARY[step]}"


def format_seconds(seconds: float) -> str:
    """Return ``0.43 s``, ``12.3 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_count(count: float) -> str:
    """Return ``1,234,567``."""
    return f"{count:,.0f}"


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return ``1 partition``, ``2 partitions`` or ``1,000 retries``.

    :param nouns: the plural, if irregular.
    """
    if count == 1:
        return f"1 {noun}"
    regular = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {nouns or regular}"


def utc_now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


def iso_time(moment: datetime) -> str:
    """Return ``2026-01-01T12:00:00.000Z``."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
