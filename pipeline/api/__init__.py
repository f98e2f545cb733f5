"""The Python API: `Job`, `score`, and functions for jobs that exist already. All of it is in `pipeline`, too."""
