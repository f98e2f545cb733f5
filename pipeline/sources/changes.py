"""Errors about input that has changed since planning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import InputChanged, SchemaDrift


def input_changed(path: str, *, found: str, expected: str = "the planned file") -> InputChanged:
    """Build the error for an input file that was changed or removed since planning."""
    return InputChanged(
        "an input file changed since the job was planned",
        where=path,
        found=found,
        expected=expected,
        next_step="put the planned file back and resume, or start a new job for the new data",
    )


def schema_changed(path: str, *, found: str, expected: str) -> SchemaDrift:
    """Build the error for an input file whose columns are not the planned ones."""
    return SchemaDrift(
        "an input file has another schema than was planned",
        where=path,
        found=found,
        expected=expected,
        next_step="rewrite the file with the planned schema, or start a new job",
    )


def version_text(size: int, version: str) -> str:
    """Describe a version of a file for an error."""
    return f"{size:,} bytes, {version}"


@contextmanager
def missing_is_changed(path: str) -> Iterator[None]:
    """Raise `InputChanged` in place of `FileNotFoundError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise input_changed(path, found="file not found") from error


@contextmanager
def missing_is_removed(path: str) -> Iterator[None]:
    """Raise `InputChanged` in place of `FileNotFoundError` while a job is planned."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputChanged(
            "an input file was removed while the job was planned",
            where=path,
            found="file not found",
            expected="the file that was listed a moment before",
            next_step="run again, or skip such files with errors.files: quarantine",
        ) from error
