"""Apply the options of a score step to a model version: boosting rounds, and names of categories. Pure functions."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from pipeline.errors import ModelError, RefusedForSafety, SpecError
from pipeline.models.category_names import are_stored, likely_names
from pipeline.models.model import Feature, ModelVersion
from pipeline.spec.model_ref import IterationRange, OutputKind

_RANGE = "score.iteration_range"
_SHOWN = 20
"""Categories shown in a message."""


def apply_options(
    version: ModelVersion,
    *,
    iteration_range: IterationRange | None = None,
    categories: Mapping[str, Sequence[str | int]] | None = None,
    kind: OutputKind = "prediction",
    threads: int | None = None,
) -> ModelVersion:
    """Return ``version`` as it is scored with the options of a score step. The function may be applied again.

    :raises SpecError: for an option that the model does not allow.
    :raises ModelError: when the file does not tell the names of its categories, and ``categories`` does not either.
    """
    version = _select_rounds(version, iteration_range, kind=kind)
    return replace(version, features=_name_categories(version, categories or {}), threads=threads)


def require_flavor(version: ModelVersion, *, flavor: str | None, allow_code: bool) -> ModelVersion:
    """Return ``version`` if the options of a score step allow it.

    :raises SpecError: for a model of another flavor than ``flavor``.
    :raises RefusedForSafety: for a model whose file runs code, without ``allow_code``.
    """
    if flavor is not None and version.flavor != flavor:
        raise SpecError(
            "the model has another format than score.flavor says",
            where="score.flavor",
            found=f"{version.flavor}, of {version.reference}",
            expected=flavor,
            next_step=f"write flavor: {version.flavor}, remove score.flavor, or name another model",
        )
    if version.runs_code and not allow_code:
        raise RefusedForSafety(
            "loading the model runs code in its file",
            where=version.uri,
            found="score.allow_code: false",
            expected="score.allow_code: true, if you trust whoever made the file",
            next_step="set score.allow_code for this step too, or save the model in a safe format",
        )
    return version


def _select_rounds(version: ModelVersion, requested: IterationRange | None, *, kind: OutputKind) -> ModelVersion:
    """Return ``version`` with its iteration range, and the number of trees that are evaluated."""
    if requested is None:
        if version.iteration_range is None:
            return version
        return replace(version, iteration_range=None, trees=version.rounds * version.trees_per_round)
    begin, end = _requested_rounds(version, requested)
    _check_rounds(version, begin, end, kind=kind)
    return replace(version, iteration_range=(begin, end), trees=(end - begin) * version.trees_per_round)


def _requested_rounds(version: ModelVersion, requested: IterationRange) -> tuple[int, int]:
    """Return the requested rounds as numbers; ``best`` ends after the best iteration."""
    if not version.rounds:
        raise SpecError(
            "the model has no boosting rounds to select",
            where=_RANGE,
            found=f"{version.name}, {version.objective or version.task}, without trees",
            expected="a model of trees",
            next_step=f"remove {_RANGE}",
        )
    if requested == "best" and version.best_iteration is None:
        raise SpecError(
            "the model names no best iteration",
            where=_RANGE,
            found=f"best, and a model of {version.rounds:,} rounds that was saved without early stopping",
            expected="a model trained with early_stopping_rounds",
            next_step=f"write {_RANGE}: [0, {version.rounds}], or remove it to use all rounds",
        )
    return (0, (version.best_iteration or 0) + 1) if requested == "best" else requested


def _check_rounds(version: ModelVersion, begin: int, end: int, *, kind: OutputKind) -> None:
    if end > version.rounds:
        raise SpecError(
            "score.iteration_range ends after the last round of the model",
            where=_RANGE,
            found=f"[{begin}, {end}]",
            expected=f"rounds from 0 to {version.rounds}",
            next_step=f"write an end of {version.rounds} at most",
        )
    if begin and version.flavor == "xgboost" and kind in ("leaf", "contributions"):
        raise SpecError(
            f"xgboost computes the output {kind} only from the first round on",
            where=_RANGE,
            found=f"[{begin}, {end}]",
            expected=f"[0, {end}]",
            next_step="begin at 0, or choose another output kind",
        )
    if not version.trees_per_round:
        raise SpecError(
            "the rounds of the model have different numbers of trees",
            where=_RANGE,
            found=f"{version.trees:,} trees in {version.rounds:,} rounds",
            expected="the same number in every round",
            next_step=f"save booster[{begin}:{end}] as a model of its own, and remove {_RANGE}",
        )


def _name_categories(version: ModelVersion, given: Mapping[str, Sequence[str | int]]) -> tuple[Feature, ...]:
    """Return the features with the categories that a spec lists.

    :raises SpecError: for categories of no such feature, or categories that cannot be the model's.
    :raises ModelError: for a feature whose categories the file may have lost.
    """
    if unknown := sorted(set(given) - set(version.feature_names)):
        near = difflib.get_close_matches(unknown[0], version.feature_names, n=1)
        raise SpecError(
            f"score.categories names {unknown[0]!r}, which is not a feature of the model",
            where="score.categories",
            found=", ".join(map(repr, unknown)),
            expected="features of the model: " + ", ".join(version.feature_names[:_SHOWN]),
            next_step=f"did you mean {near[0]}?" if near else "write names as the model has them",
        )
    return tuple(_with_categories(feature, given.get(feature.name), version) for feature in version.features)


def _with_categories(feature: Feature, given: Sequence[str | int] | None, version: ModelVersion) -> Feature:
    if given is None:
        if feature.category_bytes is not None:
            raise _lost_names_error(feature, version)
        return feature
    where = f"score.categories.{feature.name}"
    if feature.kind != "category":
        raise SpecError(
            f"the feature {feature.name!r} has no categories",
            where=where,
            found=f"{len(given):,} categories for a feature of the kind {feature.kind}",
            expected="a categorical feature",
            next_step=f"remove {where}",
        )
    if feature.category_bytes is not None:
        stored = bytes.fromhex(feature.category_bytes)
        is_same = are_stored([str(name) for name in given], feature.category_offsets, stored)
        expected = f"{len(feature.category_offsets) - 1:,} names in training order, likely " + _quoted(
            likely_names(feature.category_offsets, stored)
        )
    else:
        is_same = feature.categories is None or tuple(given) == feature.categories
        expected = f"the model's {len(feature.categories or ()):,} categories: {_quoted(feature.categories or ())}"
    if not is_same:
        raise SpecError(
            f"the categories listed for {feature.name!r} are not those of the model",
            where=where,
            found=f"{len(given):,}: {_quoted(given)}",
            expected=expected,
            next_step="list the categories of the training data in the order of their codes",
        )
    categories = cast(tuple[str, ...] | tuple[int, ...], tuple(given))
    return replace(feature, categories=categories, category_bytes=None, category_offsets=())


def _lost_names_error(feature: Feature, version: ModelVersion) -> ModelError:
    names = likely_names(feature.category_offsets, bytes.fromhex(feature.category_bytes or ""))
    return ModelError(
        f"the model file may have lost names of categories of {feature.name!r}: xgboost 3.1 to 3.3 cuts names that are "
        "not ASCII",
        where=version.uri,
        found=f"{len(names):,} names that are not all ASCII; if they are cut, they are {_quoted(names)}",
        expected="ASCII names, or a file saved by xgboost 3.4 or newer after training with it",
        next_step=f"list the names in training order under score.categories: {{{feature.name}: […]}}; "
        "or train again with xgboost 3.4 or newer",
    )


def _quoted(names: Sequence[str | int]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")


def unused_rounds_warning(version: ModelVersion) -> str:
    """Return a warning if rounds after the best iteration are scored although nobody selected them; else ""."""
    if version.iteration_range is not None or version.best_iteration is None:
        return ""
    if version.best_iteration + 1 >= version.rounds:
        return ""
    return (
        f"all {version.rounds:,} rounds are scored, although early stopping found the best score with the first "
        f"{version.best_iteration + 1:,}, which xgboost's scikit-learn wrapper uses: "
        "choose with score.iteration_range: best, "
        f"or [0, {version.rounds}]"
    )


def promise_text(version: ModelVersion) -> str:
    """Return in words what the bits of a row depend on, where it was measured; else ""."""
    promise = version.promise
    if promise is None:
        return ""
    if version.endpoint:
        return "none: a service may answer the same row otherwise"
    if promise.kind == "exact":
        return f"exact: the bits of the library's own predict, whatever the batch (measured on {promise.rows:,} rows)"
    if promise.kind == "fixed":
        near = f"within {promise.noise:.1g} of" if promise.noise else "equal to"
        return (
            f"fixed: the same bits in any batch, by calls of {promise.chunk:,} rows; {near} the library's own predict "
            f"(measured on {promise.rows:,} rows)"
        )
    if promise.rows and not promise.noise:
        return f"code: nothing; the same bits in other batches of {promise.rows:,} made-up rows"
    return "code: nothing"


def promise_warning(version: ModelVersion) -> str:
    """Return a warning if the bits of a row may depend on its batch, or could not be measured; else ""."""
    promise = version.promise
    if promise is None or version.endpoint or promise.kind != "code" or (promise.rows and not promise.noise):
        return ""
    found = f"they differed by up to {promise.noise:.1g} in other batches" if promise.rows else "it took no made-up row"
    return f"nothing is promised about the bits of {version.name}: {found}; a retry may give other last digits"


def rounds_text(version: ModelVersion) -> str:
    """Return the rounds that are scored, where some were selected or the file names a best one; else ""."""
    if version.iteration_range is None and version.best_iteration is None:
        return ""
    best = "" if version.best_iteration is None else f"; best iteration {version.best_iteration:,}"
    if version.iteration_range is None:
        return f"all {version.rounds:,}{best}"
    begin, end = version.iteration_range
    return f"[{begin:,}, {end:,}) of {version.rounds:,}{best}"
