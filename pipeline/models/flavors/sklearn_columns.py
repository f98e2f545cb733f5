"""Find what a fitted estimator of scikit-learn takes: its columns, their categories, and values to try it with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import ModelError
from pipeline.models.model import Feature, FeatureKind

_VECTORIZERS = ("CountVectorizer", "TfidfVectorizer", "HashingVectorizer")
_ENCODERS = ("OneHotEncoder", "OrdinalEncoder", "TargetEncoder")
_BOOSTINGS = ("HistGradientBoostingClassifier", "HistGradientBoostingRegressor")
_IMPUTERS = ("SimpleImputer",)
TEXT = "text"
"""Name of the only feature of a model of texts, which has no column names."""


@dataclass(frozen=True)
class Columns:
    """Columns of an estimator's input."""

    features: tuple[Feature, ...]
    form: str
    """``frame``: a frame with these names; ``matrix``: float64 without names; ``texts``: one column of texts."""
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values to try a feature with, where its kind does not tell."""
    categorical: tuple[str, ...] = ()
    """Columns that must have the dtype ``category``, with the categories of the feature."""


def columns_of(model: Any) -> Columns:
    """Return the columns of a fitted model.

    :raises ModelError: when it tells neither names nor their number.
    """
    first = _first(model)
    if type(first).__name__ in _VECTORIZERS:
        return Columns((Feature(TEXT, "text"),), "texts")
    names = getattr(model, "feature_names_in_", None)
    if names is None:
        count = getattr(model, "n_features_in_", None)
        if count is None:
            raise ModelError(
                "the model does not tell which columns it takes",
                found=type(model).__name__,
                expected="a fitted estimator with feature_names_in_ or n_features_in_",
                next_step="fit it on a frame with named columns, and save it again",
            )
        return Columns(tuple(Feature(f"f{index}") for index in range(count)), "matrix")
    kinds = {str(name): (_kind("number"), None) for name in names}
    kinds |= dict(_kinds(first, [str(name) for name in names]))
    features, values = [], {}
    for name, (kind, known) in kinds.items():
        choices = _plain(known)
        has_rule = kind == "category" and choices and len({type(one) for one in choices} - {str, int}) == 0
        features.append(Feature(name, kind, tuple(choices)) if has_rule else Feature(name, _free(kind)))
        if choices and not has_rule:
            values[name] = choices
    return Columns(tuple(features), "frame", values, _dtype_categories(model, first))


def _kind(kind: FeatureKind) -> FeatureKind:
    return kind


def _free(kind: FeatureKind) -> FeatureKind:
    return "any" if kind == "category" else kind


def _first(model: Any) -> Any:
    """Return the first estimator that sees the input: a pipeline passes it on unchanged until then."""
    while type(model).__name__ == "Pipeline":
        steps = [step for _, step in model.steps if step is not None and step != "passthrough"]
        if not steps:
            return None
        model = steps[0]
    return model


Kind = tuple[FeatureKind, Any]
"""Kind of a column, and its known values or None."""


def _kinds(first: Any, names: Sequence[str]) -> Iterator[tuple[str, Kind]]:
    """Yield the columns that are not plain numbers."""
    kind = type(first).__name__
    if kind == "ColumnTransformer":
        for _, transformer, chosen in first.transformers_:
            yield from _part(transformer, _chosen(chosen, names))
    elif kind in _ENCODERS:
        yield from _encoded(first, names)
    elif kind in _BOOSTINGS:
        yield from _boosted(first, names)
    elif kind == "FunctionTransformer":
        yield from ((name, ("any", None)) for name in names)


def _part(transformer: Any, columns: Sequence[str]) -> Iterator[tuple[str, Kind]]:
    """Yield the columns of one part of a ColumnTransformer."""
    if isinstance(transformer, str):
        kind: FeatureKind = "any" if transformer == "drop" else "number"
        yield from ((name, (kind, None)) for name in columns)
        return
    chain = [step for _, step in transformer.steps] if type(transformer).__name__ == "Pipeline" else [transformer]
    while len(chain) > 1 and type(chain[0]).__name__ in _IMPUTERS:
        chain = chain[1:]
    name = type(chain[0]).__name__
    if name in _ENCODERS:
        yield from _encoded(chain[0], columns, imputed=chain[0] is not transformer)
    elif name in _VECTORIZERS:
        yield from ((column, ("text", None)) for column in columns)
    elif name == "FunctionTransformer":
        yield from ((column, ("any", None)) for column in columns)
    else:
        yield from ((column, ("number", None)) for column in columns)


def _encoded(encoder: Any, columns: Sequence[str], *, imputed: bool = False) -> Iterator[tuple[str, Kind]]:
    """Yield the columns of an encoder. A value that it has not seen is an error for some of them only."""
    is_strict = getattr(encoder, "handle_unknown", "error") == "error" and type(encoder).__name__ != "TargetEncoder"
    for name, known in zip(columns, encoder.categories_, strict=True):
        yield name, ("category" if is_strict else "any", known)


def _boosted(model: Any, names: Sequence[str]) -> Iterator[tuple[str, Kind]]:
    flags = getattr(model, "is_categorical_", None)
    if flags is None or model._preprocessor is None:
        return
    encoder = model._preprocessor.named_transformers_["encoder"]
    categorical = [name for name, flag in zip(names, flags, strict=True) if flag]
    for name, known in zip(categorical, encoder.categories_, strict=True):
        yield name, ("category", known)


def _dtype_categories(model: Any, first: Any) -> tuple[str, ...]:
    """Return the columns whose dtype tells a boosted model that they are categories."""
    if type(first).__name__ not in _BOOSTINGS or first is not model:
        return ()
    flags = getattr(model, "is_categorical_", None)
    if flags is None or not isinstance(model.categorical_features, str):
        return ()
    return tuple(str(name) for name, flag in zip(model.feature_names_in_, flags, strict=True) if flag)


def _chosen(columns: Any, names: Sequence[str]) -> list[str]:
    """Return the names of the columns that a part of a ColumnTransformer takes."""
    if isinstance(columns, str):
        return [columns]
    if isinstance(columns, slice):
        if isinstance(columns.start, str) or isinstance(columns.stop, str):
            start = 0 if columns.start is None else names.index(columns.start)
            stop = len(names) if columns.stop is None else names.index(columns.stop) + 1
            return list(names[start:stop])
        return list(names[columns])
    items = [columns] if isinstance(columns, (int, np.integer)) else list(columns)
    if items and all(isinstance(item, (bool, np.bool_)) for item in items):
        return [name for name, flag in zip(names, items, strict=True) if flag]
    return [item if isinstance(item, str) else names[int(item)] for item in items]


def _plain(known: Any) -> list[Any]:
    """Return known values as Python values, without missing ones."""
    if known is None:
        return []
    values = [value.item() if isinstance(value, np.generic) else value for value in known]
    return [value for value in values if value is not None and not _is_nan(value)]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
