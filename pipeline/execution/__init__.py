"""Partitions on a Dask cluster: provision it, submit tasks, handle failures. Only this package imports Dask."""
