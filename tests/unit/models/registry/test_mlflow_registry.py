"""MLflow's metadata of model files, read without MLflow."""

from __future__ import annotations

import sys

import pytest

from pipeline.errors import SpecError
from pipeline.models.registry import is_mlflow, open_registry
from pipeline.models.registry.mlflow_registry import _ON_DISK


@pytest.mark.parametrize(
    ("folder", "path"),
    [
        ("/a/b", "/a/b"),
        ("./mlruns/0", "./mlruns/0"),
        ("file:///a/b", "/a/b"),
        ("file:/a/b", "/a/b"),
        ("mlflow-artifacts:/1/models/m", None),
        ("mlflow-artifacts://host/1", None),
        ("s3://bucket/a", None),
        ("runs:/1/model", None),
        ("dbfs:/a", None),
    ],
)
def test_artifact_on_a_file_system_is_read_there(folder: str, path: str | None) -> None:
    match = _ON_DISK.fullmatch(folder)
    assert (match["path"] if match else None) == path


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("mlflow", True),
        ("mlflow+http://h:5000", True),
        ("sqlite:///m.db", True),
        ("postgresql+psycopg2://h/d", True),
        ("databricks", True),
        (".pipeline/models", False),
        ("mlflow-models/", False),
        ("databricks-models", False),
        ("s3://bucket/models", False),
    ],
)
def test_setting_selects_the_registry(root: str, expected: bool) -> None:
    assert is_mlflow(root) == expected


def test_without_mlflow_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SpecError, match="not installed") as caught:
        open_registry("sqlite:///m.db").names()
    assert "[mlflow]" in caught.value.next_step
