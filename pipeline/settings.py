"""How jobs run on a site: from ``dask.config`` under ``pipeline:``, overridden by flags.

A file such as ``~/.config/dask/pipeline.yaml`` holds::

    pipeline:
      directory: /scratch/me/jobs
      workers: 4
      memory-limit: 4 GiB
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any

import dask.config
from dask.utils import parse_timedelta

from pipeline.errors import SpecError


@dataclass(frozen=True)
class Settings:
    """What a run needs to know beside the job spec."""

    directory: str = ".pipeline/jobs"
    """Root of the job directories: path or fsspec URL."""
    registry: str = ".pipeline/models"
    """The model registry: path or fsspec URL of the built-in one; ``mlflow``, ``mlflow+http://host:5000`` or the URL of
    a database (``sqlite:///…``) for MLflow."""
    drift_poll: float = 30.0
    """Seconds between two looks at the alias of the model while a job runs; 0: look at the start and before the commit
    only."""
    cluster: str | None = None
    """Overrides the ``cluster`` of the job spec."""
    workers: int | None = None
    """Worker processes of a local cluster. Default: from the machine."""
    threads: int | None = None
    """Threads per worker. Default: from the machine."""
    memory_limit: str | None = None
    """Bytes a worker may use, as ``4 GiB``. Default: the machine's memory / workers."""
    fsync: bool = True
    """Whether every write is made durable before it counts."""
    attempts: int = 3
    """Attempts a partition gets when storage or the cluster fails under it."""
    no_workers_timeout: float = 300.0
    """Seconds without any worker after which a run gives up."""
    scheduler_timeout: float = 30.0
    """Seconds without an answer of the scheduler after which a run gives up."""
    partition_timeout: float | None = None
    """Seconds an attempt at a partition may take. Default: as long as it likes."""
    grace: float = 60.0
    """Seconds that running partitions are given to end after a signal or a failure."""
    lease_seconds: float = 30.0
    """Seconds of silence after which another driver may take a job over from one that cannot be asked."""
    dashboard: str = "127.0.0.1:0"
    """Address of the dashboard of a local cluster; port 0 takes a free one."""
    tls: bool = False
    """Whether a cluster of this machine uses TLS too, which keeps out the other users of the machine."""
    tls_ca: str | None = None
    """Certificate of the authority for ``tls://`` addresses: a path, ``file:PATH`` or ``env:NAME``."""
    tls_cert: str | None = None
    """Certificate to show there."""
    tls_key: str | None = None
    """Its private key."""
    insecure_network: bool = False
    """Whether scheduler and workers may be open to the network without TLS."""
    import_paths: tuple[str, ...] = ()
    """Folders from which the modules of the steps are imported, on driver and workers."""


_SECONDS = {"no_workers_timeout", "scheduler_timeout", "grace", "partition_timeout", "lease_seconds", "drift_poll"}


def load_settings(**flags: Any) -> Settings:
    """Settings of this process: ``flags`` that are not None, else ``dask.config``, else the defaults.

    :raises SpecError: for an unknown name under ``pipeline:`` or a value of the wrong type.
    """
    known = {field.name for field in fields(Settings)}
    values: dict[str, Any] = {}
    for key, value in (dask.config.get("pipeline", None) or {}).items():
        name = key.replace("-", "_")
        if name not in known:
            raise SpecError(
                "dask.config has an unknown setting",
                where=f"pipeline.{key}",
                expected=", ".join(sorted(item.replace("_", "-") for item in known)),
            )
        values[name] = value
    values.update({name: value for name, value in flags.items() if value is not None})
    checked = {name: _convert(name, value) for name, value in values.items() if value is not None}
    settings = replace(Settings(), **checked)
    if not settings.import_paths:
        settings = replace(settings, import_paths=(os.getcwd(),))
    return settings


def _convert(name: str, value: Any) -> Any:
    default = getattr(Settings(), name)
    try:
        if name in _SECONDS:
            return float(parse_timedelta(value, default="s"))
        if name in ("workers", "threads", "attempts"):
            number = int(value)
            if number < 1:
                raise ValueError("not a positive number")
            return number
        if name == "import_paths":
            return tuple(os.path.abspath(path) for path in value)
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ValueError("not true or false")
            return value
        return os.path.expanduser(str(value)) if name in ("directory", "registry") else str(value)
    except (TypeError, ValueError, KeyError) as error:
        raise SpecError(
            "a setting has a wrong value",
            where=f"pipeline.{name.replace('_', '-')}",
            found=repr(value),
            expected=str(error),
        ) from error
