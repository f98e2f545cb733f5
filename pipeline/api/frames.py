"""`score`: add the predictions of a model to a pandas or Dask DataFrame."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import pandas as pd

from pipeline.driver.score_models import resolve_model, scored_version
from pipeline.models.code_model import keep_archive
from pipeline.models.model import ModelVersion
from pipeline.models.registry.client import Model, model_bytes
from pipeline.scoring.frames import score_pandas
from pipeline.scoring.outputs import prediction_schema
from pipeline.settings import Settings
from pipeline.spec.load import absolute_path
from pipeline.spec.model_ref import IterationRange, ModelRef
from pipeline.spec.score import Output, Score, ScoreStep

if TYPE_CHECKING:
    from pipeline.execution.graph import DaskFrame

Path = str | os.PathLike[str]


@overload
def score(
    frame: pd.DataFrame,
    model: Model,
    *,
    features: Sequence[str] | None = None,
    output: str | Output | Mapping[str, Any] = "prediction",
    iteration_range: IterationRange | None = None,
    categories: Mapping[str, Sequence[str | int]] | None = None,
    flavor: str | None = None,
    allow_code: bool = False,
    threads: int | None = None,
    model_files: Path | Sequence[Path] | None = None,
) -> pd.DataFrame: ...


@overload
def score(
    frame: DaskFrame,
    model: Model,
    *,
    features: Sequence[str] | None = None,
    output: str | Output | Mapping[str, Any] = "prediction",
    iteration_range: IterationRange | None = None,
    categories: Mapping[str, Sequence[str | int]] | None = None,
    flavor: str | None = None,
    allow_code: bool = False,
    threads: int | None = None,
    model_files: Path | Sequence[Path] | None = None,
) -> DaskFrame: ...


def score(
    frame: pd.DataFrame | DaskFrame,
    model: Model,
    *,
    features: Sequence[str] | None = None,
    output: str | Output | Mapping[str, Any] = "prediction",
    iteration_range: IterationRange | None = None,
    categories: Mapping[str, Sequence[str | int]] | None = None,
    flavor: str | None = None,
    allow_code: bool = False,
    threads: int | None = None,
    model_files: Path | Sequence[Path] | None = None,
) -> pd.DataFrame | DaskFrame:
    """Predict: add the predictions of a model to a DataFrame, one column per output.

    Rows keep their order and index. Nothing is written to the data, and there are no rejects: one bad row is an error.
    With a Dask DataFrame the result is lazy, and each worker process loads the model once. ``pipeline.predict`` is the
    same function.

    Parameters
    ----------
    frame : pandas.DataFrame or dask.dataframe.DataFrame
        Must contain the model's feature columns. Extra columns are kept.
    model : str, PathLike, or a fitted model
        Path or URL of a model file, a registry reference such as ``"models:/churn@champion"``, ``"module:Class"`` for a
        model in Python, or the model itself: a booster or a fitted estimator of xgboost, LightGBM, scikit-learn or
        CatBoost, an ONNX model, or an object or function with ``predict`` and declared ``features``. A model object is
        stored under ``.models/`` of the job directory's root, where workers read it.
    features : sequence of str, optional
        Column for each feature, in training order. Default: the model's own feature names.
    output : str, Output or dict, default "prediction"
        Name of the new column; or ``{"column": ..., "kind": "label"}``, or another kind.
    iteration_range : tuple of int or "best", optional
        Boosting rounds ``(begin, end)`` to score with; ``"best"``: up to the best iteration. Default: all rounds.
    categories : mapping, optional
        Categories per feature in training order, where the model file has lost them.
    flavor : str, optional
        The only format that the model file may have. Default: any that is known by its bytes.
    allow_code : bool, default False
        Permit a model file that runs code when it is loaded, such as a pickle. Only for files of people you trust.
    threads : int, optional
        Threads of one call of the model's library. Default: the variable ``OMP_NUM_THREADS``, or 1.
    model_files : str, PathLike or a sequence, optional
        Files and folders that a model in Python loads.

    Returns
    -------
    Same type as ``frame``
        With columns of the type that the library returns added: float32 and, for ``label`` and ``leaf``, int32 for
        xgboost; usually float64 for others, and the type of the classes for ``label`` of scikit-learn.

    Raises
    ------
    SchemaDrift
        If a feature column is missing or has a type that the model cannot take.
    InputError
        If a row breaks the model's contract (infinite value, unknown category). For Dask: when computed.

    Examples
    --------
    >>> pipeline.score(customers, "churn.ubj", output="churn")["churn"].dtype
    dtype('float32')

    See Also
    --------
    Job.to_dask : The same for the source and steps of a job.
    """
    result = Output(column=output) if isinstance(output, str) else Output.model_validate(output)
    options = Score.model_validate(
        {
            "model": model if isinstance(model, str) and ModelRef(model).is_code else "model",
            "model_files": model_files,
            "output": result,
            "iteration_range": iteration_range,
            "categories": categories,
            "flavor": flavor,
            "allow_code": allow_code,
            "threads": threads,
        }
    )
    if not isinstance(model, (str, os.PathLike, bytes, bytearray)):
        # Whoever has the object has run its code.
        options = options.model_copy(update={"allow_code": True})
    version = scored_version(_model_version(model, options), options)
    columns = tuple(features) if features is not None else None
    if isinstance(frame, pd.DataFrame):
        return score_pandas(frame, version, features=columns, output=result)
    meta = _scored_meta(frame._meta, version, result)
    scored: DaskFrame = frame.map_partitions(
        _score_partition, version, columns, result, meta=meta, enforce_metadata=False
    )
    return scored


predict = score
"""The same function as `score`, under the name that model libraries use."""


def _model_version(model: Model, options: Score) -> ModelVersion:
    settings = Settings.load()
    if isinstance(model, (str, os.PathLike)):
        text = os.fspath(model)
        place = absolute_path(text) if ModelRef.parse(text).is_file else text
        return resolve_model(place, settings=settings, score=options)
    data, _ = model_bytes(model)
    return resolve_model(keep_archive(data, settings.directory), settings=settings, score=options)


def _score_partition(
    frame: pd.DataFrame, version: ModelVersion, features: tuple[str, ...] | None, output: Output
) -> pd.DataFrame:
    return score_pandas(frame, version, features=features, output=output)


def _scored_meta(frame: pd.DataFrame, version: ModelVersion, output: Output) -> pd.DataFrame:
    schema = prediction_schema(version, output)
    return frame.assign(**{field.name: pd.Series([], dtype=field.type.to_pandas_dtype()) for field in schema})


def with_stored_models(step: Any, settings: Settings) -> Any:
    """Return a step of a job with the paths of stored files in place of fitted models; others as they are."""
    score = step.score if isinstance(step, ScoreStep) else step.get("score") if isinstance(step, Mapping) else None
    if isinstance(score, Mapping):
        if not any(_has_fitted(score.get(name)) for name in ("model", "meta", "other", "models")):
            return step
        score = Score.model_validate(dict(score))
    if not isinstance(score, Score) or not score.fitted:
        return step
    return {"score": score.with_models({text: _stored(model, settings) for text, model in score.fitted.items()})}


def _has_fitted(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_fitted, value))
    if isinstance(value, Mapping):
        return any(map(_has_fitted, value.values()))
    return value is not None and not isinstance(value, (str, bytes, os.PathLike))


def _stored(model: Any, settings: Settings) -> str:
    """Store a fitted model as a file, and return its path or URL."""
    return keep_archive(model_bytes(model)[0], settings.directory)
