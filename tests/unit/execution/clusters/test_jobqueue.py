"""What batch systems are asked for: the job scripts that dask-jobqueue's own classes write. Nothing is submitted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RefusedForSafety, SpecError
from pipeline.execution.clusters import find_cluster
from pipeline.execution.clusters.jobqueue import LSF, BatchSystem, Slurm
from pipeline.execution.clusters.security import Certificates, make_certificates
from pipeline.plan.plan import Limits
from pipeline.settings import Settings

pytest.importorskip("dask_jobqueue")
ROOT = Path(__file__).parents[4]
SYSTEMS = ("slurm", "pbs", "sge", "lsf", "htcondor")


def slurm(**fields: Any) -> Slurm:
    settings = fields.pop("settings", Settings.load())
    return Slurm(**{"settings": settings, "cores": 4, "memory": "8 GiB", "interface": "lo", **fields})


@contextmanager
def script(system: BatchSystem, certificates: Certificates | None = None, *, directory: str = "") -> Iterator[str]:
    cluster = system.make(certificates, directory=directory)
    try:
        yield cluster.job_script()
    finally:
        cluster.close(timeout=20)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_example_makes_a_job_script(name: str, tmp_path: Path) -> None:
    system = find_cluster(str(ROOT / "cluster_configs" / f"{name}.yaml"), settings=Settings.load())
    assert isinstance(system, BatchSystem)
    files = {part: str(tmp_path / f"{part}.pem") for part in ("ca", "cert", "key")}
    for part, text in vars(make_certificates(now=datetime.now(UTC))).items():
        Path(files[part]).write_text(text)
    with script(system, Certificates(**files), directory=str(tmp_path)) as text:
        assert "--protocol tls://" in text
        assert f"--tls-key {files['key']}" in text
        assert "PRIVATE KEY" not in text, "the key itself stays in its file"
        assert "--dashboard-address 127.0.0.1:0" in text
        assert "--preload pipeline.execution.clusters.worker_setup" in text
        # 4 hours less 5 minutes of stagger and a minute to close.
        assert "--lifetime 14040s --lifetime-stagger 300s" in text
        assert name == "htcondor" or "--death-timeout 60" in text
        assert "DASK_DISTRIBUTED__WORKER__MEMORY__SPILL=False" in text
        assert "OMP_NUM_THREADS=1" in text
        assert f"--nthreads {system.limits().threads} " in text
        asked = {
            "slurm": ["#SBATCH -p main", "--cpus-per-task=16", "--mem=64G", "-t 04:00:00"],
            "pbs": ["#PBS -q workq", "select=1:ncpus=16", "walltime=04:00:00"],
            "sge": ["#$ -q all.q", "h_rt=04:00:00", "-pe smp 8"],
            "lsf": ["#BSUB -q normal", "#BSUB -n 16", "#BSUB -W 04:00"],
            "htcondor": ["RequestCpus = MY.DaskWorkerCores", "MY.DaskWorkerCores = 4"],
        }
        for line in asked[name]:
            assert line in text
        assert name == "htcondor" or str(tmp_path / "logs" / "workers") in text


def test_limits_are_known_before_anything_is_submitted() -> None:
    system = slurm(cores=8, memory="32 GiB", processes=4, jobs=3)
    assert system.limits() == Limits(workers=12, threads=2, memory=8 << 30)
    fewer = slurm(cores=8, memory="32 GiB", processes=4, jobs=3, settings=Settings.load(workers=6, threads=1))
    assert fewer.limits() == Limits(workers=8, threads=1, memory=8 << 30)


@pytest.mark.parametrize(
    ("walltime", "seconds"),
    [("00:30:00", 1800), ("1-00:00:00", 86400), ("90:00", 5400), ("4 hours", 14400), ("5400", 5400)],
)
def test_walltimes(walltime: str, seconds: int) -> None:
    assert slurm(walltime=walltime)._seconds("walltime") == seconds
    assert slurm(walltime=walltime)._lifetime() == seconds - 120 - 60


def test_a_walltime_is_written_as_each_system_does() -> None:
    assert Slurm.clock(93784) == "26:03:04"
    assert LSF.clock(93784) == "26:03"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"walltime": "5 minutes"}, "walltime"),
        ({"walltime": "soon"}, "walltime"),
        ({"processes": 5}, "processes"),
        ({"processes": 0}, "processes"),
        ({"options": {"walltime": "1:00"}}, "options.walltime"),
    ],
)
def test_what_cannot_work_is_refused_at_once(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        slurm(**fields)
    assert field in caught.value.where
    assert caught.value.expected


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(SpecError) as caught, script(slurm(options={"colour": "blue"})):
        pass
    assert caught.value.where == "type: slurm, options.colour"
    assert "job_extra_directives" in caught.value.expected


def test_between_hosts_there_is_tls_or_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Slurm, "is_on_one_host", lambda self: False)
    with slurm()._certificates(str(tmp_path)) as made:
        assert made is not None
        assert Path(made.key).is_relative_to(tmp_path)
    for directory in ("", "s3://bucket/jobs/x"):
        with pytest.raises(SpecError, match="wrong value"), slurm()._certificates(directory):
            pass
    with slurm(shared_directory=str(tmp_path))._certificates("s3://bucket/jobs/x") as made:
        assert made is not None
    with slurm(settings=Settings.load(insecure_network=True))._certificates("") as made:
        assert made is None
    monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
    with pytest.raises(RefusedForSafety), slurm()._certificates(str(tmp_path)):
        pass


def test_on_one_host_loopback_will_do(tmp_path: Path) -> None:
    assert slurm().is_on_one_host()
    with slurm()._certificates("") as made:
        assert made is None
    with slurm(settings=Settings.load(tls=True))._certificates(str(tmp_path)) as made:
        assert made is not None
    assert not slurm(interface=None).is_on_one_host(), "then it is the address that leads to the outside"
    with pytest.raises(SpecError):
        slurm(interface="no-such-interface").is_on_one_host()


def test_without_the_commands_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SpecError, match="commands are not on this machine") as caught, slurm().open():
        pass
    assert caught.value.found == "no sbatch, no scancel on the PATH"
