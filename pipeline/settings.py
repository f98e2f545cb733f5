"""How jobs run on a site: flags, else ``PIPELINE_…`` variables, else the cluster's file, else ``dask.config``.

For ``dask.config`` a file such as ``~/.config/dask/pipeline.yaml`` holds::

    pipeline:
      directory: /scratch/me/jobs
      workers: 4
      memory-limit: 4 GiB
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import dask.config
from dask.utils import parse_timedelta

from pipeline.errors import SpecError
from pipeline.spec.parts import Hook
from pipeline.spec.precedence import (
    Precedence,
    ResolvedSetting,
    SettingSource,
    misspelt,
    resolve_setting,
    setting_variables,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a run needs to know beside the job spec."""

    directory: str = ".pipeline/jobs"
    """Root of the job directories: path or fsspec URL."""
    registry: str = ".pipeline/models"
    """The model registry: path or fsspec URL of the built-in one; ``mlflow``, ``mlflow+http://host:5000`` or the URL of
    a database (``sqlite:///…``) for MLflow."""
    alias_poll: float = 30.0
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
    stragglers: bool = True
    """Whether idle workers help partitions that run far beyond their expected time."""
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
    triggers: tuple[str, ...] = ()
    """Files with triggers that a server looks at: each a ``triggers.yaml`` or a job spec. Default: ``triggers.yaml`` in
    the working directory, if there is one."""
    hooks: tuple[Any, ...] = ()
    """Who is told when any job begins or ends, beside those of its spec: a list, as ``hooks`` of a job spec."""
    hook_grace: float = 30.0
    """Seconds that hooks are given after the end of a job, until what they have not been told is given up."""
    import_paths: tuple[str, ...] = ()
    """Folders from which the modules of the steps are imported, on driver and workers."""
    candidates: Mapping[str, tuple[SettingSource, ...]] = field(
        default_factory=dict, repr=False, compare=False, metadata={"is_setting": False}
    )
    """All that said something about each setting."""

    def choice(self, name: str) -> ResolvedSetting:
        """The value of a setting, and where it is from. One that was given in Python counts as a flag."""
        value = getattr(self, name)
        found = resolve_setting(
            [SettingSource(getattr(Settings(), name), Precedence.BUILT_IN), *self.candidates.get(name, ())]
        )
        return found if found.value == value else ResolvedSetting(value, Precedence.FLAG, "Python")

    def values(self) -> dict[str, Any]:
        """The value of every setting, by its name with underscores."""
        return {name: getattr(self, name) for name in setting_names()}

    def choices(self) -> dict[str, ResolvedSetting]:
        """`choice` of every setting, by its name with dashes."""
        return {name.replace("_", "-"): self.choice(name) for name in setting_names()}


def setting_names() -> tuple[str, ...]:
    """Names of all settings, with underscores."""
    return tuple(one.name for one in fields(Settings) if one.metadata.get("is_setting", True))


_SWITCH = {"true": True, "on": True, "false": False, "off": False}
_SECONDS = {
    "hook_grace",
    "no_workers_timeout",
    "scheduler_timeout",
    "grace",
    "partition_timeout",
    "lease_seconds",
    "alias_poll",
}


_NOT_OF_A_CLUSTER = ("directory", "cluster")
"""Settings that decide which cluster's file is read, or are needed before it is."""


def load_settings(**flags: Any) -> Settings:
    """Settings of this process: ``flags`` that are not None, else variables, else ``dask.config``, else the defaults.

    :raises SpecError: for an unknown name under ``pipeline:`` or a value of the wrong type.
    """
    known = setting_names()
    for name, meant in misspelt(os.environ, known=known).items():
        logger.warning("the variable %s is no setting; did you mean %s?", name, meant)
    found: dict[str, list[SettingSource]] = {}
    for key, value in (dask.config.get("pipeline", None) or {}).items():
        _add(found, key, value, rank=Precedence.DASK_CONFIG, origin=f"pipeline.{key}", what="dask.config has")
    for variable in setting_variables(os.environ, known=known):
        (name,) = variable.path
        _add(found, name, _from_text(name, variable.text), rank=Precedence.ENVIRONMENT, origin=variable.name)
    for name, value in flags.items():
        _add(found, name, value, rank=Precedence.FLAG, origin=_FLAGS.get(name) or f"--{name.replace('_', '-')}")
    settings = _settle(Settings(), found)
    if not settings.import_paths:
        settings = replace(settings, import_paths=(os.getcwd(),))
    return settings


