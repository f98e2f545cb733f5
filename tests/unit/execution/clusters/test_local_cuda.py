"""Workers for the GPUs of this machine: which, with how many threads, and with which arguments. Nothing is started."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.devices.inventory import EXTRA, NOT_INSTALLED
from pipeline.errors import InfrastructureError, NoDevice, SpecError
from pipeline.execution.clusters import find_cluster, local, local_cuda
from pipeline.execution.clusters.devices import options_on
from pipeline.execution.clusters.local_cuda import LocalGpus
from pipeline.models.device_options import DeviceOptions
from pipeline.plan.plan import Limits
from pipeline.settings import Settings
from pipeline.testing import fake_dask_cuda
from pipeline.testing.fake_nvml import NO_LIBRARY, Card, FakeNvml, nvml

GIB = 1 << 30
UUIDS = ["GPU-a", "GPU-b"]


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """16 cores, 100 GiB and two GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local_cuda, "core_count", lambda: 16)
    monkeypatch.setattr(local, "memory_limit", lambda: 100 * GIB)
    with nvml(FakeNvml([Card(uuid) for uuid in UUIDS])), fake_dask_cuda.installed(Recorded):
        yield


class Recorded:
    """dask-cuda's cluster, not started."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        dask_cudas = {"preload": ["x"], "preload_argv": ["y"], "plugins": {"z"}, "env": {"A": "B"}}
        self.new_spec = {"options": {"security": "s", "data": dict, **dask_cudas}}


def gpus(**fields: Any) -> LocalGpus:
    return LocalGpus(fields.pop("settings", Settings()), **fields)


class TestDevices:
    def test_default_is_all_that_this_process_sees(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert [gpu.uuid for gpu in gpus().gpus] == UUIDS
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert [gpu.uuid for gpu in gpus().gpus] == ["GPU-b"]

    @pytest.mark.parametrize("devices", [[1, 0], ["GPU-b", "GPU-a"], ["1", "GPU-a"]])
    def test_are_named_by_number_or_uuid(self, devices: list[int | str]) -> None:
        assert [gpu.uuid for gpu in gpus(devices=devices).gpus] == ["GPU-b", "GPU-a"]
        assert [gpu.uuid for gpu in gpus(devices=1).gpus] == ["GPU-b"]

    def test_setting_workers_takes_the_first(self) -> None:
        assert gpus(settings=Settings(workers=1)).limits().workers == 1

    def test_machine_without_gpus_is_refused_at_plan(self) -> None:
        with nvml(FakeNvml(error=NO_LIBRARY)), pytest.raises(NoDevice, match="this machine shows none") as error:
            gpus().limits()
        assert error.value.exit_code == 2
        assert error.value.where == "type: local-cuda"
        assert error.value.found == "NVML Shared Library Not Found"
        assert error.value.next_step == "run it where there is one, or choose another cluster"

    def test_missing_packages_are_named(self) -> None:
        with nvml(None), pytest.raises(NoDevice) as error:
            gpus().limits()
        assert error.value.found == NOT_INSTALLED
        with fake_dask_cuda.installed(None), pytest.raises(NoDevice, match="dask-cuda is not installed") as error:
            options_on(gpus(), DeviceOptions("cuda"))
        assert error.value.next_step == EXTRA

    def test_unknown_gpu_is_refused_with_those_there_are(self) -> None:
        with pytest.raises(NoDevice, match="unknown GPU") as error:
            gpus(devices=[2]).limits()
        assert (error.value.found, error.value.expected) == ("2", "0, 1 (NVIDIA H200, NVIDIA H200)")

    @pytest.mark.parametrize(
        ("fields", "where", "found"),
        [
            ({"devices": "all"}, "devices", "all"),
            ({"devices": [0, "GPU-a"]}, "devices", "one of 2 GPUs twice"),
            ({"settings": Settings(workers=3)}, "devices", "3 workers"),
            ({"threads": 0}, "threads", "0"),
            ({"threads": "two"}, "threads", "two"),
            ({"cpu_workers": -1}, "cpu_workers", "-1"),
            ({"cpu_workers": True}, "cpu_workers", "True"),
        ],
    )
    def test_invalid_fields_are_refused(self, fields: dict[str, Any], where: str, found: str) -> None:
        with pytest.raises(SpecError, match="invalid value in a cluster file") as error:
            gpus(**fields).limits()
        assert error.value.where == f"type: local-cuda, {where}"
        assert error.value.found == found
        assert error.value.expected

    def test_invalid_share_of_device_memory_is_refused(self) -> None:
        with pytest.raises(SpecError, match="invalid device memory"):
            gpus(device_memory=1.5)


class TestLimits:
    @pytest.mark.parametrize(
        ("cores", "fields", "threads", "cpu_workers"),
        [
            (16, {}, 8, 0),
            (3, {}, 2, 0),
            (128, {}, 16, 0),
            (16, {"cpu_workers": 4}, 6, 4),
            (128, {"cpu_workers": "auto"}, 16, 96),
            (16, {"cpu_workers": "auto"}, 8, 0),
            (16, {"threads": 4, "cpu_workers": "auto"}, 4, 8),
            (16, {"threads": 4, "settings": Settings(threads=3)}, 3, 0),
        ],
    )
    def test_threads_share_the_cores(
        self, cores: int, fields: dict[str, Any], threads: int, cpu_workers: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local_cuda, "core_count", lambda: cores)
        limits = gpus(**fields).limits()
        assert (limits.threads, limits.workers) == (threads, 2 + cpu_workers)

    def test_memory_is_shared_by_threads(self) -> None:
        assert gpus().limits() == Limits(2, 8, 45 * GIB)
        # 2 × 6 threads on GPUs and four on CPUs.
        assert gpus(cpu_workers=4).limits() == Limits(6, 6, int(90 * GIB * 6 / 16))
        assert gpus(memory_limit="8 GiB").limits().memory == 8 * GIB


class TestArguments:
    def test_each_is_given_for_its_reason(self) -> None:
        cluster = gpus(threads=4)
        arguments = cluster._make(None, cluster.limits()).arguments
        assert arguments["CUDA_VISIBLE_DEVICES"] == UUIDS
        assert (arguments["threads_per_worker"], arguments["resources"]) == (4, {"GPU": 4})
        assert arguments["memory_limit"] == 45 * GIB
        assert arguments["preload"] == ["pipeline.execution.clusters.worker_setup"]
        assert arguments["device_memory_limit"] is None
        assert arguments["data"] is dict
        assert not [name for name in arguments if name.startswith("rmm")]
        assert arguments["host"] == "127.0.0.1"
        assert arguments["worker_dashboard_address"] is None
        assert arguments["scheduler_kwargs"] == {"dashboard": False}

    def test_workers_on_cpus_see_no_gpu(self) -> None:
        cluster = gpus()
        added = local_cuda._cpu_workers(cluster._make(None, cluster.limits()), 2, memory=GIB)
        assert list(added) == ["cpu-0", "cpu-1"]
        options = added["cpu-0"]["options"]
        assert options["env"] == {"CUDA_VISIBLE_DEVICES": ""}
        assert options["preload"] == ["pipeline.execution.clusters.worker_setup"]
        assert (options["nthreads"], options["memory_limit"], options["resources"]) == (1, GIB, {"CPU": 1})
        assert (options["security"], options["data"]) == ("s", dict)
        assert not {"preload_argv", "plugins"} & options.keys()

    def test_error_of_dask_cuda_is_one_of_the_cluster(self) -> None:
        def fail(**arguments: Any) -> None:
            raise RuntimeError("no context\nmore")

        cluster = gpus()
        with fake_dask_cuda.installed(fail), pytest.raises(InfrastructureError, match="could not be started") as error:
            cluster._make(None, cluster.limits())
        assert error.value.found == "RuntimeError: no context"


def test_example_is_valid() -> None:
    cluster = find_cluster("local-cuda", settings=Settings())
    assert isinstance(cluster, LocalGpus)
    assert cluster.limits().workers == 2
    assert [str(group) for group in cluster.expected_gpus()] == ["2 × NVIDIA H200, 141 GiB"]
