"""`DaskRecipe`: a ``dask`` step with its inputs pinned. `DaskWork`: its partitions, in the plan of its stage. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.common.digest import digest_json
from pipeline.common.rows import Fragment, InputFile, RowGroup
from pipeline.common.travel import shown_name
from pipeline.plan.packing import pack
from pipeline.sources.discovery import Discovery, resize
from pipeline.sources.types import read_type
from pipeline.sources.versions import content_version

_Ranges = tuple[tuple[Fragment, ...], ...]


@dataclass(frozen=True)
class DaskTable:
    """A table that a ``dask`` step reads: pinned files."""

    files: tuple[InputFile, ...]
    schema: bytes
    """Arrow schema (IPC) of its rows: physical columns, then hive keys."""
    keys: tuple[str, ...] = ()
    """Columns of the schema that are hive keys."""
    filter: str | None = None
    format: str = "parquet"

    @property
    def arrow(self) -> pa.Schema:
        """The schema."""
        return pa.ipc.read_schema(pa.py_buffer(self.schema))

    @property
    def columns(self) -> tuple[str, ...]:
        """Physical columns."""
        return tuple(name for name in self.arrow.names if name not in self.keys)

    @property
    def rows(self) -> int:
        """All rows, including those that the filter drops."""
        return sum(file.rows for file in self.files)

    @property
    def bytes(self) -> int:
        """Uncompressed bytes."""
        return sum(group.bytes for file in self.files for group in file.input_groups)

    @property
    def versions(self) -> dict[str, tuple[int, str]]:
        """Size and version of each file by path."""
        return {file.path: (file.size, file.version) for file in self.files}

    @property
    def identity(self) -> dict[str, Any]:
        """The part that digests of the work hold: contents, not inodes."""
        files = [
            [file.path, file.size, content_version(file.version), file.hive_keys, [g.rows for g in file.row_groups]]
            for file in self.files
        ]
        return {"files": files, "schema": self.schema.hex(), "filter": self.filter, "format": self.format}

    def packed(self, *, threads: int, target_bytes: int | None) -> _Ranges:
        """Return the rows of each Dask partition; one without rows for a table without any."""
        return pack(self.files, threads=threads, target_bytes=target_bytes) or ((),)

    def to_record(self) -> dict[str, Any]:
        """Return the table for storage as JSON."""
        return {
            "files": [[*_file_fields(file), [[*asdict(g).values()] for g in file.row_groups]] for file in self.files],
            "schema": self.schema.hex(),
            "keys": list(self.keys),
            "filter": self.filter,
            "format": self.format,
        }

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> DaskTable:
        """Inverse of `to_record`."""
        files = tuple(
            InputFile(path, size, version, tuple(RowGroup(*group) for group in groups), tuple(map(tuple, keys)))
            for path, size, version, keys, groups in record["files"]
        )
        schema, keys = bytes.fromhex(record["schema"]), tuple(record["keys"])
        return DaskTable(files, schema, keys, record["filter"], record["format"])

    @staticmethod
    def of(discovery: Discovery, *, columns: Sequence[str] | None = None) -> DaskTable:
        """Return the files that were discovered.

        :param columns: columns to read. Default: all that were discovered. Dictionaries are decoded.
        """
        names = discovery.schema.names if columns is None else [n for n in discovery.schema.names if n in columns]
        fields = [discovery.schema.field(name) for name in names]
        schema = pa.schema([pa.field(field.name, _decoded(read_type(field.type))) for field in fields])
        physical = tuple(name for name in names if name not in discovery.key_names)
        return DaskTable(
            resize(discovery, columns=physical),
            bytes(schema.serialize().to_pybytes()),
            tuple(name for name in names if name in discovery.key_names),
            discovery.filter,
            discovery.format,
        )


def _file_fields(file: InputFile) -> list[Any]:
    return [file.path, file.size, file.version, [list(key) for key in file.hive_keys]]


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


@dataclass(frozen=True)
class DaskRecipe:
    """A ``dask`` step with its tables pinned and its columns known."""

    entrypoint: str
    output: bytes
    """Arrow schema (IPC) of its result, without the origin of rows."""
    inputs: tuple[tuple[str, DaskTable], ...] = ()
    """Named tables, in order of their names."""
    partition_bytes: int | None = None
    """Most uncompressed bytes of an input partition; None: the default."""
    origin: bool = False
    """True: the frame has the columns ``_file`` and ``_row``."""
    shuffle: str = "p2p"
    """Method of shuffles: ``p2p`` or ``tasks``."""
    keeps_origin: bool = False
    """True if the result has the origin of its rows."""

    @property
    def name(self) -> str:
        """Name of the step for messages."""
        return shown_name(self.entrypoint)

    @property
    def schema(self) -> pa.Schema:
        """Schema of its result."""
        return pa.ipc.read_schema(pa.py_buffer(self.output))

    @property
    def identity(self) -> dict[str, Any]:
        """The part that digests of the work hold."""
        inputs = {name: table.identity for name, table in self.inputs}
        return {"step": "dask", **_plain(self), "inputs": inputs}

    def to_record(self) -> dict[str, Any]:
        """Return the step for storage as JSON."""
        return {**_plain(self), "inputs": {name: table.to_record() for name, table in self.inputs}}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> DaskRecipe:
        """Inverse of `to_record`."""
        inputs = tuple((name, DaskTable.from_record(table)) for name, table in record["inputs"].items())
        names = ("entrypoint", "partition_bytes", "origin", "shuffle", "keeps_origin")
        return DaskRecipe(output=bytes.fromhex(record["output"]), inputs=inputs, **{n: record[n] for n in names})


def _plain(recipe: DaskRecipe) -> dict[str, Any]:
    return {
        "entrypoint": recipe.entrypoint,
        "output": recipe.output.hex(),
        "partition_bytes": recipe.partition_bytes,
        "origin": recipe.origin,
        "keeps_origin": recipe.keeps_origin,
        "shuffle": recipe.shuffle,
    }


@dataclass(frozen=True)
class DaskWork:
    """A ``dask`` step over what the stage before has kept: the work of a stage."""

    recipe: DaskRecipe
    main: DaskTable
    """What the stage before has kept, or the source."""
    threads: int
    """Threads of all workers, for which the input partitions are cut."""
    partitions: int
    """Partitions of the result."""
    fingerprint: str
    """SHA-256 over the expression, its partitions and the versions of Dask: pieces of the result with the same one
    fit."""
    columns: tuple[str, ...] = ()
    """Columns of the result that are kept, in order."""
    attempt: int = 0
    """Number of the round that does it: pieces of two rounds never mix."""

    @property
    def partition_ids(self) -> tuple[str, ...]:
        """Ids of the partitions of the result."""
        width = max(5, len(str(self.partitions - 1)))
        return tuple(f"{number:0{width}d}" for number in range(self.partitions))

    @property
    def digest(self) -> str:
        """SHA-256 over the work."""
        plain = {"fingerprint": self.fingerprint, "columns": self.columns, "attempt": self.attempt}
        return digest_json({**self.recipe.identity, "main": self.main.identity, **plain})

    @property
    def rows_read(self) -> int:
        """Rows of all tables."""
        return self.main.rows + sum(table.rows for _, table in self.recipe.inputs)

    def packed(self) -> dict[str, _Ranges]:
        """Return the rows of each Dask partition, by name of the table; the frame itself has the name ``""``."""
        tables = {"": self.main, **dict(self.recipe.inputs)}
        target = self.recipe.partition_bytes
        return {name: table.packed(threads=self.threads, target_bytes=target) for name, table in tables.items()}

    @property
    def largest_bytes(self) -> int:
        """Uncompressed bytes of the largest input partition."""
        parts = (part for ranges in self.packed().values() for part in ranges)
        return max((sum(fragment.bytes for fragment in part) for part in parts), default=0)

    def halved(self) -> DaskWork:
        """Return the same work over input partitions of half the size; its fingerprint is that of the larger ones."""
        return replace(self, recipe=replace(self.recipe, partition_bytes=max(1, self.largest_bytes // 2)))

    def to_record(self) -> dict[str, Any]:
        """Return the work for storage as JSON."""
        names = ("threads", "partitions", "fingerprint", "columns", "attempt")
        plain = {name: getattr(self, name) for name in names}
        return {"recipe": self.recipe.to_record(), "main": self.main.to_record(), **plain}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> DaskWork:
        """Inverse of `to_record`."""
        recipe, main = DaskRecipe.from_record(record["recipe"]), DaskTable.from_record(record["main"])
        plain = {name: record[name] for name in ("threads", "partitions", "fingerprint", "attempt")}
        return DaskWork(recipe, main, columns=tuple(record["columns"]), **plain)
