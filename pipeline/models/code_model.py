"""Resolve ``module:Class`` to a model version: find its code and files, keep the code, and load the model once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace

from pipeline.common.code_search import find_code
from pipeline.common.digest import digest_bytes
from pipeline.common.step_modules import StepModules
from pipeline.errors import SpecError
from pipeline.models.flavors import MAX_BYTES, find_flavor
from pipeline.models.flavors.python import CODE, FILES
from pipeline.models.flavors.python_archive import archive_of
from pipeline.models.flavors.torch import is_factory
from pipeline.models.folders import copy_files, is_folder, list_files
from pipeline.models.model import ModelVersion
from pipeline.storage.store import open_store


def resolve_code(
    entrypoint: str,
    *,
    import_paths: Sequence[str],
    files: Sequence[str] = (),
    cache: str = "",
    limit: int = MAX_BYTES,
    flavor: str | None = None,
) -> ModelVersion:
    """Return the version of the model that ``module:Class`` is now, with its files.

    With one file of weights in safetensors, it is a factory of a module of PyTorch.

    :param import_paths: folders from which its modules are imported.
    :param files: paths or URLs of files and folders for ``load``.
    :param cache: folder or URL where workers read the code.
    :param limit: largest size of the files, in bytes.
    :param flavor: ``python`` or ``torch``. Default: as the files are.
    :raises StepFailed: if the code cannot be imported.
    :raises ModelError: if it is no model, or a file is missing.
    """
    code = find_code([entrypoint], import_paths=import_paths)
    if not any(step.files for step in code.steps):
        # There is no such module: the import says which one is near.
        StepModules(code.steps, import_paths=import_paths).function(entrypoint)
    archive = archive_of(entrypoint, code, import_paths=import_paths).to_bytes()
    places = {CODE: keep_archive(archive, cache)}
    for path in files:
        base = path.rstrip("/")
        names = list_files(path) if is_folder(path) else [""]
        for name in names:
            known = FILES + (name or base.rsplit("/", 1)[-1])
            if known in places:
                raise SpecError(
                    "two files of the model have one name",
                    where="score.model_files",
                    found=f"{known.removeprefix(FILES)}, in {places[known]} and in {path}",
                    expected="files and folders whose files have different names",
                    next_step="put them into one folder, and name it",
                )
            places[known] = f"{base}/{name}" if name else path
    folder = copy_files(places, limit=limit, where=entrypoint)
    name = entrypoint.rpartition(":")[2].rpartition(".")[2]
    kind = "torch" if is_factory(folder.names) and flavor != "python" else "python"
    version = find_flavor(kind).inspect(entrypoint, folder, name=name, allow_code=True)
    # The code is the job's own, as that of its steps.
    return replace(version, runs_code=None)


def keep_archive(data: bytes, cache: str) -> str:
    """Store a file by its digest below ``cache``, where workers read it, and return its path or URL."""
    store, name = open_store(cache or tempfile.gettempdir()), f".models/{digest_bytes(data)}"
    if not store.exists(name) or store.read(name) != data:
        store.replace(name, data)
    return store.url(name)
