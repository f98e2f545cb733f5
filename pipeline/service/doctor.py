"""Check what a job needs of this machine: versions, ports, disk, file system, credentials, names in the way."""

from __future__ import annotations

import os
import platform
import resource
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.common.cores import core_count
from pipeline.common.units import format_bytes
from pipeline.errors import PipelineError
from pipeline.settings import Settings
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import is_local_path, local_path

DISTRIBUTION = "dask-batch-pipeline"
PACKAGES = ("dask", "distributed", "pyarrow", "pandas", "numpy", "fsspec")
OPTIONAL = ("xgboost", "xgboost-cpu", "lightgbm", "scikit-learn", "onnxruntime", "catboost", "s3fs", "dask-jobqueue")
IN_THE_WAY = ("pipeline", "dask", "distributed", "pandas", "numpy", "pyarrow", "xgboost", "sklearn")
"""Modules that a file of the working directory must not have the name of."""
CREDENTIALS = (
    *("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"),
    *("GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_CONNECTION_STRING"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN", "HTTPS_PROXY", "NO_PROXY"),
)
CREDENTIAL_FILES = ("~/.aws/credentials", "~/.config/gcloud/application_default_credentials.json", "~/.netrc")
LEAST_DISK = 1 << 30
"""Free bytes below which a disk is called nearly full."""
LEAST_FILES = 1024
SLOW_WRITE = 0.1
"""Seconds for a durable write above which the file system is called slow."""


class Outcome(StrEnum):
    """Outcome of a check."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    check: str
    outcome: Outcome
    text: str
    next: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON output shows it."""
        return {"check": self.check, "outcome": str(self.outcome), "text": self.text, "next": self.next}


def examine(settings: Settings) -> tuple[Finding, ...]:
    """Make all checks. A check that cannot be made is a finding too."""
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("versions", _versions),
        ("machine", _machine),
        ("ports", lambda: _ports(settings)),
        ("disk", lambda: _disk(settings)),
        ("file system", lambda: file_system(settings.directory)),
        ("credentials", _credentials),
        ("names", lambda: names_in_the_way(Path.cwd())),
    )
    found: list[Finding] = []
    for name, check in checks:
        try:
            found += check()
        except PipelineError as error:
            found.append(Finding(name, Outcome.FAIL, f"{error.message}: {error.found or error.where}", error.next_step))
        except OSError as error:
            found.append(Finding(name, Outcome.FAIL, str(error)))
    return tuple(found)


def _versions() -> Iterator[Finding]:
    here = f"Python {platform.python_version()} at {sys.executable}"
    yield Finding("versions", Outcome.OK, here)
    known = ", ".join(f"{name} {found}" for name in (*PACKAGES, *OPTIONAL) if (found := _version(name)))
    missing = [name for name in PACKAGES if not _version(name)]
    outcome = Outcome.FAIL if missing else Outcome.OK
    yield Finding(
        "versions",
        outcome,
        known + (f"; missing: {', '.join(missing)}" if missing else ""),
        f"pip install {' '.join(missing)}" if missing else "",
    )
    try:
        own = f"{DISTRIBUTION} {version(DISTRIBUTION)}, {len(requires(DISTRIBUTION) or ())} requirements"
    except PackageNotFoundError:
        own = f"{DISTRIBUTION} is used from a folder, {Path(__file__).parents[2]}: workers elsewhere must find it too"
    yield Finding("versions", Outcome.OK, own)
    if _version("xgboost") and _version("xgboost-cpu"):
        yield Finding(
            "versions",
            Outcome.WARN,
            "xgboost and xgboost-cpu are both installed: each overwrites the other",
            "pip uninstall one, then reinstall the other",
        )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _machine() -> Iterator[Finding]:
    from pipeline.execution.clusters.local import memory_limit

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    text = f"{core_count()} cores, {format_bytes(memory_limit())} of memory, {files:,} open files a process"
    few = files < LEAST_FILES
    yield Finding("machine", Outcome.WARN if few else Outcome.OK, text, "ulimit -n 65536" if few else "")


