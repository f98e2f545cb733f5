"""Describe a plan: figures, the reason for each partition, differences from another plan. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipeline.common.html import html_table
from pipeline.common.rows import InputFile, QuarantinedFile
from pipeline.common.step_code import StepCode, code_difference, digests_of
from pipeline.common.text import label_line, labelled, listed, shortened
from pipeline.common.travel import describe, is_packed
from pipeline.common.units import format_bytes, format_cost, format_count, plural
from pipeline.models.cache import LOADED_FACTOR
from pipeline.models.device_options import DeviceOptions
from pipeline.models.engines import EngineOptions, engine_options
from pipeline.models.model import ModelVersion
from pipeline.models.options import promise_text, promise_warning, rounds_text, unused_rounds_warning
from pipeline.plan.plan import Limits, Plan
from pipeline.plan.recipe import KeyedRecipe, ScoreRecipe, StepRecipe
from pipeline.plan.stages import PlannedStage
from pipeline.sources.versions import content_version
from pipeline.spec.endpoint import PLACE, Endpoint
from pipeline.spec.job_spec import NOT_THE_WORK, AnyStep
from pipeline.spec.parts import CheckpointStep, DaskStep, FilterStep, MapStep, SelectStep
from pipeline.spec.score import ScoreStep

EVERYTHING = "the job is not incremental: all of its input is scored"


def explain(plan: Plan) -> dict[str, Any]:
    """Return the reasons of a plan for JSON output.

    Keys: ``counts`` of files per reason, number of ``unchanged`` files, published files that the job ``replaces``,
    ``files`` and ``partitions``. Each file has one reason, each partition a list of reasons.
    """
    reasons = {file.path: file.reason or EVERYTHING for file in plan.files}
    done = {file.path: sum(group.rows for group in file.row_groups[: file.published_row_groups]) for file in plan.files}
    return {
        "counts": dict(Counter(_kind(reason) for reason in reasons.values())),
        "unchanged": plan.progress.unchanged,
        "replaces": list(plan.progress.replaces),
        "files": [
            {"path": file.path, "reason": reasons[file.path], "rows": file.rows, "done_rows": done[file.path]}
            for file in plan.files
        ],
        "partitions": [
            {
                "partition": partition.id,
                "rows": partition.rows,
                "reasons": list(dict.fromkeys(reasons[part.path] for part in partition.fragments)),
            }
            for partition in plan.partitions
        ],
    }


def input_text(plan: Plan) -> str:
    """Describe the part of the source that an incremental job scores; empty for other jobs."""
    if not plan.progress.baseline:
        return ""
    counts = Counter(_kind(file.reason) for file in plan.files)
    unchanged = f"{plan.progress.unchanged:,} unchanged"
    if not counts:
        return f"nothing new; {unchanged} files"
    return ", ".join([*(f"{count:,} {reason}" for reason, count in counts.items()), f"{unchanged} files"])


def _kind(reason: str) -> str:
    """Return a reason without the names in it."""
    for kind in ("failed before", "shares an output file"):
        if reason.startswith(kind):
            return kind
    return reason


def why_text(details: dict[str, Any], *, shown: int = 20) -> str:
    """Return the result of `explain` as text: partitions with reasons, then counts of unchanged and replaced files."""
    partitions, unchanged, replaced = details["partitions"], details["unchanged"], len(details["replaces"])
    lines = ["", "why each partition is to be done"]
    for partition in partitions[:shown]:
        lines.append(f"  {partition['partition']:<9}{partition['rows']:>12,} rows  {'; '.join(partition['reasons'])}")
    more = len(partitions) - shown
    lines += [f"  … and {more:,} more (--json shows all)"] if more > 0 else []
    lines += ["  nothing is to be done"] if not partitions else []
    lines += [f"  {unchanged:,} files are as they were published"] if unchanged else []
    lines += [f"  {replaced:,} published files are replaced: rows in them have changed"] if replaced else []
    return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class PlanSummary:
    """The figures of a plan before it runs."""

    rows: int
    """All rows of the input."""
    pruned_rows: int
    """Rows in row groups that are not read, because statistics prove that the filter keeps none of these rows."""
    bytes: int
    """Uncompressed bytes to read."""
    files: int
    partitions: int
    skew_before: float
    """Rows of the largest file / mean rows of a file."""
    skew_after: float
    """Rows of the largest partition / mean rows of a partition."""
    batch_rows: int
    task_memory: int
    """Projected peak bytes of a worker that runs one task."""
    worker_memory: int
    """Projected peak bytes of a worker that runs a task on each thread."""
    output_bytes: int
    """Estimated uncompressed bytes of the output if no row is dropped."""
    plan: Plan
    limits: Limits
    device: DeviceOptions | None = None
    """Devices that may evaluate the model; None if that is not known."""

    @property
    def engines(self) -> tuple[EngineOptions, ...]:
        """The engines that can evaluate the model of each ``score`` step."""
        return tuple(engine_options(score.engine, score.model, kind=score.kind) for score in self.plan.scores)

    @property
    def code(self) -> tuple[StepCode, ...]:
        """Code of the steps; for a fan-out, of all children."""
        parts = [child.planned for child in self.plan.children] or [self.plan]
        return tuple({step.module: step for part in parts for step in part.code}.values())

    @property
    def columns(self) -> list[str]:
        """Columns of the output."""
        if not self.plan.is_plain:
            return list(pa.ipc.read_schema(pa.py_buffer(self.plan.output_schema)).names)
        return [*self.plan.keep, *self.plan.outputs]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of what the author of the job may not expect."""
        models = {model.key: model for plan in self._plans for model in plan.models}
        found = (warning(model) for model in models.values() for warning in (unused_rounds_warning, promise_warning))
        return tuple(dict.fromkeys(filter(None, (*found, *map(self._crowd_warning, self._plans)))))

    def _crowd_warning(self, plan: Plan) -> str:
        """Return a warning if a worker cannot hold all models by key at once."""
        total = sum(model.nbytes for model in plan.models)
        if not 0 < plan.model_bytes < total:
            return ""
        return (
            f"a worker holds {format_bytes(LOADED_FACTOR * plan.model_bytes)} of models at a time, and all may take "
            f"{format_bytes(LOADED_FACTOR * total)}: they are loaded again for later batches; "
            "give each worker more memory, or sort the input by the key"
        )

    @property
    def _plans(self) -> list[Plan]:
        return [child.planned for child in self.plan.children] or [self.plan]

    def text(self) -> str:
        """Return the text that ``python -m pipeline plan`` prints."""
        return plan_text(self)

    @property
    def cost(self) -> tuple[float, float] | None:
        """The least and the most that services will probably cost; None without prices."""
        first = self.plan.children[0].planned if self.plan.children else self.plan
        return estimated_cost(first, rows=self.rows - self.pruned_rows, nbytes=self.bytes)

    @property
    def budget_text(self) -> str:
        """Estimated cost, and the limits of the budget; empty without either."""
        cost, budget = self.cost, self.plan.spec.budget
        parts = [f"cost {format_cost(cost[0])} to {format_cost(cost[1])}, roughly"] if cost else []
        if budget is not None and budget.cost is not None:
            parts = [f"{parts[0] if parts else 'cost unknown'}, of {format_cost(budget.cost)}"]
        if budget is not None and budget.node_hours is not None:
            parts.append(f"{format_cost(budget.node_hours)} node-hours (plan --probe estimates the time)")
        return "; ".join(parts)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return (
            f"<PlanSummary {self.plan.spec.name}: {plural(self.rows, 'row')} in {plural(self.partitions, 'partition')}>"
        )

    def _repr_html_(self) -> str:
        return html_table(f"plan of {self.plan.spec.name}", _fields(self).items())

    def to_dict(self) -> dict[str, Any]:
        """Return the summary for ``--json``."""
        cost = self.cost
        sink, engines = self.plan.spec.sink, [_engine_record(engine) for engine in self.engines]
        models = [_model_record(score) for score in self.plan.scores]
        return {
            "name": self.plan.spec.name,
            "plan": self.plan.digest,
            **({"stages": list(map(_stage_record, self.plan.stages))} if self.plan.stages else {}),
            "rows": self.rows,
            "pruned_rows": self.pruned_rows,
            "bytes": self.bytes,
            "files": self.files,
            "quarantined_files": [asdict(file) for file in self.plan.quarantined_files],
            "partitions": self.partitions,
            "skew": {"before": round(self.skew_before, 3), "after": round(self.skew_after, 3)},
            "batch_rows": self.batch_rows,
            "memory": {"task": self.task_memory, "worker": self.worker_memory, "limit": self.limits.memory},
            "children": [
                {**child.to_dict(), "output": child.planned.spec.sink.place, "model": child.planned.model.name}
                for child in self.plan.children
            ],
            "cluster": {"workers": self.limits.workers, "threads": self.limits.threads},
            "output": {
                "path": sink.place,
                "mode": sink.mode,
                "bytes": self.output_bytes,
                "columns": self.columns,
            },
            "model": models[0] if models else None,
            **({"models": models} if len(models) > 1 else {}),
            "step_code": digests_of(self.code),
            "engine": engines[0] if engines else None,
            **({"engines": engines} if len(engines) > 1 else {}),
            "device": _device_record(self.device),
            **({"cost": {"low": cost[0], "high": cost[1]}} if cost else {}),
            **({"budget": self.plan.spec.budget.model_dump()} if self.plan.spec.budget else {}),
            "warnings": list(self.warnings),
        }


