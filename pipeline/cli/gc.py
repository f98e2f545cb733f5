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
@click.option("--yes", is_flag=True, help="Remove the files. Without --yes they are only listed.")
@directory_option
@output_options
def gc(job: str, is_all: bool, older_than: str | None, yes: bool, directory: str | None) -> None:
    """Show leftovers of crashed attempts; with --yes, remove them. Jobs that a driver runs are skipped."""
    from pipeline.common.units import utc_now
    from pipeline.jobs.directory import JobDirectory
    from pipeline.jobs.listing import find_job, list_jobs
    from pipeline.service import gc as cleaning

    if is_all and job != "@last":
        raise click.UsageError("name a job, or give --all")
    settings, age = settings_for(directory=directory), cleaning.parse_age(older_than) if older_than else None
    root = settings.directory
    jobs = [JobDirectory.open(one.directory) for one in list_jobs(root)] if is_all else [find_job(root, job)]
    sweeps = [
        cleaning.sweep_job(one, now=utc_now(), older_than=age, lease_seconds=settings.lease_seconds, delete=yes)
        for one in jobs
    ]
    # Children go with their parent, never by themselves.
    sweeps += [
        cleaning.sweep_job(child, now=utc_now(), lease_seconds=settings.lease_seconds, delete=yes)
        for one, sweep in zip(jobs, tuple(sweeps), strict=True)
        if not any(found.kind == "job" for found in sweep.leftovers)
        for child in one.children()
    ]
    if is_all:
        sweeps.append(cleaning.sweep_root(root, delete=yes))
    found = [sweep.to_dict() for sweep in sweeps]
    total = sum(one.bytes for sweep in sweeps for one in sweep.leftovers)
    ages = f" --older-than {older_than}" if older_than else ""
    again = f"python -m pipeline gc {'--all' if is_all else jobs[0].id}{ages} --yes"
    emit(
        {"removed": yes, "bytes": total, "jobs": [one for one in found if one["job"] or one["leftovers"]]},
        lambda: _text(found, total=total, is_removed=yes, again=again),
    )


def _text(found: Sequence[dict[str, Any]], *, total: int, is_removed: bool, again: str) -> str:
    from pipeline.common.text import next_lines
    from pipeline.common.units import format_bytes

    items = sorted((one for job in found for one in job["leftovers"]), key=lambda one: -one["bytes"])
    kept = [f"  kept       {job['job']}: {job['kept']}" for job in found if job["kept"]]
    if not items:
        return "\n".join(["nothing to remove", *kept])
    count = "one thing that counts" if len(items) == 1 else f"{len(items):,} things that count"
    verb = "Removed" if is_removed else "Nothing was removed. Found"
    lines = [f"{verb} {count} nowhere: {format_bytes(total)}."]
    lines += [f"  {one['kind']:<11}{format_bytes(one['bytes']):>8}  {one['path']}" for one in items[:_SHOWN]]
    lines += [f"  … and {len(items) - _SHOWN:,} more (--json shows all)"] if len(items) > _SHOWN else []
    return "\n".join([*lines, *kept, *([] if is_removed else next_lines([again]))])
