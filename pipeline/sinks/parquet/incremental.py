"""How an incremental job goes on from what a folder of Parquet files holds."""

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
    """Whether an incremental job found nothing to score: then nothing is published either."""
    return bool(plan.progress.baseline) and not plan.files


def check_baseline(state: layout.SinkState | None, directory: JobDirectory, *, place: str) -> None:
    """Refuse to publish on anything but what the plan goes on from: somebody may have published the same rows.

    :raises OutputConflict: when it is another.
    """
    plan = directory.plan
    if not plan.progress.baseline:
        return
    work = layout.read_published_inputs(state, plan.spec.name)
    number = next((number for number, one in enumerate(work) if one.job == directory.id), None)
    if number is None:
        is_same = baseline_of(work) == plan.progress.baseline
    else:
        # It is repaired: what it was made of must not have been scored again by a later job.
        mine = {file.path for file in work[number].inputs}
        is_same = not any(file.path in mine for one in work[number + 1 :] for file in one.inputs)
    if not is_same:
        raise other_baseline(place, job=directory.id)


def with_inputs(
    publication: layout.Publication, directory: JobDirectory, pieces: Sequence[Piece]
) -> layout.Publication:
    """``publication`` with what it was made of, where the job is incremental."""
    plan = directory.plan
    if not plan.progress.baseline:
        return publication
    made = {piece.name for piece in pieces}
    # Files that stay when a job is repaired may hold rows of any of its input files.
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
        # That of the round which did all the work: a model that moved meanwhile has done it anew.
        work=base.progress.work or plan.progress.work,
        inputs=inputs,
        replaces=plan.progress.replaces,
    )


def _outputs(directory: JobDirectory, pieces: Sequence[Piece]) -> dict[str, tuple[str, ...]]:
    """Input file -> the published files that hold rows of it."""
    ledger = directory.ledger(directory.receipts.all())
    paths = {
        round_file(receipt.round, receipt.data.name): {part.path for part in receipt.files}
        for receipt in ledger.done
        if receipt.data is not None
    }
    found: dict[str, list[str]] = {path: [] for path in ledger.files}
    for piece in pieces:
        of_piece = {path for source in piece.sources for path in paths.get(source.name, {""})}
        # Rows that were rejected at first are read from files of rejects, which may hold rows of any input file.
        for path in of_piece if of_piece <= found.keys() else found:
            found[path].append(piece.name)
    return {path: tuple(names) for path, names in found.items()}


def clear_abandoned(store: Store, directory: JobDirectory) -> None:
    """Remove the files that other jobs of this name left in the sink when they died before their commit: they were
    planned on what was there then, and can't be published any more.

    Of no other job: one that adds to the same sink may be about to name its files.
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
