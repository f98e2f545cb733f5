"""`JobSpec`: the definition of a job. Frozen; the only I/O is reading its own file.

Limits and folders of a site are in `pipeline.settings`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationError

from pipeline.common.digest import digest_json
from pipeline.errors import SpecError
from pipeline.spec.budget import Budget
from pipeline.spec.diagnostics import (
    IN_PYTHON,
    Document,
    FieldPath,
    SpecIssue,
    SpecIssues,
    did_you_mean,
    dotted,
    issues_of,
)
from pipeline.spec.document import dump_text, read_document
from pipeline.spec.fields import (
    JobName,
    Name,
    OnAliasChange,
    ParamName,
    ParamValue,
    SpecModel,
    StepChange,
    StorageOptions,
    UrlPrefix,
    spec_error,
)
from pipeline.spec.gate import Gate
from pipeline.spec.model_ref import Device
from pipeline.spec.parameters import OWN_SECTIONS, PARAM_PATTERN, GivenValues, escape, given_in_python, render_spec
from pipeline.spec.parts import (
    CheckpointStep,
    ColumnContract,
    DaskStep,
    Errors,
    FanOut,
    FilterStep,
    Hook,
    MapStep,
    ReportOptions,
    RunOptions,
    SelectStep,
    Source,
)
from pipeline.spec.score import Output, Score, ScoreStep
from pipeline.spec.sink import Sink
from pipeline.spec.triggers import ArrivalTrigger, Trigger

__all__ = [
    "ArrivalTrigger",
    "CheckpointStep",
    "ColumnContract",
    "DaskStep",
    "Errors",
    "FilterStep",
    "JobSpec",
    "MapStep",
    "Output",
    "Score",
    "ScoreStep",
    "SelectStep",
    "Sink",
    "Source",
    "Trigger",
    "json_schema",
]

AnyStep = MapStep | FilterStep | SelectStep | ScoreStep | CheckpointStep | DaskStep
_STEPS: dict[str, type[SpecModel]] = {
    "map": MapStep,
    "filter": FilterStep,
    "select": SelectStep,
    "score": ScoreStep,
    "checkpoint": CheckpointStep,
    "dask": DaskStep,
}
STEP_KINDS = tuple(_STEPS)
NOT_THE_WORK = {"budget", "hooks", "cluster", "device", "storage", "triggers", "report", "gate"}
"""Fields without influence on the output rows."""
_KIND = "step"


def _step_kind(step: Any) -> str | None:
    """Return the kind of a step, such as ``map``; None for an invalid step."""
    for kind, model in _STEPS.items():
        if isinstance(step, model):
            return kind
    kinds = [kind for kind in STEP_KINDS if isinstance(step, dict) and kind in step]
    return kinds[0] if len(kinds) == 1 else None


def _step_tag(step: Any) -> str | None:
    """Return the tag by which pydantic chooses the type of a step. A tag is not a key, as locations contain tags."""
    kind = _step_kind(step)
    return f"{kind} step" if kind else None


def _step_issue(step: Any) -> tuple[str, str]:
    """Return message and next step for an invalid step."""
    if isinstance(step, str):
        guess = "map" if ":" in step else "score"
        return "a step is a single text", f"write {guess}: before it"
    both = [kind for kind in STEP_KINDS if isinstance(step, dict) and kind in step]
    if len(both) > 1:
        return f"a step has both {both[0]} and {both[1]}", "start each with a dash of its own"
    names = list(step) if isinstance(step, dict) else []
    if {"rebalance", "repartition"} & set(map(str, names)):
        return "unknown kind of step", "say checkpoint: true, behind which rows are cut into partitions anew"
    hints = [did_you_mean(str(name), STEP_KINDS) for name in names]
    fields = {"map": MapStep.model_fields, "score": Score.model_fields}
    owner = next((kind for kind in fields for name in names if name in fields[kind]), None)
    if owner and not any(hints):
        return "a step has neither map nor score", f"put {owner}: above {', '.join(names)}, and indent them below it"
    return "unknown kind of step", next((hint for hint in hints if hint), "")


def _check_order(steps: tuple[AnyStep, ...]) -> tuple[AnyStep, ...]:
    """Refuse steps whose fields contradict each other, and a job that does nothing."""
    if not steps:
        raise spec_error("has no step", expected="map, filter, select and score steps in any order")
    _check_checkpoints(steps)
    _check_time_limits(steps)
    scores = [number for number, step in enumerate(steps) if isinstance(step, ScoreStep)]
    columns = [step.score.output_spec.column for step in steps if isinstance(step, ScoreStep)]
    for column in sorted({column for column in columns if columns.count(column) > 1}):
        raise spec_error(
            f"names an output column twice: {column}",
            expected="another score.output at each score step",
            next_step="name them, such as output: churn and output: churn_new",
        )
    for number, step in enumerate(steps):
        if not isinstance(step, ScoreStep) or step.score.keep is None:
            continue
        if number != scores[-1]:
            raise spec_error(
                "has keep at a score step that is not the last",
                expected="keep at the last score step: each step passes all columns on",
                next_step=f"remove steps.{number}.score.keep, or put a select step behind it",
            )
        if isinstance(steps[-1], SelectStep):
            raise spec_error(
                "has keep at the score step, and a select step at the end",
                expected="one of the two: both name the columns of the output",
                next_step=f"remove steps.{number}.score.keep",
            )
    return steps


def _check_time_limits(steps: tuple[AnyStep, ...]) -> None:
    """Refuse time limits of steps that a service scores with: rows would be rejected while it puts requests off."""
    limited = service = False
    for number, step in enumerate(steps):
        if isinstance(step, (CheckpointStep, DaskStep)):
            limited = service = False
        limited = limited or (isinstance(step, MapStep) and not (step.timeout is None and step.row_timeout is None))
        service = service or (isinstance(step, ScoreStep) and step.score.endpoint is not None)
        if limited and service:
            raise spec_error(
                "has a step with a time limit, and an endpoint, in one stage",
                expected="endpoint.timeout for requests, and no timeout of map steps beside them",
                next_step=f"put checkpoint: true between them, near steps.{number}, or remove timeout and row_timeout",
            )


def _check_checkpoints(steps: tuple[AnyStep, ...]) -> None:
    """Refuse a checkpoint of rows that are kept anyway: those of the source, of another checkpoint, of the output."""
    for number, step in enumerate(steps):
        if not isinstance(step, CheckpointStep):
            continue
        if number == 0:
            raise spec_error(
                "begins with a checkpoint, before which no step is",
                expected="a step before it",
                next_step="remove steps.0: the files of the source are cut into partitions anyway",
            )
        if number == len(steps) - 1:
            raise spec_error(
                "ends with a checkpoint, behind which no step is",
                expected="a step behind it",
                next_step=f"remove steps.{number}: the output is kept as a checkpoint anyway",
            )
        if isinstance(steps[number + 1], DaskStep):
            raise spec_error(
                "has a checkpoint before a dask step",
                expected="no checkpoint there: the rows before a dask step are kept anyway",
                next_step=f"remove steps.{number}; partition_bytes of the dask step says how its input is cut",
            )
        if isinstance(steps[number - 1], CheckpointStep):
            raise spec_error(
                "has two checkpoints in a row", expected="a step between them", next_step=f"remove steps.{number}"
            )


Step = Annotated[
    Annotated[MapStep, Tag("map step")]
    | Annotated[FilterStep, Tag("filter step")]
    | Annotated[SelectStep, Tag("select step")]
    | Annotated[ScoreStep, Tag("score step")]
    | Annotated[CheckpointStep, Tag("checkpoint step")]
    | Annotated[DaskStep, Tag("dask step")],
    Discriminator(_step_tag, custom_error_type=_KIND, custom_error_message="unknown step"),
]


class JobSpec(SpecModel):
    """A batch inference job."""

    name: JobName
    """Lower-case letters, digits, ``._-``; at most 64."""
    source: Source
    steps: Annotated[tuple[Step, ...], Field(strict=False), AfterValidator(_check_order)]
    """``map``, ``filter``, ``select``, ``score`` and ``dask``, in any number and order, with ``checkpoint`` between
    stages. A job without ``score`` only prepares data."""
    sink: Sink
    errors: Errors = Errors()
    contract: dict[Name, ColumnContract] = Field(default_factory=dict)
    """Conditions per column, beside those of the model's features."""
    on_alias_change: OnAliasChange = "pin"
    """Action when the model's alias moves to another version before the job has ended. ``pin``: keep the version that
    the job started with, and warn in the report. ``fail``: publish nothing. ``restart``: score every row again with the
    new version; the output never mixes two versions."""
    step_change: StepChange = "fail"
    """Action when the code of a step changed before the job has ended. ``fail``: publish nothing. ``pin``: go on with
    the code that the job was planned with. ``restart``: score every row again with the new code."""
    cluster: Name | None = None
    """A name in ``cluster_configs/``, a file, or the address of a scheduler. Default: ``pipeline.cluster`` of
    ``dask.config``, else ``local``."""
    device: Device | None = None
    """Device that evaluates the model. ``auto``: the GPU of a worker that has one, if it computes the same bits, else
    the CPU; the report says which, and why. ``cuda``: GPUs only; a job that cannot use one is refused. ``cpu``: no GPU.
    Default: ``pipeline.device`` of ``dask.config``, else ``auto``. The output is the same in every bit."""
    storage: dict[UrlPrefix, StorageOptions] = Field(default_factory=dict)
    """fsspec options per URL prefix; the longest matching prefix wins. Secrets only as ``env:NAME`` or ``file:PATH``:
    each process that opens such a URL resolves them itself."""
    params: dict[ParamName, ParamValue] = Field(default_factory=dict)
    """Parameters and their defaults; ``-p NAME=VALUE`` overrides one. A null default makes the parameter required.
    ``${params.NAME}`` puts its value into any text."""
    run: RunOptions = RunOptions()
    report: ReportOptions = ReportOptions()
    gate: Gate | None = None
    """Conditions on the output: readers see none that does not meet them; see docs/gate.md."""
    budget: Budget | None = None
    """What all runs of the job together may spend; see docs/budgets.md."""
    triggers: Annotated[tuple[Trigger, ...], Field(strict=False)] = ()
    """Schedules and events on which a server submits the job; see docs/triggers.md."""
    hooks: Annotated[tuple[Hook, ...], Field(strict=False)] = ()
    """Notifications when the job starts or ends, beside those of the settings."""
    fan_out: FanOut | None = None
    """One job per value of a partition key, a column or a list; see docs/fan-out.md."""

    @classmethod
    def build(cls, **fields: Any) -> Self:
        """Build a spec from Python values: parts such as `Source`, or lists and mappings as in a YAML file.

        :raises SpecError: with every invalid field, and for a fitted model, which has no place yet.
        """
        for step in fields.get("steps", ()):
            score = getattr(step, "score", step.get("score") if isinstance(step, dict) else None)
            if isinstance(score, Score) and score.fitted:
                raise SpecError(
                    "a fitted model is stored by a job",
                    where="steps.score.model",
                    found=", ".join(type(model).__name__ for model in score.fitted.values()),
                    expected="the path of a model file, or a model reference",
                    next_step="give the steps to pipeline.Job, which stores the model",
                )
        return cls.from_document(Document(IN_PYTHON, _plain_value(fields)))

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        overrides: Sequence[str] = (),
        params: Mapping[str, Any] | None = None,
        run_date: str | None = None,
    ) -> Self:
        """Load a spec from a YAML or JSON file (path or URL), or from a text with more than one line.

        :param overrides: ``field=value`` each, such as ``sink.path=out/``; the value is YAML.
        :param params: values for parameters that the spec declares.
        :param run_date: value of ``${run.date}``, as ``2026-01-01``. Default: today, UTC.
        :raises SpecError: with every issue, its line and column.
        :raises RefusedForSafety: for anchors, aliases and Python tags.
        """
        document = read_document(source, overrides=overrides, environ=os.environ)
        return cls.from_document(document, given=given_in_python(params or {}), run_date=run_date)

    @classmethod
    def from_document(
        cls, document: Document, *, given: Sequence[GivenValues] = (), run_date: str | None = None
    ) -> Self:
        """Build a spec from a file that was read.

        :raises SpecError: with every issue.
        """
        render_spec(document, given=given, run_date=run_date, environ=os.environ)
        return cls.from_filled(document)

    @classmethod
    def from_filled(cls, document: Document) -> Self:
        """Build a spec from a document whose placeholders are rendered.

        :raises SpecError: with every issue.
        """
        issues = [*document.issues, *_text_issues(document, document.data, ())]
        spec = None
        try:
            spec = cls.model_validate(document.data)
        except ValidationError as error:
            issues += issues_of(error, model=cls, document=document, words={_KIND: _step_issue})
        if issues or spec is None:
            raise SpecIssues(issues, name=document.name)
        return spec

    @property
    def maps(self) -> tuple[MapStep, ...]:
        """The ``map`` steps, in order."""
        return tuple(step for step in self.steps if isinstance(step, MapStep))

    @property
    def scores(self) -> tuple[Score, ...]:
        """The ``score`` steps, in order."""
        return tuple(step.score for step in self.steps if isinstance(step, ScoreStep))

    @property
    def score(self) -> Score:
        """The first ``score`` step. Use ``scores`` where a job may have none or several."""
        return self.scores[0]

    @property
    def references(self) -> tuple[str, ...]:
        """The model references of all ``score`` steps, in order."""
        return tuple(reference for score in self.scores for reference in score.references)

    @property
    def has_listing(self) -> bool:
        """True if models are listed when the job is planned, and are not yet."""
        return any(isinstance(score.models, str) for score in self.scores)

    @property
    def is_plain(self) -> bool:
        """True for any number of ``map`` steps and one ``score`` of all rows with one model.

        The plan of such a spec has no `pipeline.plan.plan.Plan.chain`.
        """
        *before, last = self.steps
        if not isinstance(last, ScoreStep) or not all(isinstance(step, MapStep) for step in before):
            return False
        score = last.score
        return score.where is None and score.shadow is None and isinstance(score.model, str)

    @property
    def has_stages(self) -> bool:
        """True if a step ends a stage: the job then runs as several, each with partitions of its own."""
        return any(isinstance(step, (CheckpointStep, DaskStep)) for step in self.steps)

    @property
    def has_dask(self) -> bool:
        """True if a step is a ``dask`` step."""
        return any(isinstance(step, DaskStep) for step in self.steps)

    @property
    def entrypoints(self) -> tuple[str, ...]:
        """Functions of the ``map`` and ``dask`` steps, in order."""
        names = (getattr(step, "map", None) or getattr(step, "dask", None) for step in self.steps)
        return tuple(name for name in names if name is not None)

    @property
    def digest(self) -> str:
        """SHA-256 of all fields that influence the output rows; see `NOT_THE_WORK` for the others."""
        return digest_json(self.to_dict(exclude=NOT_THE_WORK))

    def to_dict(self, *, exclude: set[str] | None = None) -> dict[str, Any]:
        """Return the spec as YAML or JSON holds it, without defaults."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude=exclude)

    def to_yaml(self) -> str:
        """Return a YAML file that `load` reads back to the same spec, without defaults."""
        return dump_text(
            {
                # Texts of a fan-out contain placeholders on purpose.
                name: part if self.fan_out is not None and name not in OWN_SECTIONS else _escaped(part)
                for name, part in self.to_dict().items()
            }
        )


def _plain_value(value: Any) -> Any:
    """Return parts and paths in ``value`` as a YAML file would hold them."""
    if isinstance(value, SpecModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {key: _plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_value(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _escaped(value: Any) -> Any:
    """Return ``value`` with placeholders escaped, so that rendering gives it back."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return escape(value) if isinstance(value, str) else value


