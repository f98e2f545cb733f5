from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.models.flavors import find_flavor
from pipeline.models.flavors.xgboost import inspect
from pipeline.models.model import ModelVersion, OutputType, Promise
from pipeline.models.options import promise_text, promise_warning
from pipeline.models.outputs import output_type, output_types
from pipeline.models.record import model_from_record, model_identity, model_to_record
from pipeline.testing.oracle import FEATURES, make_table, train_model

CLASSES = {"objective": "multi:softprob", "num_class": 2}


def version_of(path: Path) -> ModelVersion:
    return inspect(str(path), path.read_bytes())


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(tmp_path_factory.mktemp("binary") / "model.ubj", rounds=3)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(tmp_path_factory.mktemp("classes") / "model.ubj", rounds=2, **CLASSES)


def test_outputs_of_xgboost_follow_from_its_task(binary: Path, classes: Path) -> None:
    found = {output.kind: (output.type, output.width) for output in output_types(version_of(binary))}
    assert found == {
        "prediction": ("float32", 1),
        "label": ("int32", 1),
        "probabilities": ("float32", 2),
        "margin": ("float32", 1),
        "leaf": ("int32", 3),
        "contributions": ("float32", 5),
    }
    several = {output.kind: output.width for output in output_types(version_of(classes))}
    assert several == {"prediction": 2, "label": 1, "probabilities": 2, "margin": 2, "leaf": 4, "contributions": 10}


def test_an_output_that_the_model_has_not_is_none(binary: Path) -> None:
    regression = replace(version_of(binary), task="regression", objective="reg:squarederror")
    assert output_type(regression, "label") is None
    assert output_type(regression, "probabilities") is None
    raw = replace(version_of(binary), objective="binary:logitraw")
    assert output_type(raw, "probabilities") is None


@pytest.mark.parametrize("model", ["binary", "classes"])
def test_probabilities_are_those_of_predict_proba(model: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(model)
    version = version_of(path)
    predictor = find_flavor("xgboost").load(version, path.read_bytes())
    table = make_table(300, seed=3).select(list(FEATURES))
    found = predictor.predict(predictor.encode(table), kind="probabilities")
    one = predictor.predict(predictor.encode(table), kind="prediction")
    expected = np.vstack((1.0 - one, one)).T if one.ndim == 1 else one
    assert (found.shape, found.dtype) == ((300, 2), np.float32)
    np.testing.assert_array_equal(found, expected)


def test_the_record_of_an_xgboost_model_has_no_later_field(binary: Path) -> None:
    version = version_of(binary)
    record = model_to_record(version)
    assert not {"output_types", "promise", "runs_code", "threads"} & set(record)
    assert model_from_record(record) == version
    assert model_identity(version) == [version.digest, "xgboost", version.features]


def test_the_record_of_another_model_has_all(binary: Path) -> None:
    outputs = (OutputType("prediction", "float64", 1), OutputType("label", "string", 1))
    version = replace(version_of(binary), flavor="sklearn", output_types=outputs, promise=Promise("fixed", 32, 1e-9, 9))
    assert model_from_record(model_to_record(version)) == version
    assert model_identity(version) == [version.digest, "sklearn", version.features, 32]
    assert output_type(version, "label") == outputs[1]
    assert outputs[1].dtype == np.dtype(object)


@pytest.mark.parametrize(
    ("promise", "text", "warning"),
    [
        (None, "", ""),
        (Promise("exact", rows=2500), "exact: the bits of the library's own predict", ""),
        (Promise("fixed", 1024, 2e-16, 2500), "by calls of 1,024 rows; within 2e-16 of the library's", ""),
        (Promise("fixed", 32, rows=2500), "by calls of 32 rows; equal to the library's", ""),
        (Promise("code", 0, 3e-7, 96), "code: nothing", "they differed by up to 3e-07 in other batches"),
        (Promise("code"), "code: nothing", "it took no made-up row"),
    ],
)
def test_a_promise_in_words(binary: Path, promise: Promise | None, text: str, warning: str) -> None:
    version = replace(version_of(binary), promise=promise)
    assert text in promise_text(version)
    assert bool(promise_text(version)) == bool(text)
    assert warning in promise_warning(version)
    assert bool(promise_warning(version)) == bool(warning)
