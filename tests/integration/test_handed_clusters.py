"""Jobs on clusters that the user made: each works, and is afterwards as it was."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import pandas as pd
import pytest
from distributed import Client, LocalCluster, get_client
from distributed.client import _get_global_client

import pipeline
from pipeline.errors import SchedulerLost, SpecError
from pipeline.execution.clusters import handed
from pipeline.spec.job_spec import JobSpec

Make = Callable[..., JobSpec]
LOGGER = "pipeline.execution.clusters.handed"


def job_on(cluster: Any, spec: JobSpec, tmp_path: Path) -> pipeline.Job:
    fields = {**spec.to_dict(), "cluster": cluster}
    return pipeline.Job(settings=pipeline.Settings.load(directory=str(tmp_path / "jobs")), **fields)


def state_of(client: Client) -> dict[str, Any]:
    """What a job might leave behind."""
    info = client.scheduler_info(n_workers=-1)
    return {
        "status": client.status,
        "workers": {address: worker["nthreads"] for address, worker in info["workers"].items()},
        "default": _get_global_client(),
        "config": dask.config.config.copy(),
        "modules": {name for name in sys.modules if name.startswith("steps_for_tests")},
        "topics": dict(client._event_handlers),
        "tasks": client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)),
        "answer": client.submit(lambda: 42, pure=False).result(timeout=30),
    }


def check(cluster: Any, client: Client, spec: JobSpec, tmp_path: Path) -> None:
    before = state_of(client)
    report = job_on(cluster, spec, tmp_path).run(callbacks=[])
    assert report.ok
    after = state_of(client)
    clients = client.run_on_scheduler(lambda dask_scheduler: sorted(dask_scheduler.clients))
    assert after == before
    assert [name for name in clients if name.startswith("Client-")] == [client.id]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The beginnings of what was said about a cluster; Dask's own loggers may speak beside it."""
    return [record.message.partition(":")[0] for record in caplog.records if record.name == LOGGER]


def test_a_client_of_processes(make_spec: Make, client: Client, tmp_path: Path) -> None:
    """The cluster of all tests: processes with nannies, worker-saturation 1.0."""
    handed._handed.clear()
    report = job_on(client, make_spec(), tmp_path).run(callbacks=[])
    assert report.ok
    assert client.submit(lambda: 42, pure=False).result(timeout=30) == 42
    assert handed.differences(client, client.scheduler.address) == []


def test_threads_of_this_process(
    make_spec: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    spec = make_spec(maps=("steps_for_tests:add_ratio_aloud",))
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=True) as client,
        caplog.at_level(logging.WARNING, LOGGER),
    ):
        check(cluster, client, spec, tmp_path)
        assert get_client() is client
        (job,) = (tmp_path / "jobs").glob("test-*")
        assert list((job / "logs" / "partitions").iterdir())
        assert said(caplog) == ["the workers are threads of this process"]
        with pytest.raises(SpecError, match="cannot run on threads of this process"):
            job_on(client, spec, tmp_path).submit()
    with pytest.raises(SpecError, match="is not connected"):
        job_on(client, spec, tmp_path)


def test_a_cluster_that_starts_its_workers_for_tasks(
    make_spec: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `SLURMCluster.adapt` does; the workers have no limit, and get all tasks at once."""
    with (
        dask.config.set({"distributed.scheduler.worker-saturation": "inf"}),
        LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit=0) as cluster,
        Client(cluster, set_as_default=False) as client,
        caplog.at_level(logging.WARNING, LOGGER),
    ):
        cluster.adapt(minimum=0, maximum=1, interval="200 ms", wait_count=1000)
        spec = make_spec()
        report = job_on(None, spec, tmp_path).run(client=client, callbacks=[])
        assert report.ok
        assert client.status == "running"
        assert said(caplog) == ["workers have no memory limit", "worker-saturation is inf"]
        job_on(cluster, make_spec(sink={"path": str(tmp_path / "second")}), tmp_path).run(callbacks=[])
        assert len(said(caplog)) == 2, "it is said once"


def test_a_closed_client_is_named_and_the_job_goes_on_with_another(
    make_spec: Make, client: Client, tmp_path: Path
) -> None:
    other = Client(client.scheduler.address, set_as_default=False)
    job = job_on(other, make_spec(), tmp_path)
    frame: pd.DataFrame = job.to_dask().head()
    assert len(frame)
    other.close()
    inproc = pipeline.Job(**{**make_spec().to_dict(), "cluster": "inproc://10.0.0.1/1/1"})
    with pytest.raises(SchedulerLost, match="handed over is closed") as caught:
        inproc.plan()
    assert "pipeline.resume" in caught.value.next_step
    assert job.run(client=client, callbacks=[]).ok


@pytest.mark.parametrize("other", [3, object(), ["tcp://x"]])
def test_other_objects_are_no_clusters(other: Any, make_spec: Make, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nor a client"):
        job_on(other, make_spec(), tmp_path)
