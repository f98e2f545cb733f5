"""Tables of a real Postgres as sinks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import OutputConflict, SpecError, StorageError
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.sinks import SinkRequest, check
from pipeline.sinks.sql.connect import open_database
from pipeline.sinks.sql.database import TableName
from pipeline.sinks.sql.sink import SqlSink
from pipeline.sinks.sql.statements import columns
from pipeline.sinks.types import column_types, stored_schema, stored_table
from pipeline.spec.sink import Sink
from pipeline.testing.arrow_types import typed_columns
from pipeline.testing.examples import IS_LONG, choose
from pipeline.testing.jobs import OUTPUT_SCHEMA, commit, small_job, write_receipts
from pipeline.testing.postgres import find_postgres, serve_postgres
from pipeline.testing.processes import wait_until
from pipeline.testing.sink_contract import SinkWorld, sweep_crashes, sweep_two_drivers, worlds
from tests.contracts.sink_cases import postgres

dbapi = pytest.importorskip("adbc_driver_postgresql.dbapi", reason="needs the extra postgres")
pytestmark = pytest.mark.skipif(find_postgres() is None, reason="needs Postgres: apt-get install postgresql")
SCHEMA = OUTPUT_SCHEMA.serialize().to_pybytes()
WORLDS = worlds(postgres("postgresql://"))
REPAIRS = worlds(postgres("postgresql://"), repairs=True)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve_postgres() as url:
        yield url


def _run(url: str, statement: str) -> list[Any]:
    with dbapi.connect(url, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


def _on(url: str, world: SinkWorld) -> SinkWorld:
    return SinkWorld(postgres(url), world.mode, world.exists, world.repairs)


@pytest.mark.parametrize("world", WORLDS if IS_LONG else WORLDS[-1:], ids=str)
def test_a_crash_at_each_operation(url: str, world: SinkWorld, tmp_path: Path) -> None:
    assert sweep_crashes(_on(url, world), tmp_path, first=choose(2, of=1), step=choose(5, of=1)) >= 12


@pytest.mark.parametrize("world", REPAIRS if IS_LONG else REPAIRS[4:5], ids=str)
def test_a_crash_at_each_operation_of_a_repair(url: str, world: SinkWorld, tmp_path: Path) -> None:
    assert sweep_crashes(_on(url, world), tmp_path, first=choose(3, of=1), step=choose(6, of=1)) >= 9


@pytest.mark.parametrize("world", WORLDS if IS_LONG else WORLDS[4:5], ids=str)
def test_a_second_driver_at_each_operation(url: str, world: SinkWorld, tmp_path: Path) -> None:
    assert sweep_two_drivers(_on(url, world), tmp_path, first=choose(2, of=1), step=choose(5, of=1)) >= 12


def _published_job(folder: Path, url: str, name: str, rows: int, **fields: Any) -> JobDirectory:
    sink = {"format": "sql", "url": url, "mode": "overwrite", **fields}
    job = small_job(folder / name, sink=sink, mode=sink["mode"], rows=[rows // 3] * 3)
    directory = JobDirectory.create(folder / "jobs", job.plan, job=name, options=JobOptions(fsync=False))
    write_receipts(directory, job)
    commit(directory)
    manifest = directory.manifests.last()
    assert manifest is not None
    SqlSink().publish(manifest, directory)
    return directory


def test_a_crash_of_the_server_between_staging_and_commit(url: str, tmp_path: Path) -> None:
    job = small_job(tmp_path / "in", sink={"format": "sql", "url": url, "table": "crashed"})
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="a", options=JobOptions(fsync=False))
    write_receipts(directory, job)
    commit(directory)
    manifest = directory.manifests.last()
    assert manifest is not None
    first = SqlSink()
    steps: list[str] = []

    def reached(step: str) -> None:
        steps.append(step)
        if step == "begun":
            # The server restarts when one of its processes is killed, and empties unlogged tables.
            for (pid,) in _run(url, "select pid from pg_stat_activity where query like '%advisory%'"):
                os.kill(pid, signal.SIGKILL)

    first.reached = reached  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="Postgres failed"):
        first.publish(manifest, directory)
    wait_until(lambda: _is_there(url), what="the restarted server")
    again = SqlSink()
    again.reached = steps.append  # type: ignore[method-assign]
    assert again.publish(manifest, directory).is_new
    assert steps.count("copied") == 2 * len(manifest.files)
    rows = _run(url, "select id, p from crashed order by id")
    assert rows == [tuple(row.values()) for row in job.expected.to_pylist()]


def _is_there(url: str) -> bool:
    try:
        return _run(url, "select 1") == [(1,)]
    except dbapi.Error:
        return False


def test_readers_see_the_old_or_the_new_rows(url: str, tmp_path: Path) -> None:
    _published_job(tmp_path, url, "a", 3000, table="seen")
    counts: set[int] = set()
    is_over, is_reading = threading.Event(), threading.Event()

    def read() -> None:
        with dbapi.connect(url, autocommit=True) as connection, connection.cursor() as cursor:
            while not is_over.is_set():
                cursor.execute("select count(*) from seen")
                counts.add(cursor.fetchone()[0])
                is_reading.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert is_reading.wait(timeout=60)
        for number, rows in enumerate((6000, 300, 6000)):
            _published_job(tmp_path, url, f"b{number}", rows, table="seen")
    finally:
        is_over.set()
        reader.join()
    assert {3000} <= counts <= {3000, 6000, 300}
    assert _run(url, "select count(*) from seen") == [(6000,)]
    assert not _run(url, "select 1 from pg_class where relname ~ '^pipeline_stage_'")


def test_values_come_back(url: str) -> None:
    stored = []
    with closing(open_database(url, where="sink")) as database:
        for number, (text, array) in enumerate(typed_columns().items()):
            table = pa.table({"c": array})
            try:
                types = column_types(table.schema, target="postgresql")
                rows = stored_table(table, types, where="sink")
            except (SpecError, OutputConflict):
                continue
            database.begin("t")
            name = database.create_staging(f"t{number}", columns(types))
            try:
                database.fill(name, [rows], stored_schema(table.schema, types))
                found = database._connection.cursor()
                found.execute(f"SELECT * FROM {name}")
                back = found.fetch_arrow_table()["c"].cast(rows["c"].type)
                found.close()
            except OutputConflict:
                # A text with a NUL, which Postgres refuses aloud.
                assert "string" in text
                continue
            finally:
                database.rollback()
            assert repr(back.to_pylist()) == repr(rows["c"].to_pylist()), text
            stored.append(text)
    assert {"bool", "int64", "uint32", "uint64", "float", "double", "binary", "date32[day]"} <= set(stored)


def test_tables_that_are_refused(url: str) -> None:
    sink = Sink.model_validate({"format": "sql", "url": url, "table": "other"})
    _run(url, "create table other (id integer, p real, more text, number bigserial)")
    with pytest.raises(OutputConflict, match="exists with other columns") as caught:
        check(sink, SinkRequest(schema=SCHEMA))
    assert caught.value.found == "id: integer -> bigint; more: text -> missing"
    with closing(open_database(url, where="sink")) as database:
        assert database.columns(TableName.parse("no.such")) is None


def test_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAREHOUSE", "postgresql://me:s3cretword@127.0.0.1:1/db")
    sink = Sink.model_validate({"format": "sql", "url": "env:WAREHOUSE", "table": "t"})
    with pytest.raises(StorageError, match="Postgres failed") as caught:
        check(sink, SinkRequest(schema=SCHEMA))
    assert "s3cretword" not in str(caught.value)
