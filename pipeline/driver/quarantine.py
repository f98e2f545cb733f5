"""Quarantine input files that turn out bad while they are read: a new round continues without them."""

from __future__ import annotations

from dataclasses import replace

from pipeline.common.rows import Fragment, InputFile, QuarantinedFile
from pipeline.common.units import iso_time, utc_now
from pipeline.driver.retry import number_partitions
from pipeline.errors import CorruptInput, InputChanged, PipelineError, SchemaDrift
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger, rejects_path
from pipeline.jobs.rounds import Round, RoundReason, make_record
from pipeline.sources.changes import input_changed, version_text
from pipeline.sources.locate import current_version
from pipeline.sources.quarantine import check_file_count, quarantined_file
from pipeline.sources.versions import is_same_version


def open_quarantine_round(job: JobDirectory, ledger: Ledger, error: PipelineError, *, epoch: int) -> Round | None:
    """Open a round of the remaining rows, without the file that ``error`` names and without other changed files.

    Completed partitions that hold rows of such a file are scored again without them.

    :returns: the round; None if the job spec does not quarantine files, or ``error`` is not about an input file.
    :raises TooManyRejects: when more files would be quarantined than ``errors.max_files`` allows.
    """
    errors = ledger.last.plan.spec.errors
    is_bad_file = isinstance(error, (CorruptInput, InputChanged, SchemaDrift)) and error.place in ledger.files
    if errors.files != "quarantine" or not is_bad_file:
        return None
    assert isinstance(error, (CorruptInput, InputChanged, SchemaDrift))
    bad = {**_changed_files(ledger), error.place: _reject(ledger.files[error.place], error)}
    check_file_count([*ledger.quarantined_files, *bad.values()], limit=errors.max_files, job=job.id)
    supersedes, packed = _without_files(ledger, set(bad))
    known = {**{file.path: file for round_ in ledger.rounds for file in round_.plan.files}, **ledger.files}
    used = {fragment.path for fragments in packed for fragment in fragments}
    plan = replace(
        ledger.last.plan,
        files=tuple(file for path, file in known.items() if path in used),
        partitions=number_partitions(packed),
        pruned_rows=0,
        quarantined_files=(),
    )
    record = make_record(
        plan,
        number=job.rounds.next_number(),
        reason=RoundReason.FILES_QUARANTINED,
        epoch=epoch,
        created=iso_time(utc_now()),
        supersedes=supersedes,
        quarantined_files=[bad[path] for path in sorted(bad)],
    )
    return job.rounds.open(record, plan)


def _reject(file: InputFile, error: CorruptInput | InputChanged | SchemaDrift) -> QuarantinedFile:
    return quarantined_file(file.path, error, rows=file.rows, hive_keys=file.hive_keys)


def _changed_files(ledger: Ledger) -> dict[str, QuarantinedFile]:
    """Return the files with unread rows that changed since the job was planned. One round quarantines all of them."""
    waiting = {
        fragment.path for partition in ledger.todo for fragment in partition.fragments if not fragment.rejected_from
    }
    changed = {}
    for path in sorted(waiting & set(ledger.files)):
        file = ledger.files[path]
        try:
            size, version = current_version(path)
            is_same, current = (
                is_same_version(path, (file.size, file.version), (size, version)),
                version_text(size, version),
            )
        except FileNotFoundError:
            is_same, current = False, "file not found"
        if not is_same:
            changed[path] = _reject(file, input_changed(path, found=current))
    return changed


def _without_files(ledger: Ledger, bad: set[str]) -> tuple[dict[int, list[str]], list[tuple[Fragment, ...]]]:
    """Return the partitions of earlier rounds to supersede, and their fragments outside of the files ``bad``.

    A superseded partition's rejects no longer count, nor do rows that a later round retried from them.
    """
    supersedes: dict[int, list[str]] = {}
    packed: list[tuple[Fragment, ...]] = []
    done = {(receipt.round, receipt.partition): receipt for receipt in ledger.done}
    excluded = set(bad)
    for round_ in ledger.rounds:
        for partition in ledger.partitions(round_):
            receipt = done.get((round_.number, partition.id))
            if receipt is not None and not any(fragment.path in excluded for fragment in partition.fragments):
                continue
            supersedes.setdefault(round_.number, []).append(partition.id)
            if remaining := tuple(part for part in partition.fragments if part.path not in excluded):
                packed.append(remaining)
            if receipt is not None and receipt.rejects is not None:
                excluded.add(rejects_path(receipt))
    return supersedes, packed
