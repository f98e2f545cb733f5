"""Proof from the receipts and the data, never from the report, that every input row was scored once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import pyarrow.parquet as pq

from pipeline.common.rows import RowCounts
from pipeline.errors import PipelineError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger, rejects_place
from pipeline.jobs.manifest import Manifest
from pipeline.jobs.receipts import DataFile, Receipt
from pipeline.plan.plan import Partition
from pipeline.report.resample import resample
from pipeline.sinks import published
from pipeline.sources.locate import current_version
from pipeline.sources.parquet.opening import open_parquet
from pipeline.storage.local import file_sha256
from pipeline.storage.store import Store, open_store

_SHOWN = 3


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    """What was found."""


@dataclass(frozen=True)
class Verification:
    """All that was looked at."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is as it should be."""
        return all(check.ok for check in self.checks)

    def details(self) -> dict[str, Any]:
        """As JSON output shows it."""
        checks = [{"name": one.name, "ok": one.ok, "detail": one.detail} for one in self.checks]
        return {"schema_version": 1, "ok": self.ok, "checks": checks}


class _Wrong(Exception):
    """A check failed; the text is its detail."""


def verify(job: JobDirectory, *, sample: int = 1000, seed: int | None = None) -> Verification:
    """Check a job's receipts against its plan, its files, the input's footers, the manifest and the published output,
    and score ``sample`` random input rows again with the pinned model.

    :param seed: of the sample; None takes another one each time.
    """
    if job.record.children:
        return _verify_children(job, sample=sample, seed=seed)
    facts = _Facts(job)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("partitions", facts.partitions_covered),
        ("rows", facts.rows_reconciled),
        ("input", facts.input_footers),
        ("checkpoint", facts.data_files),
        ("rejects", facts.reject_files),
        ("manifest", facts.manifest_agrees),
        ("output", facts.output_holds),
        ("sample", lambda: _sample(job, facts.ledger, rows=sample, seed=seed)),
    ]
    return Verification(tuple(_run(name, check) for name, check in checks))


