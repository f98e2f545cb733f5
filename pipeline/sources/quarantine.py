"""Record quarantined files, and check how many a job allows."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.common.reasons import Reason, ReasonKind
from pipeline.common.rows import QuarantinedFile
from pipeline.errors import InputError, TooManyRejects


def quarantined_file(
    path: str, error: InputError, *, rows: int | None = None, hive_keys: tuple[tuple[str, str], ...] = ()
) -> QuarantinedFile:
    """Record a file as quarantined for ``error``.

    :param rows: number of its rows, if its footer can be read.
    """
    found = f": {error.found}" if error.found else ""
    return QuarantinedFile(path, str(Reason(ReasonKind.FILE, error.kind)), f"{error.message}{found}", rows, hive_keys)


def check_file_count(files: Sequence[QuarantinedFile], *, limit: int | None, job: str = "") -> None:
    """Check that at most ``limit`` files are quarantined. None: no limit.

    :raises TooManyRejects: if there are more files; the error names the first two.
    """
    if limit is None or len(files) <= limit:
        return
    examples = "; ".join(f"{file.path}: {file.message}" for file in files[:2])
    raise TooManyRejects(
        "too many input files were quarantined; nothing was published",
        where=f"job {job}" if job else "source.path",
        found=f"{len(files):,} files: {examples}" + ("; …" if len(files) > 2 else ""),
        expected=f"at most {limit:,} (errors.max_files)",
        next_step="fix the files, or raise errors.max_files",
    )
