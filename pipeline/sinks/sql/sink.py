"""Publish to a table of a SQL database: Postgres, SQLite or DuckDB.

The rows and the number of their manifest are committed in one transaction. On Postgres, several connections first copy
the rows into a staging table. In databases that are a file, one process writes: the rows go in within the transaction.

Beside the table lies ``pipeline_publications`` with a row for the last publication of each job. ``sequence`` tells the
order of publications, ``region`` the rows that a publication replaced: all, those of a condition, or none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import pyarrow as pa

from pipeline.common.units import iso_time, plural, utc_now
from pipeline.errors import OutputConflict, OutputExists, SpecError
from pipeline.jobs.manifest import ManifestFile
from pipeline.sinks import SinkRequest
from pipeline.sinks.guards import check_place
from pipeline.sinks.sql import statements
from pipeline.sinks.sql.connect import file_of, kind_of, open_database, resolved_url
from pipeline.sinks.sql.database import LOCK_SECONDS, MARKS, PUBLICATIONS, Database, StagingDatabase, TableName
from pipeline.sinks.sql.predicate import predicate_sql
from pipeline.sinks.sql.tables import check_columns, has_rows
from pipeline.sinks.transactional import Change, SinkJob, StagingLost, TransactionalSink
from pipeline.sinks.types import ColumnType, column_types, stored_schema, stored_table
from pipeline.spec.sink import Sink

_ALL = "all"
"""Region of a publication that replaced all rows."""
_SAMPLED_FILES = 3
"""Files from which `SqlSink.verify_target` reads rows."""
_SAMPLED_ROWS = 100
"""Rows of each that it looks for."""


@dataclass
class SqlTarget:
    """An open database, and the table in it."""

    database: Database
    table: TableName
    types: Mapping[str, ColumnType]
    """Type of each column of the output in the database."""

    @property
    def publications(self) -> TableName:
        """Table of the publications."""
        return self.table.beside(PUBLICATIONS)

    @property
    def marks(self) -> TableName:
        """Table of the files that are staged."""
        return self.table.beside(MARKS)

    def staging(self, job: SinkJob) -> TableName:
        """Return the staging table of a job."""
        return self.table.beside(f"pipeline_stage_{job.tag}")

    def close(self) -> None:
        """Close the connection."""
        self.database.close()


@dataclass(frozen=True)
class _Published:
    """The last publication of a job to a table."""

    number: int
    plan: str
    sequence: int
    region: str


class SqlSink(TransactionalSink[SqlTarget]):
    """See the module."""

    def __init__(self, *, lock_seconds: float = LOCK_SECONDS) -> None:
        self._lock_seconds = lock_seconds

    def check(self, sink: Sink, request: SinkRequest) -> None:
        """Refuse fields, types, and a table that exists with other columns; see `pipeline.sinks.check`."""
        url, table = resolved_url(sink), TableName.parse(sink.table or "")
        file = file_of(url)
        if file:
            check_place(file, sources=request.sources, state=request.state)
        if request.schema is None:
            return
        schema = pa.ipc.read_schema(pa.py_buffer(request.schema)).remove_metadata()
        types = _table_types(schema, sink, kind=kind_of(url))
        if file and not os.path.exists(file):
            return
        where = f"sink: {sink.place}"
        with closing(open_database(url, where=where, read_only=True, lock_seconds=self._lock_seconds)) as database:
            target = SqlTarget(database, table, types)
            published = _find(target, request.job)
            if published is not None:
                _check_same(published, plan=request.plan, job=request.job, where=where)
            elif sink.mode == "error" and has_rows(database, table):
                raise _exists(target)
            check_columns(database, table, types, place=where)

    def connect(self, job: SinkJob) -> SqlTarget:
        """Open the database."""
        url = resolved_url(job.sink)
        types = _table_types(job.schema, job.sink, kind=kind_of(url))
        database = open_database(url, where=f"sink: {job.sink.place}", lock_seconds=self._lock_seconds)
        return SqlTarget(database, TableName.parse(job.sink.table or ""), types)

    def committed(self, target: SqlTarget, job: SinkJob) -> int:
        """Return the number in ``pipeline_publications``."""
        published = _find(target, job.id)
        if published is None:
            return 0
        _check_same(published, plan=job.plan, job=job.id, where=target.database.where)
        return published.number

    def parts(self, target: SqlTarget, change: Change) -> Sequence[ManifestFile]:
        """Return all files where their keys must be compared, or rows are taken back; else those that are new."""
        is_all = change.mode == "merge" or bool(change.removed)
        return change.files if is_all else change.added

    def staged(self, target: SqlTarget, change: Change) -> Mapping[str, int]:
        """Return the files with a mark; see `TransactionalSink.staged`."""
        database, staging = target.database, target.staging(change.job)
        if not isinstance(database, StagingDatabase):
            return {}
        database.prepare_staging(staging, _rows_only(target, change.job), marks=target.marks)
        marks = _marks(target, change.job)
        (count,) = database.run(f"SELECT count(*) FROM {staging.sql}")[0]
        if count == sum(marks.values()) and marks.keys() <= {file.name for file in self.parts(target, change)}:
            return marks
        # Rows of another manifest, or a crash of the database has emptied the table.
        database.clear_staging(staging, marks=target.marks, tag=change.job.tag)
        return {}

    def stage(self, target: SqlTarget, job: SinkJob, file: ManifestFile) -> None:
        """Copy a file into the staging table, with its mark in the same transaction."""
        database = target.database
        if not isinstance(database, StagingDatabase):
            return
        # Types of the table's own columns, without the column of the job, which the commit fills.
        types = _rows_only(target, job)
        tables = (stored_table(table, types, where=database.where) for table in job.read(file))
        database.stage(
            target.staging(job),
            tables,
            stored_schema(job.schema, types),
            marks=target.marks,
            mark=(job.tag, file.name, file.rows),
            reached=self.reached,
        )

    def commit(self, target: SqlTarget, change: Change) -> None:
        """Change the table and the publications in one transaction."""
        database, job = target.database, change.job
        if isinstance(database, StagingDatabase):
            database.create_publications(target.publications)
        database.begin(f"pipeline {target.table}")
        try:
            self.reached("begun")
            published = _find(target, job.id)
            if published is not None and published.number >= change.number:
                database.rollback()
                return
            self._commit(target, change, published)
            self.reached("rows are in")
            _record(target, change, region=_region(job))
            self.reached("number is in")
            database.commit()
        except BaseException:
            database.rollback()
            raise

    def _commit(self, target: SqlTarget, change: Change, published: _Published | None) -> None:
        """Bring the rows into the table, inside the transaction."""
        database, job, table = target.database, change.job, target.table
        if published is not None and _is_replaced(target, published, job.id):
            raise OutputConflict(
                "cannot repair the output: another job has replaced it",
                where=database.where,
                found=f"a later publication in {target.publications}",
                next_step="run the job spec again as a new job",
            )
        if database.columns(table) is None:
            key = (job.sink.key or ()) if change.mode == "merge" else ()
            database.create_table(table, target.types, key=key)
            self.reached("table is made")
        check_columns(database, table, target.types, place=database.where)
        if published is None and change.mode == "error" and has_rows(database, table):
            raise _exists(target)
        staging = self._filled(target, change)
        self.reached("rows are staged")
        if change.mode == "merge":
            self._check_keys(target, change, staging)
        where = _where(job)
        if where:
            _check_region(database, staging, where, change)
        for query in _queries(target, change, staging, where=where, is_first=published is None):
            database.run(query)
            self.reached("a statement ran")

    def _filled(self, target: SqlTarget, change: Change) -> str:
        """Return the table with the rows to bring in, by its name in statements.

        :raises StagingLost: if rows that were staged are missing.
        """
        database, job = target.database, change.job
        files = self.parts(target, change)
        if isinstance(database, StagingDatabase):
            staging, marks = target.staging(job), _marks(target, job)
            expected = {file.name: file.rows for file in files}
            if marks != expected or database.columns(staging) is None:
                raise StagingLost(f"{len(marks)} of {len(expected)} files are staged")
            (count,) = database.run(f"SELECT count(*) FROM {staging.sql}")[0]
            if count != sum(expected.values()):
                raise StagingLost(f"{count} of {sum(expected.values())} rows are staged")
            return staging.sql
        types = _rows_only(target, job)
        name = database.create_staging(f"pipeline_stage_{job.tag}", statements.columns(types))
        schema = stored_schema(job.schema, types)
        for file in files:
            tables = [stored_table(table, types, where=database.where) for table in job.read(file)]
            for table in tables:
                database.check_types(table)
            database.fill(name, tables, schema)
            self.reached("a file is in")
        return name

    def _check_keys(self, target: SqlTarget, change: Change, staging: str) -> None:
        """Refuse keys that are null, and two rows with one key.

        :raises OutputConflict: with such a key.
        """
        key = change.job.sink.key or ()
        database = target.database
        null = database.run(statements.null_keys(staging, key))
        if null:
            raise OutputConflict(
                "rows of the output have no key",
                where=f"{database.where}, key {', '.join(key)}",
                found=f"null in {', '.join(name for name, value in zip(key, null[0], strict=True) if value is None)}",
                expected="a value in every column of sink.key",
                next_step="drop such rows in a filter step, or choose another sink.key",
            )
        twice = database.run(statements.double_keys(staging, key))
        if twice:
            *values, count = twice[0]
            shown = ", ".join(f"{name} {value!r}" for name, value in zip(key, values, strict=True))
            raise OutputConflict(
                f"{count} rows of the output have the key {shown}",
                where=f"{database.where}, key {', '.join(key)}",
                found=f"at least {len(twice)} such {'key' if len(twice) == 1 else 'keys'}",
                expected="one row for each key",
                next_step="choose one row of each key in a step, or add a column to sink.key",
            )

    def unstage(self, target: SqlTarget, job: SinkJob) -> None:
        """Drop the staging table and its marks."""
        if isinstance(target.database, StagingDatabase):
            target.database.drop_staging(target.staging(job), marks=target.marks, tag=job.tag)

    def has_staged(self, target: SqlTarget, job: SinkJob) -> bool:
        """True if the job has a staging table."""
        is_staging = isinstance(target.database, StagingDatabase)
        return is_staging and target.database.columns(target.staging(job)) is not None

    def verify_target(self, target: SqlTarget, change: Change) -> str:
        """Check the row of the publication, the number of rows, and some rows with all their values."""
        database, job = target.database, change.job
        published = _find(target, job.id)
        assert published is not None  # its number was just read
        (rows,) = database.run(
            f"SELECT rows FROM {target.publications.sql} WHERE target = ? AND job = ?", (str(target.table), job.id)
        )[0]
        if rows != change.rows:
            raise _wrong(target, f"{rows:,} rows on record", f"{change.rows:,} rows")
        said = f"{target.publications} has manifest {change.number} with {plural(change.rows, 'row')}"
        if _is_replaced(target, published, job.id):
            return f"{said}; another job has replaced them since"
        later = database.run(
            f"SELECT count(*) FROM {target.publications.sql} WHERE target = ? AND job <> ? AND sequence > ?",
            (str(target.table), job.id, published.sequence),
        )[0][0]
        if later and (change.mode == "merge" or not job.sink.job_column):
            return f"{said}; {plural(later, 'other job')} published to the table since"
        if job.sink.job_column and not later:
            counted = database.run(
                f"SELECT count(*) FROM {target.table.sql} WHERE {statements.own_rows(_job_value(job))}"
            )[0][0]
            if counted != change.rows:
                raise _wrong(target, f"{counted:,} rows of the job", f"{change.rows:,} rows")
        sampled = _sample(job, change.files)
        if sampled is None:
            return said
        missing = self._missing(target, job, sampled)
        if missing:
            raise _wrong(target, f"{missing:,} of {sampled.num_rows:,} sampled rows missing or changed", "all of them")
        return f"{said}; {plural(sampled.num_rows, 'sampled row')} of the job are in {target.table}"

    def _missing(self, target: SqlTarget, job: SinkJob, rows: pa.Table) -> int:
        """Return how many of ``rows`` the table does not have with all their values. Changes nothing."""
        database, types = target.database, _rows_only(target, job)
        database.begin(f"pipeline {target.table}")
        try:
            name = database.create_staging(f"pipeline_sample_{job.tag}", statements.columns(types))
            database.fill(name, [stored_table(rows, types, where=database.where)], stored_schema(job.schema, types))
            query = statements.missing(target.table, name, list(types), same=database.same)
            return int(database.run(query)[0][0])
        finally:
            database.rollback()


def _queries(target: SqlTarget, change: Change, staging: str, *, where: str, is_first: bool) -> Iterator[str]:
    """Yield the statements that bring the rows of ``staging`` into the table."""
    job, table, names = change.job, target.table, change.job.schema.names
    if change.removed:
        yield _take_back(target, job)
    if change.mode == "merge":
        yield from statements.merge(table, staging, names, key=job.sink.key or (), job=_job_value(job))
        return
    if is_first and change.mode == "overwrite":
        yield f"DELETE FROM {table.sql}"
    elif is_first and where:
        yield f"DELETE FROM {table.sql} WHERE {where}"
    yield statements.insert(table, staging, names, job=_job_value(job))


def _where(job: SinkJob) -> str:
    """Return the condition for the rows to replace, as SQL; empty if there is none."""
    return predicate_sql(job.sink.where, columns=job.schema.names) if job.sink.where else ""


def _table_types(schema: pa.Schema, sink: Sink, *, kind: str) -> dict[str, ColumnType]:
    """Return the types of the table's columns: those of the output, and the one of the job.

    :raises SpecError: for a type that the database cannot store, a column of the sink that the output does not have,
        and names that differ only by case.
    """
    types = column_types(schema, target=kind)
    missing = [name for name in sink.key or () if name not in types]
    if missing:
        raise SpecError(
            "the output does not have the columns of the key",
            where="sink.key",
            found=", ".join(missing),
            expected=f"columns of {', '.join(types)}",
        )
    if sink.where is not None:
        predicate_sql(sink.where, columns=list(types))
    if sink.job_column is not None:
        if sink.job_column in types:
            raise SpecError("the output has a column of this name", where="sink.job_column", found=sink.job_column)
        types |= column_types(pa.schema([(sink.job_column, pa.string())]), target=kind)
    folded = [name.lower() for name in types]
    twice = sorted({name for name in folded if folded.count(name) > 1})
    if twice and kind != "postgresql":
        raise SpecError(
            "names of columns differ only by case, which the database ignores",
            where="sink",
            found=", ".join(name for name in types if name.lower() in twice),
            expected="names that differ otherwise, too",
            next_step="rename them in a select step",
        )
    return types


def _rows_only(target: SqlTarget, job: SinkJob) -> dict[str, ColumnType]:
    """Return the types of the output's columns."""
    return {name: target.types[name] for name in job.schema.names}


