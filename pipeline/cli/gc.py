"""``gc``: remove leftovers of jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import directory_option, emit, output_options, settings_for

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHOWN = 15


@click.command(short_help="Remove what jobs left behind.")
@click.argument("job", default="@last")
@click.option("--all", "is_all", is_flag=True, help="Clean up all jobs.")
@click.option("--older-than", metavar="AGE", help="Also remove jobs that succeeded longer ago than this, such as 30d.")
@click.option(
    "--stages", is_flag=True, help="Also remove the rows that jobs kept between their stages, once they succeeded."
)
@click.option("--yes", is_flag=True, help="Remove the files. Without --yes they are only listed.")
@directory_option
@output_options
def gc(job: str, is_all: bool, *, older_than: str | None, stages: bool, yes: bool, directory: str | None) -> None:
    """Show leftovers of crashed attempts; with --yes, remove them. Jobs that a driver runs are skipped."""
    from pipeline.common.units import utc_now
    from pipeline.jobs.directory import JobDirectory
    from pipeline.jobs.listing import find_job, list_jobs
    from pipeline.service import gc as cleaning

    if is_all and job != "@last":
        raise click.UsageError("name a job, or give --all")
    settings, age = settings_for(directory=directory), cleaning.parse_age(older_than) if older_than else None
    root = settings.directory
    jobs = [JobDirectory.open(summary.directory) for summary in list_jobs(root)] if is_all else [find_job(root, job)]
    sweeps = [
        cleaning.sweep_job(
            job_directory,
            now=utc_now(),
            older_than=age,
            lease_seconds=settings.lease_seconds,
            delete=yes,
            stages=stages,
        )
        for job_directory in jobs
    ]
    # Children go with their parent, never by themselves.
    sweeps += [
        cleaning.sweep_job(child, now=utc_now(), lease_seconds=settings.lease_seconds, delete=yes, stages=stages)
        for parent, sweep in zip(jobs, tuple(sweeps), strict=True)
        if not any(leftover.kind == "job" for leftover in sweep.leftovers)
        for child in parent.children()
    ]
    if is_all:
        sweeps.append(cleaning.sweep_root(root, delete=yes))
    swept = [sweep.to_dict() for sweep in sweeps]
    total = sum(leftover.bytes for sweep in sweeps for leftover in sweep.leftovers)
    ages = (f" --older-than {older_than}" if older_than else "") + (" --stages" if stages else "")
    again = f"python -m pipeline gc {'--all' if is_all else jobs[0].id}{ages} --yes"
    emit(
        {"removed": yes, "bytes": total, "jobs": [sweep for sweep in swept if sweep["job"] or sweep["leftovers"]]},
        lambda: _text(swept, total=total, is_removed=yes, again=again),
    )


def _text(swept: Sequence[dict[str, Any]], *, total: int, is_removed: bool, again: str) -> str:
    from pipeline.common.text import next_lines
    from pipeline.common.units import format_bytes

    items = sorted(
        (leftover for job in swept for leftover in job["leftovers"]), key=lambda leftover: -leftover["bytes"]
    )
    kept_lines = [f"  kept       {job['job']}: {job['kept']}" for job in swept if job["kept"]]
    if not items:
        return "\n".join(["nothing to remove", *kept_lines])
    count = "one thing that counts" if len(items) == 1 else f"{len(items):,} things that count"
    verb = "Removed" if is_removed else "Nothing was removed. Found"
    lines = [f"{verb} {count} nowhere: {format_bytes(total)}."]
    lines += [
        f"  {leftover['kind']:<11}{format_bytes(leftover['bytes']):>8}  {leftover['path']}"
        for leftover in items[:_SHOWN]
    ]
    lines += [f"  … and {len(items) - _SHOWN:,} more (--json shows all)"] if len(items) > _SHOWN else []
    return "\n".join([*lines, *kept_lines, *([] if is_removed else next_lines([again]))])
