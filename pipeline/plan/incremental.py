"""Select the files, and the parts of files, that an incremental job scores. Pure.

The sink records which input was published, in the same commit as the output. No other record counts: a job that
crashes around its commit has either published or not.

If an input file has changed, the output files with rows of it are replaced. Every input file with rows in a replaced
output file is scored again as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.common.digest import digest_json
from pipeline.errors import InputChanged, OutputConflict
from pipeline.sources.discovery import FileSelection
from pipeline.sources.versions import is_same_version

NEW = "new"
CHANGED = "changed"
APPENDED = "appended"
MODEL_CHANGED = "model changed"
SHARED = "shares an output file with"


@dataclass(frozen=True, slots=True)
class PublishedInput:
    """An input file at the time when its rows were published."""

    path: str
    size: int
    version: str
    groups: int
    """Number of row groups."""
    footer_digest: str
    """See `pipeline.common.rows.InputFile.footer_digest`."""
    outputs: tuple[str, ...]
    """Published files with rows of this file."""


@dataclass(frozen=True)
class PublishedInputs:
    """One publication of an incremental job."""

    job: str
    manifest: int
    work: str
    """Digest of model and steps."""
    inputs: tuple[PublishedInput, ...]


@dataclass(frozen=True, slots=True)
class ListedFile:
    """An input file now."""

    path: str
    size: int
    version: str


@dataclass(frozen=True)
class IncrementalState:
    """The published state that an incremental plan continues from."""

    baseline: str = ""
    """Digest of the publications at planning time. The plan can be published only on the same publications.
    Empty in plans that are not incremental and in those of later rounds of a job."""
    work: str = ""
    """See `PublishedInputs.work`. Empty: the plan is not incremental."""
    replaces: tuple[str, ...] = ()
    """Published files that are removed when the plan is published."""
    unchanged: int = 0
    """Number of files of the source without new rows."""

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> IncrementalState:
        """Inverse of `dataclasses.asdict`, from JSON."""
        return IncrementalState(**{**record, "replaces": tuple(record.get("replaces", ()))})


FULL_INPUT = IncrementalState()
"""The plan is not incremental."""


@dataclass(frozen=True)
class Increment:
    """The files to score, and the published state to continue from."""

    files: Mapping[str, FileSelection]
    progress: IncrementalState


@dataclass
class _Known:
    """An input file and its output files, over all publications."""

    last: PublishedInput
    outputs: set[str] = field(default_factory=set)


def baseline_of(publications: Iterable[PublishedInputs]) -> str:
    """Return the digest of all publications. A retry that repairs one of them changes the digest."""
    return digest_json({"publications": [[publication.job, publication.manifest] for publication in publications]})


def select_files(
    listed: Sequence[ListedFile],
    publications: Sequence[PublishedInputs],
    *,
    kept: Collection[str],
    work: str,
    on_model_change: str,
    marks: Callable[[str], Sequence[str]],
    failed: Mapping[str, str] | None = None,
) -> Increment:
    """Select the files to score among ``listed``, with the reason for each.

    :param kept: published files that still count.
    :param marks: returns a file's digest for each number of row groups; called only for files that changed.
    :param failed: file -> id of the job that was to score it and has not published.
    :raises InputChanged: if a removed file would have to be scored again.
    """
    known = _fold(publications, kept)
    by_path = {file.path: file for file in listed}
    is_other = bool(publications) and publications[-1].work != work and on_model_change == "all"
    files: dict[str, FileSelection] = {}
    for path, file in by_path.items():
        before = known.get(path)
        if before is None:
            files[path] = FileSelection(_new(path, failed or {}))
        elif is_other:
            files[path] = FileSelection(MODEL_CHANGED)
        elif not is_same_version(path, (before.last.size, before.last.version), (file.size, file.version)):
            files[path] = _changed(before.last, marks(path))
    if is_other:
        _refuse_gone(known, by_path, because="the model or a step has changed")
    replaces = _take_back(files, known, by_path)
    progress = IncrementalState(baseline_of(publications), work, tuple(sorted(replaces)), len(by_path) - len(files))
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
    """Return how to score a file that changed: only appended row groups, or all.

    Row groups were appended if there are more than before and the metadata of the first ones is unchanged.
    """
    is_same = 0 < before.groups < len(marks) and marks[before.groups - 1] == before.footer_digest
    return FileSelection(APPENDED, before.groups) if is_same else FileSelection(CHANGED)


def _take_back(
    files: dict[str, FileSelection], known: Mapping[str, _Known], listed: Mapping[str, ListedFile]
) -> set[str]:
    """Return the published files to replace: those with rows of a file that is scored again as a whole.

    Other input files with rows in a replaced file are added to ``files``.
    """
    sharing: dict[str, list[str]] = {}
    for path, published in known.items():
        for name in published.outputs:
            sharing.setdefault(name, []).append(path)
    replaces: set[str] = set()
    waiting = [path for path, how in files.items() if path in known and how.reason != APPENDED]
    while waiting:
        cause = waiting.pop()
        for name in known[cause].outputs - replaces:
            replaces.add(name)
            for path in sharing[name]:
                is_whole = path in files and files[path].reason != APPENDED
                if is_whole:
                    continue
                if path not in listed:
                    _refuse(path, because=f"{cause} has changed, and an output file has rows of both")
                files[path] = FileSelection(f"{SHARED} {cause}")
                waiting.append(path)
    return replaces


def _refuse_gone(known: Mapping[str, _Known], listed: Mapping[str, ListedFile], *, because: str) -> None:
    for path, published in known.items():
        if published.outputs and path not in listed:
            _refuse(path, because=because)


def _refuse(path: str, *, because: str) -> None:
    raise InputChanged(
        "a file that is gone would have to be scored again",
        where=path,
        found=because,
        expected="the file, since what was published of it is to be replaced",
        next_step="put it back; or publish everything anew to another sink.path",
    )


def unknown_publication(path: str) -> OutputConflict:
    """Build the error for a sink whose rows no incremental job published."""
    return OutputConflict(
        "the sink holds rows of unknown input",
        where=f"sink.path: {path}",
        found="files that no incremental job published",
        expected="an empty sink, or one that incremental jobs have published to all along",
        next_step="choose another sink.path, or move what is there away",
    )


def other_baseline(path: str, *, job: str) -> OutputConflict:
    """Build the error for a publication since planning: both jobs may have scored the same rows."""
    return OutputConflict(
        "another job has published to the sink since this one was planned",
        where=f"sink.path: {path}",
        found="what is new now is not what was new then",
        expected="the publications that the plan is based on",
        next_step=f"run the job spec again as a new job; {job} cannot be published any more",
    )
