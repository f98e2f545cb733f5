"""The driver of a submitted job as a batch job, which outlives its own walltime; also the code of that process.

The batch job asks for a signal before its end. The driver then commits, records the job as INTERRUPTED and ends. The
script requeues the batch job, under the same id, and the next allocation resumes. It ends for good when the job has
ended or failed, was cancelled, or after `IDLE_STARTS` allocations in a row without a new receipt.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.units import utc_now
from pipeline.errors import InfrastructureError, SpecError
from pipeline.execution.clusters import ClusterAdapter
from pipeline.execution.clusters.batch_commands import SYSTEMS, CommandFailed
from pipeline.execution.clusters.batch_systems import Slurm
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import LEASE_SECONDS
from pipeline.service import driver_process
from pipeline.service.queue import LeaseWatch, claim_start, note_start, view_job
from pipeline.storage.local import LocalStore

IDLE_STARTS = 5
"""Allocations in a row without a new receipt, after which the driver is not started again."""
SIGNAL_SECONDS = 90
"""Most seconds before the end of an allocation at which the driver is asked to end; a third of a shorter one."""
_PACKAGE = str(Path(__file__).parents[2])
_SCRIPT = """\
#!/usr/bin/env bash
{directives}
# Drives the job {job}, and queues itself again until the job has ended. Written by: python -m pipeline submit
cd {folder} || exit 2
export PYTHONPATH={package}${{PYTHONPATH:+:$PYTHONPATH}}
trap 'kill -TERM $child 2>/dev/null' TERM
{python} -m pipeline.service.batch_driver {directory} &
child=$!
# A signal ends wait, not the driver.
while :; do
    wait $child
    code=$?
    kill -0 $child 2>/dev/null || break
done
echo "the driver ended with exit status $code"
case $code in
    74 | 75 | 130 | 137 | 143) ;; # storage, the cluster, or a signal: the next allocation goes on
    *) exit $code ;;
esac
# Who cancels this batch job wants it to end.
[ "$(squeue --noheader --jobs=$SLURM_JOB_ID --format=%T)" = RUNNING ] || exit $code
receipts=$(find {directory}/rounds -path '*/receipts/*.json' | wc -l)
{{ read -r before idle <{count}; }} 2>/dev/null || {{ before=-1; idle=0; }}
if [ "$receipts" = "$before" ]; then idle=$((idle + 1)); else idle=0; fi
echo "$receipts $idle" >{count}
if [ $idle -ge {idle_starts} ]; then
    echo "nothing was done in $idle allocations in a row: resume the job by hand"
    exit $code
fi
# A site may forbid requeueing; then a new batch job takes over.
scontrol requeue $SLURM_JOB_ID || sbatch {script}
exit $code
"""


@dataclass(frozen=True)
class BatchDriver:
    """The batch job that drives a job."""

    id: str
    """Id that the batch system gave it."""
    script: str
    output: str
    """File with the output of all its allocations."""


def check_batch_driver(cluster: ClusterAdapter) -> Slurm:
    """Return the batch system of a cluster on which drivers can be batch jobs.

    :raises SpecError: for any other cluster.
    """
    if isinstance(cluster, Slurm):
        return cluster
    raise SpecError(
        "only Slurm can run the driver as a batch job",
        where="--driver batch",
        found=f"cluster of type {type(cluster).__name__}",
        expected="a cluster file with type: slurm",
        next_step="write a batch job with the command: python -m pipeline resume JOB; docs/hpc.md has an example",
    )


def submit_batch_driver(job: JobDirectory, cluster: Slurm) -> BatchDriver:
    """Submit a batch job that drives ``job``.

    :raises SpecError: when the batch system refuses it.
    :raises InfrastructureError: when the batch system does not answer.
    """
    if not isinstance(job.store, LocalStore):
        raise SpecError(
            "the driver as a batch job needs a job directory that all nodes see",
            where="--directory",
            found=job.root,
            expected="a folder of a shared file system",
        )
    folder = job.store.path(layout.STARTS)
    job.store.make_folder(folder)
    script, output = folder / "driver.sh", folder / "driver.out"
    script.write_text(driver_script(job, cluster, script=script, output=output), encoding="utf-8")
    script.chmod(0o700)
    try:
        id = SYSTEMS[cluster.name].submit(script)
    except CommandFailed as error:
        kind = SpecError if error.is_refused else InfrastructureError
        raise kind(
            "the batch system did not take the driver",
            where=str(script),
            found=error.text,
            next_step="fix the field driver of the cluster file, or submit again",
        ) from error
    job.events.append("batch_driver", system=cluster.name, id=id, script=str(script))
    return BatchDriver(id, str(script), str(output))


def driver_script(job: JobDirectory, cluster: Slurm, *, script: Path, output: Path) -> str:
    """Return the script of the batch job that drives ``job``."""
    seconds = cluster.driver_seconds()
    directives = cluster.driver_directives(
        name=f"pipeline-driver-{job.id}", output=str(output), signal=min(SIGNAL_SECONDS, int(seconds / 3))
    )
    return _SCRIPT.format(
        directives="\n".join(directives),
        job=job.id,
        folder=shlex.quote(job.record.working_directory),
        package=shlex.quote(_PACKAGE),
        python=shlex.quote(sys.executable),
        directory=shlex.quote(job.root),
        count=shlex.quote(str(output.with_name("driver.count"))),
        script=shlex.quote(str(script)),
        idle_starts=IDLE_STARTS,
    )


def main(arguments: list[str]) -> int:
    """Drive the job in an allocation of its batch job. Return the exit status."""
    (directory,) = arguments
    job = JobDirectory.open(directory)
    view = view_job(job, LeaseWatch(LEASE_SECONDS), now=utc_now())
    number = view.last_start + 1 if view is not None else 1
    start = claim_start(job.store, number=number, submission=view.submission if view else 1, by="batch")
    if start is not None:
        note_start(job.store, start, pid=os.getpid())
    return driver_process.main([directory, str(number), ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
