"""Checking a model of the built-in registry: files against their digests, numbers, aliases."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.common.units import format_bytes
from pipeline.errors import PipelineError
from pipeline.models.registry.records import Checked
from pipeline.models.registry.store import StoredModels


def audit(stored: StoredModels, name: str) -> Iterator[Checked]:
    """What is found about every version and every alias of a model."""
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
    return Checked(what, True, f"version {version}, {times}" if version is not None else f"taken away, {times}")
