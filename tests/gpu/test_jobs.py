"""Whole jobs on the GPUs of this machine: the oracle bit for bit, a killed worker, resume on CPUs, and CPUs beside."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InfrastructureError
from pipeline.events import Callback, PartitionEnded
from pipeline.jobs.listing import find_job
from pipeline.report.verify import verify
from pipeline.runner import resume, run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.fake_device import VARIABLE
from pipeline.testing.oracle import Lake, oracle

pytest.importorskip("dask_cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(VARIABLE in os.environ, reason="tests/integration/test_fake_gpu.py has the same on a fake GPU"),
]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "gpus.yaml").write_text("type: local-cuda\nthreads: 2\n")
    return Settings.load(directory=str(tmp_path / "jobs"), cluster=str(tmp_path / "gpus.yaml"), device="cuda")


def assert_equals_oracle(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    out = pd.concat([pq.read_table(file).to_pandas() for file in sorted((tmp_path / "out").glob("*.parquet"))])
    pd.testing.assert_frame_equal(out.reset_index(drop=True), oracle(lake.files, model_path), check_exact=True)


class KillWorker(Callback):
    """Kill the worker of the first partitions that end."""

    def __init__(self, times: int = 1) -> None:
        self.times = times

    def on_partition(self, event: PartitionEnded) -> None:
        if event.outcome == "done" and self.times:
            self.times -= 1
            os.kill(int(event.worker.rpartition(":")[2]), signal.SIGKILL)


def test_job_equals_the_oracle(
    make_spec: Callable[..., JobSpec], settings: Settings, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    report = run(make_spec(), settings=settings)
    assert_equals_oracle(tmp_path, lake, model_path)
    assert report.to_dict()["engines"]["rows"] == {"xgboost-cuda": lake.rows}
    assert report.to_dict()["engines"]["mismatches"] == 0
    assert sum(device.rows for device in report.devices) == lake.rows
    assert all(device.peak_bytes > 0 for device in report.devices)
    assert verify(find_job(settings.directory, "@last")).ok


def test_gpu_and_cpus_in_one_job(
    make_spec: Callable[..., JobSpec], settings: Settings, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "gpus.yaml").write_text("type: local-cuda\nthreads: 2\ncpu_workers: 1\n")
    report = run(make_spec(), settings=replace(settings, device="auto"))
    assert_equals_oracle(tmp_path, lake, model_path)
    assert report.devices


def test_killed_worker_comes_back(
    make_spec: Callable[..., JobSpec], settings: Settings, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    report = run(make_spec(), settings=settings, callbacks=[KillWorker()])
    assert_equals_oracle(tmp_path, lake, model_path)
    assert report.to_dict()["engines"]["rows"] == {"xgboost-cuda": lake.rows}


def test_failed_job_is_resumed_on_cpus(
    make_spec: Callable[..., JobSpec], settings: Settings, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    class Fail(Callback):
        def on_partition(self, event: PartitionEnded) -> None:
            raise InfrastructureError("the end of this run")

    options: dict[str, Any] = {"callbacks": [Fail()]}
    try:
        run(make_spec(), settings=settings, **options)
    except InfrastructureError:
        job = find_job(settings.directory, "@last")
        resume(job.id, settings=replace(settings, cluster="local", device="cpu"))
    assert_equals_oracle(tmp_path, lake, model_path)
