"""``init``, ``validate`` and ``plan``: prepare a job spec."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import (
    cluster_options,
    directory_option,
    emit,
    is_quiet,
    load,
    make_folder,
    output_options,
    override_option,
    settings_for,
)
from pipeline.errors import OutputExists, PipelineError
from pipeline.storage.urls import expand_user, storage_errors

if TYPE_CHECKING:
    from pipeline.driver.prepare import Prepared
    from pipeline.plan.describe import PlanSummary
    from pipeline.settings import Settings
    from pipeline.spec.job_spec import JobSpec
    from pipeline.spec.load import LoadedSpec
    from pipeline.spec.score import Score

PROBED = 4
"""Partitions that ``plan --probe`` scores when no number is given."""


@click.command(short_help="Write a job.yaml to start from.")
@click.argument("folder", metavar="[DIR]", default=".")
@click.option(
    "--template",
    type=click.Choice(["scikit-learn", "lightgbm", "onnx", "slurm", "endpoint", "gpu"]),
    help="Make a small example that runs as it is, with data and model.",
)
@output_options
def init(folder: str, template: str | None) -> None:
    """Write a job.yaml to start from, with every field explained; or an example that runs, with --template."""
    from pipeline.cli.templates import JOB_TEMPLATE

    path = expand_user(folder) / "job.yaml"
    make_folder(path.parent)
    if template is not None:
        _write_example(path.parent, template)
        return
    try:
        with storage_errors(str(path)), path.open("x", encoding="utf-8") as file:
            file.write(JOB_TEMPLATE)
    except FileExistsError as error:
        raise OutputExists(
            "there is a job spec already", where=str(path), next_step="choose another folder, or remove it first"
        ) from error
    commands = [f"python -m pipeline {name} {path}" for name in ("validate", "plan", "run")]
    steps = "\n".join(f"  {command}" for command in commands)
    emit({"path": str(path), "next": commands}, lambda: f"Wrote {path}. Fill in the paths, then:\n{steps}")


def _write_example(folder: Path, name: str) -> None:
    from pipeline.cli.starters import STARTERS, write_starter

    files = write_starter(folder, name)
    first = STARTERS[name].first
    commands = [f"cd {folder}"] if str(folder) != "." else []
    if first.endswith(".py"):
        commands += [f"python {first} &", "python -m pipeline run job.yaml"]
    else:
        commands += [f"python -m pipeline {command} job.yaml" for command in dict.fromkeys((first, "run"))]
    steps = "\n".join(f"  {command}" for command in commands)
    emit(
        {"path": str(folder / "job.yaml"), "files": files, "next": commands},
        lambda: f"Wrote an example for {STARTERS[name].text} to {folder}: {', '.join(files)}. Then:\n{steps}",
    )


@click.command(short_help="Check a job spec, its steps and its model.")
@click.argument("job_file", metavar="JOB.YAML", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of a job spec, for editors.")
@override_option
@output_options
@click.pass_context
def validate(
    context: click.Context, job_file: str | None, schema: bool, overrides: tuple[str, ...], params: tuple[str, ...]
) -> None:
    """Check a job spec: its fields, the import of its steps, and its model file.

    Does not look at the data: plan does.
    """
    if schema:
        from pipeline.spec.job_spec import json_schema

        # The schema is itself what a program wants: nothing is put around it.
        click.echo(json.dumps(json_schema(), indent=2))
        return
    if job_file is None:
        raise click.UsageError("give a job spec, or --schema")
    problems, warnings = _examine(job_file, overrides, params)
    shown = [error.to_dict() for error in problems]
    emit(
        {"ok": not problems, "spec": job_file, "problems": shown, "warnings": warnings},
        lambda: _verdict(job_file, problems, warnings),
    )
    if problems:
        context.exit(problems[0].exit_code)


def _verdict(job_file: str, problems: list[PipelineError], warnings: list[str]) -> str:
    warned = [f"  warning:  {text}" for text in warnings]
    if not problems:
        return "\n".join([f"{job_file} is ok", *warned, f"  next:     python -m pipeline plan {job_file}"])
    return "\n".join(["\n\n".join(str(error) for error in problems), *warned])


def _examine(
    job_file: str, overrides: tuple[str, ...], params: tuple[str, ...]
) -> tuple[list[PipelineError], list[str]]:
    """Return the errors and the warnings of a job spec."""
    from pipeline.models.registry.alias_watch import hard_coded
    from pipeline.models.registry.client import has_registry

    try:
        loaded = load(job_file, overrides=overrides, params=params)
    except PipelineError as error:
        return [error], []
    settings = settings_for(loaded)
    warnings = [hard_coded(text, has_registry=has_registry(settings)) for text in loaded.spec.references]
    errors = []
    for check in _checks(loaded.spec, settings):
        try:
            check()
        except PipelineError as error:
            errors.append(error)
    return errors, list(dict.fromkeys(filter(None, warnings)))


def _checks(spec: JobSpec, settings: Settings) -> Iterator[Callable[[], object]]:
    """Yield the checks that need no data; each raises its error."""
    from pipeline.execution.clusters import cluster_of
    from pipeline.plan.pushdown import condition
    from pipeline.scoring.steps import check_step
    from pipeline.sinks import find_sink
    from pipeline.sources import find_source
    from pipeline.sources.filters.parse import parse_filter
    from pipeline.spec.parameters import PLACEHOLDER

    if spec.fan_out is not None:
        yield from _checks_of_children(spec, settings)
        return

    if spec.source.filter is not None and PLACEHOLDER not in spec.source.filter:
        yield partial(parse_filter, spec.source.filter)
    for number, text in _conditions(spec):
        if PLACEHOLDER not in text:
            yield partial(condition, text, where=number)
    for step in spec.maps:
        if PLACEHOLDER not in step.map:
            yield partial(check_step, step.map, import_paths=settings.import_paths)
    for score in spec.scores:
        yield from _model_checks(score, settings)
    yield lambda: find_source(spec.source.reader)
    yield lambda: find_sink(spec.sink.format)
    yield lambda: cluster_of(spec, settings=settings)


def _conditions(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Yield field and text of each condition in the steps."""
    from pipeline.spec.parts import FilterStep
    from pipeline.spec.score import ScoreStep

    for number, step in enumerate(spec.steps):
        if isinstance(step, FilterStep):
            yield f"steps.{number}.filter", step.filter
        elif isinstance(step, ScoreStep) and step.score.where is not None:
            yield f"steps.{number}.score.where", step.score.where


