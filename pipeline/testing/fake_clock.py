"""A clock that a test sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class FakeClock:
    """A monotonic clock that moves only by `advance` and `pause`. Pass it as the ``clock`` of any function."""

    now: float = 0.0
    """Seconds."""
    during_pause: dict[int, Callable[[], object]] = field(default_factory=dict)
    """Calls to make at the end of a pause, by the number of the pause from 0."""
    pauses: int = 0
    """Pauses so far."""

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now += seconds

    def pause(self, seconds: float) -> None:
        """Sleep: let ``seconds`` pass at once. Pass it as the ``pause`` or ``sleep`` of any function."""
        call = self.during_pause.get(self.pauses)
        self.pauses += 1
        self.now += seconds
        if call is not None:
            call()