def _find(target: SqlTarget, job: str) -> _Published | None:
    """Return the last publication of a job to the table."""
    if target.database.columns(target.publications) is None:
        return None
    rows = target.database.run(
        f"SELECT manifest, plan, sequence, region FROM {target.publications.sql} WHERE target = ? AND job = ?",
        (str(target.table), job),
    )
    return _Published(*rows[0]) if rows else None


def _marks(target: SqlTarget, job: SinkJob) -> dict[str, int]:
    if target.database.columns(target.marks) is None:
        return {}
    rows = target.database.run(f"SELECT part, rows FROM {target.marks.sql} WHERE tag = ?", (job.tag,))
    return {part: int(count) for part, count in rows}


def _is_replaced(target: SqlTarget, published: _Published, job: str) -> bool:
    """True if a later publication of another job has replaced all rows, or those of the same condition."""
    later = target.database.run(
        f"SELECT region FROM {target.publications.sql} WHERE target = ? AND job <> ? AND sequence > ?",
        (str(target.table), job, published.sequence),
    )
    return any(region == _ALL or (region and region == published.region) for (region,) in later)


def _region(job: SinkJob) -> str:
    """Return the rows that a publication replaces."""
    if job.sink.mode == "replace":
        return job.sink.where or ""
    return _ALL if job.sink.mode == "overwrite" else ""


