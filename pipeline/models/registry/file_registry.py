"""The built-in model registry: files only, on any fsspec path, safe with any number of writers.

Every change creates one file exclusively. A writer that dies leaves the change complete or not made. If two writers
choose the same number, one of them takes the next number. An invariant between two files (an alias and its version) is
checked again after the write, so that of two concurrent writers the second detects the conflict.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pipeline.common.digest import digest_bytes
from pipeline.common.sketch import Sketches
from pipeline.common.units import Clock, iso_time, utc_now
from pipeline.errors import ConflictError
from pipeline.models.flavors import detect_bytes, find_flavor
from pipeline.models.model import ModelVersion
from pipeline.models.registry.records import (
    AliasAction,
    AliasRecord,
    Checked,
    Registered,
    RemovalRecord,
    VersionRecord,
    check_alias,
    check_model_name,
    check_tags,
    describe,
    previous_target,
    targets,
)
from pipeline.models.registry.store import StoredModels, audit, move_path, removal_path, version_path
from pipeline.models.registry.training import training_bytes, training_path
from pipeline.spec.model_ref import ModelRef
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import unique_name


@dataclass(frozen=True)
class VersionMetadata:
    """Information that a user gives when registering a version."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    parent: int | None = None
    """Version that this version was trained from."""
    source: str = ""
    """Path or URL of the file."""
    training: Sketches | None = None
    """Distributions of the data that it was trained with."""


