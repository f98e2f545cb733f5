"""Make ``tests/data/stored_job``: two small jobs, for ``tests/acceptance/test_stored_job.py``.

Run ``python tests/data/make_stored_job.py`` when a change of format is intended and old job directories need not be
read; otherwise the stored files stay as they are, and the change has to read them. Plans name their input by absolute
path, size and time of change: the jobs are made in a fixed folder, and ``times.json`` keeps the times.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

from pipeline import runner
from pipeline.demo import make_demo
from pipeline.errors import Interrupted
from pipeline.events import Callback, PartitionEnded
from pipeline.settings import Settings
from pipeline.spec.load import load_spec

ROOT = Path("/tmp/pipeline-stored-job")
"""Folder in which the jobs are made, and into which tests copy them."""
STORED = Path(__file__).parent / "stored_job"
ROWS = 13_000


class StopAfter(Callback):
    """Interrupts the job once ``count`` partitions have ended."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_partition(self, event: PartitionEnded) -> None:
        self.count -= 1
        if self.count == 0:
            os.kill(os.getpid(), signal.SIGINT)


def settings() -> Settings:
    """Settings under which the jobs are made and continued."""
    return Settings.load(
        directory=str(ROOT / "jobs"), workers=1, threads=1, memory_limit="1 GiB", import_paths=(str(ROOT),)
    )


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    make_demo(ROOT, rows=ROWS)
    os.chdir(ROOT)
    spec = ROOT / "job.yaml"
    text = spec.read_text(encoding="utf-8").replace("max_fraction: 0.01", "max_fraction: 0.1")
    for name in ("finished", "interrupted"):
        spec.write_text(text.replace("path: scored/", f"path: scored-{name}/"), encoding="utf-8")
        loaded = load_spec(str(spec))
        if name == "finished":
            runner.run(loaded.spec, settings=settings(), job_id=name)
            continue
        with suppress(Interrupted):
            runner.run(loaded.spec, settings=settings(), job_id=name, callbacks=[StopAfter(1)])
    shutil.rmtree(STORED, ignore_errors=True)
    kept = shutil.ignore_patterns("__pycache__", "README.md", "logs", ".*")
    shutil.copytree(ROOT, STORED, ignore=kept)
    files = sorted(path for path in STORED.rglob("*") if path.is_file())
    times = {
        path.relative_to(STORED).as_posix(): (ROOT / path.relative_to(STORED)).stat().st_mtime_ns for path in files
    }
    (STORED / "times.json").write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
