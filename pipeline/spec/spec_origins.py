"""Where the value of each field of a job spec comes from. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.spec.diagnostics import Document, FieldPath, dotted
from pipeline.spec.filled import Filled
from pipeline.spec.precedence import Candidate, Choice, Rank


def spec_origins(document: Document, record: Mapping[str, Any], filled: Filled) -> dict[str, Choice]:
    """The value of each field of a spec that has one, and what gave it.

    :param document: as the spec was read.
    :param record: the spec with its defaults, as JSON holds it.
    """
    found = {}
    for path, value in _leaves(record, ()):
        if path[0] == "params":
            continue
        found[dotted(path)] = _origin(document, path, value, filled)
    found |= {f"params.{name}": choice for name, choice in filled.params.items()}
    return found


def _origin(document: Document, path: FieldPath, value: Any, filled: Filled) -> Choice:
    if path == ("run", "date") and path not in document.values:
        return Choice(value, Rank.BUILT_IN, "the date of submission, UTC")
    if not _is_written(document.data, path):
        return Choice(value, Rank.BUILT_IN, Rank.BUILT_IN.words)
    origin = str(document.place_of(path))
    used = [name for at, names in filled.used.items() if at[: len(path)] == path for name in names]
    if used:
        origin += " with " + ", ".join(f"${{{name}}}" for name in dict.fromkeys(used))
    over: tuple[Candidate, ...] = document.over.get(path, ())
    return Choice(value, document.rank_of(path), origin, over)


def _is_written(data: Any, path: FieldPath) -> bool:
    for part in path:
        try:
            data = data[part]
        except (LookupError, TypeError):
            return False
    return data is not None


def _leaves(value: Any, path: FieldPath) -> Iterator[tuple[FieldPath, Any]]:
    """Single values and lists of them, with their paths; what is not set is left out."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, (*path, number))
    elif value is not None and value != []:
        yield path, value
