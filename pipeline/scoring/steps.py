"""Load the user's map steps by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.common.code_search import find_code
from pipeline.common.step_code import StepCode
from pipeline.common.step_modules import Function, ReadArchived, StepModules, modules_of
from pipeline.common.travel import Reader, shown_name
from pipeline.errors import StepFailed
from pipeline.plan.recipe import ErrorRule, MapRecipe
from pipeline.scoring.async_steps import AsyncFunction, is_async
from pipeline.scoring.table_steps import FrameKind, frame_kind


@dataclass(frozen=True)
class Step:
    """A map step with its function."""

    entrypoint: str
    """Name for messages."""
    function: Function
    dtype_backend: str = "numpy"
    row_wise: str = "checked"
    on_error: tuple[ErrorRule, ...] = ()
    kind: FrameKind = "pandas"
    """Frames that the function takes and returns."""


def load_steps(
    maps: Sequence[MapRecipe],
    *,
    code: Sequence[StepCode] = (),
    import_paths: Sequence[str] = (),
    scope: str = "",
    archived: ReadArchived | None = None,
    stored: Reader | None = None,
) -> tuple[Step, ...]:
    """Import the steps of a recipe, with exactly the planned code. Their modules stay active in this process.

    :param code: planned code. Default: the code on this machine now.
    :param scope: see `modules_of`.
    :param archived: returns sources that the job keeps, if the job may go on with them.
    :param stored: returns the bytes of functions that travel by value, as the job keeps them.
    :raises StepFailed: for a step that cannot be imported.
    :raises StepChanged: for code that is not the planned one.
    """
    if not maps:
        return ()
    code = code or find_code([step.entrypoint for step in maps], import_paths=import_paths).steps
    modules = modules_of(code, import_paths=import_paths, scope=scope, archived=archived, stored=stored)
    steps = import_steps(maps, modules)
    modules.activate()
    return steps


def import_steps(maps: Sequence[MapRecipe], modules: StepModules) -> tuple[Step, ...]:
    """Return the steps of a recipe from ``modules``."""
    return tuple(_import_step(step, modules) for step in maps)


def _import_step(step: MapRecipe, modules: StepModules) -> Step:
    function: Any = modules.function(step.entrypoint)
    kind = frame_kind(function)
    if is_async(function):
        function = AsyncFunction(function, concurrency=step.concurrency, rows_per_call=step.rows_per_call)
    elif step.concurrency or step.rows_per_call:
        raise StepFailed(
            "concurrency and rows_per_call are for async def functions only",
            where=shown_name(step.entrypoint),
            found="a function that is not async",
            next_step="write async def, or leave both out",
        )
    return Step(shown_name(step.entrypoint), function, step.dtype_backend, step.row_wise, step.on_error, kind)


def check_step(entrypoint: str, *, import_paths: Sequence[str] = ()) -> None:
    """Import a step and forget it.

    :raises StepFailed: if the module or the function does not exist, or the module raises when it is imported.
    """
    code = find_code([entrypoint], import_paths=import_paths)
    StepModules(code.steps, import_paths=import_paths, sources=code.sources).function(entrypoint)


@contextmanager
def prepended_sys_path(folders: Sequence[str]) -> Iterator[None]:
    """Put ``folders`` first on ``sys.path`` inside the block."""
    before = list(sys.path)
    sys.path[:0] = [folder for folder in folders if folder not in before]
    try:
        yield
    finally:
        sys.path[:] = before
