"""A worker with other versions than the driver, in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.testing.oracle import Lake
from pipeline.testing.processes import ROOT, ProcessCluster

LIE = """
from importlib.metadata import version as real

from pipeline.execution.clusters import client as handshake

handshake.version = lambda name: "14.0.0" if name == "pyarrow" else real(name)
"""


@pytest.mark.fault(53)
@pytest.mark.slow
def test_a_worker_of_another_version_stops_the_job_before_the_first_partition(
    tmp_path: Path, lake: Lake, model_path: Path
) -> None:
    (tmp_path / "lie.py").write_text(LIE)
    spec = {
        "name": "versions",
        "source": {"path": str(lake.path)},
        "steps": [{"score": {"model": str(model_path)}}],
        "sink": {"path": str(tmp_path / "out")},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    with ProcessCluster(tmp_path / "cluster", workers=1, options=("--preload", str(tmp_path / "lie.py"))) as cluster:
        ended = subprocess.run(
            [sys.executable, "-m", "pipeline", "run", "job.yaml", "--job", "v", "--cluster", cluster.address, "--json"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert ended.returncode == 2, ended.stderr
    error = json.loads(ended.stdout)["error"]
    assert error["kind"] == "EnvMismatch"
    assert error["found"] == "pyarrow 14.0.0"
    job = tmp_path / ".pipeline" / "jobs" / "v"
    assert list(job.glob("rounds/0/receipts/*")) == []
    assert not (tmp_path / "out").exists()
