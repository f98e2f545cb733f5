"""Who can reach a running job, and who can read its state."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import select
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.clusters.local import LocalProcesses
from pipeline.errors import RefusedForSafety
from pipeline.settings import load_settings
from pipeline.testing.oracle import Lake

STEP = '''
import fcntl
from distributed import get_worker


def hold(frame):
    """On a worker: say that it is here, and go on once the test lets go of the lock."""
    try:
        get_worker()
    except ValueError:
        return frame
    with open({reached!r}, "w") as file:
        file.write("x")
    with open({lock!r}) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    return frame
'''


@pytest.fixture
def running(tmp_path: Path, lake: Lake, model_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A job that is in the middle of its partitions, under the most careless umask there is; it ends well after."""
    reached, lock = tmp_path / "reached", tmp_path / "lock"
    os.mkfifo(reached)
    lock.touch()
    (tmp_path / "held_step.py").write_text(STEP.format(reached=str(reached), lock=str(lock)))
    spec = {
        "name": "held",
        "source": {"path": str(lake.path)},
        "steps": [{"map": "held_step:hold"}, {"score": {"model": str(model_path)}}],
        "sink": {"path": str(tmp_path / "out")},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    with open(os.open(reached, os.O_RDWR), "rb", buffering=0) as pipe, lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", "job.yaml", "--job", "held-1", "--workers", "2"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            umask=0,
        )
        try:
            assert select.select([pipe], [], [], 120)[0], process.communicate(timeout=1)
            yield process
            fcntl.flock(held, fcntl.LOCK_UN)
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
        finally:
            process.kill()
            process.communicate()


@pytest.mark.fault(50, 52)
def test_a_running_job_listens_on_loopback_only_and_keeps_its_state_private(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    processes = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
    sockets = [
        socket
        for process in processes
        for socket in process.net_connections("inet")
        if socket.status == psutil.CONN_LISTEN or (socket.laddr and not socket.raddr and socket.status == "NONE")
    ]
    assert len(sockets) >= 4, "scheduler, dashboard and two workers at least: otherwise this looks at the wrong moment"
    for socket in sockets:
        assert ipaddress.ip_address(socket.laddr.ip).is_loopback, socket
    job = tmp_path / ".pipeline" / "jobs" / "held-1"
    for path in (tmp_path / ".pipeline", job, *job.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), f"{path} {mode:o}"


@pytest.mark.parametrize("address", ["0.0.0.0:8787", ":8787", "[::]:8787", "10.1.2.3:0"])
@pytest.mark.fault(50)
def test_a_dashboard_for_the_whole_network_is_refused(address: str) -> None:
    """It shows code and data, and asks nobody who they are."""
    with pytest.raises(RefusedForSafety) as caught, LocalProcesses(load_settings(dashboard=address)).open():
        pass
    assert caught.value.exit_code == 7
    assert "ssh -L" in caught.value.next_step
