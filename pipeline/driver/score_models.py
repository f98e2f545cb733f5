"""The models of a job spec: listed, resolved to versions, and with the options of their ``score`` steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from pipeline.common.cores import core_count
from pipeline.common.units import parse_bytes
from pipeline.errors import SpecError
from pipeline.models.listing import list_models
from pipeline.models.model import ModelVersion
from pipeline.models.options import apply_options
from pipeline.models.registry import resolve
from pipeline.plan.chain import ScoredBy
from pipeline.scoring.outputs import prediction_schema
from pipeline.settings import Settings
from pipeline.spec.job_spec import AnyStep, JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.spec.parameters import PLACEHOLDER
from pipeline.spec.parts import Score, ScoreStep


def with_listed_models(
    spec: JobSpec, *, settings: Settings, listed: dict[str, dict[str, str]] | None = None
) -> JobSpec:
    """Return ``spec`` with the models that each listing (``models/{}.ubj``) has now, by name.

    :param listed: listings that are known already; new ones are added.
    :raises ModelError: for a listing without models.
    """
    if not spec.has_listing:
        return spec
    known = {} if listed is None else listed
    steps = list[AnyStep]()
    for step in spec.steps:
        name = step.score.models if isinstance(step, ScoreStep) else None
        if isinstance(step, ScoreStep) and isinstance(name, str) and PLACEHOLDER not in name:
            if name not in known:
                known[name] = list_models(name, registry=settings.registry, cache=settings.directory)
            steps.append(ScoreStep(score=step.score.model_copy(update={"models": known[name]})))
        else:
            steps.append(step)
    return spec.model_copy(update={"steps": tuple(steps)})


def resolve_models(
    references: Sequence[str], *, known: Mapping[str, ModelVersion], settings: Settings
) -> dict[str, ModelVersion]:
    """Return the version that each unknown model reference names now; several files are inspected at a time.

    :raises ModelError: if a reference names no version.
    """
    unknown = [reference for reference in dict.fromkeys(references) if reference not in known]
    if len(unknown) < 2:
        return {reference: resolve_model(reference, settings=settings) for reference in unknown}
    with ThreadPoolExecutor(min(len(unknown), core_count())) as pool:
        found = pool.map(lambda reference: resolve_model(reference, settings=settings), unknown)
        return dict(zip(unknown, found, strict=True))


def resolve_model(text: str, *, settings: Settings) -> ModelVersion:
    """Return the model version that a model reference names now.

    :raises ModelError: if the reference names no version.
    """
    return resolve(
        ModelRef.parse(text),
        registry=settings.registry,
        cache=settings.directory,
        limit=parse_bytes(settings.max_model_size),
    )


def scored_version(version: ModelVersion, score: Score) -> ModelVersion:
    """Return ``version`` as ``score`` uses it: the boosting rounds, and the names of categories.

    :raises SpecError: for options that the model does not allow.
    :raises ModelError: for a file that may have lost names of categories.
    """
    return apply_options(
        version, iteration_range=score.rounds, categories=score.categories, kind=score.output_spec.kind
    )


def scored_steps(spec: JobSpec) -> tuple[Score, ...]:
    """Return the ``score`` step of each model reference of ``spec``, in order."""
    return tuple(score for score in spec.scores for _ in score.references)


def scored_by(spec: JobSpec, versions: Sequence[ModelVersion]) -> list[ScoredBy]:
    """Return models and output columns of each ``score`` step.

    :param versions: model version of each model reference, in order.
    :raises SpecError: when a model has no such output.
    """
    waiting, scored = iter(versions), list[ScoredBy]()
    for score in spec.scores:
        models = tuple(islice(waiting, len(score.references)))
        schemas = [prediction_schema(version, score.output_spec) for version in models]
        for version, schema in zip(models, schemas, strict=True):
            if schema != schemas[0]:
                raise SpecError(
                    "the models of a step have different numbers of values a row",
                    where="score.model" if score.by is None else "score.models",
                    found=f"{len(schema)} of {version.name}",
                    expected=f"{len(schemas[0])}, as {models[0].name} has",
                    next_step="name models of one task and with the same classes",
                )
        scored.append(ScoredBy(models, schemas[0]))
    return scored
