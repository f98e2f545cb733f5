"""Mistakes in what a person wrote: each with its place, and all of them in one error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.common.secrets import redact
from pipeline.errors import SpecError
from pipeline.spec.precedence import Candidate, Rank

FieldPath = tuple[str | int, ...]
"""Keys and list positions that lead to a value of a spec."""


IN_PYTHON = "the job spec"
"""Name of a document that was no file."""


@dataclass(frozen=True, order=True)
class Place:
    """Where in a file, or on the command line, something stands."""

    line: int = 0
    """From 1; 0 where there are no lines (a flag, a call in Python)."""
    column: int = 0
    """From 1."""
    name: str = ""
    """File, flag or field."""

    def __str__(self) -> str:
        return f"{self.name}:{self.line}:{self.column}" if self.line else self.name


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong, and what to do about it."""

    message: str
    place: Place = Place()
    path: FieldPath = ()
    """The field concerned."""
    found: str = ""
    expected: str = ""
    next_step: str = ""

    def details(self) -> dict[str, Any]:
        """What JSON output shows of it."""
        named = {
            "message": self.message,
            "where": str(self.place),
            "field": dotted(self.path),
            "found": self.found,
            "expected": self.expected,
            "next": self.next_step,
        }
        return {name: value for name, value in named.items() if value}

    def as_error(self) -> SpecError:
        """The same as an error of its own."""
        return SpecError(
            self.message,
            where=str(self.place),
            found=self.found,
            expected=self.expected,
            next_step=self.next_step,
        )


@dataclass
class Document:
    """A file that was read: its data, and where each value and each key stands."""

    name: str
    """The file as messages name it."""
    data: Any = None
    values: dict[FieldPath, Place] = field(default_factory=dict)
    keys: dict[FieldPath, Place] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    """What is wrong with single values; their fields hold the text as it was written."""
    ranks: dict[FieldPath, Rank] = field(default_factory=dict)
    """What gave a value that is not as the file has it."""
    over: dict[FieldPath, tuple[Candidate, ...]] = field(default_factory=dict)
    """What such a value took the place of, the last first."""

    def rank_of(self, path: FieldPath) -> Rank:
        """What gave the value of a field, or what is around it."""
        known = [path[:stop] for stop in range(len(path), -1, -1) if path[:stop] in self.ranks]
        return self.ranks[known[0]] if known else Rank.JOB_FILE

    def place_of(self, path: FieldPath, *, key: bool = False) -> Place:
        """Where the value of a field stands (or its key), or what is around it."""
        for stop in range(len(path), -1, -1):
            places = self.keys if key and path[:stop] in self.keys else self.values
            if path[:stop] in places:
                return places[path[:stop]]
        return Place(name=self.name)


class SpecMistakes(SpecError):
    """Every mistake that was found in one job spec, in the order of its lines."""

    def __init__(self, mistakes: Sequence[Mistake], *, name: str) -> None:
        self.mistakes = tuple(sorted(mistakes, key=lambda mistake: mistake.place))
        if len(self.mistakes) == 1:
            only = self.mistakes[0]
            message, where = only.message, str(only.place)
            super().__init__(message, where=where, found=only.found, expected=only.expected, next_step=only.next_step)
        else:
            super().__init__(f"{name} has {len(self.mistakes)} mistakes", where=name)

    @property
    def kind(self) -> str:
        """The class a handler knows: how many mistakes there are makes no other kind of it."""
        return "SpecError"

    def details(self) -> dict[str, Any]:
        """As for any error, with ``mistakes``."""
        return {**super().details(), "mistakes": [mistake.details() for mistake in self.mistakes]}

    def __str__(self) -> str:
        if len(self.mistakes) == 1:
            return super().__str__()
        return "\n\n".join([self.message, *(str(mistake.as_error()) for mistake in self.mistakes)])


def dotted(path: Iterable[str | int]) -> str:
    """A field as messages and ``--set`` name it: ``steps.1.score.model``."""
    return ".".join(f'"{part}"' if isinstance(part, str) and "." in part else str(part) for part in path)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``did you mean …?`` with the nearest of ``known``, or nothing when none is near."""
    folded = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), folded, n=1)
    return f"did you mean {folded[near[0]]}?" if near else ""


def shown(value: Any) -> str:
    """A value as YAML would show it, on one line of at most 80 characters."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        text = "a mapping with " + ", ".join(str(key) for key in value) if value else "an empty mapping"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(shown(item) for item in value) + "]"
    else:
        text = str(value) or "an empty text"
    text = " ".join(redact(text).split())
    return text if len(text) <= 80 else text[:79] + "…"
