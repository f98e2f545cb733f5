"""Resolve the columns that a job reads, gives to the model, keeps and checks. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.errors import PipelineError, SchemaDrift, SpecError
from pipeline.models.model import Feature, ModelVersion
from pipeline.plan.recipe import REJECT_COLUMNS, ColumnRule
from pipeline.sources.discovery import Discovery
from pipeline.sources.filters.compare import compare, is_one_of
from pipeline.sources.filters.parse import parse_filter
from pipeline.sources.types import empty_table, is_dtype, same_kind
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.parts import ColumnContract, Errors

_UNNAMED = re.compile(r"(f|Column_)[0-9]+")


@dataclass(frozen=True)
class Columns:
    """The columns of a job, by use."""

    features: tuple[str, ...]
    """Features, in the model's order."""
    keep: tuple[str, ...]
    read: tuple[str, ...]
    """Physical columns, in file order."""
    source: pa.Schema
    """Schema of a source batch: ``read`` and the requested hive keys."""
    source_rules: tuple[ColumnRule, ...]
    score_rules: tuple[ColumnRule, ...]


def resolve_columns(
    spec: JobSpec, *, model: ModelVersion, discovery: Discovery, frame: pa.Schema, outputs: Sequence[str]
) -> Columns:
    """Decide for every column whether it is read, scored, kept and checked.

    :param frame: schema after the map steps.
    :param outputs: columns that receive the scores.
    :raises SpecError: for unknown or clashing names in the spec.
    :raises SchemaDrift: for a feature that is missing or has a type that the model cannot use.
    """
    lookup = Lookup(discovery, frame, owner="what the map steps return" if spec.maps else "the input")
    features = model_features(spec.score.features, model, lookup)
    keep = _keep(spec, discovery, lookup)
    check_clashes(keep, outputs)
    check_twice(frame)
    contract = _contract(spec, discovery, frame, lookup)
    needed = {*keep, *features, *contract}
    if spec.source.filter is not None:
        needed |= parse_filter(spec.source.filter).columns
    # The columns that a map step needs are unknown: with map steps, read all columns of the source.
    source = discovery.schema
    if not spec.maps:
        source = pa.schema([field for field in source if field.name in needed])
    check_reserved(source)
    check_masked_names(spec.errors, source)
    source_rules, score_rules = _rules(spec, model, features, contract, source=source, frame=frame)
    return Columns(
        features=features,
        keep=keep,
        read=tuple(name for name in source.names if name not in discovery.key_names),
        source=source,
        source_rules=source_rules,
        score_rules=score_rules,
    )


class Lookup:
    """Find columns before a step, and explain why one is missing."""

    def __init__(self, discovery: Discovery, frame: pa.Schema, *, owner: str) -> None:
        """:param owner: what has the columns, for errors: ``the input``."""
        self.frame = frame
        self.names = set(frame.names)
        self.owner = owner
        self.path = discovery.files[0].path if discovery.files else ""
        self._left_out = set(discovery.available) - set(discovery.schema.names)

    def missing(self, name: str, *, use: str, where: str, error: type[PipelineError]) -> PipelineError:
        """Build the error for a missing column.

        :param use: use of the column, for the message.
        :param where: field of the spec that names the column; empty if the model does.
        """
        if name in self._left_out:
            return SpecError(
                f"source.columns leaves out a column that is needed as {use}",
                where="source.columns",
                found=f"no {name!r} in it",
                expected=name,
                next_step=f"add {name} to source.columns",
            )
        near = difflib.get_close_matches(name, self.frame.names, n=1)
        shown = ", ".join(self.frame.names[:20]) + (", …" if len(self.frame.names) > 20 else "")
        return error(
            f"{self.owner} has no column {name!r}, which is needed as {use}",
            where="; ".join(filter(None, (where, self.path))),
            found=f"the columns {shown or '(none)'}",
            expected=name,
            next_step=(f"did you mean {near[0]}? " if near else "")
            + (f"correct {where}" if where else "add the column, or map it to its name in score.features"),
        )


