"""Clusters: find one by name, connect a client, and always release it.

A cluster is a name in ``cluster_configs/``, a YAML file, or the address of a scheduler. The file holds ``type`` (an
adapter), the fields of the adapter, and settings for jobs on this cluster (`pipeline.settings`).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pipeline.common.plugins import find_adapter
from pipeline.common.units import plural
from pipeline.errors import SpecError
from pipeline.plan.plan import Limits
from pipeline.settings import RENAMED_SETTINGS, Settings, overridden_choice, setting_names, with_cluster_file
from pipeline.spec.diagnostics import SpecIssues
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.precedence import ResolvedSetting
from pipeline.spec.yaml import parse_text

logger = logging.getLogger(__name__)
BUILT_IN = {
    "local": "pipeline.execution.clusters.local:LocalProcesses",
    "local-cuda": "pipeline.execution.clusters.local_cuda:LocalGpus",
    "address": "pipeline.execution.clusters.address:ExistingScheduler",
    "handed": "pipeline.execution.clusters.handed:HandedScheduler",
    "slurm": "pipeline.execution.clusters.batch_systems:Slurm",
    "pbs": "pipeline.execution.clusters.batch_systems:PBS",
    "sge": "pipeline.execution.clusters.batch_systems:SGE",
    "lsf": "pipeline.execution.clusters.batch_systems:LSF",
    "htcondor": "pipeline.execution.clusters.batch_systems:HTCondor",
}

DASK_CONFIG: dict[str, Any] = {
    "distributed.scheduler.worker-saturation": 1.0,
    # Workers also die for other reasons than the task: the dispatcher counts the crashes of each partition.
    "distributed.scheduler.allowed-failures": 20,
    "distributed.scheduler.work-stealing": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.pause": 0.8,
    "distributed.worker.memory.terminate": 0.92,
    "distributed.comm.timeouts.connect": "30s",
    # Dask looks after its event loops 50 times a second, and at each worker's stack 100 times: an idle worker with its
    # nanny takes 3.9 % of a core, so 1.1 %.
    "distributed.admin.tick.interval": "500ms",
    "distributed.worker.profile.interval": "100ms",
}
"""Configuration of Dask for clusters started here; ``docs/design/001-one-task-a-partition.md`` has the measurements."""


class ClusterAdapter(Protocol):
    """Operations of one type of cluster."""

    @property
    def owns_workers(self) -> bool:
        """True if the cluster is started for the job, so that its workers may be restarted without asking."""

    def limits(self) -> Limits:
        """Return the workers, threads and memory of the cluster, without starting the cluster."""

    def preload(self, *, has_steps: bool) -> None:
        """Begin what can be done in the background for `open` before the job is planned; return at once.

        :param has_steps: True if the job has map steps.
        """

    def open(self, *, directory: str = "") -> Any:
        """Return a context manager that starts or connects, yields a `distributed.Client`, and finally releases all.

        :param directory: the job directory, for files that only workers may read.
        """


def describe_start(adapter: ClusterAdapter) -> str:
    """Return what a cluster starts or connects to, and how long that may take; empty if the adapter does not say."""
    describe = getattr(adapter, "describe_start", None)
    return str(describe()) if describe is not None else ""


def workers_text(limits: Limits) -> str:
    """Return ``2 workers with 1 thread each``."""
    return f"{plural(limits.workers, 'worker')} with {plural(limits.threads, 'thread')} each"


def find_cluster(name: str, *, settings: Settings, folders: tuple[str, ...] = ()) -> ClusterAdapter:
    """Return the adapter of a cluster with its configuration. The cluster's file overrides settings of ``dask.config``.

    :param folders: folders searched first for ``<name>.yaml`` and ``cluster_configs/<name>.yaml``.
    :raises SpecError: when the cluster is unknown, or its file is invalid.
    """
    config, where = _config(name, folders)
    kind = config.pop("type", None)
    if not isinstance(kind, str):
        raise SpecError("a cluster file has no type", where=name, expected="type: " + " | ".join(BUILT_IN))
    adapter = find_adapter(kind, kind="cluster", built_in=BUILT_IN)
    settings = with_cluster_file(settings, _settings_in(config), where=where)
    own = {known.name for known in fields(adapter)} if is_dataclass(adapter) else set(config)
    config = {key: value for key, value in config.items() if key in own or key not in setting_names()}
    try:
        return adapter(settings=settings, **config)  # type: ignore[no-any-return]
    except SpecError as error:
        # The adapter does not know its file.
        if where not in error.where:
            error.where = f"{where}: {error.where}"
        raise
    except TypeError as error:
        raise SpecError(
            "unknown field in a cluster file", where=name, found=str(error).split("__init__() ")[-1]
        ) from error


def site_settings(name: str, *, settings: Settings, folders: tuple[str, ...] = ()) -> Settings:
    """Return ``settings`` overridden by the file of a cluster, as `find_cluster` passes them to its adapter."""
    config, where = _config(name, folders)
    return with_cluster_file(settings, _settings_in(config), where=where)


def _settings_in(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key in setting_names() or key in RENAMED_SETTINGS}


@contextmanager
def open_cluster(adapter: ClusterAdapter, *, directory: str = "") -> Iterator[Any]:
    """Yield a client of the running cluster. The cluster is released on leaving, also after an error.

    A cluster that closes slowly, or with an error, does not change the outcome of the block.

    :param directory: the job directory.
    """
    cluster = adapter.open(directory=directory)
    client = cluster.__enter__()
    try:
        yield client
    except BaseException as error:
        _close(cluster, error)
        raise
    _close(cluster, None)


def _close(cluster: AbstractContextManager[Any], outcome: BaseException | None) -> None:
    """Release a cluster. An error of that is logged: the outcome of the run counts, whatever it is.

    :param outcome: Error of the run.
    """
    try:
        cluster.__exit__(type(outcome) if outcome else None, outcome, outcome.__traceback__ if outcome else None)
    except Exception as error:
        if error is not outcome:
            text = str(error) or "no answer in time"
            logger.warning("the cluster did not close cleanly: %s: %s", type(error).__name__, text)


def _config(name: str, folders: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Return the configuration of a cluster, and its origin."""
    if "://" in name:
        return {"type": "handed" if _is_handed(name) else "address", "address": name}, name
    for path in _candidates(name, folders):
        if path.is_file():
            return _read(path), str(path)
    if name == "local":
        return {"type": "local"}, name
    known = sorted({path.stem for folder in _homes(folders) for path in folder.glob("*.yaml")} | {"local"})
    raise SpecError(
        "unknown cluster",
        where="cluster",
        found=name,
        expected=", ".join(known) + ", a YAML file, or an address such as tcp://host:8786",
    )