def _ports(settings: Settings) -> Iterator[Finding]:
    host, _, port = settings.dashboard.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host or "127.0.0.1", int(port or 0)))
        except (OSError, ValueError) as error:
            text = f"the dashboard cannot listen on {settings.dashboard}: {error}"
            yield Finding("ports", Outcome.FAIL, text, "set pipeline.dashboard to 127.0.0.1:0, for any free port")
            return
    yield Finding("ports", Outcome.OK, f"sockets can listen on {host or '127.0.0.1'}")


def _disk(settings: Settings) -> Iterator[Finding]:
    folders = {"temporary files": tempfile.gettempdir()}
    if is_local_path(settings.directory):
        folders = {"jobs": str(_existing(local_path(settings.directory))), **folders}
    for name, folder in folders.items():
        usage = shutil.disk_usage(folder)
        text = f"{format_bytes(usage.free)} of {format_bytes(usage.total)} free for {name} ({folder})"
        full = usage.free < LEAST_DISK
        yield Finding("disk", Outcome.WARN if full else Outcome.OK, text, "python -m pipeline gc" if full else "")


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def file_system(root: str) -> Iterator[Finding]:
    """Check what commits rest on: exclusive creation, replacement in one step, durable writes. Nothing is left."""
    folder = f".doctor-{secrets.token_hex(4)}"
    store = open_store(f"{root.rstrip('/')}/{folder}", private=True)
    kind = _mount(local_path(root)) if is_local_path(root) else "object store"
    try:
        yield from _store_findings(store, kind)
    finally:
        parent = open_store(root, private=True)
        parent.remove_folder(folder)


def _store_findings(store: Store, kind: str) -> Iterator[Finding]:
    store.check_conditional_writes()
    first, second = store.put_if_absent("exclusive", b"one"), store.put_if_absent("exclusive", b"two")
    if (first, second) != (True, False) or store.read("exclusive") != b"one":
        text = f"two creations of one file succeeded on {kind}: two drivers could run one job"
        yield Finding("file system", Outcome.FAIL, text, "keep jobs on another file system (pipeline.directory)")
    else:
        yield Finding("file system", Outcome.OK, f"a file is created by one process only ({kind})")
    store.check_conditional_replace()
    started = time.monotonic()
    store.replace("replaced", b"one")
    store.replace("replaced", b"two")
    seconds = (time.monotonic() - started) / 2
    if store.read("replaced") != b"two" or "replaced" not in store.list():
        yield Finding("file system", Outcome.FAIL, "a replaced file is not what was written last")
        return
    slow = seconds > SLOW_WRITE
    text = f"a durable write (fsync, rename) takes {1000 * seconds:.1f} ms"
    yield Finding("file system", Outcome.WARN if slow else Outcome.OK, text)


def _mount(path: Path) -> str:
    """Return type and mount point of the file system of a path."""
    path, best = _existing(path).resolve(), ("", "an unknown file system")
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return best[1]
    for line in lines:
        _, point, kind, *_ = line.split()
        if path.is_relative_to(point) and len(point) >= len(best[0]):
            best = point, f"{kind} at {point}"
    return best[1]


def _credentials() -> Iterator[Finding]:
    """Name the credentials that are set; their values are not read."""
    named = [name for name in CREDENTIALS if os.environ.get(name)]
    files = [name for name in CREDENTIAL_FILES if Path(name).expanduser().is_file()]
    text = "set: " + ", ".join((*named, *files)) if named or files else "none set: local files and public data only"
    yield Finding("credentials", Outcome.OK, text)
    for name in files:
        if Path(name).expanduser().stat().st_mode & 0o077:
            yield Finding("credentials", Outcome.WARN, f"others can read {name}", f"chmod 600 {name}")


def names_in_the_way(folder: Path) -> Iterator[Finding]:
    """Check that no file of a folder hides a package: Python looks in the working directory first."""
    own = Path(__file__).parents[1].resolve()
    found = []
    for name in IN_THE_WAY:
        package = folder / name
        for path in (folder / f"{name}.py", package / "__init__.py"):
            if path.is_file() and package.resolve() != own:
                found.append(path)
    for path in found:
        text = f"{path} hides the package {path.stem if path.name != '__init__.py' else path.parent.name}"
        yield Finding("names", Outcome.FAIL, text, "rename it, or run from another folder")
    spec = find_spec("pipeline")
    if not found:
        yield Finding(
            "names", Outcome.OK, f"no file here hides a package; pipeline is {Path(str(spec and spec.origin)).parent}"
        )
