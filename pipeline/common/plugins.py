"""Find adapters (flavors, sources, sinks, clusters) by a short name or by ``module:attribute``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from pipeline.common.imports import require_whole_imports
from pipeline.errors import SpecError


def find_adapter(name: str, *, kind: str, built_in: Mapping[str, str]) -> Any:
    """Return the adapter called ``name``.

    :param kind: kind of adapter, such as ``sink``. Other distributions offer adapters in the entry-point group
        ``pipeline.<kind>s``.
    :param built_in: ``module:attribute`` per short name.
    :raises SpecError: if the name is unknown, or the adapter cannot be imported.
    """
    target = built_in.get(name) or (name if ":" in name else _offered(kind).get(name))
    if target is None:
        names = sorted({*built_in, *_offered(kind)})
        near = difflib.get_close_matches(name, names, n=1)
        raise SpecError(
            f"no {kind} named {name!r}",
            found=name,
            expected=", ".join(names) + ", or module:attribute",
            next_step=f"did you mean {near[0]}?" if near else "",
        )
    if name not in built_in:
        require_whole_imports()
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also sys.exit in a module
        raise SpecError(
            f"the {kind} {name!r} cannot be imported",
            where=target,
            found=f"{type(error).__name__}: {error}",
            next_step="install what it needs, or fix the name",
        ) from error


def _offered(kind: str) -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=f"pipeline.{kind}s")}
