"""Check the digests that lead from the output of a job of stages back to its input files."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.common.checksum import short
from pipeline.common.digest import digest_bytes
from pipeline.common.units import plural
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.manifest import Manifest
from pipeline.jobs.stages import StageState
from pipeline.plan.stages import SealedInput


class BrokenChain(Exception):
    """The chain has a gap; the text says where."""


def is_removed(job: JobDirectory) -> bool:
    """Return True if the data files of a stage were removed after the job has succeeded."""
    return job.store.exists(layout.REMOVED_FILE)


def check_chain(job: JobDirectory, states: Sequence[StageState]) -> str:
    """Check that each stage read exactly the files of the manifest that its plan names, and the output is the last's.

    :returns: a text for a person.
    :raises BrokenChain: at the first gap.
    """
    manifest = job.manifests.last()
    if manifest is None:
        raise BrokenChain("the job has no manifest: its output was not committed")
    if len(manifest.inputs) != len(states):
        raise BrokenChain(f"manifest {manifest.number} names {len(manifest.inputs)} stages, {len(states)} were planned")
    sealed = [_sealed(job, state, part) for state, part in zip(states, manifest.inputs, strict=True)]
    for number in range(1, len(states)):
        _check_link(states[number], sealed[number], sealed[number - 1], manifest.inputs[number - 1], states[number - 1])
    _check_files(manifest, sealed, states)
    files = sum(len(one.files) for one in sealed)
    inputs = len(states[0].job.ledger().files) if states[0].job else 0
    return (
        f"{plural(len(states), 'stage')} with {plural(files, 'file')}, from {plural(inputs, 'input file')} to manifest "
        f"{manifest.number}: each read exactly what the one before it sealed"
    )


def _sealed(job: JobDirectory, state: StageState, part: SealedInput) -> Manifest:
    """Return the manifest that the job names for a stage."""
    if state.job is not None:
        _check_digest(state.job, part)
    if state.job is None or state.name != part.stage:
        raise BrokenChain(f"the job names the stage {part.stage}, and its steps lead to {state.name or 'none'}")
    manifest = state.job.committed()
    if manifest is None or manifest.number != part.manifest:
        raise BrokenChain(f"{part.stage}: manifest {part.manifest} does not name the rows of all its rounds")
    return manifest


def _check_digest(job: JobDirectory, part: SealedInput) -> None:
    try:
        found = digest_bytes(job.store.read(layout.manifest_path(part.manifest)))
    except FileNotFoundError:
        raise BrokenChain(f"{part.stage}: manifest {part.manifest} is missing") from None
    if found != part.digest:
        raise BrokenChain(
            f"{part.stage}: manifest {part.manifest} has SHA-256 {short(found)}, expected {short(part.digest)}"
        )


def _check_link(state: StageState, own: Manifest, before: Manifest, part: SealedInput, source: StageState) -> None:
    """Check that a stage read the files of the manifest ``part``, each once, and as many rows as they have."""
    assert state.job is not None  # both have manifests
    assert source.job is not None
    if part not in own.inputs:
        raise BrokenChain(f"{state.name}: its manifest does not name manifest {part.manifest} of {part.stage}")
    ledger = state.job.ledger()
    for round_ in ledger.rounds:
        for other in round_.plan.role.inputs if round_.plan.role else ():
            _check_digest(source.job, other)
    expected = {source.job.store.url(file.name): file.rows for file in before.files}
    read = {path: file.rows for path, file in ledger.files.items()}
    for path in sorted(expected.keys() ^ read.keys()):
        raise BrokenChain(
            f"{state.name}: {path} was {'sealed and not read' if path in expected else 'read and not sealed'}"
        )
    for path, rows in expected.items():
        if read[path] != rows:
            raise BrokenChain(f"{state.name}: {read[path]:,} rows of {path} were read, {rows:,} sealed")
    if own.rows.input != before.rows.output:
        raise BrokenChain(f"{own.rows.input:,} rows into {state.name}, {before.rows.output:,} out of {source.name}")


def _check_files(manifest: Manifest, sealed: Sequence[Manifest], states: Sequence[StageState]) -> None:
    """Check that the job's manifest names the files of the last stage, and the rejects of all."""
    folders = [f"{layout.stage_folder(state.name)}/" for state in states]
    expected = {(folders[-1] + file.name, file.rows, file.checksum) for file in sealed[-1].files}
    rejects = {
        (folder + file.name, file.rows, file.checksum)
        for folder, one in zip(folders, sealed, strict=True)
        for file in one.rejects
    }
    for named, listed in ((manifest.files, expected), (manifest.rejects, rejects)):
        found = {(file.name, file.rows, file.checksum) for file in named}
        for name, *_ in sorted(found ^ listed):
            raise BrokenChain(f"manifest {manifest.number} and the stages differ in {name}")
    if manifest.rows.output != sealed[-1].rows.output or manifest.rows.input != sealed[0].rows.input:
        raise BrokenChain(f"manifest {manifest.number} counts other rows than the stages")
