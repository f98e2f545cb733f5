"""Show the progress of a job: a live bar on a terminal and in Jupyter, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.common.units import format_count, format_seconds, plural
from pipeline.events import (
    AttemptOutcome,
    Callback,
    ClusterReady,
    JobEnded,
    PartitionEnded,
    ProgressMade,
    RoundStarted,
    RunningPartition,
    StatusChanged,
    StepMessage,
)
from pipeline.jobs.status import Status

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

PHASES = {
    Status.PLANNED: "planned",
    Status.QUEUED: "queued",
    Status.PROVISIONING: "starting workers",
    Status.RUNNING: "scoring",
    Status.PUBLISHING: "publishing",
}
LINE_SECONDS = 10.0
"""Longest pause between two plain lines while partitions end."""
LINE_SHARE = 0.1
"""Share of the rows after which a plain line is written, even before `LINE_SECONDS`."""
WINDOW_SECONDS = 30.0
"""Time over which the rate is measured, or longer, so that it spans `MIN_SAMPLES`."""
MIN_SAMPLES = 8
MERGED_SECONDS = 0.5
"""Reports of rows within this time count as one."""


@dataclass
class Tally:
    """Counts of a running job. Times are seconds of a monotonic clock."""

    phase: str = "planned"
    partitions: int = 0
    done: int = 0
    """Completed partitions, including those of earlier runs of the job."""
    rows: int = 0
    rows_done: int = 0
    rejected: int = 0
    """Rows rejected in this run."""
    retries: int = 0
    started: float = 0.0
    rows_before: int = 0
    """Rows completed before this run."""
    running: tuple[RunningPartition, ...] = ()
    """Partitions that run now, the longest first, as far as known."""
    rows_inside: int = 0
    """Rows of finished batches of running partitions."""
    _samples: deque[tuple[float, int]] = field(default_factory=deque)
    """Times at which rows were reported, and the rows scored by then."""

    @property
    def rows_scored(self) -> int:
        """Rows of completed partitions, and of finished batches of running ones."""
        return min(self.rows_done + self.rows_inside, self.rows)

    def begin(self, event: RoundStarted, *, now: float) -> None:
        """Reset the counts for a new round."""
        self.partitions, self.done = event.partitions, event.done
        self.rows, self.rows_done = event.rows, event.rows_done
        self.rows_before, self.started = event.rows_done, now
        self.running, self.rows_inside = (), 0
        self._samples.clear()

    def add(self, event: PartitionEnded, *, now: float) -> None:
        """Count an attempt at a partition that ended."""
        ended = [part for part in self.running if part.partition == event.partition]
        self.rows_inside -= sum(part.rows_done for part in ended)
        self.running = tuple(part for part in self.running if part not in ended)
        if event.outcome == AttemptOutcome.DONE:
            self.done += 1
            self.rows_done += event.rows.input
            self.rejected += event.rows.rejected
            self._sample(now)
        elif event.outcome == AttemptOutcome.SPLIT:
            self.partitions += max(1, event.parts - 1)
        elif event.outcome == AttemptOutcome.RETRY:
            self.retries += 1

    def update(self, event: ProgressMade, *, now: float) -> None:
        """Take over the progress inside the partitions that run."""
        self.running, self.rows_inside = event.running, max(0, event.rows_done - self.rows_done)
        if self.rows_inside:
            self._sample(now)

    def _sample(self, now: float) -> None:
        if self._samples and now - self._samples[-1][0] < MERGED_SECONDS:
            # Workers that began together report together.
            self._samples[-1] = (self._samples[-1][0], self.rows_scored)
            return
        self._samples.append((now, self.rows_scored))
        while len(self._samples) > MIN_SAMPLES and now - self._samples[1][0] > WINDOW_SECONDS:
            self._samples.popleft()

    def rate(self, now: float) -> float:
        """Return the rows per second of the last batches; 0 while nothing is done.

        It is measured from the first finished batch on, so without the time in which workers start and load the model.
        Until a second batch is finished, it is the mean since the start.
        """
        if len(self._samples) > 1:
            then, rows = self._samples[0]
            return max(0, self.rows_scored - rows) / max(now - then, MERGED_SECONDS)
        elapsed = now - self.started
        return (self.rows_scored - self.rows_before) / elapsed if elapsed > 0 else 0.0

    def remaining(self, now: float) -> float | None:
        """Return the seconds until the last row is scored, at the rate so far; None while the rate is 0."""
        rate = self.rate(now)
        return max(self.rows - self.rows_scored, 0) / rate if rate > 0 else None

    def line(self, now: float) -> str:
        """Return the counts as one line of text."""
        share = self.rows_scored / self.rows if self.rows else 1.0
        parts = [
            f"{share:.0%}",
            f"{self.done:,}/{plural(self.partitions, 'partition')}",
            plural(self.rows_scored, "row"),
            f"{format_count(self.rate(now))} rows/s",
            f"{self.rejected:,} rejected",
        ]
        if self.retries:
            parts.append(plural(self.retries, "retry"))
        remaining = self.remaining(now)
        if remaining is not None and self.done < self.partitions:
            parts.append(f"{format_seconds(remaining)} left")
        return f"{self.phase}: " + ", ".join(parts)


def starting_text(event: StatusChanged) -> str:
    """Return which workers are started or waited for, and for how long: the second part of the reason."""
    _, colon, workers = event.reason.partition(": ")
    return f"{colon}{workers}" if event.after == Status.PROVISIONING else ""


@dataclass
class PlainProgress(Callback):
    """Write a line for each phase, and one about every ten seconds or tenth of the rows."""

    stream: TextIO | None = None
    """Default: ``sys.stderr`` at the time of writing."""
    clock: Callable[[], float] = time.monotonic
    tally: Tally = field(default_factory=Tally)
    _last: tuple[float, float] = (0.0, 0.0)

    def on_status(self, event: StatusChanged) -> None:
        """Write the new phase. The summary shows the final status."""
        phase = PHASES.get(Status(event.after))
        if phase is None:
            return
        self.tally.phase = phase
        if event.after != Status.RUNNING:
            self._write(f"{phase} ({event.job}){starting_text(event)}")

    def on_cluster(self, event: ClusterReady) -> None:
        """Write the link to the dashboard."""
        if event.dashboard:
            self._write(f"dashboard: {event.dashboard}")

    def on_round(self, event: RoundStarted) -> None:
        """Write the number of rows and partitions."""
        now = self.clock()
        self.tally.begin(event, now=now)
        self._last = (now, self._share())
        done = f", {event.done:,} of them done before" if event.done else ""
        self._write(f"{self.tally.phase}: {plural(event.rows, 'row')} in {plural(event.partitions, 'partition')}{done}")

    def on_progress(self, event: ProgressMade) -> None:
        """Write the progress inside partitions if a line is due."""
        now = self.clock()
        self.tally.update(event, now=now)
        self._write_if_due(now)

    def on_partition(self, event: PartitionEnded) -> None:
        """Write retries and failures, and the progress if a line is due."""
        now = self.clock()
        self.tally.add(event, now=now)
        if event.outcome in (AttemptOutcome.RETRY, AttemptOutcome.FAILED):
            self._write(f"partition {event.partition}: {event.outcome} after attempt {event.attempt}: {event.reason}")
        self._write_if_due(now, is_end=self.tally.done == self.tally.partitions)

    def on_message(self, event: StepMessage) -> None:
        """Write the first print or warning of a place in the code of a step."""
        self._write(event.line)

    def _write_if_due(self, now: float, *, is_end: bool = False) -> None:
        seconds, share = self._last
        if now - seconds >= LINE_SECONDS or self._share() - share >= LINE_SHARE or is_end:
            self._last = (now, self._share())
            self._write(self.tally.line(now))

    def _share(self) -> float:
        return self.tally.rows_scored / self.tally.rows if self.tally.rows else 1.0

    def _write(self, line: str) -> None:
        stream = self.stream or sys.stderr
        stream.write(line + "\n")
        stream.flush()


class LiveProgress(Callback):
    """Draw a progress bar on a terminal or in a notebook."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.tally = Tally()
        self._clock = clock
        self._progress: Progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[tally]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._moved: list[tuple[logging.StreamHandler[Any], Any]] = []
        """Log handlers that write above the bar, each with its own stream."""
        self._task: TaskID = self._progress.add_task("planning", total=None, tally="")

    def start(self) -> None:
        """Start drawing; may be called again. Log lines are written above the bar from now on."""
        before = (sys.stdout, sys.stderr)
        self._progress.start()
        if not self._moved:
            self._moved = _move_handlers(dict(zip(map(id, before), (sys.stdout, sys.stderr), strict=True)))

    def stop(self) -> None:
        """Remove the bar; may be called again."""
        self._progress.stop()
        for handler, stream in self._moved:
            handler.setStream(stream)
        self._moved = []

    def on_status(self, event: StatusChanged) -> None:
        """Show the new phase. At a final status, remove the bar for the summary."""
        phase = PHASES.get(Status(event.after))
        if phase is None:
            self.stop()
            return
        self.start()
        self.tally.phase = phase
        self._progress.update(self._task, description=phase, tally=starting_text(event).removeprefix(": "))

    def on_cluster(self, event: ClusterReady) -> None:
        """Print the link to the dashboard; it stays above the bar."""
        if event.dashboard:
            self.print_line(f"dashboard: {event.dashboard}")

    def print_line(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_round(self, event: RoundStarted) -> None:
        """Show the number of rows and partitions."""
        self.tally.begin(event, now=self._clock())
        self._draw()

    def on_progress(self, event: ProgressMade) -> None:
        """Show the progress inside partitions."""
        self.tally.update(event, now=self._clock())
        self._draw()

    def on_partition(self, event: PartitionEnded) -> None:
        """Show the progress, and print retries and failures."""
        self.tally.add(event, now=self._clock())
        if event.outcome in (AttemptOutcome.RETRY, AttemptOutcome.FAILED):
            text = f"partition {event.partition}: {event.outcome} after attempt {event.attempt}: {event.reason}"
            self.print_line(text)
        self._draw()

    def on_message(self, event: StepMessage) -> None:
        """Print the first print or warning of a place in the code of a step."""
        self.print_line(event.line)

    def on_end(self, event: JobEnded) -> None:
        """Remove the bar for the summary."""
        self.stop()

    def _draw(self) -> None:
        _, _, text = self.tally.line(self._clock()).partition(": ")
        total = max(self.tally.rows, 1)
        completed = self.tally.rows_scored if self.tally.rows else 1
        self._progress.update(self._task, total=total, completed=completed, tally=text)


def _move_handlers(streams: Mapping[int, Any]) -> list[tuple[logging.StreamHandler[Any], Any]]:
    """Let log handlers write to other streams; return them with the streams they had.

    A handler keeps the stream it was made with: it would write into the bar.

    :param streams: new streams by the ``id`` of the old ones.
    """
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    moved = []
    for handler in {handler for logger in loggers for handler in getattr(logger, "handlers", ())}:
        stream = getattr(handler, "stream", None)
        new = streams.get(id(stream))
        if isinstance(handler, logging.StreamHandler) and new is not None and new is not stream:
            handler.setStream(new)
            moved.append((handler, stream))
    return moved


@dataclass
class JobWatch(Callback):
    """Remember the id of the job, for a run that ends without a report."""

    job: str = ""

    def on_status(self, event: StatusChanged) -> None:
        """Remember the id."""
        self.job = event.job

    def on_round(self, event: RoundStarted) -> None:
        """Remember the id."""
        self.job = event.job


def make_progress(*, quiet: bool = False) -> PlainProgress | LiveProgress | Callback:
    """Return the callback for progress on stderr: live if interactive, else plain. If ``quiet``, it shows nothing."""
    if quiet:
        return Callback()
    from rich.console import Console

    console = Console(stderr=True)
    return LiveProgress(console) if console.is_jupyter or console.is_interactive else PlainProgress()


@contextmanager
def show_progress(
    *, quiet: bool = False, on_live: Callable[[Callable[[str], object]], object] | None = None
) -> Iterator[tuple[Callback, ...]]:
    """Yield the callbacks that show a job's progress. A live display starts on entry and is removed on exit.

    :param on_live: gets the function that prints a line above a live display, when one is drawn.
    """
    progress = make_progress(quiet=quiet)
    if not isinstance(progress, LiveProgress):
        yield (progress,)
        return
    progress.start()
    if on_live is not None:
        on_live(progress.print_line)
    try:
        yield (progress,)
    finally:
        progress.stop()
