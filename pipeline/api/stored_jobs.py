"""Functions for jobs that exist already: list, resume, retry, verify, attach."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import pandas as pd

from pipeline import runner
from pipeline.api.clusters import AnyCluster, on_client
from pipeline.api.display import show_observers
from pipeline.api.job_table import job_table, since_text
from pipeline.api.tracebacks import interruptible
from pipeline.common.travel import entrypoint_of
from pipeline.common.units import utc_now
from pipeline.events import Callback
from pipeline.jobs.budget import parse_budget
from pipeline.jobs.listing import find_job
from pipeline.jobs.listing import list_jobs as list_summaries
from pipeline.jobs.status import Status
from pipeline.report.gate import accept as accept_gate
from pipeline.report.job_figures import read_figures
from pipeline.report.report import Report
from pipeline.report.verify import Verification
from pipeline.report.verify import verify as verify_job
from pipeline.service.handle import JobHandle
from pipeline.settings import Settings
from pipeline.spec.budget import Budget


def list_jobs(
    *,
    name: str = "",
    statuses: Sequence[Status | str] = (),
    since: str | datetime | timedelta = "",
    limit: int | None = None,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """List the jobs of the directory with their figures, newest first. In Jupyter the table is a card.

    One small file of each job is read. Figures of a job that has no report yet are missing values.

    Parameters
    ----------
    name : str, optional
        Pattern such as ``"churn-*"`` for the name or the id. Default: all jobs.
    statuses : sequence of Status or str, optional
        Only jobs with one of these statuses.
    since : str, datetime or timedelta, optional
        Only jobs made since then: ``"2026-01-01"`` (UTC without a zone), or a span before now such as ``"7d"``.
    limit : int, optional
        Largest number of jobs.
    settings : Settings, optional
        Default: ``Settings.load()``.

    Returns
    -------
    pandas.DataFrame
        id, name, status, created (UTC), age and duration (Timedelta), rows (of the input), rejected, rows_per_second
        (of a running job, now), peak_memory (bytes, of a worker), partitions, done (scored partitions), model
        (version), output.

    Raises
    ------
    SpecError
        If ``since`` is neither a time nor a span.

    Examples
    --------
    >>> pipeline.list_jobs(name="churn-demo", limit=1)[["name", "status", "rows"]]
             name                   status  rows
    0  churn-demo  SUCCEEDED_WITH_WARNINGS  5000
    """
    settings = settings or Settings.load()
    wanted, now = [Status(status) for status in statuses], utc_now()
    summaries = list_summaries(
        settings.directory, name=name, statuses=wanted, limit=limit, since=since_text(since, now=now)
    )
    return job_table(summaries, read_figures(settings.directory, summaries), now=now)


def resume(
    job: str,
    *,
    budget: Budget | Mapping[str, float] | None = None,
    client: AnyCluster | None = None,
    settings: Settings | None = None,
    callbacks: Sequence[Callback] | None = None,
) -> Report:
    """Resume an unfinished job. Completed partitions are not scored again.

    Parameters
    ----------
    job : str
        Id, unique prefix of an id, ``"@last"``, or the path of a job directory.
    budget : Budget or dict, optional
        Limits of all runs of the job from now on, such as ``{"cost": 50}``. Default: those that it has.
    client : distributed.Client or cluster, optional
        Your own client, to run on instead of the job's cluster.
    settings : Settings, optional
        Default: ``Settings.load()``.
    callbacks : sequence of Callback, optional
        Observers to call instead of the progress display.

    Returns
    -------
    Report
        For a finished job its report; nothing is done.

    Raises
    ------
    SpecError
        If no job, or more than one, has that name.
    PipelineError
        If the job failed again.

    Examples
    --------
    >>> pipeline.resume("@last").status
    <Status.SUCCEEDED_WITH_WARNINGS: 'SUCCEEDED_WITH_WARNINGS'>
    """
    settings = on_client(settings or Settings.load(), client)
    with interruptible("the job ran"), show_observers(callbacks) as observers:
        limits = budget if budget is None or isinstance(budget, Budget) else parse_budget(budget)
        return runner.resume(job, budget=limits, settings=settings, callbacks=observers)


def retry(
    job: str,
    *,
    model: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    client: AnyCluster | None = None,
    settings: Settings | None = None,
    callbacks: Sequence[Callback] | None = None,
) -> Report:
    """Score what a job left out: rejected rows, unfinished partitions, fixed files. Publish the result in one commit.

    Parameters
    ----------
    job : str
        Id, unique prefix of an id, ``"@last"``, or the path of a job directory.
    model : str or PathLike, optional
        Model file or reference to score them with. Default: the last one used.
    overrides : sequence of str or dict, optional
        Changed steps, contract and errors, such as ``"steps.0.map=features:fixed"`` or ``{"steps.0.map": fixed}`` with
        a function.
    client : distributed.Client or cluster, optional
        Your own client, to run on instead of the job's cluster.
    settings : Settings, optional
        Default: ``Settings.load()``.
    callbacks : sequence of Callback, optional
        Observers to call instead of the progress display.

    Returns
    -------
    Report

    Raises
    ------
    PipelineError
        If it failed. ``retry`` or ``resume`` continues it.
    """
    reference = None if model is None else os.fspath(model)
    if isinstance(overrides, Mapping):
        overrides = [f"{field}={_override_text(value)}" for field, value in overrides.items()]
    settings = on_client(settings or Settings.load(), client)
    with interruptible("the job ran"), show_observers(callbacks) as observers:
        return runner.retry(job, model=reference, overrides=overrides, settings=settings, callbacks=observers)


def publish(
    job: str,
    *,
    accept: str,
    client: AnyCluster | None = None,
    settings: Settings | None = None,
    callbacks: Sequence[Callback] | None = None,
) -> Report:
    """Publish the output of a job whose gate failed, as it is.

    Parameters
    ----------
    job : str
        Id, unique prefix of an id, ``"@last"``, or the path of a job directory.
    accept : str
        Reason, kept in the job's directory with the figures, the user and the time. It holds for these figures only.
    client : distributed.Client or cluster, optional
        Your own client, to run on instead of the job's cluster.
    settings : Settings, optional
        Default: ``Settings.load()``.
    callbacks : sequence of Callback, optional
        Observers to call instead of the progress display.

    Returns
    -------
    Report

    Raises
    ------
    SpecError
        If the gate of the job has not failed.
    GateFailed
        If the job was scored again and has other figures now.
    """
    accept_gate(find_job((settings or Settings.load()).directory, job), accept)
    return resume(job, client=client, settings=settings, callbacks=callbacks)


def _override_text(value: Any) -> str:
    """Return the value of an override as text: the name of a function, or JSON, which is YAML too."""
    if callable(value):
        return entrypoint_of(value)
    return value if isinstance(value, str) else json.dumps(value)


def verify(
    job: str,
    *,
    sample: int = 1000,
    seed: int | None = None,
    call_services: bool = False,
    settings: Settings | None = None,
) -> Verification:
    """Prove from the receipts and the data that every row was scored once. The report is not used.

    Parameters
    ----------
    job : str
        Id, unique prefix of an id, ``"@last"``, or the path of a job directory.
    sample : int, default 1000
        Rows to score again and compare bit by bit.
    seed : int, optional
        Seed of the sample. Default: another sample each time.
    call_services : bool, default False
        Score the sample again also where a service scores, which costs what its answers cost.
    settings : Settings, optional
        Default: ``Settings.load()``.

    Returns
    -------
    Verification
        ``ok``, and the checks; ``print`` shows them.

    Examples
    --------
    >>> pipeline.verify("@last", sample=100, seed=1).ok
    True
    """
    directory = find_job((settings or Settings.load()).directory, job)
    return verify_job(directory, sample=sample, seed=seed, call_services=call_services)


def attach(job: str, *, settings: Settings | None = None, callbacks: Sequence[Callback] = ()) -> JobHandle:
    """Return a handle of a job that any process runs. Its directory must be readable from here.

    Parameters
    ----------
    job : str
        Id, unique prefix of an id, ``"@last"``, or the path of a job directory.
    settings : Settings, optional
        Default: ``Settings.load()``.
    callbacks : sequence of Callback, optional
        Observers, called as long as this process lives.

    Returns
    -------
    JobHandle

    Examples
    --------
    >>> handle = pipeline.attach("@last")
    >>> handle.status.is_success
    True
    """
    settings = settings or Settings.load()
    directory = find_job(settings.directory, job)
    return JobHandle.open(directory, lease_seconds=settings.lease_seconds, callbacks=callbacks)
