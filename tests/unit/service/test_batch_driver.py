"""The script of a batch job that drives a job: when it queues itself again. Its commands are fakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.errors import SpecError
from pipeline.execution.clusters.batch_systems import PBS, Slurm
from pipeline.service.batch_driver import IDLE_STARTS, check_batch_driver, driver_script
from pipeline.settings import Settings
from pipeline.testing.processes import wait_until

CORES: dict[str, Any] = {"settings": Settings(), "cores": 2, "memory": "2 GiB"}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script; the driver ends with the exit status in the file ``code``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name, text in {
        "driver": "exit $(cat code)",
        "squeue": "cat state",
        "scontrol": 'echo "$*" >>calls; exit $(cat requeue)',
        "sbatch": 'echo "sbatch" >>calls',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "state").write_text("RUNNING\n")
    (tmp_path / "requeue").write_text("0")
    (tmp_path / "rounds" / "0" / "receipts").mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "driver"))
    job = cast("Any", SimpleNamespace(id="a-1", root=str(tmp_path), record=SimpleNamespace(working_directory=tmp_path)))
    job.record.working_directory = str(tmp_path)
    system = Slurm(**CORES, queue="main", walltime="2 hours", driver={"walltime": "10 hours", "cores": 2})
    path = tmp_path / "driver.sh"
    path.write_text(driver_script(job, system, script=path, output=tmp_path / "driver.out"))
    return path


def allocation(script: Path, code: int) -> int:
    """Run the script once; return its exit status."""
    (script.parent / "code").write_text(str(code))
    return subprocess.run(["bash", str(script)], check=False, timeout=30).returncode


def calls(script: Path) -> list[str]:
    path = script.parent / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_directives_ask_for_a_signal_before_the_end(script: Path) -> None:
    lines = [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--job-name=pipeline-driver-a-1", "--requeue", "--open-mode=append", "--signal=B:TERM@90"} <= set(lines)
    assert {"--time=10:00:00", "--cpus-per-task=2", "--mem=4096M", "--partition=main"} <= set(lines)


@pytest.mark.parametrize("code", [74, 75, 130, 137, 143])
def test_queues_itself_again_for_what_may_pass(script: Path, code: int) -> None:
    assert allocation(script, code) == code
    assert calls(script) == ["requeue 7"]


@pytest.mark.parametrize("code", [0, 1, 2, 5, 8])
def test_ends_with_the_job(script: Path, code: int) -> None:
    assert allocation(script, code) == code
    assert calls(script) == []


def test_ends_when_its_batch_job_is_cancelled(script: Path) -> None:
    (script.parent / "state").write_text("COMPLETING\n")
    assert allocation(script, 143) == 143
    assert calls(script) == []


def test_gives_up_after_allocations_without_a_receipt(script: Path) -> None:
    """A new receipt begins the count anew."""
    for _ in range(3):
        allocation(script, 75)
    (script.parent / "rounds" / "0" / "receipts" / "00000.json").touch()
    for _ in range(IDLE_STARTS + 3):
        allocation(script, 75)
    assert len(calls(script)) == 3 + IDLE_STARTS


def test_submits_itself_where_requeueing_is_forbidden(script: Path) -> None:
    (script.parent / "requeue").write_text("1")
    allocation(script, 130)
    assert calls(script) == ["requeue 7", "sbatch"]


def test_passes_the_signal_to_the_driver_and_waits_for_its_end(script: Path) -> None:
    """The driver commits first; its own exit status counts."""
    folder = script.parent
    (folder / "driver").write_text(
        "#!/bin/sh\ntrap 'sleep 0.3; exit 130' TERM\ntouch began\nwhile :; do sleep 0.05; done\n"
    )
    process = subprocess.Popen(["bash", str(script)])
    wait_until((folder / "began").exists, seconds=20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert calls(script) == ["requeue 7"]


def test_is_refused_on_other_clusters() -> None:
    with pytest.raises(SpecError, match="only Slurm") as caught:
        check_batch_driver(PBS(**CORES))
    assert caught.value.where == "--driver batch"


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(SpecError) as caught:
        Slurm(**CORES, driver={"wall": "1 hour"})
    assert caught.value.where == "type: slurm, driver.wall"
    assert caught.value.expected == "cores, memory, queue, walltime"
