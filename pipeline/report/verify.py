"""Prove from the receipts and the data, never from the report, that every input row was scored once.

A random sample of the input is scored again and compared with the output bit by bit.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.checksum import checksum_file, short
from pipeline.common.code_search import find_code
from pipeline.common.content import Content, content_of
from pipeline.common.html import html_table
from pipeline.common.rows import Fragment, InputFile, RowCounts
from pipeline.common.text import listed
from pipeline.common.travel import shown_name
from pipeline.common.units import plural
from pipeline.errors import OutputConflict, PipelineError
from pipeline.jobs import layout
from pipeline.jobs.code_archive import remember_packed
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger, rejects_path
from pipeline.jobs.manifest import Manifest
from pipeline.jobs.receipts import DataFile, FragmentCounts, Receipt
from pipeline.jobs.retention import rejects_removed
from pipeline.jobs.splits import sub_fragment
from pipeline.jobs.stages import StageState, stage_states
from pipeline.plan.plan import Partition, Plan
from pipeline.plan.recipe import StageRecipe
from pipeline.plan.stages import steps_title
from pipeline.report.chain_check import BrokenChain, check_chain, is_removed
from pipeline.report.same_values import differing_columns, noise_of
from pipeline.scoring.isolation import SLOW_REASON, IsolatedScorer, for_steps
from pipeline.scoring.partition import read_partition
from pipeline.scoring.predictors import library_predictors
from pipeline.scoring.scorer import Scorer, recipe_steps
from pipeline.sinks import VerifiableSink, find_sink, find_strays, read_published
from pipeline.sources import find_source
from pipeline.sources.locate import has_version
from pipeline.sources.types import empty_table
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import own_storage_options

_SHOWN = 3
CHECKS = ("partitions", "rows", "input", "checkpoint", "rejects", "manifest", "chain", "output", "sample")
"""Names of the checks, in the order in which they are shown; ``chain`` only of a job with stages."""


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool
    detail: str
    """The finding, as text."""


@dataclass(frozen=True, repr=False)
class Verification:
    """The checks of one job."""

    job: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True if every check passed."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the checks for ``--json``."""
        return {"job": self.job, "ok": self.ok, "checks": [asdict(check) for check in self.checks]}

    def text(self) -> str:
        """Return the text that ``python -m pipeline verify`` prints."""
        return verification_text(self)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        failed = sum(not check.ok for check in self.checks)
        outcome = (
            f"{failed} of {len(self.checks)} checks failed" if failed else f"ok, {plural(len(self.checks), 'check')}"
        )
        return f"<Verification {self.job}: {outcome}>"

    def _repr_html_(self) -> str:
        fields = ((f"{_outcome(check)} {check.name}", check.detail) for check in self.checks)
        return html_table(_title(self), fields, tone="good" if self.ok else "bad")


def verification_text(verification: Verification) -> str:
    """Return one line per check, with its outcome."""
    checks = verification.checks
    width = max((len(check.name) for check in checks), default=0)
    lines = [f"  {_outcome(check):<6}  {check.name:<{width}}  {check.detail}" for check in checks]
    return "\n".join([_title(verification), *lines])


def _title(verification: Verification) -> str:
    return f"{'VERIFIED' if verification.ok else 'VERIFICATION FAILED'}  {verification.job}"


def _outcome(check: Check) -> str:
    return "ok" if check.ok else "FAILED"


_CONTENTS = 8
"""Files of a stage with a ``dask`` step whose content is compared."""


class _Wrong(Exception):
    """A check failed; the text is its detail."""


@own_storage_options()
def verify(
    job: JobDirectory, *, sample: int = 1000, seed: int | None = None, call_services: bool = False
) -> Verification:
    """Check a job's receipts against its plan, its files, the input's footers, the manifest and the output.

    ``sample`` random input rows are scored again with the pinned model.

    :param seed: seed of the sample. None: a different sample each time.
    :param call_services: True: also where a service scores, which costs what its answers cost. Rows with other answers
        are then counted, and are no error: nothing is promised about them.
    """
    options = _SampleOptions(sample, seed, call_services)
    if job.record.children:
        return _verify_children(job, options)
    if job.record.stages:
        return _verify_stages(job, options)
    checks = _checks(_Facts(job), options)
    return Verification(job.id, tuple(_run(name, check) for name, check in checks.items()))