def _model_checks(score: Score, settings: Settings) -> Iterator[Callable[[], object]]:
    from pipeline.spec.parameters import PLACEHOLDER

    for reference in score.references:
        if PLACEHOLDER not in reference:
            yield partial(_check_model, reference, score, settings)
    if isinstance(score.models, str) and PLACEHOLDER not in score.models:
        yield partial(_check_listing, score.models, score, settings)


def _check_listing(name: str, score: Score, settings: Settings) -> None:
    from pipeline.models.listing import list_models

    for reference in list_models(name, registry=settings.registry, cache=settings.directory).values():
        _check_model(reference, score, settings)


def _check_model(reference: str, score: Score, settings: Settings) -> None:
    from pipeline.driver.score_models import resolve_model, scored_version

    scored_version(resolve_model(reference, settings=settings, score=score), score)


def _checks_of_children(spec: JobSpec, settings: Settings) -> Iterator[Callable[[], object]]:
    """Yield the checks of a fan-out that need no data: for a list, of each child; else of fields without its value."""
    from pipeline.plan.fan_out import child_spec

    assert spec.fan_out is not None
    by = spec.fan_out.by
    if isinstance(by, str):
        yield from _checks(spec.model_copy(update={"fan_out": None}), settings)
        return
    seen = set()
    for value in by:
        child = child_spec(spec, value, column=None)
        checked = (child.source.filter, child.steps)
        if checked not in seen:
            seen.add(checked)
            yield from _checks(child, settings)


@click.command(short_help="Show what would run; writes nothing.")
@click.argument("job_file", metavar="JOB.YAML")
@click.option("--show-config", is_flag=True, help="Show each field and setting with its value and source.")
@click.option("--why", is_flag=True, help="Show the reason for scoring each partition.")
@click.option(
    "--probe",
    type=click.IntRange(min=1),
    metavar="N",
    is_flag=False,
    flag_value=PROBED,
    help="Score N partitions (default: 4), keep them as results, and estimate time, memory and size of the whole job.",
)
@override_option
@cluster_options
@directory_option
@output_options
def plan(
    job_file: str,
    *,
    show_config: bool,
    why: bool,
    probe: int | None,
    overrides: tuple[str, ...],
    params: tuple[str, ...],
    **flags: str | int | None,
) -> None:
    """Show what would run: rows, partitions, memory, model, output. Writes nothing, except with --probe.

    With --why: the reason for scoring each partition, for incremental jobs.
    With --show-config: each field of the job spec and each setting, with its value and source. The data is not read.
    """
    loaded = load(job_file, overrides=overrides, params=params)
    settings = settings_for(loaded, **flags)
    if show_config:
        _show_config(loaded, settings)
        return
    from pipeline.driver.prepare import prepare
    from pipeline.plan.describe import plan_summary

    prepared = prepare(loaded.spec, settings=settings)
    summary = plan_summary(prepared.plan, prepared.limits, device=prepared.device)
    if probe is not None and prepared.plan.children:
        raise click.UsageError("a fan-out has no partitions of its own to probe; probe a job over one of its values")
    if why:
        from pipeline.plan.describe import explain, why_text

        reasons = explain(prepared.plan)
        emit({**summary.to_dict(), "why": reasons}, lambda: summary.text() + why_text(reasons))
        return
    if probe is not None:
        _probe(prepared, summary, count=probe, settings=settings)
        return
    emit(summary.to_dict(), lambda: summary.text() + f"\n  next       python -m pipeline run {job_file}")


def _show_config(loaded: LoadedSpec, settings: Settings) -> None:
    from pipeline.cli.show_config import config_details, config_text
    from pipeline.execution.clusters import cluster_choice, settings_of
    from pipeline.settings import device_choice

    spec = dict(loaded.origins)
    chosen = settings_of(loaded.spec, settings=settings)
    cluster = cluster_choice(loaded.spec, settings=settings, of_spec=spec.get("cluster"))
    device = device_choice(loaded.spec, settings=chosen, of_spec=spec.get("device"))
    details = config_details(spec, {**chosen.choices(), "cluster": cluster, "device": device})
    emit(details, lambda: config_text(details))


def _probe(prepared: Prepared, summary: PlanSummary, *, count: int, settings: Settings) -> None:
    from pipeline.common.text import next_lines
    from pipeline.plan.describe import plan_text
    from pipeline.report.estimate import estimate_lines
    from pipeline.report.progress import show_progress
    from pipeline.runner import probe_plan

    with show_progress(quiet=is_quiet()) as callbacks:
        job, estimate = probe_plan(prepared, settings=settings, count=count, callbacks=callbacks)
    details = summary.to_dict() | {"job": job, "estimate": estimate.to_dict()}
    lines = [*estimate_lines(estimate), *next_lines([f"python -m pipeline resume {job}"])]
    emit(details, lambda: "\n".join([plan_text(summary, probe_job=job), *lines]))
