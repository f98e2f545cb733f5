"""Detect that the alias of a job's model moved to another version, and write the messages about this change.

The policy is the job spec's ``on_alias_change``. `pipeline.driver.alias_change` applies the policy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import ModelChanged, PipelineError
from pipeline.models.model import ModelVersion
from pipeline.models.registry import ModelRegistry, open_registry
from pipeline.models.registry.records import VersionRecord
from pipeline.spec.model_ref import ModelRef

logger = logging.getLogger(__name__)
EVENT = "alias_change"
"""Name of the event in ``events.jsonl``."""
MAX_RESTARTS = 5
"""Maximum of restarts of a job after alias changes; one more alias change fails the job."""
LONGEST_WAIT = 600.0
"""Maximum of seconds between two checks of a registry that does not answer."""


@dataclass(frozen=True)
class AliasChange:
    """Change of an alias to another version than the version that a job has pinned."""

    reference: str
    """Reference with the alias, such as ``models:/churn@champion``."""
    pinned: str
    """Number of the version that the job has."""
    current: str
    """Number of the version that the alias points to now."""

    @property
    def description(self) -> str:
        """Description of the change in one line."""
        return f"{self.reference} moved from version {self.pinned} to version {self.current}"

    def error(self) -> ModelChanged:
        """Make the error of a job with ``on_alias_change: fail``."""
        name, _, alias = self.reference.removeprefix("models:/").partition("@")
        return ModelChanged(
            "the model's alias moved while the job ran; nothing was published",
            where=self.reference,
            found=f"version {self.current}",
            expected=f"version {self.pinned}, as when the job was planned (on_alias_change: fail)",
            next_step=f"point it back (python -m pipeline models alias {name} {alias} {self.pinned}) and resume, "
            "or run the job spec as a new job",
        )


def alias_change_of(pinned: ModelVersion, found: VersionRecord, *, reference: str) -> AliasChange | None:
    """Return the change of the alias; None if the alias did not move, or moved to a version with the same bytes."""
    is_same = str(found.version) == pinned.version or (found.digest != "" and found.digest == pinned.digest)
    return None if is_same else AliasChange(reference, pinned.version, str(found.version))


def unstable_alias_error(change: AliasChange) -> ModelChanged:
    """Make the error of a job that restarted too often."""
    return ModelChanged(
        "the model's alias moved too often while the job ran; nothing was published",
        where=change.reference,
        found=f"{change.description}, after {MAX_RESTARTS} restarts",
        expected="an alias that stays where it is for as long as the job takes",
        next_step="leave the alias alone and resume, or run the job spec with on_alias_change: pin",
    )


def alias_change_warnings(events: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the report's warnings about changes that the job ignored, from its events."""
    changes = (
        AliasChange(str(event.get("reference")), str(event.get("pinned")), str(event.get("current")))
        for event in events
        if event.get("event") == EVENT
    )
    return tuple(
        dict.fromkeys(
            f"{change.description} while the job ran: every row was scored with version {change.pinned} "
            "(on_alias_change: pin)"
            for change in changes
        )
    )


def hard_coded(reference: str, *, has_registry: bool) -> str:
    """Return a warning for a model reference that never changes its version; empty for any other.

    :param has_registry: True if a registry exists that the reference could name instead of a file.
    """
    ref = ModelRef(reference)
    if ref.version is not None:
        return (
            f"score.model names version {ref.version} by its number: the job scores with it whatever becomes better; "
            f"an alias, such as models:/{ref.name}@champion, can be moved"
        )
    if ref.is_file and has_registry:
        return (
            "score.model is a file, though there is a model registry: register it, and name it by an alias such as "
            "models:/churn@champion, so that each job says which version it had"
        )
    return ""


class AliasWatch:
    """Checks a registry at intervals for a change of an alias."""

    def __init__(
        self,
        reference: str,
        *,
        seconds: float,
        cache: str = "",
        clock: Callable[[], float] = time.monotonic,
        open: Callable[..., ModelRegistry] = open_registry,
    ) -> None:
        """:param seconds: seconds between two checks; 0: `poll` never checks."""
        self.reference = reference
        self._ref = ModelRef(reference)
        self._seconds = self._wait = seconds
        self._cache = cache
        self._clock = clock
        self._open = open
        self._registries: dict[str, ModelRegistry] = {}
        self._digests: dict[int, str] = {}
        self._checked_at = clock()

    def check(self, pinned: ModelVersion) -> AliasChange | None:
        """Check the alias. Return its change, or None.

        :raises PipelineError: when the registry does not answer.
        """
        return self.compare(pinned, self.resolve(pinned))

    def resolve(self, pinned: ModelVersion) -> VersionRecord:
        """Return the version that the alias names now, in the registry of ``pinned``.

        :raises PipelineError: when the registry does not answer.
        """
        self._checked_at = self._clock()
        return self._registry(pinned).lookup(self._ref)

    def compare(self, pinned: ModelVersion, current: VersionRecord) -> AliasChange | None:
        """Return the change from ``pinned`` to the resolved version ``current``, or None."""
        if not current.digest and str(current.version) != pinned.version:
            digest = self._digest(self._registry(pinned), current, allow_code=bool(pinned.runs_code))
            current = replace(current, digest=digest)
        return alias_change_of(pinned, current, reference=self.reference)

    def _registry(self, pinned: ModelVersion) -> ModelRegistry:
        registry = self._registries.get(pinned.registry)
        if registry is None:
            registry = self._registries[pinned.registry] = self._open(pinned.registry, cache=self._cache)
        return registry

    def _digest(self, registry: ModelRegistry, found: VersionRecord, *, allow_code: bool) -> str:
        """Return the digest of a version. If the registry has no digest, fetch the file once to compute it."""
        if found.version not in self._digests:
            self._digests[found.version] = registry.resolve(ModelRef(found.uri), allow_code=allow_code).digest
        return self._digests[found.version]

    def poll(self, pinned: ModelVersion) -> AliasChange | None:
        """Call `try_check` if the next check is due; else return None."""
        if self._seconds <= 0 or self._clock() - self._checked_at < self._wait:
            return None
        return self.try_check(pinned)

    def try_check(self, pinned: ModelVersion) -> AliasChange | None:
        """Call `check`; for a registry that does not answer, log a warning and wait longer."""
        try:
            change = self.check(pinned)
        except (PipelineError, OSError) as error:
            self._wait = min(max(self._wait, 1.0) * 2, LONGEST_WAIT)
            message = error.message if isinstance(error, PipelineError) else str(error)
            logger.warning("cannot find out where %s points: %s", self.reference, message)
            self._checked_at = self._clock()
            return None
        self._wait = self._seconds
        return change
