"""`ManifestLog`: the numbered manifests of a job. Creating the next file is the commit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.common.units import Clock, iso_time, utc_now
from pipeline.errors import OutputConflict, StateCorrupt, StorageError
from pipeline.jobs import layout
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.manifest import Manifest, make_manifest
from pipeline.jobs.record import JobRecord
from pipeline.storage.store import Store


@dataclass(frozen=True)
class Committed:
    """A durable manifest."""

    manifest: Manifest
    landed: bool
    """False if the same manifest was committed before."""


class ManifestLog:
    """The manifests of a job, each created once under its number."""

    def __init__(self, store: Store, record: JobRecord, *, now: Clock = utc_now) -> None:
        self._store = store
        self._record = record
        self._now = now

    def numbers(self) -> list[int]:
        """Return the numbers of the committed manifests, ascending."""
        return layout.numbers_of(self._store.list(layout.MANIFESTS))

    def last(self) -> Manifest | None:
        """Return the manifest with the highest number; None if nothing is committed."""
        numbers = self.numbers()
        return self._read(numbers[-1]) if numbers else None

    def find(self, number: int) -> Manifest | None:
        """Return the manifest with that number; None if there is none."""
        return self._read(number) if number in self.numbers() else None

    def prepare(self, ledger: Ledger) -> Manifest:
        """Return the manifest to commit for ``ledger``: the last manifest if it has the same files and rounds.

        :raises ReconciliationFailed: when the rows do not add up.
        """
        last = self.last()
        manifest = make_manifest(
            ledger,
            number=last.number if last else 1,
            job=self._record.job,
            plan=self._record.plan,
            created=iso_time(self._now()),
        )
        if last is None:
            return manifest
        if manifest.is_same_output(last) and manifest.round == last.round:
            return last
        return replace(manifest, number=last.number + 1)

    def commit(self, manifest: Manifest) -> Committed:
        """Create the manifest if its number is unused. Only `OutputConflict` guarantees that it was not written.

        :raises OutputConflict: when the number has other content, because another driver commits to this job.
        :raises StorageError: when the outcome is unknown. Delete nothing; a resume finds out.
        """
        try:
            if self._store.put_if_absent(layout.manifest_path(manifest.number), manifest.to_json_bytes()):
                return Committed(manifest, landed=True)
        except StorageError:
            # The reply may be lost although the file was created.
            committed = self._read_if_possible(manifest.number)
            if committed is None or not committed.is_same_output(manifest):
                raise
            return Committed(committed, landed=True)
        committed = self._read(manifest.number)
        if not committed.is_same_output(manifest):
            raise OutputConflict(
                "another driver has committed this job",
                where=self._store.url(layout.manifest_path(manifest.number)),
                found=f"{len(committed.files)} files, {committed.rows.output:,} rows, committed {committed.created}",
                expected=f"{len(manifest.files)} files, {manifest.rows.output:,} rows",
                next_step=f"python -m pipeline status {self._record.job}",
            )
        return Committed(committed, landed=False)

    def _read(self, number: int) -> Manifest:
        path = layout.manifest_path(number)
        return Manifest.from_json(self._store.read(path), where=self._store.url(path))

    def _read_if_possible(self, number: int) -> Manifest | None:
        try:
            return self._read(number)
        except (OSError, StorageError, StateCorrupt):
            return None
