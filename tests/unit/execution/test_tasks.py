"""Modules that workers and the scheduler load for a partition."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cloudpickle

from pipeline.execution.tasks import make_tasks
from pipeline.testing.jobs import small_job

LOADED = "import {}, sys; sys.exit('dask.dataframe' in sys.modules)"


def test_workers_do_not_import_dask_dataframe() -> None:
    code = LOADED.format("pipeline.execution.tasks, pipeline.execution.clusters.client")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_neither_does_who_unpickles_a_task(tmp_path: Path) -> None:
    plan = small_job(tmp_path / "in", sink=str(tmp_path / "out")).plan
    task = make_tasks(plan.recipe(job="j", directory=str(tmp_path)), plan.partitions[:1], plan.versions)[0]
    (tmp_path / "task").write_bytes(cloudpickle.dumps(dict(task.dask)))
    code = LOADED.format("pickle").replace(
        "; sys.exit", f"; pickle.load(open({str(tmp_path / 'task')!r}, 'rb')); sys.exit"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
