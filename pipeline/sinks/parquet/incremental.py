"""Publish an incremental job to a folder of Parquet files that earlier jobs published to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.errors import PipelineError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.layout import round_file
from pipeline.plan.incremental import PublishedInput, baseline_of, other_baseline
from pipeline.plan.plan import Plan
from pipeline.sinks.parquet import layout
from pipeline.sinks.parquet.pack import Piece
from pipeline.storage.store import Store, open_store


def has_nothing_new(plan: Plan) -> bool:
    """True if an incremental job found nothing to score. Such a job publishes nothing."""
    return bool(plan.progress.baseline) and not plan.files


def check_baseline(state: layout.SinkState | None, directory: JobDirectory, *, place: str) -> None:
    """Refuse to publish if the sink differs from the plan's baseline: another job may have published the same rows.

    :param place: path of the sink, for the error.
    :raises OutputConflict: when the baseline differs.
    """
    plan = directory.plan
    if not plan.progress.baseline:
        return
    work = layout.read_published_inputs(state, plan.spec.name)
    number = next((number for number, one in enumerate(work) if one.job == directory.id), None)
    if number is None:
        is_same = baseline_of(work) == plan.progress.baseline
    else:
        # A repair of this job: no later job may have scored the same input files.
        mine = {file.path for file in work[number].inputs}
        is_same = not any(file.path in mine for one in work[number + 1 :] for file in one.inputs)
    if not is_same:
        raise other_baseline(place, job=directory.id)


def with_inputs(
    publication: layout.Publication, directory: JobDirectory, pieces: Sequence[Piece]
) -> layout.Publication:
    """Return ``publication`` with its inputs if the job is incremental; else return ``publication`` unchanged."""
    plan = directory.plan
    if not plan.progress.baseline:
        return publication
    made = {piece.name for piece in pieces}
    # Files kept by a repair may contain rows of any input file of the job.
    kept = tuple(file.name for file in publication.files if file.name not in made)
    outputs, base = _outputs(directory, pieces), directory.ledger(directory.receipts.all()).base.plan
    inputs = tuple(
        PublishedInput(
            file.path, file.size, file.version, len(file.row_groups), file.footer_digest, (*outputs[file.path], *kept)
        )
        for file in directory.ledger(directory.receipts.all()).files.values()
    )
    return replace(
        publication,
        name=plan.spec.name,
        # Digest of the round that scored all rows: after an alias change, a later round rescores all of them.
        work=base.progress.work or plan.progress.work,
        inputs=inputs,
        replaces=plan.progress.replaces,
    )


def _outputs(directory: JobDirectory, pieces: Sequence[Piece]) -> dict[str, tuple[str, ...]]:
    """Return the names of the published files that contain rows of an input file, by input file."""
    ledger = directory.ledger(directory.receipts.all())
    paths = {
        round_file(receipt.round, receipt.data.name): {part.path for part in receipt.files}
        for receipt in ledger.done
        if receipt.data is not None
    }
    found: dict[str, list[str]] = {path: [] for path in ledger.files}
    for piece in pieces:
        of_piece = {path for source in piece.sources for path in paths.get(source.name, {""})}
        # A retry reads rejected rows from files of rejects, which may contain rows of any input file.
        for path in of_piece if of_piece <= found.keys() else found:
            found[path].append(piece.name)
    return {path: tuple(names) for path, names in found.items()}


def clear_abandoned(store: Store, directory: JobDirectory) -> None:
    """Remove files that other jobs of this name left in the sink when they died before their commit.

    Those jobs have an outdated baseline, so they can no longer publish. Files of jobs with other names stay: such a job
    may be about to commit them.
    """
    if not directory.plan.progress.baseline:
        return
    state = layout.read_state(store)
    counted = {file.name for file in state.files} if state else set()
    left = [name for name in store.list() if layout.tag_of(name) and name not in counted]
    if not left:
        return
    tags = {layout.job_tag(job) for job in _jobs_of_that_name(directory)}
    for name in left:
        if layout.tag_of(name) in tags:
            store.remove(name)


def _jobs_of_that_name(directory: JobDirectory) -> list[str]:
    root = directory.root.rpartition("/")[0]
    found = []
    for job in open_store(root, private=True).list_folders():
        try:
            record = JobDirectory.open(f"{root}/{job}").record
        except (PipelineError, OSError):
            continue
        if record.name == directory.record.name and record.sink == directory.record.sink and job != directory.id:
            found.append(job)
    return found
