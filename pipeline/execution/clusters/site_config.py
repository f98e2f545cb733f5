"""Options of a batch system that a site keeps in Dask's configuration, usually in a file ``jobqueue.yaml``."""

from __future__ import annotations

from typing import Any

import dask.config

SHIPPED_WALLTIMES = frozenset(("00:30:00", "00:30"))
"""Walltimes in the defaults that dask-jobqueue adds when it is imported: nobody has chosen them."""


def site_option(system: str, option: str) -> Any:
    """Return the value that the site has set for an option of a batch system; None without one.

    :param system: section of the batch system, such as ``slurm``.
    :param option: such as ``walltime`` or ``job-script-prologue``.
    """
    key = f"jobqueue.{system}.{option}"
    value = dask.config.get(key, None)
    if option == "walltime" and value in SHIPPED_WALLTIMES:
        # Files and variables only: the site may have chosen it all the same.
        value = dask.config.get(key, None, config=dask.config.collect())
    return value if value not in ("", [], {}) else None


def site_lines(system: str, option: str) -> list[str]:
    """Return the site's value of an option that is a list; empty without one."""
    value = site_option(system, option)
    if value is None:
        return []
    return [str(line) for line in value] if isinstance(value, (list, tuple)) else [str(value)]
