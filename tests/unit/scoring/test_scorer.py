"""Score batches: predictions, rejects, counts, and engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.common.sketch import MOST_COLUMNS, Sketches, is_in_sample, sample_keys
from pipeline.errors import BadPrediction, ModelError, OutOfMemory, ReconciliationFailed, SpecError, StepFailed
from pipeline.models.model import Feature, ModelVersion
from pipeline.plan.recipe import REJECT_COLUMNS, ColumnRule, MapRecipe
from pipeline.scoring.operations.scores import ScoreOperation
from pipeline.scoring.outputs import prediction_schema, reject_schema
from pipeline.scoring.rows import Rows
from pipeline.scoring.scorer import MIN_HALVED_ROWS, ScoredBatch, Scorer
from pipeline.scoring.step_plan import plan_frames
from pipeline.scoring.steps import Step
from pipeline.sources import SourceBatch
from pipeline.spec.score import Output
from pipeline.testing.recipes import make_batch, make_recipe

VERSION = ModelVersion(
    "sum", "1", "sum.model", "0" * 64, "xgboost", 1, (Feature("a"), Feature("b")), "regression", 1, trees=3
)


class Sum:
    """A predictor that adds its features up, and does as it is told otherwise."""

    version = VERSION

    def __init__(self, *, most_rows: int | None = None, fails: Callable[[np.ndarray], bool] | None = None) -> None:
        self.most_rows = most_rows
        self.fails = fails
        self.sizes: list[int] = []
        self.answer: Callable[[np.ndarray], Any] = lambda matrix: np.nansum(matrix, axis=1, dtype=np.float32)

    def encode(self, table: pa.Table) -> np.ndarray:
        with np.errstate(over="ignore"):
            columns = [column.to_numpy(zero_copy_only=False).astype(np.float32) for column in table.columns]
        return np.column_stack(columns)

    def predict(self, matrix: np.ndarray, *, kind: str) -> np.ndarray:
        self.sizes.append(len(matrix))
        if self.most_rows is not None and len(matrix) > self.most_rows:
            raise MemoryError("too many rows")
        if self.fails is not None and self.fails(matrix):
            raise ValueError("cannot")
        result: np.ndarray = self.answer(matrix)
        return result

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)


def table_of(rows: int) -> pa.Table:
    return pa.table(
        {
            "id": np.arange(rows),
            "a": np.arange(rows, dtype=np.float64),
            "b": np.ones(rows, np.float32),
            "name": pa.array([f"n{i}" if i % 3 else None for i in range(rows)]),
        }
    )


def scorer_of(table: pa.Table, predictor: Sum | None = None, *, steps: Sequence[Step] = (), **fields: Any) -> Scorer:
    maps = [MapRecipe(step.entrypoint) for step in steps]
    recipe = make_recipe(VERSION, table.schema, maps=maps, **fields)
    return Scorer(recipe, [predictor or Sum()], steps)


def score(table: pa.Table, predictor: Sum | None = None, **fields: Any) -> ScoredBatch:
    return scorer_of(table, predictor, **fields).score_batch(make_batch(table), paths=("part.parquet",))


def reasons(scored: ScoredBatch) -> dict[int, str]:
    if scored.rejects is None:
        return {}
    return dict(zip(scored.rejects["_row"].to_pylist(), scored.rejects["_reason"].to_pylist(), strict=True))


def test_rows_come_out_with_their_scores_in_order() -> None:
    table = table_of(10)
    scored = score(table)
    assert scored.table.schema.equals(table.schema.append(pa.field("prediction", pa.float32())))
    assert scored.table.select(table.column_names).equals(table)
    assert scored.table["prediction"].to_pylist() == [i + 1.0 for i in range(10)]
    assert scored.rejects is None
    assert scored.fragment.tolist() == [0] * 10
    assert (scored.rejected.tolist(), scored.filtered.tolist()) == ([0], [0])


def test_keep_and_output_columns_are_the_ones_asked_for() -> None:
    scored = score(table_of(3), keep=("name",), output=Output(column="p"))
    assert scored.table.column_names == ["name", "p"]
    assert score(table_of(3), keep=()).table.column_names == ["prediction"]


def test_several_values_a_row_become_columns() -> None:
    version = replace(VERSION, outputs=3)
    predictor = Sum()
    predictor.answer = lambda matrix: np.arange(matrix.shape[0] * 3, dtype=np.float32).reshape(-1, 3)
    recipe = make_recipe(version, table_of(4).schema, keep=("id",), output=Output(column="p"))
    scored = Scorer(recipe, [predictor]).score_batch(make_batch(table_of(4)))
    assert scored.table.column_names == ["id", "p_0", "p_1", "p_2"]
    assert scored.table["p_1"].to_pylist() == [1.0, 4.0, 7.0, 10.0]


@pytest.mark.fault(24)
def test_contract_rejects_before_scoring_with_a_reason() -> None:
    table = table_of(6)
    table = table.set_column(1, "a", pa.array([0.0, float("inf"), 1e300, None, 7.0, 5.0]))
    rules = (ColumnRule("a", finite=True, max=6), ColumnRule("id", max=4))
    scored = score(table, source_rules=rules)
    assert reasons(scored) == {1: "contract:a:max", 2: "contract:a:max", 4: "contract:a:max", 5: "contract:id:max"}
    without_max = score(table, source_rules=rules[1:])
    assert reasons(without_max) == {1: "contract:a:finite", 2: "contract:a:finite", 5: "contract:id:max"}
    assert without_max.table["id"].to_pylist() == [0, 3, 4]
    assert without_max.table["prediction"].to_pylist() == [1.0, 1.0, 8.0]
    assert without_max.rejects is not None
    assert without_max.rejects.schema.equals(reject_schema(table.schema))
    first = without_max.rejects.slice(0, 1).to_pylist()[0]
    assert first == {
        "id": 1, "a": float("inf"), "b": 1.0, "name": "n1", "_file": "part.parquet", "_row": 1,
        "_reason": "contract:a:finite", "_message": "a is inf, which is not a finite float32",
    }  # fmt: skip
    assert without_max.rejects.column_names[-4:] == list(REJECT_COLUMNS)


def test_rows_are_accounted_for_per_fragment() -> None:
    table = table_of(8)
    batch = SourceBatch(
        table,
        np.array([0, 0, 0, 2, 2, 2, 2, 2], np.int32),
        np.array([5, 6, 7, 0, 1, 2, 3, 4], np.int64),
        np.array([1, 10, 0], np.int64),
    )
    drop = Step("f:drop", lambda frame: frame[~frame["id"].isin([1, 4, 5])])
    scorer = scorer_of(table, steps=[drop], source_rules=(ColumnRule("id", max=6),))
    scored = scorer.score_batch(batch, paths=("x", "y", "z"))
    assert scored.table["id"].to_pylist() == [0, 2, 3, 6]
    assert scored.fragment.tolist() == [0, 0, 2, 2]
    assert scored.rejected.tolist() == [0, 0, 1]
    assert scored.filtered.tolist() == [2, 10, 2]
    assert scored.rejects is not None
    assert scored.rejects.select(["_file", "_row"]).to_pylist() == [{"_file": "z", "_row": 4}]


def test_batch_without_rows_counts_filtered_rows() -> None:
    batch = replace(make_batch(table_of(0)), filtered=np.array([7], np.int64))
    scored = scorer_of(table_of(0)).score_batch(batch)
    assert scored.table.num_rows == 0
    assert "prediction" in scored.table.column_names
    assert scored.filtered.tolist() == [7]


@pytest.mark.fault(22)
def test_rows_on_which_a_step_raises_are_rejected_with_their_traceback() -> None:
    def build(frame: pd.DataFrame) -> pd.DataFrame:
        if frame["id"].isin([3, 40]).any():
            raise ValueError("odd row")
        return frame.assign(a=frame["a"] * 2)

    table = table_of(100)
    scored = score(table, steps=[Step("f:build", build)])
    assert reasons(scored) == {3: "step:f:build:ValueError", 40: "step:f:build:ValueError"}
    good = [i for i in range(100) if i not in (3, 40)]
    assert scored.table["id"].to_pylist() == good
    assert scored.table["prediction"].to_pylist() == [2.0 * i + 1 for i in good]
    assert scored.rejects is not None
    message = scored.rejects["_message"][0].as_py()
    assert message.startswith("ValueError: odd row")
    assert 'raise ValueError("odd row")' in message


def test_rows_on_which_the_model_raises_are_rejected() -> None:
    predictor = Sum(fails=lambda matrix: bool(np.isin(matrix[:, 0], [3, 40]).any()))
    scored = score(table_of(100), predictor)
    assert reasons(scored) == {3: "score:ValueError", 40: "score:ValueError"}
    assert scored.table["prediction"].to_pylist() == [i + 1.0 for i in range(100) if i not in (3, 40)]


def test_contract_steps_and_model_reject_each_row_once() -> None:
    def build(frame: pd.DataFrame) -> pd.DataFrame:
        if (frame["id"] % 10 == 3).any():
            raise KeyError("three")
        return frame[frame["id"] % 10 != 5].assign(
            b=np.where(frame["id"] % 10 == 7, np.inf, 1.0)[frame["id"] % 10 != 5]
        )

    predictor = Sum(fails=lambda matrix: bool((matrix[:, 0] % 10 == 9).any()))
    rules = (ColumnRule("id", allowed=tuple(i for i in range(200) if i % 10 != 1)),)
    scored = score(table_of(200), predictor, steps=[Step("f:build", build)], source_rules=rules)
    found = reasons(scored)
    wanted = {1: "contract:id:allowed", 3: "step:f:build:KeyError", 7: "contract:b:finite", 9: "score:ValueError"}
    assert found == {i: wanted[i % 10] for i in range(200) if i % 10 in wanted}
    assert scored.filtered.tolist() == [20]
    assert scored.table["id"].to_pylist() == [i for i in range(200) if i % 10 in (0, 2, 4, 6, 8)]


def test_a_broken_step_fails_at_once() -> None:
    calls = 0

    def build(frame: pd.DataFrame) -> pd.DataFrame:
        nonlocal calls
        calls += 1
        raise NameError("naem")

    with pytest.raises(StepFailed, match="fails on every row") as caught:
        score(table_of(20_000), steps=[Step("f:build", build)], batch_rows=20_000)
    assert caught.value.where == "f:build"
    assert "NameError: naem" in caught.value.found
    assert calls < 500


def test_a_broken_model_fails_at_once() -> None:
    with pytest.raises(ModelError, match="fails on every row"):
        score(table_of(5000), Sum(fails=lambda matrix: True))


@pytest.mark.parametrize(
    "answer",
    [
        lambda matrix: np.zeros(len(matrix) + 1, np.float32),
        lambda matrix: np.zeros(len(matrix), np.float64),
        lambda matrix: np.zeros((len(matrix), 2), np.float32),
        lambda matrix: [0.0] * len(matrix),
    ],
)
@pytest.mark.fault(26)
def test_a_predictor_that_gives_something_else_is_refused(answer: Callable[[np.ndarray], Any]) -> None:
    predictor = Sum()
    predictor.answer = answer
    with pytest.raises(BadPrediction, match="one result a row") as caught:
        score(table_of(5), predictor)
    assert caught.value.expected == "float32 [5]"


def test_when_memory_runs_short_the_batch_is_halved_and_grows_back() -> None:
    table = table_of(8192 * 16)
    predictor = Sum(most_rows=3000)
    scorer = scorer_of(table, predictor, batch_rows=8192)
    scored = scorer.score_batch(make_batch(table))
    assert scored.table["prediction"].to_pylist() == [i + 1.0 for i in range(table.num_rows)]
    assert predictor.sizes[:3] == [8192, 4096, 2048]
    assert scorer.batch_rows in (2048, 4096)
    predictor.most_rows = None
    scorer.score_batch(make_batch(table))
    assert scorer.batch_rows == 8192


def test_when_the_floor_does_not_fit_it_is_out_of_memory() -> None:
    table = table_of(8192)
    with pytest.raises(OutOfMemory, match="smallest size") as caught:
        score(table, Sum(most_rows=MIN_HALVED_ROWS - 1), batch_rows=8192)
    assert f"{MIN_HALVED_ROWS:,} rows" in caught.value.found


class LibraryError(Exception):
    """Error that the library of some flavor raises for everything, as ONNX Runtime does."""


def test_the_flavors_own_out_of_memory_error_halves_the_batch_and_blames_no_row() -> None:
    class Device(Sum):
        def predict(self, matrix: np.ndarray, *, kind: str) -> np.ndarray:
            if len(matrix) > 2000:
                raise LibraryError("bad_alloc")
            return super().predict(matrix, kind=kind)

        def is_out_of_memory(self, error: BaseException) -> bool:
            return isinstance(error, LibraryError) and "bad_alloc" in str(error)

    table, predictor = table_of(8192), Device()
    scorer = scorer_of(table, predictor, batch_rows=8192)
    scored = scorer.score_batch(make_batch(table), paths=("part.parquet",))
    assert scored.table.num_rows == 8192
    assert scored.rejects is None
    assert scorer.batch_rows < 8192
    assert max(predictor.sizes) <= 2000


def test_another_message_of_the_same_error_type_blames_the_row() -> None:
    class Picky(Sum):
        def predict(self, matrix: np.ndarray, *, kind: str) -> np.ndarray:
            if len(matrix) > 1 or self.sizes == []:
                self.sizes.append(len(matrix))
                raise LibraryError("invalid value")
            return super().predict(matrix, kind=kind)

        def is_out_of_memory(self, error: BaseException) -> bool:
            return isinstance(error, LibraryError) and "bad_alloc" in str(error)

    table = table_of(8)
    scorer = scorer_of(table, Picky(), batch_rows=8)
    scored = scorer.score_batch(make_batch(table), paths=("part.parquet",))
    assert (scored.table.num_rows, scorer.batch_rows) == (8, 8)


def test_a_step_may_run_out_of_memory_too() -> None:
    def build(frame: pd.DataFrame) -> pd.DataFrame:
        if len(frame) > 2000:
            raise MemoryError
        return frame

    scored = score(table_of(5000), steps=[Step("f:build", build)])
    assert scored.table.num_rows == 5000
    assert scored.rejects is None


def test_a_made_column_is_cast_to_the_type_of_the_sample() -> None:
    table = table_of(5)
    frame = table.schema.append(pa.field("n", pa.int64())).append(pa.field("c", pa.dictionary(pa.int32(), pa.string())))
    good = Step("f:good", lambda frame: frame.assign(n=frame["id"] * 1.0, c=frame["name"].astype("category")))
    scored = score(table, steps=[good], frame=frame)
    assert scored.table.schema.field("n").type == pa.int64()
    assert scored.table.schema.field("c").type == pa.dictionary(pa.int32(), pa.string())
    assert scored.table["c"].to_pylist() == table["name"].to_pylist()
    bad = Step("f:bad", lambda frame: frame.assign(n=frame["id"] * 1.5, c="x"))
    with pytest.raises(StepFailed, match="column 'n'") as caught:
        score(table, steps=[bad], frame=frame)
    assert caught.value.expected.startswith("int64")


def test_a_column_that_a_step_lost_is_named() -> None:
    with pytest.raises(StepFailed, match="missing after the steps") as caught:
        score(table_of(5), steps=[Step("f:drop", lambda frame: frame.rename(columns={"name": "nam"}))])
    assert (caught.value.expected, caught.value.next_step) == ("name", "did you mean nam?")


def test_planned_columns_are_what_the_steps_make_of_a_sample(in_folder: Path) -> None:
    (in_folder / "schema_features.py").write_text(
        "def build(frame):\n"
        "    if (frame['id'] == 2).any():\n"
        "        raise ValueError('two')\n"
        "    return frame.drop(columns='b').assign(w='x', n=frame['a'] > 3)\n"
        "def broken(frame):\n"
        "    return frame['nothing']\n"
    )
    table = table_of(9)
    assert plan_frames([], table).schemas == ()
    wanted = [("id", pa.int64()), ("a", pa.float64()), ("name", pa.string()), ("w", pa.string()), ("n", pa.bool_())]
    maps = [MapRecipe("schema_features:build")]
    assert plan_frames(maps, table).schemas == (pa.schema(wanted),)
    assert plan_frames(maps, table.slice(0, 0)).schemas[0].names == ["id", "a", "name", "w", "n"]
    with pytest.raises(StepFailed, match="every row of a sample") as caught:
        plan_frames([MapRecipe("schema_features:broken")], table)
    assert "KeyError: 'nothing'" in caught.value.found


def test_outputs_have_names_types_and_limits() -> None:
    version = replace(VERSION, task="multiclass", outputs=1, margins=3, trees=6)
    assert prediction_schema(version, Output(column="p")).equals(pa.schema([("p", pa.float32())]))
    assert prediction_schema(version, Output(column="p", kind="label")).equals(pa.schema([("p", pa.int32())]))
    assert prediction_schema(version, Output(column="p", kind="margin")).names == ["p_0", "p_1", "p_2"]
    assert prediction_schema(version, Output(column="p", kind="leaf")).field(5).type == pa.int32()
    assert len(prediction_schema(version, Output(column="p", kind="contributions"))) == 9
    with pytest.raises(SpecError, match="no output of the kind 'label'") as caught:
        prediction_schema(VERSION, Output(column="p", kind="label"))
    assert caught.value.expected == "prediction, margin, leaf, contributions"


@pytest.mark.parametrize("change", ["lost", "doubled"])
def test_rows_that_get_lost_or_doubled_inside_are_not_passed_off_as_filtered(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ScoreOperation.apply

    def wrong(self: ScoreOperation, rows: Rows) -> Any:
        applied = real(self, rows)
        numbers = [0, *range(1, 9)] if change == "lost" else [0, 0, *range(1, 10)]
        return replace(applied, parts=[part.select(np.array(numbers)) for part in applied.parts])

    monkeypatch.setattr(ScoreOperation, "apply", wrong)
    with pytest.raises(ReconciliationFailed, match="unaccounted"):
        score(table_of(10))


def sketched(table: pa.Table) -> dict[str, Any]:
    sketches = Sketches()
    sketches.add(table)
    return sketches.pack()


class TestSketches:
    @pytest.mark.parametrize("most_rows", [None, 3000])
    def test_counts_are_those_of_the_rows_that_were_scored(self, most_rows: int | None) -> None:
        table = table_of(8192 * 3)
        rules = (ColumnRule("a", max=20_000),)
        scored = score(table, Sum(most_rows=most_rows), source_rules=rules, sketch_every=1, batch_rows=8192)
        assert scored.table.num_rows == 20_001
        assert scored.sketches.pack() == sketched(scored.table.select(["a", "b", "prediction"]))

    def test_a_row_that_the_model_rejects_is_not_counted(self) -> None:
        scored = score(table_of(10), Sum(fails=lambda matrix: bool((matrix[:, 0] == 4).any())), sketch_every=1)
        assert reasons(scored) == {4: "score:ValueError"}
        assert scored.sketches.pack() == sketched(scored.table.select(["a", "b", "prediction"]))

    def test_samples_depend_on_row_numbers_and_are_larger_for_scores(self) -> None:
        table = table_of(8192 * 2)
        scored = score(table, sketch_every=64)
        sample = scored.table.filter(pa.array(is_in_sample(sample_keys(np.arange(table.num_rows)), every=64)))
        expected = Sketches()
        expected.add(sample.select(["a", "b"]))
        more = scored.table.filter(pa.array(is_in_sample(sample_keys(np.arange(table.num_rows)), every=2)))
        expected.add(more.select(["prediction"]))
        assert scored.sketches.pack() == expected.pack()

    def test_features_that_a_step_makes_and_the_output_drops(self) -> None:
        def twice(frame: pd.DataFrame) -> pd.DataFrame:
            return frame.assign(a=frame["a"] * 2)

        table = table_of(100)
        steps = [Step("m:twice", twice)]
        scored = scorer_of(table, steps=steps, keep=("id",), sketch_every=1).score_batch(make_batch(table))
        doubled = table.set_column(1, "a", pa.array(np.arange(100) * 2.0)).select(["a", "b"])
        expected = Sketches()
        expected.add(doubled)
        expected.add(scored.table.select(["prediction"]))
        assert scored.sketches.pack() == expected.pack()

    def test_columns_have_a_limit_and_scores_come_first(self) -> None:
        names = [f"f{number}" for number in range(50)]
        version = replace(VERSION, features=tuple(map(Feature, names)))
        table = pa.table({name: np.ones(5, np.float32) for name in names})
        recipe = make_recipe(version, table.schema, keep=(), sketch_every=1)
        assert recipe.sketched_features == tuple(names[: MOST_COLUMNS - 1])
        assert make_recipe(version, table.schema).sketched_features == ()
        assert score(table_of(5)).sketches.pack() == {}
