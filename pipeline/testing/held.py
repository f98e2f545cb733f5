"""Hold a job in the middle of its partitions, for tests of what other processes can see and reach meanwhile."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.testing.processes import ROOT, wait_until

_STEP = '''
import fcntl
import os
from distributed import get_worker


def hold(frame):
    """On a worker: say that it is here, and go on once the test lets go of the lock."""
    try:
        get_worker()
    except ValueError:
        return frame
    # Not waiting for a reader: there is none once the test has gone on.
    pipe = os.open({reached!r}, os.O_RDWR | os.O_NONBLOCK)
    os.write(pipe, b"x")
    os.close(pipe)
    with open({lock!r}) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    return frame
'''


@dataclass
class HeldJob:
    """The command that runs the job, and its result."""

    process: subprocess.Popen[str]
    folder: Path
    job: str
    out: str = ""
    err: str = ""
    code: int | None = None

    @property
    def directory(self) -> Path:
        """Directory of the job."""
        return self.folder / ".pipeline" / "jobs" / self.job


@contextmanager
def held_job(
    folder: Path,
    *,
    source: Path,
    model: Path,
    spec: Mapping[str, Any] | None = None,
    options: Sequence[str] = ("--workers", "2"),
    environment: Mapping[str, str] | None = None,
    seconds: float = 180,
    must_succeed: bool = True,
) -> Iterator[HeldJob]:
    """Run a job that stays in the middle of its partitions inside the block, with umask 0; release it on exit.

    :param spec: fields that replace or extend the defaults.
    :param must_succeed: if True, raise unless the job then ends with exit status 0.
    :param options: options of ``python -m pipeline run``.
    """
    reached, lock = folder / "reached", folder / "lock"
    os.mkfifo(reached)
    lock.touch()
    (folder / "held_step.py").write_text(_STEP.format(reached=str(reached), lock=str(lock)))
    default = {
        "name": "held",
        "source": {"path": str(source)},
        "steps": [{"map": "held_step:hold"}, {"score": {"model": str(model)}}],
        "sink": {"path": str(folder / "out")},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump({**default, **(spec or {})}))
    with open(os.open(reached, os.O_RDWR), "rb", buffering=0) as pipe, lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = _start(folder, options, environment or {})
        job = HeldJob(process, folder, "held-1")
        try:
            # True if a partition has started, or none ever will.
            wait_until(lambda: process.poll() is not None or select.select([pipe], [], [], 0.1)[0], seconds=seconds)
            if process.poll() is not None:
                raise AssertionError("no partition began: " + "".join(process.communicate()))
            yield job
            fcntl.flock(held, fcntl.LOCK_UN)
            job.out, job.err = process.communicate(timeout=seconds)
            job.code = process.returncode
            if job.code != 0 and must_succeed:
                raise AssertionError(f"the job failed: {job.err}")
        finally:
            process.kill()
            process.communicate()


def _start(folder: Path, options: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "job.yaml", "--job", "held-1", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        umask=0,
    )
