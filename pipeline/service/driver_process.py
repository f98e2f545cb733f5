"""Starting the driver of a job as a process of its own session, which nothing of the one that starts it can end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO

from pipeline.jobs.directory import JobDirectory
from pipeline.service.queue import STARTS, Start, note_start
from pipeline.storage.local import LocalStore
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
            [*_DEAF, sys.executable, "-m", "pipeline.service.detached", job.root, str(start.number), where],
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
        descriptor, path = tempfile.mkstemp(prefix=f"{job.job}-{start.number}-", suffix=".out")
        return os.fdopen(descriptor, "ab"), path
    path_there = job.store.path(f"{STARTS}/{start.number}.out")
    with storage_errors(str(path_there)):
        return os.fdopen(os.open(path_there, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab"), ""
