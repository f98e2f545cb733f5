"""Show rejected rows and their reasons, from the receipts and the files that the receipts name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from pipeline.common.html import Tone, html_table
from pipeline.common.rows import QuarantinedFile
from pipeline.common.text import shortened
from pipeline.common.units import plural
from pipeline.errors import OutputExists, SpecError, StateCorrupt
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger, RoundSummary, rejects_path
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.retention import rejects_removed
from pipeline.jobs.stages import stage_states
from pipeline.plan.recipe import REJECT_COLUMNS, REJECT_FILE, REJECT_MESSAGE, REJECT_REASON, REJECT_ROW
from pipeline.report.figures import rounds_text
from pipeline.scoring.outputs import reject_schema
from pipeline.scoring.value_text import python_value
from pipeline.sources.types import empty_table
from pipeline.storage.store import open_store

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = 3
_BATCH_ROWS = 4096


@dataclass(frozen=True)
class RejectExample:
    """One rejected row."""

    file: str
    row: int
    """Number of the row in its file, from 0."""
    message: str
    values: Mapping[str, Any]
    """Input columns of the row."""


@dataclass(frozen=True)
class RejectGroup:
    """All rows that were rejected for one reason."""

    reason: str
    count: int
    examples: tuple[RejectExample, ...]
    """The first rows, in source order."""


@dataclass(frozen=True)
class Export:
    """A file that rejected rows were written to."""

    path: str
    rows: int


@dataclass(frozen=True)
class RejectSummary:
    """All rows and files of a job that are still rejected."""

    job: str
    groups: tuple[RejectGroup, ...]
    """Most frequent first."""
    files: tuple[str, ...]
    """Paths or URLs of the Parquet files that hold the rejected rows."""
    total: int
    quarantined_files: tuple[QuarantinedFile, ...] = ()
    """Input files that are quarantined."""
    rounds: tuple[RoundSummary, ...] = ()
    """Rounds of retries and their results."""
    exported: Export | None = None
    """The file that the rows were written to."""
    has_values: bool = True
    """False: the job does not store all columns of its rejects."""
    removed: str = ""
    """Time at which ``gc`` removed the rows, as ``errors.retain`` says; empty if they are stored."""

    def to_dict(self) -> dict[str, Any]:
        """Return the summary for ``--json``. Values that JSON cannot hold become text."""
        record = {
            "job": self.job,
            "total": self.total,
            "groups": [
                {
                    "reason": group.reason,
                    "count": group.count,
                    "examples": [_details(round_) for round_ in group.examples],
                }
                for group in self.groups
            ],
            "files": list(self.files),
            "quarantined_files": [asdict(file) for file in self.quarantined_files],
            "rounds": [round_.to_dict() for round_ in self.rounds],
        }
        record |= {"removed": self.removed} if self.removed else {}
        return record | ({"exported": asdict(self.exported)} if self.exported else {})

    def text(self) -> str:
        """Return the text that ``python -m pipeline rejects`` prints."""
        return rejects_text(self)

    def _repr_html_(self) -> str:
        title, *lines = rejects_text(self).splitlines()
        tone: Tone = "warn" if self.total or self.quarantined_files else "good"
        return html_table(title, [("", "\n".join(lines).strip())], tone=tone)


def rejects_text(summary: RejectSummary) -> str:
    """Return a text of the rejected rows by reason, with the first rows of each."""
    lines = [f"{plural(summary.total, 'rejected row')}  {summary.job}"]
    rounds = rounds_text(summary.rounds)
    lines += [f"  {rounds}"] if rounds else []
    for group in summary.groups:
        lines += ["", f"{group.count:,} × {group.reason}", *_example_lines(group)]
    if summary.quarantined_files:
        lines += ["", f"{plural(len(summary.quarantined_files), 'input file')} quarantined:"]
        for file in summary.quarantined_files:
            lines += [f"  {file.title}", f"    {file.reason}: {shortened(file.message)}"]
    if summary.exported:
        lines += ["", f"wrote {plural(summary.exported.rows, 'row')} to {summary.exported.path}"]
    elif summary.files:
        lines += [
            "",
            f"all of them, with {'every column' if summary.has_values else 'the columns that are stored'}:",
            *(f"  {name}" for name in summary.files),
        ]
    if summary.removed:
        lines += ["", f"the rows were removed on {summary.removed}, as errors.retain says"]
    elif summary.total or summary.quarantined_files:
        lines += ["", "once fixed, run:", f"  python -m pipeline retry {summary.job}"]
    return "\n".join(lines)


def _example_lines(group: RejectGroup) -> list[str]:
    lines = []
    for example in group.examples:
        lines.append(f"  {example.file}, row {example.row:,}: {example.message}")
        values = ", ".join(f"{name}={_plain(value)!r}" for name, value in example.values.items())
        lines += [f"    {shortened(values)}"] if values else []
    return lines


def summarise(
    job: JobDirectory, *, ledger: Ledger | None = None, examples: int = EXAMPLES, reason: str = "*"
) -> RejectSummary:
    """Count the rejected rows per reason, with the first ``examples`` rows of each.

    Reading stops as soon as the examples are found.

    :param ledger: ledger of a job without children, if already read. Default: read from the receipts.
    :param reason: pattern of the wanted reasons, such as ``contract:*``; ``*`` matches any text, ``?`` one character.
    :raises StateCorrupt: if a file that a receipt names is missing or damaged.
    """
    if job.record.children:
        parts = [summarise(child, examples=examples, reason=reason) for child in job.children()]
        return _together(job.id, parts, examples=examples)
    if job.record.stages:
        return _of_stages(job, examples=examples, reason=reason)
    ledger = ledger or job.ledger()
    counts = {name: count for name, count in ledger.reasons.items() if fnmatchcase(name, reason)}
    receipts = [
        receipt
        for receipt in ledger.done
        if ledger.still_rejected_ranges(receipt) and not counts.keys().isdisjoint(receipt.reasons)
    ]
    examples_by_reason: dict[str, list[RejectExample]] = {name: [] for name in counts}
    removed = rejects_removed(job.store)
    stored = [receipt for receipt in receipts if not removed or job.store.exists(rejects_path(receipt))]
    for receipt in stored:
        missing = {
            name
            for name in receipt.reasons
            if name in examples_by_reason and len(examples_by_reason[name]) < min(examples, counts[name])
        }
        if missing:
            _collect(
                job,
                receipt,
                examples_by_reason,
                missing,
                examples=examples,
                ranges=ledger.still_rejected_ranges(receipt),
            )
    groups = tuple(RejectGroup(name, count, tuple(examples_by_reason[name])) for name, count in counts.items())
    return RejectSummary(
        job=job.id,
        groups=groups,
        files=tuple(job.store.url(rejects_path(receipt)) for receipt in stored),
        total=sum(counts.values()),
        quarantined_files=tuple(file for file in ledger.quarantined_files if fnmatchcase(file.reason, reason)),
        rounds=ledger.summaries(),
        has_values=not job.plan.spec.errors.masks_rejects,
        removed=removed,
    )


def _of_stages(job: JobDirectory, *, examples: int, reason: str) -> RejectSummary:
    """Merge the summaries of the stages of a job."""
    parts = [summarise(state.job, examples=examples, reason=reason) for state in stage_states(job) if state.job]
    rounds = tuple(round_ for part in parts for round_ in part.rounds)
    return replace(_together(job.id, parts, examples=examples), rounds=rounds)


def _together(job: str, parts: Sequence[RejectSummary], *, examples: int) -> RejectSummary:
    """Merge the summaries of all children of a fan-out, or of all stages."""
    counts: Counter[str] = Counter()
    examples_by_reason: dict[str, list[RejectExample]] = {}
    for group in (group for part in parts for group in part.groups):
        counts[group.reason] += group.count
        examples_by_reason.setdefault(group.reason, []).extend(group.examples)
    return RejectSummary(
        job=job,
        groups=tuple(
            RejectGroup(reason, count, tuple(examples_by_reason[reason][:examples]))
            for reason, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        ),
        files=tuple(file for part in parts for file in part.files),
        total=sum(counts.values()),
        quarantined_files=tuple(file for part in parts for file in part.quarantined_files),
        has_values=all(part.has_values for part in parts),
        removed=max((part.removed for part in parts), default=""),
    )


def read_rejected(job: JobDirectory, *, reason: str = "*") -> Iterator[pa.RecordBatch]:
    """Yield the rows that are still rejected: the source's columns, then file, row, reason and message.

    :raises StateCorrupt: if a file that a receipt names is missing or damaged.
    """
    for child in job.children():
        yield from read_rejected(child, reason=reason)
    if job.record.stages:
        yield from _read_stages([state.job for state in stage_states(job) if state.job is not None], reason=reason)
        return
    ledger = job.ledger()
    for receipt in ledger.done:
        wanted = [name for name in receipt.reasons if fnmatchcase(name, reason)]
        if not wanted or not ledger.still_rejected_ranges(receipt):
            continue
        for batch in _batches(job, receipt, ranges=ledger.still_rejected_ranges(receipt)):
            yield batch.filter(pc.is_in(batch.column(REJECT_REASON), pa.array(wanted, pa.string())))


def _read_stages(stages: Sequence[JobDirectory], *, reason: str) -> Iterator[pa.RecordBatch]:
    """Yield the rejected rows of all stages with the columns of each of them; null where a stage has none."""
    schema = _stages_schema(stages)
    for stage in stages:
        for batch in read_rejected(stage, reason=reason):
            columns = [
                batch.column(field.name).cast(field.type)
                if field.name in batch.schema.names
                else pa.nulls(batch.num_rows, field.type)
                for field in schema
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _stages_schema(stages: Iterable[JobDirectory]) -> pa.Schema:
    """Return the columns of the rejects of all stages. One with several types is text."""
    fields: dict[str, pa.Field] = {}
    for stage in stages:
        for field in pa.ipc.read_schema(pa.py_buffer(stage.plan.source_schema)):
            known = fields.setdefault(field.name, pa.field(field.name, field.type))
            if known.type != field.type:
                fields[field.name] = pa.field(field.name, pa.string())
    return reject_schema(pa.schema(list(fields.values())))


def rejects_frame(job: JobDirectory) -> pd.DataFrame:
    """Return the rows that are still rejected as one pandas DataFrame."""
    import pandas as pd

    batches = list(read_rejected(job))
    if not batches:
        return pd.DataFrame(columns=list(REJECT_COLUMNS))
    from pipeline.scoring.pandas_frame import default_frame

    return default_frame(
        pa.Table.from_batches(batches), next_step=f"python -m pipeline rejects {job.id} --export rejects.parquet"
    )


def export(job: JobDirectory, path: str, *, reason: str = "*") -> Export:
    """Write the rows that are still rejected to one new file, Parquet or CSV by its name.

    :raises SpecError: if the name ends in neither ``.parquet`` nor ``.csv``.
    :raises OutputExists: if the file exists.
    """
    folder, _, name = path.rpartition("/")
    if not name.endswith((".parquet", ".csv")):
        raise SpecError(
            "the name of the file does not say what to write", where="--export", found=name, expected=".parquet or .csv"
        )
    if job.record.stages:
        schema = _stages_schema([state.job for state in stage_states(job) if state.job is not None])
    else:
        schema = reject_schema(pa.ipc.read_schema(pa.py_buffer(job.plan.source_schema)))
    is_csv, rows = name.endswith(".csv"), 0
    schema = _flat(empty_table(schema)).schema if is_csv else schema
    try:
        with (
            open_store(folder or ("/" if path.startswith("/") else ".")).open_output(name) as output,
            csv.CSVWriter(output, schema) if is_csv else pq.ParquetWriter(output, schema) as writer,
        ):
            for batch in read_rejected(job, reason=reason):
                table = pa.Table.from_batches([batch]).replace_schema_metadata(None)
                writer.write_table(_flat(table) if is_csv else table)
                rows += table.num_rows
    except FileExistsError as error:
        raise OutputExists("there is a file already", where=path, next_step="choose another name") from error
    return Export(path, rows)


def _flat(table: pa.Table) -> pa.Table:
    """Return ``table`` with values that CSV cannot hold as JSON text."""
    for number, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(number, field.name, table.column(number).cast(field.type.value_type))
        elif pa.types.is_nested(field.type) or pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            values = (python_value(table.column(number), row) for row in range(table.num_rows))
            texts = [None if value is None else json.dumps(_plain(value)) for value in values]
            table = table.set_column(number, field.name, pa.array(texts, pa.string()))
    return table


def first_examples(summary: RejectSummary) -> dict[str, str]:
    """Return one line per reason: file, row and message of the first rejected row."""
    firsts = {group.reason: group.examples[0] for group in summary.groups if group.examples}
    return {reason: f"{example.file} row {example.row}: {example.message}" for reason, example in firsts.items()}


def _collect(
    job: JobDirectory,
    receipt: Receipt,
    examples_by_reason: dict[str, list[RejectExample]],
    missing: set[str],
    *,
    examples: int,
    ranges: list[tuple[int, int]],
) -> None:
    for batch in _batches(job, receipt, ranges=ranges):
        for position, reason in enumerate(batch.column(REJECT_REASON).to_pylist()):
            if reason in missing:
                examples_by_reason[reason].append(_example(batch.slice(position, 1)))
                if len(examples_by_reason[reason]) >= examples:
                    missing.discard(reason)
        if not missing:
            return


def _batches(job: JobDirectory, receipt: Receipt, *, ranges: list[tuple[int, int]]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a receipt's file of rejects that are in ``ranges``."""
    path, start = rejects_path(receipt), 0
    if (removed := rejects_removed(job.store)) and not job.store.exists(path):
        raise SpecError(
            "the rejected rows are no longer stored",
            where=job.store.url(path),
            found=f"they were removed on {removed}, as errors.retain says",
            next_step="run the job spec again as a new job, which reads these rows from the input",
        )
    try:
        with job.store.open_input(path) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                stop = start + batch.num_rows
                for low, high in ranges:
                    if max(low, start) < min(high, stop):
                        yield batch.slice(max(low, start) - start, min(high, stop) - max(low, start))
                start = stop
    except (OSError, pa.ArrowException, KeyError) as error:
        raise StateCorrupt(
            "a file of rejects cannot be read",
            where=job.store.url(path),
            found=f"{type(error).__name__}: {error}",
            expected="the file that its receipt names",
            next_step=f"remove the receipt of partition {receipt.partition} and resume: it is scored again",
        ) from error


def _example(row: pa.RecordBatch) -> RejectExample:
    values = {name: python_value(column, 0) for name, column in zip(row.schema.names, row.columns, strict=True)}
    own = {name: value for name, value in values.items() if name not in REJECT_COLUMNS}
    return RejectExample(str(values[REJECT_FILE]), int(values[REJECT_ROW]), str(values[REJECT_MESSAGE]), own)


def _details(example: RejectExample) -> dict[str, Any]:
    values = {name: _plain(value) for name, value in example.values.items()}
    return {"file": example.file, "row": example.row, "message": example.message, "values": values}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)
