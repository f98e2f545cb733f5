"""Workers, nannies and the scheduler get real signals during a job; every row is checked afterwards."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from faulty_jobs import SLOW, Driver, Job, again, stopped

from pipeline.errors import NoWorkers, SchedulerLost, SchedulerUnresponsive
from pipeline.runner import resume
from pipeline.settings import Settings
from pipeline.testing.oracle import Lake, make_lake, oracle
from pipeline.testing.processes import ProcessCluster, send, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def big_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("workers") / "lake", rows=(9_000, 3_000, 8_000), row_group=2000)


@pytest.fixture(scope="module")
def expected(big_lake: Lake, model_path: Path) -> pd.DataFrame:
    return oracle(big_lake.files, model_path)


class Clusters:
    """Clusters that tests share, each started when first asked for, and repaired after the test before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: dict[str, ProcessCluster] = {}

    def get(self, name: str, **options: Any) -> ProcessCluster:
        found = self._started.get(name)
        if found is None or found.scheduler.poll() is not None:
            if found is not None:
                found.close()
            found = self._started[name] = ProcessCluster(
                self._folder / f"{name}-{len(os.listdir(self._folder))}", **options
            )
            found.wait()
        found.replace_workers()
        wait_until(lambda: len(found.worker_pids()) >= len(found.nannies), what="no workers")
        return found

    def close(self) -> None:
        for cluster in self._started.values():
            cluster.close()


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    clusters = Clusters(tmp_path_factory.mktemp("clusters"))
    yield clusters
    clusters.close()


@pytest.fixture
def cluster(clusters: Clusters) -> ProcessCluster:
    """Two workers, each with a nanny in a process of its own."""
    return clusters.get("two", memory="700 MiB")


@pytest.fixture
def one_worker(clusters: Clusters) -> ProcessCluster:
    """One worker, so that not everything is done while something happens to the scheduler, which may die of it."""
    return clusters.get("one", workers=1)


@pytest.fixture
def impatient(clusters: Clusters) -> ProcessCluster:
    """Two workers, and a scheduler that gives them up after five seconds of silence."""
    return clusters.get("impatient", config={"distributed.scheduler.worker-ttl": "5s"})


Make = Callable[..., Job]


@pytest.fixture
def make(tmp_path: Path, big_lake: Lake, model_path: Path) -> Make:
    return lambda cluster, *faults, **settings: Job(tmp_path, big_lake, model_path, cluster, faults, **settings)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.fault(1)
def test_killed_workers_lose_no_row(seed: int, make: Make, cluster: ProcessCluster, expected: pd.DataFrame) -> None:
    chance = random.Random(seed)
    job = make(cluster, SLOW)
    driver = job.start()
    for count in sorted(chance.sample(range(4), 2)):
        driver.wait_receipts(count)
        pids = wait_until(cluster.worker_pids)
        os.kill(chance.choice(pids), signal.SIGKILL)
    assert driver.end().status == "SUCCEEDED"
    job.assert_whole(expected)


@pytest.mark.fault(5)
def test_all_workers_die_at_once_and_new_ones_finish(
    make: Make, cluster: ProcessCluster, expected: pd.DataFrame
) -> None:
    job = make(cluster, SLOW)
    driver = job.start()
    driver.wait_receipts(1)
    for pid in cluster.worker_pids():
        os.kill(pid, signal.SIGKILL)
    assert driver.end().status == "SUCCEEDED"
    job.assert_whole(expected)


@pytest.mark.fault(16)
def test_sigterm_and_then_sigkill_lose_no_row(make: Make, cluster: ProcessCluster, expected: pd.DataFrame) -> None:
    job = make(cluster, SLOW)
    driver = job.start()
    driver.wait_receipts(1)
    pid = wait_until(cluster.worker_pids)[0]
    os.kill(pid, signal.SIGTERM)
    try:
        wait_until(lambda: not os.path.exists(f"/proc/{pid}"), seconds=2)
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
    assert driver.end().status == "SUCCEEDED"
    job.assert_whole(expected)


