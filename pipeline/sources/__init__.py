"""Input: find the files of a source, and read their rows batch by batch."""

from __future__ import annotations

from pipeline.sources.adapter import SourceAdapter, discover, find_source, read_batches, sample_batch
from pipeline.sources.batch import Problem, SourceBatch
from pipeline.sources.discovery import Discovery, FileSelection, resize, selected_fragments, total_bytes
from pipeline.sources.filters.parse import Filter, parse_filter
from pipeline.sources.prefetch import read_ahead

__all__ = [
    "Discovery",
    "FileSelection",
    "Filter",
    "Problem",
    "SourceAdapter",
    "SourceBatch",
    "discover",
    "find_source",
    "parse_filter",
    "read_ahead",
    "read_batches",
    "resize",
    "sample_batch",
    "selected_fragments",
    "total_bytes",
]
