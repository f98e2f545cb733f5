"""Job scripts for batch systems, written by dask-jobqueue's own classes. Nothing is submitted."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import dask.config
import pytest

from pipeline.errors import RefusedForSafety, SpecError
from pipeline.execution.clusters import find_cluster
from pipeline.execution.clusters.batch_systems import LSF, PBS, SGE, HTCondor, Slurm
from pipeline.execution.clusters.jobqueue import BatchSystem
from pipeline.execution.clusters.pool import JobEnd, JobStatus
from pipeline.execution.clusters.requests import Request
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


class TestJobScript:
    @pytest.mark.parametrize("name", SYSTEMS)
    def test_of_every_example(self, name: str, tmp_path: Path) -> None:
        """Certificates, lifetime, threads and resources are in the script; the key itself is not."""
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
            # 4 hours less a minute to close; some workers leave up to 5 minutes earlier.
            assert "export PIPELINE_LIFETIME=14340" in text
            assert "export PIPELINE_STAGGER=300" in text
            assert "--preload-nanny pipeline.execution.clusters.nanny_setup" in text
            assert "--lifetime" not in text, "Dask's own loses what runs"
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


class TestGpus:
    def test_of_a_slurm_job_have_a_worker_each(self, tmp_path: Path) -> None:
        """dask-cuda's command line knows neither lifetimes nor numbers of workers, and refuses unknown options."""
        system = find_cluster(str(ROOT / "cluster_configs" / "slurm-cuda.yaml"), settings=Settings.load())
        assert isinstance(system, Slurm)
        assert system.limits() == Limits(workers=8, threads=8, memory=64 << 30)
        assert [str(group) for group in system.expected_gpus()] == ["8 × GPU"]
        with script(replace(system, interface="lo"), directory=str(tmp_path)) as text:
            command = text.splitlines()[-1]
        assert "#SBATCH --gpus-per-node=2" in text
        assert "#SBATCH --cpus-per-task=16" in text
        assert " -m dask_cuda.cli tcp://" in command
        assert "--nthreads 8 --memory-limit 64.00GiB" in command
        assert "--resources GPU=8" in command
        assert "--preload pipeline.execution.clusters.worker_setup" in command
        for unknown in ("--lifetime", "--nworkers", "--nanny", "--no-nanny"):
            assert unknown not in command
        assert "export PIPELINE_LIFETIME=14340" in text
        assert "export DASK_DISTRIBUTED__NANNY__PRELOAD=pipeline.execution.clusters.nanny_setup" in text
        assert "export CUDA_DEVICE_ORDER=PCI_BUS_ID" in text

    def test_of_the_site_replace_the_directive(self) -> None:
        options = {"job_extra_directives": ["--gres=gpu:h200:1"]}
        with script(slurm(gpus=1, options=options)) as text:
            assert "#SBATCH --gres=gpu:h200:1" in text
            assert "gpus-per-node" not in text
        with script(slurm(gpus=1, options={"job_extra_directives": ["--exclusive"]})) as text:
            assert "#SBATCH --gpus-per-node=1\n#SBATCH --exclusive" in text

    def test_are_not_requested_by_default(self) -> None:
        with script(slurm()) as text:
            assert not [part for part in ("--gpus", "GPU=", "CUDA", "dask_cuda") if part in text]

    @pytest.mark.parametrize(
        ("fields", "field", "expected"),
        [
            ({"gpus": -1}, "gpus", "a number of GPUs, or 0"),
            ({"gpus": "two"}, "gpus", "a number of GPUs, or 0"),
            ({"gpus": 2}, "processes", "2, as many as gpus"),
            ({"gpus": 1, "options": {"worker_command": "x"}}, "options.worker_command", "none: dask_cuda.cli"),
        ],
    )
    def test_invalid_fields_are_refused(self, fields: dict[str, Any], field: str, expected: str) -> None:
        with pytest.raises(SpecError) as caught:
            slurm(**fields)
        assert caught.value.where == f"type: slurm, {field}"
        assert caught.value.expected.startswith(expected)

    @pytest.mark.parametrize(
        ("system", "option", "example"),
        [
            (PBS, "resource_spec", "select=1:ncpus=16:ngpus=2:mem=64GB"),
            (SGE, "resource_spec", "gpu=2"),
            (LSF, "job_extra_directives", ["-gpu num=2"]),
            (HTCondor, "job_extra_directives", {"request_gpus": 2}),
        ],
    )
    def test_of_other_systems_need_the_request_of_the_site(
        self, system: type[BatchSystem], option: str, example: object
    ) -> None:
        fields: dict[str, Any] = {"settings": Settings(), "cores": 4, "memory": "8 GiB", "processes": 2, "gpus": 2}
        with pytest.raises(SpecError, match="need a request for GPUs") as caught:
            system(**fields)
        assert caught.value.where.endswith(f", options.{option}")
        assert "such as" in caught.value.expected
        with script(system(**fields, interface="lo", options={option: example})) as text:
            assert "dask_cuda.cli" in text
            assert "--resources GPU=2" in text
            assert ("request_gpus" if system is HTCondor else str(example).strip("[']")) in text