MOST_SHOWN = 8
"""Models shown in a line."""


def _engine_record(engine: EngineOptions) -> dict[str, Any]:
    return {
        "requested": engine.requested,
        "possible": list(engine.possible),
        "reasons": list(engine.reasons),
    }


def _model_record(score: ScoreRecipe) -> dict[str, Any]:
    model = score.model
    return {
        "name": model.name,
        "version": model.version,
        "digest": model.digest,
        "flavor": model.flavor,
        "task": model.task,
        "trees": model.trees,
        "rounds": model.rounds,
        "iteration_range": list(model.iteration_range or (0, model.rounds)),
        "best_iteration": model.best_iteration,
        **({} if model.promise is None else {"promise": asdict(model.promise)}),
        "features": list(score.features),
    }


def _device_record(device: DeviceOptions | None) -> dict[str, Any]:
    if device is None:
        return {}
    expected = {"expected": device.expected} if device.expected else {}
    return {"requested": device.requested, "reasons": list(device.reasons), **expected}


def plan_summary(plan: Plan, limits: Limits, *, device: DeviceOptions | None = None) -> PlanSummary:
    """Return the figures of ``plan`` and of the cluster. For a fan-out, sum the children.

    :param device: devices that may evaluate the model, if known.
    """
    parts = [child.planned for child in plan.children] or [plan]
    partitions = [partition for part in parts for partition in part.partitions]
    return PlanSummary(
        rows=plan.rows,
        pruned_rows=sum(part.pruned_rows for part in parts),
        bytes=sum(partition.bytes for partition in partitions),
        files=sum(len(part.files) for part in parts),
        partitions=len(partitions),
        skew_before=skew([file.rows for part in parts for file in part.files]),
        skew_after=skew([partition.rows for partition in partitions]),
        batch_rows=max(part.batch_rows for part in parts),
        task_memory=max(part.task_memory for part in parts),
        worker_memory=max(part.worker_memory(limits) for part in parts),
        output_bytes=sum(part.row_bytes_out * (part.rows - part.pruned_rows) for part in parts),
        plan=plan,
        limits=limits,
        device=device,
    )


