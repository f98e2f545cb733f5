"""Start the driver of a submitted job as a process of its own session; also the code of that process.

The process, ``python -m pipeline.service.driver_process DIRECTORY START OUTPUT``, has no terminal and survives its
parent.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pipeline.common.imports import frozen_imports
from pipeline.common.secrets import mask_logs, mask_streams
from pipeline.errors import PipelineError
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status
from pipeline.service.queue import Start, exit_code, last_submission, note_start, unmark_queued
from pipeline.storage.local import LocalStore
from pipeline.storage.store import open_store
from pipeline.storage.urls import storage_errors

_DEAF = ("/bin/sh", "-c", 'trap "" HUP; exec "$@"', "sh")
"""Prefix of a command: the program ignores SIGHUP from the start, since ignored signals stay ignored over exec(2)."""
_PACKAGE = str(Path(__file__).parents[2])


def launch(job: JobDirectory, start: Start) -> Start:
    """Start the driver that ``start`` was claimed for, in the job's working directory.

    The driver has its own session and process group, no stdin, and writes to ``starts/<n>.out``. For a job directory
    that is not a local folder, the driver writes to a temporary file and copies that file to the job directory.

    :returns: ``start``, with the process of the driver.
    :raises StorageError: when the output file cannot be opened, or the driver's process cannot be recorded; the driver
        is killed then.
    :raises OSError: when no process can be started.
    """
    output, where = _open_output(job, start)
    folder = job.record.working_directory
    with output:
        process = subprocess.Popen(
            [*_DEAF, sys.executable, "-m", "pipeline.service.driver_process", job.root, str(start.number), where],
            cwd=folder if os.path.isdir(folder) else None,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([_PACKAGE, os.environ.get("PYTHONPATH", "")])},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        known = note_start(job.store, start, pid=process.pid, output=where)
    except BaseException:
        # The caller withdraws the start, and the next start has the same number.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    # A parent that lives long, such as a server or a notebook, must not keep a dead driver as a zombie. Where no thread
    # can be started, the next call of Popen collects it.
    with suppress(RuntimeError):
        threading.Thread(target=process.wait, name="pipeline-reaper", daemon=True).start()
    return known


def _open_output(job: JobDirectory, start: Start) -> tuple[IO[bytes], str]:
    """Open the file for stdout and stderr. Return the file, and its path if outside of the job directory."""
    if not isinstance(job.store, LocalStore):
        descriptor, path = tempfile.mkstemp(prefix=f"{job.id}-{start.number}-", suffix=".out")
        return os.fdopen(descriptor, "ab"), path
    local = job.store.path(layout.start_output_path(start.number))
    with storage_errors(str(local)):
        return os.fdopen(os.open(local, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab"), ""


UPLOAD_SECONDS = 10.0
"""Seconds between two copies of the output to a job directory that is not a local folder."""


def drive(directory: str) -> int:
    """Run the submitted job in ``directory`` to its end. Return the exit status.

    :raises PipelineError: when the job failed.
    """
    with frozen_imports():
        import dask.config

        from pipeline.report.progress import PlainProgress
        from pipeline.runner import run_job
        from pipeline.settings import Settings

    job = JobDirectory.open(directory)
    submission = last_submission(job.store)
    given, config = (submission.settings, submission.config) if submission else ({}, {})
    site = {f"pipeline.{name.replace('_', '-')}": value for name, value in config.items()}
    with dask.config.set(site):
        settings = Settings.load(**given, directory=_root(directory), import_paths=job.record.import_paths or None)
        job.fsync = settings.fsync
        run_job(job, settings=settings, callbacks=(PlainProgress(),), resume_cancelled=False)
    return exit_code(job, job.status())


def needs_no_driver(job: JobDirectory) -> bool:
    """True if the job has ended, or was cancelled after its driver was started."""
    return job.is_ended or job.status() is Status.CANCELLED


def unmark_if_done(directory: str) -> None:
    """Remove the queue mark of a job that no longer needs a driver; see `pipeline.service.queue`."""
    job, root = JobDirectory.open(directory), open_store(_root(directory), private=True)
    if needs_no_driver(job):
        unmark_queued(root, job.id)


def _root(directory: str) -> str:
    return directory.rstrip("/").rpartition("/")[0]


@contextmanager
def copy_output(directory: str, number: str, output: str) -> Iterator[None]:
    """Copy ``output`` to the job directory every `UPLOAD_SECONDS` while the block runs, and once at the end."""
    if not output:
        yield
        return
    store, ended = open_store(directory, private=True), threading.Event()

    def copy() -> None:
        with suppress(PipelineError, OSError):
            store.replace(layout.start_output_path(int(number)), Path(output).read_bytes())

    def copy_repeatedly() -> None:
        while not ended.wait(UPLOAD_SECONDS):
            copy()

    thread = threading.Thread(target=copy_repeatedly, name="pipeline-output", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(UPLOAD_SECONDS)
        sys.stderr.flush()
        copy()
        with suppress(OSError):
            Path(output).unlink()


def _set_up_logging() -> None:
    """Log warnings of all packages, and INFO of this package, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("pipeline"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("pipeline").setLevel(logging.INFO)


def main(arguments: list[str]) -> int:
    """Run the driver, and print its error to stderr. Return the exit status."""
    directory, number, output = arguments
    mask_streams()
    mask_logs()
    _set_up_logging()
    with copy_output(directory, number, output):
        try:
            return drive(directory)
        except PipelineError as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code
        except Exception:
            logging.getLogger(__name__).exception("this is a defect of the pipeline package")
            return PipelineError.exit_code
        finally:
            with suppress(PipelineError, OSError):
                unmark_if_done(directory)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