@dataclass(frozen=True)
class _SampleOptions:
    """Rows to score again."""

    rows: int
    seed: int | None
    call_services: bool


def _checks(facts: _Facts, options: _SampleOptions) -> dict[str, Callable[[], str]]:
    """Return the checks of a job or a stage, by name, in the order in which they are shown."""
    return {
        "partitions": facts.partitions_covered,
        "rows": facts.rows_reconciled,
        "input": facts.input_footers,
        "checkpoint": facts.data_files,
        "rejects": facts.reject_files,
        "manifest": facts.manifest_agrees,
        "output": facts.output_holds,
        "sample": (facts.contents_agree if facts.is_dask else lambda: _sample(facts.job, facts.ledger, options)),
    }


def _verify_stages(job: JobDirectory, options: _SampleOptions) -> Verification:
    """Check each stage of a job, the chain between them, and the output. The stages share the rows of the sample."""
    every = stage_states(job)
    states = [state for state in every if state.job is not None]
    by_name: dict[str, list[tuple[str, Check]]] = {}
    for state in states:
        assert state.job is not None
        of_stage = _checks(_Facts(state.job), replace(options, rows=-(-options.rows // len(states))))
        del of_stage["output"]
        before = states[state.stage.number - 1].job if state.stage.number else None
        if is_removed(state.job):
            of_stage["checkpoint"] = lambda: "its files were removed by gc --stages"
        if is_removed(state.job) or (before is not None and is_removed(before)):
            of_stage["sample"] = lambda: "its rows were removed by gc --stages, and cannot be compared"
        for name, check in of_stage.items():
            by_name.setdefault(name, []).append((state.stage.slug, _run(name, check)))
    checks = {name: _of_stages(name, parts) for name, parts in by_name.items()}
    checks["chain"] = _run("chain", lambda: _chain(job, every))
    checks["output"] = _run("output", _Facts(job).output_holds)
    return Verification(job.id, tuple(checks[name] for name in CHECKS if name in checks))


def _of_stages(name: str, parts: Sequence[tuple[str, Check]]) -> Check:
    """Return one check for all stages, with the details of those that failed, or of all."""
    wrong = [(slug, check) for slug, check in parts if not check.ok]
    return Check(name, not wrong, "; ".join(f"{steps_title(slug)}: {check.detail}" for slug, check in wrong or parts))


def _chain(job: JobDirectory, states: Sequence[StageState]) -> str:
    try:
        return check_chain(job, states)
    except BrokenChain as error:
        raise _Wrong(str(error)) from None


def _verify_children(job: JobDirectory, options: _SampleOptions) -> Verification:
    """Check all children of a fan-out. The rows of the sample are divided among the children."""
    children = job.children()
    share = -(-options.rows // len(children))
    by_name: dict[str, list[tuple[JobDirectory, Check]]] = {}
    for child in children:
        for check in verify(child, sample=share, seed=options.seed, call_services=options.call_services).checks:
            by_name.setdefault(check.name, []).append((child, check))
    return Verification(job.id, tuple(_all_of(name, checks) for name, checks in by_name.items()))


def _all_of(name: str, checks: Sequence[tuple[JobDirectory, Check]]) -> Check:
    wrong = [(child, check) for child, check in checks if not check.ok]
    child, shown = (wrong or checks)[0]
    count = f"{len(wrong):,} of {len(checks):,} children" if wrong else plural(len(checks), "child", "children")
    return Check(name, not wrong, f"{count}, such as {child.id}: {shown.detail}")


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
    """Facts from the job directory, each read once, and the checks on them."""

    job: JobDirectory

    @cached_property
    def ledger(self) -> Ledger:
        return self.job.ledger()

    @property
    def done(self) -> Collection[Receipt]:
        return self.ledger.done

    @property
    def is_dask(self) -> bool:
        """True for a stage with a ``dask`` step, whose partitions have no rows of the input of their own."""
        return self.ledger.base.plan.dask is not None

    @cached_property
    def manifest(self) -> Manifest | None:
        return self.job.manifests.last()

    def partitions_covered(self) -> str:
        """Check that each partition has one receipt, for exactly its rows, and each wanted row is in one partition."""
        planned = {
            (round_.number, part.id): part for round_ in self.ledger.rounds for part in self.ledger.partitions(round_)
        }
        counted = Counter((receipt.round, receipt.partition) for receipt in self.done)
        _expect_none("done twice", [key[1] for key, times in counted.items() if times > 1])
        _expect_none(f"of {len(planned):,} not done", [key[1] for key in planned if key not in counted])
        others = [
            round_.partition for round_ in self.done if not _covers(round_, planned[round_.round, round_.partition])
        ]
        _expect_none("with a receipt for other rows", others)
        models = {round_.number: round_.plan.model_digest for round_ in self.ledger.rounds}
        _expect_none("scored by another model", [r.partition for r in self.done if r.model != models[r.round]])
        if self.is_dask:
            _expect_none("not made by the step", [receipt.partition for receipt in self.done if not receipt.made])
            return f"{plural(len(planned), 'partition')}, each made once"
        self._check_ranges()
        retried, quarantined = self._check_retried(), len(self.ledger.quarantined_files)
        return (
            f"{plural(len(planned), 'partition')}, each done once, cover every wanted row "
            f"of {plural(len(self.ledger.files), 'file')}"
            + (f"; {retried:,} rejected rows were retried" if retried else "")
            + (f"; {quarantined:,} files are quarantined" if quarantined else "")
        )

    def _check_ranges(self) -> None:
        ranges: dict[str, list[tuple[int, int]]] = {path: [] for path in self.ledger.files}
        for receipt in self.done:
            for part in receipt.files if not receipt.before else ():
                ranges.setdefault(part.path, []).append((part.row_start, part.row_stop))
        for path, receipt_ranges in ranges.items():
            if path not in self.ledger.files:
                raise _Wrong(
                    f"{path} is quarantined, and there are receipts of rows {_show(_merged(receipt_ranges))} of it"
                )
        for file in self.ledger.files.values():
            receipt_ranges, wanted = _merged(ranges[file.path]), _merged(_wanted_ranges(file.row_groups))
            if receipt_ranges != wanted:
                raise _Wrong(
                    f"{file.path}: the receipts are of rows {_show(receipt_ranges)}, wanted were {_show(wanted)}"
                )

    def _check_retried(self) -> int:
        """Check that each retried row had been rejected and was retried by one later round. Return their number."""
        rejects = {rejects_path(receipt): receipt for receipt in self.done if receipt.rejects}
        taken = {part.path for receipt in self.done if receipt.before for part in receipt.files}
        _expect_none("made of rejects that do not count", sorted(taken - set(rejects)))
        for path in sorted(taken):
            ranges, rows = self.ledger.retried_ranges(rejects[path]), rejects[path].rows.rejected
            is_twice = any(receipt[1] > other[0] for receipt, other in pairwise(ranges))
            if is_twice or any(stop > rows for _, stop in ranges):
                raise _Wrong(f"{path}: rows {_show(ranges)} were retried, each once, of {rows:,}")
        return sum(receipt.retried for receipt in self.ledger.summaries())

    def rows_reconciled(self) -> str:
        """Check in = out + rejected + filtered per receipt, per range of a file, and in total."""
        for receipt in self.done if not self.is_dask else ():
            parts = RowCounts.total(part.rows for part in receipt.files)
            if parts != receipt.rows or not all(part.rows.is_reconciled for part in receipt.files):
                raise _Wrong(f"partition {receipt.partition}: {receipt.rows.to_dict()}, its files {parts.to_dict()}")
            if any(part.rows.input != part.row_stop - part.row_start for part in receipt.files):
                raise _Wrong(f"partition {receipt.partition}: other rows in than its ranges have")
        rows, planned = self.ledger.rows, self.ledger.planned_rows
        if rows.input != planned or not rows.is_reconciled:
            raise _Wrong(f"{rows.to_dict()}, and the input files have {planned:,} rows")
        return rows.equation()

    def contents_agree(self) -> str:
        """Check that files of a ``dask`` step hold the rows whose content their receipts name."""
        checked = [receipt for receipt in self.done if receipt.data is not None and receipt.content][:_CONTENTS]
        for receipt in checked:
            assert receipt.data is not None
            with self.job.store.open_input(layout.round_file(receipt.round, receipt.data.name)) as file:
                found = content_of(pq.read_table(file))
            expected = Content.from_dict(receipt.content)
            if not found.agrees(expected):
                raise _Wrong(f"partition {receipt.partition} has {found.difference(expected)}")
        return f"the content of {plural(len(checked), 'file')} is that of the receipts"

    def input_footers(self) -> str:
        """Check that the footers of unchanged input files have the planned number of rows."""
        same = 0
        source = find_source(self.ledger.base.plan.spec.source.reader)
        for file in self.ledger.files.values():
            if not _is_unchanged(file):
                continue
            rows = source.count_rows(file.path)
            planned = sum(group.rows for group in file.row_groups)
            if rows != planned:
                raise _Wrong(f"{file.path}: its footer says {rows:,} rows, planned were {planned:,}")
            same += 1
        changed = len(self.ledger.files) - same
        gone = f"; {changed:,} have been changed or removed since, and cannot be compared" if changed else ""
        return f"the footers of {same:,} input files agree{gone}"

    def data_files(self) -> str:
        """Check that every checkpoint file exists, unchanged, with the rows that its receipt states."""
        files = [(receipt, receipt.data) for receipt in self.done]
        return self._check_files(files, lambda receipt: receipt.rows.output)

    def reject_files(self) -> str:
        """Check the files of rejects like `data_files`, and that the counts per reason add up."""
        for receipt in self.done:
            if sum(receipt.reasons.values()) != receipt.rows.rejected:
                raise _Wrong(f"partition {receipt.partition}: {receipt.reasons} for {receipt.rows.rejected:,} rejects")
        if removed := rejects_removed(self.job.store):
            return f"the counts per reason add up; the rows were removed on {removed}, as errors.retain says"
        return self._check_files(
            [(receipt, receipt.rejects) for receipt in self.done], lambda receipt: receipt.rows.rejected
        )

    def _check_files(self, files: list[tuple[Receipt, DataFile | None]], rows: Callable[[Receipt], int]) -> str:
        count = total = 0
        for receipt, file in files:
            if (file.rows if file else 0) != rows(receipt):
                raise _Wrong(f"partition {receipt.partition}: its file is said to have other rows than it counts")
            if file is not None:
                name = layout.round_file(receipt.round, file.name)
                _check_file(self.job.store, name, rows=file.rows, size=file.bytes, checksum=file.checksum)
                count, total = count + 1, total + file.rows
        return f"{plural(count, 'file')} with {plural(total, 'row')} have the checksums of their receipts"

    def manifest_agrees(self) -> str:
        """Check that the last manifest names exactly the files of the receipts."""
        if self.manifest is None:
            raise _Wrong("the job has no manifest: its output was not committed")
        files = [(receipt, receipt.data) for receipt in self.done if receipt.data]
        receipts = {(r.partition, layout.round_file(r.round, data.name), data.rows, data.checksum) for r, data in files}
        listed = [(file.partition, file.name, file.rows, file.checksum) for file in self.manifest.files]
        if len(listed) != len(set(listed)) or set(listed) != receipts:
            _expect_none("in the manifest and not in the receipts", [name[0] for name in set(listed) - receipts])
            _expect_none("in the receipts and not in the manifest", [name[0] for name in receipts - set(listed)])
            raise _Wrong("the manifest names a file twice")
        return f"manifest {self.manifest.number} names the {plural(len(listed), 'file')} of the receipts"

    def _target_holds(self, adapter: VerifiableSink, manifest: Manifest) -> str:
        try:
            return adapter.verify(manifest, self.job)
        except OutputConflict as error:
            raise _Wrong(" ".join(str(error).split())) from error

    def output_holds(self) -> str:
        """Check that the sink lists this job's files, that they are unchanged, and that readers find no other rows."""
        if self.manifest is None:
            raise _Wrong("nothing was committed")
        adapter = find_sink(self.job.plan.spec.sink.format)
        if isinstance(adapter, VerifiableSink) and self.job.status().is_success:
            return self._target_holds(adapter, self.manifest)
        published = read_published(self.manifest, self.job)
        if published is None:
            if self.job.status().is_success:
                raise _Wrong(f"{self.job.resolve(self.job.plan.spec.sink.place)} does not list this job")
            return "not published, as the job did not succeed"
        if published.is_replaced and not published.files:
            return f"another job has overwritten {published.path} since"
        store = open_store(published.folder)
        for file in published.files:
            _check_file(store, file.name, rows=file.rows, size=file.bytes, checksum=file.checksum)
        strays = find_strays(self.manifest, self.job)
        if strays:
            raise _Wrong(f"{published.path}: {'; '.join(strays)}")
        if published.is_replaced:
            return f"later jobs have replaced files of this job in {published.path}"
        if published.rows != self.manifest.rows.output:
            raise _Wrong(
                f"{published.path} has {published.rows:,} rows of this job, scored were {self.manifest.rows.output:,}"
            )
        return f"{plural(len(published.files), 'file')} with {plural(published.rows, 'row')} in {published.path}"


def _sample(job: JobDirectory, ledger: Ledger, options: _SampleOptions) -> str:
    """Check that random input rows, scored again with the pinned model, give the stored output."""
    rows = options.rows
    services = [model for model in ledger.base.plan.models if model.endpoint]
    if services and not options.call_services:
        return f"not scored again: {services[0].name} is a service, whose answers cost (--call-services)"
    result = rescore_sample(job, ledger, rows=rows, random=random.Random(options.seed))
    if services:
        return f"{result.rows_in:,} rows asked about again; other answers in {plural(len(result.wrong), 'range')}"
    if result.wrong:
        raise _Wrong(f"{len(result.wrong):,} ranges differ, such as {result.wrong[0]}")
    if rows and not result.rows_in and any(receipt.rows.input for receipt in ledger.done):
        raise _Wrong("no input file is as it was planned, so that nothing could be scored again")
    models = listed([f"{model.name} {model.version}" for model in ledger.base.plan.models], shown=8)
    scored = f"scored again with {models}" if models else "prepared again"
    again = f"{result.rows_in:,} rows {scored} give the same {result.rows_out:,} rows"
    again += "".join(f"; {text}" for text in changed_steps(job, ledger))
    return again + (
        f"; {result.skipped:,} ranges were of changed input files or removed rejects" if result.skipped else ""
    )


def changed_steps(job: JobDirectory, ledger: Ledger) -> list[str]:
    """Return a text for each step whose code changed since the last round was planned."""
    planned = ledger.last.plan.code
    remember_packed(job.root, ledger.last.plan)
    current = find_code([step.module for step in planned], import_paths=job.record.import_paths).steps
    return [
        f"the code of step {shown_name(before.module)} changed since; the planned code was used"
        for before, after in zip(planned, current, strict=True)
        if before.digest != after.digest
    ]


def _check_file(store: Store, name: str, *, rows: int, size: int, checksum: str) -> None:
    try:
        with store.open_input(name) as file:
            found = checksum_file(file, like=checksum)
            file.seek(0)
            actual_rows = pq.read_metadata(file).num_rows if found == checksum else -1
    except FileNotFoundError:
        raise _Wrong(f"{store.url(name)} is missing") from None
    if found != checksum:
        raise _Wrong(f"{store.url(name)}: checksum {short(found)}, expected {short(checksum)}")
    if actual_rows != rows or store.size(name) != size:
        raise _Wrong(
            f"{store.url(name)}: {actual_rows:,} rows in {store.size(name):,} bytes, expected {rows:,} in {size:,}"
        )


def _is_unchanged(file: InputFile) -> bool:
    """True if an input file exists as it was planned."""
    try:
        return has_version(file.path, file.size, file.version)
    except (OSError, PipelineError):
        return False


def _covers(receipt: Receipt, partition: Partition) -> bool:
    wanted = [(fragment.path, fragment.row_start, fragment.row_stop) for fragment in partition.fragments]
    return [(part.path, part.row_start, part.row_stop) for part in receipt.files] == wanted


def _wanted_ranges(row_groups: Any) -> Iterator[tuple[int, int]]:
    start = 0
    for group in row_groups:
        if group.selected:
            yield start, start + group.rows
        start += group.rows


def _merged(ranges: Any) -> list[tuple[int, int]]:
    """Join adjacent ranges. Overlapping ranges stay separate, so that overlaps remain visible."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(rows for rows in ranges if rows[0] < rows[1]):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _show(ranges: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{start:,}-{stop:,}" for start, stop in ranges[:_SHOWN]) or "none"
    return shown + (f" and {plural(len(ranges) - _SHOWN, 'more range')}" if len(ranges) > _SHOWN else "")


def _expect_none(what: str, partitions: list[str]) -> None:
    if partitions:
        names = ", ".join(sorted(partitions)[:_SHOWN])
        raise _Wrong(f"{plural(len(partitions), 'partition')} {what}, such as {names}")


PLACES = 8
"""Number of ranges of adjacent rows in a sample."""


@dataclass
class RescoredSample:
    """The result of scoring a sample again."""

    rows_in: int = 0
    """Input rows that were scored again."""
    rows_out: int = 0
    skipped: int = 0
    """Ranges whose input file was changed or removed."""
    wrong: list[str] = field(default_factory=list)
    """Ranges with a different result, and the columns that differ."""


@dataclass(frozen=True)
class _Range:
    """Adjacent rows of one input file, and the position of their output."""

    receipt: Receipt
    part: FragmentCounts
    start: int
    stop: int
    offset: int | None
    """Row of the data file at which the range's output begins. None: the range ends where its part ends."""
    part_end: int
    """Row of the data file after the part's output."""


def rescore_sample(job: JobDirectory, ledger: Ledger, *, rows: int, random: Random) -> RescoredSample:
    """Score about ``rows`` input rows again, in a few ranges of adjacent rows, and compare them with the output.

    The model's own library scores them, whichever engine the job used. The comparison thus checks that engine too.

    If a fragment lost no row, the output of any of its ranges is found by row number. If rows of a fragment were
    rejected or filtered, only a range at its start or end is: the sample then uses these.

    :raises ModelDigestMismatch: if the model is no longer the pinned one.
    """
    result = RescoredSample()
    files = {round_.number: {file.path: file for file in round_.plan.files} for round_ in ledger.rounds}
    # Which rows are too slow depends on the machine.
    done = [receipt for receipt in ledger.done if SLOW_REASON not in receipt.reasons]
    for chosen in _choose(done, rows=rows, random=random):
        round = chosen.receipt.round
        file = files[round][chosen.part.path]
        is_removed = chosen.receipt.before and rejects_removed(job.store)
        if is_removed or not (chosen.receipt.before or _is_unchanged(file)):
            result.skipped += 1
            continue
        recipe = job.recipe_of(ledger.round(round))
        again = _score_again(recipe, file, chosen, source=_source_of(ledger.round(round).plan, chosen))
        start = chosen.part_end - again.num_rows if chosen.offset is None else chosen.offset
        written = _written(job, chosen.receipt, start=start, rows=again.num_rows)
        wrong = differing_columns(
            again, written, outputs=job.plan.outputs, tolerance=job.plan.tolerance, noise=noise_of(recipe)
        )
        if wrong:
            result.wrong.append(f"{file.path} rows {chosen.start:,}-{chosen.stop:,}: {', '.join(wrong)}")
        result.rows_in += chosen.stop - chosen.start
        result.rows_out += again.num_rows
    return result


def _choose(receipts: Iterable[Receipt], *, rows: int, random: Random) -> Iterator[_Range]:
    ranges = [(receipt, number) for receipt in receipts for number, part in enumerate(receipt.files) if part.rows.input]
    if not ranges or rows <= 0:
        return
    sizes = [receipt.files[number].rows.input for receipt, number in ranges]
    count = min(PLACES, rows, len(ranges) * PLACES)
    for receipt, number in random.choices(ranges, weights=sizes, k=count):
        part = receipt.files[number]
        before = sum(other.rows.output for other in receipt.files[:number])
        length = min(math.ceil(rows / count), part.rows.input)
        first = random.randint(part.row_start, part.row_stop - length)
        offset: int | None = before + first - part.row_start
        if part.rows.output != part.rows.input:
            is_head = random.random() < 0.5
            first = part.row_start if is_head else part.row_stop - length
            offset = before if is_head else None
        yield _Range(receipt, part, first, first + length, offset, before + part.rows.output)


def _source_of(plan: Plan, chosen: _Range) -> str:
    """Return the input file of the rows of a range, which a retry reads from a file of rejects."""
    fragments = (fragment for partition in plan.partitions for fragment in partition.fragments)
    return next(
        (
            fragment.rejected_from or fragment.path
            for fragment in fragments
            if fragment.path == chosen.part.path and fragment.row_start <= chosen.start < fragment.row_stop
        ),
        chosen.part.path,
    )


def _score_again(recipe: StageRecipe, file: InputFile, chosen: _Range, *, source: str) -> pa.Table:
    rejected_from = file.path if chosen.receipt.before else ""
    file_fragment = Fragment(file.path, 0, file.rows, 0, len(file.row_groups), 0, file.hive_keys, rejected_from)
    fragment = sub_fragment(file_fragment, file, row_start=chosen.start, row_stop=chosen.stop)
    versions = {file.path: (file.size, file.version)}
    batches = read_partition(recipe, Partition("", (fragment,)), versions=versions)
    schema = pa.ipc.read_schema(pa.py_buffer(recipe.output_schema))
    with _open_again(recipe, rows=chosen.stop - chosen.start) as scorer:
        tables = [scorer.score_batch(batch, paths=(source,)).table for batch in batches]
    return pa.concat_tables(tables) if tables else empty_table(schema)


@contextmanager
def _open_again(recipe: StageRecipe, *, rows: int) -> Iterator[Scorer | IsolatedScorer]:
    """Open a scorer of the planned code; in a process of its own if steps have time limits."""
    if any(recipe.time_limits):
        with closing(IsolatedScorer(replace(recipe, pin_code=True), for_steps(), rows=rows)) as isolated:
            yield isolated
    else:
        yield Scorer(recipe, library_predictors(recipe), steps=recipe_steps(recipe, pin_code=True))


def _written(job: JobDirectory, receipt: Receipt, *, start: int, rows: int) -> pa.Table:
    """Return rows ``start`` to ``start + rows`` of a checkpoint file. Only the row groups with these rows are read."""
    if receipt.data is None or rows == 0:
        return empty_table(pa.ipc.read_schema(pa.py_buffer(job.plan.output_schema)))
    with (
        job.store.open_input(layout.round_file(receipt.round, receipt.data.name)) as opened,
        pq.ParquetFile(opened, page_checksum_verification=True) as file,
    ):
        groups: list[int] = []
        first = seen = 0
        for number in range(file.num_row_groups):
            count = file.metadata.row_group(number).num_rows
            if seen < start + rows and seen + count > start:
                first = first if groups else seen
                groups.append(number)
            seen += count
        return file.read_row_groups(groups).slice(start - first, rows)
