"""The models of a job spec: listed, resolved to versions, and with the options of their ``score`` steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pyarrow as pa

from pipeline.common.cores import core_count
from pipeline.common.units import parse_bytes
from pipeline.errors import SpecError
from pipeline.models.endpoint_model import resolve_endpoint
from pipeline.models.listing import list_models
from pipeline.models.model import ModelVersion
from pipeline.models.options import apply_options, require_flavor
from pipeline.models.registry import resolve
from pipeline.plan.chain import ScoredBy
from pipeline.scoring.outputs import prediction_schema
from pipeline.settings import Settings
from pipeline.spec.job_spec import AnyStep, JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.spec.parameters import PLACEHOLDER
from pipeline.spec.score import Score, ScoreStep


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
    pairs: Sequence[tuple[str, Score]], *, known: Mapping[str, ModelVersion], settings: Settings
) -> dict[str, ModelVersion]:
    """Return the version that each unknown model reference names now; several files are inspected at a time.

    :param pairs: references, each with its step.
    :raises ModelError: if a reference names no version.
    """
    scores = {reference: score for reference, score in reversed(pairs) if reference not in known}
    for reference, score in pairs:
        if scores.get(reference, score).files != score.files:
            raise SpecError(
                "one model has different files in two steps",
                where="score.model_files",
                found=f"{', '.join(score.files) or 'none'}, and {', '.join(scores[reference].files)}",
                expected=f"the same files wherever {reference} is named",
                next_step="write a class for each: class Second(First): pass",
            )
    unknown = [reference for reference in dict.fromkeys(reference for reference, _ in pairs) if reference in scores]

    def resolve_one(reference: str) -> ModelVersion:
        return resolve_model(reference, settings=settings, score=scores[reference])

    if len(unknown) < 2:
        return {reference: resolve_one(reference) for reference in unknown}
    with ThreadPoolExecutor(min(len(unknown), core_count())) as pool:
        return dict(zip(unknown, pool.map(resolve_one, unknown), strict=True))


def resolve_model(text: str, *, settings: Settings, score: Score | None = None) -> ModelVersion:
    """Return the model version that a model reference names now.

    :param score: the step that names it, with the flavor it demands and the code it allows.
    :raises ModelError: if the reference names no version.
    """
    if score is not None and score.endpoint is not None:
        return resolve_endpoint(score.endpoint)
    return resolve(
        ModelRef.parse(text),
        registry=settings.registry,
        cache=settings.directory,
        limit=parse_bytes(settings.max_model_size),
        flavor=score.flavor if score is not None else None,
        allow_code=score.allow_code if score is not None else False,
        import_paths=settings.import_paths,
        model_files=score.files if score is not None else (),
    )


def scored_version(version: ModelVersion, score: Score) -> ModelVersion:
    """Return ``version`` as ``score`` uses it: the boosting rounds, and the names of categories.

    :raises SpecError: for options that the model does not allow.
    :raises ModelError: for a file that may have lost names of categories.
    """
    return apply_options(
        require_flavor(version, flavor=score.flavor, allow_code=score.allow_code),
        iteration_range=score.rounds,
        categories=score.categories,
        kind=score.output_spec.kind,
        threads=score.threads,
    )


def scored_steps(spec: JobSpec) -> tuple[Score, ...]:
    """Return the ``score`` step of each model reference of ``spec``, in order, as that model is used."""
    return tuple(used for score in spec.scores for used in score.by_reference)


def scored_by(spec: JobSpec, versions: Sequence[ModelVersion]) -> list[ScoredBy]:
    """Return models and output columns of each ``score`` step.

    :param versions: model version of each model reference, in order.
    :raises SpecError: when a model has no such output.
    """
    waiting, scored = iter(versions), list[ScoredBy]()
    for score in spec.scores:
        models = tuple(islice(waiting, len(score.references)))
        pairs = zip(models, score.by_reference, strict=True)
        schemas = [prediction_schema(version, used.output_spec) for version, used in pairs]
        if score.meta is not None:  # the models below may have any number of values
            scored.append(ScoredBy(models, schemas[-1]))
            continue
        for version, schema in zip(models, schemas, strict=True):
            if not _fits(schema, schemas[0], is_combined=score.combine is not None):
                raise SpecError(
                    "the models of a step have different values a row",
                    where="score.model" if score.by is None else "score.models",
                    found=f"{_values_text(schema)} of {version.name}",
                    expected=f"{_values_text(schemas[0])}, as {models[0].name} has",
                    next_step="name models of one task and with the same classes",
                )
        scored.append(ScoredBy(models, schemas[0]))
    return scored


def _fits(schema: pa.Schema, first: pa.Schema, *, is_combined: bool) -> bool:
    """Return True if a model may stand beside the first: combined numbers get its type, others must have it."""
    if len(schema) != len(first):
        return False
    has_numbers = all(pa.types.is_floating(one.field(0).type) for one in (schema, first))
    return (is_combined and has_numbers) or schema.types == first.types


def _values_text(schema: pa.Schema) -> str:
    return f"{len(schema)} of type {schema.field(0).type}"
