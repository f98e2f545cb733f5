"""Run jobs whose step follows a fault table, driven from a thread, and check their rows afterwards."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from pipeline.events import Callback, PartitionEnded
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import find_job
from pipeline.report.report import Report
from pipeline.report.verify import verify
from pipeline.runner import run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import Lake
from pipeline.testing.processes import ProcessCluster, wait_until

SLOW = 'Fault("sleep", ids=range(0), seconds=0.15)'


class Seen(Callback):
    """Events that the driver emitted."""

    def __init__(self) -> None:
        self.partitions: list[PartitionEnded] = []

    def on_partition(self, event: PartitionEnded) -> None:
        self.partitions.append(event)

    def outcomes(self, outcome: str) -> list[PartitionEnded]:
        return [event for event in self.partitions if event.outcome == outcome]

    def splits(self, *reasons: str) -> list[PartitionEnded]:
        return [event for event in self.partitions if event.split_reason in reasons]


class Driver:
    """A run in a thread of its own."""

    def __init__(self, job: Job, call: Callable[..., Report], *arguments: Any) -> None:
        self.job = job
        self.seen = Seen()
        self.report: Report | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._go, args=(call, *arguments), daemon=True)
        self._thread.start()

    def _go(self, call: Callable[..., Report], *arguments: Any) -> None:
        try:
            self.report = call(*arguments, settings=self.job.settings, callbacks=(self.seen,))
        except BaseException as error:
            self.error = error

    def end(self, seconds: float = 90) -> Report:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the driver hangs"
        if self.error is not None:
            raise self.error
        assert self.report is not None
        return self.report

    def wait_receipts(self, count: int) -> None:
        folder = self.job.folder / "jobs"
        wait_until(lambda: len(list(folder.glob("*/rounds/0/receipts/*.json"))) >= count or self.error)

    def wait_attempts(self, fault: int, count: int) -> None:
        """Until the fault with that number has happened so many times."""
        wait_until(lambda: len(list((self.job.folder / "attempts").glob(f"{fault}-*"))) >= count or self.error)


class Job:
    """A job over the lake with a fault table as its step."""

    def __init__(
        self, folder: Path, lake: Lake, model: Path, cluster: ProcessCluster, faults: tuple[str, ...], **settings: Any
    ) -> None:
        self.folder, self.lake = folder, lake
        module = f"faults_{folder.name.replace('-', '_').replace('[', '_').replace(']', '_')}"
        (folder / f"{module}.py").write_text(
            "from pipeline.testing.faults import Fault, FaultTable\n"
            f"step = FaultTable({str(folder / 'attempts')!r}, ({' '.join(f'{fault},' for fault in faults)}))\n"
        )
        self.settings: Settings = Settings.load(
            directory=str(folder / "jobs"),
            cluster=cluster.address,
            import_paths=[str(folder)],
            fsync=False,
            **{
                "no_workers_timeout": 60,
                "scheduler_timeout": 30,
                "drain_timeout": 5,
                "restart_workers": True,
                **settings,
            },
        )
        self.spec = JobSpec.build(
            name="faulty",
            source={"path": str(lake.path)},
            steps=[{"map": f"{module}:step"}, {"score": {"model": str(model)}}],
            sink={"path": str(folder / "out")},
            errors={"max_fraction": 0.2},
        )

    def start(self) -> Driver:
        return Driver(self, run, self.spec)

    def directory(self) -> JobDirectory:
        return find_job(self.settings.directory, "@last")

    def out(self) -> pd.DataFrame:
        files = sorted((self.folder / "out").glob("*.parquet"))
        return pd.concat([pq.read_table(file).to_pandas() for file in files], ignore_index=True)

    def rejected(self) -> pd.DataFrame:
        job = self.directory()
        names = [receipt.rejects.name for receipt in job.receipts.all() if receipt.rejects]
        tables = [pq.read_table(job.store.url(f"rounds/0/{name}")).to_pandas() for name in names]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"id": [], "_reason": []})

    def assert_whole(self, expected: pd.DataFrame) -> None:
        pd.testing.assert_frame_equal(self.out(), expected, check_exact=True)
        proof = verify(self.directory(), sample=0)  # a sample would go through the faults again, in here
        assert proof.ok, proof.checks

    def assert_all_but_rejected(self, expected: pd.DataFrame, *, ids: range, reason: str, at_most: int) -> None:
        """Each row is scored as ever, or is rejected for that reason; those of ``ids`` are rejected."""
        rejected = self.rejected()
        assert set(rejected["_reason"]) == {reason}
        assert set(ids) <= set(rejected["id"])
        assert len(rejected) <= at_most
        assert self.directory().status() == "SUCCEEDED_WITH_WARNINGS"
        self.assert_whole(expected[~expected["id"].isin(rejected["id"])].reset_index(drop=True))


@contextmanager
def stopped(*pids: int | None) -> Iterator[None]:
    found = [pid for pid in pids if pid is not None]
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in found:
            os.kill(pid, signal.SIGCONT)


def again(job: Job) -> dict[str, Any]:
    """Settings for a run that goes on with it."""
    settings = job.settings
    return {
        "directory": settings.directory,
        "cluster": settings.cluster,
        "import_paths": list(settings.import_paths),
        "fsync": False,
        "no_workers_timeout": 60,
    }
