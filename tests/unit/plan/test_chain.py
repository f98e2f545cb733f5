"""The steps of a job, resolved: what is read, written and checked, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import PipelineError, SchemaDrift, SpecError
from pipeline.models.model import Feature, ModelVersion
from pipeline.plan.chain import ResolvedChain, ScoredBy, resolve_chain
from pipeline.plan.recipe import (
    CheckRecipe,
    ColumnRule,
    FilterRecipe,
    KeyedRecipe,
    MapRecipe,
    ScoreRecipe,
    SelectRecipe,
    Shadow,
)
from pipeline.plan.step_record import step_from_record, step_to_record
from pipeline.sources.discovery import Discovery
from pipeline.spec.job_spec import JobSpec

SOURCE = pa.schema([("id", pa.int64()), ("x", pa.float64()), ("y", pa.float32()), ("text", pa.string())])


def model(*features: str) -> ModelVersion:
    return ModelVersion("m", "1", "/m.ubj", "0" * 64, "xgboost", 10, tuple(map(Feature, features)), "regression", 1)


def resolve(
    *steps: dict[str, Any], models: tuple[ModelVersion, ...] = (), frames: tuple[pa.Schema, ...] = (), **fields: Any
) -> ResolvedChain:
    spec = JobSpec.build(**{"name": "j", "source": {"path": "/in"}, "sink": {"path": "/out"}, "steps": steps, **fields})
    scored = [
        ScoredBy((version,), pa.schema([(score.output_spec.column, pa.float32())]))
        for version, score in zip(models, spec.scores, strict=True)
    ]
    discovery = Discovery((), SOURCE, (), tuple(SOURCE.names))
    return resolve_chain(spec, discovery=discovery, map_schemas=frames, scored=scored)


def score(output: str = "p", **fields: Any) -> dict[str, Any]:
    return {"score": {"model": "m.ubj", "output": output, **fields}}


class TestRead:
    def test_columns_that_nothing_behind_needs_are_not_read(self) -> None:
        chain = resolve({"filter": "y > 1"}, score(), {"select": ["id", "p"]}, models=(model("x"),))
        assert chain.read == ("id", "x", "y")
        assert chain.output.names == ["id", "p"]
        assert chain.scores == ("p",)

    def test_a_select_is_narrowed_to_what_is_needed(self) -> None:
        chain = resolve({"select": {"a": "x", "b": "y", "c": "text"}}, {"select": ["b"]})
        assert chain.read == ("y",)
        assert chain.recipes == (SelectRecipe((("b", "y"),)), SelectRecipe((("b", "b"),)))

    def test_a_map_step_gets_all_columns_of_the_select_before_it(self) -> None:
        frame = pa.schema([("x", pa.float64())])
        assert resolve({"select": ["x", "y"]}, {"map": "a:b"}, frames=(frame,)).read == ("x", "y")
        assert resolve({"map": "a:b"}, {"select": ["x"]}, frames=(frame,)).read == tuple(SOURCE.names)

    def test_an_output_that_a_later_step_reads_is_no_column_of_the_source(self) -> None:
        chain = resolve(
            score("x_new"), score("q", features=["x_new"]), {"select": ["q"]}, models=(model("x"), model("a"))
        )
        assert chain.read == ("x",)

    def test_contract_and_conditions_are_read(self) -> None:
        chain = resolve(
            {"select": ["id", "x", "y"]},
            score(where="y > 1"),
            {"select": ["id", "p"]},
            models=(model("x"),),
            contract={"text": {"nullable": False}},
            source={"path": "/in", "filter": "x > 0"},
        )
        assert chain.read == ("id", "x", "y", "text")
        assert chain.source_rules == (ColumnRule("text", nullable=False),)


class TestOutput:
    def test_input_columns_that_are_left_then_scores(self) -> None:
        assert resolve(score("p"), score("q"), models=(model("x"), model("p"))).output.names == [
            *SOURCE.names,
            "p",
            "q",
        ]

    def test_what_map_steps_make_is_written_behind_the_last_score(self) -> None:
        made = pa.schema([*SOURCE, ("made", pa.int64())])
        behind = pa.schema([*made, ("p", pa.float32()), ("later", pa.string())])
        steps = {"map": "a:b"}, score(), {"map": "a:c"}
        chain = resolve(*steps, models=(model("made"),), frames=(made, behind))
        assert chain.output.names == [*SOURCE.names, "p", "later"]

    def test_a_job_that_only_prepares_data_writes_all_it_has(self) -> None:
        made = pa.schema([("id", pa.int64()), ("made", pa.int64())])
        assert resolve({"map": "a:b"}, frames=(made,)).output.names == ["id", "made"]

    def test_keep_names_the_columns_beside_the_scores(self) -> None:
        chain = resolve(score(), score("q", keep=["text"]), models=(model("x"), model("p")))
        assert chain.output.names == ["text", "p", "q"]

    def test_a_select_renames(self) -> None:
        chain = resolve({"select": {"customer": "id", "x": "x"}}, score(), models=(model("x"),))
        assert chain.output.equals(pa.schema([("customer", pa.int64()), ("x", pa.float64()), ("p", pa.float32())]))


class TestKeyed:
    """A model for each value of a column."""

    def resolve(self, versions: tuple[ModelVersion, ...], source: pa.Schema = SOURCE, **fields: Any) -> ResolvedChain:
        named = {"by": "text", "models": {"b": "b.ubj", "a": "a.ubj"}, "output": "p", **fields}
        steps = [{"score": named}, {"select": ["p"]}]
        spec = JobSpec.build(name="j", source={"path": "/in"}, sink={"path": "/out"}, steps=steps)
        scored = [ScoredBy(versions, pa.schema([("p", pa.float32())]))]
        discovery = Discovery((), source, (), tuple(source.names))
        return resolve_chain(spec, discovery=discovery, map_schemas=(), scored=scored)

    def test_each_model_has_its_own_features_and_the_key_is_read(self) -> None:
        chain = self.resolve((model("x"), model("y")))
        assert chain.read == ("x", "y", "text")
        keyed = chain.recipes[0]
        assert isinstance(keyed, KeyedRecipe)
        assert (keyed.by, keyed.values, keyed.other) == ("text", ("a", "b"), "reject")
        assert [member.features for member in keyed.members] == [("x",), ("y",)]

    @pytest.mark.parametrize(("other", "expected", "count"), [(None, "null", 2), ("c.ubj", "model", 3)])
    def test_other_rows(self, other: str | None, expected: str, count: int) -> None:
        keyed = self.resolve((model("x"),) * count, other=other).recipes[0]
        assert isinstance(keyed, KeyedRecipe)
        assert (keyed.other, len(keyed.members)) == (expected, count)

    def test_a_column_that_is_missing_or_has_no_text_is_refused(self) -> None:
        with pytest.raises(SpecError, match="the column that chooses the model") as caught:
            self.resolve((model("x"), model("y")), by="tekst")
        assert caught.value.where == "steps.0.score.by"
        with pytest.raises(SpecError, match="cannot choose a model") as caught:
            self.resolve((model("x"), model("y")), by="x")
        assert "double" in caught.value.found

    def test_it_can_be_stored(self) -> None:
        for step in self.resolve((model("x"), model("y")), where="x > 1").recipes:
            assert step_from_record(json.loads(json.dumps(step_to_record(step)))) == step


class TestShadow:
    def test_a_challenger_is_no_column_of_the_output_unless_selected(self) -> None:
        steps = score(), score("q", shadow="p")
        assert resolve(*steps, models=(model("x"), model("y"))).output.names == [*SOURCE.names, "p"]
        chain = resolve(*steps, {"select": ["q"]}, models=(model("x"), model("y")))
        assert (chain.output.names, chain.read) == (["q"], ("x", "y"))

    @pytest.mark.parametrize(
        ("task", "kind", "decision"),
        [("binary", "prediction", "half"), ("binary", "margin", "zero"), ("regression", "prediction", "")],
    )
    def test_what_agrees_depends_on_task_and_output(self, task: Any, kind: str, decision: str) -> None:
        challenger = score({"column": "q", "kind": kind}, shadow="x")  # type: ignore[arg-type]
        (scored,) = resolve(challenger, models=(replace(model("y"), task=task),)).recipes
        assert isinstance(scored, ScoreRecipe)
        assert scored.shadow == Shadow("x", decision)  # type: ignore[arg-type]

    @pytest.mark.parametrize("column", ["text", "none"])
    def test_a_column_that_holds_no_scores_is_refused(self, column: str) -> None:
        with pytest.raises(SpecError) as caught:
            resolve(score("q", shadow=column), models=(model("y"),))
        assert caught.value.where == "steps.0.score.shadow"


class TestRecipes:
    def test_the_first_filters_are_left_to_the_reader(self) -> None:
        kinds = [
            type(recipe) for recipe in resolve({"filter": "x > 1"}, {"select": ["x"]}, {"filter": "x < 9"}).recipes
        ]
        assert kinds == [SelectRecipe]
        chain = resolve({"filter": "x > 1"}, {"map": "a:b"}, {"filter": "x < 9"}, frames=(SOURCE,))
        assert [type(recipe) for recipe in chain.recipes] == [MapRecipe, FilterRecipe]

    def test_the_contract_of_a_made_column_is_checked_right_behind_its_step(self) -> None:
        made = pa.schema([*SOURCE, ("made", pa.int64())])
        chain = resolve(
            {"map": "a:b"},
            score(),
            models=(model("x"),),
            frames=(made,),
            contract={"made": {"max": 3}, "x": {"min": 0}},
        )
        check, scored = chain.recipes[1:]
        assert check == CheckRecipe((ColumnRule("made", max=3),))
        assert isinstance(scored, ScoreRecipe)
        assert scored.rules == (ColumnRule("x", finite=True),)
        assert chain.source_rules == (ColumnRule("x", min=0),)


@pytest.mark.parametrize(
    ("steps", "models", "error", "where", "message"),
    [
        (
            [{"filter": "z > 1"}],
            (),
            SpecError,
            "steps.0.filter",
            "no column 'z', which is needed as a column of a cond",
        ),
        ([{"filter": "x >"}], (), SpecError, "steps.0.filter", "the filter is not understood"),
        ([{"filter": "text > 3"}], (), SpecError, "steps.0.filter", "."),
        ([{"select": ["zz"]}], (), SpecError, "steps.0.select", "the input has no column 'zz'"),
        (
            [{"select": ["x"]}, {"filter": "y > 1"}],
            (),
            SpecError,
            "steps.1.filter",
            "the steps before it return has no",
        ),
        (
            [{"select": ["id"]}, score()],
            (model("x"),),
            SchemaDrift,
            "",
            "has no column 'x', which is needed as a feature",
        ),
        ([score(where="q > 1")], (model("x"),), SpecError, "steps.0.score.where", "no column 'q'"),
        ([score("id"), {"map": "a:b"}], (model("x"),), SpecError, "score.output", "the name of a column that is kept"),
        ([score(), score("q", keep=["no"])], (model("x"), model("p")), SpecError, "score.keep", "no column 'no'"),
    ],
)
def test_a_chain_that_does_not_fit_the_columns_is_refused(
    steps: list[dict[str, Any]], models: tuple[ModelVersion, ...], error: type[PipelineError], where: str, message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        resolve(*steps, models=models, frames=(SOURCE,))
    assert caught.value.where.startswith(where)
    assert "source.filter" not in str(caught.value)


def test_a_contract_of_a_column_that_no_step_makes_is_refused() -> None:
    with pytest.raises(SpecError, match="no column 'made'") as caught:
        resolve({"select": ["x"]}, contract={"made": {"max": 3}})
    assert caught.value.where == "contract.made"
