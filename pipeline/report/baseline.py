"""Baselines of the publish gate: the distributions that those of a job are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.sketch import Sketches, is_sketched
from pipeline.errors import CorruptInput, MissingInput, SpecError
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import find_job, previous_job
from pipeline.models.registry.training import training_sketches
from pipeline.plan.plan import Plan
from pipeline.report.distributions import sketches_of
from pipeline.sources.locate import SourceFile, locate
from pipeline.spec.gate import Gate
from pipeline.spec.load import absolute_path
from pipeline.storage.store import open_store

LAST = "last"
TRAINING = "training"


@dataclass(frozen=True)
class Baseline:
    """Distributions to compare with."""

    name: str
    sketches: Sketches
    rows: int
    """Rows of the output of that job, or of the files; 0 for training data, of which a job has no part."""


def read_baseline(job: JobDirectory, gate: Gate, *, names: Sequence[str]) -> Baseline | None:
    """Return the baseline of a job's gate; None if there is none yet.

    :param names: columns to compare.
    :raises PipelineError: if the baseline is gone or cannot be read.
    """
    if gate.baseline == LAST:
        before = previous_job(job)
        return _job_baseline(before) if before is not None else None
    if gate.baseline == TRAINING:
        first = next((child.plan for child in job.children()), job.plan)
        return Baseline("the training data", _training(first), 0)
    found = _find(job.resolve(gate.baseline), gate.baseline, job.root.rpartition("/")[0])
    if isinstance(found, JobDirectory):
        return _job_baseline(found)
    return Baseline(job.resolve(gate.baseline), *file_sketches(found, names))


def baseline_columns(plan: Plan, gate: Gate, *, root: str) -> list[str]:
    """Return the columns of a gate's baseline that have a distribution.

    :param root: folder of job directories.
    :raises PipelineError: if the baseline is not there or cannot be read.
    """
    if gate.baseline == TRAINING:
        return list(_training(plan).columns)
    found = _find(absolute_path(gate.baseline), gate.baseline, root)
    if isinstance(found, JobDirectory):
        return list(sketches_of(found).columns)
    with _reading(found[0].path) as opened:
        return [field.name for field in opened.schema_arrow if is_sketched(field.type)]


def _training(plan: Plan) -> Sketches:
    """Return the distributions of the data that the models of a plan were trained with.

    :raises SpecError: if no model has any.
    """
    found = Sketches()
    for version in plan.models:
        sketches = training_sketches(version)
        for name, sketch in sketches.columns.items() if sketches is not None else ():
            found.columns.setdefault(name, sketch)
    if not found.columns:
        raise SpecError(
            "the model has no distributions of its training data",
            where="gate.baseline",
            found=", ".join(version.uri for version in plan.models) or "a job without a model",
            expected="a version of the built-in registry that was registered with its training data",
            next_step="python -m pipeline models register FILE --training DATA.parquet",
        )
    return found


def _find(path: str, name: str, root: str) -> JobDirectory | Sequence[SourceFile]:
    """Return the job or the Parquet files that a baseline names.

    :param path: ``name`` as an absolute path or URL.
    :param root: folder of job directories.
    :raises SpecError: if there is neither.
    """
    if open_store(path).exists(layout.JOB_FILE):
        return JobDirectory.open(path)
    try:
        return locate([path])
    except MissingInput as missing:
        if "/" not in name:
            with suppress(SpecError):
                return find_job(root, name)
        raise SpecError(
            "the baseline of the gate was not found",
            where="gate.baseline",
            found=f"neither a job {name!r} in {root} nor files: {missing.message}",
            expected="last, the id or directory of a job, or Parquet files",
            next_step="correct the path, or leave baseline out to compare with the job before",
        ) from missing


def _job_baseline(job: JobDirectory) -> Baseline:
    report = job.read_report() or {}
    return Baseline(job.id, sketches_of(job), int(report.get("rows", {}).get("out", 0)))


def file_sketches(files: Sequence[SourceFile], names: Sequence[str] | None = None) -> tuple[Sketches, int]:
    """Return the distributions of columns of Parquet files, and the number of their rows.

    :param names: columns that may be there; None: all that can have a distribution.
    :raises CorruptInput: if a file is damaged.
    """
    sketches, rows = Sketches(), 0
    for file in files:
        with _reading(file.path) as opened:
            known = [field.name for field in opened.schema_arrow if is_sketched(field.type)]
            known = known if names is None else [name for name in known if name in names]
            for batch in opened.iter_batches(columns=known):
                sketches.add(pa.Table.from_batches([batch]))
            rows += opened.metadata.num_rows
    return sketches, rows


@contextmanager
def _reading(path: str) -> Iterator[pq.ParquetFile]:
    """Open a file of a baseline.

    :raises CorruptInput: if it, or what is read of it inside the block, is damaged.
    """
    folder, _, name = path.rpartition("/")
    try:
        with open_store(folder or "/").open_input(name) as data:
            yield pq.ParquetFile(data)
    except pa.ArrowException as error:
        raise CorruptInput(
            "a file with distributions to compare with cannot be read",
            where=path,
            found=f"{type(error).__name__}: {error}",
            expected="Parquet files, or a job",
            next_step="repair or replace the file, then run or resume the job",
        ) from error
