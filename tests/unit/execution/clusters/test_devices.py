"""Jobs that request GPUs which the machine or the workers do not have: refused, or scored on CPUs with the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.devices.inventory import EXTRA, Gpu
from pipeline.devices.memory import device_row_bytes
from pipeline.devices.report import DeviceProblem, DeviceReport
from pipeline.errors import ModelError, NoDevice, PipelineError
from pipeline.execution.clusters.devices import ExpectedGpus, options_on, options_with, with_expected
from pipeline.execution.clusters.local import LocalProcesses
from pipeline.models.device_options import DeviceOptions
from pipeline.settings import Settings
from pipeline.testing.fake_nvml import NO_LIBRARY, FakeNvml, nvml
from pipeline.testing.jobs import small_job

AUTO, CUDA, CPU = DeviceOptions("auto"), DeviceOptions("cuda"), DeviceOptions("cpu", ("cpu was requested",))
GPU = DeviceReport(Gpu("GPU-1", "NVIDIA H200", 141 << 30, 0), "580")
NONE = DeviceReport(problem=DeviceProblem.NO_GPU, found="NVML Shared Library Not Found")
LOCAL = LocalProcesses(Settings(workers=1, threads=1))


class TestCluster:
    def test_local_workers_are_for_cpus_unless_gpus_are_requested(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with nvml(FakeNvml()) as fake:
            options = options_on(LOCAL, AUTO)
            assert fake is not None
            assert fake.calls == []
            assert options_on(LOCAL, CUDA) == CUDA
            assert fake.calls == ["nvmlInit"]
        assert options.reasons == ("workers of the cluster type local use GPUs only with device: cuda",)
        assert options.device == "cpu"

    def test_machine_without_a_gpu_is_refused_before_anything_starts(self) -> None:
        with nvml(FakeNvml(error=NO_LIBRARY)), pytest.raises(NoDevice, match="this machine shows none") as error:
            options_on(LOCAL, CUDA)
        assert error.value.found == "NVML Shared Library Not Found"

    def test_adapter_without_the_members_leaves_it_to_its_workers(self) -> None:
        assert options_on(object(), AUTO) == AUTO
        assert options_on(object(), CUDA) == CUDA


class TestExpected:
    def test_cards_of_a_kind_and_the_rows_that_fit(self, tmp_path: Path) -> None:
        plan = replace(small_job(tmp_path / "lake", sink=str(tmp_path / "out")).plan, device_batch_rows=1 << 18)
        memory = 1 << 20
        cluster = SimpleNamespace(
            device_memory=0.5,
            expected_gpus=lambda: [ExpectedGpus(2, "NVIDIA H200", 141 << 30), ExpectedGpus(1, "small", memory)],
        )
        text = with_expected(CUDA, cluster, plan, threads=4).expected
        assert text.startswith("2 × NVIDIA H200, 141 GiB; 1 × small, 1.0 MiB, batches of ")
        row = device_row_bytes(features=len(plan.features), outputs=1)
        rows = int(text.split()[-2].replace(",", ""))
        assert rows == 1 << (memory // 2 // 4 // row).bit_length() - 1

    def test_cards_that_are_known_only_on_the_nodes(self, tmp_path: Path) -> None:
        plan = small_job(tmp_path / "lake", sink=str(tmp_path / "out")).plan
        cluster = SimpleNamespace(device_memory=0.8, expected_gpus=lambda: [ExpectedGpus(8)])
        rows = f"{plan.batch_rows:,}"
        assert with_expected(AUTO, cluster, plan, threads=4).expected == f"8 × GPU, batches of {rows} rows"

    def test_nothing_is_expected_of_other_clusters(self, tmp_path: Path) -> None:
        plan = small_job(tmp_path / "lake", sink=str(tmp_path / "out")).plan
        none = SimpleNamespace(device_memory=0.8, expected_gpus=list)
        for cluster, options in ((LOCAL, CUDA), (none, CUDA), (none, CPU)):
            assert with_expected(options, cluster, plan, threads=1) == options


class TestReports:
    def test_auto_needs_one_usable_gpu(self) -> None:
        assert options_with({"a": NONE, "b": GPU}, AUTO) == AUTO
        without = options_with({"a": NONE, "b": NONE}, AUTO)
        assert without.reasons == ("no worker can use a GPU (NVML Shared Library Not Found)",)
        assert options_with({}, AUTO).reasons == ("no worker can use a GPU",)

    def test_cpu_takes_no_report(self) -> None:
        assert options_with({"a": None}, CPU) == CPU

    def test_cuda_takes_workers_with_gpus(self) -> None:
        assert options_with({"a": GPU, "b": GPU, "c": None}, CUDA) == CUDA

    @pytest.mark.parametrize(
        ("problem", "kind", "message", "next_step"),
        [
            (DeviceProblem.NO_GPU, NoDevice, "a GPU was requested, and a worker has none", "or say device: auto"),
            (DeviceProblem.BUILD, NoDevice, "xgboost on a worker was built without CUDA", f"{EXTRA} there, after"),
            (DeviceProblem.PROOF, NoDevice, "a worker cannot use its GPU", "nvidia-smi on that host"),
            (
                DeviceProblem.BITS,
                ModelError,
                "the GPU gives other results than the CPU for this model",
                "set score.tolerance",
            ),
        ],
    )
    def test_each_problem_is_an_error_with_worker_and_next_step(
        self, problem: DeviceProblem, kind: type[PipelineError], message: str, next_step: str
    ) -> None:
        with pytest.raises(kind, match=message) as error:
            options_with({"tcp://1": GPU, "tcp://2": GPU.with_problem(problem, "what was found")}, CUDA)
        assert error.value.where == "worker tcp://2"
        assert error.value.found == "what was found"
        assert next_step in error.value.next_step
        assert options_with({"tcp://2": GPU.with_problem(problem, "x")}, AUTO).device == "cpu"
