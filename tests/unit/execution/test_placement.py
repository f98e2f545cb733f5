"""Which workers may take the partitions of a job, and of which class each is."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.devices.inventory import Gpu
from pipeline.devices.report import DeviceProblem, DeviceReport
from pipeline.execution.placement import CPU, Placement, place, workers_asked
from pipeline.spec.model_ref import Device

H200, A100 = Gpu("GPU-1", "NVIDIA H200", 141 << 30, 0), Gpu("GPU-2", "NVIDIA A100", 80 << 30, 1)
WITH: dict[str, Any] = {"nthreads": 4, "resources": {"GPU": 4}}
WITHOUT: dict[str, Any] = {"nthreads": 1, "resources": {}}
BROKEN = DeviceReport(H200, problem=DeviceProblem.PROOF, found="x")


class TestWorkersAsked:
    @pytest.mark.parametrize(("device", "asked"), [("cpu", ()), ("auto", ("gpu", "cpu")), ("cuda", ("gpu",))])
    def test_are_those_that_may_use_a_gpu(self, device: Device, asked: tuple[str, ...]) -> None:
        assert workers_asked({"gpu": WITH, "cpu": WITHOUT}, device) == asked

    def test_are_all_of_a_scheduler_without_resources(self) -> None:
        assert workers_asked({"a": WITHOUT, "b": {}}, "cuda") == ("a", "b")


class TestPlace:
    def test_cuda_asks_for_the_resource_where_a_worker_offers_it(self) -> None:
        placement = place("cuda", workers=[WITH, WITHOUT], reports={"gpu": DeviceReport(H200), "cpu": None})
        assert placement == Placement({"GPU": 1}, {"gpu": H200})
        assert placement.needs_gpu
        assert placement.may_take(WITH)
        assert not placement.may_take(WITHOUT)
        assert not placement.may_take({"resources": None})

    def test_cuda_asks_for_nothing_where_none_is_offered(self) -> None:
        """Then the handshake has made sure that every worker has one."""
        placement = place("cuda", workers=[WITHOUT], reports={"gpu": DeviceReport(H200)})
        assert placement == Placement(gpus={"gpu": H200})
        assert placement.may_take(WITHOUT)

    def test_auto_takes_all_workers(self) -> None:
        reports = {"gpu": DeviceReport(H200), "cpu": DeviceReport(), "broken": BROKEN, "silent": None}
        placement = place("auto", workers=[WITH, WITHOUT], reports=reports)
        assert placement == Placement(gpus={"gpu": H200})
        assert placement.may_take(WITHOUT)

    def test_cpu_looks_at_nothing(self) -> None:
        assert place("cpu", workers=[WITH], reports={"gpu": DeviceReport(H200)}) == Placement()


class TestClass:
    def test_is_the_name_of_the_gpu(self) -> None:
        placement = Placement(gpus={"a": H200, "b": A100})
        assert placement.class_of("a", WITH) == "NVIDIA H200"
        assert placement.class_of("b", WITHOUT) == "NVIDIA A100"
        assert placement.class_of("c", WITHOUT) == CPU

    def test_of_a_worker_that_came_later_is_guessed_from_its_resource(self) -> None:
        assert Placement(gpus={"a": H200}).class_of("new", WITH) == "NVIDIA H200"
        assert Placement(gpus={"a": H200, "b": A100}).class_of("new", WITH) == "GPU"

    def test_smallest_gpu_is_that_with_the_least_memory(self) -> None:
        assert Placement(gpus={"a": H200, "b": A100}).smallest_gpu == A100
        assert Placement().smallest_gpu is None