class TestLimits:
    def test_need_no_submission(self) -> None:
        """Settings override the cluster file; workers are rounded up to whole jobs."""
        system = slurm(cores=8, memory="32 GiB", processes=4, jobs=3)
        assert system.limits() == Limits(workers=12, threads=2, memory=8 << 30)
        fewer = slurm(cores=8, memory="32 GiB", processes=4, jobs=3, settings=Settings.load(workers=6, threads=1))
        assert fewer.limits() == Limits(workers=8, threads=1, memory=8 << 30)


class TestWalltime:
    @pytest.mark.parametrize(
        ("walltime", "seconds"),
        [("00:30:00", 1800), ("1-00:00:00", 86400), ("90:00", 5400), ("4 hours", 14400), ("5400", 5400)],
    )
    def test_is_parsed(self, walltime: str, seconds: int) -> None:
        """The lifetime of a worker leaves a minute to close."""
        assert slurm(walltime=walltime)._seconds("walltime") == seconds
        assert slurm(walltime=walltime)._lifetime() == seconds - 60

    def test_of_a_debug_queue_leaves_time_to_work(self) -> None:
        """A minute is enough; for less, the message says how much is."""
        assert slurm(walltime="1 minute")._lifetime() == 45
        assert slurm(walltime="5 minutes")._lifetime() == 270
        with pytest.raises(SpecError) as caught:
            slurm(walltime="45 s")
        assert caught.value.expected.startswith("at least 50 s: 4 s of stagger, 15 s to close and 30 s")

    def test_is_written_in_the_format_of_the_system(self) -> None:
        """LSF takes no seconds."""
        assert Slurm.clock(93784) == "26:03:04"
        assert LSF.clock(93784) == "26:03"


