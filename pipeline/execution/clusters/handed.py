"""Run jobs on the cluster of a client that the user made. Cluster and client are used as they are, and left so.

The user hands over a `distributed.Client`, or a cluster such as ``LocalCluster`` or ``SLURMCluster``. Jobs connect a
client of their own to its scheduler. What the cluster lacks is logged once, with what is lost by it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from distributed import Client

from pipeline.common.step_modules import restore_modules
from pipeline.errors import NoWorkers, SchedulerLost, SpecError
from pipeline.execution.clusters.address import limits_of
from pipeline.jobs.cancellation import wait_in_slices
from pipeline.plan.plan import Limits
from pipeline.settings import Settings
from pipeline.storage.urls import unique_name

logger = logging.getLogger(__name__)
INPROC = "inproc://"
"""How addresses begin that only this process can reach."""
_MOST_SATURATION = 1.5
"""Dask's own default is 1.1."""
_handed: dict[str, HandedCluster] = {}
"""Clusters by the address of their scheduler."""


@dataclass
class HandedCluster:
    """A cluster that the user handed over."""

    owner: weakref.ref[Any]
    """The client or cluster of the user; it is not kept alive."""
    address: str
    security: Any
    is_described: bool = False
    """True after what it lacks was logged."""

    @property
    def is_running(self) -> bool:
        """True unless the user has closed it."""
        owner = self.owner()
        status = getattr(owner, "status", None)
        return owner is not None and str(getattr(status, "name", status)) in ("running", "newly-created", "connecting")


def hand_over(owner: Any) -> str:
    """Remember the client or cluster of the user. Return the address of its scheduler, by which jobs find it.

    :raises SpecError: for another object, and for one that was closed.
    """
    scheduler = getattr(owner, "scheduler", None)
    address = getattr(owner, "scheduler_address", None) or getattr(scheduler, "address", None)
    if not isinstance(address, str) or not hasattr(owner, "status"):
        closed = isinstance(owner, Client)
        raise SpecError(
            "the client is not connected" if closed else "neither the name of a cluster, nor a client",
            where="cluster",
            found=f"{type(owner).__module__}.{type(owner).__qualname__}",
            expected="a distributed.Client or a cluster such as LocalCluster that runs; a name; or an address",
            next_step="make a new client" if closed else "",
        )
    handed = HandedCluster(weakref.ref(owner), address, getattr(owner, "security", None))
    if not handed.is_running:
        raise SpecError(
            "the cluster that was handed over is closed",
            where="cluster",
            found=f"{type(owner).__name__} {address}, status {owner.status}",
            expected="one that runs",
            next_step="make a new one",
        )
    known = _handed.get(address)
    if known is None or known.owner() is not owner:
        _handed[address] = replace(handed, is_described=known is not None and known.is_described)
    return address


def find_handed(address: str) -> HandedCluster | None:
    """Return the cluster that was handed over under this address, if it still runs."""
    handed = _handed.get(address)
    return handed if handed is not None and handed.is_running else None


@dataclass(frozen=True)
class HandedScheduler:
    """``type: handed``: the scheduler of a cluster that the user handed over in this process."""

    owns_workers: ClassVar[bool] = False
    settings: Settings
    address: str

    def limits(self) -> Limits:
        """Return the limits of the current workers."""
        with self._connect() as client:
            return limits_of(client)

    def preload(self, *, has_steps: bool) -> None:
        """Do nothing: the workers are the user's."""

    @contextmanager
    def open(self, *, directory: str = "") -> Iterator[Client]:
        """Yield a client of our own, and close it on leaving."""
        with self._connect() as client:
            handed = find_handed(self.address)
            if handed is not None and not handed.is_described:
                _handed[self.address] = replace(handed, is_described=True)
                for difference in differences(client, self.address):
                    logger.warning("%s", difference)
            try:
                yield client
            finally:
                if self.address.startswith(INPROC):
                    # Its workers are threads here: the modules of the job's steps are in this process.
                    restore_modules()

    @contextmanager
    def _connect(self) -> Iterator[Client]:
        handed = find_handed(self.address)
        if handed is None:
            raise SchedulerLost(
                "the cluster that was handed over is closed",
                where=self.address,
                found="no client or cluster of this process that runs there",
                expected="a client or cluster that stays open until the job has ended",
                next_step='make a new client, and resume the job with it: pipeline.resume("@last", client=client)',
            )
        with Client(
            handed.address, security=handed.security, set_as_default=False, timeout=self.settings.scheduler_timeout
        ) as client:
            self._wait_for_worker(client)
            yield client

    def _wait_for_worker(self, client: Client) -> None:
        if client.scheduler_info(n_workers=-1)["workers"]:
            return
        # An adaptive cluster starts its first worker for a task only.
        asked = client.submit(int, key=f"pipeline-first-worker-{unique_name()}", pure=False)
        logger.info("waiting for the first worker of %s", self.address)
        try:
            wait_in_slices(
                lambda piece: client.wait_for_workers(1, timeout=piece), timeout=self.settings.no_workers_timeout
            )
        except TimeoutError as error:
            raise NoWorkers(
                "the cluster that was handed over has no workers",
                where=self.address,
                found=f"0 after {self.settings.no_workers_timeout:.0f} s, though a task waited for one",
                next_step="start workers, as client.cluster.scale(4) does; then run or resume the job",
            ) from error
        finally:
            asked.cancel()


def differences(client: Client, address: str) -> list[str]:
    """Return what a cluster lacks that jobs use, each with what is lost by it."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    if address.startswith(INPROC):
        return [
            "the workers are threads of this process: a step that crashes or never ends takes this process with it, "
            "and the memory of a partition is not limited; LocalCluster(processes=True) has neither"
        ]
    found = []
    if without := [worker for worker in workers if not worker.get("nanny")]:
        found.append(
            f"{len(without)} of {len(workers)} workers have no nanny: one that dies or runs out of memory does not "
            "come back, and the job goes on with the others"
        )
    if any(not worker["memory_limit"] for worker in workers):
        found.append(
            "workers have no memory limit: a partition that needs too much memory is not halved, but may end the worker"
        )
    saturation = _saturation(client)
    if saturation is not None and saturation > _MOST_SATURATION:
        found.append(
            f"worker-saturation is {saturation}: tasks wait at busy workers, so that slow partitions are moved later; "
            "start the cluster with distributed.scheduler.worker-saturation: 1.0"
        )
    return found


def _saturation(client: Client) -> float | None:
    with suppress(Exception):
        return float(client.run_on_scheduler(_read_saturation))
    return None


def _read_saturation(dask_scheduler: Any) -> float:
    return float(dask_scheduler.WORKER_SATURATION)
