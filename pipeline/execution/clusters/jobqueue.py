"""Workers as jobs of a batch system, through dask-jobqueue; scheduler and driver run where the command was given.

Jobs end by themselves: workers leave before their walltime, a little apart from each other so that those that replace
them are there first, and all of them when the scheduler is gone, however the driver ended.
"""

from __future__ import annotations

import inspect
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import dask
import dask.config
from dask.utils import parse_bytes, parse_timedelta
from distributed import Client
from distributed.utils import get_ip_interface

from pipeline.common.forkserver import thread_environment
from pipeline.errors import InfrastructureError, NoWorkers, SpecError
from pipeline.execution.clusters import DASK_CONFIG
from pipeline.execution.clusters.lazy_dashboard import add_dashboard
from pipeline.execution.clusters.security import LOOPBACK, Certificates, certificates_in, check_dashboard, is_loopback
from pipeline.jobs import layout
from pipeline.jobs.cancellation import wait_in_slices
from pipeline.plan.plan import Limits
from pipeline.settings import Settings
from pipeline.storage.local import LocalStore
from pipeline.storage.urls import is_local_path, local_path

CLOSING_SECONDS = 60.0
"""What a worker may need between the end of its lifetime and the end of its job."""
_CLOCK = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")
_OURS = frozenset(
    ("cores", "memory", "processes", "queue", "walltime", "interface", "security", "protocol", "worker_extra_args")
)


