"""Find the files of a model that is a folder, and put verified copies of them into a folder of this machine.

A library opens such files by itself, so that their bytes must not change between the check and the load: it gets a
private copy. Processes of a machine share one where they have a folder for it, as for single files
(`pipeline.models.node_cache`).
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from pipeline.common.digest import digest_bytes
from pipeline.common.units import format_bytes
from pipeline.errors import ModelDigestMismatch, ModelError
from pipeline.models.flavors import MAX_BYTES, read_model
from pipeline.models.model import ModelFile, ModelFolder, ModelVersion
from pipeline.models.node_cache import locked
from pipeline.models.process import process_facts
from pipeline.storage.urls import check_name, file_system, is_local_path, local_path, storage_errors, unique_name

MAX_FILES = 1000
"""Files of a model."""
FOLDERS = 4
"""Folders of other models that a machine keeps; those opened longest ago are removed first."""
_SUFFIX = ".folder"
_IGNORED = ("__pycache__", ".git", ".cache")
_own: list[str] = []
_lock = threading.Lock()
_opened: dict[str, ModelFolder] = {}


def is_folder(uri: str) -> bool:
    """Return True if there is a folder at ``uri``, a path or URL."""
    if is_local_path(uri):
        return local_path(uri).is_dir()
    system, name = file_system(uri)
    with suppress(Exception):  # reading the file explains what is wrong
        return bool(system.isdir(name))
    return False


def list_files(uri: str) -> list[str]:
    """Return the names of the files in a folder, relative to it, sorted. Hidden folders and byte code are left out.

    :raises ModelError: for a folder without files, or with more than `MAX_FILES`.
    """
    with storage_errors(uri):
        if is_local_path(uri):
            base = local_path(uri)
            names = [path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()]
        else:
            system, root = file_system(uri)
            names = [str(PurePosixPath(path).relative_to(PurePosixPath(root))) for path in system.find(root)]
    names = sorted(name for name in names if not any(part in _IGNORED for part in name.split("/")))
    if not 0 < len(names) <= MAX_FILES:
        raise ModelError(
            "the folder of the model has too many files" if names else "the folder of the model is empty",
            where=uri,
            found=f"{len(names):,} files",
            expected=f"1 to {MAX_FILES:,} files",
            next_step="give the folder of one model",
        )
    return names


def read_files(uri: str, names: Sequence[str] | None = None, *, limit: int = MAX_BYTES) -> ModelFolder:
    """Read the files of the model folder at ``uri``, and return them in a private folder of this machine.

    :param names: the files. Default: all.
    :param limit: largest size of all together, in bytes.
    :raises ModelError: when a file is missing, or all are larger than ``limit``.
    """
    base = uri.rstrip("/")
    places = {name: f"{base}/{check_name(name)}" for name in (list_files(uri) if names is None else names)}
    return copy_files(places, limit=limit, has_uris=False, where=uri)


def copy_files(places: dict[str, str], *, limit: int, where: str, has_uris: bool = True) -> ModelFolder:
    """Read some files, and return them in a private folder of this machine under other names.

    :param places: path or URL of each file, by its name in the folder.
    :param has_uris: True: the files remember where they are.
    """
    folder, files, remaining = Path(_private_folder()), list[ModelFile](), limit
    for name, place in sorted(places.items()):
        data = read_model(place, limit=remaining)
        remaining -= len(data)
        if remaining < 0:
            raise ModelError(
                "the files of the model are too large",
                where=where,
                found=f"more than {format_bytes(limit)}",
                expected=f"at most {format_bytes(limit)}",
                next_step="give the folder of one model, or raise the setting max_model_size",
            )
        files.append(ModelFile(name, digest_bytes(data), len(data), place if has_uris else ""))
        _write(folder / name, data)
    made = ModelFolder(str(folder), tuple(files))
    with _lock:
        _opened.setdefault(made.digest, made)
    return made


def open_folder(version: ModelVersion) -> ModelFolder:
    """Return the files of a model version in a folder of this machine; each has the digest in the plan.

    :raises ModelDigestMismatch: when a file differs from the pinned one.
    :raises ModelError: when a file cannot be read.
    """
    with _lock:
        found = _opened.get(version.digest)
    if found is not None and _is_complete(Path(found.path), version.files):
        return found
    shared = process_facts().folder
    path = _shared(Path(shared), version) if shared else None
    if path is None:
        path = Path(_private_folder())
        _download(version, path)
    found = ModelFolder(str(path), version.files)
    with _lock:
        return _opened.setdefault(version.digest, found) if not shared else found


def _shared(folder: Path, version: ModelVersion) -> Path | None:
    """Return the folder of a model that the processes of this machine share; None if it cannot be used."""
    target = folder / f"{version.digest}{_SUFFIX}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(folder / f"{version.digest}.lock"):
            if not _is_complete(target, version.files):
                shutil.rmtree(target, ignore_errors=True)
                made = target.with_name(f"{unique_name()}.part")
                try:
                    _download(version, made)
                    made.rename(target)
                finally:
                    shutil.rmtree(made, ignore_errors=True)
            os.utime(target)
            _remove_old(folder, but=target)
    except OSError:
        return None
    return target


def _download(version: ModelVersion, folder: Path) -> None:
    for file in version.files:
        place = file.uri or f"{version.uri.rstrip('/')}/{file.name}"
        data = read_model(place, limit=max(MAX_BYTES, file.nbytes))
        if digest_bytes(data) != file.sha256:
            raise ModelDigestMismatch(
                "a file of the model is not the one that was pinned",
                where=place,
                found=f"SHA-256 {digest_bytes(data)}",
                expected=f"SHA-256 {file.sha256}",
                next_step="put the pinned file back, or run a new job with the new model",
            )
        _write(folder / check_name(file.name), data)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(data)


def _is_complete(folder: Path, files: Sequence[ModelFile]) -> bool:
    """Return True if a folder holds the files, undamaged."""
    try:
        return all(digest_bytes((folder / file.name).read_bytes()) == file.sha256 for file in files)
    except OSError:
        return False


def _remove_old(folder: Path, *, but: Path) -> None:
    kept = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime)
    for old in kept[:-FOLDERS]:
        if old != but:
            shutil.rmtree(old, ignore_errors=True)


def _private_folder() -> str:
    """Return a new folder that is removed when this process ends."""
    path = tempfile.mkdtemp(prefix="pipeline-model-")
    with _lock:
        if not _own:
            atexit.register(_remove_own, os.getpid(), shutil.rmtree)
        _own.append(path)
    return path


def _remove_own(owner: int, remove: Callable[..., None]) -> None:
    if os.getpid() == owner:
        for path in _own:
            remove(path, ignore_errors=True)
