"""Where rows come from: discover Parquet files, and read them batch by batch."""

from __future__ import annotations

from pipeline.sources.expression import Filter, parse_filter
from pipeline.sources.parquet import Discovery, discover, resize, sample_batch
from pipeline.sources.read_ahead import read_ahead
from pipeline.sources.reader import SourceBatch, read_batches

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
