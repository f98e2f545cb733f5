"""`JobSpec`: what a job is. Frozen, digestible, no I/O but reading its own file.

How a job runs on a site (cluster, memory, directory) is not part of it; see `pipeline.settings`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pipeline.digest import digest_json
from pipeline.errors import SpecError
from pipeline.mistakes import IN_PYTHON, Document, Mistake, SpecMistakes, did_you_mean
from pipeline.model import Engine, ModelRef, OutputKind
from pipeline.spec_text import dump_text, read_document
from pipeline.units import parse_bytes
from pipeline.validation import mistakes_of

_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_ENTRYPOINT = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"
STEP_KINDS = ("map", "score")
_ORDER = "order"
_KIND = "step"


def _wrong(predicate: str, *, expected: str = "", next_step: str = "") -> PydanticCustomError:
    """A mistake in words of our own, what is said of the field; pydantic adds which one."""
    return PydanticCustomError("spec", "{said}", {"said": predicate, "expected": expected, "next": next_step})


def _check_name(text: str) -> str:
    if not re.fullmatch(_NAME[1:-1], text):
        near = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:64]
        raise _wrong(
            "is not a valid name",
            expected="lower-case letters, digits, dots, underscores and dashes; at most 64",
            next_step=f"write {near}" if near else "",
        )
    return text


def _check_entrypoint(text: str) -> str:
    module, _, function = text.partition(":")
    if not re.fullmatch(_ENTRYPOINT[1:-1], text) or module.endswith(".py"):
        near = module.removesuffix(".py").strip("./").replace("/", ".")
        if not function and "." in near:
            near, _, function = near.rpartition(".")
        guess = f"{near}:{function or 'function'}"
        raise _wrong(
            "does not name a function",
            expected="module:function, such as features:build",
            next_step=f"write {guess}" if re.fullmatch(_ENTRYPOINT[1:-1], guess) else "",
        )
    return text


def _check_model(text: str) -> str:
    try:
        ModelRef.parse(text)
    except SpecError as error:
        raise _wrong("is a malformed model reference", expected=error.expected) from error
    return text


def _check_path(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise _wrong("is not a path", expected="a path or a URL")
    return text


def _check_size(value: int | str) -> int | str:
    try:
        parse_bytes(value)
    except SpecError as error:
        raise _wrong("is not a size", expected=error.expected) from error
    return value


def _check_unique(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _wrong(f"names a column twice: {', '.join(twice)}", expected="every column once")
    return names


JobName = Annotated[str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": _NAME})]
Entrypoint = Annotated[str, AfterValidator(_check_entrypoint), Field(json_schema_extra={"pattern": _ENTRYPOINT})]
PathText = Annotated[str, AfterValidator(_check_path), Field(json_schema_extra={"minLength": 1})]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], Field(strict=False), AfterValidator(_check_unique)]
SomeNames = Annotated[tuple[Name, ...], Field(min_length=1, strict=False), AfterValidator(_check_unique)]
Value = bool | int | float | str


class Part(BaseModel):
    """Base of every part of a spec: frozen, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True)


class Source(Part):
    """Where the rows come from."""

    path: PathText | Annotated[tuple[PathText, ...], Field(min_length=1, strict=False)]
    """Parquet file, directory (hive partition folders are understood), glob, or a list of these; any fsspec URL."""
    columns: SomeNames | None = None
    """Columns to read. Default: all, less what neither the model, nor ``keep``, nor the contract needs when there is no
    ``map`` step."""
    filter: Name | None = None
    """Keep only rows for which this holds, such as ``country == 'DE' and age >= 18``."""


class MapStep(Part):
    """The user's function, called with one batch of rows at a time."""

    map: Entrypoint
    """``module:function``, pandas DataFrame -> pandas DataFrame. Row by row in effect: what it gives for a row must not
    depend on the other rows of the batch. It may drop rows; the index tells which rows are left."""
    dtype_backend: Literal["numpy", "pyarrow"] = "numpy"
    """Which dtypes the DataFrame has: pandas' defaults, or `pandas.ArrowDtype` throughout."""


class Output(Part):
    """What to write of the model's result."""

    column: str = Field(min_length=1)
    """Name of the output column; with k values a row, the prefix of ``<column>_0`` … ``<column>_{k-1}``."""
    kind: OutputKind = "prediction"
    """``prediction`` (what the library's own predict gives), ``label`` (the class), ``margin`` (before the objective's
    transformation), ``leaf`` (leaf number per tree), ``contributions`` (SHAP values per feature, the bias last)."""


