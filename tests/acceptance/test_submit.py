"""Submitted jobs without a terminal: servers come and go, and the job ends correctly, visible all the time."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import identify, is_process
from pipeline.jobs.refusals import FOLDER
from pipeline.report.verify import verify
from pipeline.service.queue import find_starts
from pipeline.testing.examples import choose
from pipeline.testing.oracle import Lake, make_lake, oracle
from pipeline.testing.processes import wait_until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SUBMITTERS = choose(4, of=8)
STEP = '''
import sys
import time
from pathlib import Path

WORKER = "pipeline.execution.clusters.worker_setup"
GATE = Path({gate!r})
FIRST = Path({first!r})


def build(frame):
    """The first file that is scored passes, others wait for the test; not on the driver, which tries a sample."""
    number = str(int(frame["id"].iloc[0]) // 5000)
    if WORKER in sys.modules:
        if not FIRST.exists():
            FIRST.write_text(number)
        while FIRST.read_text() != number and not GATE.exists():
            time.sleep(0.02)
    return frame.assign(tenure=frame["tenure"])
'''
CLUSTER = """
import sys
from pipeline.execution.clusters.local import LocalProcesses
from pipeline.settings import Settings

if __name__ == "__main__":
    with LocalProcesses(Settings.load(workers=1, threads=1, memory_limit="2 GiB")).open() as client:
        print(client.scheduler.address, flush=True)
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def small_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("walk") / "lake", rows=(5_000, 5_000, 5_000, 5_000), row_group=1000)


