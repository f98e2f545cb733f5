"""Open the database that ``sink.url`` names."""

from __future__ import annotations

import os
from importlib import import_module
from urllib.parse import urlsplit

from pipeline.common.secrets import resolve_reference
from pipeline.errors import SpecError
from pipeline.sinks.sql.database import LOCK_SECONDS, Database
from pipeline.spec.sink import Sink

_KINDS = {"postgresql": "postgresql", "postgres": "postgresql", "sqlite": "sqlite", "duckdb": "duckdb"}
"""Target of `pipeline.sinks.types` by the scheme of a URL."""
_DRIVERS = {"postgresql": "adbc_driver_postgresql.dbapi", "sqlite": "sqlite3", "duckdb": "duckdb"}
_EXTRAS = {"postgresql": "postgres", "duckdb": "duckdb"}


def resolved_url(sink: Sink) -> str:
    """Return ``sink.url``; a reference is resolved in this process.

    :raises SpecError: if it cannot be resolved.
    """
    assert sink.url is not None  # checked with the job spec
    return resolve_reference(sink.url, where="sink.url")


def kind_of(url: str) -> str:
    """Return the target of `pipeline.sinks.types` for a URL.

    :raises SpecError: for an unknown scheme, or if the driver is not installed.
    """
    scheme = url.partition("://")[0]
    kind = _KINDS.get(scheme)
    if kind is None:
        raise SpecError(
            "no database of this kind is known",
            where="sink.url",
            found=f"{scheme}://…",
            expected=", ".join(f"{name}://" for name in _KINDS),
        )
    try:
        import_module(_DRIVERS[kind])
    except ImportError as error:
        raise SpecError(
            "the driver of the database is not installed",
            where="sink.url",
            found=str(error),
            next_step=f"pip install 'dask-batch-pipeline[{_EXTRAS[kind]}]'",
        ) from error
    return kind


def file_of(url: str) -> str:
    """Return the path of a database that is a file; empty for a server."""
    if kind_of(url) == "postgresql":
        return ""
    parts = urlsplit(url)
    path = url.partition("://")[2].removeprefix("/")
    if parts.netloc or not path or path.startswith(":"):
        raise SpecError(
            "the database must be a file",
            where="sink.url",
            found=url,
            expected=f"{parts.scheme}:///file.db, or {parts.scheme}:////folder/file.db for an absolute path",
        )
    return os.path.abspath(path)


def open_database(url: str, *, where: str, read_only: bool = False, lock_seconds: float = LOCK_SECONDS) -> Database:
    """Return a connection.

    :param where: place of the sink, for messages.
    :param read_only: for a look before anything runs: no file is made.
    :raises StorageError: if the database cannot be reached.
    """
    kind = kind_of(url)
    if kind == "postgresql":
        from pipeline.sinks.sql.postgres import Postgres

        return Postgres(url, where=where, lock_seconds=lock_seconds)
    if kind == "sqlite":
        from pipeline.sinks.sql.sqlite import Sqlite

        return Sqlite(file_of(url), where=where, read_only=read_only, lock_seconds=lock_seconds)
    from pipeline.sinks.sql.duckdb import DuckDB

    return DuckDB(file_of(url), where=where, read_only=read_only, lock_seconds=lock_seconds)
