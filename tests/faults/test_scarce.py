"""Memory, disks and interpreters that are missing when a worker needs them; every row is checked afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from faulty_jobs import Job, again

from pipeline.errors import NoWorkers
from pipeline.execution.task_set import WorkerClass, file_name, load_batch_size
from pipeline.models.registry import resolve
from pipeline.runner import resume, run
from pipeline.settings import Settings
from pipeline.spec.model_ref import ModelRef
from pipeline.storage.store import open_store
from pipeline.testing.oracle import Lake, make_lake, oracle
from pipeline.testing.processes import ProcessCluster

pytestmark = pytest.mark.slow
MEMORY = 700 << 20


@pytest.fixture(scope="module")
def three_file_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("scarce") / "lake", rows=(9_000, 3_000, 8_000), row_group=2000)


@pytest.fixture(scope="module")
def expected(three_file_lake: Lake, model_path: Path) -> pd.DataFrame:
    return oracle(three_file_lake.files, model_path)


Make = Callable[..., Job]


@pytest.fixture
def make(tmp_path: Path, three_file_lake: Lake, model_path: Path) -> Make:
    return lambda cluster, *faults, **settings: Job(tmp_path, three_file_lake, model_path, cluster, faults, **settings)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    with ProcessCluster(tmp_path_factory.mktemp("cluster"), memory=f"{MEMORY} B", is_shared=True) as cluster:
        yield cluster


@pytest.mark.fault(19)
def test_rows_that_need_ten_times_the_memory_cost_two_workers_and_are_named(
    make: Make, cluster: ProcessCluster, expected: pd.DataFrame
) -> None:
    job = make(cluster, f'Fault("memory", ids=range(11000, 11020), bytes={10 * MEMORY})')
    driver = job.start()
    assert driver.end(240).status == "SUCCEEDED_WITH_WARNINGS"
    job.assert_all_but_rejected(expected, ids=range(11000, 11020), reason="memory:OutOfMemory", at_most=25)
    splits = driver.seen.splits("memory")
    assert splits, "it was never split"
    assert {event.partition for event in splits} <= {receipt.partition for receipt in job.directory().receipts.all()}
    restarts = [event for event in driver.seen.partitions if "killed for memory" in event.reason]
    assert [event.outcome for event in restarts] == ["split", "retry"], "it may cost a worker twice, not more often"


@pytest.mark.fault(19)
def test_batch_size_that_fitted_is_reused_by_the_next_job(
    make: Make, cluster: ProcessCluster, expected: pd.DataFrame, model_path: Path
) -> None:
    # Batches of more than 1,100 rows of one partition raise as a flavor or a step does for which memory runs short.
    job = make(cluster, 'Fault("memory", ids=range(11000, 11001), bytes=1 << 50, above_rows=1100)')
    module = next(job.folder.glob("faults_*.py"))
    module.write_text(
        module.read_text()
        + "table = step\n\n\ndef step(frame):\n"
        + "    if len(frame) > 1100 and ((frame['id'] >= 11000) & (frame['id'] < 11001)).any():\n"
        + "        raise MemoryError('on purpose')\n"
        + "    return frame\n"
    )
    report = job.start().end(120)
    assert report.status == "SUCCEEDED"
    job.assert_whole(expected)
    assert report.batch.remembered is None
    smallest = report.batch.smallest
    assert smallest is not None
    assert smallest < report.batch.planned
    version = resolve(ModelRef(str(model_path)))
    kept = load_batch_size(open_store(job.settings.directory), version, WorkerClass(MEMORY, 1))
    assert kept is not None
    assert kept < report.batch.planned
    spec = job.spec.model_copy(update={"sink": job.spec.sink.model_copy(update={"path": str(job.folder / "out2")})})
    second = run(spec, settings=job.settings)
    assert second.status == "SUCCEEDED"
    assert second.batch.remembered == kept
    (Path(job.settings.directory) / file_name(version, WorkerClass(MEMORY, 1))).unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mount: needs root, and the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> None:
    with open(disk / f"full-{len(list(disk.iterdir()))}", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


@pytest.mark.fault(29)
def test_a_full_disk_of_the_workers_loses_no_row_and_hangs_nothing(
    make: Make, tmp_path: Path, small_disk: Path, expected: pd.DataFrame
) -> None:
    """A worker that starts on a full disk may do so, since it keeps nothing there, or not."""
    options = ("--local-directory", str(small_disk))
    with ProcessCluster(tmp_path / "cluster", options=options) as cluster:
        job = make(cluster, 'Fault("sleep", ids=range(0), seconds=2.0)', no_workers_timeout=20)
        fill(small_disk)
        driver = job.start()
        driver.wait_receipts(1)
        for pid in [*(nanny.pid for nanny in cluster.nannies), *cluster.worker_pids()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # What the dead left there a new worker would remove, and have room for its own.
        shutil.rmtree(small_disk / "dask-scratch-space")
        fill(small_disk)
        cluster.nannies.append(cluster.add_worker())
        try:
            assert driver.end(120).status == "SUCCEEDED"
        except NoWorkers:
            assert not (job.folder / "out").exists()
            for file in small_disk.glob("full*"):
                file.unlink()
            cluster.nannies.append(cluster.add_worker())
            assert resume("@last", settings=Settings.load(**again(job))).status == "SUCCEEDED"
        job.assert_whole(expected)
