"""Resolve the steps of a job in order, and the columns that they need in reverse order. Pure.

Each step passes all columns on. The output has the columns of the input (or of the last ``select``) that are left, the
scores, and what ``map`` steps behind the last score make; ``keep`` or a last ``select`` names others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa

from pipeline.common.agreement import Decision
from pipeline.errors import PipelineError, SpecError
from pipeline.models.model import ModelVersion
from pipeline.models.outputs import output_type
from pipeline.plan.columns import (
    Lookup,
    check_clashes,
    check_contract,
    check_masked_names,
    check_reserved,
    check_twice,
    column_rule,
    model_features,
    worthwhile,
)
from pipeline.plan.dask_recipe import DaskRecipe
from pipeline.plan.outline import Stage, outline, stage_spec
from pipeline.plan.pushdown import condition, located, pushed_filters, read_source
from pipeline.plan.recipe import (
    AnyScore,
    CheckRecipe,
    ColumnRule,
    EnsembleRecipe,
    FilterRecipe,
    KeyedRecipe,
    MapRecipe,
    ScoreRecipe,
    SelectRecipe,
    Shadow,
    StackRecipe,
    StepRecipe,
    scores_of_columns,
)
from pipeline.sources.discovery import Discovery
from pipeline.sources.filters.parse import parse_filter
from pipeline.sources.types import read_type
from pipeline.spec.job_spec import AnyStep, JobSpec
from pipeline.spec.parts import CheckpointStep, ColumnContract, DaskStep, FilterStep, MapStep, SelectStep
from pipeline.spec.score import Score, ScoreStep


@dataclass(frozen=True)
class ScoredBy:
    """Model and predictions of a ``score`` step."""

    models: tuple[ModelVersion, ...]
    """One, or those of a list; by key, one for each, then that of other keys."""
    predictions: pa.Schema
    """Columns that receive the scores."""


@dataclass(frozen=True)
class ChainFrames:
    """Columns of a chain that only running its steps shows."""

    schemas: tuple[pa.Schema, ...] = ()
    """Schema after each ``map`` step."""
    never_null: tuple[frozenset[str], ...] = ()
    """Columns without nulls at each checkpoint before the last ``map`` step."""


@dataclass(frozen=True)
class ResolvedStage:
    """The steps of one stage, and its columns."""

    stage: Stage
    recipes: tuple[StepRecipe, ...]
    source: pa.Schema
    """Columns that it reads, of the source or of the stage before."""
    output: pa.Schema
    """Columns of its rows after the last step that later stages need; of the last stage, the columns of the output."""
    scores: tuple[str, ...]
    """Columns of ``output`` that hold scores."""


@dataclass(frozen=True)
class ResolvedChain:
    """The steps of a job with everything resolved, and its columns by use."""

    recipes: tuple[StepRecipe, ...]
    source: pa.Schema
    """Schema of a source batch: the columns that are read, and the requested hive keys."""
    read: tuple[str, ...]
    """Physical columns, in file order."""
    source_rules: tuple[ColumnRule, ...]
    output: pa.Schema
    scores: tuple[str, ...]
    """Columns of the output that hold scores."""
    before: tuple[pa.Schema, ...]
    """Columns before each of ``recipes``, on which its rules are checked."""
    stages: tuple[ResolvedStage, ...] = ()
    """The stages, in order; empty for a job without a step that ends one."""


PlanDask = Callable[[DaskStep, pa.Schema], DaskRecipe]
"""Returns the recipe of a ``dask`` step over rows with a schema."""


def resolve_chain(
    spec: JobSpec,
    *,
    discovery: Discovery,
    map_schemas: Sequence[pa.Schema],
    scored: Sequence[ScoredBy],
    plan_dask: PlanDask | None = None,
) -> ResolvedChain:
    """Decide for every column whether it is read, scored, written and checked, step by step.

    :param map_schemas: schema after each ``map`` step.
    :param scored: model and columns of each ``score`` step.
    :param plan_dask: plans ``dask`` steps; needed if there are any.
    :raises SpecError: for unknown or clashing names in the spec.
    :raises SchemaDrift: for a feature that is missing or has a type that the model cannot use.
    """
    walk = _Walk(spec, discovery, map_schemas, scored, plan_dask)
    ends = {stage.first for stage in outline(spec)[1:]}
    for number, step in enumerate(spec.steps):
        if number in ends:
            walk.end_stage()
        walk.take(number, step)
    output = walk.output()
    stages, needed = _cut_stages(spec, walk, output)
    recipes = tuple(recipe for stage in stages for recipe in stage.recipes)
    filter_text = read_source(spec).filter
    if needed is not None:
        needed |= {name for name in spec.contract if name in discovery.schema.names}
        needed |= set() if filter_text is None else parse_filter(filter_text).columns
    source = pa.schema([field for field in discovery.schema if needed is None or field.name in needed])
    check_reserved(source)
    check_masked_names(spec.errors, source, has_stages=spec.has_stages)
    return ResolvedChain(
        recipes=recipes,
        source=source,
        read=tuple(name for name in source.names if name not in discovery.key_names),
        source_rules=walk.source_rules(),
        output=output,
        scores=tuple(name for name in walk.scores if name in output.names),
        before=tuple(walk.before),
        stages=tuple([replace(stages[0], source=source), *stages[1:]]) if spec.has_stages else (),
    )


def _cut_stages(spec: JobSpec, walk: _Walk, output: pa.Schema) -> tuple[list[ResolvedStage], set[str] | None]:
    """Cut the steps of a walk into stages, each with the columns that the stages behind it need.

    :returns: the stages, the only one for a job without checkpoints; and the columns of the source that are needed,
        None for all.
    """
    stages: list[ResolvedStage] = []
    of_spec = outline(spec) or (Stage(0, 0, len(spec.steps), is_last=True),)
    edges = [0, *(end.recipes for end in walk.ends), len(walk.recipes)]
    schema, needed = output, set(output.names)
    read: set[str] | None = None
    for stage in reversed(of_spec):
        recipes, read = _needed(walk.recipes[edges[stage.number] : edges[stage.number + 1]], needed)
        if stage.number:
            filter_text = read_source(stage_spec(spec, stage)).filter
            if read is not None and filter_text is not None:
                read |= parse_filter(filter_text).columns
        frame = walk.ends[stage.number - 1].frame if stage.number else None
        source = pa.schema([]) if frame is None else _kept(frame, read)
        scores = walk.ends[stage.number].scores if stage.number < len(walk.ends) else tuple(walk.scores)
        names = tuple(name for name in scores if name in schema.names)
        stages.append(ResolvedStage(stage, recipes, source, schema, names))
        if frame is not None:
            schema, needed = source, set(source.names)
    return stages[::-1], read


def _kept(frame: pa.Schema, needed: Collection[str] | None) -> pa.Schema:
    """Return the columns of a checkpoint: those that are needed behind it, and at least one, which holds the rows."""
    kept = [field for field in frame if needed is None or field.name in needed] or [frame.field(0)]
    schema = pa.schema([field.with_type(read_type(field.type)).remove_metadata() for field in kept])
    check_reserved(schema)
    return schema


@dataclass(frozen=True)
class _End:
    """The end of a stage in a walk."""

    recipes: int
    """Number of recipes before it."""
    frame: pa.Schema
    scores: tuple[str, ...]


class _Walk:
    """The columns before the next step, and the resolved steps so far."""

    def __init__(
        self,
        spec: JobSpec,
        discovery: Discovery,
        map_schemas: Sequence[pa.Schema],
        scored: Sequence[ScoredBy],
        plan_dask: PlanDask | None = None,
    ) -> None:
        self.spec = spec
        self.discovery = discovery
        self.frame = discovery.schema
        offered, chosen = discovery.schema.names, spec.source.columns
        self.written = [name for name in offered if chosen is None or name in chosen]
        """Columns of the output, if no step removes them."""
        self.scores: list[str] = []
        self.recipes: list[StepRecipe] = []
        self.before: list[pa.Schema] = []
        self.ends: list[_End] = []
        """End of each stage but the last."""
        self._plan_dask = plan_dask
        self._offered = frozenset(offered)
        """Columns that no step has made; behind a ``dask`` step, those of its result."""
        self._maps, self._scored = iter(map_schemas), iter(scored)
        stages = outline(spec) or (Stage(0, 0, len(spec.steps), is_last=True),)
        self._pushed = {number for stage in stages for number in pushed_filters(spec, first=stage.first)}
        """Numbers of the filters with which the files of the source or of a checkpoint are read."""
        self._last_score = max((n for n, step in enumerate(spec.steps) if isinstance(step, ScoreStep)), default=-1)
        self._unmade = {name: part for name, part in spec.contract.items() if name not in discovery.schema.names}
        """The contract of columns that no step so far has made."""
        self._check_source_contract()

    def take(self, number: int, step: AnyStep) -> None:
        """Resolve the next step."""
        if isinstance(step, CheckpointStep):
            return
        if isinstance(step, DaskStep):
            self._dask(step)
            return
        if isinstance(step, FilterStep):
            self._check_condition(step.filter, f"steps.{number}.filter")
            if number not in self._pushed:
                self._add(FilterRecipe(step.filter))
        elif isinstance(step, SelectStep):
            self._select(step, number)
        elif isinstance(step, MapStep):
            self._map(step, is_written=number > self._last_score)
        else:
            self._score(step.score, f"steps.{number}.score")
        self._check_made()

    def end_stage(self) -> None:
        """Record that a stage ends before the next step."""
        self.ends.append(_End(len(self.recipes), self.frame, tuple(self.scores)))
        self._check_made()

    def _dask(self, step: DaskStep) -> None:
        assert self._plan_dask is not None
        recipe = self._plan_dask(step, self.frame)
        self._add(recipe)
        self.frame, self.written = recipe.schema, list(recipe.schema.names)
        self._offered = frozenset(self.written)
        self.scores = [name for name in self.scores if name in self.written]

    def output(self) -> pa.Schema:
        """Return the schema of the output.

        :raises SpecError: for a contract of a column that no step has made, and unknown columns to keep.
        """
        for name in self._unmade:
            raise self._missing(name, use="a column of the contract", where=f"contract.{name}", error=SpecError)
        left = set(self.frame.names)
        names = [name for name in self.written if name in left]
        score = self.spec.scores[-1] if self.spec.scores else None
        if score is not None and score.keep is not None:
            for name in score.keep:
                if name not in left:
                    raise self._missing(name, use="a column to keep", where="score.keep", error=SpecError)
            made = [name for name in names if name in self.scores or name not in self._offered]
            names = [*score.keep, *(name for name in made if name not in score.keep)]
        if not names:
            raise SpecError(
                "the steps leave no column for the output",
                where="steps",
                expected="at least one column",
                next_step="name the columns in a last select step",
            )
        fields = [self.frame.field(name) for name in names]
        return pa.schema([field.with_type(read_type(field.type)).remove_metadata() for field in fields])

    def source_rules(self) -> tuple[ColumnRule, ...]:
        """Return the rules of the contract for columns of the source."""
        names = set(self.discovery.schema.names)
        return worthwhile(
            column_rule(name, part, self.discovery.schema.field(name).type, None)
            for name, part in self.spec.contract.items()
            if name in names
        )

    def _add(self, recipe: StepRecipe) -> None:
        self.recipes.append(recipe)
        self.before.append(self.frame)

    def _map(self, step: MapStep, *, is_written: bool) -> None:
        made = next(self._maps)
        check_twice(made)
        self._add(MapRecipe.of(step, made.serialize().to_pybytes()))
        if is_written:
            known = {*self.frame.names, *self.written}
            self.written += [name for name in made.names if name not in known]
        self.frame = pa.schema([field.with_nullable(True) for field in made])

    def _select(self, step: SelectStep, number: int) -> None:
        for old in step.columns.values():
            if old not in self.frame.names:
                raise self._missing(old, use="a column to select", where=f"steps.{number}.select", error=SpecError)
        self._add(SelectRecipe(tuple(step.columns.items())))
        self.frame = pa.schema([self.frame.field(old).with_name(new) for new, old in step.columns.items()])
        self.written = list(step.columns)

    def _score(self, score: Score, where: str) -> None:
        by = next(self._scored)
        if score.where is not None:
            self._check_condition(score.where, f"{where}.where")
        outputs = tuple(by.predictions.names)
        kept = score.keep if score.keep is not None else [name for name in self.written if name in self.frame.names]
        check_clashes(kept, outputs)
        if score.meta is not None:
            members = self._stacked(score, by, where)
        else:
            members = tuple(self._member(score, model, outputs) for model in by.models)
        shadow = None if score.shadow is None else self._shadow(score, by, where)
        if score.by is not None:
            self._check_key(score.by, where)
            other: Literal["reject", "null", "model"] = (
                "model" if score.other_model is not None else "null" if score.other is None else "reject"
            )
            values, shared = tuple(score.keyed_models), KeyedRecipe.shared(members)
            self._add(KeyedRecipe(score.by, values, shared, other, where=score.where, shadow=shadow))
        elif score.meta is not None:
            self._add(StackRecipe(members, where=score.where, shadow=shadow))
        elif score.combine is None:
            self._add(replace(members[0], where=score.where, shadow=shadow))
        else:
            combine, weights = (score.combine, ()) if isinstance(score.combine, str) else ("mean", score.combine)
            self._add(EnsembleRecipe(members, combine, weights, where=score.where, shadow=shadow))
        taken = set(outputs)
        left = [field for field in self.frame if field.name not in taken]
        self.frame = pa.schema([*left, *by.predictions])
        self.written = [name for name in self.written if name not in taken]
        if shadow is None:
            self.written += outputs
        self.scores += outputs

    def _stacked(self, score: Score, by: ScoredBy, where: str) -> tuple[ScoreRecipe, ...]:
        """Return what the models of a stack score, the one on top last.

        :raises SpecError: if it has another number of features than the others have results, or they are no numbers.
        """
        *models, meta = by.models
        members, made = list[ScoreRecipe](), list[pa.Field]()
        for number, model in enumerate(models):
            found = output_type(model, score.meta_input)
            assert found is not None  # checked with the predictions
            names = tuple(f"model_{number}_{value}" for value in range(found.width))
            members.append(replace(self._member(score, model, names), kind=score.meta_input))
            made += [pa.field(name, found.arrow) for name in names]
        if len(made) != len(meta.features):
            raise SpecError(
                "the model on top has another number of features than the models below have results",
                where=f"{where}.meta",
                found=f"{len(meta.features)} features of {meta.name}, {len(made)} results a row",
                expected="one feature for each result, in the order of the list",
                next_step="train it on the results of these models; meta_input says of which kind",
            )
        rules = worthwhile(
            column_rule(field.name, None, field.type, feature, is_feature=True)
            for field, feature in zip(made, meta.features, strict=True)
        )
        top = ScoreRecipe(
            model=meta,
            features=tuple(field.name for field in made),
            kind=score.output_spec.kind,
            outputs=tuple(by.predictions.names),
            rules=rules,
            engine=score.engine,
            tolerance=score.tolerance,
        )
        return (*members, top)

    def _shadow(self, score: Score, by: ScoredBy, where: str) -> Shadow:
        """Return the comparison of a challenger.

        :raises SpecError: for a column that is missing or holds no numbers, and for several values a row.
        """
        name = str(score.shadow)
        if name not in self.frame.names:
            raise self._missing(name, use="the column to compare with", where=f"{where}.shadow", error=SpecError)
        kind, types = self.frame.field(name).type, pa.types
        own = by.predictions.field(0).type
        if not all(types.is_floating(one) or types.is_integer(one) for one in (kind, own)) or len(by.predictions) > 1:
            raise SpecError(
                "a challenger and the column to compare with must have one number a row",
                where=f"{where}.shadow",
                found=f"column {name!r} of type {kind}, {len(by.predictions)} values of type {own} of the challenger",
                expected="a column of scores, and a model with one value a row",
                next_step="name the output column of an earlier score step",
            )
        of_binary: dict[str, Decision] = {"prediction": "half", "margin": "zero"}
        is_binary = all(model.task == "binary" for model in (by.models if score.meta is None else by.models[-1:]))
        output = score.output_spec.kind
        return Shadow(name, "equal" if output == "label" else of_binary[output] if is_binary else "")

    def _check_key(self, name: str, where: str) -> None:
        """Check the column that chooses the model.

        :raises SpecError: for a column that is missing, or whose values have no text of their own.
        """
        if name not in self.frame.names:
            raise self._missing(name, use="the column that chooses the model", where=f"{where}.by", error=SpecError)
        kind = self.frame.field(name).type
        if not is_key_type(kind):
            raise SpecError(
                "values of this column cannot choose a model",
                where=f"{where}.by",
                found=f"column {name!r} of type {kind}",
                expected="text, integers, booleans or dates",
                next_step="make a column of text in a map step",
            )

    def _member(self, score: Score, model: ModelVersion, outputs: tuple[str, ...]) -> ScoreRecipe:
        """Return what one model of a ``score`` step scores."""
        features = model_features(score.features, model, self._lookup)
        return ScoreRecipe(
            model=model,
            features=features,
            kind=score.output_spec.kind,
            outputs=outputs,
            rules=self._feature_rules(model, features),
            engine=score.engine,
            tolerance=score.tolerance,
        )

    def _feature_rules(self, model: ModelVersion, features: Sequence[str]) -> tuple[ColumnRule, ...]:
        """Return the rules of a model; the contract's finite and allowed take the place of its own."""
        rules = []
        for name, feature in zip(features, model.features or (None,) * len(features), strict=True):
            part = self.spec.contract.get(name)
            own = ColumnContract(finite=part.finite, allowed=part.allowed) if part is not None else None
            rules.append(column_rule(name, own, self.frame.field(name).type, feature, is_feature=True))
        return worthwhile(rules)

    def _check_made(self) -> None:
        """Check the contract of the columns that the last step has made, right behind it."""
        made = [name for name in self._unmade if name in self.frame.names]
        rules = []
        for name in made:
            part, field = self._unmade.pop(name), self.frame.field(name)
            check_contract(name, part, field, path=self._path)
            rules.append(column_rule(name, part, field.type, None))
        if checked := worthwhile(rules):
            self._add(CheckRecipe(checked))

    def _check_source_contract(self) -> None:
        for name, part in self.spec.contract.items():
            if name not in self._unmade:
                check_contract(name, part, self.discovery.schema.field(name), path=self._path)

    def _check_condition(self, text: str, where: str) -> None:
        found = condition(text, where=where)
        for name in sorted(found.columns - set(self.frame.names)):
            raise self._missing(name, use="a column of a condition", where=where, error=SpecError)
        try:
            found.check(self.frame)
        except SpecError as error:
            raise located(error, where) from None

    def _missing(self, name: str, *, use: str, where: str, error: type[PipelineError]) -> PipelineError:
        return self._lookup.missing(name, use=use, where=where, error=error)

    @property
    def _lookup(self) -> Lookup:
        owner = "what the steps before it return" if self.recipes else "the input"
        return Lookup(self.discovery, self.frame, owner=owner)

    @property
    def _path(self) -> str:
        return self.discovery.files[0].path if self.discovery.files else ""