def plan_text(summary: PlanSummary, *, probe_job: str = "") -> str:
    """Return at most one screen of text about a plan.

    :param probe_job: id of the job that scored a sample of the plan.
    """
    title = "The plan fits. Nothing was written, nothing runs yet."
    if probe_job:
        title = f"The plan fits. A sample of it was scored as a part of the job {probe_job}."
    warnings = [label_line("warning", text) for text in summary.warnings]
    return "\n".join([title, *labelled(_fields(summary)), *warnings])


def _fields(summary: PlanSummary) -> dict[str, str]:
    """Return the lines of a summary by label. Empty lines are not shown."""
    plan, limits, sink = summary.plan, summary.limits, summary.plan.spec.sink
    rows = format_count(summary.rows)
    if summary.pruned_rows:
        rows += f", {summary.pruned_rows:,} of them in row groups that the filter rules out"
    threads = f"{plural(limits.threads, 'thread')} each"
    size = f", about {format_bytes(summary.output_bytes)}" if summary.output_bytes else ""
    children = [child.slug for child in plan.children]
    return {
        "rows": rows,
        "bytes": f"{format_bytes(summary.bytes)} to read, uncompressed",
        "files": format_count(summary.files),
        "quarantine": _quarantined_files(plan.quarantined_files),
        "partitions": format_count(summary.partitions),
        "skew": f"largest is {summary.skew_before:.1f} × the mean in files, {summary.skew_after:.1f} × in partitions",
        "batch": plural(summary.batch_rows, "row") if summary.batch_rows else "",
        "memory": f"{format_bytes(summary.task_memory)} a task projected, {format_bytes(limits.memory)} a worker",
        "cluster": f"{plural(limits.workers, 'worker')}, {threads}",
        "model": _listed_models(plan.models),
        "by key": "; ".join(filter(None, map(_keys_text, plan.chain))),
        "stages": _stages_text(plan),
        "steps": "" if plan.spec.is_plain else "; ".join(map(step_text, plan.spec.steps)),
        "code": "; ".join(map(code_text, summary.code)),
        "promise": "; ".join(dict.fromkeys(filter(None, map(promise_text, plan.models)))),
        "service": "; ".join(dict.fromkeys(_service_text(model.endpoint) for model in plan.models if model.endpoint)),
        "budget": summary.budget_text,
        "rounds": "; ".join(dict.fromkeys(filter(None, map(rounds_text, plan.models)))),
        "engine": "; ".join(dict.fromkeys(map(_engine, summary.engines))),
        "device": summary.device.text() if summary.device else "",
        "features": "; ".join(
            f"{len(features)}: {listed(features)}"
            for features in dict.fromkeys(score.features for score in plan.scores)
        ),
        "output": f"{sink.place}, mode {sink.mode}{size}",
        "columns": listed(summary.columns),
        "children": f"{len(children):,}: {listed(children)}" if children else "",
    }


