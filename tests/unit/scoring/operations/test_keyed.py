"""A model for each value of a column: each row has the score that its model gives to it alone."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.models.lazy_evaluator import LazyEvaluator
from pipeline.models.model import Feature, ModelVersion
from pipeline.plan.recipe import ColumnRule, KeyedRecipe, ScoreRecipe, Shadow
from pipeline.scoring.operations.keyed import KeyedScorer
from pipeline.scoring.operations.model_scorer import ModelScorer
from pipeline.scoring.operations.operation import Applied
from pipeline.scoring.operations.scores import ScoreOperation
from pipeline.scoring.rows import Rows

VERSION = ModelVersion("m", "1", "/m.ubj", "0" * 64, "xgboost", 10, (Feature("a"),), "regression", 1)
Other = Literal["reject", "null", "model"]


class Plus:
    """A predictor that adds a number to its only feature, and keeps what it saw."""

    def __init__(self, number: float) -> None:
        self.version = VERSION
        self.number = number
        self.calls: list[list[float]] = []
        self.encodings = 0

    def encode(self, table: pa.Table, *, order: str = "C") -> np.ndarray:
        self.encodings += 1
        return np.column_stack([column.to_numpy().astype(np.float32) for column in table.columns])

    def example(self) -> np.ndarray:
        return np.zeros((1, 1), np.float32)

    def predict(self, matrix: np.ndarray, *, kind: str) -> np.ndarray:
        self.calls.append(matrix[:, 0].tolist())
        if (matrix == -1).any():
            raise ValueError("cannot")
        return matrix[:, 0] + np.float32(self.number)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return False


KINDS = {"uniform": ("number",), "different encodings": ("number", "integer", "indicator")}
_kinds = {"kinds": KINDS["uniform"]}


@pytest.fixture(autouse=True, params=list(KINDS))
def kinds(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test with models that encode alike, and with models that do not."""
    _kinds["kinds"] = KINDS[request.param]
    yield
    _kinds["kinds"] = KINDS["uniform"]


def operation(values: tuple[str, ...], *, other: Other = "reject", **fields: Any) -> tuple[ScoreOperation, list[Plus]]:
    count, rules, kinds = len(values) + (other == "model"), fields.pop("rules", ()), _kinds["kinds"]
    versions = [replace(VERSION, features=(Feature("a", kinds[number % len(kinds)]),)) for number in range(count)]  # type: ignore[arg-type]
    recipes = tuple(ScoreRecipe(version, ("a",), "prediction", ("p",), rules) for version in versions)
    recipe = KeyedRecipe("key", values, recipes, other, **fields)
    predictors = [Plus(100.0 * (number + 1)) for number in range(count)]
    members = [ModelScorer(member, predictor) for member, predictor in zip(recipes, predictors, strict=True)]
    return ScoreOperation(recipe, KeyedScorer(recipe, members, predictors)), predictors


def rows(keys: pa.Array | list[Any], a: list[float] | None = None) -> Rows:
    keys = keys if isinstance(keys, pa.Array) else pa.array(keys)
    return Rows.from_table(pa.table({"key": keys, "a": pa.array(a or range(len(keys)), pa.float32())}))


def scores(applied: Applied) -> list[float | None]:
    (part,) = applied.parts
    found: list[float | None] = part.table.column("p").to_pylist()
    return found


def test_each_row_is_scored_by_the_model_of_its_key() -> None:
    step, predictors = operation(("x", "y"))
    applied = step.apply(rows(["y", "x", "y", "x"]))
    assert scores(applied) == [200.0, 101.0, 202.0, 103.0]
    assert [predictor.calls for predictor in predictors] == [[[1.0, 3.0]], [[0.0, 2.0]]]


@pytest.mark.parametrize(
    "keys",
    [
        pa.array([7, 8, None], pa.int16()),
        pa.array(["7", "8", None]).dictionary_encode(),
        pa.array(["7", "8", None], pa.large_string()),
        pa.array(["7", "8", None], pa.string_view()),
        pa.array([7, 8, None], pa.uint64()).dictionary_encode(),
    ],
    ids=lambda keys: str(keys.type),
)
def test_keys_of_every_type_are_compared_as_text(keys: pa.Array) -> None:
    assert scores(operation(("7", "8"), other="null")[0].apply(rows(keys))) == [100.0, 201.0, None]


def test_booleans_and_dates() -> None:
    assert scores(operation(("false", "true"))[0].apply(rows([True, False]))) == [200.0, 101.0]
    days = pa.array([date(2026, 1, 2), date(2026, 1, 1)])
    assert scores(operation(("2026-01-01", "2026-01-02"))[0].apply(rows(days))) == [200.0, 101.0]


def test_rows_without_a_model_are_rejected() -> None:
    applied = operation(("x",))[0].apply(rows(["x", "z", None, "x"]))
    assert scores(applied) == [100.0, 103.0]
    assert applied.failures.rows.tolist() == [1, 2]
    assert set(applied.failures.reasons) == {"no_model"}
    assert applied.failures.messages == ("key is 'z': there is no model", "key is null: there is no model")


def test_rows_without_a_model_get_null_or_another_model() -> None:
    keys = ["x", "z", None, "x"]
    assert scores(operation(("x",), other="null")[0].apply(rows(keys))) == [100.0, None, None, 103.0]
    assert scores(operation(("x",), other="model")[0].apply(rows(keys))) == [100.0, 201.0, 202.0, 103.0]


