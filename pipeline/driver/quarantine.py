"""Input files that turn out bad while they are read: set aside as a whole, by a round that does without them."""

from __future__ import annotations

from dataclasses import replace

from pipeline.common.rows import Fragment, InputFile, RejectedFile
from pipeline.common.units import iso_time, utc_now
from pipeline.driver.retry import number_partitions
from pipeline.errors import CorruptInput, InputChanged, PipelineError, SchemaDrift
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger, rejects_path
from pipeline.jobs.rounds import FILES_REJECTED, Round, make_record
from pipeline.sources.locate import current_version
from pipeline.sources.parquet.quarantine import check_file_count, quarantined_file


def open_quarantine_round(job: JobDirectory, ledger: Ledger, error: PipelineError, *, epoch: int) -> Round | None:
    """Open a round that does what is left without the file that ``error`` is about, and without others that changed.

    Partitions that are done already and hold rows of such a file are done again: the file is out as a whole.

    :returns: None when the job spec does not want that, or the error is not about an input file.
    :raises TooManyRejects: when more files would be set aside than ``errors.max_files`` allows.
    """
    errors = ledger.last.plan.spec.errors
    is_bad_file = isinstance(error, (CorruptInput, InputChanged, SchemaDrift)) and error.where in ledger.files
    if errors.files != "reject" or not is_bad_file:
        return None
    assert isinstance(error, (CorruptInput, InputChanged, SchemaDrift))
    bad = {**_changed(ledger), error.where: _reject(ledger.files[error.where], error)}
    check_file_count([*ledger.rejected_files, *bad.values()], limit=errors.max_files, job=job.job)
    takes, packed = _without(ledger, set(bad))
    known = {**{file.path: file for one in ledger.rounds for file in one.plan.files}, **ledger.files}
    used = {fragment.path for fragments in packed for fragment in fragments}
    plan = replace(
        ledger.last.plan,
        files=tuple(file for path, file in known.items() if path in used),
        partitions=number_partitions(packed),
        pruned_rows=0,
        rejected_files=(),
    )
    record = make_record(
        plan,
        number=ledger.last.number + 1,
        why=FILES_REJECTED,
        epoch=epoch,
        created=iso_time(utc_now()),
        takes=takes,
        rejected_files=[bad[path] for path in sorted(bad)],
    )
    return job.open_round(record, plan)


def _reject(file: InputFile, error: CorruptInput | InputChanged | SchemaDrift) -> RejectedFile:
    return quarantined_file(file.path, error, rows=file.rows, keys=file.keys)


def _changed(ledger: Ledger) -> dict[str, RejectedFile]:
    """Files that are still to be read, and are not as they were planned: one round sets all of them aside."""
    waiting = {fragment.path for partition in ledger.todo for fragment in partition.fragments if not fragment.origin}
    found = {}
    for path in sorted(waiting & set(ledger.files)):
        file = ledger.files[path]
        try:
            size, version = current_version(path)
            there = f"{size:,} bytes, {version}"
        except FileNotFoundError:
            size, version, there = -1, "", "no such file"
        if (size, version) != (file.size, file.version):
            found[path] = _reject(file, InputChanged("an input file changed since the job was planned", found=there))
    return found


def _without(ledger: Ledger, bad: set[str]) -> tuple[dict[int, list[str]], list[tuple[Fragment, ...]]]:
    """Partitions to take from earlier rounds, and what is left of their fragments.

    When a partition is done again, its rejects count no more, nor does what a later round made of them.
    """
    takes: dict[int, list[str]] = {}
    packed: list[tuple[Fragment, ...]] = []
    done = {(receipt.round, receipt.partition): receipt for receipt in ledger.done}
    out = set(bad)
    for one in ledger.rounds:
        for partition in ledger.partitions(one):
            receipt = done.get((one.number, partition.id))
            if receipt is not None and not any(fragment.path in out for fragment in partition.fragments):
                continue
            takes.setdefault(one.number, []).append(partition.id)
            if rest := tuple(fragment for fragment in partition.fragments if fragment.path not in out):
                packed.append(rest)
            if receipt is not None and receipt.rejects is not None:
                out.add(rejects_path(receipt))
    return takes, packed
