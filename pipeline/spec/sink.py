"""The sink of a job spec: where the output goes, and what happens to rows that are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, model_validator

from pipeline.common.secrets import is_reference, says_secret
from pipeline.common.units import parse_bytes
from pipeline.spec.fields import (
    AnyPath,
    Name,
    PathText,
    SomeNames,
    SpecModel,
    check_size,
    spec_error,
)


def _check_database(text: str) -> str:
    if is_reference(text):
        return text
    parts = urlsplit(text)
    if not parts.scheme or "://" not in text:
        raise spec_error(
            "is not the URL of a database",
            expected="postgresql://host/database, sqlite:///file.db or duckdb:///file.db; or env:NAME for a secret",
        )
    if parts.password or any(says_secret(name) for name, _ in parse_qsl(parts.query)):
        raise spec_error(
            "contains a password",
            expected="a URL without one, or a reference to the whole URL",
            next_step="write url: env:NAME or file:PATH",
            hides=True,
        )
    return text


SinkMode = Literal["error", "overwrite", "append", "replace", "merge"]


class Sink(SpecModel):
    """Output of a job: place, mode and format."""

    path: PathText = ""
    """Directory or URL. Required, except for a sink that is a table of a database."""
    mode: SinkMode = "error"
    """Action if the sink contains data: fail, replace it in one commit, or append to it. Tables also know ``replace``:
    replace the rows that meet ``where``; and ``merge``: replace the rows with the same ``key``, add the others."""
    format: str = "parquet"
    """Name of the `pipeline.sinks` adapter: ``parquet``, ``sql``, or one of another distribution."""
    target_file_size: Annotated[int | str, AfterValidator(check_size)] | None = None
    """Size of a published file, as ``256 MiB`` or bytes; smaller neighbours are merged up to it. Default: one file per
    partition."""
    compression: Literal["snappy", "zstd", "lz4", "gzip", "none"] = "snappy"
    """Parquet codec of the output."""
    url: Annotated[str, AfterValidator(_check_database)] | None = None
    """With ``format: sql``: the database, as ``postgresql://host/database``, ``sqlite:///file.db`` (four slashes for an
    absolute path) or ``duckdb:///file.db``. Write ``env:NAME`` or ``file:PATH`` if it contains a password."""
    table: Name | None = None
    """Name of the table, or ``schema.table``. Created if it does not exist."""
    key: SomeNames | None = None
    """With ``mode: merge``: columns that identify a row. No two rows of the output may have the same values."""
    where: Name | None = None
    """With ``mode: replace``: condition for the rows to replace, in the language of ``source.filter``. All rows of the
    output must meet it."""
    job_column: Name | None = None
    """Column of the table that gets the id of the job, so that a retry can take back rows of its own job."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            path: AnyPath = "",
            mode: SinkMode = "error",
            format: str = "parquet",
            target_file_size: int | str | None = None,
            compression: Literal["snappy", "zstd", "lz4", "gzip", "none"] = "snappy",
            url: str | None = None,
            table: str | None = None,
            key: Sequence[str] | None = None,
            where: str | None = None,
            job_column: str | None = None,
        ) -> None: ...

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if not self.path and self.url is None and self.table is None:
            raise spec_error("has no path", expected="path: a directory or URL; or for a table, format, url and table")
        if self.format == "parquet":
            given = [name for name in ("url", "table", "key", "where", "job_column") if getattr(self, name) is not None]
            if given:
                raise spec_error(
                    f"has {given[0]}, which Parquet files do not have", expected="format: sql, or only path and mode"
                )
            if self.mode in ("replace", "merge"):
                raise spec_error(
                    f"cannot {self.mode} rows of Parquet files", expected="mode: error, overwrite or append"
                )
        if self.format == "sql":
            self._check_sql()
        if self.mode == "merge" and self.key is None:
            raise spec_error("has mode: merge without key", expected="key: the columns that identify a row")
        if self.mode == "replace" and self.where is None:
            raise spec_error("has mode: replace without where", expected="where: a condition for the rows to replace")
        if self.where is not None and self.mode != "replace":
            raise spec_error("has where without mode: replace", expected="mode: replace beside where")
        return self

    def _check_sql(self) -> None:
        if self.url is None or self.table is None or self.path:
            raise spec_error(
                "has a path, but is a table" if self.path else "has no url" if self.url is None else "has no table",
                expected="format: sql with url and table, without path",
            )

    @property
    def place(self) -> str:
        """The place of the output for people: the path, or the URL and the table. A reference is not resolved."""
        if self.path:
            return self.path
        return "#".join(part for part in (self.url, self.table) if part)

    @property
    def target_bytes(self) -> int | None:
        """``target_file_size`` as a number of bytes."""
        return None if self.target_file_size is None else parse_bytes(self.target_file_size)
