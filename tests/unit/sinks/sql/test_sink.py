"""Tables as sinks: what is refused when a job is planned, and what a publication refuses."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import OutputConflict, OutputExists, RefusedForSafety, SpecError, StateCorrupt
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.manifest import Manifest
from pipeline.report.output import output_frame
from pipeline.report.verify import verify
from pipeline.sinks import SinkRequest, check, publish
from pipeline.sinks.sql.predicate import predicate_sql
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.sink import Sink
from pipeline.testing.inline import publish_inline
from pipeline.testing.jobs import OUTPUT_SCHEMA, commit, open_retry, small_job, write_receipts

SCHEMA = OUTPUT_SCHEMA.serialize().to_pybytes()


def _sink(folder: Path, **fields: Any) -> Sink:
    return Sink.model_validate({"format": "sql", "url": f"sqlite:///{folder}/a.db", "table": "scores", **fields})


@contextmanager
def _database(folder: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(folder / "a.db")) as connection, connection:
        yield connection


def _job(folder: Path, name: str = "a", **fields: Any) -> JobDirectory:
    sink = _sink(folder, **{key: value for key, value in fields.items() if key not in ("bad_every", "start")})
    options = {key: fields[key] for key in ("bad_every", "start") if key in fields}
    job = small_job(folder / f"in-{name}", sink=sink.model_dump(exclude_defaults=True), mode=sink.mode, **options)
    directory = JobDirectory.create(folder / "jobs", job.plan, job=name, options=JobOptions(fsync=False))
    write_receipts(directory, job)
    return directory


def _manifest(directory: JobDirectory) -> Manifest:
    commit(directory)
    last = directory.manifests.last()
    assert last is not None
    return last


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"format": "sql", "table": "t"}, "no url"),
        ({"format": "sql", "url": "sqlite:///a.db"}, "no table"),
        ({"format": "sql", "url": "sqlite:///a.db", "table": "t", "path": "out"}, "has a path, but is a table"),
        ({"format": "sql", "url": "a.db", "table": "t"}, "not the URL of a database"),
        ({"format": "sql", "url": "postgresql://me:s3cret@host/db", "table": "t"}, "contains a password"),
        ({"format": "sql", "url": "postgresql://host/db?password=s3cret", "table": "t"}, "contains a password"),
        ({"format": "sql", "url": "sqlite:///a.db", "table": "t", "mode": "merge"}, "merge without key"),
        ({"format": "sql", "url": "sqlite:///a.db", "table": "t", "mode": "replace"}, "replace without where"),
        ({"format": "sql", "url": "sqlite:///a.db", "table": "t", "where": "a > 1"}, "where without mode: replace"),
        ({"path": "out", "key": ["id"]}, "has key, which Parquet files do not have"),
        ({"path": "out", "mode": "merge"}, "cannot merge rows of Parquet files"),
        ({}, "has no path"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        JobSpec.build(name="a", source={"path": "in"}, steps=[{"score": {"model": "m.ubj"}}], sink=fields)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"url": "oracle://host/db"}, SpecError, "no database of this kind"),
        ({"url": "sqlite://host/db"}, SpecError, "must be a file"),
        ({"url": "env:NO_SUCH_VARIABLE"}, SpecError, "not set"),
        ({"table": "a.b.c"}, SpecError, "not a valid name"),
        ({"mode": "merge", "key": ["nope"]}, SpecError, "columns of the key"),
        ({"mode": "replace", "where": "nope == 1"}, SpecError, "does not have"),
        ({"mode": "replace", "where": "id + 1 == 2"}, SpecError, "cannot be written in SQL"),
        ({"mode": "append", "job_column": "id"}, SpecError, "column of this name"),
    ],
)
def test_sinks_that_are_refused(fields: dict[str, Any], error: type[Exception], said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said):
        check(_sink(tmp_path, **fields), SinkRequest(schema=SCHEMA))


def test_no_file_is_made_before_a_job_runs(tmp_path: Path) -> None:
    check(_sink(tmp_path), SinkRequest(schema=SCHEMA))
    assert not list(tmp_path.iterdir())


def test_database_among_the_input(tmp_path: Path) -> None:
    with pytest.raises(RefusedForSafety, match="cannot go there"):
        check(_sink(tmp_path), SinkRequest(schema=SCHEMA, sources=[str(tmp_path)]))


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ("id integer, p text", "p: TEXT -> REAL"),
        ("id integer", "p: missing -> REAL"),
        ("id integer, p real, more text", "more: TEXT -> missing"),
        ("id integer, p real, more text default 'x'", ""),
        ("p double, id bigint", ""),
        ("p double, id bigint, number integer primary key", ""),
    ],
)
def test_table_with_other_columns(columns: str, found: str, tmp_path: Path) -> None:
    with _database(tmp_path) as connection:
        connection.execute(f"create table scores ({columns})")
    if not found:
        check(_sink(tmp_path), SinkRequest(schema=SCHEMA))
        return
    with pytest.raises(OutputConflict, match="exists with other columns") as caught:
        check(_sink(tmp_path), SinkRequest(schema=SCHEMA))
    assert caught.value.found == found
    assert caught.value.expected == "id: INTEGER; p: REAL"


def test_rows_in_the_table(tmp_path: Path) -> None:
    with _database(tmp_path) as connection:
        connection.execute("create table scores (id integer, p real)")
        connection.execute("insert into scores values (1, 1.0)")
    with pytest.raises(OutputExists, match="rows in the table"):
        check(_sink(tmp_path), SinkRequest(schema=SCHEMA))
    check(_sink(tmp_path, mode="append"), SinkRequest(schema=SCHEMA))


def test_two_rows_with_one_key(tmp_path: Path) -> None:
    directory = _job(tmp_path, mode="merge", key=["p"])
    manifest = _manifest(directory)
    # The same file twice: every key occurs twice.
    doubled = replace(manifest, files=(*manifest.files, *manifest.files))
    with pytest.raises(OutputConflict, match="2 rows of the output have the key p") as caught:
        publish(doubled, directory)
    assert caught.value.found == "at least 5 such keys"
    with _database(tmp_path) as connection:
        assert not connection.execute("select * from sqlite_master").fetchall()


def test_rows_outside_of_what_they_replace(tmp_path: Path) -> None:
    directory = _job(tmp_path, mode="replace", where="id < 70")
    with pytest.raises(OutputConflict, match="do not meet") as caught:
        publish(_manifest(directory), directory)
    assert caught.value.found == "5 such rows"


def test_column_of_the_job(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 1000)):
        directory = _job(tmp_path, name, mode="append", job_column="job", start=start)
        publish(_manifest(directory), directory)
    with _database(tmp_path) as connection:
        counts = dict(connection.execute("select job, count(*) from scores group by job").fetchall())
    assert counts == {"a": 75, "b": 75}


def test_repair_after_another_job_has_replaced_all(tmp_path: Path) -> None:
    first = _job(tmp_path, "a", mode="overwrite", bad_every=7)
    publish(_manifest(first), first)
    second = _job(tmp_path, "b", mode="overwrite")
    publish(_manifest(second), second)
    open_retry(first)
    write_receipts(first, small_job(tmp_path / "in-a", sink=_sink(tmp_path).model_dump(exclude_defaults=True)))
    with pytest.raises(OutputConflict, match="another job has replaced it"):
        publish(_manifest(first), first)


def test_another_job_with_the_same_id(tmp_path: Path) -> None:
    directory = _job(tmp_path, mode="append")
    publish(_manifest(directory), directory)
    request = SinkRequest(schema=SCHEMA, job="a", plan="0" * 64)
    with pytest.raises(OutputConflict, match="another job with the same id"):
        check(_sink(tmp_path, mode="append"), request)


def test_checkpoint_that_is_gone(tmp_path: Path) -> None:
    directory = _job(tmp_path)
    manifest = _manifest(directory)
    directory.store.remove(manifest.files[0].name)
    with pytest.raises(StateCorrupt, match="checkpoint file"):
        publish(manifest, directory)


def test_output_is_read_from_the_job(tmp_path: Path) -> None:
    directory = _job(tmp_path)
    publish_inline(directory)
    assert output_frame(directory)["id"].tolist() == list(range(75))


def test_verify_finds_a_changed_row(tmp_path: Path) -> None:
    directory = _job(tmp_path)
    publish_inline(directory)
    checks = {check.name: check for check in verify(directory, sample=0).checks}
    assert checks["output"].ok, checks["output"]
    with _database(tmp_path) as connection:
        connection.execute("update scores set p = p + 1 where id = 3")
    checks = {check.name: check for check in verify(directory, sample=0).checks}
    assert not checks["output"].ok
    assert "1 of 75 sampled rows" in checks["output"].detail


def test_predicates() -> None:
    columns = ["day", "n", 'odd"name']
    assert predicate_sql("day == 'it''s' and n >= 2.5", columns=columns) == """(("day" = 'its') AND ("n" >= 2.5))"""
    assert predicate_sql("not (n in [1, 2]) or day is None", columns=columns) == (
        '((NOT ("n" IN (1, 2))) OR ("day" IS NULL))'
    )
