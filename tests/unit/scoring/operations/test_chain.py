"""A recipe's chain of steps: each operation gets the rows and the columns that the one before it left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.common.agreement import Agreement, compare_scores
from pipeline.errors import StepFailed
from pipeline.models.model import Feature, ModelVersion
from pipeline.plan.recipe import (
    CheckRecipe,
    ColumnRule,
    EnsembleRecipe,
    FilterRecipe,
    MapRecipe,
    ScoreRecipe,
    SelectRecipe,
    Shadow,
    StageRecipe,
    StepRecipe,
)
from pipeline.scoring.operations.chain import open_operations
from pipeline.scoring.operations.maps import MapOperation
from pipeline.scoring.operations.scores import ScoreOperation
from pipeline.scoring.rows import Rows
from pipeline.scoring.scorer import ScoredBatch, Scorer
from pipeline.scoring.steps import Step
from pipeline.testing.recipes import make_batch, make_recipe

VERSION = ModelVersion("m", "1", "/m.ubj", "0" * 64, "xgboost", 10, (Feature("a", "float"),), "regression", 1)


class Plus:
    """A predictor that adds a number to its only feature, and counts the rows it sees."""

    def __init__(self, number: float, *, fails_at: float | None = None) -> None:
        self.version = VERSION
        self.number = number
        self.fails_at = fails_at
        self.rows = 0

    def encode(self, table: pa.Table, *, order: str = "C") -> np.ndarray:
        return np.column_stack([column.to_numpy().astype(np.float32) for column in table.columns])

    def predict(self, matrix: np.ndarray, *, kind: str) -> np.ndarray:
        if self.fails_at in matrix:
            raise ValueError("cannot")
        self.rows += len(matrix)
        return matrix[:, 0] + np.float32(self.number)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return False


def score_of(feature: str, output: str, **fields: Any) -> ScoreRecipe:
    return ScoreRecipe(VERSION, (feature,), "prediction", (output,), **fields)


def recipe_of(*chain: StepRecipe, table: pa.Table, output: pa.Schema) -> StageRecipe:
    made = make_recipe(VERSION, table.schema, keep=())
    return replace(made, chain=chain, output_schema=output.serialize().to_pybytes())


def run(recipe: StageRecipe, table: pa.Table, *predictors: Plus, steps: tuple[Step, ...] = ()) -> ScoredBatch:
    return Scorer(recipe, predictors, steps).score_batch(make_batch(table), paths=("part.parquet",))


TABLE = pa.table({"id": np.arange(6), "a": np.arange(6, dtype=np.float32)})
FLOAT = pa.float32()


def test_a_later_score_uses_the_output_of_an_earlier_one() -> None:
    output = pa.schema([("id", pa.int64()), ("one", FLOAT), ("two", FLOAT)])
    recipe = recipe_of(score_of("a", "one"), score_of("one", "two"), table=TABLE, output=output)
    scored = run(recipe, TABLE, Plus(1), Plus(10))
    assert scored.table.schema.equals(output)
    assert scored.table["one"].to_pylist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert scored.table["two"].to_pylist() == [11.0, 12.0, 13.0, 14.0, 15.0, 16.0]


def test_a_map_step_behind_a_score_gets_its_output() -> None:
    def double(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(one=frame["one"] * 2)[frame["id"] != 3]

    output = pa.schema([("two", FLOAT), ("id", pa.int64())])
    chain = score_of("a", "one"), MapRecipe("m:double"), score_of("one", "two")
    scored = run(
        recipe_of(*chain, table=TABLE, output=output), TABLE, Plus(1), Plus(0), steps=(Step("m:double", double),)
    )
    assert scored.table.to_pydict() == {"two": [2.0, 4.0, 6.0, 10.0, 12.0], "id": [0, 1, 2, 4, 5]}
    assert scored.filtered.tolist() == [1]


def test_a_rejected_row_is_rejected_once_and_not_seen_by_later_steps() -> None:
    output = pa.schema([("id", pa.int64()), ("two", FLOAT)])
    first, second = Plus(1, fails_at=2.0), Plus(0)
    chain = score_of("a", "one"), score_of("one", "two", rules=(ColumnRule("one", max=5),))
    scored = run(recipe_of(*chain, table=TABLE, output=output), TABLE, first, second)
    assert scored.table["id"].to_pylist() == [0, 1, 3, 4]
    assert scored.rejects is not None
    assert scored.rejects["id"].to_pylist() == [2, 5]
    assert scored.rejects["_reason"].to_pylist() == ["score:ValueError", "contract:one:max"]
    assert (first.rows, second.rows) == (5, 4)


def test_scores_replace_a_column_of_their_name() -> None:
    output = pa.schema([("id", pa.int64()), ("a", FLOAT)])
    recipe = recipe_of(score_of("a", "a"), score_of("a", "a"), table=TABLE, output=output)
    scored = run(recipe, TABLE, Plus(1), Plus(10))
    assert scored.table["a"].to_pylist() == [11.0, 12.0, 13.0, 14.0, 15.0, 16.0]


def test_consecutive_map_steps_are_one_operation() -> None:
    chain = MapRecipe("m:f"), MapRecipe("m:g"), score_of("a", "one"), MapRecipe("m:h")
    steps = [Step(f"m:{name}", lambda frame: frame) for name in "fgh"]
    recipe = recipe_of(*chain, table=TABLE, output=pa.schema([("one", FLOAT)]))
    operations = open_operations(recipe, steps=steps, predictors=[Plus(1)])
    assert [type(operation) for operation in operations] == [MapOperation, ScoreOperation, MapOperation]


def test_a_column_that_no_step_makes_is_named() -> None:
    recipe = recipe_of(score_of("one", "two"), table=TABLE, output=pa.schema([("two", FLOAT)]))
    (operation,) = open_operations(recipe, steps=[], predictors=[Plus(1)])
    with pytest.raises(StepFailed, match="a column is missing after the steps") as caught:
        operation.apply(Rows.from_table(TABLE))
    assert caught.value.expected == "one"


class TestWhere:
    OUTPUT = pa.schema([("id", pa.int64()), ("one", FLOAT)])

    def run(self, where: str, predictor: Plus, *rules: ColumnRule) -> ScoredBatch:
        recipe = recipe_of(score_of("a", "one", where=where, rules=rules), table=TABLE, output=self.OUTPUT)
        return run(recipe, TABLE, predictor)

    def test_only_those_rows_are_scored_and_others_are_null(self) -> None:
        predictor = Plus(1)
        scored = self.run("id == 1 or id > 3", predictor)
        assert scored.table.to_pydict() == {"id": [0, 1, 2, 3, 4, 5], "one": [None, 2.0, None, None, 5.0, 6.0]}
        assert predictor.rows == 3

    def test_no_row_is_scored(self) -> None:
        assert self.run("id > 9", Plus(1)).table["one"].to_pylist() == [None] * 6

    def test_rows_that_fail_are_rejected_and_others_stay_in_place(self) -> None:
        scored = self.run("id > 1", Plus(1, fails_at=3.0), ColumnRule("a", max=4, finite=True))
        assert scored.table.to_pydict() == {"id": [0, 1, 2, 4], "one": [None, None, 3.0, 5.0]}
        assert scored.rejects is not None
        assert scored.rejects["_reason"].to_pylist() == ["score:ValueError", "contract:a:max"]

    def test_rules_hold_for_the_rows_that_are_scored_only(self) -> None:
        table = TABLE.set_column(1, "a", pa.array([0, np.inf, 2, 3, 4, np.inf], FLOAT))
        score = score_of("a", "one", where="id < 3", rules=(ColumnRule("a", finite=True),))
        scored = run(recipe_of(score, table=table, output=self.OUTPUT), table, Plus(1))
        assert scored.table["id"].to_pylist() == [0, 2, 3, 4, 5]


def test_filter_select_and_check_steps_work_between_others() -> None:
    chain = (
        SelectRecipe((("key", "id"), ("b", "a"))),
        FilterRecipe("key != 2"),
        CheckRecipe((ColumnRule("b", max=4),)),
        score_of("b", "one"),
        FilterRecipe("one > 1.5"),
    )
    output = pa.schema([("key", pa.int64()), ("one", FLOAT)])
    scored = run(recipe_of(*chain, table=TABLE, output=output), TABLE, Plus(1))
    assert scored.table.to_pydict() == {"key": [1, 3, 4], "one": [2.0, 4.0, 5.0]}
    assert (scored.filtered.tolist(), scored.rejected.tolist()) == ([2], [1])


class TestEnsemble:
    OUTPUT = pa.schema([("id", pa.int64()), ("p", FLOAT)])

    def run(self, *predictors: Plus, where: str | None = None, rules: tuple[ColumnRule, ...] = ()) -> ScoredBatch:
        members = tuple(score_of("a", "p", rules=rules if number else ()) for number in range(len(predictors)))
        step = EnsembleRecipe(members, "mean", where=where)
        return run(recipe_of(step, table=TABLE, output=self.OUTPUT), TABLE, *predictors)

    def test_scores_are_combined(self) -> None:
        assert self.run(Plus(0), Plus(2), Plus(4)).table["p"].to_pylist() == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]

    def test_a_row_that_one_model_rejects_is_rejected_once(self) -> None:
        first, second = Plus(0, fails_at=1.0), Plus(2, fails_at=4.0)
        scored = self.run(first, second, rules=(ColumnRule("a", min=1.5),))
        assert scored.table.to_pydict() == {"id": [2, 3, 5], "p": [3.0, 4.0, 6.0]}
        assert scored.rejects is not None
        assert dict(zip(scored.rejects["id"].to_pylist(), scored.rejects["_reason"].to_pylist(), strict=True)) == {
            0: "contract:a:min", 1: "score:ValueError", 4: "score:ValueError",
        }  # fmt: skip

    def test_only_chosen_rows_are_scored(self) -> None:
        scored = self.run(Plus(0), Plus(2, fails_at=5.0), where="id > 3")
        assert scored.table.to_pydict() == {"id": [0, 1, 2, 3, 4], "p": [None, None, None, None, 5.0]}


class TestShadow:
    OUTPUT = pa.schema([("id", pa.int64()), ("one", FLOAT), ("two", FLOAT)])

    def run(self, challenger: Plus, *rules: ColumnRule, **fields: Any) -> ScoredBatch:
        shadow = score_of("a", "two", rules=rules, shadow=Shadow("one", "half"), **fields)
        recipe = recipe_of(score_of("a", "one"), shadow, table=TABLE, output=self.OUTPUT)
        return run(recipe, TABLE, Plus(-2), challenger)

    def test_scores_are_compared_row_by_row(self) -> None:
        scored = self.run(Plus(-3))
        found = scored.agreements["two"]
        expected = compare_scores(np.arange(6.0) - 3, np.arange(6.0) - 2, decision="half")
        assert replace(found, seconds=0.0, other_seconds=0.0) == expected
        assert found.agreed == 5

    def test_the_predictions_of_both_are_timed(self) -> None:
        found = self.run(Plus(-3)).agreements["two"]
        assert 0 < found.seconds < 60 > found.other_seconds > 0

    def test_rows_that_fail_are_counted_and_stay(self) -> None:
        scored = self.run(Plus(-2, fails_at=3.0), ColumnRule("a", max=4))
        assert scored.table["two"].to_pylist() == [-2.0, -1.0, 0.0, None, 2.0, None]
        assert (scored.rejects, scored.rejected.tolist()) == (None, [0])
        assert counted(scored) == Agreement(rows=4, agreed=4, errors=2)

    def test_only_chosen_rows_are_compared(self) -> None:
        assert counted(self.run(Plus(-2), where="id > 3")) == Agreement(rows=2, agreed=2)

    def test_a_challenger_that_fails_on_every_row_does_not_fail_the_batch(self) -> None:
        table = pa.table({"id": np.arange(2000), "a": np.zeros(2000, np.float32)})
        shadow = score_of("a", "two", shadow=Shadow("one"))
        recipe = recipe_of(score_of("a", "one"), shadow, table=table, output=self.OUTPUT)
        scored = run(recipe, table, Plus(1), Plus(1, fails_at=0.0))
        assert scored.table.num_rows == 2000
        assert counted(scored) == Agreement(errors=2000)

    def test_a_halved_batch_is_compared_once(self) -> None:
        table = pa.table({"id": np.arange(5000), "a": np.arange(5000, dtype=np.float32)})
        shadow = score_of("a", "two", shadow=Shadow("one", "half"))
        chain = score_of("a", "one"), shadow, score_of("a", "three")
        output = self.OUTPUT.append(pa.field("three", FLOAT))
        scored = run(recipe_of(*chain, table=table, output=output), table, Plus(0), Plus(0), Small(0))
        assert counted(scored) == Agreement(rows=5000, agreed=5000)


def counted(scored: ScoredBatch) -> Agreement:
    """The comparison of the column two without histogram and times."""
    return replace(scored.agreements["two"], histogram={}, seconds=0.0, other_seconds=0.0)


class Small(Plus):
    """A predictor without memory for many rows."""

    def predict(self, matrix: np.ndarray, *, kind: str) -> np.ndarray:
        if len(matrix) > 2000:
            raise MemoryError
        return super().predict(matrix, kind=kind)
