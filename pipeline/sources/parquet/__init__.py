"""Parquet sources: discover files by their footers, and read partitions batch by batch."""
