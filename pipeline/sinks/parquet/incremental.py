"""Publish an incremental job to a folder of Parquet files that earlier jobs published to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.errors import PipelineError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.layout import round_file
from pipeline.jobs.ledger import Ledger
from pipeline.plan.incremental import PublishedInput, baseline_of, other_baseline
from pipeline.plan.plan import Plan
from pipeline.sinks.parquet import layout
from pipeline.sinks.parquet.pack import Piece
from pipeline.storage.store import Store, open_store


def has_nothing_new(plan: Plan) -> bool:
    """True if an incremental job found nothing to score. Such a job publishes nothing."""
    return bool(plan.progress.baseline) and not plan.files


def check_baseline(state: layout.SinkState | None, directory: JobDirectory, *, path: str) -> None:
    """Refuse to publish if the sink differs from the plan's baseline: another job may have published the same rows.

    :param path: path of the sink, for the error.
    :raises OutputConflict: when the baseline differs.
    """
    plan = directory.plan
    if not plan.progress.baseline:
        return
    work = layout.read_published_inputs(state, plan.spec.name)
    number = next((number for number, inputs in enumerate(work) if inputs.job == directory.id), None)
    if number is None:
        is_same = baseline_of(work) == plan.progress.baseline
    else:
        # A repair of this job: no later job may have scored the same input files.
        paths = {file.path for file in work[number].inputs}
        is_same = not any(file.path in paths for later in work[number + 1 :] for file in later.inputs)
    if not is_same:
        raise other_baseline(path, job=directory.id)


def with_inputs(
    publication: layout.Publication, directory: JobDirectory, pieces: Sequence[Piece]
) -> layout.Publication:
    """Return ``publication`` with its inputs if the job is incremental; else return ``publication`` unchanged."""
    plan = directory.plan
    if not plan.progress.baseline:
        return publication
    ledger = directory.ledger(directory.receipts.all())
    added = {piece.name for piece in pieces}
    # Files kept by a repair may contain rows of any input file of the job.
    retained = tuple(file.name for file in publication.files if file.name not in added)
    outputs = _outputs(ledger, pieces)
    inputs = tuple(
        PublishedInput(
            file.path,
            file.size,
            file.version,
            len(file.row_groups),
            file.footer_digest,
            (*outputs[file.path], *retained),
        )
        for file in ledger.files.values()
    )
    return replace(
        publication,
        name=plan.spec.name,
        # Digest of the round that scored all rows: after an alias change, a later round rescores all of them.
        work=ledger.base.plan.progress.work or plan.progress.work,
        inputs=inputs,
        replaces=plan.progress.replaces,
    )


def _outputs(ledger: Ledger, pieces: Sequence[Piece]) -> dict[str, tuple[str, ...]]:
    """Return the names of the published files that contain rows of an input file, by input file."""
    paths = {
        round_file(receipt.round, receipt.data.name): {part.path for part in receipt.files}
        for receipt in ledger.done
        if receipt.data is not None
    }
    outputs: dict[str, list[str]] = {path: [] for path in ledger.files}
    for piece in pieces:
        of_piece = {path for source in piece.sources for path in paths.get(source.name, {""})}
        # A retry reads rejected rows from files of rejects, which may contain rows of any input file.
        for path in of_piece if of_piece <= outputs.keys() else outputs:
            outputs[path].append(piece.name)
    return {path: tuple(names) for path, names in outputs.items()}


def clear_abandoned(
    store: Store, directory: JobDirectory, *, is_locked: bool, check_lease: Callable[[], object] = lambda: None
) -> None:
    """Remove files that other jobs of this name left in the sink when they died before their commit.

    Such a job was planned on another baseline, so it can no longer publish. Files of other jobs stay: they may be about
    to commit them.

    :param is_locked: True if no other publisher can be active: the baseline is not compared then.
    """
    if not directory.plan.progress.baseline:
        return
    names = store.list()
    state = layout.read_state(store)
    tagged = [name for name in layout.uncounted(names, state) if layout.tag_of(name)]
    if not tagged:
        return
    baseline = baseline_of(layout.read_published_inputs(state, directory.plan.spec.name))
    published = {publication.job for publication in state.publications} if state else set()
    tags = {
        layout.job_tag(job.id)
        for job in _jobs_of_that_name(directory)
        if job.id not in published and (is_locked or _is_outdated(job, baseline))
    }
    abandoned = [name for name in tagged if layout.tag_of(name) in tags]
    if abandoned:
        check_lease()
    for name in abandoned:
        store.remove(name)


def _is_outdated(job: JobDirectory, baseline: str) -> bool:
    """True if ``job`` was planned on another baseline than the sink's, which excludes that it publishes."""
    try:
        return job.plan.progress.baseline != baseline
    except (PipelineError, OSError):
        return False


def _jobs_of_that_name(directory: JobDirectory) -> list[JobDirectory]:
    """Return the other jobs beside ``directory`` that have the same name and sink."""
    root = directory.root.rpartition("/")[0]
    jobs = []
    for name in open_store(root, private=True).list_folders():
        try:
            job = JobDirectory.open(f"{root}/{name}")
            record = job.record
        except (PipelineError, OSError):
            continue
        if record.name == directory.record.name and record.sink == directory.record.sink and job.id != directory.id:
            jobs.append(job)
    return jobs
