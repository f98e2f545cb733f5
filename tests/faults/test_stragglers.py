"""One worker of three is frozen, or slowed by bursts of SIGSTOP: idle workers help, and every row is there once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from distributed import Client
from faulty_jobs import Job, stopped

from pipeline.execution.task_set import WorkerClass, file_name
from pipeline.models.registry import resolve
from pipeline.scoring import progress
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.oracle import Lake, make_lake, oracle
from pipeline.testing.processes import ProcessCluster, wait_until

pytestmark = pytest.mark.slow
MEMORY = 700 << 20


@pytest.fixture(scope="module")
def skewed_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("stragglers") / "lake", rows=(30_000, 12_000, 18_000), row_group=5000)


@pytest.fixture(scope="module")
def expected(skewed_lake: Lake, model_path: Path) -> pd.DataFrame:
    return oracle(skewed_lake.files, model_path)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    with ProcessCluster(tmp_path_factory.mktemp("cluster"), workers=3, memory=f"{MEMORY} B", is_shared=True) as cluster:
        yield cluster


Make = Callable[..., Job]


@pytest.fixture
def make(tmp_path: Path, skewed_lake: Lake, model_path: Path) -> Make:
    return lambda cluster, *faults, **settings: Job(tmp_path, skewed_lake, model_path, cluster, faults, **settings)


def helped(job: Job) -> list[dict[str, Any]]:
    return [event for event in job.directory().events.read() if event["event"] == "straggler"]


def wait_until_at_rest(cluster: ProcessCluster) -> None:
    """Until no worker is at any partition."""
    with Client(cluster.address, set_as_default=False) as client:
        wait_until(lambda: not any(client.run(progress.running_attempts).values()), seconds=180)


def wait_until_it_begins(cluster: ProcessCluster, pid: int) -> None:
    """Until that process has begun a partition just now: frozen between two, it would only have to be passed over."""

    def ages() -> list[float]:
        return [attempt.snapshot.seconds for attempts in progress._running.values() for attempt in attempts]

    with Client(cluster.address, set_as_default=False) as client:
        (address,) = [name for name, found in client.run(os.getpid).items() if found == pid]
        wait_until(lambda: (found := client.run(ages, workers=[address])[address]) and max(found) < 0.5)


@pytest.mark.fault(14)
def test_a_frozen_worker_costs_its_partition_a_copy_and_its_late_write_is_invisible(
    make: Make, cluster: ProcessCluster, expected: pd.DataFrame
) -> None:
    job = make(cluster, 'Fault("sleep", ids=range(0), seconds=0.5)')
    frozen = cluster.worker_pids()[0]
    driver = job.start()
    driver.wait_receipts(4)
    wait_until_it_begins(cluster, frozen)
    with stopped(frozen):
        report = driver.end(120)
        receipts = job.directory().receipts.all()
    assert report.status == "SUCCEEDED"
    assert report.stragglers.won >= 1
    assert report.stragglers.backups + report.stragglers.split_frozen >= 1
    over = [event for event in helped(job) if event["is_over"]]
    assert {event["worker"] for event in over} <= {event["worker"] for event in helped(job)}
    assert not [event for event in driver.seen.partitions if "isolated" in event.reason]
    wait_until_at_rest(cluster)
    assert job.directory().receipts.all() == receipts
    named = {receipt.data.name for receipt in receipts if receipt.data}
    there = {f"data/{path.name}" for path in (Path(job.directory().root) / "rounds/0/data").iterdir()}
    assert there == named, "the late attempt has left something"
    job.assert_whole(expected)


@contextmanager
def bursts(pid: int, *, stop: float = 0.95, go: float = 0.05) -> Iterator[None]:
    """The process runs only now and then inside the block."""
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            os.kill(pid, signal.SIGSTOP)
            ended.wait(stop)
            os.kill(pid, signal.SIGCONT)
            ended.wait(go)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        os.kill(pid, signal.SIGCONT)


def test_a_slow_worker_is_cut_and_others_do_the_rest(
    make: Make, cluster: ProcessCluster, model_path: Path, expected: pd.DataFrame
) -> None:
    # Batches of 200 rows, as if learned before: 25 to a partition.
    version = resolve(ModelRef(str(model_path)))
    job = make(cluster, 'Fault("nap", ids=range(0), seconds=0.04)')
    place = job.folder / "jobs" / file_name(version, WorkerClass(MEMORY, 1))
    place.parent.mkdir(parents=True)
    place.write_text(f'{{"schema_version": 1, "model": {{"digest": "{version.digest}"}}, "batch_rows": 200}}')
    driver = job.start()
    driver.wait_receipts(4)
    slow = wait_until(cluster.worker_pids, what="no worker")[0]
    # Slowed between two partitions it would get no further one, and there would be nothing to split.
    wait_until_it_begins(cluster, slow)
    with bursts(slow):
        report = driver.end(120)
    assert report.status == "SUCCEEDED"
    assert report.batch.remembered == 200
    assert report.stragglers.split_slow >= 1
    cut = [receipt for receipt in job.directory().receipts.all() if receipt.split_points]
    assert cut
    assert driver.seen.splits("slow", "idle_workers")
    wait_until_at_rest(cluster)
    job.assert_whole(expected)
