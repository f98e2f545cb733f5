"""Secrets are sent through every path, and searched for in everything that a run leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.common.secrets import MASK
from pipeline.execution.tasks import make_tasks
from pipeline.jobs.directory import JobDirectory
from pipeline.testing.oracle import Lake
from pipeline.testing.processes import ROOT
from pipeline.testing.s3 import S3

REFERENCED = "sentinel-referenced-4f1c"
"""Only the job spec says that the variable with it holds a secret."""
NAMED = "sentinel/named+by=its.variable"
PATTERNED = "sentinel-in-a-url-77aa"
BEARER = "sentinel-bearer-token-31"
SENTINELS = (REFERENCED, NAMED, PATTERNED, BEARER)

STEP = '''
import logging
import os
import sys

from distributed import get_worker


def told(way):
    return (
        f"{way}: {os.environ['LAKE_PLACE']} and {os.environ['SOME_API_KEY']!r} "
        "and postgresql://me:sentinel-in-a-url-77aa@db/x and Authorization: Bearer sentinel-bearer-token-31"
    )


def leak(frame):
    """Rows of one customer in thousands raise."""
    logging.getLogger("mine").warning(told("log"))
    print(told("print"))
    print(told("error stream"), file=sys.stderr)
    if (frame["id"] % 4000 == 7).any():
        raise ValueError(told("row"))
    return frame


def fail(frame):
    """On a worker every partition fails, as if the network were the reason."""
    try:
        get_worker()
    except ValueError:
        return frame
    try:
        raise OSError(5, told("cause"), told("file"))
    except OSError:
        raise ConnectionError(told("whole partition")) from None
'''


def run(folder: Path, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        env={**{k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "FSSPEC_"))}, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def environment() -> dict[str, str]:
    return {
        "PYTHONPATH": str(ROOT),
        "LAKE_PLACE": REFERENCED,
        "SOME_API_KEY": NAMED,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture
def spec(tmp_path: Path, lake: Lake, model_path: Path, s3_server: S3) -> dict[str, Any]:
    """A job whose source is on S3, reached with nothing but what the job spec refers to."""
    (tmp_path / "leaky.py").write_text(STEP)
    (tmp_path / "key").write_text("testing\n")
    for file in lake.files:
        s3_server.client().upload_file(str(file), s3_server.bucket, f"secrets/{file.name}")
    return {
        "name": "secrets",
        "source": {"path": s3_server.url("secrets/")},
        "steps": [{"map": "leaky:leak"}, {"score": {"model": str(model_path)}}],
        "sink": {"path": str(tmp_path / "out")},
        "errors": {"max_fraction": 0.1},
        "storage": {
            f"s3://{s3_server.bucket}": {
                "key": f"file:{tmp_path / 'key'}",
                "secret": "env:LAKE_PLACE",
                "endpoint_url": s3_server.endpoint,
            }
        },
    }


def contents(folder: Path) -> dict[str, str]:
    """Every file, Parquet as the rows and the metadata in it."""
    found = {}
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        found[str(path)] = path.read_bytes().decode("latin-1")
        if path.suffix == ".parquet":
            found[f"{path} (rows)"] = str(pq.read_table(path).to_pylist()) + str(pq.read_metadata(path).metadata)
    return found


def check(artefacts: dict[str, str]) -> None:
    for name, artefact in artefacts.items():
        for sentinel in SENTINELS:
            assert sentinel not in artefact, f"{sentinel} is in {name}"


@pytest.mark.fault(49)
@pytest.mark.slow
def test_sentinels_are_in_nothing_that_a_run_leaves(
    tmp_path: Path, spec: dict[str, Any], environment: dict[str, str], lake: Lake
) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    options = ("--workers", "1", "-vv")
    ended = run(tmp_path, "run", "job.yaml", "--job", "one", *options, "--json", environment=environment)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["rows"]["rejected"] > 0
    state = tmp_path / ".pipeline"
    job = JobDirectory.open(state / "jobs" / "one")
    artefacts = {
        "stdout": ended.stdout,
        "stderr": ended.stderr,
        "graph": cloudpickle.dumps(make_tasks(job.recipe, job.plan.partitions, job.plan.versions)).decode("latin-1"),
        **contents(state),
        **contents(tmp_path / "out"),
    }
    for command in ("rejects", "status", "verify"):
        told = run(tmp_path, command, "one", "--json", environment=environment)
        assert told.returncode == 0, told.stderr
        artefacts[command] = told.stdout + told.stderr
    check(artefacts)
    # What was masked is there: otherwise nothing of it was looked at.
    for way in ("log", "print", "error stream"):
        assert f"{way}: {MASK} and '{MASK}' and postgresql://me:{MASK}@db" in ended.stderr
    assert f"row: {MASK}" in artefacts["rejects"]
    assert any(f"row: {MASK}" in text for name, text in artefacts.items() if "rejects" in name and "rows" in name)
    assert "env:LAKE_PLACE" in artefacts[str(state / "jobs" / "one" / "spec.yaml")]

    spec["steps"][0]["map"] = "leaky:fail"
    spec["sink"]["path"] = str(tmp_path / "other")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    failed = run(tmp_path, "run", "job.yaml", "--job", "two", *options, "--json", environment=environment)
    assert failed.returncode not in (0, 1), failed.stderr
    check({"stdout": failed.stdout, "stderr": failed.stderr, **contents(state)})
    assert f"whole partition: {MASK}" in failed.stdout + failed.stderr


@pytest.mark.fault(49)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source.path", f"s3://me:{PATTERNED}@bucket/x"),
        ("sink.path", f"sftp://me:{PATTERNED}@host/x"),
        ("steps.1.score.model", f"https://me:{PATTERNED}@host/m.ubj"),
        ("cluster", f"tls://me:{PATTERNED}@host:1"),
        ("storage", f"{{'s3://x': {{secret: {PATTERNED}}}}}"),
        (f"https://me:{PATTERNED}@host", "x"),
    ],
)
def test_a_secret_on_the_command_line_is_not_repeated(
    tmp_path: Path, spec: dict[str, Any], environment: dict[str, str], field: str, value: str
) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    set_field = ("--set", f"{field}={value}")
    ended = run(tmp_path, "run", "job.yaml", *set_field, "--json", "-vv", environment=environment)
    assert ended.returncode not in (0, 1), ended.stderr
    check({"stdout": ended.stdout, "stderr": ended.stderr, **contents(tmp_path / ".pipeline")})
