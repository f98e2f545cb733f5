"""Early stopping, slices of rounds, and DART: the bits of xgboost's own predict, with both engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xgboost

from pipeline.errors import SpecError
from pipeline.models.cache import forget_models, get_predictor
from pipeline.models.flavors import find_flavor, xgboost_probe
from pipeline.models.flavors import xgboost as flavor
from pipeline.models.model import ModelVersion
from pipeline.models.options import apply_options, rounds_text, unused_rounds_warning
from pipeline.models.registry import resolve
from pipeline.scoring.outputs import prediction_schema
from pipeline.spec.model_ref import IterationRange, ModelRef, OutputKind
from pipeline.spec.score import Output

RNG = np.random.default_rng(5)
MATRIX = RNG.normal(size=(700, 4)).astype("f4")
MATRIX[::9, 1] = np.nan
NAMES = ["a", "b", "c", "d"]
TABLE = pa.table({name: MATRIX[:, index] for index, name in enumerate(NAMES)})
TARGET = np.abs(MATRIX[:, 0] + RNG.normal(size=700))
PARAMS = {"nthread": 1, "max_depth": 4, "eta": 0.5, "seed": 1}

OBJECTIVES: dict[str, tuple[dict[str, Any], np.ndarray]] = {
    "reg:squarederror": ({}, TARGET),
    "reg:gamma": ({}, TARGET + 0.1),
    "reg:absoluteerror": ({}, TARGET),
    "binary:logistic": ({}, TARGET > 1),
    "binary:hinge": ({}, TARGET > 1),
    "multi:softprob": ({"num_class": 3}, np.clip(TARGET, 0, 2).astype(int)),
    "multi:softmax": ({"num_class": 3}, np.clip(TARGET, 0, 2).astype(int)),
    "count:poisson": ({}, TARGET.astype(int)),
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read models without a child process, which would take a second each."""

    def probe(data: bytes, *, where: str) -> dict[str, Any]:
        return xgboost_probe.facts(xgboost.Booster(model_file=bytearray(data)), data)

    monkeypatch.setattr(flavor, "probe", probe)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with early stopping, whose best iteration is not its last."""
    noisy = (TARGET + RNG.normal(size=700) > 1).astype(int)
    train = xgboost.DMatrix(MATRIX[:350], noisy[:350], feature_names=NAMES)
    check = xgboost.DMatrix(MATRIX[350:], noisy[350:], feature_names=NAMES)
    booster = xgboost.train(
        {**PARAMS, "objective": "binary:logistic", "num_parallel_tree": 2, "subsample": 0.7},
        train,
        60,
        evals=[(check, "check")],
        early_stopping_rounds=8,
        verbose_eval=False,
    )
    path = tmp_path_factory.mktemp("stopped") / "m.ubj"
    booster.save_model(path)
    assert booster.best_iteration + 1 < booster.num_boosted_rounds()
    return path


def version_of(path: Path, rounds: IterationRange | None = None, *, kind: OutputKind = "prediction") -> ModelVersion:
    return apply_options(resolve(ModelRef(str(path))), iteration_range=rounds, kind=kind)


def predict(version: ModelVersion, kind: OutputKind) -> np.ndarray:
    predictor, _ = get_predictor(version)
    return predictor.predict(predictor.encode(TABLE), kind=kind)


def library(path: Path, kind: str, rounds: tuple[int, int] = (0, 0)) -> np.ndarray:
    options = {"margin": "output_margin", "leaf": "pred_leaf", "contributions": "pred_contribs"}
    booster = xgboost.Booster({"nthread": 1}, model_file=path)
    data = xgboost.DMatrix(MATRIX, feature_names=NAMES)
    return booster.predict(data, iteration_range=rounds, **({options[kind]: True} if kind in options else {}))


class TestEarlyStopping:
    def test_version_has_rounds_and_best_iteration(self, stopped: Path) -> None:
        booster = xgboost.Booster(model_file=stopped)
        version = version_of(stopped)
        assert version.rounds == booster.num_boosted_rounds()
        assert version.best_iteration == booster.best_iteration
        assert version.trees == 2 * version.rounds
        warning = unused_rounds_warning(version)
        assert f"all {version.rounds} rounds are scored" in warning
        assert f"the first {booster.best_iteration + 1}," in warning
        assert "score.iteration_range: best" in warning
        assert rounds_text(version) == f"all {version.rounds}; best iteration {booster.best_iteration}"

    def test_a_chosen_range_is_no_surprise(self, stopped: Path) -> None:
        version = version_of(stopped)
        for rounds in ("best", (0, version.rounds)):
            chosen = version_of(stopped, rounds)
            assert unused_rounds_warning(chosen) == ""
            assert rounds_text(chosen).startswith("[0, ")
        assert apply_options(chosen) == version
        assert apply_options(chosen, iteration_range=(0, version.rounds)) == chosen

    @pytest.mark.parametrize("kind", ["prediction", "margin", "leaf", "contributions"])
    @pytest.mark.parametrize("rounds", ["best", (0, 3), (0, 1)])
    def test_scores_are_those_of_predict_with_the_range(
        self, stopped: Path, kind: OutputKind, rounds: IterationRange
    ) -> None:
        version = version_of(stopped, rounds, kind=kind)
        bounds = (0, version_of(stopped).best_iteration + 1) if rounds == "best" else rounds  # type: ignore[operator]
        wanted = library(stopped, kind, bounds)
        scores = predict(version, kind)
        assert version.trees == 2 * bounds[1]
        assert scores.reshape(700, -1).tobytes() == wanted.reshape(700, -1).astype(scores.dtype).tobytes()
        assert len(prediction_schema(version, Output(column="p", kind=kind))) == scores.reshape(700, -1).shape[1]

    def test_a_range_may_begin_later(self, stopped: Path) -> None:
        for kind in ("prediction", "margin"):
            assert predict(version_of(stopped, (2, 5)), kind).tobytes() == library(stopped, kind, (2, 5)).tobytes()

    def test_best_is_what_the_scikit_learn_wrapper_predicts(self, tmp_path: Path) -> None:
        pytest.importorskip("sklearn")
        noisy = TARGET + RNG.normal(size=700)
        model = xgboost.XGBRegressor(**{**PARAMS, "n_jobs": 1}, n_estimators=60, early_stopping_rounds=6)
        frame = pd.DataFrame(MATRIX, columns=NAMES)
        model.fit(frame[:350], noisy[:350], eval_set=[(frame[350:], noisy[350:])], verbose=False)
        assert model.best_iteration + 1 < model.get_booster().num_boosted_rounds()
        model.save_model(tmp_path / "m.json")
        version = version_of(tmp_path / "m.json", "best")
        assert predict(version, "prediction").tobytes() == model.predict(frame).tobytes()
        assert predict(version_of(tmp_path / "m.json"), "prediction").tobytes() != model.predict(frame).tobytes()

    def test_versions_of_one_file_do_not_share_a_predictor(self, stopped: Path) -> None:
        forget_models()
        scores = [predict(version_of(stopped, rounds), "margin").tobytes() for rounds in (None, "best", (1, 3))]
        assert len(set(scores)) == 3


class TestTreeEngine:
    @pytest.mark.parametrize("rounds", [None, "best", (0, 3), (2, 5)])
    def test_range_has_the_bits_of_the_library(self, stopped: Path, rounds: IterationRange | None) -> None:
        version = version_of(stopped, rounds)
        predictor, _ = get_predictor(version)
        build = find_flavor("xgboost").trees
        assert build is not None
        trees = build(predictor, "prediction")
        for kind in ("prediction", "margin"):
            assert trees(MATRIX, kind=kind).tobytes() == library(stopped, kind, bounds_of(version)).tobytes()


def bounds_of(version: ModelVersion) -> tuple[int, int]:
    return version.iteration_range or (0, 0)


class TestDart:
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_scores_are_those_of_predict(self, objective: str, tmp_path: Path) -> None:
        more, target = OBJECTIVES[objective]
        params = {**PARAMS, "objective": objective, "booster": "dart", "rate_drop": 0.4, "one_drop": 1, **more}
        booster = xgboost.train(params, xgboost.DMatrix(MATRIX, target, feature_names=NAMES), 12)
        booster.save_model(tmp_path / "m.ubj")
        for rounds in (None, (0, 7)):
            version = version_of(tmp_path / "m.ubj", rounds)
            kinds: Sequence[OutputKind] = ("prediction", "margin", "leaf", "contributions")
            for kind in kinds:
                wanted = library(tmp_path / "m.ubj", kind, rounds or (0, 0))
                scores = predict(version, kind)
                assert scores.reshape(-1).tobytes() == wanted.reshape(-1).astype(scores.dtype).tobytes(), kind
            assert version.tree_engine_blockers == ()
            build = find_flavor("xgboost").trees
            assert build is not None
            trees = build(get_predictor(version)[0], "prediction")
            for kind in ("prediction", "margin"):
                wanted = library(tmp_path / "m.ubj", kind, rounds or (0, 0))
                assert trees(MATRIX, kind=kind).tobytes() == wanted.tobytes(), kind


class TestRefusals:
    @pytest.mark.parametrize(
        ("rounds", "kind", "message"),
        [
            ((0, 1000), "prediction", "ends after the last round"),
            ((1, 3), "leaf", "only from the first round on"),
            ((1, 3), "contributions", "only from the first round on"),
        ],
    )
    def test_range_outside_the_model(self, stopped: Path, rounds: Any, kind: OutputKind, message: str) -> None:
        with pytest.raises(SpecError, match=message) as caught:
            version_of(stopped, rounds, kind=kind)
        assert (caught.value.where, bool(caught.value.next_step)) == ("score.iteration_range", True)

    def test_models_without_the_rounds(self, tmp_path: Path) -> None:
        data = xgboost.DMatrix(MATRIX, TARGET, feature_names=NAMES)
        xgboost.train(PARAMS, data, 3).save_model(tmp_path / "plain.ubj")
        xgboost.train({"booster": "gblinear", "nthread": 1}, data, 3).save_model(tmp_path / "linear.ubj")
        with pytest.raises(SpecError, match="names no best iteration"):
            version_of(tmp_path / "plain.ubj", "best")
        for rounds in ("best", (0, 2)):
            with pytest.raises(SpecError, match="no boosting rounds to select"):
                version_of(tmp_path / "linear.ubj", rounds)

    def test_rounds_of_different_sizes(self, tmp_path: Path) -> None:
        data = xgboost.DMatrix(MATRIX, TARGET, feature_names=NAMES)
        first = xgboost.train(PARAMS, data, 2)
        xgboost.train({**PARAMS, "num_parallel_tree": 3}, data, 2, xgb_model=first).save_model(tmp_path / "m.ubj")
        version = version_of(tmp_path / "m.ubj")
        if version.trees_per_round:
            pytest.skip("this xgboost keeps the number of trees of a round")
        with pytest.raises(SpecError, match="different numbers of trees"):
            version_of(tmp_path / "m.ubj", (0, 1))