def model_features(given: tuple[str, ...] | None, model: ModelVersion, lookup: Lookup) -> tuple[str, ...]:
    """Return the columns of the features of a model, in its order.

    :param given: ``score.features``.
    :raises SpecError: for features that are not the model's.
    :raises SchemaDrift: for a feature that is missing or has a type that the model cannot use.
    """
    names = model.feature_names
    features = names if given is None else given
    if not features:
        raise SpecError(
            "the model does not tell which columns it needs",
            where="score.features",
            found=f"{model.name} has no feature names",
            expected="the columns in the order the model was trained with",
            next_step="list them in score.features",
        )
    if given is not None:
        _check_given(given, model)
    is_unnamed = given is None and all(_UNNAMED.fullmatch(name) for name in names)
    for position, name in enumerate(features):
        if name not in lookup.names and is_unnamed:
            raise SpecError(
                "the model was trained without column names, and the input has none of its made-up ones",
                where="score.features",
                found=f"features called {names[0]} … {names[-1]}",
                expected=f"{len(names)} column names in the order the model was trained with",
                next_step="list them in score.features",
            )
        if name not in lookup.names:
            where = "score.features" if given is not None else ""
            raise lookup.missing(name, use="a feature of the model", where=where, error=SchemaDrift)
        feature = model.features[position] if model.features else Feature(name)
        _check_feature(feature, lookup.frame.field(name), path=lookup.path)
    return features


def _check_given(given: Sequence[str], model: ModelVersion) -> None:
    names = model.feature_names
    problem = actual = ""
    if names and len(given) != len(names):
        problem, actual = "score.features has another number of columns than the model", f"{len(given)} columns"
    elif set(given) == set(names) and tuple(given) != names:
        problem = "score.features has the model's columns in another order than it was trained with"
        actual = ", ".join(given)
    if problem:
        raise SpecError(
            problem,
            where="score.features",
            found=actual,
            expected=f"{len(names)} columns in the model's order: " + ", ".join(names[:20]),
            next_step="remove score.features, or list the columns in the model's order",
        )


def _twice(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), "")  # type: ignore[func-returns-value]


def _check_feature(feature: Feature, field: pa.Field, *, path: str) -> None:
    kind, types = field.type, pa.types
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)
    is_number = feature.kind in ("number", "integer", "indicator")
    if types.is_null(kind) or feature.kind == "any" or (number and is_number):
        return
    expected, advice = "numbers or booleans", ""
    if feature.kind == "text":
        if same_kind(kind.value_type if types.is_dictionary(kind) else kind, pa.string()):
            return
        expected = "text"
    if feature.kind == "category":
        plain = kind.value_type if types.is_dictionary(kind) else kind
        if feature.categories is None:
            expected = "integer codes, because the model file holds no names of categories (slices lose them)"
            advice = f"list the names in training order under score.categories: {{{feature.name}: […]}}; or "
            fits = types.is_integer(kind)
        elif all(isinstance(category, str) for category in feature.categories):
            expected = "text, which is one of the model's categories"
            fits = same_kind(plain, pa.string())
        else:
            expected = "integers, which are the model's categories"
            fits = types.is_integer(plain)
        if fits:
            return
    if types.is_string(kind) and path.rpartition("/")[2].split(".")[1:2] in (["csv"], ["tsv"], ["jsonl"], ["ndjson"]):
        advice += f"set source.types: {{{feature.name}: …}}, which makes other values rejects; or "
    raise SchemaDrift(
        "a column has a type that the model cannot take",
        where=path,
        found=f"column {field.name!r} of type {kind}",
        expected=f"{expected}, for the feature {feature.name!r}",
        next_step=advice + "convert the column in a map step, or write the input with the type of the training data",
    )


