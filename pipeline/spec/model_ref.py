"""References to models, and the kinds of output and the engines that a job spec can name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import SpecError

OutputKind = Literal["prediction", "label", "probabilities", "margin", "leaf", "contributions"]
Engine = Literal["auto", "library", "xgboost", "trees"]
Device = Literal["auto", "cpu", "cuda"]
IterationRange = Literal["best"] | tuple[int, int]
"""Boosting rounds: ``best``, or (begin, end) with an exclusive end."""

_REGISTRY = re.compile(
    r"models:/(?P<name>[A-Za-z0-9_][A-Za-z0-9._ -]{0,127})"
    r"(?:@(?P<alias>[A-Za-z0-9._-]{1,255})|/(?P<version>[1-9][0-9]{0,8}))"
)
"""MLflow's grammar, restricted to names that are safe in a path. The built-in registry allows lower case only."""


_CODE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


_ENDPOINT = re.compile(r"endpoint:.+@[0-9a-f]{12}")


@dataclass(frozen=True)
class ModelRef:
    """Reference to a model: a file or folder, Python code, or a name in a registry with an alias or a version."""

    text: str

    @property
    def is_file(self) -> bool:
        """True if the reference is the path or URL of a model file or folder."""
        return not self.text.startswith("models:/") and not self.is_code and not self.is_endpoint

    @property
    def is_endpoint(self) -> bool:
        """True for the reference that stands for ``score.endpoint``."""
        return _ENDPOINT.fullmatch(self.text) is not None

    @property
    def is_code(self) -> bool:
        """True for ``module:Class`` or ``module:function``."""
        return _CODE.fullmatch(self.text) is not None

    @property
    def name(self) -> str:
        """Name of the model in its registry; empty for a file."""
        return self._part("name")

    @property
    def alias(self) -> str:
        """Alias of the version; empty for a reference with a number, and for a file."""
        return self._part("alias")

    @property
    def version(self) -> int | None:
        """Number of the version; None for a reference with an alias, and for a file."""
        number = self._part("version")
        return int(number) if number else None

    def _part(self, name: str) -> str:
        match = _REGISTRY.fullmatch(self.text)
        return (match[name] or "") if match else ""

    @staticmethod
    def parse(text: str) -> ModelRef:
        """Check the grammar ``models:/name@alias``, ``models:/name/3``, ``module:Class`` or a path.

        :raises SpecError: for a ``models:`` URI of another form.
        """
        if text.startswith("models:") and not _REGISTRY.fullmatch(text):
            raise SpecError(
                "invalid model reference",
                found=text,
                expected="models:/name@alias, models:/name/3, module:Class, or the path of a model file",
            )
        return ModelRef(text)