class Score(Part):
    """Scoring with a model."""

    model: Annotated[PathText, AfterValidator(_check_model)]
    """Path or URL of a model file, or a model reference ``models:/name@alias``."""
    features: SomeNames | None = None
    """Columns in the order the model was trained with. Default: the model's own feature names."""
    output: Name | Output = "prediction"
    """Output column, or ``{column: …, kind: …}``."""
    keep: Names | None = None
    """Columns that are passed through to the output. Default: every input column."""
    engine: Engine = "auto"
    """What evaluates the model. ``xgboost``: the library itself. ``trees``: this project's tree engine (the extra
    ``fast``), several times faster and with the same bits; where it cannot score the model, the plan is refused.
    ``auto``: each worker times both on its first rows and goes on with the faster; what the tree engine cannot do, and
    jobs too small to earn its start, stay with xgboost. Results of the tree engine are compared with xgboost's all the
    while; where they differ, xgboost's are used and the report warns."""
    tolerance: float = Field(default=0.0, ge=0.0, le=1.0)
    """Largest absolute difference of margins (before the objective's transformation) at which results of two engines
    count as equal. Default 0: every bit must be the same."""

    @property
    def output_spec(self) -> Output:
        """``output`` in its long form."""
        return Output(column=self.output) if isinstance(self.output, str) else self.output


class ScoreStep(Part):
    """The step that scores."""

    score: Score


class Sink(Part):
    """Where the scored rows go."""

    path: PathText
    """Directory or URL."""
    mode: Literal["error", "overwrite", "append"] = "error"
    """What to do when there is data already: stop, replace it in one step, or add to it."""
    format: str = "parquet"
    """Name of the `pipeline.sinks` adapter."""
    target_file_size: Annotated[int | str, AfterValidator(_check_size)] | None = None
    """Size of a published file, as ``256 MiB`` or bytes: smaller neighbours are merged up to it. Default: one file per
    partition, as balanced by the plan."""
    compression: Literal["snappy", "zstd", "lz4", "gzip", "none"] = "snappy"
    """Parquet codec of the output."""

    @property
    def target_bytes(self) -> int | None:
        """``target_file_size`` as a number of bytes."""
        return None if self.target_file_size is None else parse_bytes(self.target_file_size)


