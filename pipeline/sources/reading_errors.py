"""Errors of storage while an input file is read, the same for all formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.errors import PipelineError, StorageError
from pipeline.storage.urls import is_bare, is_storage_error


@contextmanager
def reading_errors(path: str, damage: Callable[[Exception], PipelineError | None]) -> Iterator[None]:
    """Turn errors of storage inside the block into `StorageError`, and others into what ``damage`` makes of them.

    :param damage: returns the error of the format; None: the error stays as it is.
    """
    try:
        yield
    except (PipelineError, FileNotFoundError):
        raise
    except Exception as error:
        if is_storage_error(error) and not is_bare(error):
            raise StorageError(
                "an input file cannot be read",
                where=path,
                found=f"{type(error).__name__}: {error}",
                next_step="check permissions and the storage, then run or resume",
            ) from error
        found = damage(error)
        if found is None:
            raise
        raise found from error
