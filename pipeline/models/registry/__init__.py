"""Resolve model references with a registry.

A registry is files under a path or URL (`pipeline.models.registry.file_registry`), or an MLflow server
(`pipeline.models.registry.mlflow_registry`). The setting ``pipeline.registry`` is one of:

- a path or fsspec URL: the built-in registry in that folder;
- ``mlflow``: MLflow at the address in its environment variables ``MLFLOW_TRACKING_URI``, ``MLFLOW_REGISTRY_URI``;
- ``mlflow+http://host:5000``, ``mlflow+sqlite:///path.db``, or the URL of a database: MLflow at that address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pipeline.models.code_model import resolve_code
from pipeline.models.flavors import MAX_BYTES, detect_bytes, find_flavor, read_model
from pipeline.models.folder_models import folder_at, resolve_folder
from pipeline.models.folders import is_folder
from pipeline.models.model import ModelVersion
from pipeline.models.registry.records import AliasRecord, ModelSummary, VersionRecord
from pipeline.spec.model_ref import ModelRef
from pipeline.storage.urls import check_url

DEFAULT_ROOT = ".pipeline/models"
_DATABASES = ("sqlite://", "postgresql://", "postgresql+", "mysql://", "mysql+", "mssql://", "mssql+", "databricks://")


class ModelRegistry(Protocol):
    """Operations of every registry."""

    kind: str
    """``built-in`` or ``mlflow``."""

    @property
    def root(self) -> str:
        """Path, URL or name that `open_registry` accepts."""

    def names(self) -> list[str]:
        """Return the names of the models, sorted."""

    def summary(self, name: str) -> ModelSummary:
        """Return the versions and aliases of a model.

        :raises ModelError: when the model is unknown.
        """

    def version(self, name: str, number: int) -> VersionRecord:
        """Return the record of a version.

        :raises ModelError: when the version is unknown.
        """

    def lookup(self, ref: ModelRef) -> VersionRecord:
        """Look up the current version of ``ref``; cheap enough to call every few seconds.

        :raises ModelError: when the model, version or alias is unknown.
        """

    def resolve(self, ref: ModelRef, *, allow_code: bool = False) -> ModelVersion:
        """Resolve ``ref`` to a version with digest and a path that workers reach. A child process loads the file once.

        :param allow_code: True: a model that runs code while it is loaded is allowed. Only MLflow has such models.

        :raises ModelError: when the version is unknown, or its file has an unknown format.
        """

    def set_alias(self, name: str, alias: str, number: int | None, *, reason: str = "") -> AliasRecord:
        """Point an alias to a version; None removes the alias.

        :raises ModelError: when the version is unknown.
        """


def open_registry(root: str, *, cache: str = "") -> ModelRegistry:
    """Open the registry at ``root``, a value of the setting ``pipeline.registry``.

    :param cache: folder or URL where an MLflow registry keeps copies of artefacts that workers cannot read.
    :raises SpecError: when a package that the registry requires is not installed.
    :raises RefusedForSafety: for a URL that contains a password.
    """
    check_url(root.removeprefix("mlflow+"))
    if is_mlflow(root):
        from pipeline.models.registry.mlflow_registry import MLflowRegistry

        return MLflowRegistry(root, cache=cache)
    from pipeline.models.registry.file_registry import BuiltInRegistry

    return BuiltInRegistry(root)


def is_mlflow(root: str) -> bool:
    """Return True if ``root`` names an MLflow registry."""
    return root in ("mlflow", "databricks") or root.startswith(("mlflow+", *_DATABASES))


def resolve(
    ref: ModelRef,
    *,
    registry: str = DEFAULT_ROOT,
    cache: str = "",
    limit: int = MAX_BYTES,
    flavor: str | None = None,
    allow_code: bool = False,
    import_paths: Sequence[str] = (),
    model_files: Sequence[str] = (),
) -> ModelVersion:
    """Resolve ``ref`` to its current, immutable version.

    :param registry: see `open_registry`.
    :param limit: largest size of a model file in bytes; a version in a registry has passed it.
    :param flavor: the only flavor that the file may have; None: any.
    :param allow_code: True: a file that runs code while it is loaded is allowed. The built-in registry has none.
    :param import_paths: folders from which the modules of models in Python are imported.
    :param model_files: files and folders that such a model loads.
    :raises ModelError: when the model, version or alias is unknown, or the file is not a model.
    :raises RefusedForSafety: for a pickle.
    """
    if ref.is_code:
        return resolve_code(
            ref.text, import_paths=import_paths, files=model_files, cache=cache, limit=limit, flavor=flavor
        )
    if not ref.is_file:
        return open_registry(registry, cache=cache).resolve(ref, allow_code=allow_code)
    if is_folder(ref.text):
        return resolve_folder(folder_at(ref.text, limit=limit), flavor=flavor, allow_code=allow_code, limit=limit)
    data = read_model(ref.text, limit=limit)
    found = find_flavor(detect_bytes(data, where=ref.text, flavor=flavor or "auto", allow_code=allow_code))
    return found.inspect(ref.text, data, allow_code=allow_code)
