"""`StageRecipe`: all that a worker needs to score any partition of a stage. A recipe is small: every task has one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa

from pipeline.common.agreement import Decision
from pipeline.common.digest import digest_json
from pipeline.common.sketch import MOST_COLUMNS
from pipeline.common.step_code import StepCode
from pipeline.common.units import parse_seconds
from pipeline.devices.memory import DEVICE_MEMORY
from pipeline.models.model import ModelVersion, joint_digest
from pipeline.plan.dask_recipe import DaskRecipe
from pipeline.plan.memory import MOST_GROUP_BYTES
from pipeline.spec.endpoint import Endpoint
from pipeline.spec.model_ref import Device, Engine, OutputKind
from pipeline.spec.parts import Errors, MapStep, RetryCall

REJECT_FILE = "_file"
REJECT_ROW = "_row"
REJECT_REASON = "_reason"
REJECT_MESSAGE = "_message"
REJECT_COLUMNS = (REJECT_FILE, REJECT_ROW, REJECT_REASON, REJECT_MESSAGE)
"""Columns of a reject besides those of its input row: file, row number in the file (from 0), reason, message."""
ORIGIN = pa.schema([(REJECT_FILE, pa.dictionary(pa.int32(), pa.string())), (REJECT_ROW, pa.int64())])
"""Hidden columns of a checkpoint: file of the job's source, and number in it, of the row that each row comes from."""


@dataclass(frozen=True)
class ColumnRule:
    """The checks on one column, with defaults filled in. None means: not checked."""

    column: str
    dtype: str | None = None
    nullable: bool = True
    finite: bool = False
    min: bool | int | float | str | None = None
    max: bool | int | float | str | None = None
    allowed: tuple[bool | int | float | str, ...] | None = None


@dataclass(frozen=True)
class ErrorRule:
    """Action for a class of exceptions that a ``map`` step raises."""

    error: str
    """Name of the class, with or without its module."""
    action: Literal["reject", "fail"]
    """Action after the last call."""
    retries: int = 0
    """Most further calls."""
    wait: float = 0.0
    """Seconds before the first of them; twice as many before each further one."""


@dataclass(frozen=True)
class MapRecipe:
    """One ``map`` step."""

    entrypoint: str
    dtype_backend: str = "numpy"
    row_wise: str = "checked"
    frame: bytes = b""
    """Arrow schema (IPC) of the step's result, equal for all batches; empty: not planned."""
    on_error: tuple[ErrorRule, ...] = ()
    timeout: float = 0.0
    """Longest seconds for a batch; 0: no limit."""
    row_timeout: float = 0.0
    """Longest seconds for a row; 0: no limit."""
    concurrency: int = 0
    """Most calls of an ``async def`` step at a time; 0: the default."""
    rows_per_call: int = 0
    """Most rows of such a call; 0: the default."""

    @staticmethod
    def of(step: MapStep, frame: bytes = b"") -> MapRecipe:
        """Return the recipe of a step of a spec.

        :param frame: see the field.
        """
        rules = tuple(_error_rule(name, action) for name, action in step.on_error.items())
        timeout, row_timeout = (parse_seconds(value or 0) for value in (step.timeout, step.row_timeout))
        calls = step.concurrency or 0, step.rows_per_call or 0
        return MapRecipe(step.map, step.dtype_backend, step.row_wise, frame, rules, timeout, row_timeout, *calls)


def _error_rule(name: str, action: Literal["reject", "fail"] | RetryCall) -> ErrorRule:
    if isinstance(action, RetryCall):
        return ErrorRule(name, action.then, action.retry, parse_seconds(action.wait))
    return ErrorRule(name, action)


@dataclass(frozen=True)
class FilterRecipe:
    """One ``filter`` step that is not pushed into the source."""

    condition: str


@dataclass(frozen=True)
class SelectRecipe:
    """One ``select`` step, with the columns that later steps need."""

    columns: tuple[tuple[str, str], ...]
    """New and old name of each column."""


@dataclass(frozen=True)
class CheckRecipe:
    """The part of the contract on columns that the step before has made."""

    rules: tuple[ColumnRule, ...]


@dataclass(frozen=True)
class Shadow:
    """Comparison of a challenger with another column of scores."""

    column: str
    decision: Decision = ""


@dataclass(frozen=True)
class ScoreRecipe:
    """A ``score`` step with everything resolved."""

    model: ModelVersion
    features: tuple[str, ...]
    """Column of the frame for each feature of the model, in the model's order."""
    kind: OutputKind
    outputs: tuple[str, ...]
    """Names of the columns that receive the scores."""
    rules: tuple[ColumnRule, ...] = ()
    """Rules for features and for columns that steps make, checked before scoring."""
    engine: Engine = "auto"
    tolerance: float = 0.0
    """Largest difference of margins at which two engines count as equal; 0: all bits must be equal."""
    where: str | None = None
    """Condition for the rows to score; other rows get null."""
    shadow: Shadow | None = None
    """Column to compare with; the step then rejects no row."""


