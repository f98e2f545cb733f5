"""Numbers of examples of property tests and sweeps: a sample, or all of them with ``HYPOTHESIS_PROFILE=long``."""

from __future__ import annotations

import os

IS_LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
"""True if property tests and sweeps are to run whole."""


def choose(sample: int, *, of: int) -> int:
    """Return the number of examples of a test: ``sample``, or ``of`` in the long profile.

    ::

        @settings(max_examples=choose(20, of=2000))
    """
    return of if IS_LONG else sample
