"""Progress of a job as a person sees it: live on a terminal and in Jupyter, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from pipeline.common.units import format_count, format_seconds, plural
from pipeline.events import AttemptOutcome, Callback, JobEnded, PartitionEnded, RoundStarted, StatusChanged
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
"""Share of the rows after which there is a plain line even before that."""


@dataclass
class Tally:
    """What is known of a job that runs. Times are seconds of a monotonic clock."""

    phase: str = "planned"
    partitions: int = 0
    done: int = 0
    """Partitions that are done, earlier runs of the job included."""
    rows: int = 0
    rows_done: int = 0
    rejected: int = 0
    """Rows rejected in this run."""
    retries: int = 0
    started: float = 0.0
    rows_before: int = 0
    """Rows that were done before this run."""

    def begin(self, event: RoundStarted, *, now: float) -> None:
        """A round begins."""
        self.partitions, self.done = event.partitions, event.done
        self.rows, self.rows_done = event.rows, event.rows_done
        self.rows_before, self.started = event.rows_done, now

    def add(self, event: PartitionEnded) -> None:
        """An attempt at a partition ended."""
        if event.outcome == AttemptOutcome.DONE:
            self.done += 1
            self.rows_done += event.rows.input
            self.rejected += event.rows.rejected
        elif event.outcome == AttemptOutcome.SPLIT:
            self.partitions += max(1, event.parts - 1)
        elif event.outcome == AttemptOutcome.RETRY:
            self.retries += 1

    def rate(self, now: float) -> float:
        """Rows per second of this run; 0 when nothing is done yet."""
        elapsed = now - self.started
        return (self.rows_done - self.rows_before) / elapsed if elapsed > 0 else 0.0

    def remaining(self, now: float) -> float | None:
        """Seconds until the last row is scored, at the rate so far; None when there is no rate."""
        rate = self.rate(now)
        return max(self.rows - self.rows_done, 0) / rate if rate > 0 else None

    def line(self, now: float) -> str:
        """One line of text."""
        share = self.rows_done / self.rows if self.rows else 1.0
        parts = [
            f"{share:.0%}",
            f"{self.done:,}/{plural(self.partitions, 'partition')}",
            plural(self.rows_done, "row"),
            f"{format_count(self.rate(now))} rows/s",
            f"{self.rejected:,} rejected",
        ]
        if self.retries:
            parts.append(plural(self.retries, "retry"))
        remaining = self.remaining(now)
        if remaining is not None and self.done < self.partitions:
            parts.append(f"{format_seconds(remaining)} left")
        return f"{self.phase}: " + ", ".join(parts)


@dataclass
class PlainProgress(Callback):
    """Lines of text: one for each phase, and one about every ten seconds or tenth of the rows."""

    stream: TextIO | None = None
    """Default: what ``sys.stderr`` is when a line is written."""
    clock: Callable[[], float] = time.monotonic
    tally: Tally = field(default_factory=Tally)
    _last: tuple[float, float] = (0.0, 0.0)

    def on_status(self, event: StatusChanged) -> None:
        """Say what happens now; how it ended is for the summary."""
        phase = PHASES.get(Status(event.after))
        if phase is None:
            return
        self.tally.phase = phase
        if event.after != Status.RUNNING:
            self._write(f"{phase} ({event.job})")

    def on_round(self, event: RoundStarted) -> None:
        """Say how much there is to do."""
        now = self.clock()
        self.tally.begin(event, now=now)
        self._last = (now, self._share())
        done = f", {event.done:,} of them done before" if event.done else ""
        self._write(f"{self.tally.phase}: {plural(event.rows, 'row')} in {plural(event.partitions, 'partition')}{done}")

    def on_partition(self, event: PartitionEnded) -> None:
        """Say how far it is, when it is time to."""
        now = self.clock()
        self.tally.add(event)
        if event.outcome in (AttemptOutcome.RETRY, AttemptOutcome.FAILED):
            self._write(f"partition {event.partition}: {event.outcome} after attempt {event.attempt}: {event.reason}")
        seconds, share = self._last
        is_end = self.tally.done == self.tally.partitions
        if now - seconds >= LINE_SECONDS or self._share() - share >= LINE_SHARE or is_end:
            self._last = (now, self._share())
            self._write(self.tally.line(now))

    def _share(self) -> float:
        return self.tally.rows_done / self.tally.rows if self.tally.rows else 1.0

    def _write(self, line: str) -> None:
        stream = self.stream or sys.stderr
        stream.write(line + "\n")
        stream.flush()


class LiveProgress(Callback):
    """A bar that is drawn over and over, on a terminal or in a notebook."""

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
        self._task: TaskID = self._progress.add_task("planning", total=None, tally="")

    def start(self) -> None:
        """Begin to draw; may be called again."""
        self._progress.start()

    def stop(self) -> None:
        """Take the bar away; may be called again."""
        self._progress.stop()

    def on_status(self, event: StatusChanged) -> None:
        """Show what happens now; when nothing does any more, make room for the summary."""
        phase = PHASES.get(Status(event.after))
        if phase is None:
            self.stop()
            return
        self.start()
        self.tally.phase = phase
        self._progress.update(self._task, description=phase)

    def on_round(self, event: RoundStarted) -> None:
        """Show how much there is to do."""
        self.tally.begin(event, now=self._clock())
        self._draw()

    def on_partition(self, event: PartitionEnded) -> None:
        """Show how far it is."""
        self.tally.add(event)
        if event.outcome in (AttemptOutcome.RETRY, AttemptOutcome.FAILED):
            text = f"partition {event.partition}: {event.outcome} after attempt {event.attempt}: {event.reason}"
            self._progress.console.print(text, markup=False, highlight=False)
        self._draw()

    def on_end(self, event: JobEnded) -> None:
        """Make room for the summary."""
        self.stop()

    def _draw(self) -> None:
        _, _, text = self.tally.line(self._clock()).partition(": ")
        total = max(self.tally.rows, 1)
        completed = self.tally.rows_done if self.tally.rows else 1
        self._progress.update(self._task, total=total, completed=completed, tally=text)


@dataclass
class JobWatch(Callback):
    """Remembers which job it is about, for when there is no report to tell."""

    job: str = ""

    def on_status(self, event: StatusChanged) -> None:
        """Note the id."""
        self.job = event.job

    def on_round(self, event: RoundStarted) -> None:
        """Note the id."""
        self.job = event.job


def make_progress(*, quiet: bool = False) -> PlainProgress | LiveProgress | Callback:
    """The callback that shows a job's progress on stderr, as fits where that goes; nothing when ``quiet``."""
    if quiet:
        return Callback()
    from rich.console import Console

    console = Console(stderr=True)
    return LiveProgress(console) if console.is_jupyter or console.is_interactive else PlainProgress()


@contextmanager
def show_progress(*, quiet: bool = False) -> Iterator[tuple[Callback, ...]]:
    """The callbacks that show a job's progress; a live display is there from the start, and gone on leaving."""
    progress = make_progress(quiet=quiet)
    if not isinstance(progress, LiveProgress):
        yield (progress,)
        return
    progress.start()
    try:
        yield (progress,)
    finally:
        progress.stop()