def _text_issues(document: Document, value: Any, path: FieldPath) -> Iterator[SpecIssue]:
    """Yield an issue for each text that no file in UTF-8 can hold. Some versions of pydantic accept such text."""
    if isinstance(value, str) and not _is_utf8(value):
        message = f"{dotted(path)} is not UTF-8"
        yield SpecIssue(message, document.place_of(path), path, ascii(value), "text in UTF-8", "rename it")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _text_issues(document, item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _text_issues(document, item, (*path, index))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a job spec, for editors. Rules that span fields are not in it."""
    schema: dict[str, Any] = _plain(JobSpec.model_json_schema(mode="validation"))
    schema["properties"]["params"]["propertyNames"] |= {"pattern": PARAM_PATTERN}
    schema["properties"]["steps"] |= {"minItems": 1}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Job spec"}


def _plain(part: Any, *, is_names: bool = False) -> Any:
    """Return a schema without pydantic's generated titles, and with descriptions as plain text."""
    if isinstance(part, list):
        return [_plain(item) for item in part]
    if not isinstance(part, dict):
        return part
    schema = {
        key: _plain(value, is_names=key in ("properties", "$defs") and not is_names)
        for key, value in part.items()
        if is_names or key != "title"
    }
    if not is_names and isinstance(schema.get("description"), str):
        schema["description"] = " ".join(schema["description"].replace("``", "`").split())
    return schema