@pytest.fixture(scope="module")
def expected(small_lake: Lake, model_path: Path) -> pd.DataFrame:
    return oracle(small_lake.files, model_path)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A scheduler and a worker that outlive drivers, and cost their start once."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "cluster.py").write_text(CLUSTER)
    process = subprocess.Popen(
        [sys.executable, "cluster.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    assert process.stdin is not None
    process.stdin.close()
    process.wait(30)
    process.stdout.close()


class Place:
    """A folder with a job spec whose partitions wait at a gate, and the processes that were started in it."""

    def __init__(self, folder: Path, *, lake: Lake, model: Path, cluster: str) -> None:
        self.folder = folder
        self.root = folder / ".pipeline/jobs"
        self.processes: list[subprocess.Popen[str]] = []
        # Workers outlive a test, and keep the modules they have imported.
        module = f"gated_{folder.name}".replace("-", "_")
        spec = {
            "name": "walk",
            "source": {"path": str(lake.path)},
            "steps": [{"map": f"{module}:build"}, {"score": {"model": str(model)}}],
            "sink": {"path": str(folder / "out")},
            "cluster": cluster,
        }
        (folder / f"{module}.py").write_text(STEP.format(gate=str(folder / "gate"), first=str(folder / "first")))
        (folder / "job.yaml").write_text(yaml.safe_dump(spec))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def call(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=180)
        assert process.returncode == code, err
        return out

    def open_gate(self) -> None:
        (self.folder / "gate").touch()

    def job(self, job: str) -> JobDirectory:
        return JobDirectory.open(self.root / job)

    def drivers(self, job: str) -> list[int]:
        """Process numbers of the drivers that are there."""
        starts = find_starts(self.job(job).store)
        return [start.pid for start in starts if start.process and is_process(start.process, start.pid)]

    def is_served(self, pid: int) -> bool:
        """Return True if the server with that process number has given a sign of life."""
        servers = json.loads(self.call("serve", "--status", "--json"))["servers"]
        return any(one["alive"] and one["pid"] == pid for one in servers)

    def assert_whole(self, expected: pd.DataFrame) -> None:
        files = sorted((self.folder / "out").glob("*.parquet"))
        out = pd.concat([pq.read_table(file).to_pandas() for file in files], ignore_index=True)
        pd.testing.assert_frame_equal(out, expected, check_exact=True)

    def stop(self) -> None:
        self.open_gate()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        for folder in self.root.glob("*/starts"):
            for pid in self.drivers(folder.parent.name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def place(tmp_path: Path, small_lake: Lake, model_path: Path, cluster: str) -> Iterator[Place]:
    place = Place(tmp_path, lake=small_lake, model=model_path, cluster=cluster)
    yield place
    place.stop()


class Watchers(threading.Thread):
    """Asks for ``status`` and ``logs`` again and again, as a person would, and notes every answer."""

    def __init__(self, place: Place, job: str) -> None:
        super().__init__(daemon=True)
        self.place, self.job = place, job
        self.is_over = threading.Event()
        self.statuses: list[str] = []
        self.failures: list[str] = []
        self.longest_log = 0

    def run(self) -> None:
        while not self.is_over.is_set():
            for command in ("status", "logs"):
                done = subprocess.run(
                    [sys.executable, "-m", "pipeline", command, self.job, "--json"],
                    cwd=self.place.folder,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode != 0:
                    self.failures.append(f"{command}: {done.returncode}: {done.stderr}")
                    continue
                answer = json.loads(done.stdout)
                if command == "status":
                    self.statuses.append(answer["status"])
                else:
                    self.longest_log = max(self.longest_log, len(answer["lines"]))


TERMINAL = """
set -e
{python} -m pipeline submit job.yaml > submitted.txt
# What a person does next in that terminal, in its process group.
{python} -m pipeline watch @last > watched.txt 2>&1
"""


def test_the_terminal_is_killed_and_the_server_is_rebooted_twice(place: Place, expected: pd.DataFrame) -> None:
    server = place.start("serve", "--every", "0.2")
    terminal = subprocess.Popen(
        ["/bin/sh", "-c", TERMINAL.format(python=sys.executable)],
        cwd=place.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    told = place.folder / "submitted.txt"
    wait_until(lambda: told.exists() and told.read_text().endswith("\n"), seconds=120, what="nothing was submitted")
    job_id = told.read_text().strip()
    wait_until(lambda: place.drivers(job_id), what="no driver was started")
    (driver,) = place.drivers(job_id)
    os.killpg(terminal.pid, signal.SIGKILL)
    terminal.wait(30)
    assert os.getsid(driver) == driver, "it has a session of its own"
    os.kill(driver, signal.SIGHUP)

    watchers = Watchers(place, job_id)
    watchers.start()
    job = place.job(job_id)
    wait_until(job.receipts.all, seconds=120, what="no partition was done")

    # First reboot of the server: it is killed, the driver is not.
    os.kill(server.pid, signal.SIGKILL)
    server = place.start("serve", "--every", "0.2")
    wait_until(lambda: place.is_served(server.pid), what="no server")
    assert place.drivers(job_id) == [driver], [job.events.read(), find_starts(job.store)]

    # The second takes the driver with it, as a machine that loses its power does.
    os.kill(server.pid, signal.SIGKILL)
    os.kill(driver, signal.SIGKILL)
    before = {receipt.partition: receipt.attempt for receipt in job.receipts.all()}
    place.start("serve", "--every", "0.2")
    wait_until(lambda: [pid for pid in place.drivers(job_id) if pid != driver], seconds=120, what="nobody took it over")
    wait_until(lambda: len(watchers.statuses) >= 2, seconds=120, what="status answered less than twice")
    place.open_gate()
    report = json.loads(place.call("wait", job_id, "--json"))
    watchers.is_over.set()
    watchers.join(60)

    assert report["status"] == "SUCCEEDED"
    place.assert_whole(expected)
    after = {receipt.partition: receipt.attempt for receipt in job.receipts.all()}
    assert before.items() <= after.items(), "what was done was done again"
    assert watchers.failures == []
    assert len(watchers.statuses) >= 2
    assert set(watchers.statuses) <= {"QUEUED", "PROVISIONING", "RUNNING", "PUBLISHING", "SUCCEEDED"}
    assert watchers.longest_log >= 3
    assert next(start.by for start in find_starts(job.store)) == "submit"
    assert len(find_starts(job.store)) == 2
    assert verify(job).ok


@pytest.mark.fault(13)
def test_all_that_submit_the_same_at_once_get_one_job(place: Place, expected: pd.DataFrame) -> None:
    place.open_gate()
    racing = [place.start("submit", "job.yaml") for _ in range(SUBMITTERS)]
    answers = [process.communicate(timeout=300) for process in racing]
    assert [process.returncode for process in racing] == [0] * SUBMITTERS, answers
    ids = {out.strip() for out, _ in answers}
    assert len(ids) == 1
    (job_id,) = ids
    place.call("wait", job_id)
    assert [path.name for path in place.root.iterdir() if not path.name.startswith(".")] == [job_id]
    assert len(find_starts(place.job(job_id).store)) == 1
    assert os.listdir(place.root / job_id / "manifests") == ["1.json"]
    place.assert_whole(expected)


@pytest.mark.parametrize("options", [[], ["--now"]])
def test_cancelled_job_publishes_nothing_until_resumed(
    place: Place, expected: pd.DataFrame, options: list[str]
) -> None:
    job_id = place.call("submit", "job.yaml").strip()
    job = place.job(job_id)
    wait_until(job.receipts.all, seconds=120, what="no partition was done")
    asked = json.loads(place.call("cancel", job_id, *options, "--reason", "wrong month", "--json"))
    # With --now it may have stopped before the command had looked whether there is a driver.
    assert asked["outcome"] in ("asked", "cancelled"), place.call("logs", job_id)
    if not options:
        place.open_gate()
    out = place.call("wait", job_id, code=8)
    assert out.startswith("CANCELLED")
    assert not (place.folder / "out").exists()
    assert "wrong month" in place.call("logs", job_id, "--errors")
    assert json.loads(place.call("serve", "--once", "--json"))["started"] == []
    place.open_gate()
    place.call("resume", job_id)
    place.assert_whole(expected)


def test_submit_refuses_like_run(place: Place) -> None:
    bad = ["--set", "source.path=nowhere/"]
    # The message lists the folder, where the first of both would make it.
    place.root.mkdir(parents=True)
    ran, submitted = (place.start(command, "job.yaml", *bad) for command in ("run", "submit"))
    said = [process.communicate(timeout=120) for process in (ran, submitted)]
    assert (ran.returncode, submitted.returncode) == (4, 4)
    assert said[0] == said[1]
    # No job; only that it was refused.
    assert [path.name for path in place.root.iterdir()] == [FOLDER]


def test_watch_follows_and_ends_as_the_job_does(place: Place) -> None:
    job_id = place.call("submit", "job.yaml", "--set", "steps.1.score.model=" + str(place.folder / "m.ubj"), code=5)
    assert job_id == ""
    job_id = place.call("submit", "job.yaml").strip()
    watch = place.start("watch", job_id)
    follow = place.start("logs", job_id, "-f", "--json")
    (driver,) = wait_until(lambda: place.drivers(job_id))
    wait_until(place.job(job_id).receipts.all, seconds=120)
    assert identify(driver)
    os.kill(driver, signal.SIGTERM)
    wait_until(lambda: "no more partitions are started" in place.call("logs", job_id), what="no answer to SIGTERM")
    # What runs waits at the gate: only a second signal ends the driver now, unless nothing ran.
    with suppress(ProcessLookupError):
        os.kill(driver, signal.SIGTERM)
    out, err = watch.communicate(timeout=120)
    assert watch.returncode == 143, err
    place.open_gate()
    assert out.startswith("INTERRUPTED")
    assert "partitions" in err
    lines = [json.loads(line) for line in follow.communicate(timeout=60)[0].splitlines()]
    assert follow.returncode == 0
    assert any(line["message"].startswith("INTERRUPTED") for line in lines)


def test_two_servers_run_each_job_once_the_most_urgent_first_and_one_at_a_time(place: Place) -> None:
    place.open_gate()
    ids = [
        place.call(
            "submit", "job.yaml", "--queue", "--priority", str(number), "--set", f"sink.path=out{number}/"
        ).strip()
        for number in range(3)
    ]
    assert not any(place.drivers(job_id) for job_id in ids)
    servers = [place.start("serve", "--every", "0.2", "--jobs", "1") for _ in range(2)]
    for job_id in ids:
        place.call("wait", job_id)
    spans = []
    for job_id in reversed(ids):
        job = place.job(job_id)
        assert len(find_starts(job.store)) == 1
        assert verify(job, sample=0).ok
        drives = [event["time"] for event in job.events.read() if event["event"] == "driver"]
        assert len(drives) == 1
        spans.append((drives[0], job.events.read()[-1]["time"]))
    assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(spans)), spans
    for server in servers:
        os.kill(server.pid, signal.SIGTERM)
    assert [server.wait(60) for server in servers] == [0, 0]
    states = [one["state"] for one in json.loads(place.call("serve", "--status", "--json"))["servers"]]
    assert states == ["stopped", "stopped"]
