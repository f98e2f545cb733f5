"""Starting the driver of a job as a process of its own session, which nothing of the one that starts it can end.

A driver without a terminal: ``python -m pipeline.service.driver_process DIRECTORY START OUTPUT``; see
`pipeline.service.driver_process`.
"""

from __future__ import annotations

import logging
import os
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
"""The program after it ignores SIGHUP from its first moment on: what is ignored stays so over exec(2)."""
_PACKAGE = str(Path(__file__).parents[2])


def launch(job: JobDirectory, start: Start) -> Start:
    """Start the driver that ``start`` is the right to, in the job's working directory.

    It has its own session and process group, no stdin, and writes to ``starts/<n>.out``; where the job directory is no
    folder of this machine, to a file of the temporary directory, which it copies there.

    :returns: ``start``, with the process it became.
    :raises StorageError: when its output cannot be opened.
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
    # Whoever lives long, as a server or a notebook, must not keep a dead driver as a zombie.
    threading.Thread(target=process.wait, name="pipeline-reaper", daemon=True).start()
    return note_start(job.store, start, pid=process.pid, output=where)


def _open_output(job: JobDirectory, start: Start) -> tuple[IO[bytes], str]:
    """The file for stdout and stderr, and its path when that is not in the job directory."""
    if not isinstance(job.store, LocalStore):
        descriptor, path = tempfile.mkstemp(prefix=f"{job.id}-{start.number}-", suffix=".out")
        return os.fdopen(descriptor, "ab"), path
    path_there = job.store.path(layout.start_output_path(start.number))
    with storage_errors(str(path_there)):
        return os.fdopen(os.open(path_there, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab"), ""


UPLOAD_SECONDS = 10.0
"""Seconds between two copies of the output to a job directory that is no folder of this machine."""


def drive(directory: str) -> int:
    """Take the submitted job in ``directory`` to its end; gives the exit status.

    :raises PipelineError: when it did not end well.
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


def is_unwanted(job: JobDirectory) -> bool:
    """Whether a driver that was started earlier finds the job done, or cancelled meanwhile."""
    return job.is_ended or job.status() is Status.CANCELLED


def settle(directory: str) -> None:
    """Take the mark of a job away that needs no driver any more; see `pipeline.service.queue`."""
    job, root = JobDirectory.open(directory), open_store(_root(directory), private=True)
    if is_unwanted(job):
        unmark_queued(root, job.id)


def _root(directory: str) -> str:
    return directory.rstrip("/").rpartition("/")[0]


@contextmanager
def copied(directory: str, number: str, output: str) -> Iterator[None]:
    """While the block runs, ``output`` is copied to the job directory now and then, and once more at the end."""
    if not output:
        yield
        return
    store, is_over = open_store(directory, private=True), threading.Event()

    def copy() -> None:
        with suppress(PipelineError, OSError):
            store.replace(layout.start_output_path(int(number)), Path(output).read_bytes())

    def keep() -> None:
        while not is_over.wait(UPLOAD_SECONDS):
            copy()

    thread = threading.Thread(target=keep, name="pipeline-output", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(UPLOAD_SECONDS)
        sys.stderr.flush()
        copy()
        with suppress(OSError):
            Path(output).unlink()


def _set_up_logging() -> None:
    """Warnings of everybody, and what this package has to tell."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("pipeline"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("pipeline").setLevel(logging.INFO)


def main(arguments: list[str]) -> int:
    """Run, and say on stderr what went wrong."""
    directory, number, output = arguments
    mask_streams()
    mask_logs()
    _set_up_logging()
    with copied(directory, number, output):
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
                settle(directory)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
