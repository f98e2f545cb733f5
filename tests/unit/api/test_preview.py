"""`Job.preview`: the first rows through the whole chain, in this process."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import pipeline
from pipeline.api import preview
from pipeline.errors import SpecError, StepFailed
from pipeline.testing.oracle import Lake, oracle


def job_of(lake: Lake, model: Path, tmp_path: Path, *steps: Any, **fields: Any) -> pipeline.Job:
    return pipeline.Job(
        "j",
        source={"path": str(lake.path), **fields},
        steps=[*steps, pipeline.Score(model=str(model), keep=["id"])],
        sink={"path": str(tmp_path / "out")},
        cluster="tcp://127.0.0.1:9",  # nothing connects
        directory=tmp_path / "jobs",
    )


def test_first_rows_equal_the_oracle(lake: Lake, model_path: Path, tmp_path: Path) -> None:
    modules = set(sys.modules)
    frame = job_of(lake, model_path, tmp_path).preview(7)
    expected = oracle(lake.files, model_path)[["id", "prediction"]].head(7)
    pd.testing.assert_frame_equal(frame.reset_index(drop=True), expected.reset_index(drop=True), check_exact=True)
    assert frame.attrs["rows"]["in"] == 7
    assert not (tmp_path / "jobs").exists()
    assert not {name for name in set(sys.modules) - modules if name.startswith("steps_for_tests")}


def test_more_rows_than_there_are(lake: Lake, model_path: Path, tmp_path: Path) -> None:
    frame = job_of(lake, model_path, tmp_path).preview(10**6)
    assert len(frame) == len(oracle(lake.files, model_path))


def test_rejected_rows_are_named(
    lake: Lake, model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def picky(frame: pd.DataFrame) -> pd.DataFrame:
        if (frame["id"] == 3).any():
            raise ValueError("three")
        return frame

    with caplog.at_level(logging.WARNING):
        frame = job_of(lake, model_path, tmp_path, picky).preview(10)
    assert len(frame) == 9
    assert "1 row of the first 10 would be rejected: 1 × step:picky:ValueError" in caplog.text


def test_errors_are_those_of_a_job(lake: Lake, model_path: Path, tmp_path: Path) -> None:
    def broken(frame: pd.DataFrame) -> pd.DataFrame:
        return frame["no such column"]  # this line

    with pytest.raises(StepFailed, match="fails on every row") as caught:
        job_of(lake, model_path, tmp_path, broken).preview()
    assert "# this line" in caught.value.found
    with pytest.raises(SpecError, match="needs a row"):
        job_of(lake, model_path, tmp_path).preview(0)


def test_libraries_of_models_are_imported_ahead(
    lake: Lake, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported: list[str] = []
    monkeypatch.setattr(preview, "_import_all", imported.extend)
    monkeypatch.setattr(preview, "sys", SimpleNamespace(modules={}))
    thread_of: list[Any] = []
    monkeypatch.setattr(preview, "Thread", lambda **options: thread_of.append(options) or threading.Thread(**options))
    preview._import_ahead(job_of(lake, model_path, tmp_path).spec)
    preview._import_ahead(job_of(lake, tmp_path / "model.of.unknown.kind", tmp_path).spec)
    (options,) = thread_of
    options["target"](*options["args"])
    assert set(imported) == {"xgboost"}