class TestInvalidFields:
    @pytest.mark.parametrize(
        ("fields", "field"),
        [
            ({"walltime": "5 minutes", "stagger": "5 minutes"}, "walltime"),
            ({"walltime": "40 s"}, "walltime"),
            ({"walltime": "soon"}, "walltime"),
            ({"processes": 5}, "processes"),
            ({"processes": 0}, "processes"),
            ({"options": {"walltime": "1:00"}}, "options.walltime"),
        ],
    )
    def test_are_refused_at_construction(self, fields: dict[str, Any], field: str) -> None:
        """The error names the field and what is expected."""
        with pytest.raises(SpecError) as caught:
            slurm(**fields)
        assert field in caught.value.where
        assert caught.value.expected

    def test_unknown_option_is_named(self) -> None:
        """The known options are listed."""
        with pytest.raises(SpecError) as caught, script(slurm(options={"colour": "blue"})):
            pass
        assert caught.value.where == "type: slurm, options.colour"
        assert "job_extra_directives" in caught.value.expected

    def test_missing_commands_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No scheduler is started."""
        monkeypatch.setenv("PATH", "")
        with pytest.raises(SpecError, match="commands of the batch system not found") as caught, slurm().open():
            pass
        assert caught.value.found == "no sbatch, no scancel on the PATH"


class TestSite:
    """What a site keeps in ``jobqueue.yaml`` counts, unless the cluster file says otherwise."""

    SITE: ClassVar[dict[str, Any]] = {
        "cores": 8,
        "memory": "30 GiB",
        "walltime": "02:00:00",
        "job-script-prologue": ["module load site"],
        "worker-extra-args": ["--resources", "x=1"],
        "log-directory": "site-logs",
    }

    def system(self, tmp_path: Path, **fields: Any) -> BatchSystem:
        path = tmp_path / "own.yaml"
        path.write_text(json.dumps({"type": "slurm", "interface": "lo", **fields}))
        found = find_cluster(str(path), settings=Settings.load())
        assert isinstance(found, BatchSystem)
        return found

    def test_fields_come_from_the_site(self, tmp_path: Path) -> None:
        with dask.config.set({f"jobqueue.slurm.{name}": value for name, value in self.SITE.items()}):
            system = self.system(tmp_path)
            assert (system.cores, system.memory, system._lifetime()) == (8, "30 GiB", 7200 - 60)
            with script(system, directory=str(tmp_path)) as text:
                lines = text.splitlines()
            assert "#SBATCH -t 02:00:00" in lines
            assert "module load site" in lines
            assert lines.index("module load site") > lines.index("export PIPELINE_JOB_STARTED=`date +%s`")
            assert "--resources x=1" in lines[-1]
            assert "--preload pipeline.execution.clusters.worker_setup" in lines[-1]
            assert any("site-logs/" in line for line in lines)

    def test_the_cluster_file_overrides_them(self, tmp_path: Path) -> None:
        with dask.config.set({f"jobqueue.slurm.{name}": value for name, value in self.SITE.items()}):
            options = {"job_script_prologue": ["module load own"], "worker_extra_args": ["--resources", "y=1"]}
            system = self.system(tmp_path, cores=2, memory="4 GiB", walltime="1 hour", options=options)
            with script(system, directory=str(tmp_path)) as text:
                assert "module load own" in text
                assert "--resources y=1" in text
                assert "module load site" not in text
                assert "x=1" not in text
                assert "#SBATCH -t 01:00:00" in text

    def test_default_of_the_package_is_not_the_choice_of_the_site(self, tmp_path: Path) -> None:
        """dask-jobqueue adds a walltime of half an hour to the configuration."""
        assert dask.config.get("jobqueue.slurm.walltime") == "00:30:00"
        assert self.system(tmp_path, cores=1, memory="1 GiB").walltime == "1 hour"

    def test_a_missing_field_names_both_files(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="lacks a field") as caught:
            self.system(tmp_path, memory="1 GiB")
        assert caught.value.where == f"{tmp_path}/own.yaml: type: slurm, cores"
        assert "jobqueue.slurm.cores" in caught.value.found
        assert "jobqueue.yaml in one of: " in caught.value.next_step


class TestTls:
    def test_is_required_between_hosts(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Only ``insecure_network`` turns it off."""
        monkeypatch.setattr(Slurm, "is_on_one_host", lambda self: False)
        with slurm()._certificates(str(tmp_path)) as certificates:
            assert certificates is not None
            assert Path(certificates.key).is_relative_to(tmp_path)
        for directory in ("", "s3://bucket/jobs/x"):
            with pytest.raises(SpecError, match="invalid value"), slurm()._certificates(directory):
                pass
        with slurm(shared_directory=str(tmp_path))._certificates("s3://bucket/jobs/x") as certificates:
            assert certificates is not None
        with slurm(settings=Settings.load(insecure_network=True))._certificates("") as certificates:
            assert certificates is None
        monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
        with pytest.raises(RefusedForSafety), slurm()._certificates(str(tmp_path)):
            pass

    def test_is_not_needed_on_one_host(self, tmp_path: Path) -> None:
        """The setting ``tls`` turns it on."""
        assert slurm().is_on_one_host()
        with slurm()._certificates("") as certificates:
            assert certificates is None
        with slurm(settings=Settings.load(tls=True))._certificates(str(tmp_path)) as certificates:
            assert certificates is not None
        assert not slurm(interface=None).is_on_one_host(), "its default is the default route"
        with pytest.raises(SpecError):
            slurm(interface="no-such-interface").is_on_one_host()