def test_no_row_has_a_model() -> None:
    applied = operation(("x",))[0].apply(rows(["z", "z"]))
    assert (scores(applied), applied.failures.rows.tolist()) == ([], [0, 1])
    assert scores(operation(("x",), other="null")[0].apply(rows(["z"]))) == [None]
    assert scores(operation(("x",))[0].apply(rows(pa.array([], pa.string())))) == []


def test_rows_that_a_model_rejects_keep_their_positions() -> None:
    step, _ = operation(("x", "y"), rules=(ColumnRule("a", max=4),))
    applied = step.apply(rows(["y", "x", "z", "y", "x"], [5.0, -1.0, 1.0, 2.0, 3.0]))
    assert scores(applied) == [202.0, 103.0]
    assert applied.failures.rows.tolist() == [0, 1, 2]
    assert applied.failures.reasons == ("contract:a:max", "score:ValueError", "no_model")


def test_only_rows_of_the_condition_need_a_model() -> None:
    applied = operation(("x",), where="a > 0")[0].apply(rows(["z", "x", "z"]))
    assert scores(applied) == [None, 101.0]
    assert applied.failures.rows.tolist() == [2]


def test_a_challenger_by_key_rejects_none() -> None:
    step, _ = operation(("x",), shadow=Shadow("a"))
    applied = step.apply(rows(["x", "z"]))
    assert scores(applied) == [100.0, None]
    assert (applied.agreements["p"].rows, applied.agreements["p"].errors) == (1, 1)


def test_every_second_batch_goes_backwards() -> None:
    step, predictors = operation(("x", "y"))
    order: list[float] = []
    for predictor in predictors:
        predict = predictor.predict
        predictor.predict = lambda matrix, kind, predict=predict, number=predictor.number: (  # type: ignore[method-assign,misc]
            order.append(number),
            predict(matrix, kind=kind),
        )[1]
    step.apply(rows(["x", "y"]))
    step.apply(rows(["x", "y"]))
    assert order == [100.0, 200.0, 200.0, 100.0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["x", "y", "z", "", None]), max_size=40), st.sampled_from(["reject", "null", "model"]))
def test_any_batch_gives_what_each_row_gives_alone(keys: list[str | None], other: Other) -> None:
    values, table = ("x", "y"), pa.array(keys, pa.string())
    whole = operation(values, other=other)[0].apply(rows(table))
    found = dict(zip(whole.parts[0].position.tolist(), scores(whole), strict=True))
    for row, key in enumerate(keys):
        number = {"x": 100.0, "y": 200.0}.get(key or "none", {"model": 300.0}.get(other))
        expected = None if number is None else number + row
        assert found.get(row, "rejected") == ("rejected" if expected is None and other == "reject" else expected)
    assert set(whole.failures.rows.tolist()) == set(range(len(keys))) - set(found)


def test_models_that_encode_alike_share_one_matrix() -> None:
    step, predictors = operation(("x", "y"), rules=(ColumnRule("a", max=4),))
    applied = step.apply(rows(["y", "x", "y", "z", "x"], [5.0, 1.0, 2.0, 3.0, 4.0]))
    assert scores(applied) == [101.0, 202.0, 104.0]
    assert applied.failures.rows.tolist() == [0, 3]
    encodings = sum(predictor.encodings for predictor in predictors)
    assert encodings == (1 if len(_kinds["kinds"]) == 1 else 2)


class TestLazyEvaluator:
    def test_a_model_is_opened_for_rows_and_released(self) -> None:
        opened: list[Plus] = []

        def open() -> tuple[Plus, float]:
            opened.append(Plus(1.0))
            return opened[-1], 0.25

        lazy = LazyEvaluator(VERSION, open)
        assert not lazy.is_out_of_memory(MemoryError())
        table = pa.table({"a": pa.array([1.0], pa.float32())})
        for _ in range(2):
            assert lazy.predict(lazy.encode(table), kind="prediction").tolist() == [2.0]
            lazy.release()
        assert (len(opened), lazy.loads, lazy.seconds) == (2, 2, 0.5)

    def test_the_scorer_releases_each_model_behind_its_rows(self) -> None:
        member = ScoreRecipe(VERSION, ("a",), "prediction", ("p",))
        recipe = KeyedRecipe("key", ("x", "y"), (member, member))
        lazies = [LazyEvaluator(VERSION, lambda: (Plus(1.0), 0.0)) for _ in range(2)]
        scorer = KeyedScorer(recipe, [ModelScorer(member, lazy) for lazy in lazies], lazies)
        scorer.score(rows(["x", "y"]))
        assert all(lazy._predictor is None for lazy in lazies)


def test_a_recipe_of_many_models_is_small() -> None:
    features = tuple(Feature(f"feature_{number}") for number in range(40))
    rules = tuple(ColumnRule(f"feature_{number}", finite=True) for number in range(40))

    def member(number: int) -> ScoreRecipe:
        version = replace(
            VERSION, uri=f"/m/{number}.ubj", digest=f"{number:064d}", features=pickle.loads(pickle.dumps(features))
        )
        return ScoreRecipe(version, tuple(one.name for one in features), "prediction", ("p",), rules)

    members = KeyedRecipe.shared(map(member, range(200)))
    assert members == tuple(map(member, range(200)))
    assert len(pickle.dumps(members)) < 100_000