def _is_handed(address: str) -> bool:
    """True for the scheduler of a client that the user has handed over in this process."""
    handed = sys.modules.get("pipeline.execution.clusters.handed")
    return address.startswith("inproc://") or (handed is not None and handed.find_handed(address) is not None)


def _homes(folders: tuple[str, ...]) -> list[Path]:
    roots = [*(Path(folder) for folder in folders), Path(os.getcwd()), Path(__file__).parents[3]]
    return [root / "cluster_configs" for root in roots]


def _candidates(name: str, folders: tuple[str, ...]) -> list[Path]:
    if name.endswith((".yaml", ".yml")):
        return [Path(folder) / name for folder in ("", *folders)]
    return [home / f"{name}.yaml" for home in _homes(folders)]


def _read(path: Path) -> dict[str, Any]:
    document = parse_text(path.read_text(encoding="utf-8"), name=str(path))
    if document.issues:
        raise SpecIssues(list(document.issues), name=str(path))
    config = document.data
    if not isinstance(config, Mapping):
        raise SpecError("a cluster file is not a mapping", where=str(path), found=type(config).__name__)
    return {str(key).replace("-", "_"): value for key, value in config.items()}


def cluster_of(spec: JobSpec, *, settings: Settings) -> ClusterAdapter:
    """Return the adapter of the chosen cluster; see `cluster_choice`."""
    name = cluster_choice(spec, settings=settings).value
    return find_cluster(name, settings=settings, folders=settings.import_paths)


def cluster_choice(spec: JobSpec, *, settings: Settings, of_spec: ResolvedSetting | None = None) -> ResolvedSetting:
    """Return the name of the cluster and its origin: a flag or a variable, else the spec, else ``dask.config``.

    :param of_spec: origin of the spec's ``cluster``, if known.
    """
    return overridden_choice("cluster", spec.cluster, default="local", settings=settings, of_spec=of_spec)


def settings_of(spec: JobSpec, *, settings: Settings) -> Settings:
    """Return ``settings`` overridden by the file of the chosen cluster, with this cluster as ``cluster``."""
    name = cluster_choice(spec, settings=settings).value
    if settings.cluster not in (None, name):
        settings = replace(settings, cluster=name)
    return site_settings(name, settings=settings, folders=settings.import_paths)
