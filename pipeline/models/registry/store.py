"""Read and check the files of the built-in model registry.

Layout (docs/registry.md has every field)::

    <root>/<name>/versions/<n>.json          a version, created exclusively; never changed
                  files/<sha256>.<ending>    the model file, by its content
                  aliases/<alias>/<k>.json   a move of an alias, created exclusively; the highest number counts
                  removed/<n>.json           the removal of a version; its number is never reused

`audit` checks a model: the digests of its files, its numbers, its aliases.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.common.digest import digest_bytes
from pipeline.common.units import format_bytes
from pipeline.errors import ModelDigestMismatch, ModelError, PipelineError, StateCorrupt
from pipeline.models.registry.records import (
    AliasRecord,
    Checked,
    ModelSummary,
    RemovalRecord,
    VersionRecord,
    check_alias,
    check_model_name,
)
from pipeline.spec.model_ref import ModelRef
from pipeline.storage.store import Store


class StoredModels:
    """Reads a registry that consists of files."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def root(self) -> str:
        """Absolute path or URL of the registry."""
        return self.store.root

    def names(self) -> list[str]:
        """Return the names of the models, sorted."""
        return [name for name in self.store.list_folders() if self.store.list(f"{name}/versions")]

    def summary(self, name: str) -> ModelSummary:
        """Return the versions and aliases of a model.

        :raises ModelError: when the model is unknown.
        """
        numbers = self.numbers(name)
        if not numbers:
            raise self.no_model(name)
        removed = self.removed(name)
        moves = {alias: self.present(name, alias) for alias in self.store.list_folders(f"{name}/aliases")}
        return ModelSummary(
            name,
            versions=tuple(number for number in numbers if number not in removed),
            removed=tuple(number for number in numbers if number in removed),
            aliases={alias: move.version for alias, move in moves.items() if move and move.version is not None},
        )

    def version(self, name: str, number: int) -> VersionRecord:
        """Return the record of a version, even of a removed version.

        :raises ModelError: when the version is unknown.
        """
        place = version_path(check_model_name(name), number)
        try:
            data = self.store.read(place)
        except FileNotFoundError:
            raise self._no_version(name, number) from None
        record = VersionRecord.from_json(data, where=self.store.url(place))
        self._check_place((record.name, record.version) == (name, number), place, record.uri)
        return record

    def removal(self, name: str, number: int) -> RemovalRecord | None:
        """Return the record of a version's removal; None if the version was not removed."""
        place = removal_path(name, number)
        try:
            return RemovalRecord.from_json(self.store.read(place), where=self.store.url(place))
        except FileNotFoundError:
            return None

    def aliases(self, name: str) -> list[str]:
        """Return all aliases that were ever set, sorted."""
        folder = f"{check_model_name(name)}/aliases"
        return [alias for alias in self.store.list_folders(folder) if numbers_in(self.store.list(f"{folder}/{alias}"))]

    def history(self, name: str, alias: str) -> tuple[AliasRecord, ...]:
        """Return every move of an alias, oldest first.

        :raises ModelError: when the alias was never set.
        """
        folder = f"{check_model_name(name)}/aliases/{check_alias(alias)}"
        moves = tuple(self._move(name, alias, number) for number in numbers_in(self.store.list(folder)))
        if not moves:
            raise self.no_alias(name, alias)
        return moves

    def lookup(self, ref: ModelRef) -> VersionRecord:
        """Return the current version of ``ref``. Cheap: three small reads and a listing, never the model file.

        :raises ModelError: when the model, version or alias is unknown, or the version was removed.
        """
        number = ref.version if ref.version is not None else self._pointed(ref)
        record = self.version(ref.name, number)
        if (gone := self.removal(ref.name, number)) is not None:
            raise ModelError(
                "the model version was removed from the registry",
                where=ref.text,
                found=f"version {number}, removed {gone.created} by {gone.user}"
                + (f": {gone.reason}" if gone.reason else ""),
                next_step=f"python -m pipeline models list {ref.name}",
            )
        return record

    def read_file(self, record: VersionRecord) -> bytes:
        """Return the bytes of a version's model file.

        :raises ModelDigestMismatch: when the file is missing, or differs from the registered file.
        """
        try:
            data = self.store.read(record.file)
            found = f"SHA-256 {digest_bytes(data)}"
        except FileNotFoundError:
            data, found = b"", "no file"
        if not data or digest_bytes(data) != record.digest:
            raise ModelDigestMismatch(
                "the file in the registry is not the one that was registered",
                where=self.store.url(record.file),
                found=found,
                expected=f"SHA-256 {record.digest}, {record.uri}",
                next_step=f"register the same file again, which restores it: --name {record.name}",
            )
        return data

    def numbers(self, name: str) -> list[int]:
        """Return the numbers of all versions, even of removed versions, ascending."""
        return numbers_in(self.store.list(f"{check_model_name(name)}/versions"))

    def removed(self, name: str) -> set[int]:
        """Return the numbers of removed versions."""
        return set(numbers_in(self.store.list(f"{name}/removed")))

    def present(self, name: str, alias: str) -> AliasRecord | None:
        """Return the last move of an alias; None if the alias was never set."""
        numbers = numbers_in(self.store.list(f"{check_model_name(name)}/aliases/{check_alias(alias)}"))
        return self._move(name, alias, numbers[-1]) if numbers else None

    def _move(self, name: str, alias: str, number: int) -> AliasRecord:
        place = move_path(name, alias, number)
        record = AliasRecord.from_json(self.store.read(place), where=self.store.url(place))
        is_here = (record.name, record.alias, record.number) == (name, alias, number)
        self._check_place(is_here, place, f"move {record.number} of models:/{record.name}@{record.alias}")
        return record

    def _pointed(self, ref: ModelRef) -> int:
        move = self.present(ref.name, ref.alias)
        if move is None or move.version is None:
            raise self.no_alias(ref.name, ref.alias) if self.numbers(ref.name) else self.no_model(ref.name)
        return move.version

    def _check_place(self, is_here: bool, place: str, found: str) -> None:
        if not is_here:
            raise StateCorrupt(
                "a record of the model registry is not the one its name says",
                where=self.store.url(place),
                found=found,
                next_step="restore the file",
            )

    def no_model(self, name: str) -> ModelError:
        """Make the error for an unknown model."""
        names = self.names()
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return ModelError(
            f"no model named {name!r}",
            where=f"{name} in {self.root}",
            found=shown or "no models",
            next_step=f"python -m pipeline models register FILE --name {name}, or set pipeline.registry",
        )

    def no_alias(self, name: str, alias: str) -> ModelError:
        """Make the error for an alias that is not set."""
        summary = self.summary(name)
        return ModelError(
            f"model {name!r} has no alias {alias!r}",
            where=f"models:/{name}@{alias}",
            found=", ".join(summary.aliases) or "no aliases",
            next_step=f"python -m pipeline models alias {name} {alias} {summary.latest or 'VERSION'}",
        )

    def _no_version(self, name: str, number: int) -> ModelError:
        numbers = self.numbers(name)
        if not numbers:
            return self.no_model(name)
        return ModelError(
            f"model {name!r} has no version {number}",
            where=f"models:/{name}/{number}",
            found=f"versions 1 to {numbers[-1]}",
            next_step=f"python -m pipeline models list {name}",
        )