_FLAGS = {"import_paths": "the folder of the job spec, and the working directory", "triggers": "--file"}


def with_cluster_file(settings: Settings, values: Mapping[str, Any], *, where: str) -> Settings:
    """``settings`` with those that the file of the chosen cluster gives: they win over ``dask.config`` alone.

    :raises SpecError: for a value of the wrong type, and for a setting that is needed before the file is read.
    """
    found = {name: list(candidates) for name, candidates in settings.candidates.items()}
    for name in setting_names():
        choice = settings.choice(name)
        if choice.origin == "Python":
            found[name] = [SettingSource(choice.value, Precedence.FLAG, "Python")]
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in _NOT_OF_A_CLUSTER:
            raise SpecError(
                f"a cluster file cannot set {key}",
                where=where,
                found=f"{key}: {value}",
                expected="settings that are not needed to find the file",
                next_step=f"set it in dask.config (pipeline.{key}), or with --{key}",
            )
        if value is None or value == "auto":
            continue
        known = SettingSource(_convert(name, value, where=where), Precedence.CLUSTER_FILE, where)
        if known not in found.get(name, ()):
            found.setdefault(name, []).append(known)
    return _settle(settings, found)


def _add(
    found: dict[str, list[SettingSource]],
    key: str,
    value: Any,
    *,
    rank: Precedence,
    origin: str,
    what: str = "there is",
) -> None:
    name = key.replace("-", "_")
    if name not in setting_names():
        raise SpecError(
            f"{what} an unknown setting",
            where=f"pipeline.{key}",
            expected=", ".join(sorted(item.replace("_", "-") for item in setting_names())),
        )
    if value is not None:
        found.setdefault(name, []).append(SettingSource(_convert(name, value, where=origin), rank, origin))


def _settle(settings: Settings, found: Mapping[str, list[SettingSource]]) -> Settings:
    values = {name: resolve_setting(candidates).value for name, candidates in found.items() if candidates}
    kept = {name: tuple(candidates) for name, candidates in found.items()}
    return replace(settings, **values, candidates=kept)


def _from_text(name: str, text: str) -> Any:
    """The value of a variable, as YAML in a file would have it."""
    if isinstance(getattr(Settings(), name), bool):
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    if name == "hooks":
        return json.loads(text)
    return tuple(part for part in text.split(os.pathsep) if part) if name in ("import_paths", "triggers") else text


def _convert(name: str, value: Any, *, where: str = "") -> Any:
    default = getattr(Settings(), name)
    try:
        if name in _SECONDS:
            return float(parse_timedelta(value, default="s"))
        if name in ("workers", "threads", "attempts"):
            number = int(value)
            if number < 1:
                raise ValueError("a positive number")
            return number
        if name == "hooks":
            return tuple(Hook.model_validate(one).model_dump(mode="json", exclude_defaults=True) for one in value)
        if name == "triggers":
            return (value,) if isinstance(value, str) else tuple(str(path) for path in value)
        if name == "import_paths":
            return tuple(os.path.abspath(path) for path in value)
        if isinstance(default, bool):
            found = _SWITCH.get(str(value).lower())
            if found is None:
                raise ValueError("on or off")
            return found
        return os.path.expanduser(str(value)) if name in ("directory", "registry") else str(value)
    except (TypeError, ValueError, KeyError) as error:
        raise SpecError(
            "a setting has a wrong value",
            where=where or f"pipeline.{name.replace('_', '-')}",
            found=repr(value),
            expected=str(error),
        ) from error
