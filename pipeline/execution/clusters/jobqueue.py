"""Workers as jobs of a batch system, through dask-jobqueue. Scheduler and driver run on the submitting machine.
dask-jobqueue writes the job scripts; `pipeline.execution.clusters.worker_pool` submits them.

Workers leave before their walltime, staggered so that their replacements start first. All jobs end when the scheduler
is gone, even after a crash of the driver.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import dask.config
from dask.utils import parse_bytes, parse_timedelta
from distributed import Client
from distributed.utils import get_ip_interface

from pipeline.common.forkserver import thread_environment
from pipeline.common.units import format_seconds, plural
from pipeline.devices.memory import DEVICE_MEMORY, allowed_device_memory
from pipeline.errors import InfrastructureError, SpecError
from pipeline.execution.clusters import DASK_CONFIG, workers_text
from pipeline.execution.clusters.batch_commands import SYSTEMS
from pipeline.execution.clusters.devices import ExpectedGpus
from pipeline.execution.clusters.lazy_dashboard import add_dashboard
from pipeline.execution.clusters.pool import Pool, PoolPolicy
from pipeline.execution.clusters.requests import FIRST, GROWTH, Request, Shape
from pipeline.execution.clusters.security import LOOPBACK, Certificates, certificates_in, check_dashboard, is_loopback
from pipeline.execution.clusters.site_config import site_lines, site_option
from pipeline.execution.clusters.worker_drain import LIFETIME, STAGGER, STARTED
from pipeline.execution.clusters.worker_pool import WORKER_NAME, PoolClient, WorkerPool
from pipeline.execution.dask_config import override_config
from pipeline.execution.placement import GPU_RESOURCE
from pipeline.jobs import layout
from pipeline.jobs.cancellation import wait_in_slices
from pipeline.plan.plan import Limits
from pipeline.settings import Settings
from pipeline.storage.local import LocalStore
from pipeline.storage.store import open_store
from pipeline.storage.urls import is_local_path, local_path

CLOSING_SECONDS = 60.0
"""Most seconds reserved for a worker to close between the end of its lifetime and the end of its job."""
LEAST_CLOSING_SECONDS = 15.0
"""Least seconds reserved for that; between them, a tenth of the walltime."""
STAGGER_SECONDS = 120.0
"""Most seconds between workers that leave, unless the file says otherwise; else a tenth of the walltime."""
LEAST_WORK_SECONDS = 30.0
"""Least seconds of a walltime that must be left for starting a worker and for work."""
_CLOCK = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")
_OURS = frozenset(("cores", "memory", "processes", "queue", "walltime", "interface", "security", "protocol"))
SCRIPT = "worker.sh"
"""Name of the script of the last job, in the folder of the logs."""
NANNY_SETUP = "pipeline.execution.clusters.nanny_setup"
WALLTIME = "1 hour"
"""Walltime if neither the file nor the site says one."""
_DRIVER = frozenset(("walltime", "cores", "memory", "queue"))
_SHAPE = frozenset(("queue", "account", "cores", "memory", "walltime", "options"))
_GROW = frozenset(("memory", "walltime"))
DRIVER_MEMORY = "4 GiB"
CUDA_WORKER = "dask_cuda.cli"
"""Module that starts a worker process for each GPU of a job."""


def job_name(directory: str) -> str:
    """Return the name of the batch jobs of the job in ``directory``."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", directory.rstrip("/").rpartition("/")[2])
    return f"{WORKER_NAME}-{name}" if name else WORKER_NAME


def _parameters(job: Any) -> set[str]:
    """Return the arguments of a job class of dask-jobqueue, and of its base."""
    owners = (job, job.__mro__[1])
    return {name for owner in owners for name in inspect.signature(owner.__init__).parameters}


