"""Versions of the handshake: of a module, whichever distribution it comes from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import xgboost

from pipeline.devices.report import DeviceProblem
from pipeline.execution.clusters.client import module_version, versions, warm_up
from pipeline.models.flavors import xgboost as flavor
from pipeline.testing.fake_nvml import FakeNvml, nvml


class TestVersions:
    def test_distributions_of_one_module_are_no_difference(self) -> None:
        """A driver with xgboost-cpu and workers with xgboost are alike if the module has one version."""
        found = versions()
        assert found["xgboost"] == xgboost.__version__
        assert not {"xgboost-cpu", "xgboost-cu12"} & found.keys()

    def test_module_is_not_imported_for_its_version(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "a_library_of_a_test"
        folder.mkdir()
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        (folder / "VERSION").write_text("9.8.7\n")
        monkeypatch.syspath_prepend(tmp_path)
        assert module_version("a_library_of_a_test") == "9.8.7"
        assert "a_library_of_a_test" not in sys.modules

    def test_version_file_of_xgboost_is_its_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "xgboost")
        assert module_version("xgboost") == xgboost.__version__

    @pytest.mark.parametrize("name", ["nothing_of_that_name", "json"])
    def test_module_without_a_version_has_none(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, name, raising=False)
        assert module_version(name) == ""


class TestWarmUp:
    def test_gpu_is_looked_for_only_if_one_is_requested(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with nvml(FakeNvml()) as fake:
            assert warm_up("xgboost").device is None
            assert fake is not None
            assert fake.calls == []
            assert warm_up("xgboost", "auto").device is not None
            assert fake.calls == ["nvmlInit"]

    def test_library_without_cuda_is_a_problem(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with nvml(FakeNvml()):
            monkeypatch.setattr(xgboost, "build_info", lambda: {"USE_CUDA": False})
            report = flavor.device_report()
        assert report.problem is DeviceProblem.BUILD
        assert report.found == f"xgboost {xgboost.__version__}, built without CUDA"