@dataclass(frozen=True)
class EnsembleRecipe:
    """A ``score`` step with a list of models."""

    members: tuple[ScoreRecipe, ...]
    """Each with its own model, features and rules; all have the outputs of the step."""
    combine: str
    """``mean``, ``median``, ``max``, ``min`` or ``vote``."""
    weights: tuple[float, ...] = ()
    """One weight for each member of a weighted ``mean``; empty: all count the same."""
    where: str | None = None
    """Condition for the rows to score; other rows get null."""
    shadow: Shadow | None = None
    """Column to compare with; the step then rejects no row."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the columns that receive the scores."""
        return self.members[0].outputs


@dataclass(frozen=True)
class StackRecipe:
    """A ``score`` step in which the scores of several models are the features of one more."""

    members: tuple[ScoreRecipe, ...]
    """The models of the list, each with output columns of its own; last the model on top, whose features these are."""
    where: str | None = None
    """Condition for the rows to score; other rows get null."""
    shadow: Shadow | None = None
    """Column to compare with; the step then rejects no row."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the columns that receive the scores."""
        return self.members[-1].outputs


@dataclass(frozen=True)
class KeyedRecipe:
    """A ``score`` step with a model for each value of a column."""

    by: str
    values: tuple[str, ...]
    """Values of the column as text, in order."""
    members: tuple[ScoreRecipe, ...]
    """The recipe for each value; then that for other values, if they have a model. All have the outputs of the step."""
    other: Literal["reject", "null", "model"] = "reject"
    """Rows with another value."""
    where: str | None = None
    """Condition for the rows to score; other rows get null."""
    shadow: Shadow | None = None
    """Column to compare with; the step then rejects no row."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the columns that receive the scores."""
        return self.members[0].outputs

    @staticmethod
    def shared(members: Iterable[ScoreRecipe]) -> tuple[ScoreRecipe, ...]:
        """Return ``members`` with one object for equal features and rules: pickled, many members are small then."""
        known: dict[str, Any] = {}

        def one(value: Any) -> Any:
            return known.setdefault(repr(value), value)

        return tuple(
            replace(
                member,
                model=replace(member.model, features=one(member.model.features)),
                features=one(member.features),
                outputs=one(member.outputs),
                rules=one(member.rules),
            )
            for member in members
        )


AnyScore = ScoreRecipe | EnsembleRecipe | StackRecipe | KeyedRecipe
"""Recipe of a ``score`` step."""
StepRecipe = MapRecipe | FilterRecipe | SelectRecipe | CheckRecipe | AnyScore | DaskRecipe


SEVERAL = (EnsembleRecipe, StackRecipe, KeyedRecipe)
"""Recipes with several models."""


def scores_of(chain: Iterable[StepRecipe]) -> tuple[ScoreRecipe, ...]:
    """Return what each model of a chain scores, in order; the members of a step with several models one by one."""
    members = [step.members if isinstance(step, SEVERAL) else (step,) for step in chain]
    return tuple(member for group in members for member in group if isinstance(member, ScoreRecipe))


def scores_of_columns(step: StepRecipe) -> tuple[ScoreRecipe, ...]:
    """Return what the models of a step score whose features are columns of the rows: not the one on top of a stack."""
    return step.members[:-1] if isinstance(step, StackRecipe) else scores_of([step])


def may_leave_null(step: AnyScore) -> bool:
    """Return True if a ``score`` step may give rows that remain no score."""
    return step.where is not None or step.shadow is not None or (isinstance(step, KeyedRecipe) and step.other == "null")


def _is_free_text(step: AnyScore) -> bool:
    """Return True if a service answers with any text."""
    outputs = step.model.output_types if isinstance(step, ScoreRecipe) and step.model.endpoint else ()
    return bool(outputs) and outputs[0].type == "string" and not outputs[0].types


def held_steps(chain: Iterable[StepRecipe]) -> tuple[StepRecipe, ...]:
    """Return the steps whose models are held in memory while a partition is scored: all but those by key."""
    return tuple(step for step in chain if not isinstance(step, KeyedRecipe))


