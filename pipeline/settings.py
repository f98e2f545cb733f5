"""Settings of a site: where jobs run, and their limits.

Precedence, highest first: a flag (or a keyword of `Settings.load`), a ``PIPELINE_…`` variable, the cluster's file,
``dask.config``. For ``dask.config``, a file such as ``~/.config/dask/pipeline.yaml`` holds::

    pipeline:
      directory: /scratch/me/jobs
      workers: 4
      memory-limit: 4 GiB
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import dask.config
from dask.utils import parse_timedelta

from pipeline.common.units import MAX_SECONDS, parse_bytes, parse_seconds
from pipeline.errors import SpecError
from pipeline.spec.model_ref import Device
from pipeline.spec.parts import Hook
from pipeline.spec.precedence import (
    Precedence,
    ResolvedSetting,
    SettingSource,
    misspelt,
    resolve_setting,
    setting_variables,
)

if TYPE_CHECKING:
    from pipeline.spec.job_spec import JobSpec

logger = logging.getLogger(__name__)
MAX_COUNT = 1_000_000
"""Largest number of workers, threads and attempts."""
_SWITCH = {"true": True, "on": True, "false": False, "off": False}


@dataclass(frozen=True)
class Converter:
    """Functions that convert the written form of a setting into its value."""

    convert: Callable[[Any], Any]
    """Converts a value. Raises ValueError or TypeError; the message names the expected form."""
    read_text: Callable[[str], Any] = str
    """Converts the text of an environment variable into the value that a file would hold."""


def _to_seconds(value: Any) -> float:
    try:
        seconds = float(parse_timedelta(value, default="s"))
    except (KeyError, ValueError, OverflowError):
        seconds = parse_seconds(value)  # units that job specs have, such as min
    if not 0 <= seconds <= MAX_SECONDS:
        raise ValueError("a duration from 0 to 100 years, such as 90 s or 15 min")
    return seconds


def _to_positive_seconds(value: Any) -> float:
    seconds = _to_seconds(value)
    if seconds == 0:
        raise ValueError("more than 0 seconds")
    return seconds


def _to_bytes(value: Any) -> str:
    text = str(value)
    if text != "auto":
        parse_bytes(value)
    return text


def _to_count(value: Any) -> int:
    number = int(value)
    if not 1 <= number <= MAX_COUNT:
        raise ValueError(f"a number from 1 to {MAX_COUNT:,}")
    return number


def _to_switch(value: Any) -> bool:
    switch = _SWITCH.get(str(value).lower())
    if switch is None:
        raise ValueError("on or off")
    return switch


def _read_switch(text: str) -> bool | str:
    return {"1": True, "0": False}.get(text, text)


def _read_paths(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(os.pathsep) if part)


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("JSON: a list of hooks, as in a job spec") from error


def _to_hooks(value: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise ValueError("a list of hooks, as in a job spec")
    return tuple(Hook.model_validate(hook).model_dump(mode="json", exclude_defaults=True) for hook in value)


def _to_device(value: Any) -> Device:
    for device in get_args(Device):
        if value == device:
            return device  # type: ignore[no-any-return]
    raise ValueError("auto, cpu or cuda")


def _to_files(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(str(path) for path in value)


Seconds = Annotated[float, Converter(_to_seconds)]
"""Seconds, or a text with a unit such as ``2 min``."""
PositiveSeconds = Annotated[float, Converter(_to_positive_seconds)]
"""Seconds, more than 0."""
Bytes = Annotated[str, Converter(_to_bytes)]
"""A size such as ``4 GiB``, kept as text."""
Count = Annotated[int, Converter(_to_count)]
"""A number from 1."""
Switch = Annotated[bool, Converter(_to_switch, _read_switch)]
"""``on``, ``off``, ``true`` or ``false``."""
Folder = Annotated[str, Converter(lambda value: os.path.expanduser(str(value)))]
"""A path or URL; ``~`` is expanded."""
Folders = Annotated[
    tuple[str, ...], Converter(lambda value: tuple(os.path.abspath(path) for path in value), _read_paths)
]
"""Folders of this machine, made absolute; in a variable separated like ``PATH``."""
Files = Annotated[tuple[str, ...], Converter(_to_files, _read_paths)]
"""One or more files."""
DeviceName = Annotated[Device, Converter(_to_device)]
"""``auto``, ``cpu`` or ``cuda``."""
Hooks = Annotated[tuple[Any, ...], Converter(_to_hooks, _read_json)]
"""Hooks as in a job spec; in a variable as JSON."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run: everything a job needs beside its spec.

    `Settings.load` reads the environment and ``dask.config``. ``Settings(…)`` uses defaults instead.

    >>> settings = Settings(workers=4, memory_limit="4 GiB")
    >>> settings.workers, settings.threads
    (4, None)
    """

    directory: Folder = ".pipeline/jobs"
    """Root of the job directories: path or fsspec URL."""
    registry: Folder = ".pipeline/models"
    """The model registry: path or fsspec URL of the built-in registry. For MLflow: ``mlflow``, ``mlflow+http://host:5000``
    or the URL of a database (``sqlite:///…``)."""
    alias_poll: Seconds = 30.0
    """Seconds between two reads of the model's alias while a job runs; 0: read it only at the start and before the
    commit."""
    max_model_size: Bytes = "8 GiB"
    """Largest size of a model file; a larger one is refused before it is read."""
    cluster: str | None = None
    """Overrides the ``cluster`` of the job spec."""
    device: DeviceName | None = None
    """Overrides the ``device`` of the job spec: ``auto``, ``cpu`` or ``cuda``."""
    workers: Count | None = None
    """Worker processes of a local cluster. Default: from the machine."""
    threads: Count | None = None
    """Threads per worker. Default: from the machine."""
    memory_limit: Bytes | None = None
    """Bytes a worker may use, as ``4 GiB``. Default: the machine's memory / workers."""
    fsync: Switch = True
    """Whether every write is made durable (fsync) before it counts."""
    attempts: Count = 3
    """Attempts per partition when storage or the cluster fails."""
    no_workers_timeout: Seconds = 300.0
    """Seconds without any worker after which a run fails."""
    scheduler_timeout: PositiveSeconds = 30.0
    """Seconds without an answer from the scheduler after which a run fails."""
    partition_timeout: PositiveSeconds | None = None
    """Seconds that one attempt at a partition may take. Default: no limit."""
    stragglers: Switch = True
    """Whether idle workers help partitions that run far beyond their expected time."""
    restart_workers: Switch | None = None
    """Whether workers that are paused, stuck or overdue are restarted. Default: ``true`` for a cluster that the job
    starts, ``false`` for a scheduler that is given by its address: others may use its workers."""
    drain_timeout: Seconds = 60.0
    """Seconds to wait for running partitions after a signal or a failure."""
    lease_seconds: PositiveSeconds = 30.0
    """Seconds of silence after which another driver may take over a job whose driver cannot be reached."""
    dashboard: str = "127.0.0.1:0"
    """Address of the dashboard of a local cluster; port 0: any free port."""
    tls: Switch = False
    """Whether a cluster of this machine uses TLS, too, to keep out the other users of the machine."""
    tls_ca: str | None = None
    """Certificate of the authority for ``tls://`` addresses: a path, ``file:PATH`` or ``env:NAME``."""
    tls_cert: str | None = None
    """Client certificate for ``tls://`` addresses."""
    tls_key: str | None = None
    """Private key of that certificate."""
    insecure_network: Switch = False
    """Whether scheduler and workers may be open to the network without TLS."""
    triggers: Files = ()
    """Files with triggers for a server: each a ``triggers.yaml`` or a job spec. Default: ``triggers.yaml`` in the
    working directory, if it exists."""
    hooks: Hooks = ()
    """Hooks of every job, beside those of its spec: a list, as ``hooks`` of a job spec."""
    hook_timeout: Seconds = 30.0
    """Seconds to wait for hooks after the job has ended. Undelivered notifications are then dropped and logged."""
    import_paths: Folders = ()
    """Folders from which the modules of the steps are imported, on driver and workers."""
    candidates: Mapping[str, tuple[SettingSource, ...]] = field(
        default_factory=dict, repr=False, compare=False, metadata={"is_setting": False}
    )
    """Every value that was given for each setting."""

    @classmethod
    def load(
        cls,
        *,
        directory: str | os.PathLike[str] | None = None,
        registry: str | os.PathLike[str] | None = None,
        alias_poll: float | str | None = None,
        max_model_size: int | str | None = None,
        cluster: str | None = None,
        device: Device | None = None,
        workers: int | None = None,
        threads: int | None = None,
        memory_limit: int | str | None = None,
        fsync: bool | None = None,
        attempts: int | None = None,
        no_workers_timeout: float | str | None = None,
        scheduler_timeout: float | str | None = None,
        partition_timeout: float | str | None = None,
        stragglers: bool | str | None = None,
        restart_workers: bool | str | None = None,
        drain_timeout: float | str | None = None,
        lease_seconds: float | str | None = None,
        dashboard: str | None = None,
        tls: bool | None = None,
        tls_ca: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        insecure_network: bool | None = None,
        triggers: str | Sequence[str] | None = None,
        hooks: Sequence[Any] | None = None,
        hook_timeout: float | str | None = None,
        import_paths: Sequence[str | os.PathLike[str]] | None = None,
    ) -> Settings:
        """Load the settings of this process; a keyword that is not None wins over everything else.

        Next come ``PIPELINE_…`` variables, then ``pipeline:`` of ``dask.config``, then the defaults of `Settings`.
        ``import_paths`` defaults to the working directory.

        Raises
        ------
        SpecError
            For an unknown setting under ``pipeline:``, or an invalid value anywhere.

        Examples
        --------
        >>> settings = Settings.load(workers=4, memory_limit="4 GiB", alias_poll="1 min")
        >>> settings.workers, settings.memory_limit, settings.alias_poll
        (4, '4 GiB', 60.0)
        """
        given = {name: value for name, value in locals().items() if name in setting_names() and value is not None}
        sources = _site_sources()
        for name, value in given.items():
            _add(sources, name, value, rank=Precedence.FLAG, origin=_FLAGS.get(name) or f"--{_dashed(name)}")
        settings = _resolve(cls(), sources)
        return settings if settings.import_paths else replace(settings, import_paths=(os.getcwd(),))

    def choice(self, name: str) -> ResolvedSetting:
        """Return the value of a setting and its origin. A value that was given in Python counts as a flag."""
        value = getattr(self, name)
        resolved = resolve_setting(
            [SettingSource(getattr(Settings(), name), Precedence.BUILT_IN), *self.candidates.get(name, ())]
        )
        return resolved if resolved.value == value else ResolvedSetting(value, Precedence.FLAG, "Python")

    def values(self) -> dict[str, Any]:
        """Return the value of every setting, by its name with underscores."""
        return {name: getattr(self, name) for name in setting_names()}

    def choices(self) -> dict[str, ResolvedSetting]:
        """Return `choice` of every setting, by its name with dashes."""
        return {_dashed(name): self.choice(name) for name in setting_names()}

    def __repr__(self) -> str:
        default = Settings().values()
        given = [f"{name}={value!r}" for name, value in self.values().items() if value != default[name]]
        return f"Settings({', '.join(given)})"


@cache
def setting_names() -> tuple[str, ...]:
    """Names of all settings, with underscores."""
    return tuple(item.name for item in fields(Settings) if item.metadata.get("is_setting", True))


RENAMED_SETTINGS = {"drift_poll": "alias_poll", "grace": "drain_timeout", "hook_grace": "hook_timeout"}
"""Old name of each renamed setting -> new name, with underscores."""
_NOT_OF_A_CLUSTER = ("directory", "cluster")
"""Settings that select the cluster's file, or are needed before that file is read."""
_FLAGS = {"import_paths": "the folder of the job spec, and the working directory", "triggers": "--file"}
_TEXT = Converter(str)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


@cache
def _converters() -> dict[str, Converter]:
    hints = get_type_hints(Settings, include_extras=True)
    return {name: _converter_in(hints[name]) or _TEXT for name in setting_names()}


def _converter_in(hint: Any) -> Converter | None:
    if get_origin(hint) is Annotated:
        return next(extra for extra in hint.__metadata__ if isinstance(extra, Converter))
    return next((converter for part in get_args(hint) if (converter := _converter_in(part))), None)


Sources = dict[str, list[SettingSource]]


def _site_sources() -> Sources:
    """Settings in ``dask.config`` and in the environment."""
    known = setting_names()
    for name, meant in misspelt(os.environ, known=known).items():
        logger.warning("unknown setting %s in the environment; did you mean %s?", name, meant)
    sources: Sources = {}
    site = dask.config.get("pipeline", None) or {}
    if not isinstance(site, Mapping):
        raise SpecError(
            "invalid settings in the configuration of Dask",
            where="pipeline",
            found=repr(site)[:80],
            expected="a mapping of settings to values, such as pipeline: {workers: 4}",
        )
    for key, value in site.items():
        _add(sources, str(key), value, rank=Precedence.DASK_CONFIG, origin=f"pipeline.{key}")
    for variable in setting_variables(os.environ, known=(*known, *RENAMED_SETTINGS)):
        (name,) = variable.path
        _check_known(name, where=variable.name)
        value = _convert(name, variable.text, where=variable.name, is_text=True)
        sources.setdefault(name, []).append(SettingSource(value, Precedence.ENVIRONMENT, variable.name))
    return sources


def with_cluster_file(settings: Settings, values: Mapping[str, Any], *, where: str) -> Settings:
    """Return ``settings`` with the values of the chosen cluster's file; they win over ``dask.config`` only.

    :raises SpecError: for an invalid value, and for a setting that is needed before the file is read.
    """
    sources = {name: list(candidates) for name, candidates in settings.candidates.items()}
    for name in setting_names():
        choice = settings.choice(name)
        if choice.origin == "Python":
            sources[name] = [SettingSource(choice.value, Precedence.FLAG, "Python")]
    for key, value in values.items():
        name = key.replace("-", "_")
        _check_known(name, where=where)
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
        if known not in sources.get(name, ()):
            sources.setdefault(name, []).append(known)
    return _resolve(settings, sources)


def _add(sources: Sources, key: str, value: Any, *, rank: Precedence, origin: str) -> None:
    name = key.replace("-", "_")
    _check_known(name, where=origin)
    if value is not None:
        sources.setdefault(name, []).append(SettingSource(_convert(name, value, where=origin), rank, origin))


def _check_known(name: str, *, where: str) -> None:
    """Raise for an unknown or renamed setting."""
    if name in RENAMED_SETTINGS:
        new = RENAMED_SETTINGS[name]
        raise SpecError(
            f"the setting {_dashed(name)} is now named {_dashed(new)}",
            where=where,
            found=_dashed(name),
            expected=_dashed(new),
            next_step=f"rename it to {_like(new, where)}",
        )
    if name not in setting_names():
        raise SpecError(
            "unknown setting",
            where=where,
            found=_dashed(name),
            expected=", ".join(map(_dashed, sorted(setting_names()))),
        )


def _like(name: str, where: str) -> str:
    """Return the name of a setting; in the form of a variable if ``where`` is a variable."""
    return f"PIPELINE_{name.upper()}" if where.startswith("PIPELINE_") else _dashed(name)


def _resolve(settings: Settings, sources: Mapping[str, Sequence[SettingSource]]) -> Settings:
    values = {name: resolve_setting(candidates).value for name, candidates in sources.items() if candidates}
    return replace(settings, **values, candidates={name: tuple(given) for name, given in sources.items()})


def _convert(name: str, value: Any, *, where: str, is_text: bool = False) -> Any:
    converter = _converters()[name]
    try:
        return converter.convert(converter.read_text(value) if is_text else value)
    except (TypeError, ValueError, KeyError, OverflowError, AttributeError, RecursionError) as error:
        raise SpecError(
            "invalid value of a setting",
            where=where,
            found=repr(value)[:200],
            expected=error.expected if isinstance(error, SpecError) else str(error),
        ) from error


def device_choice(spec: JobSpec, *, settings: Settings, of_spec: ResolvedSetting | None = None) -> ResolvedSetting:
    """Return the device that a job requests, and its origin; see `overridden_choice`.

    :param settings: with those of the chosen cluster's file.
    """
    return overridden_choice("device", spec.device, default="auto", settings=settings, of_spec=of_spec)


def overridden_choice(
    name: str, value: Any, *, default: Any, settings: Settings, of_spec: ResolvedSetting | None = None
) -> ResolvedSetting:
    """Return the value of a field of the spec that is a setting, too: a flag or a variable, else the spec, else the
    cluster's file or ``dask.config``.

    :param name: name of field and setting.
    :param value: value of the field; None if the spec has none.
    :param of_spec: origin of ``value``, if known.
    """
    candidates = [SettingSource(default, Precedence.BUILT_IN)]
    if value is not None and of_spec is not None:
        candidates += [*of_spec.over, SettingSource(value, of_spec.rank, of_spec.origin)]
    elif value is not None:
        candidates.append(SettingSource(value, Precedence.JOB_FILE, name))
    if getattr(settings, name) is not None:
        setting = settings.choice(name)
        candidates.append(SettingSource(setting.value, setting.rank, setting.origin))
        candidates += [source for source in setting.over if source.rank is not Precedence.BUILT_IN]
    return resolve_setting(candidates)
