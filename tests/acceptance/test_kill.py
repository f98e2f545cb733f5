"""The driver is killed with SIGKILL at seeded moments; resume finishes the job, and every row is there once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.jobs.directory import JobDirectory
from pipeline.report.verify import verify
from pipeline.testing.examples import choose
from pipeline.testing.oracle import Lake, make_lake, oracle
from pipeline.testing.processes import ProcessCluster, start_command

STEP = '''
import os
from pathlib import Path

CALLS = Path({calls!r})


def build(frame):
    """Leaves the first id of each batch behind, and takes a while, so that a kill has something to interrupt."""
    with open(CALLS, "a") as file:
        file.write(f"{{int(frame['id'].iloc[0])}}\\n")
    for _ in range(6):
        frame.sort_values(["name", "balance"])
    return frame.assign(tenure=frame["tenure"])
'''


@pytest.fixture(scope="module")
def big_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("kill") / "lake", rows=(30_000, 6_000, 30_000, 4_000), row_group=5000)


@pytest.fixture(scope="module")
def expected(big_lake: Lake, model_path: Path) -> pd.DataFrame:
    return oracle(big_lake.files, model_path)


def write_job(folder: Path, lake: Lake, model: Path, cluster: str) -> None:
    (folder / "slow_step.py").write_text(STEP.format(calls=str(folder / "calls.txt")))
    spec = {
        "name": "killed",
        "source": {"path": str(lake.path)},
        "steps": [{"map": "slow_step:build"}, {"score": {"model": str(model)}}],
        "sink": {"path": str(folder / "out")},
        "cluster": cluster,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))


def moments(seed: int, job: Path) -> Callable[[], bool]:
    """The condition at which the driver of this seed is killed."""
    chance = random.Random(seed)
    kind = seed % 5
    wanted = chance.randint(1, 7)
    if kind == 0:
        return (job / ("plan.parquet", "spec.yaml", "job.json")[seed // 5 % 3]).exists
    if kind == 4:
        return lambda: any((job / "manifests").glob("*.json"))
    return lambda: len(list((job / "rounds/0/receipts").glob("*.json"))) >= wanted


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Poll until it holds; False when the process ended before."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def receipts(job: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (job / "rounds/0/receipts").glob("*.json")]
    return {one["partition"]: one for one in found}


def finish(folder: Path, *arguments: str) -> dict[str, Any]:
    process = start_command(folder, *arguments, "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    result: dict[str, Any] = json.loads(out)
    return result


def assert_whole(folder: Path, expected: pd.DataFrame) -> None:
    files = sorted((folder / "out").glob("*.parquet"))
    out = pd.concat([pq.read_table(file).to_pandas() for file in files], ignore_index=True)
    pd.testing.assert_frame_equal(out, expected, check_exact=True)


def calls(folder: Path) -> list[int]:
    """First id of every batch that the step was called with so far."""
    path = folder / "calls.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def is_done(identity: int, before: dict[str, dict[str, Any]], lake: Lake) -> bool:
    """Return True if the row with that id belongs to a partition that had its receipt."""
    sizes = [pq.read_metadata(file).num_rows for file in lake.files]
    offsets = {str(file): sum(sizes[:number]) for number, file in enumerate(lake.files)}
    ranges = [(offsets[path], start, stop) for one in before.values() for path, start, stop, _ in one["files"]]
    return any(offset + start <= identity < offset + stop for offset, start, stop in ranges)


def check(folder: Path, seed: int, expected: pd.DataFrame, lake: Lake) -> None:
    job = folder / ".pipeline/jobs/killed-1"
    process = start_command(folder, "run", "job.yaml", "--job", "killed-1")
    assert wait_for(moments(seed, job), process), "the driver ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = receipts(job)
    calls_before = len(calls(folder))
    if (job / "job.json").exists():
        result = finish(folder, "resume", "killed-1")
        again = [first for first in calls(folder)[calls_before:] if is_done(first, before, lake)]
        assert not again, "a batch of a partition that was done was scored again"
    else:
        result = finish(folder, "run", "job.yaml", "--job", "killed-1")
    assert result["status"] == "SUCCEEDED"
    assert result["rows"] == {"in": len(expected), "out": len(expected), "rejected": 0, "filtered": 0}
    assert_whole(folder, expected)
    after = receipts(job)
    assert {name: after[name]["attempt"] for name in before} == {name: one["attempt"] for name, one in before.items()}
    proof = verify(JobDirectory.open(job))
    assert proof.ok, proof.checks


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(choose(6, of=16)))
@pytest.mark.fault(8)
def test_a_killed_driver_loses_no_row(
    seed: int,
    process_cluster: ProcessCluster,
    big_lake: Lake,
    model_path: Path,
    expected: pd.DataFrame,
    tmp_path: Path,
) -> None:
    write_job(tmp_path, big_lake, model_path, process_cluster.address)
    check(tmp_path, seed, expected, big_lake)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16, 16 + choose(2, of=4)))
@pytest.mark.fault(8)
def test_a_killed_driver_with_its_own_workers_loses_no_row(
    seed: int, big_lake: Lake, model_path: Path, expected: pd.DataFrame, tmp_path: Path
) -> None:
    write_job(tmp_path, big_lake, model_path, "local")
    check(tmp_path, seed, expected, big_lake)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.fault(10)
def test_signal_drains_and_shows_how_to_resume(
    number: signal.Signals, code: int, big_lake: Lake, model_path: Path, expected: pd.DataFrame, tmp_path: Path
) -> None:
    write_job(tmp_path, big_lake, model_path, "local")
    job = tmp_path / ".pipeline/jobs/killed-1"
    process = start_command(tmp_path, "run", "job.yaml", "--job", "killed-1")
    assert wait_for(lambda: len(receipts(job)) >= 1, process), process.communicate()
    # To the whole group, as a terminal does.
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "python -m pipeline resume killed-1" in err
    assert finish(tmp_path, "status", "killed-1")["status"] == "INTERRUPTED"
    assert not (tmp_path / "out").exists()
    before = receipts(job)
    assert finish(tmp_path, "resume", "killed-1")["status"] == "SUCCEEDED"
    assert {name: receipts(job)[name]["attempt"] for name in before} == {n: one["attempt"] for n, one in before.items()}
    assert_whole(tmp_path, expected)
