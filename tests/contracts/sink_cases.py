"""The transactional sinks of this package, as cases of their contract."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.sinks.sql.sink import SqlSink
from pipeline.testing.jobs import OUTPUT_SCHEMA
from pipeline.testing.sink_contract import Fields, SinkCase


def _file(fields: Fields) -> Path:
    return Path(fields["url"].partition(":///")[2])


def _in_file(scheme: str, folder: Path) -> Fields:
    return {"format": "sql", "url": f"{scheme}:///{folder / 'target' / 'a.db'}", "table": "scores"}


def _table(rows: list[tuple[int, float]]) -> pa.Table:
    return pa.Table.from_pylist([{"id": key, "p": value} for key, value in rows], schema=OUTPUT_SCHEMA)


def _remove_file(fields: Fields) -> None:
    for path in _file(fields).parent.glob("*"):
        path.unlink()


def _read_sqlite(fields: Fields) -> pa.Table:
    if not _file(fields).exists():
        return _table([])
    with closing(sqlite3.connect(_file(fields))) as connection:
        if not connection.execute("select 1 from sqlite_master where name = 'scores'").fetchall():
            return _table([])
        rows = connection.execute("select id, p from scores").fetchall()
    return _table(rows)


def _seed_sqlite(fields: Fields, rows: pa.Table) -> None:
    _file(fields).parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(_file(fields))) as connection, connection:
        connection.execute("create table scores (p real, id integer)")
        connection.executemany(
            "insert into scores values (?, ?)", zip(rows["p"].to_pylist(), rows["id"].to_pylist(), strict=True)
        )


def _read_duckdb(fields: Fields) -> pa.Table:
    if not _file(fields).exists():
        return _table([])
    with closing(duckdb.connect(_file(fields), read_only=True)) as connection:
        try:
            return _table(connection.execute("select id, p from scores").fetchall())
        except duckdb.CatalogException:
            return _table([])


def _seed_duckdb(fields: Fields, rows: pa.Table) -> None:
    _file(fields).parent.mkdir(exist_ok=True)
    with closing(duckdb.connect(_file(fields))) as connection:
        connection.register("rows", rows)
        connection.execute("create table scores as select p, id from rows")


SQLITE = SinkCase(
    "sqlite",
    fields=partial(_in_file, "sqlite"),
    read=_read_sqlite,
    seed=_seed_sqlite,
    reset=_remove_file,
    adapter=SqlSink,
    impatient=partial(SqlSink, lock_seconds=0.0),
)


def postgres(url: str) -> SinkCase:
    """Return the case of a server. Tables are those of one schema."""

    def run(statement: str, rows: pa.Table | None = None) -> list[Any]:
        from adbc_driver_postgresql import dbapi

        with dbapi.connect(url, autocommit=True) as connection, connection.cursor() as cursor:
            if rows is not None:
                cursor.adbc_ingest("scores", rows, mode="append", db_schema_name="s")
                return []
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def read(fields: Fields) -> pa.Table:
        exists = run("select to_regclass('s.scores') is not null")[0][0]
        return _table(run("select id, p from s.scores") if exists else [])

    def seed(fields: Fields, rows: pa.Table) -> None:
        run("create table s.scores (p real, id bigint)")
        run("", rows.select(["p", "id"]))

    def reset(fields: Fields) -> None:
        run("drop schema if exists s cascade")
        run("create schema s")

    return SinkCase(
        "postgres",
        fields=lambda folder: {"format": "sql", "url": url, "table": "s.scores"},
        read=read,
        seed=seed,
        reset=reset,
        adapter=partial(SqlSink, lock_seconds=20.0),
        impatient=partial(SqlSink, lock_seconds=0.001),
    )


DUCKDB = SinkCase(
    "duckdb",
    fields=partial(_in_file, "duckdb"),
    read=_read_duckdb,
    seed=_seed_duckdb,
    reset=_remove_file,
    adapter=SqlSink,
    impatient=partial(SqlSink, lock_seconds=0.0),
)
