"""Batch systems by ``type`` of a cluster file: what each calls and writes otherwise than the others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dask.utils import parse_bytes

from pipeline.execution.clusters.jobqueue import DRIVER_MEMORY, BatchSystem
from pipeline.execution.clusters.security import Certificates


@dataclass(frozen=True)
class Slurm(BatchSystem):
    """``type: slurm``."""

    name = "SLURM"
    commands = ("sbatch", "scancel")

    def gpu_directive(self) -> str:
        """Return Slurm's request, which names no type of GPU."""
        return f"--gpus-per-node={self.gpus}"

    def exclude_directives(self, nodes: Collection[str]) -> list[str]:
        """Return Slurm's directive that leaves nodes out."""
        return [f"--exclude={','.join(sorted(nodes))}"] if nodes else []

    def driver_seconds(self) -> float:
        """Return the walltime of the driver's own batch job."""
        return self._parse_seconds("driver.walltime", str(self.driver.get("walltime", self.walltime)))

    def driver_directives(self, *, name: str, output: str, signal: int) -> list[str]:
        """Return the directives for the driver's own batch job.

        :param signal: seconds before its end at which its shell gets SIGTERM.
        """
        memory = int(parse_bytes(str(self.driver.get("memory", DRIVER_MEMORY)))) >> 20
        queue = self.driver.get("queue", self.queue)
        options = [
            f"--job-name={name}",
            f"--output={output}",
            "--open-mode=append",
            "--requeue",
            f"--signal=B:TERM@{signal}",
            "--nodes=1",
            "--ntasks=1",
            f"--cpus-per-task={self.driver.get('cores', 1)}",
            f"--mem={memory}M",
            f"--time={self.clock(self.driver_seconds())}",
            *([f"--partition={queue}"] if queue else []),
            *([f"--account={self.account}"] if self.account else []),
        ]
        return [f"#SBATCH {option}" for option in options]


@dataclass(frozen=True)
class PBS(BatchSystem):
    """``type: pbs``: OpenPBS, PBS Professional, Torque."""

    name = "PBS"
    commands = ("qsub", "qdel")
    gpu_options = ("resource_spec", "job_extra_directives")
    gpu_example = "select=1:ncpus=16:ngpus={gpus}:mem=64GB"


@dataclass(frozen=True)
class SGE(BatchSystem):
    """``type: sge``: Grid Engine and its successors."""

    name = "SGE"
    commands = ("qsub", "qdel")
    account_key = "project"
    gpu_options = ("resource_spec", "job_extra_directives")
    gpu_example = "gpu={gpus}"


@dataclass(frozen=True)
class LSF(BatchSystem):
    """``type: lsf``."""

    name = "LSF"
    commands = ("bsub", "bkill")
    account_key = "project"
    gpu_example = '["-gpu num={gpus}"]'

    @staticmethod
    def clock(seconds: float) -> str:
        """Return a walltime as ``HH:MM``."""
        return f"{int(seconds) // 3600:02d}:{int(seconds) % 3600 // 60:02d}"


@dataclass(frozen=True)
class HTCondor(BatchSystem):
    """``type: htcondor``. HTCondor has no walltime and no queues; workers still leave at the end of their lifetime."""

    name = "HTCondor"
    commands = ("condor_submit", "condor_rm")
    walltime_key = None
    account_key = "accounting_group"
    gpu_example = "{{request_gpus: {gpus}}}"

    def _arguments(self, certificates: Certificates | None, directory: str) -> dict[str, Any]:
        arguments = super()._arguments(certificates, directory)
        arguments.pop("queue", None)
        account = arguments.pop(self.account_key, None)
        if account:
            extra = dict(arguments.get("job_extra_directives") or {})
            arguments["job_extra_directives"] = {self.account_key: account, **extra}
        # A default that ``options`` may override.
        return {"disk": "1 GiB", **arguments}
