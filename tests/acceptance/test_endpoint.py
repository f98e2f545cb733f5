"""A driver and its workers are killed while a service is asked: a resume pays only what was open."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pandas as pd
import yaml

from pipeline.testing.fake_service import KEY, MODEL, fake_service
from pipeline.testing.processes import start_command, wait_until

ROWS, CONCURRENCY, WORKERS = 240, 4, 2


def test_answers_survive_a_kill(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = [f"row {number}" for number in range(ROWS)]
    for part in range(WORKERS):
        pd.DataFrame({"text": texts[part::WORKERS]}).to_parquet(tmp_path / f"in/{part}.parquet")
    with fake_service(seconds=0.03) as service:
        endpoint = {"url": service.url, "model": MODEL, "messages": "{{text}}", "key": "env:SERVICE_KEY"}
        spec = {
            "name": "asked",
            "source": {"path": "in/"},
            "steps": [{"score": {"endpoint": {**endpoint, "concurrency": CONCURRENCY}, "output": "said"}}],
            "sink": {"path": "out/"},
        }
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
        options = {"environment": {"SERVICE_KEY": KEY, "PIPELINE_WORKERS": str(WORKERS), "PIPELINE_STRAGGLERS": "0"}}
        process = start_command(tmp_path, "run", "job.yaml", "--job", "asked-1", **options)  # type: ignore[arg-type]
        wait_until(lambda: sum(service.answered.values()) >= ROWS // 2 or process.poll() is not None)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        wait_until(lambda: service._open == 0)
        paid = sum(service.answered.values())
        assert paid < ROWS
        again = start_command(tmp_path, "resume", "asked-1", "--json", **options)  # type: ignore[arg-type]
        out, err = again.communicate(timeout=120)
        assert again.returncode == 0, err
    # Open requests, and one batch of each worker that was not stored yet.
    most = WORKERS * (CONCURRENCY + 4 * CONCURRENCY)
    assert ROWS <= sum(service.answered.values()) <= ROWS + most
    assert json.loads(out)["engines"]["usage"]["reused_answers"] >= paid - most
    assert sorted(pd.read_parquet(tmp_path / "out")["said"]) == sorted(text.upper() for text in texts)
