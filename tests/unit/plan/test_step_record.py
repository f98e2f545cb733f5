"""Resolved steps are the same after they were stored."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pytest

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
    StepRecipe,
)
from pipeline.plan.step_record import step_from_record, step_identity, step_to_record

MODEL = ModelVersion(
    "m", "1", "/m.ubj", "0" * 64, "xgboost", 10, (Feature("a", "category", ("x", "y")),), "regression", 1
)
RULES = (ColumnRule("a", max=3, allowed=("x", "y")),)
FRAME = pa.schema([("a", pa.int64())]).serialize().to_pybytes()


@pytest.mark.parametrize(
    "step",
    [
        MapRecipe("m:f", "pyarrow", "unchecked", FRAME),
        FilterRecipe("a > 1"),
        SelectRecipe((("new", "old"), ("b", "b"))),
        CheckRecipe(RULES),
        ScoreRecipe(MODEL, ("a",), "margin", ("p", "q"), RULES, "trees", 0.5, "a > 1"),
        EnsembleRecipe(
            (ScoreRecipe(MODEL, ("a",), "margin", ("p",)),) * 2, "mean", (1.0, 2.0), "a > 1", Shadow("q", "half")
        ),
    ],
)
def test_a_step_comes_back_from_json(step: StepRecipe) -> None:
    assert step_from_record(json.loads(json.dumps(step_to_record(step)))) == step


def test_the_identity_of_a_score_has_the_content_of_its_model_not_its_place() -> None:
    score = ScoreRecipe(MODEL, ("a",), "prediction", ("p",))
    moved = replace(score, model=replace(MODEL, uri="/elsewhere.ubj", version="2"))
    changed = replace(score, model=replace(MODEL, digest="1" * 64))
    assert step_identity(score) == step_identity(moved) != step_identity(changed)
