"""The model registry from Python and Jupyter: `Registry`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pandas as pd

from pipeline.errors import SpecError
from pipeline.models.flavors import read_model
from pipeline.models.model import ModelVersion
from pipeline.models.registry import DEFAULT_ROOT, ModelRegistry, open_registry
from pipeline.models.registry.file_registry import BuiltInRegistry, Facts
from pipeline.models.registry.records import AliasRecord, Checked, ModelSummary, RemovalRecord, VersionRecord
from pipeline.settings import Settings
from pipeline.spec.load import absolute_path
from pipeline.spec.model_ref import ModelRef


class Registry:
    """The model registry: what ``models:/churn@champion`` in a job spec is looked up in.

    :param root: path or URL; default: the setting ``pipeline.registry``.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        settings = Settings.load()
        self._registry = open_registry(os.fspath(root) if root else settings.registry, cache=settings.directory)

    @property
    def root(self) -> str:
        """Where it is: absolute path, URL, or what was said of MLflow."""
        return self._registry.root

    def register(
        self,
        model: Any,
        *,
        name: str,
        alias: str | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        description: str = "",
        parent: int | None = None,
        again: bool = False,
    ) -> VersionRecord:
        """Make a model the next version of ``name``; the same bytes again give the version they have already.

        :param model: path or URL of a model file, its bytes, or an xgboost Booster or scikit-learn model.
        :param alias: is pointed to the version.
        :param metrics: such as ``{"auc": 0.91}``.
        :param parent: version it was made from.
        :param again: make a new version of the same bytes all the same.
        """
        data, source = model_bytes(model)
        facts = Facts(dict(metrics or {}), dict(tags or {}), description, parent, source)
        record = built_in(self._registry).register(name, data, facts, again=again).record
        if alias is not None:
            self.alias(name, alias, record.version)
        return record

    def alias(self, name: str, alias: str, version: int | None, *, reason: str = "") -> AliasRecord:
        """Point an alias to a version; None takes it away."""
        return self._registry.set_alias(name, alias, version, reason=reason)

    def rollback(self, name: str, alias: str, *, reason: str = "") -> AliasRecord:
        """Point an alias to the version it pointed to before."""
        return built_in(self._registry).rollback(name, alias, reason=reason)

    def history(self, name: str, alias: str) -> tuple[AliasRecord, ...]:
        """Every move of an alias, oldest first."""
        return built_in(self._registry).history(name, alias)

    def models(self) -> list[ModelSummary]:
        """Every model with its versions and aliases."""
        return [self._registry.summary(name) for name in self._registry.names()]

    def list(self, name: str | None = None) -> pd.DataFrame:
        """The models, or the versions of one, as a table: one row each."""
        if name is None:
            return pd.DataFrame([summary.details() for summary in self.models()])
        return pd.DataFrame([version_row(record, aliases) for record, aliases in versions_of(self._registry, name)])

    def show(self, reference: str) -> VersionRecord:
        """What the registry says of ``models:/churn@champion`` or ``models:/churn/3``."""
        return self._registry.lookup(ModelRef.parse(reference))

    def resolve(self, reference: str) -> ModelVersion:
        """The model version as a job would pin it."""
        return self._registry.resolve(ModelRef.parse(reference))

    def verify(self, name: str | None = None) -> tuple[Checked, ...]:
        """Digest every file again, and check numbers and aliases."""
        return built_in(self._registry).verify(name)

    def remove(self, name: str, version: int, *, force: bool = False, reason: str = "") -> RemovalRecord:
        """Remove a version for good; its number stays taken. Refused while an alias points to it, unless ``force``."""
        return built_in(self._registry).remove(name, version, force=force, reason=reason)

    def __repr__(self) -> str:
        return f"Registry({self.root!r})"


def built_in(registry: ModelRegistry) -> BuiltInRegistry:
    """``registry``, when it is the built-in one.

    :raises SpecError: when it is MLflow, which does that by itself.
    """
    if registry.kind != "built-in":
        raise SpecError(
            "MLflow is asked here, not kept",
            where=f"pipeline.registry: {registry.root}",
            expected="the built-in registry (a path or URL) for register, rollback, history, verify and remove",
            next_step="register with mlflow.xgboost.log_model(…, registered_model_name=…), or name another registry",
        )
    return cast(BuiltInRegistry, registry)


def has_registry(settings: Settings) -> bool:
    """Whether somebody has said where the model registry is, or has begun to fill the one in its usual place."""
    return settings.registry != DEFAULT_ROOT or Path(DEFAULT_ROOT).is_dir()


def model_bytes(model: Any) -> tuple[bytes, str]:
    """The bytes of a model file, and where it was: from a path or URL, the bytes themselves, or an object of xgboost.

    :raises SpecError: for anything else.
    """
    if isinstance(model, (bytes, bytearray)):
        return bytes(model), ""
    if isinstance(model, (str, os.PathLike)):
        path = absolute_path(os.fspath(model))
        return read_model(path), path
    booster = model.get_booster() if hasattr(model, "get_booster") else model
    if not hasattr(booster, "save_raw"):
        raise SpecError(
            "that is no model that can be registered",
            found=type(model).__name__,
            expected="the path of a model file, its bytes, or an xgboost model",
        )
    return bytes(booster.save_raw(raw_format="ubj")), type(model).__name__


def versions_of(registry: ModelRegistry, name: str) -> list[tuple[VersionRecord, list[str]]]:
    """The versions of a model that were not removed, newest first, each with the aliases that point to it."""
    summary = registry.summary(name)
    return [
        (registry.version(name, number), [alias for alias, at in summary.aliases.items() if at == number])
        for number in reversed(summary.versions)
    ]


def version_row(record: VersionRecord, aliases: list[str]) -> dict[str, Any]:
    """A version as tables and JSON show it in a list."""
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
