"""``run``, ``resume``, ``retry`` and ``demo``: run jobs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import (
    cluster_options,
    directory_option,
    emit,
    is_quiet,
    load,
    not_empty,
    output_options,
    override_option,
    retry_set_option,
    settings_for,
    tell,
    wants_json,
)
from pipeline.cli.terminal import relay_if_shown
from pipeline.common import warn_once
from pipeline.common.imports import frozen_imports
from pipeline.errors import PipelineError, SpecError
from pipeline.jobs import layout
from pipeline.spec.file import read_text
from pipeline.storage.urls import expand_user

if TYPE_CHECKING:
    from pipeline.events import Callback
    from pipeline.report.report import Report
    from pipeline.settings import Settings
    from pipeline.spec.budget import Budget
    from pipeline.spec.load import LoadedSpec

WARNED = 3
"""Exit status of a job that succeeded with warnings, under ``--strict``."""
MAX_DEMO_ROWS = 50_000_000
"""Rows of the largest table of ``demo``: about 10 GiB of memory."""
Flags = Mapping[str, str | int | None]

budget_option = click.option(
    "--budget",
    multiple=True,
    metavar="LIMIT=AMOUNT",
    help="New limit of all runs of the job: cost=50 or node_hours=40.",
)
strict_option = click.option("--strict", is_flag=True, help="Exit with 3 when the job succeeded with warnings.")


@click.command(short_help="Run a job.")
@click.argument("target", metavar="JOB.YAML|DIR")
@click.option(
    "--job",
    "job_id",
    metavar="ID",
    callback=not_empty,
    help="Job id. Resumes that job if it exists with the same plan.",
)
@strict_option
@override_option
@cluster_options
@directory_option
@output_options
def run(
    target: str,
    job_id: str | None,
    strict: bool,
    overrides: tuple[str, ...],
    params: tuple[str, ...],
    **flags: str | int | None,
) -> None:
    """Run a job spec, or resume the unfinished job in a directory."""
    if _is_job_directory(target):
        if job_id is not None or overrides or params:
            raise click.UsageError("a resumed job keeps its id and spec; leave out --job, --set and -p")
        _resume(target, strict=strict, flags=flags)
        return
    _run(target, job_id=job_id, strict=strict, overrides=overrides, params=params, flags=flags)


@click.command(short_help="Resume an unfinished job.")
@click.argument("job", default="@last")
@click.option("--detach", is_flag=True, help="Run in the background, like submit; print the id.")
@budget_option
@strict_option
@cluster_options
@directory_option
@output_options
def resume(job: str, detach: bool, strict: bool, budget: tuple[str, ...], **flags: str | int | None) -> None:
    """Resume an unfinished job, given by its id, a prefix of it, @last, or its directory.

    Completed partitions are not scored again."""
    if detach:
        _detach(job, flags=flags, budget=_budget(budget))
        return
    _resume(job, strict=strict, flags=flags, budget=_budget(budget))


def _budget(texts: tuple[str, ...]) -> Budget | None:
    """Return the limits of ``--budget``; None without any."""
    if not texts:
        return None
    from pipeline.jobs.budget import parse_budget

    return parse_budget({name.strip(): value.strip() for name, _, value in (text.partition("=") for text in texts)})


@click.command(short_help="Publish what a gate held back.")
@click.argument("job", default="@last")
@click.option("--accept", metavar="WHY", required=True, help="Reason, kept with the figures, your name and the time.")
@cluster_options
@directory_option
@output_options
def publish(job: str, accept: str, **flags: str | int | None) -> None:
    """Publish the output of a job whose gate failed, as it is. Other figures, such as after a retry, need another."""
    from pipeline.jobs.listing import find_job
    from pipeline.report.gate import accept as accept_gate

    settings = settings_for(None, **flags)
    accept_gate(find_job(settings.directory, job.rstrip("/") or job), accept)
    _resume(job, strict=False, flags=flags)


def _detach(job: str, *, flags: Flags, budget: Budget | None = None) -> None:
    from pipeline.cli.submit import tell_submitted
    from pipeline.jobs.listing import find_job
    from pipeline.service.submit import submit_again

    settings = settings_for(None, **flags)
    directory = find_job(settings.directory, job.rstrip("/") or job)
    if budget is not None:
        from pipeline.jobs.budget import set_budget

        set_budget(directory, budget)
    result = submit_again(directory, settings=settings)
    tell_submitted(result)


@click.command(short_help="Retry rejected rows and unfinished partitions.")
@click.argument("job", default="@last")
@click.option("--model", metavar="MODEL", help="Score with this model reference or file instead.")
@budget_option
@strict_option
@retry_set_option
@cluster_options
@directory_option
@output_options
def retry(
    job: str,
    model: str | None,
    strict: bool,
    *,
    overrides: tuple[str, ...],
    budget: tuple[str, ...],
    **flags: str | int | None,
) -> None:
    """Retry rejected rows, unfinished partitions, and quarantined files that were fixed.

    Uses the last model and spec of the job; --model and --set change the model, steps, contract and errors. The output
    is repaired in one commit; until then, and if the retry fails, it stays unchanged.
    """
    settings, limits = settings_for(None, **flags), _budget(budget)

    def go(callbacks: Sequence[Callback]) -> Report:
        from pipeline import runner

        name = job.rstrip("/") or job
        options = {"overrides": overrides, "budget": limits, "settings": settings}
        return runner.retry(name, model=model, callbacks=callbacks, **options)  # type: ignore[arg-type]

    _finish(go, settings=settings, strict=strict)


@click.command(short_help="Create a table and a model, and run a job on them.")
@click.argument("folder", metavar="[DIR]", default="pipeline-demo")
@click.option(
    "--rows",
    type=click.IntRange(min=1000, max=MAX_DEMO_ROWS),
    default=300_000,
    show_default=True,
    help="Rows of the table.",
)
@output_options
def demo(folder: str, rows: int) -> None:
    """Create a table and a model, and run a job on them: offline, in under a minute."""
    from pipeline.demo import make_demo

    table = make_demo(Path(folder), rows=rows)
    if not is_quiet():
        click.echo(table.story(), err=True)
    with chdir(table.folder):
        _run("job.yaml", job_id=None, strict=False, overrides=(), flags={}, text=table.ending)


def _is_job_directory(target: str) -> bool:
    """Return True if ``target`` is a job directory; any other folder is an error.

    :raises SpecError: for a folder that holds no job.
    """
    path = expand_user(target)
    # os.path.isdir is False for a path that is too long, too.
    if "://" in target or not os.path.isdir(path):
        return False
    if (path / layout.JOB_FILE).is_file():
        return True
    spec = path / "job.yaml"
    raise SpecError(
        "not a job directory",
        where=target,
        found="no job.json",
        next_step=f"python -m pipeline {'run' if spec.is_file() else 'init'} {spec if spec.is_file() else target}",
    )


def _run(
    target: str,
    *,
    job_id: str | None,
    strict: bool,
    overrides: Sequence[str],
    flags: Flags,
    params: Sequence[str] = (),
    text: Callable[[Report], str] | None = None,
) -> None:
    # A pipe can be read once only.
    spec_text = read_text(target)
    warn_once.install()
    with relay_if_shown():
        # Before the first worker, which inherits stderr.
        if not _names_cluster(spec_text, overrides, flags):
            _begin_workers(flags, has_steps=any("map" in text for text in (spec_text, *overrides)))
        loaded = load(target, overrides=overrides, params=params, text=spec_text)
        _run_loaded(loaded, settings_for(loaded, **flags), job_id=job_id, strict=strict, text=text)


def _run_loaded(
    loaded: LoadedSpec, settings: Settings, *, job_id: str | None, strict: bool, text: Callable[[Report], str] | None
) -> None:

    def go(callbacks: Sequence[Callback]) -> Report:
        with frozen_imports():
            from pipeline import runner

        return runner.run(loaded.spec, settings=settings, job_id=job_id, callbacks=callbacks)

    _finish(go, settings=settings, strict=strict, text=text, name=loaded.spec.name)


def _begin_workers(flags: Flags, *, has_steps: bool) -> None:
    """Start importing the modules of local workers in the background."""
    from pipeline.common import forkserver as forks

    # Settings and the cluster's file are not read yet; an unneeded fork server ends with this process.
    workers, threads = (flags.get(name) for name in ("workers", "threads"))
    environment = forks.likely_environment(int(workers) if workers else None, int(threads) if threads else None)
    forks.start(environment, has_steps=has_steps)


def _names_cluster(spec_text: str, overrides: Sequence[str], flags: Flags) -> bool:
    """Return True if flags and spec probably name another cluster than this machine; a cheap check."""
    named = flags.get("cluster") or os.environ.get("PIPELINE_CLUSTER") or "local"
    return named != "local" or any(line.startswith("cluster") for line in (*spec_text.splitlines(), *overrides))


def _resume(job: str, *, strict: bool, flags: Flags, budget: Budget | None = None) -> None:
    settings = settings_for(None, **flags)

    def go(callbacks: Sequence[Callback]) -> Report:
        with frozen_imports():
            from pipeline import runner

        return runner.resume(job.rstrip("/") or job, budget=budget, settings=settings, callbacks=callbacks)

    _finish(go, settings=settings, strict=strict)


def _finish(
    go: Callable[[Sequence[Callback]], Report],
    *,
    settings: Settings,
    strict: bool,
    text: Callable[[Report], str] | None = None,
    name: str = "",
) -> None:
    """Run with a progress display, then print the report and set the exit status.

    :param name: name in the job spec; an error before there is a job is kept for ``list`` under it.
    """
    from pipeline.jobs.status import Status
    from pipeline.report.progress import JobWatch, show_progress

    watch = JobWatch()
    try:
        with relay_if_shown() as relay, show_progress(quiet=is_quiet(), on_live=relay.print_with) as callbacks:
            report = go((watch, *callbacks))
    except PipelineError as error:
        if not watch.job and name:
            from pipeline.jobs.refusals import record_refusal

            record_refusal(settings.directory, name, error)
        job = _known(watch.job, settings) if wants_json() and watch.job else None
        tell(error, text=str(error), details=error.to_dict(), job=job)
        raise click.exceptions.Exit(error.exit_code) from error
    emit(report.to_dict(), lambda: text(report) if text else report.text())
    if strict and report.status is Status.SUCCEEDED_WITH_WARNINGS:
        raise click.exceptions.Exit(WARNED)


def _known(job: str, settings: Settings) -> dict[str, Any]:
    """Return what can be read of the report of a job that failed."""
    known: dict[str, Any] = {"job": job, "directory": os.path.join(settings.directory, job)}
    # An unreadable state must not hide the error.
    with suppress(Exception):
        from pipeline.cli.inspect import current_report
        from pipeline.jobs.listing import find_job

        known |= current_report(find_job(settings.directory, job)).to_dict()
    return known
