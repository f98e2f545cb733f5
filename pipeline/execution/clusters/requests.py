"""Choose what the next batch job requests: the first shape whose jobs start, with the memory and walltime they need.

A shape is a set of fields of the cluster file, such as a queue with its walltime. Jobs of a shape that was refused, or
whose jobs wait long in the queue, are followed by jobs of the next shape. A job that was killed for its memory or its
walltime is followed by jobs with half as much again, up to a limit. Pure: the time is an argument.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

GROWTH = 1.5
"""Factor by which memory or walltime of a job grows."""
REFUSED_SECONDS = 300.0
"""Seconds for which a refused shape is not tried again."""


@dataclass(frozen=True)
class Shape:
    """Size of the jobs of one shape."""

    slots: int
    """Partitions that a job runs at a time."""
    lifetimes: tuple[float, ...]
    """Seconds from the start of a job until the first of its workers leaves, by how often its walltime has grown."""
    memory_steps: int = 0
    """Most times that its memory may grow."""


@dataclass(frozen=True)
class Request:
    """Size that a job requests."""

    shape: int = 0
    """Number of the shape, in the order of the cluster file."""
    memory: int = 0
    """Times that its memory has grown."""
    walltime: int = 0
    """Times that its walltime has grown."""

    @property
    def memory_factor(self) -> float:
        """Memory / memory of the shape."""
        return float(GROWTH**self.memory)

    @property
    def walltime_factor(self) -> float:
        """Walltime / walltime of the shape, before the limit."""
        return float(GROWTH**self.walltime)


FIRST = Request()
"""The first shape, as the cluster file has it."""


@dataclass
class Requests:
    """The requests of one pool."""

    shapes: tuple[Shape, ...]
    _grown: dict[int, Request] = field(default_factory=dict)
    """Request of each shape whose jobs grew."""
    _most: dict[int, Request] = field(default_factory=dict)
    """Largest request of each shape of which a larger one was refused."""
    _refused: dict[int, float] = field(default_factory=dict)
    """Times until which shapes are not tried."""

    def lifetime(self, request: Request) -> float:
        """Return the seconds from the start of a job until the first of its workers leaves."""
        return self.shapes[request.shape].lifetimes[request.walltime]

    def slots(self, request: Request) -> int:
        """Return the partitions that a job runs at a time."""
        return self.shapes[request.shape].slots

    def next(self, *, late: Collection[int] = (), now: float) -> Request | None:
        """Return what the next job requests; None if every shape was refused lately.

        :param late: shapes whose jobs wait long in the queue, or can never start.
        """
        open_ = [number for number in range(len(self.shapes)) if self._refused.get(number, float("-inf")) <= now]
        on_time = [number for number in open_ if number not in late]
        number = next(iter(on_time or open_), None)
        return None if number is None else self._grown.get(number, Request(number))

    def refused(self, request: Request, *, now: float) -> bool:
        """Record a request that the batch system refused. Return True if there is another one to try."""
        if request.memory or request.walltime:
            # The site's limit is below ours: the last size that was accepted stays.
            smaller = replace(request, memory=max(0, request.memory - 1), walltime=max(0, request.walltime - 1))
            self._grown[request.shape] = self._most[request.shape] = smaller
            return True
        self._refused[request.shape] = now + REFUSED_SECONDS
        return self.next(now=now) is not None

    def accepted(self, request: Request) -> None:
        """Record a request that the batch system accepted."""
        self._refused.pop(request.shape, None)

    def grow(self, request: Request, *, memory: bool = False, walltime: bool = False) -> Request | None:
        """Let the next jobs of a shape request more than ``request``, whose job was killed for it.

        :returns: what they request now; None if jobs of this size have grown already, or may not grow.
        """
        shape = self.shapes[request.shape]
        if self._grown.get(request.shape, Request(request.shape)) != request:
            return None
        most = self._most.get(request.shape, Request(request.shape, shape.memory_steps, len(shape.lifetimes) - 1))
        grown = replace(
            request,
            memory=min(most.memory, request.memory + memory),
            walltime=min(most.walltime, request.walltime + walltime),
        )
        if grown == request:
            return None
        self._grown[request.shape] = grown
        return grown