def _service_text(text: str) -> str:
    """Describe how a service is called."""
    endpoint = Endpoint.model_validate_json(text)
    parts = [endpoint.url, f"{plural(endpoint.concurrency, 'request')} at a time in a worker"]
    limits = (
        (endpoint.max_concurrency, "requests at a time"),
        (endpoint.requests_per_minute, "requests a minute"),
        (endpoint.tokens_per_minute, "tokens a minute"),
    )
    known = [f"{limit:,.0f} {name}" for limit, name in limits if limit is not None]
    parts += [f"{', '.join(known)} in all, divided among the workers"] if known else []
    return ", ".join(parts)


_ANSWER_TOKENS = 256
"""Tokens of an answer without ``max_tokens``, for the upper end of an estimate."""


def estimated_cost(plan: Plan, *, rows: int, nbytes: int) -> tuple[float, float] | None:
    """Return the least and the most that services will probably cost; None where no prices are known.

    Prompts have the template, and at most the values that are read; four characters are a token.

    :param rows: rows to score.
    :param nbytes: uncompressed bytes that are read for them.
    """
    low = high = 0.0
    is_known = False
    for step in plan.spec.steps:
        endpoint = step.score.endpoint if isinstance(step, ScoreStep) else None
        if endpoint is None or endpoint.prices is None:
            continue
        is_known = True
        template = rows * sum(len(PLACE.sub("", text)) for text in endpoint.templates) / 4
        # Values that repeat are stored once, and text may take more characters than bytes.
        most_in = template + 3 * nbytes / 4
        most_out = rows * (endpoint.max_tokens or _ANSWER_TOKENS) if endpoint.is_chat else 0
        low += (template * endpoint.prices.input + (rows if endpoint.is_chat else 0) * endpoint.prices.output) / 1e6
        high += (most_in * endpoint.prices.input + most_out * endpoint.prices.output) / 1e6
    some_filtered = any(isinstance(step, FilterStep) for step in plan.spec.steps) or plan.spec.source.filter is not None
    some_left = any(score.where is not None for score in plan.spec.scores)
    return (0.0 if some_filtered or some_left else low, high) if is_known else None


