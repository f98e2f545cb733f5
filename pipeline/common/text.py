"""Format results as lines and tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LABEL = 11
"""Width of the label at the start of a line, in characters."""


def labelled(fields: Mapping[str, str]) -> list[str]:
    """Return one line per field with a text: name, then text."""
    return [label_line(name, text) for name, text in fields.items() if text]


def label_line(name: str, text: str) -> str:
    """Return one indented line: ``name``, padded to `LABEL` characters, then ``text``.

    Further lines of ``text``, as of a traceback, are indented below its first one.
    """
    first, *more = text.splitlines() or [""]
    return "\n".join([f"  {name:<{LABEL}}{first}", *(f"{'':<{LABEL + 2}}{line}" for line in more)])


def next_lines(commands: Sequence[str]) -> list[str]:
    """Return the commands to type next, one per line."""
    return [label_line("" if index else "next", command) for index, command in enumerate(commands)]


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with columns as wide as their longest cell."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)
    )


def listed(names: Sequence[str], *, shown: int = 12) -> str:
    """Return ``a, b and 3 more``."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def shortened(text: str, *, width: int = 160) -> str:
    """Return ``text``, cut to ``width`` characters with an ellipsis."""
    return text if len(text) <= width else text[: width - 1] + "…"
