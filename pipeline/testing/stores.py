"""Storage that fails on purpose: at the k-th operation, once or from then on, by an error or by a crash.

`FaultyStore` wraps a store on any backend and counts its verbs. `faulty_os` counts the system calls that change a
local file system, so that a sweep over k also crashes between the steps inside a verb. After a `Crash` nothing
changes any more, as after ``kill -9``: clean-up code may run, but it cannot write.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from pipeline.storage.store import Store

MakeError = Callable[[], BaseException]
"""Makes a new error for an operation that fails."""


class Crash(BaseException):
    """The death of the process. Only the test catches it."""


def io_error() -> OSError:
    """Return EIO, as from a broken disk."""
    return OSError(errno.EIO, os.strerror(errno.EIO))


def disk_full() -> OSError:
    """Return ENOSPC."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Faults:
    """A counter of operations that fails at the k-th."""

    def __init__(self, fail_at: int | None = None, *, fault: MakeError = Crash, is_permanent: bool = False) -> None:
        self.fail_at = fail_at
        """Number of the operation that fails, from 0. None: count only."""
        self.fault = fault
        self.is_permanent = is_permanent
        """True if all later operations fail too. After a `Crash` they always do."""
        self.count = 0
        self.calls: list[str] = []
        self.has_failed = False

    def step(self, what: str) -> None:
        """Count one operation; raise if it is to fail."""
        number, self.count = self.count, self.count + 1
        self.calls.append(what)
        is_due = self.fail_at is not None and number == self.fail_at
        if is_due or (self.has_failed and (self.is_permanent or self.fault is Crash)):
            self.has_failed = True
            raise self.fault()


class FaultyStore:
    """A store whose k-th verb fails."""

    def __init__(self, store: Store, faults: Faults, *, is_reply_lost: bool = False) -> None:
        self.store = store
        self.faults = faults
        self.is_reply_lost = is_reply_lost
        """True if the verb that fails takes effect before its error."""
        self.root = store.root
        self.is_local = store.is_local

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self.store, name)
        if not callable(verb) or name in ("url", "path"):
            return verb

        def counted(*args: Any, **named: Any) -> Any:
            if not self.is_reply_lost:
                self.faults.step(name)
                return verb(*args, **named)
            if name == "open_output":
                return self._written_unheard(verb(*args, **named))
            done = verb(*args, **named)
            try:
                self.faults.step(name)
            except BaseException:
                if hasattr(done, "close"):
                    done.close()
                raise
            return done

        return counted

    @contextmanager
    def _written_unheard(self, output: AbstractContextManager[Any]) -> Iterator[Any]:
        """Yield the open file; fail the operation after the file was written."""
        with output as file:
            yield file
        self.faults.step("open_output")


_CHANGING = ("link", "rename", "replace", "unlink", "remove", "rmdir", "mkdir", "write", "fsync", "chmod", "chown")
_OPENED_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@contextmanager
def faulty_os(faults: Faults) -> Iterator[Faults]:
    """Count, and fail, the calls of this process that change a local file system."""

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            faults.step(name)
            return call(*args, **named)

        return counted

    original_open = os.open

    def counted_open(path: Any, flags: int, *args: Any, **named: Any) -> int:
        if flags & _OPENED_TO_WRITE:
            faults.step("open")
        return original_open(path, flags, *args, **named)

    from pipeline.sinks.parquet import swap

    def exchange(one: bytes, other: bytes) -> int:
        try:
            faults.step("exchange")
        except OSError as error:
            return error.errno or errno.EIO
        return original_exchange(one, other)

    original_exchange = swap.rename_exchange
    with ExitStack() as stack:
        for name in _CHANGING:
            stack.enter_context(patch.object(os, name, wrapped(name, getattr(os, name))))
        stack.enter_context(patch.object(os, "open", counted_open))
        stack.enter_context(patch.object(swap, "rename_exchange", exchange))
        yield faults
