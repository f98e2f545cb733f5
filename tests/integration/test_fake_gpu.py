"""Whole jobs on real Dask processes with fake GPUs: the oracle bit for bit, memory that runs short, lost devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster

from pipeline.driver.prepare import prepare
from pipeline.errors import DeviceLost, DeviceOutOfMemory, NoDevice
from pipeline.events import Callback, PartitionEnded, RoundStarted
from pipeline.execution.clusters import DASK_CONFIG, local_cuda
from pipeline.execution.clusters.local import NEVER
from pipeline.execution.clusters.local_cuda import _cpu_workers
from pipeline.execution.dask_config import override_config
from pipeline.jobs.listing import find_job
from pipeline.report.verify import verify
from pipeline.runner import resume, run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing import fake_dask_cuda
from pipeline.testing.fake_device import LOST, VARIABLE, FakeGpu
from pipeline.testing.fake_nvml import Card, FakeNvml, nvml
from pipeline.testing.oracle import Lake, oracle
from pipeline.testing.processes import wait_until

PRELOAD = ["pipeline.execution.clusters.worker_setup", "pipeline.testing.fake_device"]


@contextmanager
def gpu_cluster(gpu: FakeGpu, *, folder: Path, workers: int = 1, threads: int = 1, **options: Any) -> Iterator[Client]:
    """Yield a client of workers with fake GPUs, and with a folder of their own for what they share."""
    with (
        # As for local clusters: else Dask closes a nanny whose worker is not back soon.
        override_config({**DASK_CONFIG, "distributed.deploy.lost-worker-timeout": NEVER}),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            memory_limit="2 GiB",
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            preload=PRELOAD,
            env={VARIABLE: gpu.to_json()},
            local_directory=str(folder),
            **options,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Two workers with two threads and a GPU each, and with the resource."""
    folder, resources = tmp_path_factory.mktemp("scratch"), {"GPU": 2}
    with gpu_cluster(FakeGpu(), folder=folder, workers=2, threads=2, resources=resources) as client:
        yield client


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A worker with a GPU, two threads and the resource, and a worker without."""
    folder, resources = tmp_path_factory.mktemp("scratch"), {"GPU": 2}
    with gpu_cluster(FakeGpu(), folder=folder, threads=2, resources=resources) as client:
        cluster = client.cluster
        cluster.worker_spec.update(_cpu_workers(cluster, 1, memory=2 << 30))
        cluster.scale(2)
        client.wait_for_workers(2, timeout=60)
        yield client


def settings_of(client: Client, tmp_path: Path, **more: Any) -> Settings:
    return Settings.load(directory=str(tmp_path / "jobs"), cluster=client.scheduler.address, **more)


def assert_equals_oracle(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    out = pd.concat([pq.read_table(file).to_pandas() for file in sorted((tmp_path / "out").glob("*.parquet"))])
    pd.testing.assert_frame_equal(out.reset_index(drop=True), oracle(lake.files, model_path), check_exact=True)


@pytest.mark.parametrize("device", [None, "auto", "cuda"])
def test_a_job_on_gpus_equals_the_oracle(
    device: Any, make_spec: Callable[..., JobSpec], gpus: Client, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    settings = settings_of(gpus, tmp_path, device=device)
    report = run(make_spec(), settings=settings)
    assert_equals_oracle(tmp_path, lake, model_path)
    assert report.to_dict()["engines"]["rows"] == {"xgboost-cuda": lake.rows}
    assert report.to_dict()["engines"]["mismatches"] == 0
    (used,) = report.devices
    assert (used.uuid, used.name, used.driver, used.rows) == ("GPU-fake-1", "NVIDIA H200", "580.95.05", lake.rows)
    assert f"  device     {lake.rows:,} rows on 1 × NVIDIA H200" in report.text()
    assert "  engine     xgboost-cuda" in report.text()
    job = find_job(settings.directory, "@last")
    receipts = job.receipts.all()
    assert {receipt.device for receipt in receipts} == {"GPU-fake-1"}
    assert len({receipt.worker for receipt in receipts}) == 2, "both take partitions from the start"
    assert verify(job).ok


def test_cpu_is_a_request_that_gpus_obey(
    make_spec: Callable[..., JobSpec], gpus: Client, lake: Lake, tmp_path: Path
) -> None:
    report = run(make_spec(device="cpu"), settings=settings_of(gpus, tmp_path))
    assert report.device == "cpu: cpu was requested"
    assert report.devices == ()
    assert sum(report.to_dict()["engines"]["rows"].values()) >= lake.rows
    assert "xgboost-cuda" not in report.to_dict()["engines"]["rows"]


def test_output_for_cpus_only_names_the_reason(make_spec: Callable[..., JobSpec], gpus: Client, tmp_path: Path) -> None:
    spec = make_spec(device="auto", score={"output": {"column": "p", "kind": "leaf"}})
    report = run(spec, settings=settings_of(gpus, tmp_path))
    assert report.device == "cpu: the output leaf"


def test_cuda_leaves_workers_without_a_gpu_alone(
    make_spec: Callable[..., JobSpec], mixed: Client, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    """Partitions ask for the resource, and only workers that have it are asked for a proof."""
    settings = settings_of(mixed, tmp_path)
    report = run(make_spec(device="cuda"), settings=settings)
    assert_equals_oracle(tmp_path, lake, model_path)
    assert report.to_dict()["engines"]["rows"] == {"xgboost-cuda": lake.rows}
    job = find_job(settings.directory, "@last")
    assert len({receipt.worker for receipt in job.receipts.all()}) == 1
    (event,) = [event for event in job.events.read() if event["event"] == "device"]
    assert len(event["workers"]) == 1


def test_auto_takes_workers_with_and_without_gpus(
    make_spec: Callable[..., JobSpec], mixed: Client, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    """Both take partitions from one queue, and the bits are the same."""
    settings = settings_of(mixed, tmp_path)
    report = run(make_spec(device="auto"), settings=settings)
    assert_equals_oracle(tmp_path, lake, model_path)
    receipts = find_job(settings.directory, "@last").receipts.all()
    assert {receipt.device for receipt in receipts} == {"", "GPU-fake-1"}
    (used,) = report.devices
    assert used.rows == sum(receipt.rows.input for receipt in receipts if receipt.device)
    assert f"{used.rows:,} rows on 1 × NVIDIA H200; {lake.rows - used.rows:,} rows on CPUs" in report.text()


@pytest.mark.slow
def test_job_on_the_gpus_of_this_machine(
    make_spec: Callable[..., JobSpec],
    lake: Lake,
    model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``cluster: local-cuda`` end to end; with dask-cuda itself where it is installed, else with a stand-in."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv(VARIABLE, FakeGpu().to_json())
    monkeypatch.setattr(local_cuda, "PRELOAD", PRELOAD)
    (tmp_path / "gpus.yaml").write_text("type: local-cuda\nthreads: 1\ncpu_workers: 1\nmemory_limit: 2 GiB\n")
    settings = Settings.load(directory=str(tmp_path / "jobs"), cluster=str(tmp_path / "gpus.yaml"), device="cuda")
    with cuda_workers(monkeypatch), nvml(FakeNvml([Card("GPU-a"), Card("GPU-b")])):
        planned = prepare(make_spec(), settings=settings)
        assert planned.device.text() == "cuda expected: 2 × NVIDIA H200, 141 GiB, batches of 262,144 rows"
        report = run(make_spec(), settings=settings)
    assert_equals_oracle(tmp_path, lake, model_path)
    assert report.to_dict()["engines"]["rows"] == {"xgboost-cuda": lake.rows}
    assert {device.uuid for device in report.devices} == {"GPU-a", "GPU-b"}
    assert verify(find_job(settings.directory, "@last")).ok


@contextmanager
def cuda_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let dask-cuda start workers on a machine without a GPU, by its own switches for tests."""
    for switch in ("DASK_CUDA_TEST_DISABLE_DEVICE_SPECIFIC", "DASK_CUDA_TEST_SINGLE_GPU"):
        monkeypatch.setenv(switch, "1")
    try:
        import dask_cuda  # noqa: F401  (with its own pynvml)
    except ImportError:
        with fake_dask_cuda.installed():
            yield
    else:
        yield


