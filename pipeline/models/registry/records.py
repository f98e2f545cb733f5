"""Records of a model registry, and their JSON in the built-in registry. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, TypeVar

from pipeline.common.html import html_table
from pipeline.common.text import listed
from pipeline.common.units import format_bytes
from pipeline.errors import SpecError, StateCorrupt
from pipeline.models.model import Feature, ModelVersion, Task

SCHEMA_VERSION = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NOT_ALIASES = re.compile(r"v?[0-9]+|latest")
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./ -]{0,127}")
AliasAction = Literal["set", "rollback", "unset", "withdrawn"]
"""Reason of a move. ``unset``: the alias was removed. ``withdrawn``: the version was removed at the same time."""
R = TypeVar("R")


@dataclass(frozen=True)
class VersionRecord:
    """One version of one model. The record never changes."""

    name: str
    version: int
    """Number of the version, from 1. Numbers are dense and never reused."""
    digest: str
    """SHA-256 of the model file, and name of the copy in the registry. Empty if the registry does not know it."""
    nbytes: int
    """Bytes of the model file."""
    file: str
    """Path of the copy, relative to the root of the registry; in MLflow, the URI of the artefact."""
    flavor: str
    task: Task
    objective: str
    """Objective by the library's name."""
    outputs: int
    """Values per row of ``prediction``."""
    trees: int
    features: tuple[Feature, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    description: str = ""
    parent: int | None = None
    """Version that this version was trained from."""
    source: str = ""
    """Path or URL that the model was registered from."""
    created: str = ""
    """Time in UTC, ISO 8601."""
    user: str = ""
    host: str = ""
    id: str = ""
    """Unique name of the registration."""
    rounds: int = 0
    """Boosting rounds in the file."""
    best_iteration: int | None = None
    """Round at which early stopping found the best score, from 0; None if the file names no such round."""
    training: str = ""
    """Path of the distributions of its training data, relative to the root of the registry; empty without any."""

    @property
    def uri(self) -> str:
        """Reference, such as ``models:/churn/3``."""
        return f"models:/{self.name}/{self.version}"

    def __repr__(self) -> str:
        trees = f", {self.trees:,} trees" if self.trees else ""
        return f"<VersionRecord {self.uri}: {self.flavor}, {self.task}{trees}, sha256 {self.digest[:12]}>"

    def _repr_html_(self) -> str:
        task = f"{self.task} {self.objective}".strip() + (f", {self.trees:,} trees" if self.trees else "")
        fields = {
            "sha256": self.digest[:16],
            "format": f"{self.flavor}, {format_bytes(self.nbytes)}",
            "task": task,
            "features": f"{len(self.features)}: {listed([feature.name for feature in self.features])}",
            "metrics": ", ".join(f"{name} {value:g}" for name, value in self.metrics.items()),
            "tags": ", ".join(f"{name}={value}" for name, value in self.tags.items()),
            "about": self.description,
            "training": "distributions are known" if self.training else "",
            "from": self.source,
            "created": self.created,
        }
        return html_table(self.uri, fields.items())

    def to_json_bytes(self) -> bytes:
        """Return the stored JSON."""
        return _to_json(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON output."""
        return {"uri": self.uri, **_plain(self)}

    @staticmethod
    def from_json(data: bytes, *, where: str) -> VersionRecord:
        """Inverse of `to_json_bytes`.

        :raises StateCorrupt: for any other content.
        """
        return _from_json(_version, data, where=where)


@dataclass(frozen=True)
class _Stored:
    """A record with fields of JSON types."""

    def to_json_bytes(self) -> bytes:
        """Return the stored JSON."""
        return _to_json(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON output."""
        return _plain(self)

    @classmethod
    def from_json(cls, data: bytes, *, where: str) -> Self:
        """Inverse of `to_json_bytes`.

        :raises StateCorrupt: for any other content.
        """
        return _from_json(lambda record: cls(**record), data, where=where)


@dataclass(frozen=True)
class AliasRecord(_Stored):
    """One move of an alias. The alias points to the version in the move with the highest number."""

    name: str
    alias: str
    number: int
    """Number of the move, from 1."""
    version: int | None
    """Version that the alias points to. None: the alias was removed."""
    action: AliasAction = "set"
    reason: str = ""
    """Reason in the user's words."""
    created: str = ""
    """Time in UTC, ISO 8601."""
    user: str = ""
    host: str = ""
    id: str = ""
    """Unique name of the move."""


@dataclass(frozen=True)
class RemovalRecord(_Stored):
    """Removal of a version. The number is never reused."""

    name: str
    version: int
    digest: str
    reason: str = ""
    created: str = ""
    user: str = ""
    host: str = ""
    id: str = ""


@dataclass(frozen=True)
class Registered:
    """Result of a registration."""

    record: VersionRecord
    is_new: bool
    """False if the model already had a version with the same bytes."""


@dataclass(frozen=True)
class ModelSummary:
    """A model, its versions, and the versions its aliases point to."""

    name: str
    versions: tuple[int, ...]
    """Numbers of the versions that were not removed, ascending."""
    removed: tuple[int, ...]
    aliases: dict[str, int]

    @property
    def latest(self) -> int | None:
        """Highest version that was not removed; None if there is none."""
        return self.versions[-1] if self.versions else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON output."""
        return {**asdict(self), "versions": list(self.versions), "removed": list(self.removed), "latest": self.latest}


@dataclass(frozen=True)
class Checked:
    """Result of `verify` for one version or alias."""

    what: str
    """Checked reference, such as ``models:/churn/3`` or ``models:/churn@champion``."""
    ok: bool
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON output."""
        return asdict(self)


def describe(record: VersionRecord, version: ModelVersion, *, registry: str) -> ModelVersion:
    """Return ``version`` with the name and number of its ``record``."""
    return ModelVersion(
        **{**version.__dict__, "name": record.name, "version": str(record.version), "registry": registry}
    )


def targets(history: Iterable[AliasRecord]) -> tuple[int, ...]:
    """Return the versions that an alias can be rolled back through, the present version last; 0 if it was removed.

    Setting the alias adds a version. A rollback or a withdrawal removes the last version.
    """
    stack: list[int] = []
    for record in history:
        if record.action == "set" and record.version is not None:
            if stack[-1:] != [record.version]:
                stack.append(record.version)
        elif record.action == "unset":
            stack.append(0)
        else:
            while stack and stack[-1] != (record.version or 0):
                stack.pop()
    return tuple(stack)


def previous_target(history: Iterable[AliasRecord], *, live: Collection[int]) -> int | None:
    """Return the version that a rollback leads to: the last earlier version in ``live``; None if there is none."""
    *before, present = targets(history) or (0,)
    return next((version for version in reversed(before) if version in live and version != present), None)


def check_model_name(name: str) -> str:
    """Return ``name`` if it is a valid model name of the built-in registry.

    :raises SpecError: when the name is not valid.
    """
    if not _NAME.fullmatch(name):
        near = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:64]
        raise SpecError(
            "invalid model name",
            found=repr(name),
            expected="lower-case letters, digits, dots, underscores and dashes; at most 64",
            next_step=f"write {near}" if near else "",
        )
    return name


def check_alias(alias: str) -> str:
    """Return ``alias`` if it is valid.

    :raises SpecError: when the name is not valid.
    """
    if not _NAME.fullmatch(alias) or _NOT_ALIASES.fullmatch(alias):
        raise SpecError(
            "invalid alias",
            found=repr(alias),
            expected="lower-case letters, digits, dots, underscores and dashes; no number, and not latest",
            next_step="choose a word such as champion",
        )
    return alias


def check_tags(values: Mapping[str, Any], *, what: str) -> None:
    """Check the keys and values of metrics or tags.

    :raises SpecError: for a key that is not a short text, a long value, or a metric that is not finite.
    """
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise SpecError(f"a {what} is not a finite number", found=f"{key} = {value}")
        if not _KEY.fullmatch(key) or "\n" in str(value) or len(str(value)) > 5000:
            raise SpecError(
                f"invalid key or value of a {what}",
                found=repr(key),
                expected="a key of letters, digits and ._-/ (128 at most), and a value of one line",
            )


def _plain(record: Any) -> dict[str, Any]:
    plain = asdict(record)
    if "features" in plain:
        plain["features"] = [_plain_feature(feature) for feature in plain["features"]]
    if not plain.get("training"):
        plain.pop("training", None)
    return plain


def _plain_feature(feature: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a feature; ``category_bytes`` and ``category_offsets`` only where they say something."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in feature.items()}
    if plain["category_bytes"] is None:
        del plain["category_bytes"], plain["category_offsets"]
    return plain


def _to_json(record: Any) -> bytes:
    return json.dumps({"schema_version": SCHEMA_VERSION, **_plain(record)}, indent=1).encode() + b"\n"


def _from_json(make: Callable[[dict[str, Any]], R], data: bytes, *, where: str) -> R:
    try:
        record = json.loads(data)
        if record.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("unknown schema_version")
        return make(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateCorrupt(
            "a record of the model registry is damaged",
            where=where,
            found=f"{type(error).__name__}: {error}",
            expected="the JSON that was written when the model was registered or its alias moved",
            next_step="restore the file",
        ) from error


def _feature(record: dict[str, Any]) -> Feature:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
    }
    return Feature(**fields)


def _version(record: dict[str, Any]) -> VersionRecord:
    features = tuple(_feature(feature) for feature in record["features"])
    return VersionRecord(**{**record, "features": features})