@pytest.mark.fault(21)
def test_segfaulting_row_is_rejected_alone(make: Make, cluster: ProcessCluster, expected: pd.DataFrame) -> None:
    job = make(cluster, 'Fault("segfault", ids=range(11000, 11001))')
    driver = job.start()
    assert driver.end(120).status == "SUCCEEDED_WITH_WARNINGS"
    job.assert_all_but_rejected(expected, ids=range(11000, 11001), reason="crash:SIGSEGV", at_most=1)
    named = {event.partition for event in driver.seen.outcomes("retry") if "isolated" in event.reason}
    assert len(named) == 1, "an innocent partition was isolated"


@pytest.mark.fault(18)
def test_an_endless_loop_costs_its_own_rows_only(make: Make, cluster: ProcessCluster, expected: pd.DataFrame) -> None:
    job = make(cluster, 'Fault("loop", ids=range(11000, 11001))', partition_timeout=4)
    driver = job.start()
    assert driver.end(120).status == "SUCCEEDED_WITH_WARNINGS"
    job.assert_all_but_rejected(expected, ids=range(11000, 11001), reason="timeout:PartitionTimeout", at_most=1)
    reasons = [event for event in driver.seen.outcomes("retry") if "PartitionTimeout" in event.reason]
    assert {event.partition for event in reasons} == {reasons[0].partition}


@pytest.mark.fault(19)
def test_split_partition_that_fits_is_scored_completely(
    make: Make, cluster: ProcessCluster, expected: pd.DataFrame
) -> None:
    # It takes the memory only for batches of more rows than a half has.
    job = make(cluster, 'Fault("memory", ids=range(11000, 11001), bytes=2 << 30, above_rows=2500)')
    driver = job.start()
    assert driver.end(120).status == "SUCCEEDED"
    job.assert_whole(expected)
    assert driver.seen.splits("memory")


@pytest.mark.fault(23)
def test_step_that_raises_now_and_then_is_retried(make: Make, cluster: ProcessCluster, expected: pd.DataFrame) -> None:
    job = make(cluster, 'Fault("raise", ids=range(11000, 11001), times=2)')
    driver = job.start()
    assert driver.end().status == "SUCCEEDED"
    job.assert_whole(expected)


@pytest.mark.fault(20)
def test_workers_paused_by_a_leak_are_restarted(make: Make, cluster: ProcessCluster, expected: pd.DataFrame) -> None:
    # Between pause (0.8) and terminate (0.92) of 700 MiB; the job must not be over before the workers have noticed.
    leak = f'Fault("leak", ids=range(0), bytes={int(0.83 * 700) << 20})'
    job = make(cluster, leak, 'Fault("sleep", ids=range(0), seconds=1.0)')
    before = set(wait_until(lambda: len(cluster.worker_pids()) == 2 and cluster.worker_pids()))
    driver = job.start()
    assert driver.end(120).status == "SUCCEEDED"
    job.assert_whole(expected)
    assert before - set(cluster.worker_pids()), "no worker was restarted"
    assert not [
        event for event in driver.seen.partitions if event.split_reason == "memory" or "isolated" in event.reason
    ]
    # The next test gets workers without the leak.
    send(signal.SIGKILL, *cluster.worker_pids())


@pytest.mark.fault(4)
def test_a_killed_nanny_takes_its_worker_and_the_rest_finishes(
    make: Make, cluster: ProcessCluster, expected: pd.DataFrame
) -> None:
    job = make(cluster, SLOW)
    driver = job.start()
    driver.wait_receipts(1)
    cluster.nannies[0].kill()
    assert driver.end().status == "SUCCEEDED"
    job.assert_whole(expected)


@pytest.mark.fault(5)
def test_without_workers_the_run_ends_and_resume_finishes(
    make: Make, cluster: ProcessCluster, expected: pd.DataFrame
) -> None:
    job = make(cluster, 'Fault("sleep", ids=range(0), seconds=2.0)', no_workers_timeout=4)
    driver = job.start()
    driver.wait_receipts(1)
    pids = cluster.worker_pids()
    for pid in [*(nanny.pid for nanny in cluster.nannies), *pids]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with pytest.raises(NoWorkers) as caught:
        driver.end()
    assert caught.value.exit_code == 75
    assert not (job.folder / "out").exists()
    cluster.replace_workers()
    assert resume("@last", settings=Settings.load(**again(job))).status == "SUCCEEDED"
    job.assert_whole(expected)


