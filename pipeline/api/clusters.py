"""Clusters of the user: a `distributed.Client`, a ``LocalCluster`` and the like, instead of the name of a cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.errors import SpecError
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec

AnyCluster = Any
"""A `distributed.Client`, or a cluster with ``scheduler_address``."""


def cluster_name(cluster: str | AnyCluster | None) -> str | None:
    """Return the name of a cluster; for a client the address of its scheduler.

    :raises SpecError: for another object, and for a client that was closed.
    """
    if cluster is None or isinstance(cluster, str):
        return cluster
    from pipeline.execution.clusters.handed import hand_over

    return hand_over(cluster)


def on_client(settings: Settings, client: AnyCluster | None) -> Settings:
    """Return settings with which jobs run on ``client``; None: as they are."""
    return settings if client is None else replace(settings, cluster=cluster_name(client))


def refuse_inproc(spec: JobSpec, settings: Settings) -> None:
    """Refuse to run a job in the background on workers that are threads of this process.

    :raises SpecError: for such a cluster.
    """
    name = settings.cluster or spec.cluster or ""
    if name.startswith("inproc://"):
        raise SpecError(
            "a job in the background cannot run on threads of this process",
            where="cluster",
            found=name,
            expected="a cluster that other processes can reach",
            next_step="job.run(), or make the client with processes=True",
        )
