"""`Registry`: the model registry from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pyarrow as pa

from pipeline.common.sketch import Sketches
from pipeline.common.units import parse_bytes
from pipeline.errors import SpecError
from pipeline.models.flavors import read_model
from pipeline.models.flavors.fitted import fitted_bytes
from pipeline.models.folder_models import folder_bytes
from pipeline.models.folders import is_folder
from pipeline.models.model import ModelVersion
from pipeline.models.registry import DEFAULT_ROOT, ModelRegistry, open_registry
from pipeline.models.registry.file_registry import BuiltInRegistry, VersionMetadata
from pipeline.models.registry.records import AliasRecord, Checked, RemovalRecord, VersionRecord
from pipeline.settings import Settings
from pipeline.spec.load import absolute_path
from pipeline.spec.model_ref import ModelRef

Model = Any
"""Path or URL of a model file or folder, its bytes, or a fitted model of a supported library."""


class Registry:
    """The model registry that ``models:/churn@champion`` in a job spec refers to.

    Parameters
    ----------
    root : str or PathLike, optional
        Path or URL of a registry. Default: the setting ``registry``.

    Examples
    --------
    >>> registry = pipeline.Registry("models/")
    >>> registry.register("churn.ubj", name="churn", alias="champion").version
    1
    >>> registry.get("models:/churn@champion").uri
    'models:/churn/1'
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        settings = Settings.load()
        self._registry = open_registry(os.fspath(root) if root else settings.registry, cache=settings.directory)

    @property
    def root(self) -> str:
        """Absolute path or URL of the registry, or the setting that names MLflow."""
        return self._registry.root

    def register(
        self,
        model: Model,
        *,
        name: str,
        alias: str | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        description: str = "",
        parent: int | None = None,
        training: pd.DataFrame | pa.Table | None = None,
        again: bool = False,
    ) -> VersionRecord:
        """Register a model as the next version of ``name``. Bytes that are registered already keep their version.

        Parameters
        ----------
        model : str, PathLike, bytes, or a fitted model
            Path or URL of a model file, of an MLflow folder with one, or of the folder of a text encoder; its bytes; or
            the model itself: a booster or a fitted estimator of xgboost, LightGBM, scikit-learn or CatBoost.
        name : str
            Name of the model: lower-case letters, digits, dots, underscores and dashes.
        alias : str, optional
            Alias to point to the version.
        metrics, tags : mapping, optional
            Recorded with the version, such as ``{"auc": 0.91}``.
        description : str, optional
            Recorded with the version.
        parent : int, optional
            Version that this one was made from.
        training : DataFrame or Table, optional
            Rows that it was trained with, or a fair sample of them, with its features by name. Their distributions are
            stored with the version, no rows: the publish gate compares with them (``baseline: training``).
        again : bool, default False
            Register bytes that are registered already as a new version.

        Returns
        -------
        VersionRecord

        Raises
        ------
        ModelError
            If the file is not a model.
        SpecError
            If the object is not a model, or the registry is MLflow.
        """
        data, source = model_bytes(model)
        sketches = None
        if training is not None:
            table = training if isinstance(training, pa.Table) else pa.Table.from_pandas(training, preserve_index=False)
            sketches = Sketches()
            sketches.add(table)
        metadata = VersionMetadata(dict(metrics or {}), dict(tags or {}), description, parent, source, sketches)
        record = built_in(self._registry).register(name, data, metadata, again=again).record
        if alias is not None:
            self.set_alias(name, alias, record.version)
        return record

    def set_alias(self, name: str, alias: str, version: int, *, reason: str = "") -> AliasRecord:
        """Point an alias to a version, and record the reason in the alias's history."""
        return self._registry.set_alias(name, alias, int(version), reason=reason)

    def delete_alias(self, name: str, alias: str, *, reason: str = "") -> AliasRecord:
        """Delete an alias. Its history stays."""
        return self._registry.set_alias(name, alias, None, reason=reason)

    def rollback(self, name: str, alias: str, *, reason: str = "") -> AliasRecord:
        """Point an alias to the version it pointed to before."""
        return built_in(self._registry).rollback(name, alias, reason=reason)

    def history(self, name: str, alias: str) -> tuple[AliasRecord, ...]:
        """Return every change of an alias, oldest first."""
        return built_in(self._registry).history(name, alias)

    def models(self) -> pd.DataFrame:
        """List the models: name, versions, removed versions, aliases, and the latest version."""
        summaries = [self._registry.summary(name).to_dict() for name in self._registry.names()]
        return pd.DataFrame(summaries, columns=["name", "versions", "removed", "aliases", "latest"])

    def versions(self, name: str) -> pd.DataFrame:
        """List the versions of a model that were not removed, newest first, with aliases, metrics and digest."""
        return pd.DataFrame([version_row(record, aliases) for record, aliases in versions_of(self._registry, name)])

    def get(self, reference: str) -> VersionRecord:
        """Return the version that ``models:/churn@champion`` or ``models:/churn/3`` refers to.

        Raises
        ------
        ModelError
            If the model, version or alias does not exist.
        """
        return self._registry.lookup(ModelRef.parse(reference))

    def resolve(self, reference: str) -> ModelVersion:
        """Return the model version as a job would pin it, with its features and digest."""
        return self._registry.resolve(ModelRef.parse(reference))

    def verify(self, name: str | None = None) -> tuple[Checked, ...]:
        """Compute the digest of every model file again, and check numbers and aliases."""
        return built_in(self._registry).verify(name)

    def remove(self, name: str, version: int, *, force: bool = False, reason: str = "") -> RemovalRecord:
        """Remove a version permanently; its number is never reused.

        A version with an alias is removed only with ``force``.
        """
        return built_in(self._registry).remove(name, version, force=force, reason=reason)

    def __repr__(self) -> str:
        return f"<Registry {self.root}>"


