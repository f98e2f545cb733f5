"""Chaos over real processes: a job survives the death of any process, and a job that does not is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.testing.examples import choose
from pipeline.testing.oracle import make_lake
from pipeline.testing.processes import start_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SLOW = '''
import time


def build(frame):
    """Takes a while, so that there is something to interrupt; drops rows, and cannot do some."""
    time.sleep(0.1)
    if (frame["id"] % 5000 == 713).any():
        raise ValueError("on purpose")
    return frame[frame["id"] % 10 != 0]
'''
RANDOM = """
import numpy as np


def build(frame):
    return frame.assign(age=np.random.default_rng().integers(18, 90, len(frame)).astype("int32"))
"""


def unleash(
    folder: Path, model: Path, step: str, *flags: str, row_wise: str = "checked"
) -> tuple[int, dict[str, Any], str]:
    make_lake(folder / "lake", rows=(30_000, 4_000, 12_000), row_group=5000)
    (folder / "my_step.py").write_text(step)
    spec = {
        "name": "mine",
        "source": {"path": "lake"},
        "steps": [{"map": "my_step:build", "row_wise": row_wise}, {"score": {"model": str(model)}}],
        "sink": {"path": "out"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))
    (folder / "scratch").mkdir()
    scratch = {"TMPDIR": str(folder / "scratch")}
    process = start_command(folder, "chaos", "job.yaml", "--json", *flags, environment=scratch)
    out, err = process.communicate(timeout=1700)
    return process.returncode, json.loads(out), err


@pytest.mark.fault(1, 6, 8, 12, 15, 16)
def test_a_job_holds_whatever_is_killed_around_it(model_path: Path, tmp_path: Path) -> None:
    # A take-over and a worker; a driver. Of the rest: the scheduler; a worker by SIGTERM; lifetimes of a few seconds.
    seeds = choose(2, of=5)
    code, report, err = unleash(tmp_path, model_path, SLOW, "--seed", "0", "--seeds", str(seeds), "--rows", "33000")
    assert code == 0, (report, err)
    assert report["ok"]
    assert report["tried"] == seeds
    assert (report["lost"], report["duplicated"]) == (0, 0)
    carried_out = [one for trial in report["trials"] for one in trial["faults"] if one["seconds"] is not None]
    assert len(carried_out) >= seeds - 1, "chaos came too late each time"
    assert all(trial["rows"]["expected"] > 25_000 for trial in report["trials"])
    assert all(trial["rejects"]["expected"] > 0 for trial in report["trials"])
    assert all(trial["reads"] > 5 for trial in report["trials"])
    assert err.count("held") == seeds
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".pipeline").exists()
    assert list((tmp_path / "scratch").glob("pipeline-chaos-*")) == []


def test_a_step_that_gives_other_values_each_time_does_not_hold(model_path: Path, tmp_path: Path) -> None:
    """Planning would refuse the step, so that the job says not to check it."""
    flags = ("--seeds", "1", "--rows", "8000")
    code, report, err = unleash(tmp_path, model_path, RANDOM, *flags, row_wise="unchecked")
    assert code == 6, (report, err)
    (trial,) = report["trials"]
    assert not trial["ok"]
    assert trial["rows"]["changed"] > 1000
    assert (trial["rows"]["lost"], trial["rows"]["duplicated"]) == (0, 0)
    folder = Path(report["folder"])
    assert (folder / "seed-0/job.yaml").exists(), "what broke is kept"


def test_job_that_fails_without_faults_is_reported_at_once(model_path: Path, tmp_path: Path) -> None:
    code, report, _ = unleash(tmp_path, model_path, "def build(frame):\n    raise ValueError('never')\n")
    assert code == 5
    assert "the sample does not run" in report["error"]["message"]
    assert "never" in report["error"]["found"]
