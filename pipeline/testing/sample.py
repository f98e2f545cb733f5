"""Copy a small sample of a job: row ranges of its source in a separate folder, and a spec that reads the copy."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.rows import Fragment, InputFile
from pipeline.sources import discover, read_batches, selected_fragments
from pipeline.sources.types import empty_table
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.load import absolute

PIECES = 12
"""Number of row ranges that are drawn if the source has more rows than requested."""
_GROUP_ROWS = 2048
_BATCH_ROWS = 8192
_SINK_FIELDS = ("compression", "target_file_size")


def sample_job(spec: JobSpec, folder: Path, *, rows: int, seed: int = 0) -> JobSpec:
    """Copy at most ``rows`` rows of the source into ``folder``/lake; return a job with that source, sink and cluster.

    Its sink is ``folder``/out, in mode ``overwrite``. Any number of rows may be rejected: by chance, the share of bad
    rows in a small sample may exceed that in all rows.

    :param seed: seed for the ranges that are drawn.
    :raises InputError: if the source cannot be read.
    """
    record = absolute(spec).to_dict()
    copy_rows(spec, folder / "lake", rows=rows, seed=seed)
    source = {name: value for name, value in record["source"].items() if name != "path"}
    sink = {name: value for name, value in record["sink"].items() if name in _SINK_FIELDS}
    kept = {**record, "cluster": "local"}
    errors = {**record.get("errors", {}), "max_fraction": 1.0}
    return JobSpec.model_validate(
        {
            **kept,
            "source": {"path": str(folder / "lake"), **source},
            "sink": {"path": str(folder / "out"), "mode": "overwrite", **sink},
            "errors": errors,
        }
    )


def copy_rows(spec: JobSpec, folder: Path, *, rows: int, seed: int) -> int:
    """Write row ranges of the source as Parquet, below the same partition folders; return the number of rows."""
    found = discover(absolute(spec).source)
    schema = pa.schema([found.schema.field(name) for name in found.physical])
    count = 0
    for number, fragment in enumerate(choose_ranges(found.files, rows=rows, seed=seed)):
        batches = read_batches(
            (fragment,),
            columns=schema.names,
            schema=schema,
            batch_rows=_BATCH_ROWS,
            versions=found.versions,
            format=found.format,
        )
        place = folder.joinpath(*(f"{name}={quote(value, safe='')}" for name, value in fragment.hive_keys))
        place.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(place / f"piece-{number:03d}.parquet", schema) as writer:
            for batch in batches:
                writer.write_table(batch.table.cast(schema), row_group_size=_GROUP_ROWS)
        count += fragment.rows
    if not count:
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(empty_table(schema), folder / "piece-000.parquet")
    return count


def choose_ranges(files: Sequence[InputFile], *, rows: int, seed: int, pieces: int = PIECES) -> list[Fragment]:
    """Return at most ``rows`` selected rows: all, or one random range of each of ``pieces`` equal parts. Pure."""
    total = sum(fragment.rows for file in files for fragment in selected_fragments(file))
    if total <= rows:
        return [fragment for file in files for fragment in selected_fragments(file)]
    chance = random.Random(seed)
    pieces = max(1, min(pieces, rows))
    size, part = rows // pieces, total / pieces
    chosen: list[Fragment] = []
    for number in range(pieces):
        low = int(number * part)
        start = chance.randint(low, max(low, int((number + 1) * part) - size))
        chosen += _cut(files, start=start, stop=start + size)
    return chosen


def _cut(files: Sequence[InputFile], *, start: int, stop: int) -> Iterator[Fragment]:
    """Yield the fragments of selected rows ``start`` to ``stop``, counted over all files."""
    passed = 0
    for file in files:
        for whole in selected_fragments(file):
            low, high = max(start, passed), min(stop, passed + whole.rows)
            if low < high:
                yield _part(file, whole.row_start + low - passed, whole.row_start + high - passed)
            passed += whole.rows


def _part(file: InputFile, row_start: int, row_stop: int) -> Fragment:
    touched, position, size = [], 0, 0
    for number, group in enumerate(file.row_groups):
        if position < row_stop and position + group.rows > row_start:
            touched.append(number)
            size += group.bytes
        position += group.rows
    first, last = touched[0], touched[-1] + 1
    return Fragment(file.path, row_start, row_stop, first, last, size, file.hive_keys, span=file.span(first, last))
