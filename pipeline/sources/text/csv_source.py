"""The adapter for CSV files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.sources.text.csv_parser import CsvParser
from pipeline.sources.text.source import TextSource
from pipeline.spec.parts import CsvOptions


class CsvSource(TextSource):
    """A source of CSV files."""

    def __init__(self, types: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(CsvParser(CsvOptions.model_validate(options), types or {}))
