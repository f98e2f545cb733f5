"""Driver and workers of a job with checkpoints are killed in each of its stages: what was done is not done again."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
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
from pipeline.testing.processes import ProcessCluster, send, start_command

STEPS = '''
from pathlib import Path


def _count(name, frame):
    with open(Path({folder!r}) / name, "a") as file:
        file.write(f"{{int(frame['id'].iloc[0])}}\\n")
    for _ in range(6):
        frame.sort_values(["name", "balance"])
    return frame.assign(tenure=frame["tenure"])


def first(frame):
    """Leaves the first id of each batch behind, and takes a while, so that a kill has something to interrupt."""
    return _count("first.txt", frame)


def second(frame):
    """The same for the second stage."""
    return _count("second.txt", frame)
'''
MOMENTS = {
    "in the first stage": "steps/0/rounds/0/receipts/*.json",
    "between two stages": "steps/0/manifests/*.json",
    "in the second stage": "steps/2-*/rounds/0/receipts/*.json",
    "in the last stage": "steps/4-*/rounds/0/receipts/*.json",
    "after the commit": "manifests/*.json",
}
SAMPLE = ["in the first stage", "between two stages", "in the last stage"]


@pytest.fixture(scope="module")
def big_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("kill") / "lake", rows=(20_000, 4_000, 16_000), row_group=4000)


@pytest.fixture(scope="module")
def expected(big_lake: Lake, model_path: Path) -> pd.DataFrame:
    return oracle(big_lake.files, model_path)


def write_job(folder: Path, lake: Lake, model: Path, cluster: str) -> Path:
    (folder / "staged_steps.py").write_text(STEPS.format(folder=str(folder)))
    spec = {
        "name": "staged",
        "source": {"path": str(lake.path)},
        "steps": [
            {"map": "staged_steps:first"},
            {"checkpoint": {"partition_bytes": "400 KiB"}},
            {"map": "staged_steps:second"},
            {"checkpoint": {"partition_bytes": "400 KiB"}},
            {"score": {"model": str(model)}},
        ],
        "sink": {"path": str(folder / "out")},
        "cluster": cluster,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))
    return folder / ".pipeline/jobs/staged-1"


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    while not condition():
        assert process.poll() is None, f"the driver ended before it could be killed: {process.communicate()}"
        time.sleep(0.002)


def attempts(job: Path) -> dict[str, str]:
    """The attempt of each receipt, by the path of the receipt in the job directory."""
    paths = job.glob("steps/*/rounds/0/receipts/*.json")
    return {str(path.relative_to(job)): json.loads(path.read_text())["attempt"] for path in paths}


def calls(folder: Path, name: str) -> Counter[int]:
    path = folder / f"{name}.txt"
    return Counter(map(int, path.read_text().split())) if path.exists() else Counter()


def finish(folder: Path, *arguments: str) -> dict[str, Any]:
    process = start_command(folder, *arguments, "--json")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    result: dict[str, Any] = json.loads(out)
    return result


def assert_whole(folder: Path, job: Path, expected: pd.DataFrame) -> None:
    files = sorted((folder / "out").glob("*.parquet"))
    out = pd.concat([pq.read_table(file).to_pandas() for file in files], ignore_index=True)
    pd.testing.assert_frame_equal(out.sort_values("id", ignore_index=True), expected, check_exact=True)
    proof = verify(JobDirectory.open(job))
    assert proof.ok, proof


@pytest.mark.slow
@pytest.mark.parametrize("moment", SAMPLE if choose(1, of=2) == 1 else list(MOMENTS))
@pytest.mark.fault(8)
def test_a_driver_killed_in_a_stage_repeats_nothing(
    moment: str,
    process_cluster: ProcessCluster,
    big_lake: Lake,
    model_path: Path,
    expected: pd.DataFrame,
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path, big_lake, model_path, process_cluster.address)
    process = start_command(tmp_path, "run", "job.yaml", "--job", "staged-1")
    count = 3 if "receipts" in MOMENTS[moment] else 1
    wait_for(lambda: len(list(job.glob(MOMENTS[moment]))) >= count, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before, called = attempts(job), calls(tmp_path, "first")
    is_sealed = (job / "steps/0/manifests/1.json").exists()
    # On a cluster of another size.
    result = finish(tmp_path, "resume", "staged-1", "--cluster", "local", "--workers", "1")
    assert (result["status"], result["rows"]["out"]) == ("SUCCEEDED", len(expected))
    after = attempts(job)
    assert {name: after[name] for name in before} == before
    if is_sealed:
        assert calls(tmp_path, "first") == called, "a sealed stage was run again"
    assert len(list(job.glob("steps/*"))) == 3
    assert_whole(tmp_path, job, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["in the second stage", "in the first stage", "in the last stage"][: choose(1, of=3)]
)
@pytest.mark.fault(1)
def test_workers_killed_in_a_stage_lose_no_row(
    moment: str, big_lake: Lake, model_path: Path, expected: pd.DataFrame, tmp_path: Path
) -> None:
    with ProcessCluster(tmp_path / "cluster", import_paths=[str(tmp_path)]) as cluster:
        job = write_job(tmp_path, big_lake, model_path, cluster.address)
        process = start_command(tmp_path, "run", "job.yaml", "--job", "staged-1")
        wait_for(lambda: len(list(job.glob(MOMENTS[moment]))) >= 2, process)
        before = attempts(job)
        send(signal.SIGKILL, *cluster.worker_pids())
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
    after = attempts(job)
    assert {name: after[name] for name in before} == before
    assert_whole(tmp_path, job, expected)
