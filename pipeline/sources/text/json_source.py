"""The adapter for JSON Lines files."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.sources.text.json_parser import JsonLinesParser
from pipeline.sources.text.source import TextSource


class JsonLinesSource(TextSource):
    """A source of JSON Lines files."""

    def __init__(self, types: Mapping[str, str] | None = None) -> None:
        super().__init__(JsonLinesParser(types or {}))
