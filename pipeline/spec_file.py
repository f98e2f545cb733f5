"""`load_spec`: a job spec together with the file it came from, beside which the modules of its steps are looked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.spec import JobSpec


@dataclass(frozen=True)
class LoadedSpec:
    """A job spec and where it was read."""

    spec: JobSpec
    path: str | None
    """Absolute path or URL of its file; None for a text."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Where modules of its steps are looked for: the folder of the file, then the working directory."""
        if self.path is None or "://" in self.path:
            return (os.getcwd(),)
        return tuple(dict.fromkeys((str(Path(self.path).parent), os.getcwd())))


def load_spec(source: str | os.PathLike[str], *, overrides: Sequence[str] = ()) -> LoadedSpec:
    """Read a job spec from a YAML or JSON file (path or URL), or from a text with more than one line.

    :raises SpecError: with every mistake that was found; see `JobSpec.load`.
    """
    spec = JobSpec.load(source, overrides=overrides)
    name = os.fspath(source)
    if isinstance(source, str) and "\n" in source:
        return LoadedSpec(spec, None)
    return LoadedSpec(spec, name if "://" in name else str(Path(name).expanduser().absolute()))
