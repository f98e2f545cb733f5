"""Read remote files with few requests: small files whole and several at a time, other files a row group a request.

A request takes as long as scoring tens of thousands of rows. A column chunk a request, one after the other, would make
a file of 500 rows and 28 columns as expensive as one of a million rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pyarrow.parquet as pq

from pipeline.storage.urls import file_system, is_local_path, with_storage_options

SMALL_FILE_BYTES = 1 << 20
"""Remote files up to this size are read whole, with one request."""
FILES_AHEAD = 16
"""Small remote files that a partition holds before their rows are read: up to 16 MiB."""
_THREADS = 8
GROUP_BYTES = 1 << 26
"""Row groups of remote files up to this size, counted in compressed bytes of the columns that are read, are read with
one request for columns that lie together. Larger ones are read with a buffer for each column."""


def fetch(path: str, size: int) -> bytes:
    """Return the first ``size`` bytes of a remote file, with one request: s3fs asks for an unknown size first."""
    system, name = file_system(path)
    return bytes(system.cat_file(name, start=0, end=size))


def is_small(path: str, size: int) -> bool:
    """True if a file of ``size`` bytes is remote, and read whole."""
    return not is_local_path(path) and size <= SMALL_FILE_BYTES


class SmallFiles:
    """The contents of small remote files, fetched by several threads ahead of the reader."""

    def __init__(self, paths: Iterable[str], read: Callable[[str], bytes]) -> None:
        """Start no request yet.

        :param paths: the files, in the order of `take`.
        :param read: called on threads of this object, with the storage options of this thread.
        """
        self._waiting = iter(paths)
        self._read = with_storage_options(read)
        self._threads: ThreadPoolExecutor | None = None
        self._running = deque[tuple[str, Future[bytes]]]()

    def take(self, path: str) -> bytes:
        """Return the content of the next file, ``path``. An error of ``read`` is raised here."""
        self._fill()
        expected, future = self._running.popleft()
        if expected != path:
            raise ValueError(f"the next file is {expected}, not {path}")
        return future.result()

    def close(self) -> None:
        """Drop what was not taken; waits for requests that have begun."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _fill(self) -> None:
        self._threads = self._threads or ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch")
        while len(self._running) < FILES_AHEAD:
            path = next(self._waiting, None)
            if path is None:
                return
            self._running.append((path, self._threads.submit(self._read, path)))


@contextmanager
def small_files(paths: Iterable[str], read: Callable[[str], bytes]) -> Iterator[SmallFiles]:
    """Provide the contents of small remote files; see `SmallFiles`."""
    files = SmallFiles(paths, read)
    try:
        yield files
    finally:
        files.close()


def fits(metadata: pq.FileMetaData, groups: range, columns: Collection[str]) -> bool:
    """True if the chunks of ``columns`` have at most `GROUP_BYTES` in each of ``groups``.

    A column with a dot in its name counts with all that have the same name before the dot.
    """
    chosen = {name.partition(".")[0] for name in columns}
    leaves = [
        leaf for leaf in range(len(metadata.schema)) if metadata.schema.column(leaf).path.partition(".")[0] in chosen
    ]
    return all(
        sum(metadata.row_group(group).column(leaf).total_compressed_size for leaf in leaves) <= GROUP_BYTES
        for group in groups
    )
