"""``device`` in a job on real Dask processes without a GPU: refused, or scored on CPUs with the reason."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from pipeline.devices.inventory import NOT_INSTALLED
from pipeline.errors import ModelError, NoDevice
from pipeline.execution.clusters.client import shake_hands
from pipeline.jobs.listing import find_job
from pipeline.runner import run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.fake_nvml import NO_LIBRARY, FakeNvml, nvml

GPU_PACKAGES = ("pynvml", "cupy", "rmm", "cudf", "pylibcudf", "numba", "dask_cuda", "nvforest")


def device_events(settings: Settings) -> list[dict[str, Any]]:
    return [event for event in find_job(settings.directory, "@last").events.read() if event["event"] == "device"]


@contextmanager
def installed_gpu_packages(client: Client, folder: Path) -> Iterator[None]:
    """Let workers find packages for GPUs, and assert that they import none."""
    for name in GPU_PACKAGES:
        (folder / f"{name}.py").write_text("")
    client.run(_prepend_path, str(folder))
    try:
        yield
        assert set(client.run(_imported).values()) == {()}
    finally:
        client.run(_remove_path, str(folder))


def _prepend_path(folder: str) -> None:
    sys.path.insert(0, folder)


def _remove_path(folder: str) -> None:
    sys.path.remove(folder)


def _imported() -> tuple[str, ...]:
    return tuple(name for name in GPU_PACKAGES if name in sys.modules)


def test_default_on_a_cluster_without_gpus_says_nothing(make_spec: Callable[..., JobSpec], settings: Settings) -> None:
    report = run(make_spec(), settings=settings)
    assert device_events(settings) == []
    assert "device" not in report.to_dict()
    assert "  device" not in report.text()


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_given_device_is_in_the_report(device: str, make_spec: Callable[..., JobSpec], settings: Settings) -> None:
    report = run(make_spec(device=device), settings=settings)
    reason = "cpu was requested" if device == "cpu" else f"no worker can use a GPU ({NOT_INSTALLED})"
    assert report.device == f"cpu: {reason}"
    assert f"  device     cpu: {reason}" in report.text()
    (event,) = device_events(settings)
    assert (event["requested"], event["reasons"]) == (device, [reason])


def test_worker_that_scores_on_the_cpu_imports_no_package_for_gpus(
    make_spec: Callable[..., JobSpec], settings: Settings, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "packages").mkdir()
    with installed_gpu_packages(client, tmp_path / "packages"):
        assert run(make_spec(device="cpu"), settings=settings).ok


def test_cuda_on_workers_without_gpus_is_refused_before_the_first_partition(
    make_spec: Callable[..., JobSpec], settings: Settings
) -> None:
    with pytest.raises(NoDevice, match="a GPU was requested, and a worker has none") as error:
        run(make_spec(), settings=replace(settings, device="cuda"))
    assert error.value.exit_code == 2
    assert error.value.found == NOT_INSTALLED
    job = find_job(settings.directory, "@last")
    assert list(job.receipts.all()) == []
    assert "a worker has none" in json.dumps(job.events.read()[-1])


def test_cuda_on_this_machine_without_a_gpu_is_refused_before_a_job_exists(
    make_spec: Callable[..., JobSpec], tmp_path: Path
) -> None:
    settings = Settings.load(directory=str(tmp_path / "none"), device="cuda")
    with nvml(FakeNvml(error=NO_LIBRARY)), pytest.raises(NoDevice, match="this machine shows none"):
        run(make_spec(), settings=settings)
    assert not (tmp_path / "none").exists()


def test_cuda_for_an_output_that_gpus_cannot_compute_is_refused(
    make_spec: Callable[..., JobSpec], settings: Settings, tmp_path: Path
) -> None:
    spec = make_spec(device="cuda", score={"output": {"column": "p", "kind": "contributions"}})
    with pytest.raises(ModelError, match="the output contributions"):
        run(spec, settings=replace(settings, directory=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_device_is_no_part_of_the_work(make_spec: Callable[..., JobSpec]) -> None:
    """A job can be resumed on another device: the digest of its spec is the same."""
    assert len({make_spec(device=device).digest for device in (None, "auto", "cpu", "cuda")}) == 1


def test_handshake_reports_the_device_of_each_worker(client: Client) -> None:
    reports = shake_hands(client, flavor="xgboost", timeout=60, device="auto")
    assert [report and report.found for report in reports.values()] == [NOT_INSTALLED] * 2
    assert set(shake_hands(client, flavor="xgboost", timeout=60).values()) == {None}
