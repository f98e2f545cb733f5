"""Flipped bits in checkpoints, models and jobs swapped or damaged while a job runs, and very many files."""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.common.units import utc_now
from pipeline.driver.prepare import prepare
from pipeline.errors import ModelDigestMismatch, PipelineError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import find_job, list_jobs
from pipeline.report.verify import verify
from pipeline.runner import resume, run
from pipeline.settings import Settings
from pipeline.sinks.parquet.sink import ParquetSink
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.examples import choose
from pipeline.testing.jobs import drive, small_job
from pipeline.testing.oracle import Lake, make_lake, oracle, train_model
from pipeline.testing.processes import ProcessCluster
from pipeline.testing.row_check import read_folder

FLIPS = 300


@pytest.mark.fault(37)
def test_every_flipped_bit_in_a_checkpoint_is_found(tmp_path: Path) -> None:
    """By `verify`, and by any reader that looks at the checksums of pages and has a use for the bytes."""
    job = small_job(tmp_path / "lake", sink=str(tmp_path / "out"), rows=(300, 50))
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="flips-1")
    drive(job, directory, sink=ParquetSink())
    # The output is made of links: a flip is in both. What was read before must be what is read again.
    files = [f"rounds/0/{receipt.data.name}" for receipt in directory.receipts.all() if receipt.data]
    contents = {name: directory.store.read(name) for name in files}
    tables = {name: pq.read_table(io.BytesIO(content)) for name, content in contents.items()}
    chance = random.Random(37)
    silent = 0
    for _ in range(FLIPS):
        name = chance.choice(files)
        damaged = bytearray(contents[name])
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path = Path(directory.store.url(name))
        path.write_bytes(damaged)
        checks = {check.name: check for check in verify(directory, sample=0).checks}
        assert not checks["checkpoint"].ok
        assert name in checks["checkpoint"].detail
        silent += is_read_as(damaged, tables[name])
        path.write_bytes(contents[name])
    assert silent < FLIPS // 4, "bits that readers do not look at: statistics, names of the writer"
    assert verify(directory, sample=0).ok


def is_read_as(content: bytes, expected: pa.Table) -> bool:
    """Return True if a reader with checksums finds no damage; the rows it reads are right then."""
    try:
        found = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError):
        return False
    assert found.num_rows != expected.num_rows or found.equals(expected) or found.schema != expected.schema, (
        "a flip went unnoticed and changed a value"
    )
    return True


@pytest.fixture
def settings(tmp_path: Path, process_cluster: ProcessCluster) -> Settings:
    return Settings.load(directory=str(tmp_path / "jobs"), cluster=process_cluster.address)


def spec_of(lake: Lake, model: Path, out: Path) -> JobSpec:
    return JobSpec.build(
        name="swapped",
        source={"path": str(lake.path)},
        steps=[{"score": {"model": str(model)}}],
        sink={"path": str(out)},
    )


@pytest.mark.slow
@pytest.mark.fault(41)
def test_a_model_that_is_swapped_before_a_resume_scores_nothing(lake: Lake, tmp_path: Path, settings: Settings) -> None:
    model = train_model(tmp_path / "model.ubj", rounds=3)
    kept = model.read_bytes()
    prepared = prepare(spec_of(lake, model, tmp_path / "out"), settings=settings)
    job = JobDirectory.create(settings.directory, prepared.plan, job="swapped-1")
    train_model(model, rounds=4)
    with pytest.raises(PipelineError) as caught:
        resume("swapped-1", settings=settings)
    assert isinstance(caught.value, ModelDigestMismatch) or caught.value.kind == "ModelChanged"
    assert caught.value.exit_code == 5
    assert job.receipts.all() == ()
    assert not (tmp_path / "out").exists()
    model.write_bytes(kept)
    assert resume("swapped-1", settings=settings).status == "SUCCEEDED"
    scored = read_folder(tmp_path / "out").to_pandas()
    pd.testing.assert_frame_equal(scored, oracle(lake.files, model), check_exact=True)


def garbage(job: Path) -> None:
    (job / "job.json").write_bytes(os.urandom(100))


def half(job: Path) -> None:
    (job / "job.json").write_bytes((job / "job.json").read_bytes()[:50])


@pytest.mark.parametrize("damage", [garbage, half, lambda job: (job / "job.json").unlink()])
@pytest.mark.fault(44)
def test_listing_needs_job_directories_only(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """There is no index that could be locked or corrupt; one spoilt job hides no other."""
    job = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    for number in range(3):
        JobDirectory.create(tmp_path / "jobs", job.plan, job=f"job-{number}")
    before = list_jobs(tmp_path / "jobs")
    assert [one.record.job for one in before] == ["job-2", "job-1", "job-0"]
    damage(tmp_path / "jobs/job-1")
    (tmp_path / "jobs/.submitted").mkdir()
    (tmp_path / "jobs/.submitted/some-key.json").write_bytes(os.urandom(50))
    (tmp_path / "jobs/index.db").write_bytes(os.urandom(50))
    assert [one.record.job for one in list_jobs(tmp_path / "jobs")] == ["job-2", "job-0"]
    assert find_job(tmp_path / "jobs", "@last").id == "job-2"
    assert find_job(tmp_path / "jobs", "job-0").id == "job-0"
    assert utc_now()


FILES = choose(2_000, of=10_000)


@pytest.mark.slow
@pytest.mark.fault(54)
def test_thousands_of_tiny_files_are_counted_exactly(tmp_path: Path, settings: Settings, model_path: Path) -> None:
    few = make_lake(tmp_path / "few", rows=(3,) * 20)
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(FILES):
        os.link(few.files[number % 20], folder / f"part-{number:05d}.parquet")
    lake = Lake(folder, tuple(sorted(folder.iterdir())))
    report = run(spec_of(lake, model_path, tmp_path / "out"), settings=settings)
    assert report.rows.to_dict() == {"in": 3 * FILES, "out": 3 * FILES, "rejected": 0, "filtered": 0}
    scored = read_folder(tmp_path / "out").to_pandas()
    one_of_each = oracle(few.files, model_path)
    pd.testing.assert_frame_equal(scored, pd.concat([one_of_each] * (FILES // 20), ignore_index=True), check_exact=True)
    shutil.rmtree(folder)