@pytest.mark.fault(6)
def test_a_killed_scheduler_ends_the_run_within_five_seconds(
    make: Make, one_worker: ProcessCluster, cluster: ProcessCluster, expected: pd.DataFrame
) -> None:
    job = make(one_worker, SLOW)
    driver = job.start()
    driver.wait_receipts(1)
    begin = time.monotonic()
    one_worker.scheduler.kill()
    with pytest.raises(SchedulerLost) as caught:
        driver.end()
    assert time.monotonic() - begin < 5
    assert caught.value.exit_code == 75
    other = Settings.load(**{**again(job), "cluster": cluster.address})
    assert resume("@last", settings=other).status == "SUCCEEDED"
    job.assert_whole(expected)


@pytest.mark.fault(7)
def test_a_frozen_scheduler_ends_the_run_at_the_limit_and_a_short_freeze_does_not(
    make: Make, one_worker: ProcessCluster, expected: pd.DataFrame
) -> None:
    job = make(one_worker, SLOW, scheduler_timeout=6)
    driver = job.start()
    driver.wait_receipts(1)
    begin = time.monotonic()
    with stopped(one_worker.scheduler.pid):
        with pytest.raises(SchedulerUnresponsive) as caught:
            driver.end()
        assert time.monotonic() - begin < 30
    assert caught.value.exit_code == 75
    again = Driver(job, resume, "@last")
    done = len(job.directory().receipts.all())
    again.wait_receipts(done + 1)
    with stopped(one_worker.scheduler.pid):
        # The fault itself takes time: shorter than the limit.
        threading.Event().wait(2.0)
    assert again.end().status == "SUCCEEDED"
    job.assert_whole(expected)


@pytest.mark.fault(15)
def test_a_worker_whose_lifetime_is_over_is_not_to_blame(make: Make, tmp_path: Path, expected: pd.DataFrame) -> None:
    options = ("--lifetime", "12s", "--lifetime-restart")
    with ProcessCluster(tmp_path / "cluster", options=options, is_shared=True) as cluster:
        job = make(cluster, 'Fault("sleep", ids=range(0), seconds=1.0)')
        driver = job.start()
        assert driver.end().status == "SUCCEEDED"
        job.assert_whole(expected)
        assert not [event for event in driver.seen.partitions if "isolated" in event.reason]


@pytest.mark.fault(14)
def test_a_frozen_node_that_wakes_up_late_changes_nothing(
    make: Make, impatient: ProcessCluster, expected: pd.DataFrame
) -> None:
    job = make(impatient, SLOW, 'Fault("sleep", ids=range(11000, 11001), seconds=3.0)')
    driver = job.start()
    driver.wait_attempts(1, 1)
    # Whoever executes it: both may; one is stopped, the other one goes on.
    nanny = impatient.nannies[0]
    with stopped(nanny.pid, impatient.worker_pid(nanny)):
        assert driver.end(120).status == "SUCCEEDED"
        attempts = {receipt.partition: receipt.attempt for receipt in job.directory().receipts.all()}
    job.assert_whole(expected)
    assert {receipt.partition: receipt.attempt for receipt in job.directory().receipts.all()} == attempts


@pytest.mark.fault(17)
def test_a_step_that_holds_the_interpreter_past_the_ttl_loses_no_row(
    make: Make, impatient: ProcessCluster, expected: pd.DataFrame
) -> None:
    job = make(impatient, 'Fault("freeze", ids=range(11000, 11001), seconds=12.0)')
    assert job.start().end(150).status == "SUCCEEDED"
    job.assert_whole(expected)


@pytest.mark.fault(17)
def test_a_row_that_holds_the_interpreter_for_ever_is_named_and_all_others_are_scored(
    make: Make, impatient: ProcessCluster, expected: pd.DataFrame
) -> None:
    job = make(impatient, 'Fault("freeze", ids=range(11000, 11001), seconds=10**5)', partition_timeout=12)
    driver = job.start()
    assert driver.end(240).status == "SUCCEEDED_WITH_WARNINGS"
    job.assert_all_but_rejected(expected, ids=range(11000, 11001), reason="timeout:PartitionTimeout", at_most=1)
    isolated = [event for event in driver.seen.outcomes("retry") if "isolated" in event.reason]
    assert len({event.partition for event in isolated}) == 1, "an innocent partition was isolated"
