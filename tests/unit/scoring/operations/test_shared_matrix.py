"""Models with the same columns share one matrix, and nothing else: each result is that of the model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.models.model import Feature, ModelVersion
from pipeline.plan.recipe import (
    ColumnRule,
    EnsembleRecipe,
    FilterRecipe,
    MapRecipe,
    ScoreRecipe,
    SelectRecipe,
    StepRecipe,
)
from pipeline.scoring.operations.shared_matrix import encoding_key, share_matrices
from pipeline.scoring.scorer import ScoredBatch, Scorer
from pipeline.scoring.steps import Step
from pipeline.testing.recipes import make_batch, make_recipe

VERSION = ModelVersion("m", "1", "/m.ubj", "0" * 64, "xgboost", 10, (Feature("a"),), "regression", 1)
TABLE = pa.table({"id": np.arange(6), "a": np.arange(6, dtype=np.float32)})


class Plus:
    """A predictor that adds a number, and counts the tables that it encodes."""

    def __init__(self, number: float, *, fails_at: float | None = None) -> None:
        self.version = VERSION
        self.number = number
        self.fails_at = fails_at
        self.encoded = 0

    def encode(self, table: pa.Table, *, order: str = "C") -> np.ndarray:
        self.encoded += 1
        return np.column_stack([column.to_numpy().astype(np.float32) for column in table.columns])

    def example(self) -> np.ndarray:
        return np.zeros((1, 1), np.float32)

    def predict(self, matrix: np.ndarray, *, kind: str) -> np.ndarray:
        if self.fails_at in matrix:
            raise ValueError("cannot")
        return matrix[:, 0] + np.float32(self.number)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return False


def score(output: str, *, feature: str = "a", rules: tuple[ColumnRule, ...] = (), **fields: str) -> ScoreRecipe:
    return ScoreRecipe(VERSION, (feature,), "prediction", (output,), rules, **fields)  # type: ignore[arg-type]


def run(
    chain: Sequence[StepRecipe], predictors: Sequence[Plus], *, steps: Sequence[Step] = (), table: pa.Table = TABLE
) -> tuple[ScoredBatch, Scorer]:
    outputs = [name for step in chain if isinstance(step, (ScoreRecipe, EnsembleRecipe)) for name in step.outputs]
    schema = pa.schema([("id", pa.int64()), *((name, pa.float32()) for name in outputs)])
    recipe = replace(make_recipe(VERSION, table.schema, keep=()), chain=tuple(chain))
    recipe = replace(recipe, output_schema=schema.serialize().to_pybytes())
    scorer = Scorer(recipe, predictors, steps)
    return scorer.score_batch(make_batch(table), paths=("part.parquet",)), scorer


def test_two_models_of_the_same_columns_make_one_matrix() -> None:
    predictors = [Plus(1), Plus(10), Plus(100)]
    scored, scorer = run([score("p"), score("q"), score("r")], predictors)
    assert [predictor.encoded for predictor in predictors] == [1, 0, 0]
    assert scored.table["r"].to_pylist() == [100.0, 101.0, 102.0, 103.0, 104.0, 105.0]
    other = TABLE.set_column(1, "a", pa.array(np.arange(6, 12, dtype=np.float32)))
    again = scorer.score_batch(make_batch(other), paths=("part.parquet",))
    assert again.table["q"].to_pylist() == [16.0, 17.0, 18.0, 19.0, 20.0, 21.0]
    assert [predictor.encoded for predictor in predictors] == [2, 0, 0]


def test_the_models_of_a_list_make_one_matrix() -> None:
    predictors = [Plus(1), Plus(3)]
    scored, _ = run([EnsembleRecipe((score("p"), score("p")), "mean")], predictors)
    assert [predictor.encoded for predictor in predictors] == [1, 0]
    assert scored.table["p"].to_pylist() == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_a_renamed_column_has_the_same_matrix() -> None:
    predictors = [Plus(1), Plus(2)]
    chain = score("p"), SelectRecipe((("id", "id"), ("p", "p"), ("b", "a"))), replace(score("q"), features=("b",))
    scored, _ = run(chain, predictors)
    # The columns of the spec differ, so nothing is shared; the scores are right.
    assert scored.table["q"].to_pylist() == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert [predictor.encoded for predictor in predictors] == [1, 1]


@pytest.mark.parametrize(
    ("between", "fails_at"),
    [
        (FilterRecipe("a > 1"), None),
        (SelectRecipe((("id", "id"), ("p", "p"), ("a", "p"))), None),
        (MapRecipe("m:f"), None),
        (None, 3.0),
    ],
    ids=["filter", "another column of the name", "map", "a rejected row"],
)
def test_other_rows_or_another_column_make_a_matrix_of_their_own(
    between: StepRecipe | None, fails_at: float | None
) -> None:
    def double(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(a=frame["a"] * np.float32(2))

    predictors = [Plus(1, fails_at=fails_at), Plus(10)]
    chain = [score("p"), *([] if between is None else [between]), score("q")]
    scored, _ = run(chain, predictors, steps=(Step("m:f", double),) if isinstance(between, MapRecipe) else ())
    assert [predictor.encoded for predictor in predictors] == [1, 1]
    a = {FilterRecipe: lambda row: row, SelectRecipe: lambda row: row + 1, MapRecipe: lambda row: 2 * row}
    value = a.get(type(between), lambda row: row)
    assert scored.table["q"].to_pylist() == [value(row) + 10.0 for row in scored.table["id"].to_pylist()]


def test_rules_of_the_second_model_are_checked_on_the_shared_matrix() -> None:
    predictors = [Plus(1), Plus(10)]
    scored, _ = run([score("p"), score("q", rules=(ColumnRule("a", max=3),))], predictors)
    assert scored.table["id"].to_pylist() == [0, 1, 2, 3]
    assert scored.rejects is not None
    assert scored.rejects["_reason"].to_pylist() == ["contract:a:max"] * 2
    finite = TABLE.set_column(1, "a", pa.array([0, 1, np.inf, 3, 4, 5], pa.float32()))
    scored, _ = run([score("p"), score("q", rules=(ColumnRule("a", finite=True),))], predictors, table=finite)
    assert scored.rejects is not None
    assert scored.rejects["_reason"].to_pylist() == ["contract:a:finite"]


def test_only_equal_encodings_are_shared() -> None:
    def version(*features: Feature) -> ScoreRecipe:
        return replace(score("p"), model=replace(VERSION, features=features))

    same = version(Feature("other name"))
    assert encoding_key(score("p")) == encoding_key(same)
    for other in (version(Feature("a", "integer")), version(Feature("a", "category", (1,))), score("p", feature="b")):
        assert encoding_key(other) != encoding_key(same)
        assert share_matrices([same, other]) == [None, None]
    assert encoding_key(version(Feature("a", "category", (1,)))) != encoding_key(
        version(Feature("a", "category", (True,)))
    )


def test_no_matrix_is_held_behind_the_last_model() -> None:
    one, two, three = share_matrices([score("p"), score("q"), score("r")])
    assert one is not None
    assert two is not None
    assert three is not None
    assert one._place is two._place is three._place
    _, scorer = run([score("p"), score("q")], [Plus(1), Plus(2)])
    places = [operation._scorer._shared._place for operation in scorer._operations]  # type: ignore[attr-defined]
    assert places == [[], []]
