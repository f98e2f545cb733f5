"""The scikit-learn flavor: safe files, columns of pipelines, outputs, versions, and fitted objects."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import pipeline
from pipeline.common.digest import digest_bytes
from pipeline.errors import EnvMismatch, InputError, ModelError, RefusedForSafety, SpecError
from pipeline.models.flavors import detect_bytes
from pipeline.models.flavors import sklearn as flavor
from pipeline.models.flavors.first_load import Described, complete
from pipeline.models.flavors.sklearn_columns import columns_of
from pipeline.models.flavors.thread_pools import PoolLimit
from pipeline.models.model import ModelVersion
from pipeline.models.options import require_flavor
from pipeline.models.outputs import output_type
from pipeline.models.registry import resolve
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.flavor_cases import training_frame

skops = pytest.importorskip("skops.io")
pytest.importorskip("sklearn")

from sklearn.base import BaseEstimator  # noqa: E402
from sklearn.compose import ColumnTransformer, make_column_transformer  # noqa: E402
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestRegressor  # noqa: E402
from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: E402
from sklearn.impute import SimpleImputer  # noqa: E402
from sklearn.linear_model import LinearRegression, LogisticRegression  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler  # noqa: E402
from sklearn.svm import SVC  # noqa: E402

BLANK = ModelVersion("m", "", "m.skops", "", "sklearn", 0, (), "other", 1)


class Ran(Exception):
    """The payload of a pickle ran."""


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (_run, ())


def _run() -> None:
    raise Ran


class Own(BaseEstimator):  # type: ignore[misc]
    def fit(self, rows: Any, target: Any) -> Own:
        self.n_features_in_ = rows.shape[1]
        return self

    def predict(self, rows: Any) -> np.ndarray:
        return np.zeros(len(rows))


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return training_frame(300, nulls=False)[0].astype({"city": "str"})


@pytest.fixture(scope="module")
def target() -> np.ndarray:
    return np.minimum(training_frame(300, nulls=False)[1], 1)


def described(model: Any, *, allow_code: bool = False) -> Described:
    data = skops.dumps(model)
    return flavor.describe(replace(BLANK, digest=digest_bytes(data)), data, allow_code=allow_code)


def kinds_of(model: Any) -> dict[str, str]:
    return {feature.name: feature.kind for feature in columns_of(model).features}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_PIPELINE__DIRECTORY", str(tmp_path / "jobs"))
    monkeypatch.chdir(tmp_path)


class TestSafety:
    def test_a_pickle_is_refused_and_does_not_run(self, tmp_path: Path) -> None:
        path = tmp_path / "model.skops"
        path.write_bytes(pickle.dumps(Payload()))
        for options in ({}, {"flavor": "sklearn"}):
            with pytest.raises(RefusedForSafety, match="pickle"):
                resolve(ModelRef(str(path)), **options)
        with pytest.raises(RefusedForSafety, match="runs code"):
            flavor.describe(BLANK, path.read_bytes())

    def test_an_allowed_pickle_is_loaded_by_the_flavor_of_pickles(self) -> None:
        data = pickle.dumps(LinearRegression().fit([[1.0], [2.0]], [1.0, 2.0]))
        assert detect_bytes(data, allow_code=True) == "sklearn"
        found = flavor.describe(BLANK, data, allow_code=True)
        assert found.version.runs_code is True

    def test_types_that_are_not_on_the_list_are_named(self) -> None:
        model = Own().fit(np.ones((3, 1)), None)
        with pytest.raises(RefusedForSafety, match="types that are not known to be safe") as caught:
            described(model)
        assert "Own" in caught.value.found
        assert described(model, allow_code=True).version.runs_code is True

    def test_a_step_must_allow_code_itself(self) -> None:
        version = replace(BLANK, runs_code=True)
        assert require_flavor(version, flavor=None, allow_code=True) is version
        with pytest.raises(RefusedForSafety, match="runs code in its file"):
            require_flavor(version, flavor=None, allow_code=False)

    def test_a_file_without_a_model_is_refused(self) -> None:
        with pytest.raises(ModelError, match="holds no model"):
            described(StandardScaler().fit([[1.0], [2.0]]))

    def test_bytes_that_are_no_archive_are_a_model_error(self) -> None:
        with pytest.raises(ModelError, match="scikit-learn cannot read the model"):
            flavor.describe(BLANK, b"PK\x03\x04 schema.json")


@pytest.mark.parametrize(("saved", "is_refused"), [("0.1.0", True), (None, False)])
def test_a_model_of_another_minor_version_is_refused(
    saved: str | None, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sklearn

    minor = ".".join(sklearn.__version__.split(".")[:2])
    model = LinearRegression().fit([[1.0], [2.0]], [1.0, 2.0])
    with monkeypatch.context() as patch:
        patch.setattr("sklearn.base.__version__", saved or f"{minor}.99")
        data = skops.dumps(model)
    if not is_refused:
        assert flavor.describe(BLANK, data).version.objective == "LinearRegression"
        return
    with pytest.raises(EnvMismatch, match="another version of scikit-learn") as caught:
        flavor.describe(BLANK, data)
    assert "scikit-learn 0.1.0 in the file" in caught.value.found


class TestColumns:
    def test_parts_of_a_transformer_tell_kinds(self, frame: pd.DataFrame, target: np.ndarray) -> None:
        parts = ColumnTransformer(
            [
                ("scale", StandardScaler(), [0, 1]),
                ("drop", "drop", ["share"]),
                ("city", make_pipeline(SimpleImputer(strategy="most_frequent"), OrdinalEncoder()), slice(3, 4)),
                ("note", TfidfVectorizer(), "note"),
            ]
        )
        model = make_pipeline(parts, LogisticRegression()).fit(frame, target)
        expected = {"amount": "number", "count": "number", "share": "any", "city": "category", "note": "text"}
        assert kinds_of(model) == expected
        assert columns_of(model).features[3].categories == ("Berlin", "Köln", "Ulm")

    def test_an_encoder_that_ignores_what_it_has_not_seen_takes_any_value(
        self, frame: pd.DataFrame, target: np.ndarray
    ) -> None:
        parts = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["city"]), remainder="drop")
        model = make_pipeline(parts, LogisticRegression()).fit(frame[["city", "amount"]], target)
        assert kinds_of(model) == {"city": "any", "amount": "any"}
        given = frame[["city", "amount"]].head(4).copy()
        given.loc[0, "city"] = "Atlantis"
        scored = pipeline.score(given, model)
        np.testing.assert_array_equal(scored["prediction"], model.predict_proba(given)[:, 1])

    def test_a_function_takes_any_column(self, frame: pd.DataFrame, target: np.ndarray) -> None:
        model = make_pipeline(FunctionTransformer(np.log1p), LinearRegression()).fit(frame[["count"]], target)
        assert kinds_of(model) == {"count": "any"}

    def test_a_boosted_model_has_its_categories(self, frame: pd.DataFrame, target: np.ndarray) -> None:
        given = frame[["amount", "city"]].astype({"city": "category"})
        model = HistGradientBoostingClassifier(max_iter=3).fit(given, target)
        found = columns_of(model)
        assert found.categorical == ("city",)
        assert found.features[1].categories == ("Berlin", "Köln", "Ulm")
        # Texts in the input become the categories of the training, whatever is in a batch.
        as_text = given.astype({"city": "str"})
        scored = pipeline.score(as_text, model)
        np.testing.assert_array_equal(scored["prediction"], model.predict_proba(given)[:, 1])

    def test_texts_without_a_column_name_are_the_feature_text(self, frame: pd.DataFrame, target: np.ndarray) -> None:
        model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(frame["note"], target)
        assert kinds_of(model) == {"text": "text"}
        scored = pipeline.score(frame, model, features=["note"])
        assert np.allclose(scored["prediction"], model.predict_proba(frame["note"])[:, 1], rtol=1e-12)


class TestOutputs:
    def test_classes_that_are_texts_are_labels(self, frame: pd.DataFrame, target: np.ndarray) -> None:
        model = LogisticRegression().fit(frame[["amount"]], np.take(["no", "yes"], target))
        scored = pipeline.score(frame, model, output={"column": "answer", "kind": "label"})
        assert scored["answer"].tolist() == model.predict(frame[["amount"]]).tolist()

    def test_a_classifier_without_probabilities_predicts_its_classes(
        self, frame: pd.DataFrame, target: np.ndarray
    ) -> None:
        version = complete(described(SVC().fit(frame[["amount", "count"]], target)))
        assert output_type(version, "prediction") == replace(version.output_types[0], type="int64", width=1)
        assert output_type(version, "probabilities") is None
        margin = output_type(version, "margin")
        assert margin is not None
        assert margin.type == "float64"

    def test_several_targets_are_several_columns(self, frame: pd.DataFrame, target: np.ndarray) -> None:
        both = np.stack([target, frame["amount"]], axis=1)
        model = RandomForestRegressor(3, random_state=0).fit(frame[["amount", "count"]], both)
        scored = pipeline.score(frame, model, output="p")
        np.testing.assert_array_equal(scored[["p_0", "p_1"]], model.predict(frame[["amount", "count"]]))

    def test_made_up_rows_that_are_refused_leave_the_promise_unmeasured(
        self, frame: pd.DataFrame, target: np.ndarray
    ) -> None:
        def strict(rows: Any) -> Any:
            raise ValueError("not a date")

        model = make_pipeline(FunctionTransformer(), LogisticRegression()).fit(frame[["amount"]], target)
        model.steps[0][1].func = strict
        found = _complete(model)
        assert (found.promise.kind, found.promise.rows) == ("code", 0)  # type: ignore[union-attr]
        assert output_type(found, "probabilities").width == 2  # type: ignore[union-attr]

    def test_a_row_that_the_model_refuses_is_named(self, frame: pd.DataFrame, target: np.ndarray) -> None:
        model = LogisticRegression().fit(frame[["amount"]], target)
        given = frame[["amount"]].head(3).copy()
        given.loc[1, "amount"] = np.inf
        with pytest.raises(InputError, match="cannot be scored") as caught:
            pipeline.score(given, model)
        assert "amount" in caught.value.found


def _complete(model: Any) -> ModelVersion:
    columns = columns_of(model)
    version = replace(BLANK, features=columns.features, task="binary")
    predictor = flavor.SklearnPredictor(version, model, columns, threads=1)
    return complete(Described(version, predictor, ("prediction",), outputs=flavor._usual_outputs(model, 2)))


def test_an_estimator_of_another_package_is_no_model() -> None:
    with pytest.raises(SpecError, match="not a model of a supported kind"):
        pipeline.score(pd.DataFrame({"x": [1.0]}), Own())


def test_the_last_thread_lifts_the_limit_of_pools() -> None:
    from threadpoolctl import threadpool_info

    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info()]

    pools, before = PoolLimit(), threads()
    with pools.hold(1):
        with pools.hold(1):
            assert set(threads()) <= {1}
        assert set(threads()) <= {1}
    assert threads() == before