@dataclass(frozen=True)
class StageRecipe:
    """A stage, ready to run on any of its partitions."""

    job: str
    plan: str
    """Digest of the plan."""
    directory: str
    """Root of the job directory, path or URL."""
    round: int
    columns: tuple[str, ...]
    """Physical columns to read from the files."""
    filter: str | None
    schema: bytes
    """Arrow schema (IPC) of a source batch: ``columns`` and the requested hive keys."""
    chain: tuple[StepRecipe, ...]
    """The steps, in order."""
    source_rules: tuple[ColumnRule, ...]
    """Rules for columns of the source, checked before the first step."""
    output_schema: bytes
    """Arrow schema (IPC) of the output: columns of the rows after the last step."""
    batch_rows: int
    """Rows of the first batch."""
    batch_bytes: int = 0
    """Limit for the decoded bytes that are read for a batch; 0: no limit."""
    source_format: str = "parquet"
    """Name of the `pipeline.sources` adapter."""
    compression: str = "snappy"
    row_group_rows: int = 1 << 20
    """Rows per row group of the written files."""
    row_group_bytes: int = MOST_GROUP_BYTES
    """Limit for the decoded bytes of a row group of the written files."""
    fsync: bool = True
    import_paths: tuple[str, ...] = field(default=())
    """Folders added to ``sys.path`` on workers, from which the modules of the steps are imported."""
    code: tuple[StepCode, ...] = ()
    """Code of the modules of the steps, as planned."""
    functions: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Stored functions by SHA-256 that travel with the recipe, where there is no job directory. ``chain`` has their
    digests."""
    pin_code: bool = False
    """True: a worker whose files differ from ``code`` takes the sources that the job directory keeps."""
    never_null: tuple[str, ...] = ()
    """Columns of the source without nulls; see `pipeline.plan.plan.Plan`."""
    device: Device = "cpu"
    """Device that a worker uses: ``cuda``, its GPU or an error; ``auto``, its GPU if it has one. Changes no row, so it
    is not part of the digest."""
    device_memory: float | int | str = DEVICE_MEMORY
    """Share of the free device memory, or a size, that batches may use; no part of the digest, either."""
    device_batch_rows: int = 0
    """Rows of the first batch where a GPU scores, and of the first that is tried on it; 0: as on CPUs. No part of the
    digest, either."""
    service_share: float = 1.0
    """Share of a worker process of the limits that a whole job has for a service; no part of the digest, either."""
    sketch_every: int = 0
    """Features of one in so many rows are counted for their distributions, and scores of 32 times as many; 0: neither
    are."""
    errors: Errors = field(default_factory=Errors)
    """Policy for rejected rows, which says what is stored of them; part of the plan's digest."""
    storage: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of file systems per URL prefix, with references for secrets; see `pipeline.storage.urls`."""
    keeps_origin: bool = False
    """True: the written rows have the hidden columns `ORIGIN`."""
    reads_origin: bool = False
    """True: the read files have these columns. They name the row for rejects, and no step sees them."""

    @property
    def visible_schema(self) -> pa.Schema:
        """Schema of the rows after the last step: the columns of the output without the hidden ones."""
        written = pa.ipc.read_schema(pa.py_buffer(self.output_schema))
        return pa.schema(list(written)[: -len(ORIGIN)]) if self.keeps_origin else written

    @property
    def maps(self) -> tuple[MapRecipe, ...]:
        """The ``map`` steps, in order."""
        return tuple(step for step in self.chain if isinstance(step, MapRecipe))

    @property
    def scores(self) -> tuple[ScoreRecipe, ...]:
        """Recipes of the models, in order; those of a step with several one by one."""
        return scores_of(self.chain)

    @property
    def score_columns(self) -> tuple[str, ...]:
        """Columns of the output that ``score`` steps make, in the order of the steps; without free texts of services,
        of which no distribution is counted."""
        steps = [step for step in self.chain if isinstance(step, AnyScore) and not _is_free_text(step)]
        made = dict.fromkeys(name for step in steps for name in step.outputs)
        kept = pa.ipc.read_schema(pa.py_buffer(self.output_schema)).names
        return tuple(name for name in made if name in kept)

    @property
    def sketched_features(self) -> tuple[str, ...]:
        """Features whose distributions are counted: as many as there is room for beside the scores."""
        scores = (score for step in self.chain for score in scores_of_columns(step) if not score.model.endpoint)
        features = (name for score in scores for name in score.features)
        room = max(0, MOST_COLUMNS - len(self.score_columns))
        return tuple(dict.fromkeys(features))[:room] if self.sketch_every else ()

    @property
    def time_limits(self) -> tuple[float, float]:
        """Longest seconds for a batch and for a row, of all steps; 0.0: no limit."""
        batch, row = ([getattr(step, name) for step in self.maps] for name in ("timeout", "row_timeout"))
        return min(filter(None, batch), default=0.0), min(filter(None, row), default=0.0)

    @property
    def service_rows(self) -> int:
        """Rows of a batch where services score rows, whose answers take long; 0 without one."""
        texts = [score.model.endpoint for score in self.scores if score.model.endpoint]
        return max((Endpoint.model_validate_json(text).rows_at_a_time for text in texts), default=0)

    @property
    def held_models(self) -> tuple[ModelVersion, ...]:
        """Models that score every batch, and so are held in memory: all but those by key."""
        return tuple(score.model for score in scores_of(held_steps(self.chain)))

    @property
    def model_digest(self) -> str:
        """Digest of the models; see `pipeline.models.model.joint_digest`."""
        return joint_digest([step.model for step in self.scores])

    @property
    def digest(self) -> str:
        """Content digest, also used as Dask's token."""
        chain = [
            {**step.__dict__, "frame": step.frame.hex()} if isinstance(step, MapRecipe) else step for step in self.chain
        ]
        schemas = {"schema": self.schema.hex(), "output_schema": self.output_schema.hex()}
        flags = {name for name in ("keeps_origin", "reads_origin") if not self.__dict__[name]}
        fields = {
            name: value
            for name, value in self.__dict__.items()
            if not name.startswith("device")
            and name not in ("functions", "service_share", "errors")
            and name not in flags
        }
        return digest_json({**fields, **schemas, "chain": chain})

    def __dask_tokenize__(self) -> str:
        return self.digest
