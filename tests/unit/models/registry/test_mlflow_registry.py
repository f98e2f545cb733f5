"""MLflow's metadata of model files, read without MLflow."""

from __future__ import annotations

import sys

import pytest

from pipeline.errors import ModelError, RefusedForSafety, SpecError
from pipeline.models.registry import is_mlflow, open_registry
from pipeline.models.registry.mlflow_registry import _ON_DISK, _data_file


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


def test_the_file_of_a_model_is_named_in_its_description() -> None:
    described = (
        b"flavors:\n  python_function: {data: x}\n  xgboost: {data: model.ubj, model_class: xgboost.core.Booster}\n"
    )
    assert _data_file(described, where="") == "model.ubj"


@pytest.mark.parametrize(
    ("described", "found"),
    [
        (b"flavors:\n  sklearn: {pickled_model: model.pkl}\n", "the flavors sklearn"),
        (b"flavors:\n", "TypeError"),
        (b"{", "Error"),
        (b"- 1", "TypeError"),
        (b"flavors: {xgboost: 3}\n", "the flavors xgboost"),
    ],
)
def test_other_models_are_refused(described: bytes, found: str) -> None:
    with pytest.raises(ModelError) as caught:
        _data_file(described, where="models:/churn/1")
    assert found in caught.value.found
    assert "mlflow.xgboost.log_model" in caught.value.expected


def test_the_file_cannot_lie_elsewhere() -> None:
    with pytest.raises(RefusedForSafety):
        _data_file(b"flavors:\n  xgboost: {data: ../../etc/passwd}\n", where="")


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