def is_key_type(kind: pa.DataType) -> bool:
    """Return True if values of a type can choose a model: their text is the same in every file."""
    if isinstance(kind, pa.DictionaryType):
        return is_key_type(kind.value_type)
    types = pa.types
    tests = types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_boolean
    return any(test(kind) for test in (*tests, types.is_date))


def _needed(recipes: Sequence[StepRecipe], output: Collection[str]) -> tuple[tuple[StepRecipe, ...], set[str] | None]:
    """Return the steps without columns that nothing behind them needs, and the columns of the source that they need.

    None: all columns, since the columns that a map step needs are unknown.
    """
    needed: set[str] | None = set(output)
    narrowed: list[StepRecipe] = []
    for recipe in reversed(recipes):
        if isinstance(recipe, SelectRecipe):
            columns = tuple((new, old) for new, old in recipe.columns if needed is None or new in needed)
            narrowed.append(SelectRecipe(columns))
            needed = {old for _, old in columns}
            continue
        narrowed.append(recipe)
        if isinstance(recipe, (MapRecipe, DaskRecipe)):
            needed = None
        elif needed is not None:
            needed = needed - _made_by(recipe) | _read_by(recipe)
    return tuple(reversed(narrowed)), needed


def _made_by(recipe: StepRecipe) -> set[str]:
    return set(recipe.outputs) if isinstance(recipe, AnyScore) else set()


def _read_by(recipe: StepRecipe) -> set[str]:
    """Return the columns that a step other than map and select reads."""
    if isinstance(recipe, AnyScore):
        where = set[str]() if recipe.where is None else set(parse_filter(recipe.where).columns)
        where |= {recipe.by} if isinstance(recipe, KeyedRecipe) else set()
        where |= set() if recipe.shadow is None else {recipe.shadow.column}
        scores = scores_of_columns(recipe)
        rules = {rule.column for score in scores for rule in score.rules}
        return {*where, *rules, *(name for score in scores for name in score.features)}
    if isinstance(recipe, FilterRecipe):
        return set(parse_filter(recipe.condition).columns)
    return {rule.column for rule in recipe.rules} if isinstance(recipe, CheckRecipe) else set()
