"""Scoring a random sample of a job's input again, and comparing it with what the job wrote, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.rows import Fragment, InputFile
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.receipts import FileRows, Receipt
from pipeline.jobs.splits import sub_fragment
from pipeline.models.cache import get_predictor
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import StageRecipe
from pipeline.scoring.partition import read_partition
from pipeline.scoring.scorer import Scorer
from pipeline.sources.locate import current_version

PLACES = 8
"""Ranges of neighbouring rows that a sample consists of."""


@dataclass
class Resampled:
    """What came of it."""

    rows_in: int = 0
    """Input rows that were scored again."""
    rows_out: int = 0
    skipped: int = 0
    """Ranges whose input file is not there any more as it was."""
    wrong: list[str] = field(default_factory=list)
    """Ranges that came out otherwise, with the columns that differ."""


@dataclass(frozen=True)
class _Range:
    """Neighbouring rows of one input file, and where their output is."""

    receipt: Receipt
    part: FileRows
    start: int
    stop: int
    offset: int | None
    """Row of the data file that the first output row of the range is; None: the range ends where its part ends."""
    part_end: int
    """Row of the data file that follows on the part's output."""


def resample(job: JobDirectory, ledger: Ledger, *, rows: int, random: Random) -> Resampled:
    """Score about ``rows`` input rows again, in a few ranges of neighbours, and compare.

    The model's own library scores them, whichever engine did before, so that it is proof of that one too.

    Every row of a range that all rows of its fragment came out of can be found in the output by its number. In a
    fragment with rejected or filtered rows, only ranges at either end can: these are taken there.

    :raises ModelIntegrity: when the model is not the pinned one any more.
    """
    result = Resampled()
    files = {one.number: {file.path: file for file in one.plan.files} for one in ledger.rounds}
    for chosen in _choose(ledger.done, rows=rows, random=random):
        stage = chosen.receipt.stage
        file = files[stage][chosen.part.path]
        if not (chosen.receipt.before or _is_there(file)):
            result.skipped += 1
            continue
        again = _score_again(job.recipe_of(ledger.round(stage)), file, chosen)
        start = chosen.part_end - again.num_rows if chosen.offset is None else chosen.offset
        written = _written(job, chosen.receipt, start=start, rows=again.num_rows)
        wrong = _differing(again, written, outputs=job.plan.outputs, tolerance=job.plan.spec.score.tolerance)
        if wrong:
            result.wrong.append(f"{file.path} rows {chosen.start:,}-{chosen.stop:,}: {', '.join(wrong)}")
        result.rows_in += chosen.stop - chosen.start
        result.rows_out += again.num_rows
    return result


def _choose(receipts: Iterable[Receipt], *, rows: int, random: Random) -> Iterator[_Range]:
    places = [
        (receipt, number) for receipt in receipts for number, part in enumerate(receipt.files) if part.rows.rows_in
    ]
    if not places or rows <= 0:
        return
    sizes = [receipt.files[number].rows.rows_in for receipt, number in places]
    count = min(PLACES, rows, len(places) * PLACES)
    for receipt, number in random.choices(places, weights=sizes, k=count):
        part = receipt.files[number]
        before = sum(other.rows.out for other in receipt.files[:number])
        length = min(math.ceil(rows / count), part.rows.rows_in)
        first = random.randint(part.row_start, part.row_stop - length)
        offset: int | None = before + first - part.row_start
        if part.rows.out != part.rows.rows_in:
            is_head = random.random() < 0.5
            first = part.row_start if is_head else part.row_stop - length
            offset = before if is_head else None
        yield _Range(receipt, part, first, first + length, offset, before + part.rows.out)


def _score_again(recipe: StageRecipe, file: InputFile, chosen: _Range) -> pa.Table:
    origin = file.path if chosen.receipt.before else ""
    whole = Fragment(file.path, 0, file.rows, 0, len(file.row_groups), 0, file.keys, origin)
    fragment = sub_fragment(whole, file, row_start=chosen.start, row_stop=chosen.stop)
    scorer = Scorer(recipe, get_predictor(recipe.score.model)[0])
    versions = {file.path: (file.size, file.version)}
    batches = read_partition(recipe, Partition("", (fragment,)), versions=versions)
    schema = pa.ipc.read_schema(pa.py_buffer(recipe.output_schema))
    tables = [scorer.score(batch, paths=(file.path,)).table for batch in batches]
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _written(job: JobDirectory, receipt: Receipt, *, start: int, rows: int) -> pa.Table:
    """Rows ``start`` to ``start + rows`` of a checkpoint file; only the row groups that have them are read."""
    if receipt.data is None or rows == 0:
        return pa.ipc.read_schema(pa.py_buffer(job.plan.output_schema)).empty_table()
    with (
        job.store.open_input(f"stages/{receipt.stage}/{receipt.data.name}") as opened,
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


def _differing(one: pa.Table, other: pa.Table, *, outputs: Sequence[str] = (), tolerance: float = 0.0) -> list[str]:
    """Columns in which two tables differ; NaN equals NaN.

    :param outputs: columns with scores, which may differ as far as ``tolerance`` of their margins brings about.
    """
    if one.num_rows != other.num_rows:
        return [f"{one.num_rows:,} rows instead of {other.num_rows:,}"]
    if one.column_names != other.column_names:
        return [f"columns {one.column_names} instead of {other.column_names}"]
    differing = [name for name in one.column_names if not same_values(one.column(name), other.column(name))]
    return [name for name in differing if name not in outputs or not _near(one[name], other[name], tolerance)]


def _near(one: pa.ChunkedArray, other: pa.ChunkedArray, tolerance: float) -> bool:
    """Whether scores are as near as their margins: sigmoid and softmax bring them nearer, exp by a factor apart."""
    if not tolerance or one.type != other.type or not pa.types.is_floating(one.type):
        return False
    return np.allclose(one.to_numpy(), other.to_numpy(), rtol=math.expm1(tolerance), atol=tolerance, equal_nan=True)


def same_values(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Whether two columns have the same type and the same values to the last bit, NaN and nulls in the same places."""
    if one.type != other.type:
        return False
    if pa.types.is_floating(one.type):
        # Arrow holds NaN for unequal to itself, and 0.0 for equal to -0.0.
        bits = [np.asarray(column.drop_null().to_numpy()).tobytes() for column in (one, other)]
        return bits[0] == bits[1] and bool(one.is_null().equals(other.is_null()))
    if one.equals(other):
        return True
    # Containers with NaN in them, and dictionaries that number the same values otherwise.
    return repr(one.to_pylist()) == repr(other.to_pylist())


def _is_there(file: InputFile) -> bool:
    try:
        return current_version(file.path) == (file.size, file.version)
    except OSError:
        return False
