"""A job with a ``dask`` step loses workers and drivers to SIGKILL: its rows are those of pandas, and what was finished
before is not done again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InsufficientMemory, ReconciliationFailed, StepFailed
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import find_job
from pipeline.jobs.rounds import RoundReason
from pipeline.jobs.stages import stage_states
from pipeline.report.verify import verify
from pipeline.runner import resume, run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.examples import choose
from pipeline.testing.processes import start_command, wait_until

PARTITIONS = 8
STEP = '''
import os, signal
from pathlib import Path
import pandas as pd

FOLDER = Path({folder!r})
KILL_AT = {kill_at!r}


def note(part, salt):
    """Leaves a file for each call; the process dies once, when so many partitions are kept."""
    name = f"{{part['order'].min()}}-{{os.getpid()}}-{{os.urandom(4).hex()}}" if len(part) else None
    if name:
        (FOLDER / "calls" / name).touch()
    kept = len(list(FOLDER.glob("jobs/*/steps/1*/rounds/*/receipts/*")))
    dead = FOLDER / "dead"
    if KILL_AT is not None and kept >= KILL_AT and not dead.exists():
        dead.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    {body}
    return part


def history(df, customers):
    joined = df.merge(customers, on="customer")
    sums = joined.groupby("customer").agg({{"price": "sum", "order": "count"}}).reset_index()
    joined = joined.merge(sums.rename(columns={{"price": "total", "order": "orders"}}), on="customer")
    return joined.map_partitions(note, 1, meta=joined._meta)
'''


def write_tables(folder: Path, rows: int = 8000) -> None:
    """Write orders of which one customer has a quarter, and some have no customer."""
    random_ = np.random.default_rng(7)
    customers = pd.DataFrame({"customer": np.arange(300), "country": [f"c{n % 9}" for n in range(300)]})
    chosen = np.where(random_.random(rows) < 0.25, 5, random_.integers(0, 330, rows))
    orders = pd.DataFrame({"order": np.arange(rows), "customer": chosen, "price": random_.integers(1, 999, rows)})
    for name, frame in (("orders", orders), ("customers", customers)):
        (folder / name).mkdir()
        half = len(frame) // 2
        for number in range(2):
            part = pa.Table.from_pandas(frame.iloc[number * half : (number + 1) * half], preserve_index=False)
            pq.write_table(part, folder / name / f"{number}.parquet", row_group_size=500)


class Job:
    def __init__(self, folder: Path, *, kill_at: int | None = None, body: str = "") -> None:
        self.folder = folder
        write_tables(folder)
        (folder / "calls").mkdir()
        self.write(kill_at=kill_at, body=body)
        self.fields: dict[str, Any] = {
            "name": "history",
            "source": {"path": str(folder / "orders")},
            "steps": [
                {"filter": "price >= 3"},
                {
                    "dask": "joining:history",
                    "inputs": {"customers": {"path": str(folder / "customers")}},
                    "partition_bytes": 12_000,
                },
                {"select": ["order", "customer", "country", "price", "total", "orders"]},
            ],
            "sink": {"path": str(folder / "out")},
        }
        self.expected = self.made_by_pandas()
        self.settings = Settings.load(
            directory=str(folder / "jobs"),
            workers=2,
            threads=1,
            memory_limit="1 GiB",
            import_paths=[str(folder)],
            lease_seconds=3,
        )

    def made_by_pandas(self) -> pd.DataFrame:
        orders = pd.concat(pd.read_parquet(file) for file in sorted((self.folder / "orders").glob("*")))
        customers = pd.concat(pd.read_parquet(file) for file in sorted((self.folder / "customers").glob("*")))
        joined = orders[orders["price"] >= 3].merge(customers, on="customer")
        sums = joined.groupby("customer").agg(total=("price", "sum"), orders=("order", "count")).reset_index()
        made = joined.merge(sums, on="customer").sort_values("order").reset_index(drop=True)
        return made[["order", "customer", "country", "price", "total", "orders"]]

    def write(self, *, kill_at: int | None = None, body: str = "") -> None:
        text = STEP.format(folder=str(self.folder), kill_at=kill_at, body=body)
        (self.folder / "joining.py").write_text(text)

    @property
    def spec(self) -> JobSpec:
        return JobSpec.build(**self.fields)

    def job(self) -> JobDirectory:
        (name,) = [path.name for path in (self.folder / "jobs").iterdir() if not path.name.startswith(".")]
        return find_job(self.folder / "jobs", name)

    def stage(self) -> JobDirectory:
        stage = stage_states(self.job())[1].job
        assert stage is not None
        return stage

    def receipts(self) -> list[Path]:
        return list(self.folder.glob("jobs/*/steps/1*/rounds/*/receipts/*.json"))

    def computed(self) -> Counter[str]:
        return Counter(path.name.partition("-")[0] for path in (self.folder / "calls").iterdir())

    def check(self) -> None:
        rows = pq.read_table(self.folder / "out").to_pandas().sort_values("order").reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, self.expected, check_dtype=False)
        result = verify(self.job())
        assert result.ok, result

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.stage().events.read() if event["event"] == name]


def test_a_killed_worker_costs_what_it_was_computing(tmp_path):
    job = Job(tmp_path, kill_at=3)
    report = run(job.spec, settings=job.settings)
    assert (tmp_path / "dead").exists()
    job.check()
    rows = report.rows
    assert (rows.input, rows.output) == (8000, len(job.expected))
    assert rows.is_reconciled
    assert rows.made == len(job.expected) - (8000 - rows.filtered)
    (event,) = job.events("computed")
    assert event["lost_workers"] == 1
    assert event["compared"] >= 1, "a finished partition was computed again, and compared"
    times = job.computed()
    # The worker's own partition, what the other one was at, and the one that is compared.
    assert sum(times.values()) - len(times) <= 4, times
    assert not list(Path(job.stage().store.root).glob("rounds/1")), "nothing started over"


def wait_for(job: Job, receipts: int, driver: subprocess.Popen[str]) -> None:
    wait_until(lambda: len(job.receipts()) >= receipts or driver.poll() is not None)


@pytest.mark.parametrize("seed", range(choose(1, of=8)))
def test_a_killed_driver_is_resumed(tmp_path, seed):
    generator = random.Random(seed)
    job = Job(tmp_path, body="import time; time.sleep(0.3)")
    (tmp_path / "job.yaml").write_text(job.spec.to_yaml())
    for _ in range(generator.randint(1, choose(1, of=3))):
        before = len(job.receipts())
        moment = before + generator.randint(1, 3)
        known = [path.name for path in (tmp_path / "jobs").glob("history*")]
        arguments = ("resume", known[0]) if known else ("run", "job.yaml")
        options = ("--workers", "2", "--threads", "1", "--directory", str(tmp_path / "jobs"))
        driver = start_command(tmp_path, *arguments, *options, environment={"PIPELINE_LEASE_SECONDS": "3"})
        wait_for(job, moment, driver)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()
    finished = {path.stem for path in job.receipts()}
    files = {path.name for path in job.folder.glob("jobs/*/steps/1*/rounds/0/data/*")}
    calls = sum(job.computed().values())
    resume(job.job().id, settings=job.settings)
    job.check()
    ledger = job.stage().ledger()
    kept = {receipt.partition: receipt.data.name.partition("/")[2] for receipt in ledger.done if receipt.data}
    assert all(kept[partition] in files for partition in finished if partition in kept), "their files count"
    left = ledger.planned - len(finished)
    if left:
        (event,) = job.events("computed")
        assert event["compared"] == 1
        assert sum(job.computed().values()) - calls <= left + 1, "what is left, and one that is compared"


def test_a_step_that_is_not_deterministic_runs_in_one_piece(tmp_path):
    job = Job(tmp_path, kill_at=3, body="part = part.assign(total=int.from_bytes(os.urandom(3), 'big'))")
    run(job.spec, settings=job.settings)
    reasons = [round_.reason for round_ in job.stage().rounds.all()]
    assert reasons == [RoundReason.PLAN, RoundReason.NOT_DETERMINISTIC]
    assert job.events("differs")[0]["found"] == "other values in the same number of rows"
    rows = pq.read_table(tmp_path / "out").to_pandas().sort_values("order").reset_index(drop=True)
    pd.testing.assert_frame_equal(rows.drop(columns="total"), job.expected.drop(columns="total"), check_dtype=False)


def test_too_little_memory_starts_over_once_with_smaller_partitions(tmp_path):
    job = Job(tmp_path, body="import numpy; numpy.ones(1 << 27)")  # 1 GiB
    with pytest.raises(InsufficientMemory) as caught:
        run(job.spec, settings=replace(job.settings, memory_limit="600 MiB"))
    assert caught.value.where.startswith("joining:history")
    assert "most frequent values of customer: 5 in 2," in caught.value.found
    assert [round_.reason for round_ in job.stage().rounds.all()] == [RoundReason.PLAN, RoundReason.MEMORY]
    sizes = [round_.plan.dask.largest_bytes for round_ in job.stage().rounds.all() if round_.plan.dask]
    assert sizes[1] < sizes[0]


def test_an_error_of_the_step_is_final(tmp_path):
    job = Job(tmp_path, body='if FOLDER.joinpath("broken").exists(): raise ValueError("a bug in the step")')
    (tmp_path / "broken").touch()
    with pytest.raises(StepFailed, match="a dask step failed") as caught:
        run(job.spec, settings=job.settings)
    assert "ValueError: a bug in the step" in caught.value.found
    assert ", in note)" in caught.value.found, "the line of the step is named"
    (tmp_path / "broken").unlink()
    resume(job.job().id, settings=job.settings)
    job.check()


def test_lost_rows_fail_the_job(tmp_path, monkeypatch):
    from pipeline.execution import counted_shuffles

    job = Job(tmp_path)
    monkeypatch.setattr(counted_shuffles.CountShuffles, "__reduce__", lambda self: (losing_plugin, ()))
    with pytest.raises(ReconciliationFailed, match="a shuffle lost rows"):
        run(job.spec, settings=job.settings)
    assert not (tmp_path / "out").exists()


def losing_plugin():
    """Return the plugin in a worker whose messages lose rows."""
    from distributed.shuffle._shuffle import DataFrameShuffleRun

    from pipeline.execution.counted_shuffles import CountShuffles

    send = DataFrameShuffleRun.send

    async def lose(self, address, shards):
        return await send(self, address, shards[1:])

    DataFrameShuffleRun.send = lose
    return CountShuffles()