def _verify_children(job: JobDirectory, *, sample: int, seed: int | None) -> Verification:
    """The checks of all children of a fan-out; the rows of the sample are shared out among them."""
    children = job.children()
    share = -(-sample // len(children))
    found: dict[str, list[tuple[JobDirectory, Check]]] = {}
    for child in children:
        for check in verify(child, sample=share, seed=seed).checks:
            found.setdefault(check.name, []).append((child, check))
    return Verification(tuple(_all_of(name, checks) for name, checks in found.items()))


def _all_of(name: str, checks: Sequence[tuple[JobDirectory, Check]]) -> Check:
    wrong = [(child, check) for child, check in checks if not check.ok]
    child, shown = (wrong or checks)[0]
    count = f"{len(wrong):,} of {len(checks):,} children" if wrong else f"{len(checks):,} children"
    return Check(name, not wrong, f"{count}, such as {child.job}: {shown.detail}")


def _run(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except _Wrong as wrong:
        return Check(name, False, str(wrong))
    except PipelineError as error:
        return Check(name, False, " ".join(str(error).split()))
    except OSError as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


@dataclass
class _Facts:
    """What is on disk, each read once."""

    job: JobDirectory

    @cached_property
    def ledger(self) -> Ledger:
        return self.job.ledger()

    @property
    def done(self) -> Collection[Receipt]:
        return self.ledger.done

    @cached_property
    def manifest(self) -> Manifest | None:
        return self.job.manifest()

    def partitions_covered(self) -> str:
        """Each partition has one receipt, for exactly its rows; each wanted row of each file is in one partition."""
        planned = {(one.number, part.id): part for one in self.ledger.rounds for part in self.ledger.partitions(one)}
        counted = Counter((receipt.stage, receipt.partition) for receipt in self.done)
        _expect_none("done twice", [key[1] for key, times in counted.items() if times > 1])
        _expect_none(f"of {len(planned):,} not done", [key[1] for key in planned if key not in counted])
        others = [one.partition for one in self.done if not _covers(one, planned[one.stage, one.partition])]
        _expect_none("with a receipt for other rows", others)
        models = {one.number: one.plan.model.digest for one in self.ledger.rounds}
        _expect_none("scored by another model", [r.partition for r in self.done if r.model != models[r.stage]])
        self._check_ranges()
        again, aside = self._check_tried_again(), len(self.ledger.rejected_files)
        return (
            f"{len(planned):,} partitions, each done once, cover every wanted row of {len(self.ledger.files):,} files"
            + (f"; {again:,} rows that were rejected were tried again" if again else "")
            + (f"; {aside:,} files are set aside" if aside else "")
        )

    def _check_ranges(self) -> None:
        ranges: dict[str, list[tuple[int, int]]] = {path: [] for path in self.ledger.files}
        for receipt in self.done:
            for part in receipt.files if not receipt.before else ():
                ranges.setdefault(part.path, []).append((part.row_start, part.row_stop))
        for path, found in ranges.items():
            if path not in self.ledger.files:
                raise _Wrong(f"{path} is set aside, and there are receipts of rows {_show(_merged(found))} of it")
        for file in self.ledger.files.values():
            found, wanted = _merged(ranges[file.path]), _merged(_wanted_ranges(file.row_groups))
            if found != wanted:
                raise _Wrong(f"{file.path}: the receipts are of rows {_show(found)}, wanted were {_show(wanted)}")

    def _check_tried_again(self) -> int:
        """Each row that was tried again had been rejected, and no two later rounds took it; how many there are."""
        rejects = {rejects_place(one): one for one in self.done if one.rejects}
        taken = {part.path for one in self.done if one.before for part in one.files}
        _expect_none("made of rejects that do not count", sorted(taken - set(rejects)))
        for place in sorted(taken):
            ranges, rows = self.ledger.tried_again(rejects[place]), rejects[place].rows.rejected
            is_twice = any(one[1] > other[0] for one, other in pairwise(ranges))
            if is_twice or any(stop > rows for _, stop in ranges):
                raise _Wrong(f"{place}: rows {_show(ranges)} were tried again, each once, of {rows:,}")
        return sum(one.retried for one in self.ledger.summaries())

    def rows_reconciled(self) -> str:
        """In = out + rejected + filtered per receipt, per range of a file, and in all."""
        for receipt in self.done:
            parts = RowCounts.total(part.rows for part in receipt.files)
            if parts != receipt.rows or not all(part.rows.is_reconciled for part in receipt.files):
                raise _Wrong(f"partition {receipt.partition}: {receipt.rows.details()}, its files {parts.details()}")
            if any(part.rows.rows_in != part.row_stop - part.row_start for part in receipt.files):
                raise _Wrong(f"partition {receipt.partition}: other rows in than its ranges have")
        rows, planned = self.ledger.rows, self.ledger.planned_rows
        if rows.rows_in != planned or not rows.is_reconciled:
            raise _Wrong(f"{rows.details()}, and the input files have {planned:,} rows")
        return f"{rows.rows_in:,} in = {rows.out:,} out + {rows.rejected:,} rejected + {rows.filtered:,} filtered"

    def input_footers(self) -> str:
        """The footers of input files that are still the planned ones have as many rows as were planned."""
        same = 0
        for file in self.ledger.files.values():
            if not _is_unchanged(file.path, file.size, file.version):
                continue
            with open_parquet(file.path, columns=1) as opened:
                rows = opened.metadata.num_rows
            planned = sum(group.rows for group in file.row_groups)
            if rows != planned:
                raise _Wrong(f"{file.path}: its footer says {rows:,} rows, planned were {planned:,}")
            same += 1
        changed = len(self.ledger.files) - same
        gone = f"; {changed:,} have been changed or removed since, and cannot be compared" if changed else ""
        return f"the footers of {same:,} input files agree{gone}"

    def data_files(self) -> str:
        """Every checkpoint file is there, unchanged, with as many rows as its receipt says."""
        found = [(receipt, receipt.data) for receipt in self.done]
        return self._check_files(found, lambda receipt: receipt.rows.out)

    def reject_files(self) -> str:
        """Like `data_files`, for the rejects; and their reasons add up."""
        for receipt in self.done:
            if sum(receipt.reasons.values()) != receipt.rows.rejected:
                raise _Wrong(f"partition {receipt.partition}: {receipt.reasons} for {receipt.rows.rejected:,} rejects")
        return self._check_files([(one, one.rejects) for one in self.done], lambda receipt: receipt.rows.rejected)

    def _check_files(self, found: list[tuple[Receipt, DataFile | None]], rows: Callable[[Receipt], int]) -> str:
        count = total = 0
        for receipt, file in found:
            if (file.rows if file else 0) != rows(receipt):
                raise _Wrong(f"partition {receipt.partition}: its file is said to have other rows than it counts")
            if file is not None:
                name = f"stages/{receipt.stage}/{file.name}"
                _check_file(self.job.store, name, rows=file.rows, size=file.bytes, sha256=file.sha256)
                count, total = count + 1, total + file.rows
        return f"{count:,} files with {total:,} rows have the checksums of their receipts"

    def manifest_agrees(self) -> str:
        """The last manifest names exactly the files of the receipts."""
        if self.manifest is None:
            raise _Wrong("the job has no manifest: its output was not committed")
        files = [(one, one.data) for one in self.done if one.data]
        receipts = {(r.partition, f"stages/{r.stage}/{data.name}", data.rows, data.sha256) for r, data in files}
        listed = [(file.partition, file.name, file.rows, file.sha256) for file in self.manifest.files]
        if len(listed) != len(set(listed)) or set(listed) != receipts:
            _expect_none("in the manifest and not in the receipts", [name[0] for name in set(listed) - receipts])
            _expect_none("in the receipts and not in the manifest", [name[0] for name in receipts - set(listed)])
            raise _Wrong("the manifest names a file twice")
        return f"manifest {self.manifest.number} names the {len(listed):,} files of the receipts"

    def output_holds(self) -> str:
        """The files that the sink lists for this job are there, unchanged, and have all rows of the manifest."""
        if self.manifest is None:
            raise _Wrong("nothing was committed")
        there = published(self.manifest, self.job)
        if there is None:
            if self.job.status().is_success:
                raise _Wrong(f"{self.job.resolve(self.job.plan.spec.sink.path)} does not list this job")
            return "not published, as the job did not succeed"
        if there.is_replaced:
            return f"another job has overwritten {there.path} since"
        store = open_store(there.path)
        for file in there.files:
            _check_file(store, file.name, rows=file.rows, size=file.bytes, sha256=file.sha256)
        if there.rows != self.manifest.rows.out:
            raise _Wrong(f"{there.path} has {there.rows:,} rows of this job, scored were {self.manifest.rows.out:,}")
        return f"{len(there.files):,} files with {there.rows:,} rows in {there.path}"


def _sample(job: JobDirectory, ledger: Ledger, *, rows: int, seed: int | None) -> str:
    """Random input rows give the output they have, scored again by the model that was pinned."""
    result = resample(job, ledger, rows=rows, random=random.Random(seed))
    if result.wrong:
        raise _Wrong(f"{len(result.wrong):,} ranges differ, such as {result.wrong[0]}")
    if rows and not result.rows_in and any(receipt.rows.rows_in for receipt in ledger.done):
        raise _Wrong("no input file is as it was planned, so that nothing could be scored again")
    model = ledger.base.plan.model
    again = (
        f"{result.rows_in:,} rows scored again with {model.name} {model.version} give the same {result.rows_out:,} rows"
    )
    return again + (f"; {result.skipped:,} ranges were of changed input files" if result.skipped else "")


def _check_file(store: Store, name: str, *, rows: int, size: int, sha256: str) -> None:
    try:
        with store.open_input(name) as file:
            found = file_sha256(file)
            file.seek(0)
            found_rows = pq.read_metadata(file).num_rows if found == sha256 else -1
    except FileNotFoundError:
        raise _Wrong(f"{store.url(name)} is missing") from None
    if found != sha256:
        raise _Wrong(f"{store.url(name)}: SHA-256 {found[:12]}…, expected {sha256[:12]}…")
    if found_rows != rows or store.size(name) != size:
        raise _Wrong(
            f"{store.url(name)}: {found_rows:,} rows in {store.size(name):,} bytes, expected {rows:,} in {size:,}"
        )


def _is_unchanged(path: str, size: int, version: str) -> bool:
    try:
        return current_version(path) == (size, version)
    except (OSError, PipelineError):
        return False


def _covers(receipt: Receipt, partition: Partition) -> bool:
    wanted = [(fragment.path, fragment.row_start, fragment.row_stop) for fragment in partition.fragments]
    return [(part.path, part.row_start, part.row_stop) for part in receipt.files] == wanted


def _wanted_ranges(row_groups: Any) -> Iterator[tuple[int, int]]:
    start = 0
    for group in row_groups:
        if group.wanted:
            yield start, start + group.rows
        start += group.rows


def _merged(ranges: Any) -> list[tuple[int, int]]:
    """Neighbours joined; an overlap stays visible as two ranges."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(one for one in ranges if one[0] < one[1]):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _show(ranges: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{start:,}-{stop:,}" for start, stop in ranges[:_SHOWN]) or "none"
    return shown + (f" and {len(ranges) - _SHOWN} more ranges" if len(ranges) > _SHOWN else "")


def _expect_none(what: str, partitions: list[str]) -> None:
    if partitions:
        names = ", ".join(sorted(partitions)[:_SHOWN])
        raise _Wrong(f"{len(partitions):,} partitions {what}, such as {names}")
