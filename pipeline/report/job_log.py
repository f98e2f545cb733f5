"""The log of a driver: ``logs/<epoch>.jsonl`` in the job directory, one JSON object per line.

The log holds the driver's messages and the outcome of each partition, wherever the driver's stderr goes. No decision
depends on a log: a line may be lost at a power cut, and a failed write must not fail the job.
"""

from __future__ import annotations

import json
import logging
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import IO, Any

from pipeline.common.rows import RowCounts
from pipeline.common.secrets import redact
from pipeline.common.step_output import WARNING
from pipeline.common.units import iso_time
from pipeline.errors import PipelineError
from pipeline.events import AttemptOutcome, Callback, JobEnded, PartitionEnded, StepMessage
from pipeline.jobs import layout
from pipeline.storage.local import LocalStore
from pipeline.storage.store import Store

_PLACES = ("round", "partition", "attempt", "worker")
"""Attributes of log records that lines have too."""
REMOTE_SECONDS = 5.0
"""Seconds between two writes to an object store, where each write is a new version of the object."""
LIBRARIES = ("distributed", "dask")
"""Libraries whose warnings are logged too."""
logger = logging.getLogger(__name__)


def rows_text(rows: RowCounts) -> str:
    """Return ``30 in = 27 out + 3 rejected + 0 filtered``."""
    return f"{rows.input:,} in = {rows.output:,} out + {rows.rejected:,} rejected + {rows.filtered:,} filtered"


class LogFile:
    """``logs/<epoch>.jsonl``, open for appending from any thread."""

    def __init__(self, store: Store, epoch: int) -> None:
        self.store = store
        self.name = layout.log_path(epoch)
        self.job = store.root.rstrip("/").rpartition("/")[2]
        # Reentrant: the warning about a failed write is itself logged, and comes back here to be dropped.
        self._lock = threading.RLock()
        self._file: IO[str] | None = None
        self._lines: list[str] = []
        self._is_broken = False
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        if isinstance(store, LocalStore):
            self._open(store)
        else:
            self._thread = threading.Thread(target=self._keep, name="pipeline-log", daemon=True)
            self._thread.start()

    def write(self, fields: dict[str, Any]) -> None:
        """Add one line, with secrets masked. After the first failed write, warn once and write nothing more."""
        shown = {name: redact(value) if isinstance(value, str) else value for name, value in fields.items()}
        line = json.dumps(shown, default=str)
        with self._lock:
            if self._is_broken:
                return
            if self._file is None:
                self._lines.append(line)
                return
            try:
                self._file.write(line + "\n")
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Write the remaining lines and close the file."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(REMOTE_SECONDS)
            self._upload()
        with self._lock:
            if self._file is not None:
                try:
                    self._file.close()
                except OSError as error:
                    self._give_up(error)

    def _open(self, store: LocalStore) -> None:
        try:
            # Let the store create the file, so that folder and file get its modes.
            if not store.exists(self.name):
                store.replace(self.name, b"")
            self._file = open(store.path(self.name), "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        except (PipelineError, OSError) as error:
            self._give_up(error)

    def _keep(self) -> None:
        while not self._is_over.wait(REMOTE_SECONDS):
            self._upload()

    def _upload(self) -> None:
        with self._lock:
            data = "".join(f"{line}\n" for line in self._lines).encode()
        try:
            self.store.replace(self.name, data)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self._is_broken:
            self._is_broken = True
            logger.warning("the log %s cannot be written: %s", self.name, error)


class _LogHandler(logging.Handler):
    """Write log records to a `LogFile`."""

    def __init__(self, file: LogFile, job: str) -> None:
        super().__init__(logging.INFO)
        self.file = file
        self.job = job
        thread = threading.current_thread()
        # Several drivers may run in threads, each for one child of a fan-out: each logs only its own thread.
        self.only = None if thread is threading.main_thread() else thread.ident

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if record.name.partition(".")[0] in LIBRARIES and record.levelno < logging.WARNING:
            return
        if self.only not in (None, record.thread):
            return
        fields = {
            "time": iso_time(datetime.fromtimestamp(record.created, UTC)),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "job": self.job,
        }
        fields |= {name: getattr(record, name) for name in _PLACES if hasattr(record, name)}
        if record.exc_info and record.exc_info[0] is not None:
            fields["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        self.file.write(fields)


class _Progress(Callback):
    """Write the outcome of each partition and of the job."""

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self.job = file.job

    def on_partition(self, event: PartitionEnded) -> None:
        """Write a completed partition. Other outcomes are events already."""
        if event.outcome == AttemptOutcome.DONE:
            self._say(
                f"partition {event.partition}: done, {rows_text(event.rows)}, {event.seconds:.2f} s",
                round=event.round,
                partition=event.partition,
                attempt=event.attempt,
                worker=event.worker,
            )

    def on_message(self, event: StepMessage) -> None:
        """Write the first print or warning of a place in the code of a step."""
        level = "WARNING" if event.kind == WARNING else "INFO"
        self._say(event.line, level=level, partition=event.partition, worker=event.worker)

    def on_end(self, event: JobEnded) -> None:
        """Write the error of a failed job, with its details."""
        error = event.report.get("error") or {}
        details = "; ".join(
            f"{name}: {error[name]}" for name in ("where", "found", "expected", "next") if error.get(name)
        )
        if error:
            self._say(
                f"{error.get('kind')}: {error.get('message')}" + (f" ({details})" if details else ""), level="ERROR"
            )

    def _say(self, message: str, *, level: str = "INFO", **fields: Any) -> None:
        now = iso_time(datetime.now(UTC))
        self.file.write(
            {"time": now, "level": level, "logger": "pipeline", "message": message, "job": self.job, **fields}
        )


@contextmanager
def record_log(store: Store, *, epoch: int) -> Iterator[Callback]:
    """Write log records of this package, and events of the yielded callback, to ``logs/<epoch>.jsonl``."""
    file = LogFile(store, epoch)
    handler, progress = _LogHandler(file, file.job), _Progress(file)
    loggers = [logging.getLogger(name) for name in ("pipeline", *LIBRARIES)]
    first = {"schema_version": 1, "time": iso_time(datetime.now(UTC)), "level": "INFO", "logger": "pipeline"}
    file.write({**first, "message": f"the log of driver {epoch}"})
    for package_logger in loggers:
        package_logger.addHandler(handler)
    try:
        yield progress
    except BaseException as error:
        file.write(
            {
                "time": iso_time(datetime.now(UTC)),
                "level": "ERROR",
                "logger": "pipeline",
                "message": f"the driver ends: {type(error).__name__}: {error}",
                "traceback": "".join(traceback.format_exception(error)),
            }
        )
        raise
    finally:
        for package_logger in loggers:
            package_logger.removeHandler(handler)
        file.close()
