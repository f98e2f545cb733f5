"""`Limiter`: requests that a process has open at a time, and its share of the job's requests and tokens a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

BURST_SECONDS = 1.0
"""Requests and tokens of so many seconds may be sent at once."""
WAIT_SECONDS = 0.5
"""Longest wait between two looks at the limits."""


@dataclass
class Bucket:
    """A bucket that fills with time, up to a burst. It may be overdrawn once, so that large requests pass, too."""

    per_minute: float | None
    """None: no limit."""
    level: float = 0.0
    """Amount that may be taken now."""
    filled: float = 0.0
    """Time of ``level``."""

    def fill(self, now: float) -> None:
        """Add what has come since the last call."""
        if self.per_minute is not None:
            most = self.most
            self.level = min(most, self.level + (now - self.filled) * self.per_minute / 60.0)
        self.filled = now

    @property
    def most(self) -> float:
        """Most that may be taken at once."""
        return max(1.0, (self.per_minute or 0.0) * BURST_SECONDS / 60.0)

    def wait_for(self, amount: float) -> float:
        """Return the seconds until ``amount`` may be taken; 0.0: now."""
        if self.per_minute is None:
            return 0.0
        missing = min(amount, self.most) - self.level
        return max(0.0, missing * 60.0 / self.per_minute) if missing > 1e-9 else 0.0

    def take(self, amount: float) -> None:
        """Take ``amount``; a negative one is given back."""
        if self.per_minute is not None:
            self.level = min(self.most, self.level - amount)


@dataclass
class Limiter:
    """The limits of one process for one service. Threads share it."""

    clock: Callable[[], float] = time.monotonic
    concurrency: int = 1
    open: int = field(default=0, init=False)
    """Requests that are open now."""
    requests: Bucket = field(default_factory=lambda: Bucket(None))
    tokens: Bucket = field(default_factory=lambda: Bucket(None))
    paused_until: float = field(default=0.0, init=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)

    def set_limits(
        self, *, concurrency: int, requests_per_minute: float | None, tokens_per_minute: float | None
    ) -> None:
        """Set the limits of this process."""
        with self._changed:
            self.concurrency = concurrency
            for bucket, rate in ((self.requests, requests_per_minute), (self.tokens, tokens_per_minute)):
                if bucket.per_minute != rate:
                    bucket.fill(self.clock())
                    is_first, bucket.per_minute = bucket.per_minute is None, rate
                    bucket.level = bucket.most if is_first else min(bucket.level, bucket.most)
            self._changed.notify_all()

    def acquire(self, tokens: float, *, is_over: Callable[[], bool]) -> bool:
        """Wait until a request with ``tokens`` may be sent; False if ``is_over`` says that none is needed any more."""
        with self._changed:
            while True:
                if is_over():
                    return False
                wait = self._wait_for(tokens)
                if wait <= 0.0:
                    self.open += 1
                    self.requests.take(1.0)
                    self.tokens.take(tokens)
                    return True
                self._changed.wait(min(wait, WAIT_SECONDS))

    def _wait_for(self, tokens: float) -> float:
        now = self.clock()
        self.requests.fill(now)
        self.tokens.fill(now)
        busy = WAIT_SECONDS if self.open >= self.concurrency else 0.0
        return max(busy, self.paused_until - now, self.requests.wait_for(1.0), self.tokens.wait_for(tokens))

    def release(self, *, tokens: float, estimated: float) -> None:
        """End a request.

        :param tokens: what it took.
        :param estimated: what `acquire` was told.
        """
        with self._changed:
            self.open -= 1
            self.tokens.take(tokens - estimated)
            self._changed.notify()

    def pause(self, seconds: float) -> None:
        """Send nothing for ``seconds``: the service asked for it."""
        with self._changed:
            self.paused_until = max(self.paused_until, self.clock() + seconds)