def _keep(spec: JobSpec, discovery: Discovery, lookup: Lookup) -> tuple[str, ...]:
    given = spec.score.keep
    if given is None:
        offered = discovery.schema.names
        chosen = offered if spec.source.columns is None else [n for n in offered if n in spec.source.columns]
        return tuple(name for name in chosen if name in lookup.names)
    for name in given:
        if name not in lookup.names:
            raise lookup.missing(name, use="a column to keep", where="score.keep", error=SpecError)
    return given


def check_clashes(keep: Sequence[str], outputs: Sequence[str]) -> None:
    """Check that no score takes the name of a column that is kept.

    :raises SpecError: if one does.
    """
    for name in outputs:
        if name in keep:
            raise SpecError(
                "the output column has the name of a column that is kept",
                where="score.output",
                found=name,
                expected="a name that is not one of: " + ", ".join(keep[:20]),
                next_step=f"give score.output another name, or list in score.keep the columns without {name}",
            )


def check_twice(frame: pa.Schema) -> None:
    """Check that a map step returns no two columns of one name.

    :raises SpecError: if it does.
    """
    twice = _twice(frame.names)
    if twice:
        raise SpecError(
            "the map steps return two columns of the same name", where="steps", found=twice, next_step="rename one"
        )


def check_reserved(source: pa.Schema) -> None:
    """Check that no column of the source has a name of the rejects.

    :raises SpecError: if one has.
    """
    for name in source.names:
        if name in REJECT_COLUMNS:
            raise SpecError(
                "an input column has a name that rejected rows need for themselves",
                where="source.columns",
                found=name,
                expected="names other than " + ", ".join(REJECT_COLUMNS),
                next_step="leave the column out of source.columns, or rename it in the files",
            )


def check_masked_names(errors: Errors, source: pa.Schema, *, has_stages: bool = False) -> None:
    """Check that the job reads the columns that stored rejects keep or hash.

    :param has_stages: True: columns to keep may be those of a later stage.
    :raises SpecError: for an unknown name: a column that was meant to be hashed would be stored as it is.
    """
    kept = () if has_stages else errors.keep_columns or ()
    for where, names in (("keep_columns", kept), ("hash_columns", errors.hash_columns)):
        unknown = [name for name in names if name not in source.names]
        if unknown:
            raise SpecError(
                "the job reads no such column",
                where=f"errors.{where}",
                found=", ".join(unknown),
                expected=", ".join(source.names),
                next_step="name columns that the job reads",
            )


def _contract(
    spec: JobSpec, discovery: Discovery, frame: pa.Schema, lookup: Lookup
) -> dict[str, tuple[ColumnContract, pa.Field]]:
    """Return each part of the spec's contract with its field: the source's if it has one, else the frame's."""
    parts: dict[str, tuple[ColumnContract, pa.Field]] = {}
    for name, contract in spec.contract.items():
        if name in discovery.schema.names:
            field = discovery.schema.field(name)
        elif name in lookup.names:
            field = frame.field(name)
        else:
            raise lookup.missing(name, use="a column of the contract", where=f"contract.{name}", error=SpecError)
        check_contract(name, contract, field, path=lookup.path)
        parts[name] = contract, field
    return parts


def check_contract(name: str, contract: ColumnContract, field: pa.Field, *, path: str) -> None:
    """Check that the contract of a column can be checked on its type.

    :param path: a file of the source, for errors.
    :raises SchemaDrift: for a column of another type.
    :raises SpecError: for values of another type, or finite without numbers.
    """
    if contract.dtype is not None and not is_dtype(field.type, contract.dtype):
        raise SchemaDrift(
            "a column has another type than the contract asks for",
            where=path,
            found=f"column {name!r} of type {field.type}",
            expected=f"{contract.dtype}, as contract.{name}.dtype says",
            next_step=f"write the input with that type, or fix contract.{name}.dtype",
        )
    _check_comparisons(name, contract, field)
    types = pa.types
    if contract.finite and not (types.is_floating(field.type) or types.is_integer(field.type)):
        if types.is_decimal(field.type) or types.is_null(field.type):
            return
        raise SpecError(
            "the contract asks for finite values of a column that holds no numbers",
            where=f"contract.{name}.finite",
            found=f"column {name!r} of type {field.type}",
            expected="a column of numbers",
            next_step=f"take finite out of contract.{name}",
        )