@dataclass(frozen=True)
class BatchSystem:
    """What the adapters of all batch systems share: the fields of a cluster file."""

    name: ClassVar[str]
    """Of dask-jobqueue's class, without ``Cluster``."""
    commands: ClassVar[tuple[str, ...]]
    """Programs that must be there."""
    walltime_key: ClassVar[str | None] = "walltime"
    """Argument of dask-jobqueue's class for the walltime; None: the batch system has none."""
    account_key: ClassVar[str] = "account"
    queue_key: ClassVar[str] = "queue"

    settings: Settings
    cores: int
    """Cores of one job."""
    memory: str
    """Memory of one job, as ``16 GiB``."""
    jobs: int = 1
    """Jobs at a time, the most; ``--workers`` overrides it."""
    minimum: int | None = None
    """Jobs that are kept when there is little to do. Default: ``jobs``. What is lost is submitted again."""
    processes: int = 1
    """Worker processes of one job; each has its share of cores and memory."""
    walltime: str = "1 hour"
    """Of one job: ``HH:MM:SS``, ``D-HH:MM:SS``, or as ``90 minutes``. A run may take longer: new jobs take over."""
    stagger: str = "2 minutes"
    """How far apart workers leave: at least what a job needs from its submission to its first partition. Less, and all
    workers may be gone before the next ones come."""
    wait: str = "1 hour"
    """How long the first job may wait in the queue."""
    queue: str | None = None
    """Queue or partition."""
    account: str | None = None
    """Account or project."""
    interface: str | None = None
    """Network interface of the fast network, such as ``ib0``. Default: the one that leads to the outside."""
    shared_directory: str | None = None
    """Folder that workers see too, for certificates. Default: the job directory."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of dask-jobqueue's class, such as ``job_extra_directives``, ``python``, ``local_directory``."""

    def __post_init__(self) -> None:
        taken = sorted(_OURS & set(self.options))
        if taken:
            raise self._wrong(f"options.{taken[0]}", str(self.options[taken[0]]), "a field of the cluster file itself")
        if not (isinstance(self.cores, int) and isinstance(self.processes, int) and self.cores >= self.processes > 0):
            raise self._wrong("processes", f"{self.processes} for {self.cores} cores", "at least one core for each")
        if self._lifetime() <= self._seconds("stagger"):
            expected = f"more than {2 * self._seconds('stagger') + CLOSING_SECONDS:.0f} s, or a smaller stagger"
            raise self._wrong("walltime", f"{self.walltime}, with a stagger of {self.stagger}", expected)

    # What it will offer

    def limits(self) -> Limits:
        """What it will offer, from the file and the settings; nothing is submitted."""
        jobs = self._jobs()
        return Limits(workers=jobs * self.processes, threads=self._threads(), memory=self._bytes() // self.processes)

    def _jobs(self) -> int:
        return -(-self.settings.workers // self.processes) if self.settings.workers else int(self.jobs)

    def _threads(self) -> int:
        return self.settings.threads or self.cores // self.processes

    def _bytes(self) -> int:
        try:
            return int(parse_bytes(self.memory))
        except ValueError as error:
            raise self._wrong("memory", repr(self.memory), "a size such as 16 GiB") from error

    def _seconds(self, name: str) -> float:
        """A field that is a span of time, in seconds."""
        text = str(getattr(self, name))
        clock = _CLOCK.fullmatch(text)
        if clock:
            days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
            return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
        try:
            return float(parse_timedelta(text, default="s"))
        except (ValueError, KeyError) as error:
            raise self._wrong(name, repr(text), "HH:MM:SS, or as 90 minutes") from error

    def _lifetime(self) -> float:
        """Seconds after which a worker leaves, give or take the stagger: always before its walltime."""
        return self._seconds("walltime") - self._seconds("stagger") - CLOSING_SECONDS

    def _wrong(self, name: str, found: str, expected: str) -> SpecError:
        return SpecError("a cluster file has a wrong value", where=f"type: {self.name.lower()}, {name}", found=found,
                         expected=expected)  # fmt: skip

    # Running it

    @contextmanager
    def open(self, *, directory: str = "") -> Iterator[Client]:
        """Submit the jobs and give a client once one of them works; all of them are cancelled on leaving.

        :param directory: the job directory: certificates and the jobs' logs are put there.
        :raises NoWorkers: when no job began in time.
        :raises RefusedForSafety: when there can be no TLS between hosts.
        """
        check_dashboard(self.settings.dashboard)
        with self._certificates(directory) as certificates, self._start(certificates, directory) as client:
            yield client

    def is_on_one_host(self) -> bool:
        """Whether only this machine can reach scheduler and workers."""
        if self.interface is None:
            return False
        try:
            return is_loopback(get_ip_interface(self.interface))
        except ValueError as error:
            raise self._wrong("interface", self.interface, str(error)) from error

    def _certificates(self, directory: str) -> AbstractContextManager[Certificates | None]:
        if not self.settings.tls and (self.is_on_one_host() or self.settings.insecure_network):
            return nullcontext()
        shared = self.shared_directory or directory
        if not shared or not is_local_path(shared):
            raise self._wrong(
                "shared_directory",
                f"none, and the job directory is {directory or 'a temporary one'}",
                "a folder that workers of other machines see: certificates are put there",
            )
        return certificates_in(shared)

    @contextmanager
    def _start(self, certificates: Certificates | None, directory: str) -> Iterator[Client]:
        missing = [program for program in self.commands if shutil.which(program) is None]
        if missing:
            raise SpecError(
                "the batch system's commands are not on this machine",
                where=f"type: {self.name.lower()}",
                found=f"no {', no '.join(missing)} on the PATH",
                next_step="run it where jobs are submitted, such as a login node",
            )
        config = {**DASK_CONFIG, "distributed.scheduler.no-workers-timeout": self.settings.no_workers_timeout}
        with dask.config.set(config):
            cluster = self.make(certificates, directory=directory)
            try:
                jobs = self._jobs()
                add_dashboard(cluster.scheduler)
                cluster.adapt(minimum_jobs=jobs if self.minimum is None else min(self.minimum, jobs), maximum_jobs=jobs)
                with Client(cluster, set_as_default=False) as client:
                    self._await_workers(client)
                    yield client
            finally:
                cluster.close(timeout=60)

    def make(self, certificates: Certificates | None, *, directory: str = "") -> Any:
        """dask-jobqueue's cluster, its scheduler running, no job submitted yet."""
        try:
            import dask_jobqueue
        except ImportError as error:
            raise SpecError(
                "the package for batch systems is not installed",
                where=f"type: {self.name.lower()}",
                found=str(error),
                next_step='pip install ".[jobqueue]"',
            ) from error
        cluster = getattr(dask_jobqueue, f"{self.name}Cluster")
        owners = (cluster.job_cls, dask_jobqueue.core.Job)
        known = {name for owner in owners for name in inspect.signature(owner.__init__).parameters}
        unknown = sorted(set(self.options) - known)
        if unknown:
            raise self._wrong(f"options.{unknown[0]}", unknown[0], ", ".join(sorted(known - _OURS - {"self", "name"})))
        try:
            return cluster(**self._arguments(certificates, directory))
        except SpecError:
            raise
        except (OSError, RuntimeError) as error:
            raise InfrastructureError(
                "the scheduler could not be started", where=f"type: {self.name.lower()}", found=str(error)
            ) from error
        except (TypeError, ValueError) as error:
            raise self._wrong("options", str(error).splitlines()[0], f"arguments of {self.name}Cluster") from error

    def _arguments(self, certificates: Certificates | None, directory: str) -> dict[str, Any]:
        options = dict(self.options)
        prologue = [*self._environment(), *options.pop("job_script_prologue", ())]
        named = {self.queue_key: self.queue, self.account_key: self.account}
        if directory and is_local_path(directory):
            folder = local_path(directory) / layout.WORKER_LOGS
            # Made here: the batch system would make it as the umask says.
            LocalStore(folder.parent, private=True).make_folder(folder)
            named["log_directory"] = str(folder)
        if self.walltime_key:
            named[self.walltime_key] = self.clock(self._seconds("walltime"))
        return {
            "cores": self._threads() * self.processes,
            "memory": self.memory,
            "processes": self.processes,
            "interface": self.interface,
            "protocol": "tls://" if certificates else "tcp://",
            "security": certificates.security() if certificates else None,
            "scheduler_options": {"dashboard_address": self.settings.dashboard, "dashboard": False},
            "job_name": "pipeline",
            "job_script_prologue": prologue,
            "worker_extra_args": self._worker_arguments(),
            "silence_logs": logging.ERROR,
            **{name: value for name, value in named.items() if value is not None},
            **options,
        }

    def _worker_arguments(self) -> list[str]:
        lifetime, stagger = self._lifetime(), self._seconds("stagger")
        # The HTTP server of a worker has no TLS. When the scheduler is gone, workers end, and their jobs with them.
        shown = ["--dashboard", "--dashboard-address", f"{LOOPBACK}:0"]
        ends = ["--lifetime", f"{lifetime:.0f}s", "--lifetime-stagger", f"{stagger:.0f}s"]
        return [*shown, *ends, "--preload", "pipeline.execution.clusters.worker_setup"]

    def _environment(self) -> list[str]:
        """Lines of the job script that give workers this site's configuration of Dask, and their share of cores."""
        config = {key.upper().replace(".", "__").replace("-", "_"): value for key, value in DASK_CONFIG.items()}
        threads = thread_environment(self.cores, self.processes * self._threads())
        dask_lines = [f"export DASK_{name}={value}" for name, value in config.items()]
        return [*dask_lines, *(f"export {name}={value}" for name, value in threads.items())]

    @staticmethod
    def clock(seconds: float) -> str:
        """A walltime as the batch system writes it."""
        minutes, rest = divmod(int(seconds), 60)
        return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"

    def _await_workers(self, client: Client) -> None:
        try:
            wait_in_slices(lambda some: client.wait_for_workers(1, timeout=some), timeout=self._seconds("wait"))
        except TimeoutError as error:
            raise NoWorkers(
                "no job of the batch system has begun to work",
                where=f"type: {self.name.lower()}",
                found=f"0 of {self._jobs()} after {self.wait}",
                next_step="look at the queue and at logs/workers/ in the job directory, then resume; or raise wait",
            ) from error


@dataclass(frozen=True)
class Slurm(BatchSystem):
    """``type: slurm``."""

    name = "SLURM"
    commands = ("sbatch", "scancel")


@dataclass(frozen=True)
class PBS(BatchSystem):
    """``type: pbs``: OpenPBS, PBS Professional, Torque."""

    name = "PBS"
    commands = ("qsub", "qdel")


@dataclass(frozen=True)
class SGE(BatchSystem):
    """``type: sge``: Grid Engine and what came of it."""

    name = "SGE"
    commands = ("qsub", "qdel")
    account_key = "project"


@dataclass(frozen=True)
class LSF(BatchSystem):
    """``type: lsf``."""

    name = "LSF"
    commands = ("bsub", "bkill")
    account_key = "project"

    @staticmethod
    def clock(seconds: float) -> str:
        """``HH:MM``."""
        return f"{int(seconds) // 3600:02d}:{int(seconds) % 3600 // 60:02d}"


@dataclass(frozen=True)
class HTCondor(BatchSystem):
    """``type: htcondor``. It has no walltime and no queues; workers leave at the end of their lifetime all the same."""

    name = "HTCondor"
    commands = ("condor_submit", "condor_rm")
    walltime_key = None
    account_key = "accounting_group"

    def _arguments(self, certificates: Certificates | None, directory: str) -> dict[str, Any]:
        arguments = super()._arguments(certificates, directory)
        arguments.pop("queue", None)
        account = arguments.pop(self.account_key, None)
        if account:
            extra = dict(arguments.get("job_extra_directives") or {})
            arguments["job_extra_directives"] = {self.account_key: account, **extra}
        # Its disk is not ours to choose without a word.
        return {"disk": "1 GiB", **arguments}
