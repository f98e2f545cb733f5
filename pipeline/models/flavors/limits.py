"""Limits of memory and time for a child process that loads a model file nobody has checked yet."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass

_MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Resources that a child process may use beyond what it has at its start."""

    memory: int
    """Bytes of address space."""
    cpu_seconds: int
    """Seconds of processor time: a busy machine does not shorten them."""

    @property
    def seconds(self) -> int:
        """Seconds to wait for an answer. Only a process that sleeps, or a very busy machine, needs all of them."""
        return 45 + 4 * self.cpu_seconds

    @staticmethod
    def for_file(nbytes: int) -> Limits:
        """Return the limits for a model file of ``nbytes`` bytes.

        xgboost 3.2 takes up to 9 bytes of memory per byte of a JSON file, and a second for 20 MiB (measured).
        """
        return Limits(memory=512 * _MIB + 24 * nbytes, cpu_seconds=15 + nbytes // (2 * _MIB))

    def apply(self) -> None:
        """Limit this process. Systems without such limits are left unlimited."""
        with suppress(ImportError, ValueError, OSError):
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            _lower(resource.RLIMIT_CPU, self.cpu_seconds)
            if sys.platform.startswith("linux"):
                _lower(resource.RLIMIT_AS, _address_space() + self.memory)


def _lower(limit: int, value: int) -> None:
    import resource

    soft, hard = resource.getrlimit(limit)
    bounds = [bound for bound in (soft, hard, value) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(limit, (min(bounds), hard))


def _address_space() -> int:
    import resource

    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
