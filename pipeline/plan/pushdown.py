"""Push the first ``filter`` steps of a job into its source, where whole row groups are skipped. Pure."""

from __future__ import annotations

from pipeline.errors import SpecError
from pipeline.sources.filters.parse import Filter, parse_filter
from pipeline.sources.filters.rename import rename_columns
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.parameters import PLACEHOLDER
from pipeline.spec.parts import FilterStep, SelectStep, Source

_SOURCE_FILTER = "source.filter"


def pushed_filters(spec: JobSpec, *, first: int = 0) -> dict[int, str]:
    """Return the conditions of the ``filter`` steps before the first ``map`` and ``score``, by the step's number.

    They name columns as the source does, before any ``select``.

    :param first: number of the step to begin with: the first of a stage.
    :raises SpecError: for unsupported syntax.
    """
    pushed: dict[int, str] = {}
    names: dict[str, str] = {}
    for number, step in enumerate(spec.steps[first:], first):
        if isinstance(step, FilterStep):
            if PLACEHOLDER in step.filter:  # of a fan-out; its children have the value
                break
            condition(step.filter, where=f"steps.{number}.filter")
            pushed[number] = rename_columns(step.filter, names)
        elif isinstance(step, SelectStep):
            names = {new: names.get(old, old) for new, old in step.columns.items()}
        else:
            break
    return pushed


def read_source(spec: JobSpec) -> Source:
    """Return the source with every condition with which its files are read.

    :raises SpecError: for unsupported syntax in a ``filter`` step.
    """
    pushed = list(pushed_filters(spec).values())
    if not pushed:
        return spec.source
    conditions = [*([] if spec.source.filter is None else [spec.source.filter]), *pushed]
    joined = " and ".join(f"({one})" for one in conditions) if len(conditions) > 1 else conditions[0]
    return spec.source.model_copy(update={"filter": joined})


def condition(text: str, *, where: str) -> Filter:
    """Parse a condition of a step.

    :param where: field of the spec, for errors.
    :raises SpecError: for unsupported syntax.
    """
    try:
        return parse_filter(text)
    except SpecError as error:
        raise located(error, where) from None


def located(error: SpecError, where: str) -> SpecError:
    """Return an error about a filter with ``where`` as the field that holds it."""
    error.where = error.where.replace(_SOURCE_FILTER, where)
    error.next_step = error.next_step.replace(_SOURCE_FILTER, where)
    return error
