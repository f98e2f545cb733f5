"""Prints and warnings of the user's code while it scores rows: counted by place in the code, handed on line by line.

`capture` is entered for each attempt at a partition. What another thread or task of the process prints goes where it
went before. Native code that writes to the file descriptors of the process is not seen.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from types import FrameType
from typing import Any

from pipeline.common.secrets import redact
from pipeline.common.text import shortened
from pipeline.common.units import iso_time, utc_now
from pipeline.common.user_code import is_user_file

PRINT = "print"
WARNING = "warning"
MAX_PLACES = 20
"""Places of an attempt that are told apart; a loop cannot have more, generated code may."""
MAX_LINE = 2000
"""Characters of a line."""
MAX_TEXT = 200
"""Characters of the text that stands for a place."""
MAX_BYTES = 256 << 10
"""Size of the lines of an attempt that are handed on; of those beyond only the number."""
_OTHER_PLACES = "other places"
_MAX_FRAMES = 16
_MAX_PARTIAL = 64 << 10
"""Characters of a line without an end that are kept."""


@dataclass(frozen=True, slots=True)
class OutputLine:
    """A line that a step printed, or a warning."""

    step: str
    """Entrypoint of the step or name of the model; empty while code is imported."""
    kind: str
    """``print`` or ``warning``."""
    place: str
    """File and line, such as ``features.py:9``."""
    text: str
    time: str = ""
    """UTC, ISO 8601."""


@dataclass(frozen=True, slots=True)
class MessageCount:
    """The lines of one place in the code."""

    step: str
    kind: str
    place: str
    text: str
    """First line."""
    count: int

    @property
    def key(self) -> tuple[str, str, str]:
        """Step, kind and place: lines with the same key count as one."""
        return self.step, self.kind, self.place

    def to_dict(self) -> dict[str, Any]:
        """Return the stored form."""
        return asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> MessageCount:
        """Inverse of `to_dict`."""
        step, kind, place, text = (str(record[name]) for name in ("step", "kind", "place", "text"))
        return MessageCount(step, kind, place, text, int(record["count"]))


def add_counts(
    counts: dict[tuple[str, str, str], MessageCount], more: Iterable[MessageCount], *, limit: int = MAX_PLACES
) -> None:
    """Add counts to those of the same place. Beyond ``limit`` places they are added to one that stands for the rest."""
    for one in more:
        added = one
        if one.key not in counts and len(counts) >= limit:
            added = replace(one, step="", place=_OTHER_PLACES)
        known = counts.get(added.key)
        counts[added.key] = added if known is None else replace(known, count=known.count + added.count)


class StepOutput:
    """The prints and warnings of one attempt."""

    def __init__(
        self,
        write: Callable[[OutputLine], object] | None = None,
        *,
        on_first: Callable[[OutputLine], object] | None = None,
    ) -> None:
        """:param write: called with each line, up to `MAX_BYTES` in all.

        :param on_first: called with the first line of each place.
        """
        self.left_out = 0
        """Lines that were counted, but not handed on."""
        self._write = write
        self._on_first = on_first
        self._counts: dict[tuple[str, str, str], MessageCount] = {}
        self._bytes = 0
        self._partial: dict[str, tuple[str, str]] = {}
        """Place and text of lines without an end, by step."""
        self._lock = threading.RLock()

    @property
    def counts(self) -> tuple[MessageCount, ...]:
        """The lines by place, in the order of the first of each."""
        return tuple(self._counts.values())

    def add(self, line: OutputLine) -> None:
        """Count a line, and hand it on."""
        with self._lock:
            self._count(MessageCount(*self._named(line), 1))
            self._hand_on(line)

    def add_all(self, lines: Iterable[OutputLine], counts: Iterable[MessageCount], left_out: int) -> None:
        """Add lines that another process has counted."""
        with self._lock:
            for count in counts:
                self._count(count)
            for line in lines:
                self._hand_on(line)
            self.left_out += left_out

    def print_text(self, text: str) -> None:
        """Add printed text: a line for each end of a line in it."""
        step = _step.get()
        with self._lock:
            place, before = self._partial.pop(step, ("", ""))
            *lines, rest = (before + text).split("\n")
            place = place or user_place()
            for number, line in enumerate(lines):
                self._print(step, place if number == 0 else user_place(), line)
            if rest:
                kept = rest[rest.rfind("\r", 0, len(rest) - 1) + 1 :]
                self._partial[step] = (place, kept[-_MAX_PARTIAL:])

    def warn(self, text: str, place: str) -> None:
        """Add a warning."""
        self.add(OutputLine(_step.get(), WARNING, place, _clean(text), iso_time(utc_now())))

    def close(self) -> None:
        """Add what was printed without an end of the line."""
        with self._lock:
            partial, self._partial = self._partial, {}
            for step, (place, text) in partial.items():
                self._print(step, place, text)

    def _print(self, step: str, place: str, text: str) -> None:
        # A progress bar draws a line again and again: its last state counts.
        shown = text.rstrip("\r").rpartition("\r")[2]
        if shown.strip():
            self.add(OutputLine(step, PRINT, place, _clean(shown), iso_time(utc_now())))

    def _count(self, count: MessageCount) -> None:
        if count.key not in self._counts and len(self._counts) < MAX_PLACES and self._on_first is not None:
            self._on_first(OutputLine(count.step, count.kind, count.place, count.text))
        add_counts(self._counts, [count])

    def _hand_on(self, line: OutputLine) -> None:
        self._bytes += len(line.text) + 120  # the other fields
        if self._bytes > MAX_BYTES or self._write is None:
            self.left_out += 1
        else:
            self._write(line)

    @staticmethod
    def _named(line: OutputLine) -> tuple[str, str, str, str]:
        return line.step, line.kind, line.place, shortened(line.text, width=MAX_TEXT)


def _clean(text: str) -> str:
    return redact(text if len(text) <= MAX_LINE else text[:MAX_LINE] + "…")


_current: ContextVar[StepOutput | None] = ContextVar("step_output", default=None)
_step: ContextVar[str] = ContextVar("step_of_output", default="")
_lock = threading.Lock()
_active = [0]
_default_action = ["default"]


def current() -> StepOutput | None:
    """Return the output that this thread or task adds to; None outside of an attempt."""
    return _current.get()


@contextmanager
def of_step(step: str) -> Iterator[None]:
    """Name the step or model whose code runs in this block."""
    before = _step.set(step)
    try:
        yield
    finally:
        _step.reset(before)


@contextmanager
def capture(output: StepOutput) -> Iterator[StepOutput]:
    """Add what this thread prints in the block to ``output``, and count every warning instead of the first ones."""
    _enter()
    before = _current.set(output)
    try:
        yield output
    finally:
        _current.reset(before)
        _leave()
        output.close()


@contextmanager
def shown_once() -> Iterator[None]:
    """Write the first line of each place to stderr, for code that is tried on a sample: its calls are many."""
    stream = sys.stderr
    with capture(StepOutput(on_first=lambda line: stream.write(f"{line.text}\n"))):
        yield


def _enter() -> None:
    with _lock:
        _active[0] += 1
        if _active[0] == 1:
            # By default Python gives a warning to nobody when it gave its place before.
            _default_action[0] = warnings.defaultaction  # type: ignore[attr-defined]
            if _default_action[0] == "default":
                warnings.defaultaction = "always"  # type: ignore[attr-defined]
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and not isinstance(stream, _Routed):
                setattr(sys, name, _Routed(stream))


def _leave() -> None:
    with _lock:
        _active[0] -= 1
        if _active[0]:
            return
        if warnings.defaultaction == "always":  # type: ignore[attr-defined]
            warnings.defaultaction = _default_action[0]  # type: ignore[attr-defined]
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if isinstance(stream, _Routed):
                setattr(sys, name, stream.stream)


class _Routed:
    """A text stream whose text goes to the output of the attempt that writes it, if it is one."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        output = _current.get()
        if output is None:
            self.stream.write(text)
        else:
            output.print_text(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def user_place() -> str:
    """Return the nearest line of the user's code on the stack; without one, that of the library that writes."""
    frame: FrameType | None = sys._getframe(1)
    own, nearest = __file__, ""
    for _ in range(_MAX_FRAMES):
        if frame is None:
            break
        name = frame.f_code.co_filename
        if name != own:
            place = f"{os.path.basename(name)}:{frame.f_lineno}"
            if _is_user_file(name):
                return place
            nearest = nearest or place
        frame = frame.f_back
    return nearest


@lru_cache(4096)
def _is_user_file(path: str) -> bool:
    return is_user_file(path)
