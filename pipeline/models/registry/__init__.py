"""Model registries: what a model reference stands for, and which registry says so.

A registry is files under a path or URL (`pipeline.models.registry.file_registry`), or an MLflow server
(`pipeline.models.registry.mlflow_registry`). Where it is, the setting ``pipeline.registry`` says:

- a path or fsspec URL: the built-in one, in that folder;
- ``mlflow``: MLflow, where MLflow's own environment (``MLFLOW_TRACKING_URI``, ``MLFLOW_REGISTRY_URI``) says;
- ``mlflow+http://host:5000``, ``mlflow+sqlite:///path.db``, or the URL of a database by itself: MLflow, there.
"""

from __future__ import annotations

from typing import Protocol

from pipeline.models.flavors import detect_bytes, find_flavor, read_model
from pipeline.models.model import ModelVersion
from pipeline.models.registry.records import AliasRecord, ModelSummary, VersionRecord
from pipeline.spec.model_ref import ModelRef
from pipeline.storage.urls import check_url

DEFAULT_ROOT = ".pipeline/models"
_DATABASES = ("sqlite://", "postgresql://", "postgresql+", "mysql://", "mysql+", "mssql://", "mssql+", "databricks://")


class ModelRegistry(Protocol):
    """What every registry can do."""

    kind: str
    """``built-in`` or ``mlflow``."""

    @property
    def root(self) -> str:
        """Where it is, as `open_registry` takes it."""

    def names(self) -> list[str]:
        """The models, sorted."""

    def summary(self, name: str) -> ModelSummary:
        """The versions and aliases of a model.

        :raises ModelError: when there is no such model.
        """

    def version(self, name: str, number: int) -> VersionRecord:
        """A version.

        :raises ModelError: when there is none.
        """

    def lookup(self, ref: ModelRef) -> VersionRecord:
        """The version that ``ref`` stands for now; cheap enough to be asked every few seconds.

        :raises ModelError: when there is none.
        """

    def resolve(self, ref: ModelRef) -> ModelVersion:
        """The same, pinned: with its digest and a path that workers reach; loaded once in a child process.

        :raises ModelError: when there is none, or it is no model this version can score with.
        """

    def set_alias(self, name: str, alias: str, number: int | None, *, reason: str = "") -> AliasRecord:
        """Point an alias to a version; None takes it away.

        :raises ModelError: when there is no such version.
        """


def open_registry(root: str, *, cache: str = "") -> ModelRegistry:
    """The registry at ``root``, as the setting ``pipeline.registry`` says it.

    :param cache: folder or URL where an MLflow registry keeps copies of artefacts that workers cannot read.
    :raises SpecError: when what it needs is not installed.
    :raises RefusedForSafety: for a URL with a password in it.
    """
    check_url(root.removeprefix("mlflow+"))
    if is_mlflow(root):
        from pipeline.models.registry.mlflow_registry import MLflowRegistry

        return MLflowRegistry(root, cache=cache)
    from pipeline.models.registry.file_registry import BuiltInRegistry

    return BuiltInRegistry(root)


def is_mlflow(root: str) -> bool:
    """Whether ``root`` means an MLflow registry."""
    return root in ("mlflow", "databricks") or root.startswith(("mlflow+", *_DATABASES))


def resolve(ref: ModelRef, *, registry: str = DEFAULT_ROOT, cache: str = "") -> ModelVersion:
    """The immutable version that ``ref`` stands for now.

    :param registry: see `open_registry`.
    :raises ModelError: when there is none, or the file is no model.
    :raises RefusedForSafety: for a pickle.
    """
    if not ref.is_file:
        return open_registry(registry, cache=cache).resolve(ref)
    data = read_model(ref.text)
    return find_flavor(detect_bytes(data, where=ref.text)).inspect(ref.text, data)