class BuiltInRegistry(StoredModels):
    """A `pipeline.models.registry.ModelRegistry` that consists of files."""

    kind = "built-in"

    def __init__(self, root: str, *, store: Store | None = None, now: Clock = utc_now) -> None:
        super().__init__(store or open_store(root))
        self._now = now

    def resolve(self, ref: ModelRef, *, allow_code: bool = False) -> ModelVersion:
        """Resolve ``ref`` to its current version. Read and verify the file, and load it once in a child process.

        :raises ModelDigestMismatch: when the file in the registry differs from the registered file.
        """
        record = self.lookup(ref)
        data = self.read_file(record)
        found = find_flavor(record.flavor).inspect(self.store.url(record.file), data, name=record.name)
        return describe(record, found, registry=self.root)

    def register(self, name: str, data: bytes, metadata: VersionMetadata, *, again: bool = False) -> Registered:
        """Register ``data``, the bytes of a model file, as the next version of ``name``.

        If a version has the same bytes, return that version: a registration may be repeated.

        :param again: register a new version even if a version has the same bytes.
        :raises ConflictError: when the version with the same bytes has other metadata.
        :raises ModelError: when the bytes are not a model, or the parent is unknown.
        """
        check_tags(metadata.metrics, what="metric")
        check_tags(metadata.tags, what="tag")
        if metadata.parent is not None:
            self.version(name, metadata.parent)
        flavor = find_flavor(detect_bytes(data, where=metadata.source))
        found = flavor.inspect(metadata.source or name, data, name=check_model_name(name))
        self.store.check_conditional_writes()
        known = self.numbers(name)[-1:] or [0]
        made = self._record(name, found, data, metadata)
        if metadata.training is not None:
            training = training_bytes(metadata.training, found.feature_names)
            made = replace(made, training=training_path(name, training))
            self.store.put_if_absent(made.training, training)
        # If the file did not exist, no version registered before can have its bytes.
        looked = 0 if again or self.store.exists(made.file) else known[0]
        self.store.put_if_absent(made.file, data)
        while True:
            last = (self.numbers(name)[-1:] or [0])[0]
            if not again and (same := self._same_bytes(name, range(looked + 1, last + 1), made.digest)) is not None:
                self._restore(same, data)
                return Registered(_check_metadata(same, metadata, training=made.training), is_new=False)
            looked = last
            record = replace(made, version=last + 1)
            if self.store.put_if_absent(version_path(name, record.version), record.to_json_bytes()):
                # Another process may have removed the last version with these bytes, and the file, in the meantime.
                self._restore(record, data)
                return Registered(record, is_new=True)

    def set_alias(self, name: str, alias: str, number: int | None, *, reason: str = "") -> AliasRecord:
        """Point an alias to a version; None removes the alias.

        :returns: the move; the last move if the alias already points to the version.
        :raises ModelError: when the version is unknown or removed; or when the alias to remove is unknown.
        """
        check_alias(alias)
        if number is not None:
            self.lookup(ModelRef(f"models:/{name}/{number}"))
        self.store.check_conditional_writes()
        while True:
            present = self.present(name, alias)
            if present is None and number is None:
                raise self.no_alias(name, alias)
            if present is not None and present.version == number:
                return present
            action: AliasAction = "unset" if number is None else "set"
            move = self._append(present, name, alias, number, action=action, reason=reason)
            if move is not None:
                return self._still_there(move, present)

    def rollback(self, name: str, alias: str, *, reason: str = "") -> AliasRecord:
        """Point an alias to its previous version.

        :raises ConflictError: when there is no previous version, or another process moved the alias at the same time.
        """
        history = self.history(name, alias)
        number = previous_target(history, live=self.summary(name).versions)
        if number is None:
            raise ConflictError(
                "there is no version to roll back to",
                where=f"models:/{name}@{alias}",
                found="before: " + (", ".join(str(one) for one in targets(history)[:-1] if one) or "nothing"),
                expected="an earlier version that was not removed",
                next_step=f"python -m pipeline models alias {name} {alias} VERSION",
            )
        move = self._append(history[-1], name, alias, number, action="rollback", reason=reason)
        if move is None:
            # Do not retry: if two users roll back at the same time, a retry would go one version too far.
            raise ConflictError(
                "somebody else moved the alias at the same moment; nothing was rolled back",
                where=f"models:/{name}@{alias}",
                expected=f"version {history[-1].version}, as it was",
                next_step=f"look again: python -m pipeline models show {name}",
            )
        return self._still_there(move, history[-1])

    def remove(self, name: str, number: int, *, force: bool = False, reason: str = "") -> RemovalRecord:
        """Remove a version and, unless another version has the same bytes, its file. The number is never reused.

        :param force: also remove the aliases that point to the version.
        :raises ConflictError: when an alias points to the version and ``force`` is not set.
        """
        record = self.version(name, number)
        gone = self.removal(name, number)
        if gone is None:
            self._free(record, force=force)
            gone = RemovalRecord(name, number, record.digest, reason, *self._signature())
            self.store.put_if_absent(removal_path(name, number), gone.to_json_bytes())
            try:
                # Check again: an alias may have been set to the version in the meantime.
                self._free(record, force=force)
            except ConflictError:
                self.store.remove(removal_path(name, number))
                raise
        self._remove_file(record)
        return self.removal(name, number) or gone

    def verify(self, name: str | None = None) -> tuple[Checked, ...]:
        """Compute the digest of every file again, and check that numbers are dense and aliases point to versions.

        :param name: name of a model; None: all models.
        """
        names = self.names() if name is None else [self.summary(name).name]
        return tuple(checked for one in names for checked in audit(self, one))

    def _record(self, name: str, found: ModelVersion, data: bytes, metadata: VersionMetadata) -> VersionRecord:
        created, user, host, unique = self._signature()
        return VersionRecord(
            name=name,
            version=0,
            digest=digest_bytes(data),
            nbytes=len(data),
            file=f"{name}/files/{found.digest}.{_ending(data)}",
            flavor=found.flavor,
            task=found.task,
            objective=found.objective,
            outputs=found.outputs,
            trees=found.trees,
            rounds=found.rounds,
            best_iteration=found.best_iteration,
            features=found.features,
            metrics={key: float(value) for key, value in metadata.metrics.items()},
            tags={key: str(value) for key, value in metadata.tags.items()},
            description=metadata.description,
            parent=metadata.parent,
            source=metadata.source,
            created=created,
            user=user,
            host=host,
            id=unique,
        )

    def _same_bytes(self, name: str, numbers: range, digest: str) -> VersionRecord | None:
        gone = self.removed(name)
        records = (self.version(name, number) for number in reversed(numbers) if number not in gone)
        return next((record for record in records if record.digest == digest), None)

    def _restore(self, record: VersionRecord, data: bytes) -> None:
        """Write ``data`` again if the file is missing or damaged."""
        if not self.store.exists(record.file) or self.store.read(record.file) != data:
            self.store.replace(record.file, data)

    def _remove_file(self, record: VersionRecord) -> None:
        """Remove the file unless another version has its bytes. Restore the file if one was registered meanwhile."""
        if self._needs_file(record) or not self.store.exists(record.file):
            return
        data = self.store.read(record.file)
        self.store.remove(record.file)
        if self._needs_file(record):
            self._restore(record, data)

    def _needs_file(self, record: VersionRecord) -> bool:
        numbers = range(1, self.numbers(record.name)[-1] + 1)
        return self._same_bytes(record.name, numbers, record.digest) is not None

    def _free(self, record: VersionRecord, *, force: bool) -> None:
        """Remove the aliases that point to a version.

        :raises ConflictError: when aliases point to the version and ``force`` is not set.
        """
        pointing = [alias for alias, number in self.summary(record.name).aliases.items() if number == record.version]
        if pointing and not force:
            raise ConflictError(
                "an alias points to the version",
                where=record.uri,
                found=", ".join(pointing),
                expected="no alias, or --force, which removes the aliases too",
                next_step=f"python -m pipeline models alias {record.name} {pointing[0]} ANOTHER-VERSION",
            )
        for alias in pointing:
            self.set_alias(record.name, alias, None, reason=f"version {record.version} was removed")

    def _still_there(self, move: AliasRecord, before: AliasRecord | None) -> AliasRecord:
        """Return ``move``. If its version was removed at the same time, point the alias back to its previous version.

        :raises ConflictError: when the version was removed.
        """
        if move.version is None or self.removal(move.name, move.version) is None:
            return move
        number = before.version if before else None
        self._append(move, move.name, move.alias, number, action="withdrawn", reason="the version was removed")
        raise ConflictError(
            "the version was removed at the same moment; the alias stays where it was",
            where=f"models:/{move.name}@{move.alias}",
            found=f"version {move.version} removed",
            next_step=f"python -m pipeline models show {move.name}",
        )

    def _append(
        self,
        present: AliasRecord | None,
        name: str,
        alias: str,
        number: int | None,
        *,
        action: AliasAction,
        reason: str,
    ) -> AliasRecord | None:
        """Append a move of an alias after ``present``; return None if another process has appended one meanwhile."""
        place = present.number + 1 if present else 1
        move = AliasRecord(name, alias, place, number, action, reason, *self._signature())
        return move if self.store.put_if_absent(move_path(name, alias, place), move.to_json_bytes()) else None

    def _signature(self) -> tuple[str, str, str, str]:
        """Return the time, the user, the host, and a unique name."""
        return iso_time(self._now()), _user(), socket.gethostname(), unique_name()


def _check_metadata(registered: VersionRecord, metadata: VersionMetadata, *, training: str) -> VersionRecord:
    """Return ``registered`` if it has the given ``metadata``; empty values are not compared.

    :raises ConflictError: when a given value differs.
    """
    given = {"metrics": dict(metadata.metrics), "tags": dict(metadata.tags)} | {
        "description": metadata.description,
        "parent": metadata.parent,
        "training": training,
    }
    other = [name for name, value in given.items() if value and value != getattr(registered, name)]
    if other:
        raise ConflictError(
            "the model has this very file as a version already, and versions never change",
            where=registered.uri,
            found=f"other {' and '.join(other)}: "
            + ", ".join(str(getattr(registered, name) or "none") for name in other),
            expected="the same, or none",
            next_step="leave it as it is, or register the file once more with --again",
        )
    return registered


def _ending(data: bytes) -> str:
    """Return ``json`` or ``ubj``: after the brace, JSON has a quote or white space, UBJSON the marker of a length."""
    head = data.lstrip()[:2]
    return "json" if len(head) == 2 and head[:1] == b"{" and head[1:] in b'" \n\r\t' else "ubj"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
