"""Where rows come from: discover Parquet files, and read them batch by batch."""

from __future__ import annotations

from pipeline.sources.filters.parse import Filter, parse_filter
from pipeline.sources.parquet.discover import Discovery, discover, resize, sample_batch
from pipeline.sources.parquet.reader import SourceBatch, read_batches
from pipeline.sources.prefetch import read_ahead

__all__ = [
    "Discovery",
    "Filter",
    "SourceBatch",
    "discover",
    "parse_filter",
    "read_ahead",
    "read_batches",
    "resize",
    "sample_batch",
]
