"""Partial success at the command line: bad rows, warnings, a retry that is killed, and a repaired output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.testing.oracle import Lake, make_lake, oracle

pytestmark = pytest.mark.slow
JOB = "repair-1"
STEPS = """
import sys
import time
from pathlib import Path

GATE = Path(__file__).with_name("gate")


def build(frame):
    if (frame["id"] % 100 == 13).any():
        raise ValueError("unlucky row")
    return frame


def repaired(frame):
    while "pipeline.execution.clusters.worker_setup" in sys.modules and GATE.exists():
        Path(__file__).with_name("waiting").touch()
        time.sleep(0.02)
    return frame
"""


@pytest.fixture(scope="module")
def uneven_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("repair") / "lake", rows=(4000, 700, 3000), row_group=1000)


class Place:
    """A folder with a job spec, in which commands are run."""

    def __init__(self, folder: Path, uneven_lake: Lake, model: Path, *, max_fraction: float) -> None:
        self.folder = folder
        (folder / "repairing.py").write_text(STEPS)
        spec = {
            "name": "repair",
            "source": {"path": str(uneven_lake.path)},
            "steps": [{"map": "repairing:build"}, {"score": {"model": str(model)}}],
            "sink": {"path": "out"},
            "errors": {"max_fraction": max_fraction},
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(spec))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        root = str(Path(__file__).parents[2])
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments, "--json"],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": root, "DASK_PIPELINE__WORKERS": "1", "DASK_PIPELINE__THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, err
        found: dict[str, Any] = json.loads(out)
        return found

    def output(self) -> pd.DataFrame:
        files = sorted((self.folder / "out").glob("*.parquet"))
        frame: pd.DataFrame = pd.concat([pq.read_table(file).to_pandas() for file in files])
        return frame.sort_values("id", ignore_index=True)


def test_warnings_a_killed_retry_and_a_repaired_output(tmp_path: Path, uneven_lake: Lake, model_path: Path) -> None:
    place, expected = Place(tmp_path, uneven_lake, model_path, max_fraction=0.02), oracle(uneven_lake.files, model_path)
    unlucky = expected["id"] % 100 == 13
    assert place.run("run", "job.yaml", "--job", JOB, "--strict", code=3)["status"] == "SUCCEEDED_WITH_WARNINGS"
    left = place.run("rejects", JOB, "--export", "left.parquet")
    assert left["total"] == left["exported"]["rows"] == int(unlucky.sum())
    before = place.output()
    pd.testing.assert_frame_equal(before, expected[~unlucky].reset_index(drop=True))

    (tmp_path / "gate").touch()
    process = place.start("retry", JOB, "--set", "steps.0.map=repairing:repaired")
    while not (tmp_path / "waiting").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    (tmp_path / "gate").unlink()
    pd.testing.assert_frame_equal(place.output(), before)
    status = place.run("status", JOB)
    assert (status["status"], status["published"], status["rows"]["rejected"]) == ("RUNNING", 1, int(unlucky.sum()))

    repaired = place.run("retry", JOB)
    assert (repaired["status"], repaired["rows"]["out"], repaired["published"]) == ("SUCCEEDED", len(expected), 2)
    assert [(one["retried"], one["recovered"]) for one in repaired["rounds"]] == [(int(unlucky.sum()),) * 2]
    pd.testing.assert_frame_equal(place.output(), expected)
    assert place.run("verify", JOB)["ok"]
    assert place.run("rejects", JOB)["total"] == 0
    assert place.run("gc", JOB, "--yes")["removed"]
    assert place.run("verify", JOB)["ok"]


@pytest.mark.fault(21)
def test_poison_with_no_tolerance_is_named_and_repaired(tmp_path: Path, uneven_lake: Lake, model_path: Path) -> None:
    """Rows that end their process: with ``errors.max_fraction: 0`` nothing is published before a repaired step."""
    place, expected = Place(tmp_path, uneven_lake, model_path, max_fraction=0.0), oracle(uneven_lake.files, model_path)
    poison = (
        "\n\ndef crash(frame):\n"
        "    if (frame['id'] == 4500).any():\n"
        "        import os\n        os.kill(os.getpid(), 11)\n"
        "    return frame\n"
    )
    (tmp_path / "repairing.py").write_text(STEPS + poison)
    failed = place.run("run", "job.yaml", "--job", JOB, "--set", "steps.0.map=repairing:crash", code=5)
    assert failed["status"] == "FAILED"
    assert failed["reasons"] == {"crash:SIGSEGV": 1}
    assert not (tmp_path / "out").exists()
    (group,) = place.run("rejects", JOB)["groups"]
    (example,) = group["examples"]
    assert (example["values"]["id"], example["row"], Path(example["file"]).name) == (4500, 500, "part-001.parquet")
    repaired = place.run("retry", JOB, "--set", "steps.0.map=repairing:repaired")
    assert (repaired["status"], repaired["published"]) == ("SUCCEEDED", 1)
    pd.testing.assert_frame_equal(place.output(), expected)
    assert place.run("verify", JOB)["ok"]
