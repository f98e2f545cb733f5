"""Show the progress of a job: a live bar on a terminal and in Jupyter, plain lines elsewhere."""

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
"""Share of the rows after which a plain line is written, even before `LINE_SECONDS`."""


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

    def begin(self, event: RoundStarted, *, now: float) -> None:
        """Reset the counts for a new round."""
        self.partitions, self.done = event.partitions, event.done
        self.rows, self.rows_done = event.rows, event.rows_done
        self.rows_before, self.started = event.rows_done, now

    def add(self, event: PartitionEnded) -> None:
        """Count an attempt at a partition that ended."""
        if event.outcome == AttemptOutcome.DONE:
            self.done += 1
            self.rows_done += event.rows.input
            self.rejected += event.rows.rejected
        elif event.outcome == AttemptOutcome.SPLIT:
            self.partitions += max(1, event.parts - 1)
        elif event.outcome == AttemptOutcome.RETRY:
            self.retries += 1

    def rate(self, now: float) -> float:
        """Return the rows per second of this run; 0 while nothing is done."""
        elapsed = now - self.started
        return (self.rows_done - self.rows_before) / elapsed if elapsed > 0 else 0.0

    def remaining(self, now: float) -> float | None:
        """Return the seconds until the last row is scored, at the rate so far; None while the rate is 0."""
        rate = self.rate(now)
        return max(self.rows - self.rows_done, 0) / rate if rate > 0 else None

    def line(self, now: float) -> str:
        """Return the counts as one line of text."""
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
            self._write(f"{phase} ({event.job})")

    def on_round(self, event: RoundStarted) -> None:
        """Write the number of rows and partitions."""
        now = self.clock()
        self.tally.begin(event, now=now)
        self._last = (now, self._share())
        done = f", {event.done:,} of them done before" if event.done else ""
        self._write(f"{self.tally.phase}: {plural(event.rows, 'row')} in {plural(event.partitions, 'partition')}{done}")

    def on_partition(self, event: PartitionEnded) -> None:
        """Write retries and failures, and the progress if a line is due."""
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
        self._task: TaskID = self._progress.add_task("planning", total=None, tally="")

    def start(self) -> None:
        """Start drawing; may be called again."""
        self._progress.start()

    def stop(self) -> None:
        """Remove the bar; may be called again."""
        self._progress.stop()

    def on_status(self, event: StatusChanged) -> None:
        """Show the new phase. At a final status, remove the bar for the summary."""
        phase = PHASES.get(Status(event.after))
        if phase is None:
            self.stop()
            return
        self.start()
        self.tally.phase = phase
        self._progress.update(self._task, description=phase)

    def on_round(self, event: RoundStarted) -> None:
        """Show the number of rows and partitions."""
        self.tally.begin(event, now=self._clock())
        self._draw()

    def on_partition(self, event: PartitionEnded) -> None:
        """Show the progress, and print retries and failures."""
        self.tally.add(event)
        if event.outcome in (AttemptOutcome.RETRY, AttemptOutcome.FAILED):
            text = f"partition {event.partition}: {event.outcome} after attempt {event.attempt}: {event.reason}"
            self._progress.console.print(text, markup=False, highlight=False)
        self._draw()

    def on_end(self, event: JobEnded) -> None:
        """Remove the bar for the summary."""
        self.stop()

    def _draw(self) -> None:
        _, _, text = self.tally.line(self._clock()).partition(": ")
        total = max(self.tally.rows, 1)
        completed = self.tally.rows_done if self.tally.rows else 1
        self._progress.update(self._task, total=total, completed=completed, tally=text)


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
def show_progress(*, quiet: bool = False) -> Iterator[tuple[Callback, ...]]:
    """Yield the callbacks that show a job's progress. A live display starts on entry and is removed on exit."""
    progress = make_progress(quiet=quiet)
    if not isinstance(progress, LiveProgress):
        yield (progress,)
        return
    progress.start()
    try:
        yield (progress,)
    finally:
        progress.stop()
