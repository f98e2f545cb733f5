"""The LightGBM flavor: what its text tells, iteration ranges, threads, fitted objects, and damaged texts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import pipeline
from pipeline.common.digest import digest_bytes
from pipeline.errors import ModelError, SpecError
from pipeline.models.engines import check_engine, engine_options
from pipeline.models.flavors import lightgbm as flavor
from pipeline.models.flavors.first_load import complete
from pipeline.models.flavors.lightgbm_file import read_text
from pipeline.models.model import ModelVersion
from pipeline.models.options import apply_options, require_flavor
from pipeline.models.outputs import output_type
from pipeline.models.trees.lightgbm import lightgbm_tree_problem
from pipeline.testing.flavor_cases import training_frame

lightgbm = pytest.importorskip("lightgbm")
BLANK = ModelVersion("m", "", "m.txt", "", "lightgbm", 0, (), "other", 1)


def train(frame: pd.DataFrame, target: Any, *, rounds: int = 4, **params: Any) -> Any:
    settings = {"objective": "binary", "verbosity": -1, "num_leaves": 5, "num_threads": 1, **params}
    return lightgbm.train(settings, lightgbm.Dataset(frame, target, free_raw_data=False), rounds)


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return training_frame(400)[0].drop(columns="note")


@pytest.fixture(scope="module")
def target() -> np.ndarray:
    return np.minimum(training_frame(400)[1], 1)


@pytest.fixture(scope="module")
def booster(frame: pd.DataFrame, target: np.ndarray) -> Any:
    return train(frame, target, rounds=9)


def described(booster: Any) -> ModelVersion:
    data = booster.model_to_string().encode()
    made = flavor.describe(replace(BLANK, digest=digest_bytes(data)), data)
    return complete(made)


def predictor_of(version: ModelVersion, booster: Any) -> Any:
    return flavor.load(version, booster.model_to_string().encode())


def table_of(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False)


class TestText:
    def test_features_have_the_categories_of_their_frame(self, booster: Any) -> None:
        features = described(booster).features
        assert [feature.kind for feature in features] == ["number", "number", "number", "category"]
        assert features[3].categories == ("Berlin", "Köln", "Ulm")

    def test_a_constant_column_of_categories_is_found(self, frame: pd.DataFrame, target: np.ndarray) -> None:
        constant = frame.assign(unit=pd.Categorical(["kg"] * len(frame)))
        features = described(train(constant, target)).features
        assert [feature.categories for feature in features][3:] == [("Berlin", "Köln", "Ulm"), ("kg",)]

    def test_integers_as_categories(self, target: np.ndarray) -> None:
        frame = pd.DataFrame({"x": np.arange(400.0), "zone": pd.Categorical(np.arange(400) % 3 * 10)})
        version = described(train(frame, target))
        assert version.features[1].categories == (0, 10, 20)

    def test_ordered_categories_whose_column_is_unknown_are_refused(self, target: np.ndarray) -> None:
        frame = pd.DataFrame(
            {
                "size": pd.Categorical(np.take(["s", "m", "l"], np.arange(400) % 3), ["s", "m", "l"], ordered=True),
                "x": np.arange(400.0),
            }
        )
        with pytest.raises(ModelError, match="which columns its categories belong to") as caught:
            described(train(frame, target))
        assert "categories of 1 columns, and 0 categorical features" in caught.value.found

    def test_task_objective_and_trees(self, booster: Any) -> None:
        version = described(booster)
        assert (version.task, version.objective, version.trees, version.rounds) == ("binary", "binary", 9, 9)
        assert version.trees_per_round == 1

    @pytest.mark.parametrize("end", ["end of trees", "\nend of parameters", "pandas_categorical:[["])
    def test_a_text_that_is_cut_off_is_refused(self, booster: Any, end: str) -> None:
        text = booster.model_to_string()
        with pytest.raises(ModelError, match="damaged"):
            read_text(text[: text.index(end) + len(end) - 2].encode(), where="m.txt")

    def test_categories_that_are_no_json_are_refused(self, booster: Any) -> None:
        text = re.sub(r"pandas_categorical:.*", "pandas_categorical:[[1,", booster.model_to_string())
        with pytest.raises(ModelError, match="damaged") as caught:
            read_text(text.encode(), where="m.txt")
        assert "categories that cannot be read" in caught.value.found


class TestDamage:
    @pytest.mark.parametrize(
        ("line", "value", "found"),
        [
            ("left_child", "0", "leads back to itself"),
            ("right_child", "99", "a child outside its nodes"),
            ("split_feature", "77", "a split on a feature outside 0 to 3"),
        ],
    )
    def test_trees_that_lead_nowhere_are_refused(self, booster: Any, line: str, value: str, found: str) -> None:
        text = re.sub(rf"(\n{line}=)\S+", rf"\g<1>{value}", booster.model_to_string(), count=1)
        assert found in lightgbm_tree_problem(text)
        with pytest.raises(ModelError, match="trees of the model are damaged"):
            flavor.describe(BLANK, text.encode())

    def test_a_sound_model_has_no_problem(self, booster: Any) -> None:
        assert lightgbm_tree_problem(booster.model_to_string()) == ""


class TestPredictions:
    def test_an_iteration_range_is_that_of_predict(self, booster: Any, frame: pd.DataFrame) -> None:
        version = apply_options(described(booster), iteration_range=(2, 7))
        predictor = predictor_of(version, booster)
        encoded = predictor.encode(table_of(frame))
        expected = booster.predict(frame, start_iteration=2, num_iteration=5)
        np.testing.assert_array_equal(predictor.predict(encoded, kind="prediction"), expected)
        trees = flavor.tree_predict(predictor, "prediction")
        np.testing.assert_array_equal(trees(encoded, kind="prediction"), expected)
        assert predictor.predict(encoded, kind="leaf").shape == (len(frame), 5)
        assert output_type(version, "leaf").width == 5

    def test_threads_change_no_bit(self, booster: Any, frame: pd.DataFrame) -> None:
        version = described(booster)
        predictor = predictor_of(apply_options(version, threads=2), booster)
        assert predictor.threads == 2
        encoded = predictor.encode(table_of(frame))
        np.testing.assert_array_equal(predictor.predict(encoded, kind="prediction"), booster.predict(frame))

    def test_a_model_without_names_takes_columns_by_place(self, target: np.ndarray) -> None:
        rows = np.random.default_rng(1).normal(size=(400, 2))
        model = train(rows, target)  # type: ignore[arg-type]
        scored = pipeline.score(pd.DataFrame(rows, columns=["a", "b"]), model, features=["a", "b"])
        np.testing.assert_array_equal(scored["prediction"], model.predict(rows))

    def test_numbers_beyond_float32_keep_their_precision(self, target: np.ndarray) -> None:
        near = 1.0 + np.arange(400) * 2.0**-40
        model = train(pd.DataFrame({"x": near}), np.arange(400) >= 200, min_data_in_leaf=1)
        scored = pipeline.score(pd.DataFrame({"x": near}), model)
        np.testing.assert_array_equal(scored["prediction"], model.predict(near[:, None]))
        assert scored["prediction"].nunique() > 1


class TestOptions:
    def test_engine_xgboost_is_refused(self, booster: Any) -> None:
        version = described(booster)
        with pytest.raises(SpecError, match="xgboost cannot score this model"):
            check_engine("xgboost", version, kind="prediction")
        assert engine_options("library", version, kind="prediction").possible == ("lightgbm",)
        assert engine_options("auto", version, kind="prediction").possible == ("lightgbm", "trees")
        assert engine_options("auto", version, kind="leaf").possible == ("lightgbm",)

    def test_another_flavor_than_demanded_is_refused(self, booster: Any) -> None:
        version = described(booster)
        assert require_flavor(version, flavor="lightgbm", allow_code=False) is version
        with pytest.raises(SpecError, match=r"another format than score\.flavor says"):
            require_flavor(version, flavor="xgboost", allow_code=False)


class TestFitted:
    def test_a_fitted_classifier_is_scored_directly(self, frame: pd.DataFrame, target: np.ndarray) -> None:
        model = lightgbm.LGBMClassifier(n_estimators=5, num_leaves=5, verbosity=-1, n_jobs=1).fit(frame, target)
        scored = pipeline.score(frame, model, output={"column": "p", "kind": "probabilities"})
        np.testing.assert_array_equal(scored[["p_0", "p_1"]].to_numpy(), model.predict_proba(frame))

    def test_early_stopping_counts(self, frame: pd.DataFrame, target: np.ndarray) -> None:
        model = train(frame, target, rounds=9)
        model.best_iteration = 3
        np.testing.assert_array_equal(pipeline.score(frame, model)["prediction"], model.predict(frame))
        np.testing.assert_array_equal(model.predict(frame), model.predict(frame, num_iteration=3))

    def test_another_object_is_refused(self) -> None:
        with pytest.raises(SpecError, match="not a model of a supported kind"):
            pipeline.score(pd.DataFrame({"x": [1.0]}), object())


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_PIPELINE__DIRECTORY", str(tmp_path / "jobs"))
    monkeypatch.chdir(tmp_path)
