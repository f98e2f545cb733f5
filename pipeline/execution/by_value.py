"""Send the code of a job's steps with the tasks that use it, as it was planned.

A Dask graph holds functions by their names. Workers would import them, from whatever file has the name there. Inside
`pickled_by_value` functions of the job's own modules are sent with their code, and workers import nothing of the job.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import cloudpickle


@contextmanager
def pickled_by_value(modules: Iterable[str]) -> Iterator[None]:
    """Send functions and classes of modules by value in the block.

    :param modules: names of modules; those that are not imported are left out.
    """
    known = set(cloudpickle.list_registry_pickle_by_value())
    added = [sys.modules[name] for name in modules if name in sys.modules and name not in known]
    for module in added:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in added:
            cloudpickle.unregister_pickle_by_value(module)