def _record(target: SqlTarget, change: Change, *, region: str) -> None:
    """Store the number of the manifest, inside the transaction."""
    database, job = target.database, change.job
    # In SQLite and DuckDB, the commit makes the table; a database with staging has it before.
    if database.columns(target.publications) is None:
        database.create_publications(target.publications)
    table = target.publications.sql
    (last,) = database.run(f"SELECT coalesce(max(sequence), 0) FROM {table} WHERE target = ?", (str(target.table),))[0]
    own = database.run(f"SELECT sequence FROM {table} WHERE target = ? AND job = ?", (str(target.table), job.id))
    # A repair keeps its place in the order: it changes only rows of its own job.
    sequence = int(own[0][0]) if own else int(last) + 1
    database.run(f"DELETE FROM {table} WHERE target = ? AND job = ?", (str(target.table), job.id))
    row = (str(target.table), job.id, change.number, change.rows, job.plan, change.mode, region, sequence)
    places = ", ".join("?" for _ in range(len(row) + 1))
    database.run(f"INSERT INTO {table} VALUES ({places})", (*row, iso_time(utc_now())))


def _job_value(job: SinkJob) -> tuple[str, str] | None:
    """Return the column of the job and its value."""
    return (job.sink.job_column, job.id) if job.sink.job_column else None