class Errors(Part):
    """How many bad rows a job may have."""

    max_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Rejected rows / rows to be scored (filtered ones don't count) up to which the job succeeds, with warnings.
    Default 0: it fails closed."""


class ColumnContract(Part):
    """What must hold for every value of a column; a row that breaks it is rejected before it is scored."""

    dtype: str | None = None
    """Arrow type name, such as ``int64``, ``float32``, ``string``, ``timestamp[us]``."""
    nullable: bool | None = None
    """False: a null (or NaN) is rejected."""
    finite: bool | None = None
    """True: an infinity is rejected. The default for a model's numeric features."""
    min: Value | None = None
    """Lowest value allowed."""
    max: Value | None = None
    """Highest value allowed."""
    allowed: Annotated[tuple[Value, ...], Field(min_length=1, strict=False)] | None = None
    """The only values allowed. The default for a model's categorical features: the categories it knows."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.min is not None and self.max is not None:
            if isinstance(self.min, str) != isinstance(self.max, str):
                raise _wrong("has a min and a max of different kinds", expected="two numbers or two texts")
            if self.min > self.max:  # type: ignore[operator]
                raise _wrong("has a min above its max", expected="min <= max")
        return self


def _step_kind(step: Any) -> str | None:
    """What a step does; None when it is neither one thing nor the other."""
    if isinstance(step, (MapStep, ScoreStep)):
        return "map" if isinstance(step, MapStep) else "score"
    kinds = [kind for kind in STEP_KINDS if isinstance(step, dict) and kind in step]
    return kinds[0] if len(kinds) == 1 else None


def _step_tag(step: Any) -> str | None:
    """What pydantic chooses the type of a step by. No tag is a key of a step, because tags end up in its locations."""
    kind = _step_kind(step)
    return f"{kind} step" if kind else None


def _step_mistake(step: Any) -> tuple[str, str]:
    """Message and next step for a step that `_step_kind` does not know."""
    if isinstance(step, str):
        guess = "map" if ":" in step else "score"
        return "a step is a bare text", f"write {guess}: before it"
    if isinstance(step, dict) and all(kind in step for kind in STEP_KINDS):
        return "one step is two: map and score", "start each with a dash of its own"
    names = list(step) if isinstance(step, dict) else []
    hints = [did_you_mean(str(name), STEP_KINDS) for name in names]
    fields = {"map": MapStep.model_fields, "score": Score.model_fields}
    owner = next((kind for kind in STEP_KINDS for name in names if name in fields[kind]), None)
    if owner and not any(hints):
        return "a step does not say what it does", f"put {owner}: above {', '.join(names)}, and indent them below it"
    return "there is no such kind of step", next((hint for hint in hints if hint), "")


def _order_mistake(kinds: Sequence[str | None]) -> tuple[str, str] | None:
    """What is wrong with the order of steps (message, expected), or None."""
    count = kinds.count("score")
    if count > 1:
        return f"{count} steps score", "one score step, the last; a second model is a second job"
    if count == 1 and "map" in kinds[kinds.index("score") :]:
        return "a step comes after the score step", "the score step last: what it gives is the output"
    if count == 0 and None not in kinds:
        return "no step scores", "any number of map steps, then one score step"
    return None


def _check_order(steps: tuple[MapStep | ScoreStep, ...]) -> tuple[MapStep | ScoreStep, ...]:
    mistake = _order_mistake([_step_kind(step) for step in steps])
    if mistake is not None:
        raise PydanticCustomError(_ORDER, "{said}", {"said": mistake[0], "expected": mistake[1]})
    return steps


Step = Annotated[
    Annotated[MapStep, Tag("map step")] | Annotated[ScoreStep, Tag("score step")],
    Discriminator(_step_tag, custom_error_type=_KIND, custom_error_message="no such step"),
]


class JobSpec(Part):
    """A batch inference job."""

    name: JobName
    """Lower-case letters, digits, ``._-``; at most 64."""
    source: Source
    steps: Annotated[tuple[Step, ...], Field(strict=False), AfterValidator(_check_order)]
    """Any number of ``map``, then one ``score``."""
    sink: Sink
    errors: Errors = Errors()
    contract: dict[Name, ColumnContract] = Field(default_factory=dict)
    """Per column; adds to what the model's features ask for."""
    cluster: Name = "local"
    """A name in ``cluster_configs/``, a file, or the address of a scheduler."""

    @classmethod
    def build(cls, **fields: Any) -> Self:
        """A spec from Python values, lists and mappings as a YAML file would hold them.

        :raises SpecError: with every mistake that was found.
        """
        return cls.from_document(Document(IN_PYTHON, fields))

    @classmethod
    def load(cls, source: str | os.PathLike[str], *, overrides: Sequence[str] = ()) -> Self:
        """A spec from a YAML or JSON file (path or URL), or from a text with more than one line.

        :param overrides: ``field=value`` each, such as ``sink.path=out/``; the value is YAML.
        :raises SpecError: with every mistake that was found and its line and column.
        :raises RefusedForSafety: for anchors, aliases and Python tags.
        """
        return cls.from_document(read_document(source, overrides=overrides))

    @classmethod
    def from_document(cls, document: Document) -> Self:
        """A spec from a file that was read.

        :raises SpecError: with every mistake that was found.
        """
        mistakes = list(document.mistakes)
        spec = None
        try:
            spec = cls.model_validate(document.data)
        except ValidationError as error:
            mistakes += mistakes_of(error, model=cls, document=document, words={_KIND: _step_mistake})
            mistakes += _order_mistakes(document, error)
        if mistakes or spec is None:
            raise SpecMistakes(mistakes, name=document.name)
        return spec

    @property
    def maps(self) -> tuple[MapStep, ...]:
        """The ``map`` steps, in order."""
        return tuple(step for step in self.steps if isinstance(step, MapStep))

    @property
    def score(self) -> Score:
        """The ``score`` step."""
        return next(step.score for step in self.steps if isinstance(step, ScoreStep))

    @property
    def digest(self) -> str:
        """SHA-256 over everything that decides the output rows; where it runs is left out."""
        return digest_json(self.to_dict(exclude={"cluster"}))

    def to_dict(self, *, exclude: set[str] | None = None) -> dict[str, Any]:
        """As YAML or JSON holds it, defaults left out."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude=exclude)

    def to_yaml(self) -> str:
        """As a file that `load` reads back to the same spec, defaults left out."""
        return dump_text(self.to_dict())


def _order_mistakes(document: Document, error: ValidationError) -> list[Mistake]:
    """What is wrong with the order of steps, when pydantic did not get as far as to look."""
    steps = document.data.get("steps") if isinstance(document.data, dict) else None
    found = any(item["type"] == _ORDER for item in error.errors())
    mistake = None if found or not isinstance(steps, (list, tuple)) else _order_mistake([_step_kind(s) for s in steps])
    if mistake is None:
        return []
    return [Mistake(mistake[0], document.place_of(("steps",), key=True), ("steps",), expected=mistake[1])]


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a job spec, for editors: what it says is valid is so but for what spans fields."""
    schema: dict[str, Any] = _plain(JobSpec.model_json_schema(mode="validation"))
    schema["properties"]["steps"] |= {"contains": {"required": ["score"]}, "minContains": 1, "maxContains": 1}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Job spec"}


def _plain(part: Any, *, is_names: bool = False) -> Any:
    """A schema without pydantic's made-up titles, and with descriptions as plain text."""
    if isinstance(part, list):
        return [_plain(item) for item in part]
    if not isinstance(part, dict):
        return part
    kept = {
        key: _plain(value, is_names=key in ("properties", "$defs") and not is_names)
        for key, value in part.items()
        if is_names or key != "title"
    }
    if not is_names and isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].replace("``", "`").split())
    return kept
