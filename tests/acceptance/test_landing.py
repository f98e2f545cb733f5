"""A real server is killed repeatedly while a file arrives every second: each file is scored once.

``PIPELINE_LANDING_SECONDS=600 python -m pytest tests/acceptance/test_landing.py`` is the long form of it: ten minutes,
with a kill every twenty seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.scoring.isolated_process import die_with_parent
from pipeline.service.triggers.log import open_log
from pipeline.testing.encryption import write_encrypted_columns
from pipeline.testing.oracle import make_table, oracle
from pipeline.testing.processes import ProcessCluster, wait_until

SECONDS = float(os.environ.get("PIPELINE_LANDING_SECONDS", "16"))
KILL_EVERY = 20.0 if SECONDS >= 120 else 5.0
ROWS = 40
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ProcessCluster(tmp_path_factory.mktemp("cluster"), workers=1) as cluster:
        yield cluster.address


class Server:
    """``python -m pipeline serve``, in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kills = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self.folder / "serve.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline", "serve", "--every", "0.3"],
                cwd=self.folder,
                env=ENVIRONMENT,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # So that nothing is left when the tests themselves are killed.
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )

    def kill(self) -> None:
        """End it like a power switch would, and start it again."""
        assert self.process.poll() is None, (self.folder / "serve.log").read_text()[-2000:]
        self.end(signal.SIGKILL)
        self.kills += 1
        self.process = self._start()

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(60)


def drop(folder: Path, number: int) -> Path:
    """One more file, which comes there whole."""
    path = folder / f"landing/{number:05d}.parquet"
    unfinished = folder / "landing/.unfinished"
    pq.write_table(make_table(ROWS, seed=number, start=number * ROWS), unfinished)
    unfinished.rename(path)
    return path


def write_job(folder: Path, model: Path, cluster: str) -> None:
    """Write a job spec, and a trigger that runs it on each file that arrives."""
    (folder / "job.yaml").write_text(
        "name: landing\nsource: {path: landing/}\n"
        f"steps:\n  - score: {{model: {model}, output: churn}}\nsink: {{path: scored/, mode: append}}\n"
        f"cluster: {cluster}\n"
    )
    (folder / "triggers.yaml").write_text(
        "triggers:\n"
        "  - {name: files, job: job.yaml, overlap: forbid, arrival: {path: landing/, quiet: 0.5 s, files: 1}}\n"
    )


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 2 + 1200)
def test_each_file_is_scored_once(tmp_path: Path, model_path: Path, cluster: str) -> None:
    (tmp_path / "landing").mkdir()
    write_job(tmp_path, model_path, cluster)
    server, files = Server(tmp_path), []
    begin = last_kill = time.monotonic()
    while time.monotonic() - begin < SECONDS:
        files.append(drop(tmp_path, len(files)))
        if time.monotonic() - last_kill > KILL_EVERY:
            server.kill()
            last_kill = time.monotonic()
        due = begin + len(files)
        wait_until(lambda due=due: time.monotonic() >= due, seconds=60)
    log = open_log(tmp_path / ".pipeline/jobs", "files")

    def is_done() -> bool:
        state = log.read()
        return len(state.seen) == len(files) and not state.open

    try:
        wait_until(is_done, seconds=600 + SECONDS, what=(tmp_path / "serve.log").read_text()[-3000:])
    finally:
        server.end()
    state = log.read()
    assert {past.status for past in state.recent} == {"SUCCEEDED"}
    assert server.kills >= SECONDS // (KILL_EVERY + 3)
    published = json.loads((tmp_path / "scored/_manifest.json").read_text())["publications"]
    names = [file["name"] for one in published for file in one["files"]]
    found = pd.concat([pq.read_table(tmp_path / "scored" / name).to_pandas() for name in names], ignore_index=True)
    expected = oracle(files, model_path, output="churn")
    found = found.sort_values("id", ignore_index=True)
    assert found["id"].tolist() == expected["id"].tolist(), "a row is missing, or there twice"
    assert found["churn"].tolist() == expected["churn"].tolist()
    print(f"{len(files)} files in {len(published)} jobs, the server was killed {server.kills} times")


@pytest.mark.fault(92)
def test_encrypted_file_keeps_no_good_file_from_being_scored(in_folder: Path, model_path: Path, cluster: str) -> None:
    """Reading the metadata of an encrypted column ends a process: the server names the file, and goes on."""
    pytest.importorskip("pyarrow.parquet.encryption")
    (in_folder / "landing").mkdir()
    good = drop(in_folder, 0)
    write_encrypted_columns(in_folder / "landing/encrypted.parquet")
    write_job(in_folder, model_path, cluster)

    def serve() -> None:
        command = [sys.executable, "-m", "pipeline", "serve", "--once", "--wait"]
        ended = subprocess.run(
            command, cwd=in_folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr

    log = open_log(in_folder / ".pipeline/jobs", "files")
    for _ in range(20):  # until the files are quiet, and the jobs of the round before are recorded
        serve()
        if len(log.read().recent) == 2:
            break
    past = {one.status: one for one in log.read().recent}
    assert set(past) == {"SUCCEEDED", "REFUSED"}
    assert "encrypted.parquet" in past["REFUSED"].reason
    assert "is encrypted" in past["REFUSED"].reason
    (publication,) = json.loads((in_folder / "scored/_manifest.json").read_text())["publications"]
    names = [file["name"] for file in publication["files"]]
    found = pd.concat([pq.read_table(in_folder / "scored" / name).to_pandas() for name in names])
    assert found["churn"].tolist() == oracle([good], model_path, output="churn")["churn"].tolist()
