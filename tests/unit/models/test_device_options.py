"""Whether a GPU may evaluate a model, and why not, by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.errors import ModelError
from pipeline.models.device_options import DeviceOptions, check_device, device_options
from pipeline.models.flavors import xgboost as flavor
from pipeline.models.model import Feature, ModelVersion

VERSION = ModelVersion(
    name="m",
    version="1",
    uri="m.ubj",
    digest="d" * 64,
    flavor="xgboost",
    nbytes=1,
    features=(Feature("a"),),
    task="binary",
    outputs=1,
    objective="binary:logistic",
    trees=3,
)


@pytest.mark.parametrize(
    ("version", "more", "reason"),
    [
        (VERSION, {}, None),
        (VERSION, {"kind": "label"}, None),
        (VERSION, {"kind": "margin"}, None),
        (VERSION, {"engine": "xgboost"}, None),
        (VERSION, {"kind": "leaf"}, "the output leaf"),
        (VERSION, {"kind": "contributions"}, "the output contributions"),
        (VERSION, {"engine": "trees"}, "score.engine: trees, which run on CPUs"),
        (VERSION, {"has_limits": True}, "steps with a timeout, which run in processes of their own"),
        (replace(VERSION, device_blockers=("the booster dart",)), {}, "the booster dart"),
        (replace(VERSION, objective="reg:new"), {}, "the objective reg:new"),
    ],
)
class TestReasons:
    def options(self, device: Any, version: ModelVersion, more: dict[str, Any]) -> DeviceOptions:
        return device_options(device, version, **{"kind": "prediction", "engine": "auto", **more})

    def test_auto_names_what_keeps_the_gpu_off(
        self, version: ModelVersion, more: dict[str, Any], reason: str | None
    ) -> None:
        options = self.options("auto", version, more)
        assert options.reasons == ((reason,) if reason else ())
        assert options.device == ("cpu" if reason else "auto")

    def test_cuda_is_refused(self, version: ModelVersion, more: dict[str, Any], reason: str | None) -> None:
        options: dict[str, Any] = {"kind": "prediction", "engine": "auto", **more}
        if reason is None:
            check_device("cuda", version, **options)
            return
        check_device("auto", version, **options)
        with pytest.raises(ModelError, match="the GPU cannot score this job with the bits of the CPU") as error:
            check_device("cuda", version, **options)
        assert error.value.found == reason
        assert error.value.next_step == "say device: auto or cpu"
        assert error.value.exit_code == 5

    def test_cpu_needs_no_reason(self, version: ModelVersion, more: dict[str, Any], reason: str | None) -> None:
        options = self.options("cpu", version, more)
        assert (options.device, options.reasons) == ("cpu", ("cpu was requested",))


def test_flavor_without_a_device_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    without = replace(flavor.FLAVOR, name="other", device_blockers=None)
    monkeypatch.setattr("pipeline.models.device_options.find_flavor", lambda name: without)
    options = device_options("auto", replace(VERSION, flavor="other"), kind="prediction", engine="auto")
    assert options.reasons == ("the flavor other",)


class TestText:
    def test_what_was_given_is_shown(self) -> None:
        assert DeviceOptions("cuda").text() == "cuda"
        assert DeviceOptions("auto").text() == "the GPU of a worker that has one, else the CPU"
        assert DeviceOptions("auto", ("a", "b")).text() == "cpu: a; b"

    def test_gpus_of_the_cluster_are_shown(self) -> None:
        options = DeviceOptions("cuda", expected="2 × NVIDIA H200, 141 GiB, batches of 262,144 rows")
        assert options.text() == "cuda expected: 2 × NVIDIA H200, 141 GiB, batches of 262,144 rows"
        assert options.without_gpu("a").text() == options.text()
        assert replace(options, requested="auto").without_gpu("a").text() == "cpu: a"

    def test_default_is_shown_only_where_a_gpu_may_be_used(self) -> None:
        assert DeviceOptions("auto", ("a",), is_given=False).text() == ""
        assert DeviceOptions("auto", is_given=False).text() == "the GPU of a worker that has one, else the CPU"

    def test_no_reason_of_a_cluster_changes_a_request(self) -> None:
        assert DeviceOptions("cuda").without_gpu("a") == DeviceOptions("cuda")
        assert DeviceOptions("auto").without_gpu("", "a").reasons == ("a",)
