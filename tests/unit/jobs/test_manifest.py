"""Manifests: made from the ledger, committed once, numbered."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.errors import OutputConflict, StorageError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.manifest_log import ManifestLog
from pipeline.testing.jobs import SmallJob, write_receipts
from pipeline.testing.stores import Faults, FaultyStore


def test_manifest_is_committed_once(directory: JobDirectory, job: SmallJob) -> None:
    """A second commit of the same output does not land, and keeps the number."""
    manifest = directory.manifests.prepare(directory.ledger(write_receipts(directory, job)))
    assert directory.manifests.last() is None
    assert directory.manifests.commit(manifest).landed
    again = directory.manifests.prepare(directory.ledger())
    assert again.number == 1
    assert not directory.manifests.commit(again).landed
    assert directory.manifests.last() == manifest
    assert directory.manifests.numbers() == [1]


def test_later_commit_of_the_same_output_changes_nothing(directory: JobDirectory, job: SmallJob) -> None:
    """The time of creation is no part of a commit: the first manifest stays."""
    manifest = directory.manifests.prepare(directory.ledger(write_receipts(directory, job)))
    directory.manifests.commit(manifest)
    later = replace(manifest, created="2030-01-01T00:00:00.000Z")
    assert directory.manifests.commit(later).manifest.created == manifest.created


def test_files_are_in_source_order(directory: JobDirectory, job: SmallJob) -> None:
    """The manifest lists files in source order, whatever the order of the receipts."""
    receipts = write_receipts(directory, job)
    manifest = directory.manifests.commit(directory.manifests.prepare(directory.ledger(reversed(receipts)))).manifest
    assert [file.partition for file in manifest.files] == [partition.id for partition in job.plan.partitions]
    assert directory.manifests.prepare(directory.ledger(receipts)) == manifest


def test_other_output_under_a_used_number_conflicts(directory: JobDirectory, job: SmallJob) -> None:
    """A commit of other files under a used number raises `OutputConflict`."""
    manifest = directory.manifests.prepare(directory.ledger(write_receipts(directory, job)))
    directory.manifests.commit(manifest)
    with pytest.raises(OutputConflict, match="another driver"):
        directory.manifests.commit(replace(manifest, files=manifest.files[1:]))


def test_retry_gets_the_next_number(directory: JobDirectory, job: SmallJob) -> None:
    receipts = write_receipts(directory, job)
    directory.manifests.commit(directory.manifests.prepare(directory.ledger(receipts)))
    directory.store.remove("rounds/0/receipts/00001.json")
    repaired = directory.manifests.prepare(directory.ledger(write_receipts(directory, job, attempt="b")))
    assert repaired.number == 2
    directory.manifests.commit(repaired)
    assert directory.manifests.numbers() == [1, 2]


@pytest.mark.fault(33)
def test_commit_whose_reply_is_lost_has_landed(directory: JobDirectory, job: SmallJob) -> None:
    """A commit whose reply is lost is read back and counts as landed."""
    manifest = directory.manifests.prepare(directory.ledger(write_receipts(directory, job)))

    def lost() -> BaseException:
        return StorageError("time-out")

    store = FaultyStore(directory.store, Faults(0, fault=lost), is_reply_lost=True)
    assert ManifestLog(store, directory.record).commit(manifest).landed  # type: ignore[arg-type]


def test_commit_of_unknown_outcome_raises(directory: JobDirectory, job: SmallJob) -> None:
    """If the manifest cannot be read back, the storage error is raised."""
    manifest = directory.manifests.prepare(directory.ledger(write_receipts(directory, job)))

    def lost() -> BaseException:
        return StorageError("time-out")

    store = FaultyStore(directory.store, Faults(0, fault=lost, is_permanent=True))
    with pytest.raises(StorageError, match="time-out"):
        ManifestLog(store, directory.record).commit(manifest)  # type: ignore[arg-type]
