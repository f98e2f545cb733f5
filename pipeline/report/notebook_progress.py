"""The live view of a job in a notebook: a card that is updated in place, without widgets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.common.html import Tone, html_table
from pipeline.common.step_output import MessageCount, add_counts
from pipeline.common.units import format_count, format_seconds, plural
from pipeline.events import (
    AttemptOutcome,
    Callback,
    ClusterReady,
    JobEnded,
    PartitionEnded,
    ProgressMade,
    RoundStarted,
    StatusChanged,
    StepMessage,
    message_line,
)
from pipeline.jobs.status import Status
from pipeline.report.progress import PHASES, Tally, show_progress

DRAW_SECONDS = 0.5
"""Shortest time between two updates of the card: each is kept in the page while the cell runs."""
MAX_MESSAGES = 6
"""Places of prints and warnings of steps that the card shows."""
MAX_NOTES = 5
"""Retries and failures that the card shows, the last ones."""


class NotebookProgress(Callback):
    """A card with phase, bar, rows, rate, time left, and the partitions that run longest."""

    def __init__(
        self, update: Callable[[dict[str, str]], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """:param update: replaces what the cell shows by ``{"text/plain": …, "text/html": …}``."""
        self.tally = Tally(phase="planning")
        self._update = update
        self._clock = clock
        self._started = clock()
        self._drawn = -DRAW_SECONDS
        self._job = self._dashboard = ""
        self._notes: list[str] = []
        self._messages: dict[tuple[str, str, str], MessageCount] = {}
        self._draw()

    def on_status(self, event: StatusChanged) -> None:
        """Show the new phase."""
        self._job = event.job
        phase = PHASES.get(Status(event.after))
        if phase is not None:
            self.tally.phase = phase
            self._draw()

    def on_cluster(self, event: ClusterReady) -> None:
        """Show the link to the dashboard."""
        self._dashboard = event.dashboard

    def on_round(self, event: RoundStarted) -> None:
        """Show the number of rows and partitions."""
        self._job = event.job
        self.tally.begin(event, now=self._clock())
        self._draw()

    def on_progress(self, event: ProgressMade) -> None:
        """Show the progress inside partitions."""
        self.tally.update(event, now=self._clock())
        self._draw_if_due()

    def on_partition(self, event: PartitionEnded) -> None:
        """Show the progress, and retries and failures."""
        self.tally.add(event, now=self._clock())
        if event.outcome in (AttemptOutcome.RETRY, AttemptOutcome.FAILED):
            self._notes.append(f"partition {event.partition}: {event.outcome}: {event.reason}")
        add_counts(self._messages, event.messages)
        self._draw_if_due()

    def on_message(self, event: StepMessage) -> None:
        """Show the first print or warning of a place in the code of a step, before its partition has ended."""
        add_counts(self._messages, [MessageCount(event.step, event.kind, event.place, event.message, 0)])
        self._draw_if_due()

    def on_end(self, event: JobEnded) -> None:
        """Show the final status, and what steps printed: the report of the job follows."""
        seconds = format_seconds(self._clock() - self._started)
        status = Status(event.status)
        tone: Tone = "good" if status is Status.SUCCEEDED else "warn" if status.is_success else "bad"
        title = f"{event.status}  {event.job}"
        html = html_table(f"{title}  ({seconds})", self._message_fields(), tone=tone)
        self._update({"text/plain": title, "text/html": html})

    def _message_fields(self) -> list[tuple[str, str]]:
        """Return the prints and warnings of steps, and how often each came."""
        lines = [
            message_line(*message.key, message.text) + (f"  ({message.count:,} times)" if message.count > 1 else "")
            for message in self._messages.values()
        ]
        more = [f"and {len(lines) - MAX_MESSAGES} more"] if len(lines) > MAX_MESSAGES else []
        return [("steps", "\n".join([*lines[:MAX_MESSAGES], *more]))] if lines else []

    def _draw_if_due(self) -> None:
        if self._clock() - self._drawn >= DRAW_SECONDS:
            self._draw()

    def _draw(self) -> None:
        now, tally = self._clock(), self.tally
        self._drawn = now
        share = tally.rows_scored / tally.rows if tally.rows else None
        fields: list[tuple[str, str]] = []
        if share is not None:
            left = tally.remaining(now)
            rows = f"{tally.rows_scored:,} of {plural(tally.rows, 'row')} ({share:.0%}), {tally.rejected:,} rejected"
            rate = f"{format_count(tally.rate(now))} rows/s" + (f", {format_seconds(left)} left" if left else "")
            running = ", ".join(
                f"{part.partition} {part.rows_done / max(1, part.rows):.0%}" for part in tally.running[:4]
            )
            fields = [
                ("rows", rows),
                (
                    "partitions",
                    f"{tally.done:,} of {tally.partitions:,} done" + (f"; running: {running}" if running else ""),
                ),
                ("speed", rate if tally.rows_scored else ""),
            ]
        fields.append(("dashboard", self._dashboard))
        fields += self._message_fields()
        fields.append(("", "\n".join(self._notes[-MAX_NOTES:])))
        elapsed = format_seconds(now - self._started)
        title = f"{tally.phase}  {self._job}".rstrip() + f"  ({elapsed})"
        text = tally.line(now) if share is not None else title
        self._update({"text/plain": text, "text/html": html_table(title, fields, tone="busy", share=share)})


@contextmanager
def show_job() -> Iterator[Sequence[Callback]]:
    """Yield the callbacks that show a job's progress: a card in Jupyter, else as on the command line."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        with show_progress() as observers:
            yield observers
        return
    display: Any = sys.modules["IPython"].display.display
    handle = display({"text/plain": "planning"}, raw=True, display_id=True)
    yield [NotebookProgress(lambda content: handle.update(content, raw=True))]
