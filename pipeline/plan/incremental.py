"""What an incremental job scores: which files, and how much of them, is new to what was published. Pure.

The sink says what has been published from which input, in the same commit as the output itself; nothing else counts, so
that a job that died before or after its commit has published or has not. A file that has changed takes back what was
published of it: the output files with rows of it are replaced, and every input file with rows in one of these is scored
again, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.common.digest import digest_json
from pipeline.errors import InputChanged, OutputConflict
from pipeline.sources.discovery import FileSelection

NEW = "new"
CHANGED = "changed"
APPENDED = "appended"
MODEL_CHANGED = "model changed"
SHARED = "shares an output file with"


@dataclass(frozen=True, slots=True)
class PublishedInput:
    """An input file as it was when rows of it were published."""

    path: str
    size: int
    version: str
    groups: int
    """Row groups that it had."""
    footer_digest: str
    """As `pipeline.common.rows.InputFile.footer_digest`."""
    outputs: tuple[str, ...]
    """Published files that hold rows of it."""


@dataclass(frozen=True)
class PublishedInputs:
    """One publication of an incremental job."""

    job: str
    manifest: int
    work: str
    """Digest of what was done with the rows: model and steps."""
    inputs: tuple[PublishedInput, ...]


@dataclass(frozen=True, slots=True)
class ListedFile:
    """An input file as it is now."""

    path: str
    size: int
    version: str


@dataclass(frozen=True)
class IncrementalState:
    """What an incremental plan goes on from."""

    baseline: str = ""
    """Digest of the publications it was made on; it may be published on no others. Empty also in plans of later
    rounds of a job."""
    work: str = ""
    """As `PublishedInputs.work`. Empty: the plan is not incremental."""
    replaces: tuple[str, ...] = ()
    """Published files that go when it is published."""
    unchanged: int = 0
    """Files of the source that have nothing new."""

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> IncrementalState:
        """Inverse of `dataclasses.asdict`, from JSON."""
        return IncrementalState(**{**record, "replaces": tuple(record.get("replaces", ()))})


FULL_INPUT = IncrementalState()
"""The plan is not incremental."""


@dataclass(frozen=True)
class Increment:
    """The decision: what to score, and what it goes on from."""

    files: Mapping[str, FileSelection]
    progress: IncrementalState


@dataclass
class _Known:
    """A file, over all publications."""

    last: PublishedInput
    outputs: set[str] = field(default_factory=set)


def baseline_of(publications: Iterable[PublishedInputs]) -> str:
    """Digest of which publications there are; a retry that repairs one changes it too."""
    return digest_json({"publications": [[one.job, one.manifest] for one in publications]})


def select_files(
    found: Sequence[ListedFile],
    publications: Sequence[PublishedInputs],
    *,
    kept: Collection[str],
    work: str,
    on_model_change: str,
    marks: Callable[[str], Sequence[str]],
    failed: Mapping[str, str] | None = None,
) -> Increment:
    """What is to be scored of the files that were found, and why.

    :param kept: published files that still count.
    :param marks: the marks of a file for each number of row groups, asked for where a file is not as it was.
    :param failed: file -> the job that was to score it, and has not published.
    :raises InputChanged: when a file that is gone would have to be scored again.
    """
    known = _fold(publications, kept)
    there = {one.path: one for one in found}
    is_other = bool(publications) and publications[-1].work != work and on_model_change == "all"
    files: dict[str, FileSelection] = {}
    for path, one in there.items():
        before = known.get(path)
        if before is None:
            files[path] = FileSelection(_new(path, failed or {}))
        elif is_other:
            files[path] = FileSelection(MODEL_CHANGED)
        elif (one.size, one.version) != (before.last.size, before.last.version):
            files[path] = _changed(before.last, marks(path))
    if is_other:
        _refuse_gone(known, there, because="the model or a step has changed")
    replaces = _take_back(files, known, there)
    progress = IncrementalState(baseline_of(publications), work, tuple(sorted(replaces)), len(there) - len(files))
    return Increment(files, progress)


def _fold(publications: Iterable[PublishedInputs], kept: Collection[str]) -> dict[str, _Known]:
    known: dict[str, _Known] = {}
    for one in publications:
        for file in one.inputs:
            mine = known.setdefault(file.path, _Known(file))
            mine.last = file
            mine.outputs.update(name for name in file.outputs if name in kept)
    return known


def _new(path: str, failed: Mapping[str, str]) -> str:
    return f"failed before ({failed[path]})" if path in failed else NEW


def _changed(before: PublishedInput, marks: Sequence[str]) -> FileSelection:
    """Row groups were appended where the footer says of the first ones exactly what it said, and there are more."""
    is_same = 0 < before.groups < len(marks) and marks[before.groups - 1] == before.footer_digest
    return FileSelection(APPENDED, before.groups) if is_same else FileSelection(CHANGED)


def _take_back(
    files: dict[str, FileSelection], known: Mapping[str, _Known], there: Mapping[str, ListedFile]
) -> set[str]:
    """The published files that go, since a file with rows in them is scored anew; files that share one with it are
    added to ``files``."""
    sharing: dict[str, list[str]] = {}
    for path, mine in known.items():
        for name in mine.outputs:
            sharing.setdefault(name, []).append(path)
    replaces: set[str] = set()
    waiting = [path for path, how in files.items() if path in known and how.why != APPENDED]
    while waiting:
        cause = waiting.pop()
        for name in known[cause].outputs - replaces:
            replaces.add(name)
            for path in sharing[name]:
                is_whole = path in files and files[path].why != APPENDED
                if is_whole:
                    continue
                if path not in there:
                    _refuse(path, because=f"{cause} has changed, and an output file has rows of both")
                files[path] = FileSelection(f"{SHARED} {cause}")
                waiting.append(path)
    return replaces


def _refuse_gone(known: Mapping[str, _Known], there: Mapping[str, ListedFile], *, because: str) -> None:
    for path, mine in known.items():
        if mine.outputs and path not in there:
            _refuse(path, because=because)


def _refuse(path: str, *, because: str) -> None:
    raise InputChanged(
        "a file that is gone would have to be scored again",
        where=path,
        found=because,
        expected="the file, since what was published of it is to be replaced",
        next_step="put it back; or publish everything anew to another sink.path",
    )


def unknown_publication(place: str) -> OutputConflict:
    """What to raise when nobody wrote down what a sink's rows were made of."""
    return OutputConflict(
        "the sink holds rows of which nobody knows what they were made of",
        where=f"sink.path: {place}",
        found="files that no incremental job published",
        expected="an empty sink, or one that incremental jobs have published to all along",
        next_step="choose another sink.path, or move what is there away",
    )


def other_baseline(place: str, *, job: str) -> OutputConflict:
    """What to raise when another job has published since a plan was made: both may have the same rows."""
    return OutputConflict(
        "another job has published to the sink since this one was planned",
        where=f"sink.path: {place}",
        found="what is new now is not what was new then",
        expected="the publications that the plan goes on from",
        next_step=f"run the job spec again as a new job; {job} cannot be published any more",
    )