def test_memory_that_is_short_ends_on_the_cpu_or_is_an_error(
    make_spec: Callable[..., JobSpec], lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    with gpu_cluster(FakeGpu(memory=8000), folder=tmp_path / "scratch") as client:
        report = run(make_spec(), settings=settings_of(client, tmp_path))
        assert_equals_oracle(tmp_path, lake, model_path)
        assert any("a worker stopped using its GPU: memory ran short: " in text for text in report.warnings)
        spec = make_spec(device="cuda", sink={"path": str(tmp_path / "other")})
        with pytest.raises(DeviceOutOfMemory, match="a batch does not fit on the GPU"):
            run(spec, settings=settings_of(client, tmp_path))


@pytest.mark.slow
def test_worker_that_lost_its_gpu_restarts_and_uses_it_again(
    make_spec: Callable[..., JobSpec], lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    with gpu_cluster(FakeGpu(tokens=str(tokens)), folder=tmp_path / "scratch") as client:
        before = set(client.scheduler_info(n_workers=-1)["workers"])
        spec, settings = make_spec(device="cuda"), settings_of(client, tmp_path)
        report = run(spec, settings=settings, callbacks=[LoseAtStart(tokens, 1)])
        after = set(client.scheduler_info(n_workers=-1)["workers"])
    assert_equals_oracle(tmp_path, lake, model_path)
    assert list(tokens.iterdir()) == []
    assert before.isdisjoint(after)
    assert report.retries > 0
    assert report.to_dict()["engines"]["rows"] == {"xgboost-cuda": lake.rows}
    retries = [event for event in find_job(settings.directory, "@last").events.read() if event["event"] == "partition"]
    assert "DeviceLost: the GPU of a worker failed" in retries[0]["reason"]


@pytest.mark.slow
def test_gpu_that_is_lost_twice_is_struck_off(
    make_spec: Callable[..., JobSpec], lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    with gpu_cluster(FakeGpu(tokens=str(tokens)), folder=tmp_path / "scratch") as client:
        settings = settings_of(client, tmp_path, attempts=4)
        report = run(make_spec(), settings=settings, callbacks=[LoseAtStart(tokens, 2)])
    assert_equals_oracle(tmp_path, lake, model_path)
    assert list(tokens.iterdir()) == []
    assert report.devices == ()
    assert set(report.to_dict()["engines"]["rows"]) <= {"xgboost", "trees"}


@pytest.mark.slow
def test_worker_of_a_gpu_that_is_struck_off_leaves_its_share_to_others(
    make_spec: Callable[..., JobSpec], lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    """Two workers share a GPU here: the second loss, whosever it is, sends its worker away for good."""
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    with gpu_cluster(FakeGpu(tokens=str(tokens)), folder=tmp_path / "scratch", workers=2) as client:
        settings = settings_of(client, tmp_path, device="cuda", attempts=5)
        report = run(make_spec(), settings=settings, callbacks=[LoseAtStart(tokens, 2)])
        wait_until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 1)
    assert_equals_oracle(tmp_path, lake, model_path)
    assert report.to_dict()["engines"]["rows"] == {"xgboost-cuda": lake.rows}


@pytest.mark.slow
def test_job_of_a_lost_gpu_is_resumed_on_cpus(
    make_spec: Callable[..., JobSpec], settings: Settings, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    with gpu_cluster(FakeGpu(tokens=str(tokens)), folder=tmp_path / "scratch") as client:
        lost = settings_of(client, tmp_path, device="cuda", attempts=1)
        with pytest.raises(DeviceLost, match="the GPU of a worker failed") as error:
            run(make_spec(), settings=lost, callbacks=[LoseAfterPartition(tokens)])
    assert error.value.exit_code == 75
    assert LOST in error.value.found
    job = find_job(lost.directory, "@last")
    done = list(job.receipts.all())
    assert done
    report = resume(job.id, settings=replace(settings, directory=lost.directory, device="cpu"))
    assert_equals_oracle(tmp_path, lake, model_path)
    assert sum(device.rows for device in report.devices) == sum(receipt.rows.input for receipt in done)
    assert verify(job).ok


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        (FakeGpu(memory=0), "a GPU was requested, and a worker has none"),
        (FakeGpu(has_cuda=False), "xgboost on a worker was built without CUDA"),
        (FakeGpu(placement="cpu"), "a worker cannot use its GPU"),
    ],
)
def test_gpu_that_cannot_be_used_is_refused_before_the_first_partition(
    gpu: FakeGpu, message: str, make_spec: Callable[..., JobSpec], lake: Lake, tmp_path: Path
) -> None:
    with gpu_cluster(gpu, folder=tmp_path / "scratch") as client:
        settings = settings_of(client, tmp_path)
        with pytest.raises(NoDevice, match=message):
            run(make_spec(device="cuda"), settings=settings)
        assert list(find_job(settings.directory, "@last").receipts.all()) == []
        report = run(make_spec(device="auto"), settings=settings)
    assert report.device.startswith("cpu: no worker can use a GPU (")


class LoseAtStart(Callback):
    """Lose the next GPUs once the first round starts: the proof of the handshake is over by then."""

    def __init__(self, tokens: Path, count: int) -> None:
        self.tokens = tokens
        self.count = count

    def on_round(self, event: RoundStarted) -> None:
        for number in range(self.count):
            (self.tokens / str(number)).touch()


class LoseAfterPartition(Callback):
    """Lose the GPU once a partition is done."""

    def __init__(self, tokens: Path) -> None:
        self.tokens = tokens

    def on_partition(self, event: PartitionEnded) -> None:
        if event.outcome == "done":
            (self.tokens / "0").touch()