def _stage_record(stage: PlannedStage) -> dict[str, Any]:
    columns = pa.ipc.read_schema(pa.py_buffer(stage.output_schema)).names
    return {
        "steps": stage.slug,
        "kind": stage.kind,
        "partitions": stage.partitions,
        "memory": stage.task_memory,
        "columns": list(columns),
    }


def _stages_text(plan: Plan) -> str:
    """Describe the stages of a job; empty for a job without a checkpoint."""
    if not plan.stages:
        return ""
    first, *later = plan.stages
    count = plural(first.partitions, "partition")
    texts = [f"{first.title}, a dask step" if first.kind == "dask" else f"{first.title} in {count}"]
    texts += [
        f"{stage.title}, a dask step, whose memory is not known before"
        if stage.kind == "dask"
        else f"{stage.title} in about {plural(stage.partitions, 'partition')}, {format_bytes(stage.task_memory)} a task"
        for stage in later
    ]
    return "; ".join(texts) + ", planned from the rows that the stage before has kept"


def _listed_models(models: Sequence[ModelVersion]) -> str:
    texts = [f"{one.name} version {one.version} (sha256 {one.digest[:16]})" for one in models[:MOST_SHOWN]]
    return "; ".join(texts) + (f"; and {len(models) - MOST_SHOWN:,} more" if len(models) > MOST_SHOWN else "")


def _keys_text(step: StepRecipe) -> str:
    """Describe the models of a step with ``by``; empty for another step."""
    if not isinstance(step, KeyedRecipe):
        return ""
    size = format_bytes(LOADED_FACTOR * sum({one.model.key: one.model.nbytes for one in step.members}.values()))
    return f"{plural(len(step.values), 'value')} of {step.by}: {listed(step.values)}; at most {size} loaded"


def step_text(step: AnyStep) -> str:
    """Describe a step of a spec in a few words."""
    if isinstance(step, MapStep):
        return describe(step.map)
    if isinstance(step, FilterStep):
        return f"filter {step.filter}"
    if isinstance(step, CheckpointStep):
        return "checkpoint"
    if isinstance(step, DaskStep):
        return f"dask {describe(step.dask)}" + (f" with {listed(list(step.inputs))}" if step.inputs else "")
    if isinstance(step, SelectStep):
        return f"select {listed(list(step.columns))}"
    where = f" where {step.score.where}" if step.score.where is not None else ""
    if step.score.meta is not None:
        below = ", ".join(step.score.references[:-1])
        return f"score {step.score.meta} stacked on {below}{where}"
    combine = "" if step.score.combine is None else f" combined by {_combine_text(step.score.combine)}"
    shadow = "" if step.score.shadow is None else f" in the shadow of {step.score.shadow}"
    if step.score.by is not None:
        other = {"reject": "", None: ", others null"}.get(step.score.other, f", others with {step.score.other}")
        models = step.score.models
        count = models if isinstance(models, str) else plural(len(step.score.keyed_models), "model")
        return f"score with {count} by {step.score.by}{other}{where}{shadow}"
    return f"score {', '.join(step.score.references)}{combine}{where}{shadow}"


