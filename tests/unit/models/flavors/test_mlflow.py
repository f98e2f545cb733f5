"""MLflow's folders: native files, `python_function`, signatures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import pipeline
from pipeline.errors import ModelDigestMismatch, ModelError, RefusedForSafety, SchemaDrift
from pipeline.models import folders
from pipeline.models.cache import forget_models, get_predictor
from pipeline.models.flavors.mlflow_file import parse_mlmodel
from pipeline.models.folder_models import folder_at, resolve_folder
from pipeline.models.registry import resolve
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.flavor_cases import FlavorCase, mlflow_pyfunc, sklearn_forest
from pipeline.testing.inline import plan_inline, score_inline


class TestMlmodel:
    def test_native_file_is_named(self) -> None:
        text = b"flavors:\n  python_function: {data: x}\n  xgboost: {data: model.ubj}\n"
        assert parse_mlmodel(text, where="").native == ("xgboost", "model.ubj")

    @pytest.mark.parametrize("text", [b"flavors:\n", b"{", b"- 1"])
    def test_damaged(self, text: bytes) -> None:
        with pytest.raises(ModelError, match="damaged"):
            parse_mlmodel(text, where="m")

    def test_file_cannot_lie_elsewhere(self) -> None:
        with pytest.raises(RefusedForSafety):
            parse_mlmodel(b"flavors:\n  xgboost: {data: ../../etc/passwd}\n", where="")

    def test_columns_of_the_signature(self) -> None:
        inputs = json.dumps([{"name": "a", "type": "double"}, {"name": "b", "type": "string"}])
        text = yaml.safe_dump({"flavors": {"python_function": {}}, "signature": {"inputs": inputs}})
        found = parse_mlmodel(text.encode(), where="")
        assert [(feature.name, feature.kind) for feature in found.features] == [("a", "number"), ("b", "text")]


def folder_of(path: Path, flavor: str, fields: dict[str, str], columns: tuple[str, ...] = ()) -> Path:
    """Write an MLmodel file beside the files in ``path``."""
    described: dict[str, Any] = {"flavors": {flavor: fields, "python_function": {"loader_module": "x"}}}
    if columns:
        described["signature"] = {"inputs": json.dumps([{"name": name, "type": "double"} for name in columns])}
    (path / "MLmodel").write_text(yaml.safe_dump(described))
    return path


def forest(folder: Path) -> FlavorCase:
    pytest.importorskip("skops", reason="scikit-learn is not installed")
    return sklearn_forest(folder)


class TestNative:
    def test_skops_inside_is_scored_by_its_flavor(self, tmp_path: Path) -> None:
        case = forest(tmp_path)
        folder_of(tmp_path, "sklearn", {"pickled_model": "model.skops"})
        version = resolve(ModelRef(str(tmp_path)))
        assert (version.flavor, version.uri, version.runs_code) == ("sklearn", str(tmp_path / "model.skops"), None)
        assert version.digest == resolve(ModelRef(str(case.path))).digest

    def test_pickle_inside_needs_allow_code(self, tmp_path: Path) -> None:
        joblib = pytest.importorskip("joblib", reason="scikit-learn is not installed")
        linear = pytest.importorskip("sklearn.linear_model")
        model = linear.LinearRegression().fit(np.eye(3), [1.0, 2.0, 3.0])
        joblib.dump(model, tmp_path / "model.pkl")
        folder_of(tmp_path, "sklearn", {"pickled_model": "model.pkl"}, columns=("a", "b", "c"))
        with pytest.raises(RefusedForSafety) as caught:
            resolve(ModelRef(str(tmp_path)))
        assert "skops" in caught.value.next_step
        version = resolve(ModelRef(str(tmp_path)), allow_code=True)
        # The file has no names of columns; the signature has.
        assert version.feature_names == ("a", "b", "c")

    def test_another_flavor_than_demanded(self, tmp_path: Path) -> None:
        forest(tmp_path)
        folder_of(tmp_path, "sklearn", {"pickled_model": "model.skops"})
        with pytest.raises(ModelError):
            resolve(ModelRef(str(tmp_path)), flavor="onnx")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> FlavorCase:
    pytest.importorskip("mlflow")
    return mlflow_pyfunc(tmp_path_factory.mktemp("pyfunc"))


class TestPyfunc:
    def test_needs_allow_code(self, case: FlavorCase) -> None:
        with pytest.raises(RefusedForSafety, match="runs code") as caught:
            resolve(ModelRef(str(case.path)))
        assert "allow_code" in caught.value.next_step

    def test_names_of_outputs_are_those_of_the_result(self, case: FlavorCase) -> None:
        scored = pipeline.score(case.frame.head(3), case.path, output="p", allow_code=True)
        assert list(scored)[-2:] == ["p_ratio", "p_length"]

    def test_columns_are_cast_to_the_signature(self, case: FlavorCase) -> None:
        frame = case.frame.head(20)
        whole = pipeline.score(frame, case.path, output="p", allow_code=True)
        # float32 for a double, a float for a long
        other = frame.astype({"amount": np.float32, "count": float})
        found = pipeline.score(other, case.path, output="p", allow_code=True)
        np.testing.assert_allclose(found["p_ratio"], whole["p_ratio"], rtol=1e-6)

    def test_text_for_a_number_is_refused_by_name(self, case: FlavorCase) -> None:
        frame = case.frame.head(3).astype({"amount": str})
        with pytest.raises(SchemaDrift) as caught:
            pipeline.score(frame, case.path, output="p", allow_code=True)
        assert (caught.value.where, "signature" in caught.value.expected) == ("amount", True)

    def test_row_with_a_fraction_for_a_long_is_rejected(self, case: FlavorCase, tmp_path: Path) -> None:
        frame = case.frame.head(5).astype({"count": float})
        frame.loc[2, "count"] = 1.5
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), tmp_path / "a.parquet")
        spec = JobSpec.model_validate(
            {
                "name": "pyfunc",
                "source": {"path": str(tmp_path / "a.parquet")},
                "steps": [{"score": {"model": str(case.path), "output": "p", "allow_code": True}}],
                "sink": {"path": str(tmp_path / "out")},
                "errors": {"max_fraction": 1.0},
            }
        )
        plan = plan_inline(spec, directory=tmp_path / "jobs")
        (receipt,) = score_inline(plan, directory=tmp_path / "jobs", job="p-1").ledger().done
        assert receipt.reasons == {"score:ValueError": 1}

    def test_changed_file_is_not_loaded(self, case: FlavorCase, tmp_path: Path) -> None:
        import shutil

        copy = tmp_path / "copy"
        shutil.copytree(case.path, copy)
        version = resolve(ModelRef(str(copy)), allow_code=True)
        assert {file.name for file in version.files} >= {"MLmodel", "python_model.pkl"}
        (copy / "python_model.pkl").write_bytes(b"other")
        folders._opened.clear()
        forget_models()
        with pytest.raises(ModelDigestMismatch) as caught:
            get_predictor(version)
        assert caught.value.where.endswith("python_model.pkl")


class TestFolders:
    def test_unknown_folder_names_its_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.bin").write_bytes(b"x")
        (tmp_path / "b.bin").write_bytes(b"x")
        with pytest.raises(ModelError, match="no known kind") as caught:
            resolve(ModelRef(str(tmp_path)))
        assert caught.value.found == "a.bin, b.bin"

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="empty"):
            resolve(ModelRef(str(tmp_path)))

    def test_files_of_a_bucket(self, tmp_path: Path) -> None:
        import fsspec

        case = forest(tmp_path)
        folder_of(tmp_path, "sklearn", {"pickled_model": "model.skops"})
        memory = fsspec.filesystem("memory")
        memory.put(str(tmp_path), "memory://bucket/model", recursive=True)
        version = resolve_folder(folder_at("memory://bucket/model"))
        assert version.uri == "memory://bucket/model/model.skops"
        assert version.digest == resolve(ModelRef(str(case.path))).digest