def _take_back(target: SqlTarget, job: SinkJob) -> str:
    """Return the statement that removes the rows that an earlier manifest of the job has published.

    :raises OutputConflict: if they cannot be told from others.
    """
    own = _job_value(job)
    if own is not None:
        return f"DELETE FROM {target.table.sql} WHERE {statements.own_rows(own)}"
    later = target.database.run(
        f"SELECT count(*) FROM {target.publications.sql} WHERE target = ? AND job <> ?", (str(target.table), job.id)
    )[0][0]
    if job.sink.mode == "replace":
        return f"DELETE FROM {target.table.sql} WHERE {_where(job)}"
    if job.sink.mode == "overwrite" and not later:
        return f"DELETE FROM {target.table.sql}"
    raise OutputConflict(
        "rows that the job has published cannot be found again",
        where=target.database.where,
        found="rows without the id of their job, and a retry that gives other rows for the same input",
        expected="sink.job_column, or mode replace",
        next_step="run the job spec again as a new job, with sink.job_column: a name",
    )


def _check_same(published: _Published, *, plan: str, job: str, where: str) -> None:
    if published.plan and plan and published.plan != plan:
        raise OutputConflict(
            "another job with the same id has published there",
            where=where,
            found=f"job {job} with plan {published.plan[:12]}",
            expected=f"plan {plan[:12]}, or a job with another id",
            next_step="run it under another id (--job), or choose another sink.table",
        )


