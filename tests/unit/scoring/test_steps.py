"""Import and call of map steps, and their errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.errors import StepFailed
from pipeline.plan.recipe import MapRecipe
from pipeline.scoring.steps import check_step, load_steps


def test_functions_are_found_by_name(in_folder: Path) -> None:
    (in_folder / "my_features.py").write_text(
        "class Builder:\n    @staticmethod\n    def build(frame):\n        return frame\n"
        "def plain(frame): return frame\nNUMBER = 3\n"
    )
    check_step("my_features:Builder.build")
    with pytest.raises(StepFailed, match="has no function 'plane'") as caught:
        check_step("my_features:plane")
    assert caught.value.next_step == "did you mean my_features:plain?"
    with pytest.raises(StepFailed, match="not a function"):
        check_step("my_features:NUMBER")
    with pytest.raises(StepFailed, match="cannot be imported") as caught:
        check_step("my_featurez:plain")
    assert "ModuleNotFoundError" in caught.value.found


def test_import_paths_are_searched_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "far_features.py").write_text("def build(frame): return frame")
    (step,) = load_steps([MapRecipe("far_features:build", "pyarrow")], import_paths=(str(tmp_path),))
    assert step.dtype_backend == "pyarrow"
    assert sys.path[0] == str(tmp_path)


def test_failed_import_of_a_module_is_explained(in_folder: Path) -> None:
    (in_folder / "sad_features.py").write_text("raise RuntimeError('no licence')")
    with pytest.raises(StepFailed, match="cannot be imported") as caught:
        check_step("sad_features:build")
    assert caught.value.found == "RuntimeError: no licence"
