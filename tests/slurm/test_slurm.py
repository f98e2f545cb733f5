"""Jobs on a real Slurm: workers are cancelled and exceed their walltime, the driver is killed, and no row is lost."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.jobs.directory import JobDirectory
from pipeline.report.verify import verify
from pipeline.testing.held import held_job
from pipeline.testing.oracle import Lake, oracle
from pipeline.testing.processes import wait_until
from pipeline.testing.sockets import listening_sockets, process_tree, speaks_plainly

HERE = Path(__file__).parent
PROGRAMS = ("sbatch", "scancel", "squeue", "scontrol", "slurmctld", "slurmd", "munged")
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Slurm of one node; the environment in which its commands find it."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install slurmctld slurmd slurm-client munge)")
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    pytest.importorskip("dask_jobqueue")
    folder = tmp_path_factory.mktemp("slurm")
    environment = {**os.environ, "PATH": path, "SLURM_TEST_DIR": str(folder), "SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run([HERE / "up.sh"], env=environment, check=True, timeout=180)
    try:
        yield environment
    finally:
        subprocess.run([HERE / "down.sh"], env=environment, check=True, timeout=120)


def interface() -> str:
    """A network interface that other machines reach, so that there is TLS; loopback where there is no other."""
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family.name == "AF_INET" and not address.address.startswith("127."):
                return name
    return "lo"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a cluster file for two jobs of one core."""
    (tmp_path / "cluster_configs").mkdir()
    config = {
        "type": "slurm",
        "cores": 1,
        "memory": "1500 MiB",
        "jobs": 2,
        "queue": "main",
        "walltime": "30 minutes",
        "interface": interface(),
    }
    (tmp_path / "cluster_configs" / "site.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def ask(slurm: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=slurm, capture_output=True, text=True, check=True, timeout=60).stdout


def jobs(slurm: dict[str, str]) -> dict[str, str]:
    """Number of every job that has not ended, and its state."""
    lines = ask(slurm, "squeue", "--noheader", "--format=%A %T").splitlines()
    return {number: state for number, state in (line.split() for line in lines)}


def running(slurm: dict[str, str], *, but: Collection[str] = ()) -> set[str]:
    return {number for number, state in jobs(slurm).items() if state == "RUNNING" and number not in but}


def worker_pids(numbers: Collection[str]) -> list[int]:
    """Processes of these jobs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("SLURM_JOB_ID") in numbers:
                found.append(process.pid)
    assert len(found) >= 2 * len(numbers), "a nanny and a worker in each job"
    return found


def state(slurm: dict[str, str], job: str) -> str:
    fields = dict(item.split("=", 1) for item in ask(slurm, "scontrol", "show", "job", job).split() if "=" in item)
    return fields["JobState"]


@pytest.mark.fault(1, 16, 50)
def test_a_job_outlives_cancelled_workers_and_walltimes(
    slurm: dict[str, str], site: Path, lake: Lake, model_path: Path
) -> None:
    options = ("--cluster", "site", "-v")
    with held_job(site, source=lake.path, model=model_path, options=options, environment=slurm) as job:
        wait_until(lambda: len(running(slurm)) == 2, what="two jobs run", seconds=180)
        first, second = sorted(running(slurm))
        if interface() != "lo":
            assert {path.name for path in job.directory.glob("tls/*/*")} == {"ca.pem", "cert.pem", "key.pem"}
        pids = worker_pids({first, second})
        for host, port in listening_sockets([*process_tree(job.process.pid), *pids]):
            assert ipaddress.ip_address(host).is_loopback or not speaks_plainly(host, port), f"{host}:{port}"
        ask(slurm, "scancel", first)
        (third,) = wait_until(
            lambda: running(slurm, but={first, second}), what="the cancelled job is replaced", seconds=180
        )
        ask(slurm, "scancel", third)
        wait_until(
            lambda: running(slurm, but={first, second, third}), what="so is one without a worker yet", seconds=180
        )
        ask(slurm, "scontrol", "update", f"JobId={second}", "TimeLimit=1")
        wait_until(lambda: state(slurm, second) == "TIMEOUT", what="the walltime is enforced", seconds=300)
        wait_until(lambda: len(running(slurm, but={first, second, third})) == 2, what="all are replaced", seconds=180)
    wait_until(lambda: jobs(slurm) == {}, what="all jobs are released with the cluster", seconds=30)
    assert not (job.directory / "tls").exists()
    assert list((job.directory / "logs" / "workers").glob("*.out"))
    result = pq.read_table(site / "out").to_pandas()
    pd.testing.assert_frame_equal(result, oracle(lake.files, model_path), check_exact=True)
    assert verify(JobDirectory.open(job.directory)).ok


def test_the_workers_of_a_killed_driver_leave_and_resume_finishes(
    slurm: dict[str, str], site: Path, lake: Lake, model_path: Path
) -> None:
    options = ("--cluster", "site")
    places = {"source": lake.path, "model": model_path}
    with held_job(site, **places, options=options, environment=slurm, must_succeed=False) as job:
        os.kill(job.process.pid, signal.SIGKILL)
        job.process.wait(60)
    wait_until(lambda: jobs(slurm) == {}, what="no job is left", seconds=180)
    resumed = subprocess.run(
        [sys.executable, "-m", "pipeline", "resume", job.job, "--cluster", "site"],
        cwd=site,
        env={**slurm, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    wait_until(lambda: jobs(slurm) == {}, what="all jobs are released with the cluster", seconds=30)
    result = pq.read_table(site / "out").to_pandas()
    pd.testing.assert_frame_equal(result, oracle(lake.files, model_path), check_exact=True)


def pipeline(
    slurm: dict[str, str], site: Path, *arguments: str, seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a command of the package in the folder of the site."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=site,
        env={**slurm, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def write_job(site: Path, lake: Lake, model_path: Path, **cluster: object) -> None:
    """Write a job spec, and fields of the cluster file."""
    (site / "job.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "own",
                "source": {"path": str(lake.path)},
                "steps": [{"score": {"model": str(model_path)}}],
                "sink": {"path": str(site / "out")},
            }
        )
    )
    path = site / "cluster_configs" / "site.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **cluster}))


def test_a_refused_job_is_an_error_at_once(slurm: dict[str, str], site: Path, lake: Lake, model_path: Path) -> None:
    write_job(site, lake, model_path, queue="mian")
    refused = pipeline(slurm, site, "run", "job.yaml", "--cluster", "site")
    assert refused.returncode == 2, refused.stderr
    assert "sbatch: error: invalid partition specified: mian" in refused.stderr
    assert "the script is " in refused.stderr


def test_the_driver_runs_as_a_batch_job(slurm: dict[str, str], site: Path, lake: Lake, model_path: Path) -> None:
    """Slurm refuses the first queue of the workers, and takes the second."""
    driver, shapes = {"memory": "1500 MiB", "queue": "main"}, [{"queue": "main"}]
    write_job(site, lake, model_path, jobs=1, queue="mian", shapes=shapes, driver=driver)
    submitted = pipeline(slurm, site, "submit", "job.yaml", "--job", "own-1", "--cluster", "site", "--driver", "batch")
    assert submitted.returncode == 0, submitted.stderr
    assert len(jobs(slurm)) == 1
    ended = pipeline(slurm, site, "wait", "own-1")
    output = site / ".pipeline" / "jobs" / "own-1" / "starts" / "driver.out"
    assert ended.returncode == 0, output.read_text()
    wait_until(lambda: jobs(slurm) == {}, what="driver and workers are gone", seconds=60)
    assert "the driver ended with exit status 0" in output.read_text()
    assert "jobs request other than at first: shape 1" in output.read_text()
    result = pq.read_table(site / "out").to_pandas()
    pd.testing.assert_frame_equal(result, oracle(lake.files, model_path), check_exact=True)
