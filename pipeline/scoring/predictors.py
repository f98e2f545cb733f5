"""Open the models of a recipe: those that score every batch at once, those by key when rows need them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.models.cache import get_predictor
from pipeline.models.device_engine import DeviceEvaluator
from pipeline.models.engines import EngineUse, Evaluator
from pipeline.models.lazy_evaluator import LazyEvaluator
from pipeline.models.model import Predictor
from pipeline.plan.recipe import KeyedRecipe, ScoreRecipe, StageRecipe, scores_of

Open = Callable[[ScoreRecipe], tuple[Predictor, float]]
"""Return the predictor of a recipe, and the seconds it took to load its model."""


@dataclass(frozen=True)
class OpenPredictors:
    """The predictors of a recipe, in the order of `StageRecipe.scores`."""

    predictors: tuple[Predictor, ...]
    seconds: float
    """Seconds for loading the models that are held."""

    @property
    def lazy(self) -> tuple[LazyEvaluator, ...]:
        """The models by key."""
        return tuple(one for one in self.predictors if isinstance(one, LazyEvaluator))

    @property
    def lazy_seconds(self) -> float:
        """Seconds for loading models by key, so far."""
        return sum(one.seconds for one in self.lazy)

    @property
    def loads(self) -> int:
        """Loads of models by key, so far."""
        return sum(one.loads for one in self.lazy)

    def engine_use(self) -> EngineUse:
        """Return the engines that evaluated the models; call it after all rows are scored."""
        used = [one for one in self.predictors if isinstance(one, (Evaluator, DeviceEvaluator, LazyEvaluator))]
        return sum((one.engine_use() for one in used), EngineUse())

    @property
    def device_rows(self) -> int:
        """Rows of the largest batch that is expected to fit on the GPU; 0 unless it evaluates all models."""
        rows = [one.batch_rows for one in self.predictors if isinstance(one, DeviceEvaluator)]
        return min(rows, default=0) if len(rows) == len(self.predictors) else 0

    @property
    def rows_on_device(self) -> int:
        """Rows of the largest batch that is expected to fit on the GPU, after it scored rows; else 0."""
        used = [one.batch_rows for one in self.predictors if isinstance(one, DeviceEvaluator) and one.device]
        return min(used, default=0)

    def device_fields(self) -> dict[str, Any]:
        """Return the fields of a receipt about the GPU; empty if it scored no row."""
        on_device = [one for one in self.predictors if isinstance(one, (DeviceEvaluator, LazyEvaluator))]
        used = [one for one in on_device if one.device]
        return {"device": used[0].device, "device_peak": max(one.device_peak for one in used)} if used else {}


NO_PREDICTORS = OpenPredictors((), 0.0)


def open_predictors(recipe: StageRecipe, open: Open) -> OpenPredictors:
    """Open the models of a recipe."""
    predictors, seconds = list[Predictor](), 0.0
    for step in recipe.chain:
        for score in scores_of([step]):
            if isinstance(step, KeyedRecipe):
                predictors.append(LazyEvaluator(score.model, partial(open, score)))
                continue
            predictor, loading = open(score)
            predictors.append(predictor)
            seconds += loading
    return OpenPredictors(tuple(predictors), seconds)


def library_predictors(recipe: StageRecipe) -> tuple[Predictor, ...]:
    """Return the predictors of a recipe that call the models' own libraries."""
    return open_predictors(recipe, lambda score: get_predictor(score.model)).predictors