def _check_region(database: Database, staging: str, where: str, change: Change) -> None:
    """Refuse rows outside of the condition: they would stay beside those of a later run.

    :raises OutputConflict: if there are some.
    """
    (outside,) = database.run(f"SELECT count(*) FROM {staging} WHERE NOT coalesce({where}, FALSE)")[0]
    if outside:
        raise OutputConflict(
            "rows of the output do not meet the condition of the rows that they replace",
            where=f"{database.where}, where {change.job.sink.where}",
            found=plural(int(outside), "such row"),
            expected="none",
            next_step="filter the input by the same condition, or change sink.where",
        )


def _exists(target: SqlTarget) -> OutputExists:
    (count,) = target.database.run(f"SELECT count(*) FROM {target.table.sql}")[0]
    return OutputExists(
        "there are rows in the table already",
        where=target.database.where,
        found=plural(int(count), "row"),
        expected="no rows, since sink.mode is error",
        next_step="choose another sink.table, or --set sink.mode=append (adds to them), overwrite (replaces all in one "
        "transaction), replace (those of sink.where) or merge (by sink.key)",
    )


def _wrong(target: SqlTarget, found: str, expected: str) -> OutputConflict:
    return OutputConflict(
        f"{target.table} does not have what the job published",
        where=target.database.where,
        found=found,
        expected=expected,
        next_step="find out who changed the table; run the job spec again as a new job",
    )


def _sample(job: SinkJob, files: Sequence[ManifestFile]) -> pa.Table | None:
    """Return rows of the job, from files spread over all of them."""
    some = [file for file in files if file.rows]
    if not some:
        return None
    step = max(1, len(some) // _SAMPLED_FILES)
    tables = [next(iter(job.read(file))).slice(0, _SAMPLED_ROWS) for file in some[::step][:_SAMPLED_FILES]]
    return pa.concat_tables(tables)
