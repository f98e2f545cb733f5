"""`Calls`: what an attempt at a partition tells a model about its calls: its share of limits, and kept answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol


class KeptAnswers(Protocol):
    """Answers that attempts at a partition have paid, and that outlive them."""

    def take(self, key: str) -> Mapping[str, Any] | None:
        """Return an answer for a prompt, each once; None if there is none left."""

    def keep(self, key: str, answer: Mapping[str, Any]) -> None:
        """Keep an answer. It is stored now or soon."""

    def flush(self) -> None:
        """Store what was kept."""


class NoKeptAnswers:
    """No answers, and none are kept."""

    def take(self, key: str) -> None:
        """See `KeptAnswers`."""

    def keep(self, key: str, answer: Mapping[str, Any]) -> None:
        """See `KeptAnswers`."""

    def flush(self) -> None:
        """See `KeptAnswers`."""


@dataclass
class Calls:
    """The calls of one attempt. Threads share it."""

    share: float = 1.0
    """Share of this process of the limits of the whole job, from 0 to 1."""
    kept: KeptAnswers = field(default_factory=NoKeptAnswers)
    cost: float = field(default=0.0, init=False)
    """Cost of the answers so far, those kept by earlier attempts among them."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def add_cost(self, cost: float) -> None:
        """Add the cost of an answer."""
        with self._lock:
            self.cost += cost


_calls: ContextVar[Calls | None] = ContextVar("calls", default=None)
_process_calls = Calls()


def current_calls() -> Calls:
    """Return the calls of the attempt that this thread runs; those of the process outside of one."""
    return _calls.get() or _process_calls


def set_process_share(share: float) -> None:
    """Set the share of a process that runs no attempts, such as one that scores for another."""
    _process_calls.share = share


@contextmanager
def attempt_calls(calls: Calls) -> Iterator[Calls]:
    """Make ``calls`` those of this thread inside the block, and store at its end what they kept."""
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)
        calls.kept.flush()