@dataclass(frozen=True)
class BatchSystem:
    """Base of the adapters: the fields of a cluster file."""

    owns_workers: ClassVar[bool] = True
    name: ClassVar[str]
    """Name of dask-jobqueue's class, without ``Cluster``."""
    commands: ClassVar[tuple[str, ...]]
    """Programs that must be on the PATH."""
    walltime_key: ClassVar[str | None] = "walltime"
    """Argument of dask-jobqueue's class for the walltime; None: the batch system has none."""
    account_key: ClassVar[str] = "account"
    queue_key: ClassVar[str] = "queue"
    gpu_options: ClassVar[tuple[str, ...]] = ("job_extra_directives",)
    """Options with which a site requests GPUs; one of them must name them, where `gpu_directive` does not."""
    gpu_example: ClassVar[str] = ""
    """Example of such an option."""

    settings: Settings
    cores: int = 0
    """Cores of one job. Default: the site's ``jobqueue.<type>.cores`` in Dask's configuration."""
    memory: str = ""
    """Memory of one job, such as ``16 GiB``. Default: the site's."""
    jobs: int = 1
    """Jobs at work at a time; ``--workers`` overrides this field."""
    minimum: int | None = None
    """Jobs that are submitted even if fewer partitions are left than they could run. Default: ``jobs``."""
    processes: int = 1
    """Worker processes of one job; they share its cores and memory equally. With ``gpus``: as many as GPUs."""
    gpus: int = 0
    """GPUs of one job, each with a worker process of dask-cuda; 0: workers on CPUs."""
    device_memory: float | int | str = DEVICE_MEMORY
    """Share of a GPU's free memory that batches may use, or a size such as ``40 GiB``."""
    walltime: str = ""
    """Walltime of one job: ``HH:MM:SS``, ``D-HH:MM:SS`` or ``90 minutes``. In longer runs new jobs take over. Default:
    the site's, else an hour."""
    stagger: str | None = None
    """Time between workers that leave. Replacements are submitted at least as long before. Default: 2 minutes, at most
    a tenth of the walltime."""
    wait: str = "1 hour"
    """Time without any worker, while jobs wait in the queue."""
    queue: str | None = None
    """Queue or partition."""
    account: str | None = None
    """Account or project."""
    interface: str | None = None
    """Network interface of the fast network, such as ``ib0``. Default: the interface of the default route."""
    shared_directory: str | None = None
    """Folder for certificates, readable by workers. Default: the job directory."""
    driver: Mapping[str, Any] = field(default_factory=dict)
    """Batch job of the driver, with ``submit --driver batch``: ``walltime``, ``cores`` (1), ``memory`` (4 GiB) and
    ``queue``; walltime and queue are those of the workers by default."""
    grow: Mapping[str, Any] = field(default_factory=dict)
    """Limits up to which ``memory`` and ``walltime`` grow by half for the jobs that follow one that was killed for
    them, such as ``{memory: 128 GiB}``. Default: they stay."""
    shapes: Sequence[Mapping[str, Any]] = ()
    """Other jobs to submit when those of the fields above are refused or wait long in the queue, in order: each has any
    of ``queue``, ``account``, ``cores``, ``memory``, ``walltime`` and ``options``, and the rest from above."""
    shape_wait: str = "10 minutes"
    """Time in the queue after which a job of the next of ``shapes`` is submitted in place of one."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of dask-jobqueue's class, such as ``job_extra_directives``, ``python``, ``local_directory``."""

    def __post_init__(self) -> None:
        self._take_from_site()
        reserved = sorted(_OURS & set(self.options))
        if reserved:
            raise self._invalid(
                f"options.{reserved[0]}", str(self.options[reserved[0]]), "a field of the cluster file itself"
            )
        if not (isinstance(self.cores, int) and isinstance(self.processes, int) and self.cores >= self.processes > 0):
            raise self._invalid("processes", f"{self.processes} for {self.cores} cores", "at least one core for each")
        unknown = sorted(set(self.driver) - _DRIVER)
        if unknown:
            raise self._invalid(f"driver.{unknown[0]}", str(self.driver[unknown[0]]), ", ".join(sorted(_DRIVER)))
        allowed_device_memory(self.device_memory, free=0)
        self._check_gpus()
        self._check_requests()
        least = self._stagger() + self._closing() + LEAST_WORK_SECONDS
        if self._seconds("walltime") < least:
            parts = (
                f"{self._stagger():.0f} s of stagger, {self._closing():.0f} s to close and {LEAST_WORK_SECONDS:.0f} s"
            )
            raise self._invalid("walltime", self.walltime, f"at least {least:.0f} s: {parts} to start and work")

    def _take_from_site(self) -> None:
        """Set the fields that the file leaves to Dask's configuration.

        :raises SpecError: for a field that neither has.
        """
        system = self.name.lower()
        for name, default in (("cores", 0), ("memory", ""), ("walltime", WALLTIME)):
            if getattr(self, name):
                continue
            value = site_option(system, name) or default
            if not value:
                raise SpecError(
                    "a cluster file lacks a field",
                    where=f"type: {system}, {name}",
                    found=f"none, and no jobqueue.{system}.{name} in Dask's configuration",
                    expected=f"{name} of one job, such as {'16' if name == 'cores' else '64 GiB'}",
                    next_step="add it to the cluster file, or to jobqueue.yaml in one of: "
                    + ", ".join(dask.config.paths),
                )
            # Frozen, as all adapters are.
            object.__setattr__(self, name, value if name == "cores" else str(value))

    def _check_requests(self) -> None:
        """Check the other shapes, which are cluster files of their own, and the limits up to which jobs grow."""
        for number, shape in enumerate(self.shapes):
            unknown = sorted(set(shape) - _SHAPE) if isinstance(shape, Mapping) else [str(shape)]
            if unknown or not shape:
                found = unknown[0] if unknown else "no field"
                raise self._invalid(f"shapes.{number}", found, f"any of {', '.join(sorted(_SHAPE))}")
        for system in self._systems[1:]:
            # Made, and so checked.
            system._bytes()
        if self.shapes:
            self._seconds("shape_wait")
        unknown = sorted(set(self.grow) - _GROW)
        if unknown:
            raise self._invalid(f"grow.{unknown[0]}", str(self.grow[unknown[0]]), ", ".join(sorted(_GROW)))
        if "memory" in self.grow and self._grown_bytes(1) == self._bytes():
            raise self._invalid("grow.memory", str(self.grow["memory"]), f"more than memory: {self.memory}")
        if "walltime" in self.grow and self._grown_seconds(1) == self._seconds("walltime"):
            raise self._invalid("grow.walltime", str(self.grow["walltime"]), f"more than walltime: {self.walltime}")

    @property
    def _systems(self) -> tuple[BatchSystem, ...]:
        """The fields of each shape, the first that of the file itself."""
        plain = replace(self, shapes=(), grow={}) if self.shapes else self
        made = [
            replace(plain, **{**shape, "options": {**self.options, **shape.get("options", {})}})
            for shape in self.shapes
        ]
        return (self, *made)

    def _grown_bytes(self, steps: int) -> int:
        """Return the memory of a job whose memory has grown so many times."""
        limit = self._parse_bytes("grow.memory", str(self.grow.get("memory", self.memory)))
        return max(self._bytes(), min(limit, int(self._bytes() * GROWTH**steps)))

    def _grown_seconds(self, steps: int) -> float:
        """Return the walltime of a job whose walltime has grown so many times."""
        seconds = self._seconds("walltime")
        limit = self._parse_seconds("grow.walltime", str(self.grow.get("walltime", self.walltime)))
        return max(seconds, min(limit, seconds * GROWTH**steps))

    def grown(self, request: Request) -> BatchSystem:
        """Return the fields of the jobs of a request."""
        system = self._systems[request.shape]
        memory, walltime = system.memory, system.walltime
        if request.memory:
            memory = f"{replace(system, grow=self.grow)._grown_bytes(request.memory)} B"
        if request.walltime:
            walltime = f"{replace(system, grow=self.grow)._grown_seconds(request.walltime):.0f} s"
        return replace(system, shapes=(), grow={}, memory=memory, walltime=walltime)

    def _steps(self, name: str) -> int:
        """Return how often ``memory`` or ``walltime`` can grow until it reaches its limit."""
        value = self._grown_bytes if name == "memory" else self._grown_seconds
        if name not in self.grow:
            return 0
        return next(steps for steps in range(64) if value(steps) == value(steps + 1))

    def shape_of(self, number: int) -> Shape:
        """Return the size of the jobs of a shape."""
        system = replace(self._systems[number], shapes=(), grow=self.grow) if number else self
        steps = system._steps("walltime")
        grown = [self.grown(Request(number, walltime=step)) for step in range(steps + 1)]
        return Shape(
            system.processes * system._threads(),
            tuple(one._lifetime() - one._stagger() for one in grown),
            system._steps("memory"),
        )

    def _check_gpus(self) -> None:
        """Check that GPUs are requested from the batch system, and that each has a worker process."""
        if not (isinstance(self.gpus, int) and self.gpus >= 0):
            raise self._invalid("gpus", str(self.gpus), "a number of GPUs, or 0")
        if not self.gpus:
            return
        if self.processes != self.gpus:
            expected = f"{self.gpus}, as many as gpus: a worker process uses one GPU"
            raise self._invalid("processes", str(self.processes), expected)
        if "worker_command" in self.options:
            raise self._invalid("options.worker_command", str(self.options["worker_command"]), f"none: {CUDA_WORKER}")
        if not (self.gpu_directive() or self._names_gpus()):
            raise SpecError(
                f"jobs of {self.name} need a request for GPUs of your site's own",
                where=f"type: {self.name.lower()}, options.{self.gpu_options[0]}",
                found=str(self.options.get(self.gpu_options[0], "none")),
                expected=f"a request for {self.gpus}, such as {self.gpu_example.format(gpus=self.gpus)}",
                next_step="ask your site how jobs request GPUs; its documentation has an example for dask-jobqueue",
            )

    def _names_gpus(self) -> bool:
        """True if an option mentions GPUs."""
        return any("gpu" in str(self.options.get(option, "")).lower() for option in self.gpu_options)

    def gpu_directive(self) -> str:
        """Return the directive that requests GPUs; empty where each site has its own."""
        return ""

    def exclude_directives(self, nodes: Collection[str]) -> list[str]:
        """Return the directives that leave nodes out; empty where there are none for that."""
        return []

    def expected_gpus(self) -> list[ExpectedGpus]:
        """Return the GPUs that the cluster will have at most; what kind they are is known on the nodes."""
        return [ExpectedGpus(self._jobs() * self.gpus)] if self.gpus else []

    # Limits

    def limits(self) -> Limits:
        """Return workers, threads and memory, from the file and the settings. Nothing is submitted."""
        jobs, systems = self._jobs(), self._systems
        # Partitions must fit the jobs of every shape.
        return Limits(
            workers=jobs * self.processes,
            threads=min(system._threads() for system in systems),
            memory=min(system._bytes() for system in systems) // self.processes,
        )

    def describe_start(self) -> str:
        """Return the number of jobs and workers, and the longest wait for the first one."""
        jobs = f"{plural(self._jobs(), 'job')} of {self.name}"
        return f"{jobs}: {workers_text(self.limits())}; the first within {format_seconds(self._seconds('wait'))}"

    def preload(self, *, has_steps: bool) -> None:
        """Do nothing: a batch job for a plan that fails would wait and run for nothing."""

    def _jobs(self) -> int:
        return -(-self.settings.workers // self.processes) if self.settings.workers else int(self.jobs)

    def _threads(self) -> int:
        return self.settings.threads or self.cores // self.processes

    def _bytes(self) -> int:
        return self._parse_bytes("memory", self.memory)

    def _parse_bytes(self, name: str, text: str) -> int:
        try:
            return int(parse_bytes(text))
        except ValueError as error:
            raise self._invalid(name, repr(text), "a size such as 16 GiB") from error

    def _seconds(self, name: str) -> float:
        """Return the seconds of a field that is a duration."""
        return self._parse_seconds(name, str(getattr(self, name)))

    def _parse_seconds(self, name: str, text: str) -> float:
        clock = _CLOCK.fullmatch(text)
        if clock:
            days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
            return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
        try:
            return float(parse_timedelta(text, default="s"))
        except (ValueError, KeyError) as error:
            raise self._invalid(name, repr(text), "HH:MM:SS, or a duration such as 90 minutes") from error

    def _closing(self) -> float:
        """Return the seconds between the time at which all workers have left and the walltime."""
        return min(CLOSING_SECONDS, max(LEAST_CLOSING_SECONDS, self._seconds("walltime") / 10))

    def _stagger(self) -> float:
        """Return the seconds by which workers may leave earlier than others."""
        return self._seconds("stagger") if self.stagger else min(STAGGER_SECONDS, self._seconds("walltime") / 10)

    def _lifetime(self) -> float:
        """Return the seconds from the start of a job until its workers have left, at the latest."""
        return self._seconds("walltime") - self._closing()

    def _invalid(self, name: str, found: str, expected: str) -> SpecError:
        return SpecError(
            "invalid value in a cluster file",
            where=f"type: {self.name.lower()}, {name}",
            found=found,
            expected=expected,
        )

    # Lifecycle

    @contextmanager
    def open(self, *, directory: str = "") -> Iterator[Client]:
        """Submit the jobs and yield a client once one of them has started; cancel all jobs on leaving.

        :param directory: the job directory; certificates and logs of the jobs are stored there.
        :raises NoWorkers: when no job started in time.
        :raises RefusedForSafety: when TLS between hosts is impossible.
        """
        check_dashboard(self.settings.dashboard)
        with self._certificates(directory) as certificates, self._start(certificates, directory) as client:
            yield client

    def is_on_one_host(self) -> bool:
        """True if only this machine can reach scheduler and workers."""
        if self.interface is None:
            return False
        try:
            return is_loopback(get_ip_interface(self.interface))
        except ValueError as error:
            raise self._invalid("interface", self.interface, str(error)) from error

    def _certificates(self, directory: str) -> AbstractContextManager[Certificates | None]:
        if not self.settings.tls and (self.is_on_one_host() or self.settings.insecure_network):
            return nullcontext()
        shared = self.shared_directory or directory
        if not shared or not is_local_path(shared):
            raise self._invalid(
                "shared_directory",
                f"none, and the job directory is {directory or 'a temporary one'}",
                "a folder that workers of other machines can read, for certificates",
            )
        return certificates_in(shared)

    @contextmanager
    def _start(self, certificates: Certificates | None, directory: str) -> Iterator[Client]:
        missing = [program for program in self.commands if shutil.which(program) is None]
        if missing:
            raise SpecError(
                "commands of the batch system not found on this machine",
                where=f"type: {self.name.lower()}",
                found=f"no {', no '.join(missing)} on the PATH",
                next_step="run it on a machine that can submit jobs, such as a login node",
            )
        # The pool knows how long to wait: the scheduler would fail all tasks while jobs wait in the queue.
        config = {**DASK_CONFIG, "distributed.scheduler.no-workers-timeout": None}
        with override_config(config):
            cluster = self.make(certificates, directory=directory)
            try:
                add_dashboard(cluster.scheduler)
                pool = self._worker_pool(cluster, directory)
                with PoolClient(cluster, supply=pool) as client:
                    try:
                        pool.open(cluster.scheduler)
                        self._await_workers(client, pool)
                        yield client
                    finally:
                        pool.close()
            finally:
                cluster.close(timeout=60)

    def _worker_pool(self, cluster: Any, directory: str) -> WorkerPool:
        """Return the pool of jobs for a running scheduler; nothing is submitted yet."""
        jobs = self._jobs()
        minimum = jobs if self.minimum is None else min(self.minimum, jobs)
        policy = PoolPolicy(
            jobs,
            minimum,
            tuple(self.shape_of(number) for number in range(len(self.shapes) + 1)),
            lead=self._stagger(),
            patience=self._seconds("wait"),
            shape_wait=self._seconds("shape_wait"),
        )
        sample = cluster.job_cls(cluster.scheduler.address, name=WORKER_NAME, **cluster._job_kwargs)
        commands = replace(
            SYSTEMS[self.name], submit_command=sample.submit_command, cancel_command=sample.cancel_command
        )
        logs = sample.log_directory
        folder = Path(logs or tempfile.mkdtemp(prefix="pipeline-jobs-"))
        known = set(_parameters(cluster.job_cls)) - {"security", "protocol"}

        def write_script(number: int, request: Request, excluded: Collection[str]) -> Path:
            arguments = dict(cluster._job_kwargs)
            if request != FIRST or excluded:
                own = self.grown(request)._arguments(None, directory)
                directives = [*own.get("job_extra_directives", ()), *self.exclude_directives(excluded)]
                kept = {name: value for name, value in own.items() if name in known}
                arguments |= {**kept, **({"job_extra_directives": directives} if directives else {})}
            # The scheduler knows a job by the name of its workers.
            job = cluster.job_cls(cluster.scheduler.address, name=f"{WORKER_NAME}-{number}", **arguments)
            path = folder / SCRIPT
            path.write_text(job.job_script(), encoding="utf-8")
            path.chmod(0o700)
            return path

        return WorkerPool(
            Pool(policy),
            commands,
            write_script,
            where=f"type: {self.name.lower()}",
            store=open_store(directory, private=True) if directory else None,
            logs=Path(logs) if logs else None,
            job_name=sample.job_name or "",
        )

    def make(self, certificates: Certificates | None, *, directory: str = "") -> Any:
        """Return dask-jobqueue's cluster with a running scheduler; no job is submitted yet."""
        try:
            import dask_jobqueue
        except ImportError as error:
            raise SpecError(
                "the package dask-jobqueue is not installed",
                where=f"type: {self.name.lower()}",
                found=str(error),
                next_step='pip install ".[jobqueue]"',
            ) from error
        cluster = getattr(dask_jobqueue, f"{self.name}Cluster")
        known = _parameters(cluster.job_cls)
        unknown = sorted(set(self.options) - known)
        if unknown:
            raise self._invalid(
                f"options.{unknown[0]}", unknown[0], ", ".join(sorted(known - _OURS - {"self", "name"}))
            )
        try:
            return cluster(**self._arguments(certificates, directory))
        except SpecError:
            raise
        except (OSError, RuntimeError) as error:
            raise InfrastructureError(
                "could not start the scheduler", where=f"type: {self.name.lower()}", found=str(error)
            ) from error
        except (TypeError, ValueError) as error:
            raise self._invalid("options", str(error).splitlines()[0], f"arguments of {self.name}Cluster") from error

    def _arguments(self, certificates: Certificates | None, directory: str) -> dict[str, Any]:
        options = dict(self.options)
        environment = self._environment()
        system = self.name.lower()
        prologue = [*environment, *options.pop("job_script_prologue", site_lines(system, "job-script-prologue"))]
        arguments = options.pop("worker_extra_args", site_lines(system, "worker-extra-args"))
        named = {self.queue_key: self.queue, self.account_key: self.account}
        if directory and is_local_path(directory) and site_option(system, "log-directory") is None:
            folder = local_path(directory) / layout.WORKER_LOGS
            # The batch system would create the folder with the permissions of the umask.
            LocalStore(folder.parent, private=True).make_folder(folder)
            named["log_directory"] = str(folder)
        if self.walltime_key:
            named[self.walltime_key] = self.clock(self._seconds("walltime"))
        if self.gpus:
            named["worker_command"] = CUDA_WORKER
            if not self._names_gpus():
                options["job_extra_directives"] = [self.gpu_directive(), *options.get("job_extra_directives", ())]
        return {
            "cores": self._threads() * self.processes,
            "memory": self.memory,
            "processes": self.processes,
            "interface": self.interface,
            "protocol": "tls://" if certificates else "tcp://",
            "security": certificates.security() if certificates else None,
            "scheduler_options": {"dashboard_address": self.settings.dashboard, "dashboard": False},
            "job_name": job_name(directory),
            "job_script_prologue": prologue,
            "worker_extra_args": [*map(str, arguments), *self._worker_arguments()],
            "silence_logs": logging.ERROR,
            **{name: value for name, value in named.items() if value is not None},
            **options,
        }

    def _worker_arguments(self) -> list[str]:
        # The HTTP server of a worker has no TLS.
        shown = ["--dashboard", "--dashboard-address", f"{LOOPBACK}:0"]
        # Not by a variable: Dask makes the name of a resource in a variable lowercase.
        resources = ["--resources", f"{GPU_RESOURCE}={self._threads()}"] if self.gpus else []
        # dask-cuda's command line does not have the option, and dask worker's ignores the configuration.
        nanny = [] if self.gpus else ["--preload-nanny", NANNY_SETUP]
        return [*shown, *resources, "--preload", "pipeline.execution.clusters.worker_setup", *nanny]

    def _environment(self) -> list[str]:
        """Return lines of the job script: Dask's configuration for workers, and the cores per worker."""
        config = dict(DASK_CONFIG)
        variables = thread_environment(self.cores, self.processes * self._threads())
        if self.gpus:
            # Else CUDA numbers the fastest card 0, and NVML the first one on the bus.
            variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            variables["DASK_DISTRIBUTED__NANNY__PRELOAD"] = NANNY_SETUP
        names = {key.upper().replace(".", "__").replace("-", "_"): value for key, value in config.items()}
        return [
            *(f"export DASK_{name}={value}" for name, value in names.items()),
            *(f"export {name}={value}" for name, value in variables.items()),
            # The time a prologue takes is part of the walltime. Backticks: $() is a macro of HTCondor.
            f"export {STARTED}=`date +%s`",
            f"export {LIFETIME}={self._lifetime():.0f}",
            f"export {STAGGER}={self._stagger():.0f}",
            # Else the shell ends at SIGTERM, and with it the job, before the workers have committed.
            "trap : TERM",
        ]

    @staticmethod
    def clock(seconds: float) -> str:
        """Return a walltime in the format of the batch system."""
        minutes, rest = divmod(int(seconds), 60)
        return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"

    def _await_workers(self, client: Client, pool: WorkerPool) -> None:
        """Wait for the first worker.

        :raises SpecError: when the batch system refuses the job.
        :raises NoWorkers: when no job starts within ``wait``, or jobs end before a worker joins.
        """

        def wait(piece: float) -> None:
            pool.expects_workers()
            client.wait_for_workers(1, timeout=piece)

        # The pool ends the wait: it knows of the jobs in the queue.
        wait_in_slices(wait, timeout=math.inf)
