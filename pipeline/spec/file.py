"""Read the text of a job spec once: a file, a pipe or a URL, at most 1 MiB, and nothing that has no end."""

from __future__ import annotations

import os
import select
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pipeline.errors import SpecError
from pipeline.storage.urls import expand_user, file_system, storage_errors

MAX_BYTES = 1 << 20
"""Largest job spec, in bytes."""
PIPE_SECONDS = 60.0
"""Seconds within which a pipe must deliver its text to the end."""


def read_text(name: str, *, pipe_seconds: float = PIPE_SECONDS) -> str:
    """Read the text of a job spec: a local path (also of a pipe, such as ``/dev/stdin``) or any fsspec URL.

    A pipe can be read once only: keep the text.

    :raises SpecError: when ``path`` does not exist, is neither file nor pipe, does not end in time, is over 1 MiB, or
        is not UTF-8.
    """
    try:
        if "://" in name:
            system, path = file_system(name)
            with storage_errors(name), system.open(path, "rb") as file:
                data: bytes = file.read(MAX_BYTES + 1)
        else:
            data = _read_local(expand_user(name), name, pipe_seconds=pipe_seconds)
    except (OSError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        _cannot_open(name, error)
    return _decode(data, name)


def _read_local(path: Path, name: str, *, pipe_seconds: float) -> bytes:
    # A pipe without a writer must not hang here.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0):
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(mode):
            return _read_pipe(descriptor, name, seconds=pipe_seconds)
        if not (stat.S_ISREG(mode) or os.isatty(descriptor)):
            raise SpecError(
                "the job spec cannot be read",
                where=name,
                found="a folder" if stat.S_ISDIR(mode) else "a device or socket",
                expected="a file or a pipe",
                next_step="give the path of a job spec",
            )
        os.set_blocking(descriptor, True)
        return _read_up_to_limit(lambda count: os.read(descriptor, count))


def _read_pipe(descriptor: int, name: str, *, seconds: float) -> bytes:
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)

    def read(count: int) -> bytes:
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not poll.poll(remaining * 1000):
                raise SpecError(
                    "the job spec does not end",
                    where=name,
                    found=f"a pipe without an end after {seconds:.0f} s",
                    next_step="check the program that writes it, or give the path of a file",
                )
            try:
                return os.read(descriptor, count)
            except BlockingIOError:
                continue

    return _read_up_to_limit(read)


def _read_up_to_limit(read: Callable[[int], bytes]) -> bytes:
    data = b""
    while len(data) <= MAX_BYTES:
        chunk = read(MAX_BYTES + 1 - len(data))
        if not chunk:
            break
        data += chunk
    return data


def _cannot_open(name: str, error: OSError | ValueError) -> NoReturn:
    if isinstance(error, FileNotFoundError):
        raise SpecError(
            "no job spec at that path",
            where=name,
            next_step="fix the path, or write a new spec with: python -m pipeline init",
        ) from error
    raise SpecError(
        "the job spec cannot be read", where=name, found=getattr(error, "strerror", "") or str(error)
    ) from error


def _decode(data: bytes, name: str) -> str:
    if len(data) > MAX_BYTES:
        raise SpecError(
            "the job spec is too large",
            where=name,
            found=f"over {MAX_BYTES:,} bytes",
            expected="at most 1 MiB",
            next_step="give the path of a job spec, not of data",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError(
            "the job spec is not UTF-8 text",
            where=f"{name}:{line}",
            found=f"the byte 0x{data[error.start]:02x}",
            next_step="save it as UTF-8",
        ) from error
