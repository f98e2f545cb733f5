"""Make the operations of a recipe: consecutive ``map`` steps are one operation, every other step is one of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import pyarrow as pa

from pipeline.models.model import Predictor
from pipeline.plan.recipe import (
    AnyScore,
    CheckRecipe,
    EnsembleRecipe,
    FilterRecipe,
    KeyedRecipe,
    MapRecipe,
    ScoreRecipe,
    SelectRecipe,
    StackRecipe,
    StageRecipe,
    StepRecipe,
    held_steps,
    scores_of,
)
from pipeline.scoring.frame_schemas import FrameSchemas, never_null_after
from pipeline.scoring.operations.checks import CheckOperation
from pipeline.scoring.operations.ensemble import EnsembleScorer
from pipeline.scoring.operations.filters import FilterOperation
from pipeline.scoring.operations.keyed import KeyedScorer
from pipeline.scoring.operations.maps import MapOperation
from pipeline.scoring.operations.model_scorer import ModelScorer
from pipeline.scoring.operations.operation import Operation, RowScorer
from pipeline.scoring.operations.scores import ScoreOperation
from pipeline.scoring.operations.selects import SelectOperation
from pipeline.scoring.operations.shared_matrix import share_matrices
from pipeline.scoring.operations.stack import StackScorer
from pipeline.scoring.steps import Step


def open_operations(
    recipe: StageRecipe, *, steps: Sequence[Step], predictors: Sequence[Predictor]
) -> tuple[Operation, ...]:
    """Return the operations of a recipe, in order.

    :param steps: functions of the ``map`` steps, in order.
    :param predictors: loaded models of the ``score`` steps, in order; the members of an ensemble one by one.
    """
    builder = _Builder(recipe, iter(steps), iter(predictors))
    return tuple(builder.open(number, group) for number, group in _groups(recipe.chain))


def _groups(chain: Sequence[StepRecipe]) -> Iterator[tuple[int, list[StepRecipe]]]:
    """Yield the steps of each operation, and the number of the first."""
    number = 0
    while number < len(chain):
        stop = number + 1
        while isinstance(chain[number], MapRecipe) and stop < len(chain) and isinstance(chain[stop], MapRecipe):
            stop += 1
        yield number, list(chain[number:stop])
        number = stop


class _Builder:
    def __init__(self, recipe: StageRecipe, steps: Iterator[Step], predictors: Iterator[Predictor]) -> None:
        self._recipe = recipe
        self._steps = steps
        self._predictors = predictors
        self._shared = iter(share_matrices(scores_of(held_steps(recipe.chain))))
        self._never_null = frozenset(recipe.never_null)
        """Columns planned without nulls before the next operation."""

    def open(self, number: int, group: Sequence[StepRecipe]) -> Operation:
        """Return the operation of some steps, of which the first is step ``number``."""
        operation = self._operation(number, group)
        for step in group:
            self._never_null = never_null_after(step, self._never_null)
        return operation

    def _operation(self, number: int, group: Sequence[StepRecipe]) -> Operation:
        step = group[0]
        if isinstance(step, FilterRecipe):
            return FilterOperation(step)
        if isinstance(step, SelectRecipe):
            return SelectOperation(step)
        if isinstance(step, CheckRecipe):
            return CheckOperation(step)
        if isinstance(step, AnyScore):
            return self._score(step, is_first=number == 0, is_last=number == len(self._recipe.chain) - 1)
        return self._maps([step for step in group if isinstance(step, MapRecipe)])

    def _maps(self, maps: Sequence[MapRecipe]) -> MapOperation:
        frames = tuple(pa.ipc.read_schema(pa.py_buffer(step.frame)) for step in maps if step.frame)
        return MapOperation([next(self._steps) for _ in maps], FrameSchemas(self._never_null, frames))

    def _score(self, step: AnyScore, *, is_first: bool, is_last: bool) -> ScoreOperation:
        output = self._recipe.visible_schema.names
        rules = (
            self._recipe.source_rules
            if is_first and isinstance(step, ScoreRecipe) and step.where is None and step.shadow is None
            else ()
        )
        finite = [rule.column for rule in rules if rule.finite]
        passed = [name for name in output if name not in step.outputs] if is_last else None
        return ScoreOperation(step, self._scorer(step, finite), passed=passed)

    def _scorer(self, step: AnyScore, finite: Collection[str]) -> RowScorer:
        predictors = [next(self._predictors) for _ in scores_of([step])]
        is_held = not isinstance(step, KeyedRecipe)  # models by key see other rows each
        members = [
            ModelScorer(score, predictor, finite=finite, shared=next(self._shared) if is_held else None)
            for score, predictor in zip(scores_of([step]), predictors, strict=True)
        ]
        if isinstance(step, EnsembleRecipe):
            return EnsembleScorer(step, members)
        if isinstance(step, StackRecipe):
            return StackScorer(members[:-1], members[-1], columns=step.members[-1].features)
        return KeyedScorer(step, members, predictors) if isinstance(step, KeyedRecipe) else members[0]