def built_in(registry: ModelRegistry) -> BuiltInRegistry:
    """Return ``registry`` if it is the built-in one.

    :raises SpecError: if it is MLflow, which has its own tools.
    """
    if registry.kind != "built-in":
        raise SpecError(
            "this needs the built-in registry; for MLflow use MLflow's own tools",
            where=f"pipeline.registry: {registry.root}",
            expected="the built-in registry (a path or URL) for register, rollback, history, verify and remove",
            next_step="register with log_model(…, registered_model_name=…) of MLflow, or name another registry",
        )
    return cast(BuiltInRegistry, registry)


def has_registry(settings: Settings) -> bool:
    """True if a registry is configured, or a registry exists at the default path."""
    return settings.registry != DEFAULT_ROOT or Path(DEFAULT_ROOT).is_dir()


def model_bytes(model: Model) -> tuple[bytes, str]:
    """Return the bytes of a model file, and its source: a path or URL, or the name of the class.

    :raises SpecError: for an object that is not a model.
    """
    if isinstance(model, (bytes, bytearray)):
        return bytes(model), ""
    if isinstance(model, (str, os.PathLike)):
        path = absolute_path(os.fspath(model))
        limit = parse_bytes(Settings.load().max_model_size)
        return folder_bytes(path, limit=limit) if is_folder(path) else (read_model(path, limit=limit), path)
    return fitted_bytes(model, import_paths=Settings.load().import_paths), type(model).__name__


def versions_of(registry: ModelRegistry, name: str) -> list[tuple[VersionRecord, list[str]]]:
    """List the versions of a model that were not removed, newest first, each with its aliases."""
    summary = registry.summary(name)
    return [
        (registry.version(name, number), [alias for alias, at in summary.aliases.items() if at == number])
        for number in reversed(summary.versions)
    ]


def version_row(record: VersionRecord, aliases: list[str]) -> dict[str, Any]:
    """Return the fields of a version that lists show."""
    return {
        "version": record.version,
        "aliases": aliases,
        "digest": record.digest,
        "flavor": record.flavor,
        "task": record.task,
        "metrics": record.metrics,
        "created": record.created,
        "user": record.user,
        "description": record.description,
    }