def version_path(name: str, number: int) -> str:
    """Return the path of a version's record."""
    return f"{name}/versions/{number}.json"


def removal_path(name: str, number: int) -> str:
    """Return the path of the record of a version's removal."""
    return f"{name}/removed/{number}.json"


def move_path(name: str, alias: str, number: int) -> str:
    """Return the path of the record of an alias move."""
    return f"{name}/aliases/{alias}/{number}.json"


def numbers_in(names: list[str]) -> list[int]:
    """Return the numbers in the names of JSON files, ascending."""
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isdigit())


def audit(stored: StoredModels, name: str) -> Iterator[Checked]:
    """Check every version and every alias of a model."""
    numbers, removed = stored.numbers(name), stored.removed(name)
    for number in range(1, max(numbers, default=0) + 1):
        what = f"models:/{name}/{number}"
        if number not in numbers:
            yield Checked(what, False, "its record is missing, though later ones are there")
        elif number in removed:
            yield Checked(what, True, "removed")
        else:
            yield _check_version(stored, name, number, what=what)
    for alias in stored.aliases(name):
        yield _check_alias(stored, name, alias, live=set(numbers) - removed)


def _check_version(stored: StoredModels, name: str, number: int, *, what: str) -> Checked:
    try:
        record = stored.version(name, number)
        data = stored.read_file(record)
    except PipelineError as error:
        return Checked(what, False, f"{error.message}: {error.found}")
    if len(data) != record.nbytes:
        return Checked(what, False, f"{len(data):,} bytes, its record says {record.nbytes:,}")
    return Checked(what, True, f"{format_bytes(record.nbytes)} with SHA-256 {record.digest[:12]}…, as registered")


def _check_alias(stored: StoredModels, name: str, alias: str, *, live: set[int]) -> Checked:
    what = f"models:/{name}@{alias}"
    try:
        history = stored.history(name, alias)
    except PipelineError as error:
        return Checked(what, False, f"{error.message}: {error.found}")
    if [move.number for move in history] != list(range(1, len(history) + 1)):
        return Checked(what, False, "a record of its history is missing")
    version = history[-1].version
    if version is not None and version not in live:
        return Checked(what, False, f"it points to version {version}, which was removed or is missing")
    times = f"moved {len(history):,} times"
    return Checked(what, True, f"version {version}, {times}" if version is not None else f"removed, {times}")