def _combine_text(combine: str | Sequence[float]) -> str:
    return combine if isinstance(combine, str) else f"weights {', '.join(map(str, combine))}"


def code_text(step: StepCode) -> str:
    """Describe the code of a step in a few words."""
    if is_packed(step.module):
        others = len(step.files) - 1
        return describe(step.module) + (f", and {plural(others, 'file')} that it imports" if others > 0 else "")
    return f"{step.module}, {plural(len(step.files), 'file')} (sha256 {step.digest[:16]})"


def _engine(engine: EngineOptions) -> str:
    if engine.has_trees:
        one_engine = len(engine.possible) == 1
        return "trees" if one_engine else f"trees or {engine.possible[0]}, whichever is faster on the first rows"
    reasons = "; ".join(engine.reasons)
    library = engine.possible[0]
    return f"{library}; the tree engine is not used: {reasons}" if reasons else library


def _quarantined_files(files: Sequence[QuarantinedFile]) -> str:
    """Return the first quarantined file with its error, and the number of others."""
    if not files:
        return ""
    more = f", and {len(files) - 1:,} more (--json shows all)" if len(files) > 1 else ""
    return f"{files[0].title}: {shortened(files[0].message)}{more}"


def skew(rows: Sequence[int]) -> float:
    """Return largest / mean. 1.0 is even; without rows it is 1.0 too."""
    return max(rows) * len(rows) / sum(rows) if sum(rows) else 1.0


def difference(one: Plan, other: Plan) -> list[str]:
    """Return the differences between two plans, such as ``sink.mode: error -> append``. Empty if digests are equal."""
    if one.digest == other.digest:
        return []
    found = spec_difference(one.spec.to_dict(exclude=NOT_THE_WORK), other.spec.to_dict(exclude=NOT_THE_WORK))
    if one.model_digest != other.model_digest:
        names = ", ".join(model.name for model in one.models)
        found.append(f"model {names}: sha256 {one.model_digest[:12]} -> {other.model_digest[:12]}")
    found += code_difference(one.code, other.code)
    found += _file_difference({file.path: file for file in one.files}, {file.path: file for file in other.files})
    if one.source_schema != other.source_schema:
        found.append("columns that are read, or their types")
    if one.output_schema != other.output_schema:
        found.append("columns of the output, or their types")
    if not found:
        found.append(f"how rows are cut: {len(one.partitions):,} -> {plural(len(other.partitions), 'partition')}")
    return found


def spec_difference(one: Any, other: Any, *, place: str = "") -> list[str]:
    """Return the differences between two specs in the form of `JobSpec.to_dict`."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(name for name in other if name not in one)]
        inside = (
            spec_difference(one.get(name), other.get(name), place=f"{place}.{name}".lstrip(".")) for name in names
        )
        return [text for texts in inside for text in texts]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        inside = (spec_difference(a, b, place=f"{place}[{n}]") for n, (a, b) in enumerate(zip(one, other, strict=True)))
        return [text for texts in inside for text in texts]
    return [] if one == other else [f"{place}: {_shown(one)} -> {_shown(other)}"]


def _shown(value: Any) -> str:
    return "default" if value is None else str(value)


def _file_difference(one: dict[str, InputFile], other: dict[str, InputFile]) -> list[str]:
    gone = [path for path in one if path not in other]
    new = [path for path in other if path not in one]
    changed = [path for path, file in one.items() if path in other and _identity(file) != _identity(other[path])]
    named = [("file changed", changed), ("file gone", gone), ("file new", new)]
    return [
        f"{words}: {paths[0]}" + (f" and {len(paths) - 1:,} more" if len(paths) > 1 else "")
        for words, paths in named
        if paths
    ]


def _identity(file: InputFile) -> tuple[Any, ...]:
    return file.size, content_version(file.version), [(group.rows, group.selected) for group in file.row_groups]
