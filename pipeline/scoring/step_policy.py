"""Act on an error of a map step that its ``on_error`` names: call the step again, blame the rows, or fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from pipeline.common.secrets import redact
from pipeline.errors import PipelineError, StepFailed
from pipeline.plan.recipe import ErrorRule
from pipeline.scoring.bisection import RowsError

Result = TypeVar("Result")
LONGEST_WAIT = 60.0
"""Longest pause between two calls, in seconds."""
_sleep = time.sleep
"""Replaced in tests."""


def call_step(call: Callable[[], Result], rules: Sequence[ErrorRule], *, entrypoint: str) -> Result:
    """Call a step, and apply the first rule for the class of an error that it raises, or for a base class.

    Errors without a rule pass. Errors of memory and of this package have none.

    :param call: calls the step on the same rows each time.
    :raises RowsError: for an error that the rows are to be rejected for.
    :raises StepFailed: for an error that the job is to fail for.
    """
    attempt = 0
    while True:
        try:
            return call()
        except (MemoryError, PipelineError, RowsError, KeyboardInterrupt):
            raise
        except BaseException as error:
            rule = find_rule(rules, error)
            if rule is None:
                raise
            if attempt >= rule.retries:
                if rule.action == "reject":
                    raise RowsError(f"step:{entrypoint}", error) from error
                raise _failed(error, rule, entrypoint=entrypoint) from error
        _sleep(min(rule.wait * 2**attempt, LONGEST_WAIT))
        attempt += 1


def find_rule(rules: Sequence[ErrorRule], error: BaseException) -> ErrorRule | None:
    """Return the rule for the class of ``error``, else for the nearest base class; None if there is none."""
    by_name = {rule.error: rule for rule in rules}
    for kind in type(error).__mro__:
        for name in (f"{kind.__module__}.{kind.__qualname__}", kind.__name__):
            if name in by_name:
                return by_name[name]
    return None


def _failed(error: BaseException, rule: ErrorRule, *, entrypoint: str) -> StepFailed:
    calls = f", on each of {rule.retries + 1} calls" if rule.retries else ""
    return StepFailed(
        "a step raised an error that fails the job",
        where=entrypoint,
        found=redact(f"{type(error).__name__}: {error}")[:300] + calls,
        expected=f"no {rule.error} (on_error)",
        next_step="remove its cause, then resume; completed partitions are kept",
    )