class TestPool:
    """Jobs that fake commands of the batch system run, or not."""

    @pytest.fixture
    def commands(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Folder of the commands, first on the PATH."""
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in {"sbatch": "echo 7", "squeue": "exit 0", "scancel": f"echo $* >>{folder}/cancelled"}.items():
            command(folder, name, text)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        return folder

    def test_refusal_is_quoted_at_once(self, commands: Path, tmp_path: Path) -> None:
        command(commands, "sbatch", "echo 'sbatch: error: invalid partition specified: mian' >&2; exit 1")
        with pytest.raises(SpecError, match="refused a job") as caught, slurm().open(directory=str(tmp_path / "a-1")):
            pass
        assert caught.value.found == "sbatch: error: invalid partition specified: mian"
        script = Path(caught.value.where.rpartition(" ")[2])
        assert "#SBATCH -J pipeline-a-1" in script.read_text()

    def test_each_request_has_a_script_of_its_own(self, commands: Path, tmp_path: Path) -> None:
        """A queue that refuses, and a job killed for memory; the lifetime follows the walltime."""
        command(commands, "sbatch", f"cp $1 {commands}/script; grep -q 'p short' $1 && exit 1; echo 7")
        shapes = ({"queue": "long", "walltime": "2:00:00", "memory": "12 GiB", "options": {"job_cpu": 3}},)
        system = slurm(queue="short", shapes=shapes, grow={"memory": "16 GiB", "walltime": "03:00:00"})
        cluster = system.make(None)
        try:
            workers = system._worker_pool(cluster, str(tmp_path / "a-1"))
            workers.turn()
            workers.turn()
            text = (commands / "script").read_text()
            assert "#SBATCH -p long" in text
            assert "#SBATCH -t 02:00:00" in text
            assert "#SBATCH --mem=12G" in text
            assert "#SBATCH --cpus-per-task=3" in text
            lifetime = int(text.partition("_LIFETIME=")[2].split()[0])
            assert lifetime == 7200 - 60
            pool = workers._pool
            assert [job.request for job in pool.jobs.values()] == [Request(1)]
            pool.worker_joined(2, "w", now=0)
            pool.asked({"7": JobStatus(end=JobEnd.OUT_OF_MEMORY)}, now=0)
            pool.excluded.add("n3")
            workers.turn()
            text = (commands / "script").read_text()
            assert "#SBATCH --mem=16G" in text
            assert "--memory-limit 16.00GiB" in text
            assert "#SBATCH --exclude=n3" in text
        finally:
            cluster.close(timeout=20)
        assert system.limits().memory == 8 << 30, "a partition fits a job of each shape"

    @pytest.mark.parametrize(
        ("fields", "where"),
        [
            ({"shapes": [{"partition": "long"}]}, "shapes.0"),
            ({"shapes": [{}]}, "shapes.0"),
            ({"shapes": [{"walltime": "soon"}]}, "walltime"),
            ({"shapes": [{"queue": "x"}], "shape_wait": "soon"}, "shape_wait"),
            ({"grow": {"cores": 8}}, "grow.cores"),
            ({"grow": {"memory": "4 GiB"}}, "grow.memory"),
            ({"grow": {"walltime": "10 minutes"}}, "grow.walltime"),
        ],
    )
    def test_requests_that_cannot_be_made_are_refused(self, fields: dict[str, Any], where: str) -> None:
        with pytest.raises(SpecError, match="invalid value in a cluster file") as caught:
            slurm(**fields)
        assert caught.value.where == f"type: slurm, {where}"

    def test_jobs_of_a_killed_driver_are_cancelled(self, commands: Path, tmp_path: Path) -> None:
        """Those that have the name of the job, and have not ended: an id may have been given to another job."""
        command(commands, "squeue", "printf '3|PENDING|None|N/A||pipeline-a-1\\n4|RUNNING|None|N/A|n|other\\n'")
        command(commands, "sbatch", "echo 'sbatch: error: invalid account' >&2; sleep 2; exit 1")
        record = {"system": "type: slurm", "user": getpass.getuser(), "name": "pipeline-a-1"}
        left = tmp_path / "a-1" / "cluster" / "old.json"
        left.parent.mkdir(parents=True)
        left.write_text(json.dumps({**record, "jobs": [{"id": "3"}, {"id": "4"}, {"id": "5"}]}))
        with pytest.raises(SpecError), slurm().open(directory=str(tmp_path / "a-1")):
            pass
        assert (commands / "cancelled").read_text() == "3\n"
        assert not left.exists()


def command(folder: Path, name: str, text: str) -> None:
    """Write a command of the batch system."""
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