def _check_comparisons(name: str, contract: ColumnContract, field: pa.Field) -> None:
    """Make the comparisons of a contract on a column without rows, as workers make them on batches."""
    empty = empty_table(pa.schema([field])).column(0)
    for key, literals in (("min", (contract.min,)), ("max", (contract.max,)), ("allowed", contract.allowed or ())):
        for value in literals:
            if value is None:
                continue
            try:
                compare("<", empty, value)
                is_one_of(empty, (value,))
            except (SpecError, pa.ArrowException) as error:
                raise SpecError(
                    "the contract compares a column with a value of another type",
                    where=f"contract.{name}.{key}",
                    found=f"{value!r} for a column of type {field.type}",
                    expected=error.expected
                    if isinstance(error, SpecError)
                    else "a column of a type that can be compared",
                    next_step=f"fix contract.{name}.{key}",
                ) from error


def _rules(
    spec: JobSpec,
    model: ModelVersion,
    features: Sequence[str],
    contract: dict[str, tuple[ColumnContract, pa.Field]],
    *,
    source: pa.Schema,
    frame: pa.Schema,
) -> tuple[tuple[ColumnRule, ...], tuple[ColumnRule, ...]]:
    """Return the rules to check before the first step and before scoring.

    Without steps, all rules are checked before scoring only, so that nothing is checked twice.
    """
    kinds = dict(zip(features, model.features, strict=False))
    before = {
        name: column_rule(name, part, field.type, None)
        for name, (part, field) in contract.items()
        if spec.maps and name in source.names
    }
    after = {}
    for name in dict.fromkeys((*features, *contract)):
        part, field = contract[name] if name in contract else (None, frame.field(name))
        if name in before:
            # Checked before the first step. For a feature, finite and allowed are checked again after the steps.
            part = ColumnContract(finite=part.finite, allowed=part.allowed) if part is not None else None
            if name not in features:
                continue
        kind = frame.field(name).type if name in frame.names else field.type
        after[name] = column_rule(name, part, kind, kinds.get(name), is_feature=name in features)
    return worthwhile(before.values()), worthwhile(after.values())


def column_rule(
    name: str,
    contract: ColumnContract | None,
    kind: pa.DataType,
    feature: Feature | None,
    *,
    is_feature: bool = False,
) -> ColumnRule:
    """Return the rule for a column, with the defaults of features.

    :param kind: type of the column.
    :param feature: the model's feature, if the column is one.
    """
    part = contract or ColumnContract()
    is_category = feature is not None and feature.kind in ("category", "text", "any")
    # The model gets float32. Only floats and 256-bit decimals can be infinite or too large for it.
    can_be_infinite = pa.types.is_floating(kind) or pa.types.is_decimal256(kind)
    finite = (is_feature and not is_category) if part.finite is None else part.finite
    known = feature.categories if feature is not None and is_category else None
    return ColumnRule(
        name,
        dtype=part.dtype,
        nullable=part.nullable is not False,
        finite=finite and can_be_infinite,
        min=part.min,
        max=part.max,
        allowed=known if part.allowed is None else part.allowed,
    )


def worthwhile(rules: Iterable[ColumnRule]) -> tuple[ColumnRule, ...]:
    """Return the rules that check something. A type is checked once in the plan, not again for every batch."""
    return tuple(rule for rule in rules if rule != ColumnRule(rule.column, dtype=rule.dtype))
