"""Two real drivers on one job: locked out, killed, paused and replaced, under any umask and clock."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.jobs.directory import JobDirectory
from pipeline.report.verify import verify
from pipeline.testing.oracle import Lake, make_lake, oracle
from pipeline.testing.processes import ProcessCluster, start_command

pytestmark = pytest.mark.slow
JOB = "twice-1"
STEP = '''
import sys
import time
from pathlib import Path

WORKER = "pipeline.execution.clusters.worker_setup"
GATE = Path({gate!r})


def build(frame):
    """Waits for the test, but not on the driver, which tries the step on a sample."""
    while WORKER in sys.modules and not GATE.exists():
        time.sleep(0.02)
    return frame.assign(tenure=frame["tenure"])
'''
JUMPING = """
import os, sys, time
import pipeline.jobs.record
from pipeline.cli import main

real = time.time
base = pipeline.jobs.record.datetime


class Jumping(base):
    @classmethod
    def now(cls, zone=None):
        return base.fromtimestamp(time.time(), zone)


time.time = lambda: real() + 3600 * int(sys.argv[1]) * os.path.exists("jump")
pipeline.jobs.record.datetime = Jumping
main(args=sys.argv[2:], prog_name="python -m pipeline")
"""


@pytest.fixture(scope="module")
def small_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("twice") / "lake", rows=(12_000, 2_400, 12_000, 1_600), row_group=2000)


@pytest.fixture(scope="module")
def expected(small_lake: Lake, model_path: Path) -> pd.DataFrame:
    return oracle(small_lake.files, model_path)


class Place:
    """A folder with a job whose partitions wait at a gate, and the drivers that were started in it."""

    def __init__(self, folder: Path, *, lake: Lake, model: Path, cluster: str) -> None:
        self.folder = folder
        self.job = folder / ".pipeline/jobs" / JOB
        self.drivers: list[subprocess.Popen[str]] = []
        spec = {
            "name": "twice",
            "source": {"path": str(lake.path)},
            "steps": [{"map": "gated_step:build"}, {"score": {"model": str(model)}}],
            "sink": {"path": str(folder / "out")},
            "cluster": cluster,
        }
        # Workers outlive a test, and keep the modules they have imported.
        module = f"gated_step_{folder.name}".replace("-", "_")
        spec["steps"][0] = {"map": f"{module}:build"}  # type: ignore[index]
        (folder / f"{module}.py").write_text(STEP.format(gate=str(folder / "gate")))
        (folder / "job.yaml").write_text(yaml.safe_dump(spec))
        (folder / "jumping.py").write_text(JUMPING)

    def start(self, *arguments: str, lease: float, jump: int = 0, umask: int = -1) -> subprocess.Popen[str]:
        process = start_command(
            self.folder,
            *arguments,
            program=("jumping.py", str(jump)) if jump else ("-m", "pipeline"),
            environment={"DASK_PIPELINE__LEASE_SECONDS": str(lease)},
            umask=umask,
        )
        self.drivers.append(process)
        return process

    def run(self, *, lease: float, jump: int = 0, umask: int = -1) -> subprocess.Popen[str]:
        """Start a driver, and wait until its partitions are at the gate."""
        process = self.start("run", "job.yaml", "--job", JOB, lease=lease, jump=jump, umask=umask)
        self.wait(lambda: bool(self.events("round_started")), process)
        return process

    def wait(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        while not condition():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    def open_gate(self) -> None:
        (self.folder / "gate").touch()

    def events(self, kind: str) -> list[dict[str, object]]:
        path = self.job / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for line in lines if (event := json.loads(line))["event"] == kind]

    def has_status(self, status: str) -> bool:
        return any(event["after"] == status for event in self.events("status"))

    def snapshot(self) -> dict[str, tuple[int, bytes]]:
        """Every file of the job and its output: when it was written, and its content. Each driver has a log of its own,
        in which it may say that it was fenced."""
        places = [path for top in (self.job, self.folder / "out") for path in top.rglob("*")]
        files = [path for path in places if path.is_file() and path.parent != self.job / "logs"]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    def check(self, expected: pd.DataFrame) -> None:
        """Every row is there once, of one commit, published once, and the job says so."""
        files = sorted((self.folder / "out").glob("*.parquet"))
        out = pd.concat([pq.read_table(file).to_pandas() for file in files], ignore_index=True)
        pd.testing.assert_frame_equal(out, expected, check_exact=True)
        assert os.listdir(self.job / "manifests") == ["1.json"]
        assert len(json.loads((self.folder / "out/_manifest.json").read_text())["publications"]) == 1
        assert [event["after"] for event in self.events("status")].count("SUCCEEDED") == 1
        proof = verify(JobDirectory.open(self.job), sample=0)
        assert proof.ok, proof.checks

    def stop(self) -> None:
        for process in self.drivers:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def place(tmp_path: Path, small_lake: Lake, model_path: Path, process_cluster: ProcessCluster) -> Iterator[Place]:
    place = Place(tmp_path, lake=small_lake, model=model_path, cluster=process_cluster.address)
    yield place
    place.open_gate()
    place.stop()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.fault(11, 45)
def test_a_second_driver_is_locked_out_while_clocks_jump(place: Place, expected: pd.DataFrame) -> None:
    begin = time.monotonic()
    first = place.run(lease=10, jump=1)
    (place.folder / "jump").touch()
    second = place.start("resume", JOB, lease=10, jump=-1)
    code, err = ended(second)
    assert code == 6, err
    assert "another driver runs this job" in err
    assert f"process {first.pid} on " in err
    (place.folder / "jump").unlink()
    place.open_gate()
    code, err = ended(first)
    assert code == 0, err
    place.check(expected)
    assert sorted(os.listdir(place.job / "lease")) == ["1.beat", "1.json"]
    seconds = json.loads((place.job / "report.json").read_text())["seconds"]
    # Sums over partitions, which run side by side; the clocks jump by an hour.
    assert all(0 <= value < 10 * (time.monotonic() - begin) for value in seconds.values()), seconds


@pytest.mark.fault(11, 52)
def test_drivers_that_resume_a_killed_one_at_once_converge(place: Place, expected: pd.DataFrame) -> None:
    first = place.run(lease=500, umask=0)
    os.kill(first.pid, signal.SIGKILL)
    # Nobody waits for it yet, so that it is a zombie, as below a supervisor that is slow.
    place.open_gate()
    begin = time.monotonic()
    codes = sorted(ended(process)[0] for process in [place.start("resume", JOB, lease=500, umask=0) for _ in range(2)])
    assert codes in ([0, 6], [0, 0])
    assert time.monotonic() - begin < 250, "a dead driver of this machine is not waited for"
    place.check(expected)
    assert [event["acquired"] for event in place.events("driver")] == ["free", "dead"]
    # Both ran under umask 000, and so did the workers.
    for path in [place.job, *place.job.rglob("*")]:
        status = path.lstat()
        is_published = path.parent.name == "data" and status.st_nlink > 1
        assert is_published or stat.S_IMODE(status.st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.fault(12)
def test_a_paused_driver_that_wakes_after_a_takeover_is_fenced(place: Place, expected: pd.DataFrame) -> None:
    paused = place.run(lease=1.5)
    os.kill(paused.pid, signal.SIGSTOP)
    second = place.start("resume", JOB, lease=1.5)
    place.wait(lambda: len(place.events("driver")) == 2, second)
    place.open_gate()
    code, err = ended(second)
    assert code == 0, err
    assert "this driver takes over after 1.5 s without a heartbeat" in err
    place.check(expected)
    before = place.snapshot()
    os.kill(paused.pid, signal.SIGCONT)
    code, err = ended(paused)
    assert code == 6, err
    assert "another driver has taken over this job" in err
    assert f"epoch 2, process {second.pid}" in err
    assert place.snapshot() == before
    assert [event["acquired"] for event in place.events("driver")] == ["free", "stale"]
