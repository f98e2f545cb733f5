"""A step that ends the process, or fails on workers only, through the real command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.testing.oracle import make_table, train_model
from pipeline.testing.processes import python_path

SPEC = """
name: j
source: {path: lake/}
steps:
  - map: features:build
  - score: {model: model.ubj, output: s}
sink: {path: out/}
"""
IN_WORKER = "import multiprocessing\nIS_WORKER = multiprocessing.current_process().name != 'MainProcess'\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "lake").mkdir()
    pq.write_table(make_table(60, seed=1), tmp_path / "lake" / "a.parquet")
    train_model(tmp_path / "model.ubj", rounds=2)
    (tmp_path / "job.yaml").write_text(SPEC)
    return tmp_path


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.fault(78)
@pytest.mark.parametrize("name", ["validate", "plan", "run", "submit"])
def test_exit_at_import_is_an_error(folder: Path, name: str) -> None:
    """A feature script with an unguarded main part: a scheduler must not take the job for a success."""
    (folder / "features.py").write_text("import sys\ndef build(frame): return frame\nsys.exit(0)\n")
    done = command(folder, name, "job.yaml")
    assert done.returncode == 5
    assert "the module of a step ends the process when it is imported" in done.stdout + done.stderr
    assert not (folder / "out").exists()


@pytest.mark.fault(78)
def test_exit_in_the_step_is_an_error(folder: Path) -> None:
    (folder / "features.py").write_text("import sys\ndef build(frame): sys.exit(0)\n")
    done = command(folder, "plan", "job.yaml")
    assert done.returncode == 5
    assert "SystemExit: 0" in done.stderr


def test_failure_on_a_worker_shows_no_traceback_of_dask(folder: Path) -> None:
    (folder / "features.py").write_text(f"{IN_WORKER}def build(frame): return None if IS_WORKER else frame\n")
    done = command(folder, "run", "job.yaml", "--quiet", "--workers", "1", "--threads", "1")
    assert done.returncode == 5
    assert "a step must return a DataFrame" in done.stderr
    assert "Compute Failed" not in done.stderr
    assert "Traceback" not in done.stderr
