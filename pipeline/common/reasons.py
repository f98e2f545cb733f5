"""`Reason`: the cause of a rejected row or a quarantined file, with its stable text, such as ``contract:age:max``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ReasonKind(StrEnum):
    """The first part of a reason."""

    CONTRACT = "contract"
    """The row broke a rule of the contract."""
    FRAME = "frame"
    """The frame of a map step cannot hold a value of the row."""
    STEP = "step"
    """A map step raised."""
    SCORE = "score"
    """The model raised."""
    CRASH = "crash"
    """The process that scored the row died."""
    TIMEOUT = "timeout"
    """The row took too long."""
    MEMORY = "memory"
    """The row took too much memory."""
    NO_MODEL = "no_model"
    """No model is named for the row's key; the reason is this word alone."""
    CELL = "cell"
    """A value of a text file does not convert to the type of its column."""
    LINE = "line"
    """A line of a text file has too few or too many cells, or cannot be read as JSON."""
    FILE = "file"
    """The file is damaged, was changed, or has different columns."""

    @property
    def is_user_code(self) -> bool:
        """True if a step or the model is to blame, not the data."""
        return self not in (ReasonKind.CONTRACT, ReasonKind.FRAME, ReasonKind.NO_MODEL, *UNREADABLE, ReasonKind.FILE)


UNREADABLE = (ReasonKind.CELL, ReasonKind.LINE)
"""Reasons of rows that could not be read."""


@dataclass(frozen=True)
class Reason:
    """The cause of a rejected row or a quarantined file. ``str()`` is short and stable, for counting."""

    kind: ReasonKind
    error: str
    """Name of the broken rule, the error or the signal; empty where the kind says all."""
    source: str = ""
    """Column of the rule or of the frame, or entry point of the step."""

    def __str__(self) -> str:
        return ":".join(filter(None, (self.kind, self.source, self.error)))

    @classmethod
    def parse(cls, text: str) -> Reason:
        """Inverse of ``str()``.

        :raises ValueError: for an unknown kind.
        """
        kind, _, rest = text.partition(":")
        source, _, error = rest.rpartition(":")
        return cls(ReasonKind(kind), error, source)
