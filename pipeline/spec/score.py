"""``score`` steps of job specs: the model or models, what they read, and what they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from pipeline.spec.endpoint import Endpoint
from pipeline.spec.fields import (
    COMBINATIONS,
    AnyPath,
    Categories,
    Combine,
    KeyedModels,
    ModelListing,
    ModelText,
    Name,
    Names,
    PathText,
    Rounds,
    SomeNames,
    SpecModel,
    Weights,
    key_texts,
    spec_error,
)
from pipeline.spec.model_ref import Engine, IterationRange, ModelRef, OutputKind


class Output(SpecModel):
    """Result of the model to write."""

    column: str = Field(min_length=1)
    """Name of the output column; with k values a row, the prefix of ``<column>_0`` … ``<column>_{k-1}``."""
    kind: OutputKind = "prediction"
    """``prediction`` (result of the library's own predict), ``label`` (the class), ``probabilities`` (one value for
    each class, also of two), ``margin`` (before the objective's transformation), ``leaf`` (leaf number per tree),
    ``contributions`` (SHAP values per feature, the bias last)."""


_NOT_FOR_ENDPOINTS = (
    "model",
    "by",
    "models",
    "combine",
    "meta",
    "model_files",
    "features",
    "iteration_range",
    "shadow",
    "flavor",
    "allow_code",
    "threads",
    "categories",
)
_FITTED = "fitted:"
_MODEL_FIELDS = ("model", "meta", "other", "models")
"""Fields of a score step that name models."""


class Score(SpecModel):
    """Scoring with a model."""

    model: ModelText | Annotated[tuple[ModelText, ...], Field(min_length=1, strict=False)] | None = None
    """Path or URL of a model file or folder, a model reference ``models:/name@alias``, or ``module:Class`` for a model
    in Python; or a list of these, and ``combine``. Required, unless ``by`` and ``models`` name a model for each key."""
    endpoint: Endpoint | None = None
    """In place of ``model``: a service with the interface of OpenAI, such as vLLM or llama.cpp's server, for chat
    completions or embeddings; see docs/endpoints.md."""
    model_files: PathText | Annotated[tuple[PathText, ...], Field(min_length=1, strict=False)] | None = None
    """Files or folders that a model in Python loads: ``load(files)`` gets the path of a verified copy of each, by its
    name, or by its path in the folder. They are pinned by their digests."""
    combine: Combine | Weights | None = None
    """Result of a list of models: ``mean``, ``median``, ``max`` or ``min`` of their values, or a mean with one weight
    for each model; ``vote`` for labels: the most frequent one, of several the one that the first such model gave;
    ``stack``: the result of the model ``meta``. Computed in float64, in the order of the list."""
    meta: ModelText | None = None
    """With ``combine: stack``: the model whose features are the results of the list's models, in the order of the list;
    of a model with several values a row, one after the other."""
    meta_input: OutputKind = "prediction"
    """With ``combine: stack``: output of the list's models that ``meta`` gets; ``output`` is that of ``meta``."""
    by: Name | None = None
    """Column whose value chooses the model that scores a row: text, integers, booleans or dates."""
    models: Annotated[ModelListing | KeyedModels | None, BeforeValidator(key_texts)] = None
    """Model for each value of ``by``: a mapping; or a path or reference with ``{}`` in place of the value, such as
    ``models/{}.ubj`` or ``models:/churn-{}@champion``: the models that exist when the job is planned."""
    other: ModelText | None = "reject"
    """Rows with another value, or null: ``reject`` them (the reason is ``no_model``), score them as ``null``, or with
    the model named here."""
    features: SomeNames | None = None
    """Columns in training order. Default: the model's own feature names."""
    output: Name | Output = "prediction"
    """Output column, or ``{column: …, kind: …}``."""
    keep: Names | None = None
    """Columns to copy to the output, at the last ``score`` step only. Default: all of the input, or of the last
    ``select``; and those that later ``map`` steps make."""
    engine: Engine = "auto"
    """Engine that evaluates the model: ``library``, the model's own; ``xgboost``, the same where the model is
    xgboost's; ``trees``, the tree engine of this project; ``auto``, the faster of the two."""
    tolerance: float = Field(default=0.0, ge=0.0, le=1.0)
    """Largest absolute difference of margins (before the objective's transformation) at which the results of two
    engines count as equal. Default 0: every bit must be equal."""
    iteration_range: Literal["best"] | Rounds | None = None
    """Boosting rounds to score with: ``[begin, end]``, the end exclusive, as in ``Booster.predict``; or ``best``: up to
    the best iteration of early stopping, as xgboost's scikit-learn wrapper does. Default: all rounds of the file."""
    where: Name | None = None
    """Condition for rows to score, in the language of ``source.filter``; other rows get null. A later model thus scores
    only the rows that an earlier one left open. Default: all rows."""
    shadow: Name | None = None
    """Column with which to compare the result, such as the output of an earlier ``score``. The step then rejects no
    row, its column is in the output only if it is selected or kept, and report and receipts say how far both agree."""
    flavor: Name | None = None
    """Format of the model file, where the file must be of that one only: ``xgboost``, ``lightgbm``, ``sklearn``,
    ``onnx``, ``catboost``, ``python``, ``torch``, ``transformers``, ``mlflow``, or a flavor of another
    distribution. Default: recognised by the file's bytes."""
    allow_code: bool = False
    """Permit a model file that runs code when it is loaded, such as a pickle. Only for files of people you trust."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of one call of the model's library. Default: ``OMP_NUM_THREADS`` of the worker, or 1."""
    categories: dict[Name, Categories] | None = None
    """Categories of the training data per feature, in the order of their codes, where the model file has lost them:
    xgboost 3.1 to 3.3 cuts names of pandas categories that are not ASCII, and slices lose all. The list must agree with
    whatever the file tells. Default: the categories of the file."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            model: AnyPath | Sequence[AnyPath] | object | None = None,
            endpoint: Endpoint | Mapping[str, Any] | None = None,
            model_files: AnyPath | Sequence[AnyPath] | None = None,
            combine: Combine | Sequence[float] | None = None,
            meta: AnyPath | object | None = None,
            meta_input: OutputKind = "prediction",
            by: str | None = None,
            models: AnyPath | Mapping[str, AnyPath | object] | Mapping[int, AnyPath | object] | None = None,
            other: AnyPath | object | None = "reject",
            features: Sequence[str] | None = None,
            output: str | Output | Mapping[str, Any] = "prediction",
            keep: Sequence[str] | None = None,
            engine: Engine = "auto",
            tolerance: float = 0.0,
            iteration_range: IterationRange | None = None,
            where: str | None = None,
            shadow: str | None = None,
            flavor: str | None = None,
            allow_code: bool = False,
            threads: int | None = None,
            categories: Mapping[str, Sequence[str | int]] | None = None,
        ) -> None: ...

    _fitted: dict[str, Any] = PrivateAttr(default_factory=dict)
    """Fitted models that Python code gave in place of references, by the text that stands for each."""

    @model_validator(mode="wrap")
    @classmethod
    def _hold_fitted(cls, value: Any, make: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(value, dict):
            return make(value)
        held: dict[str, Any] = {}

        def named(one: Any) -> Any:
            if isinstance(one, (list, tuple)):
                return type(one)(map(named, one)) if type(one) in (list, tuple) else one
            if isinstance(one, dict):
                return {key: named(inner) for key, inner in one.items()}
            # Bytes, numbers and dates are mistakes, which the field's own check explains.
            if one is None or isinstance(one, (str, bytes, bytearray, int, float, date, PathLike)):
                return one
            text = f"{_FITTED}{type(one).__name__}-{len(held) + 1}"
            held[text] = one
            return text

        made = make(value | {name: named(value[name]) for name in _MODEL_FIELDS if name in value})
        if held:
            made._fitted.update(held)
        return made

    @property
    def fitted(self) -> dict[str, Any]:
        """Fitted models in place of references, by the text that stands for each; `pipeline.Job` stores them."""
        return self._fitted

    def with_models(self, stored: Mapping[str, str]) -> Score:
        """Return the step with stored files in place of fitted models.

        :param stored: path or URL by the text that stands for a model.
        """

        def place(one: Any) -> Any:
            if isinstance(one, tuple):
                return tuple(map(place, one))
            if isinstance(one, dict):
                return {key: place(inner) for key, inner in one.items()}
            return stored.get(one, one)

        models = {name: place(getattr(self, name)) for name in _MODEL_FIELDS if name in self.model_fields_set}
        # Whoever has the object has run its code.
        made = self.model_copy(update={**models, "allow_code": True})
        made._fitted = {}
        return made

    @model_validator(mode="after")
    def _check_shadow(self) -> Self:
        if self.shadow is not None and self.output_spec.kind not in ("prediction", "label", "margin"):
            raise spec_error(
                f"cannot compare the output {self.output_spec.kind}", expected="a prediction, a label or a margin"
            )
        return self

    @model_validator(mode="after")
    def _check_endpoint(self) -> Self:
        if self.endpoint is None:
            return self
        others = (*_NOT_FOR_ENDPOINTS, *(() if self.engine == "auto" else ("engine",)))
        given = [name for name in others if getattr(self, name) not in (None, False)]
        if given:
            raise spec_error(f"has both endpoint and {given[0]}", next_step=f"remove {given[0]}")
        if self.output_spec.kind != "prediction":
            raise spec_error(
                f"asks an endpoint for the output {self.output_spec.kind}", expected="a prediction: the answers"
            )
        return self

    @model_validator(mode="after")
    def _check_keyed(self) -> Self:
        if self.endpoint is not None:
            return self
        if self.by is None and self.models is None:
            if self.model is None:
                raise spec_error(
                    "has no model",
                    expected="model: a file or reference; endpoint: a service; or by: a column, and models:",
                )
            if self.other != "reject":
                raise spec_error("has other without by", expected="other beside by: a column, and models:")
            return self
        if self.model is not None:
            raise spec_error(
                "has both model and models" if self.models is not None else "has both model and by",
                expected="model: one for all rows; or by: a column, and models:",
                next_step="name the model of other rows with other:",
            )
        if self.by is None or self.models is None:
            raise spec_error(
                "has models without by" if self.by is None else "has by without models",
                expected="by: a column, and models: {value: model} or models/{}.ubj",
            )
        return self

    @model_validator(mode="after")
    def _check_meta(self) -> Self:
        if self.combine == "stack" and self.meta is None:
            raise spec_error("has combine: stack without meta", expected="meta: the model that gets the list's results")
        if self.combine != "stack" and (self.meta is not None or self.meta_input != "prediction"):
            raise spec_error(
                "has meta without combine: stack", expected="combine: stack beside a list of models and meta"
            )
        return self

    @model_validator(mode="after")
    def _check_combine(self) -> Self:
        if self.model is None:
            if self.combine is not None:
                raise spec_error("has combine beside by", expected="combine beside model: a list")
            return self
        if isinstance(self.model, str):
            if self.combine is not None:
                raise spec_error("has combine for one model", expected="combine beside a list of models")
            return self
        is_label, kind = self.output_spec.kind == "label", self.output_spec.kind
        if self.combine is None:
            raise spec_error("has a list of models without combine", expected=f"combine: {', '.join(COMBINATIONS)}")
        if self.combine == "stack":
            return self
        if kind == "leaf" or is_label != (self.combine == "vote"):
            expected = "combine: vote for labels; mean, median, max, min or weights for predictions and margins"
            raise spec_error(f"cannot combine the output {kind} so", expected=expected)
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.combine is None or isinstance(self.combine, str) or not isinstance(self.model, tuple):
            return self
        if len(self.combine) != len(self.model):
            raise spec_error(
                "has another number of weights than of models", expected=f"{len(self.model)} weights in combine"
            )
        if min(self.combine) < 0 or sum(self.combine) <= 0:
            raise spec_error("has invalid weights", expected="numbers from 0 on, at least one above 0, in combine")
        return self

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if self.model_files is not None and not any(ModelRef(text).is_code for text in self.references):
            raise spec_error(
                "has model_files without a model in Python",
                expected="model: module:Class beside model_files; other models are named by the path of their file",
            )
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """``model_files`` as a tuple."""
        files = self.model_files
        return () if files is None else (files,) if isinstance(files, str) else files

    @property
    def references(self) -> tuple[str, ...]:
        """The model references: one, or those of a list, then ``meta``; by key, in order, then that of other keys.

        A listing has none before it is resolved; see `pipeline.models.listing`.
        """
        if self.endpoint is not None:
            return (self.endpoint.reference,)
        if self.model is None:
            return (*self.keyed_models.values(), *([] if self.other_model is None else [self.other_model]))
        if isinstance(self.model, str):
            return (self.model,)
        return self.model if self.meta is None else (*self.model, self.meta)

    @property
    def by_reference(self) -> tuple[Score, ...]:
        """The step as each of ``references`` is used: with its own kind of output and options."""
        if self.meta is None:
            return (self,) * len(self.references)
        own = {"engine": self.engine, "tolerance": self.tolerance}
        base = self.model_copy(update={"output": Output(column=self.output_spec.column, kind=self.meta_input)})
        meta = Score.model_validate({"model": self.meta, "output": self.output, **own})
        return (*(base for _ in self.references[:-1]), meta)

    @property
    def keyed_models(self) -> dict[str, str]:
        """The model reference for each value of ``by``, in order of the values; empty for a listing."""
        return dict(sorted(self.models.items())) if isinstance(self.models, dict) else {}

    @property
    def other_model(self) -> str | None:
        """Model reference for rows with another value of ``by``; None if they have no model."""
        return None if self.other == "reject" else self.other

    @property
    def rounds(self) -> IterationRange | None:
        """``iteration_range`` as a type with two bounds."""
        value = self.iteration_range
        return value if value is None or isinstance(value, str) else (value[0], value[1])

    @property
    def output_spec(self) -> Output:
        """``output`` as an `Output`."""
        return Output(column=self.output) if isinstance(self.output, str) else self.output


class ScoreStep(SpecModel):
    """Step that scores with a model."""

    score: Score
