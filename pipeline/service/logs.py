"""The log of a job as text lines: its events, the logs of its drivers, and the output of drivers that died early.

The log of a partition has what steps and models printed besides, every line of every attempt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.common.step_output import WARNING
from pipeline.common.units import format_seconds, plural
from pipeline.errors import PipelineError
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import Holder, is_process
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.stages import stage_states
from pipeline.report.job_log import rows_text
from pipeline.service.queue import find_starts

ERROR_LEVELS = ("WARNING", "ERROR", "CRITICAL")
_KNOWN = {"time", "event", "epoch"}
_DURATIONS = {"seconds", "remaining", "seconds_won"}
"""Fields of events that hold seconds."""


@dataclass(frozen=True)
class LogLine:
    """One line of the log."""

    time: str
    """UTC, ISO 8601; empty when unknown."""
    level: str
    """``INFO``, ``WARNING`` or ``ERROR``."""
    source: str
    """``event``, the name of a logger, ``receipt``, ``step`` for what a step printed, or ``output`` of a driver that
    never acquired the lease."""
    message: str
    partition: str = ""
    worker: str = ""
    traceback: str = ""

    def to_dict(self) -> dict[str, str]:
        """The line as JSON output shows it."""
        return {name: value for name, value in self.__dict__.items() if value or name in ("time", "level", "message")}

    def text(self) -> str:
        """Return the line as text."""
        level = f"{self.level:<7} " if self.level != "INFO" else " " * 8
        lines = [f"{self.time or '-':<24} {level}{self.message}", *self.traceback.splitlines()]
        return "\n    ".join(lines)


@dataclass
class LogReader:
    """Reader of the new lines of a job's log."""

    job: JobDirectory
    partition: str = ""
    """Only lines about this partition and its parts."""
    errors: bool = False
    """Only warnings and errors."""
    _seen: dict[str, int] = field(default_factory=dict)
    """Lines of each file already read."""

    def read(self) -> list[LogLine]:
        """Read the lines that are new since the last call, oldest first."""
        store = self.job.store
        lines = [_from_event(event) for event in self._new(layout.EVENTS_FILE, self.job.events.read())]
        # A batch system may keep the logs of its jobs in this folder, too.
        for path in [layout.log_path(epoch) for epoch in layout.numbers_of(store.list(layout.LOGS), suffix=".jsonl")]:
            lines += [_from_log(record) for record in self._new(path, _read_lines(store.read(path)))]
        lines += [line for name, text in self._outputs() for line in self._new_text(name, text)]
        lines += self._printed()
        return sorted((line for line in lines if self._is_selected(line)), key=lambda line: line.time)

    def _printed(self) -> list[LogLine]:
        """Return the new lines that steps printed in attempts at the requested partition."""
        if not self.partition:
            return []
        lines = []
        for prefix, job in _with_parts(self.job):
            for name in job.store.list(layout.PARTITION_LOGS):
                partition = name.rpartition("-")[0]
                if _is_part(prefix + partition, self.partition) or _is_part(partition, self.partition):
                    path = f"{layout.PARTITION_LOGS}/{name}"
                    records = self._new(prefix + path, _read_lines(job.store.read(path)))
                    lines += [_from_print(record, prefix + partition) for record in records]
        return lines

    def receipts(self) -> list[LogLine]:
        """Return lines from the requested partition's receipts: the only trace of work done after the driver died."""
        if not self.partition:
            return []
        return [
            LogLine("", "INFO", "receipt", _receipt_text(receipt), receipt.partition, receipt.worker)
            for receipt in self.job.receipts.all()
            if _is_part(receipt.partition, self.partition)
        ]

    def _new(self, name: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        before = self._seen.get(name, 0)
        self._seen[name] = len(records)
        return records[before:]

    def _new_text(self, name: str, text: str) -> list[LogLine]:
        lines = text.splitlines()
        before = self._seen.get(name, 0)
        self._seen[name] = len(lines)
        return [LogLine("", "ERROR", "output", line) for line in lines[before:]]

    def _outputs(self) -> Iterable[tuple[str, str]]:
        """Yield the output of drivers that died before they acquired the lease, and so have no log."""
        starts = find_starts(self.job.store)
        if not starts:
            return
        holders = {_holder(self.job, name) for name in self.job.store.list(layout.LEASES) if name.endswith(".json")}
        for start in starts:
            if start.process and (start.process in holders or is_process(start.process, start.pid) is not False):
                continue
            name = layout.start_output_path(start.number)
            try:
                yield name, self.job.store.read(name).decode(errors="replace")
            except FileNotFoundError:
                continue

    def _is_selected(self, line: LogLine) -> bool:
        if self.partition and not _is_part(line.partition, self.partition):
            return False
        return not self.errors or line.level in ERROR_LEVELS


def _with_parts(job: JobDirectory) -> Iterable[tuple[str, JobDirectory]]:
    """Yield a job, its stages and its children, each with what the names of its partitions begin with."""
    yield "", job
    for stage in stage_states(job):
        if stage.job is not None:
            yield f"{stage.name}/", stage.job
    for child in job.children():
        yield f"{child.id.removeprefix(f'{job.id}.')}/", child


def _from_print(record: Mapping[str, Any], partition: str) -> LogLine:
    text, place, kind = (str(record.get(name, "")) for name in ("text", "place", "kind"))
    step = str(record.get("step", "")) or "a step"
    message = f"{step} ({place}): {text}" if place and kind != WARNING else f"{step}: {text}" if kind else text
    message = f"{partition}: {message}" if "/" in partition else message
    return LogLine(str(record.get("time", "")), "WARNING" if kind == WARNING else "INFO", "step", message, partition)


def _receipt_text(receipt: Receipt) -> str:
    if receipt.splits:
        return f"partition {receipt.partition}: split into {', '.join(receipt.splits)}"
    worker = receipt.worker or "an unknown worker"
    text = f"{rows_text(receipt.rows)}, {receipt.seconds.total:.2f} s on {worker}"
    return f"partition {receipt.partition}: its receipt says {text}"


def _is_part(partition: str, requested: str) -> bool:
    return partition == requested or partition.startswith(f"{requested}.")


def _holder(job: JobDirectory, name: str) -> str:
    try:
        holder = Holder.from_json(job.store.read(f"{layout.LEASES}/{name}"))
    except (PipelineError, FileNotFoundError):
        return ""
    return holder.process if holder else ""


def _read_lines(data: bytes) -> list[dict[str, Any]]:
    records = []
    for line in data.decode(errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        # The first line holds only the schema version.
        if isinstance(record, dict) and "schema_version" not in record:
            records.append(record)
    return records


def _from_log(record: Mapping[str, Any]) -> LogLine:
    return LogLine(
        str(record.get("time", "")),
        str(record.get("level", "INFO")),
        str(record.get("logger", "")),
        str(record.get("message", "")),
        str(record.get("partition", "")),
        str(record.get("worker", "")),
        str(record.get("traceback", "")),
    )


def _from_event(event: Mapping[str, Any]) -> LogLine:
    level, message = _event_text(event)
    return LogLine(str(event.get("time", "")), level, "event", message, str(event.get("partition", "")))


def _event_text(event: Mapping[str, Any]) -> tuple[str, str]:
    """Return level and message of an event."""
    kind = event["event"]
    if kind == "status":
        reason = f": {event['reason']}" if event.get("reason") else ""
        level = {"FAILED": "ERROR", "INCOMPLETE": "WARNING", "INTERRUPTED": "WARNING", "CANCELLED": "WARNING"}.get(
            str(event.get("after")), "INFO"
        )
        return level, f"{event.get('after')}{reason}"
    if kind == "driver":
        return "INFO", f"driver {event.get('epoch')}: process {event.get('pid')} on {event.get('host')}"
    if kind == "partition":
        level = "ERROR" if event.get("outcome") == "failed" else "WARNING"
        text = f"partition {event.get('partition')}: {event.get('outcome')} after attempt {event.get('attempt')}"
        return level, f"{text}: {event.get('reason')}"
    if kind == "cluster":
        workers = f"{plural(int(event.get('workers', 0)), 'worker')}, {plural(int(event.get('threads', 0)), 'thread')}"
        return "INFO", f"connected: {workers}" + (f", {event['dashboard']}" if event.get("dashboard") else "")
    fields = (f"{name} {_value_text(name, value)}" for name, value in event.items() if name not in _KNOWN)
    return "INFO", f"{kind}: " + ", ".join(fields)


def _value_text(name: str, value: Any) -> str:
    """Return the value of an event's field for people: durations with a unit, other numbers to three digits."""
    if isinstance(value, float):
        return (
            format_seconds(value) if name in _DURATIONS else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        )
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
