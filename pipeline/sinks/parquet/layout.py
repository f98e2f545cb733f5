"""Layout of a published folder. This module writes no Parquet.

part-<partition>-<tag>.parquet   the rows; the tag names the job and its manifest number
_manifest.json                   the valid files: `SinkState`; readers of this file see one consistent state
_SUCCESS                         the digest of _manifest.json; absent while files are changed in place
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.common.checksum import from_stored, to_older
from pipeline.common.digest import digest_bytes
from pipeline.errors import OutputConflict, RefusedForSafety, StateCorrupt
from pipeline.jobs.manifest import Manifest
from pipeline.plan.incremental import PublishedInput, PublishedInputs
from pipeline.sinks import PublishedFile
from pipeline.storage.store import Store

MANIFEST = "_manifest.json"
SUCCESS = "_SUCCESS"
SCHEMA_VERSION = 2
"""In states of version 1, every file has ``sha256``; they are read, and stay as they are until a job publishes."""
OWN = frozenset({MANIFEST, SUCCESS})
SUFFIX = ".parquet"
_OF_PARQUET = ("_metadata", "_common_metadata")
_REPLACED_KEPT = 1000
_PART = re.compile(r"part-[0-9r.]+-([0-9a-f]{8})-([0-9]+)(?:-[0-9a-f]{8})?\.parquet")


@dataclass(frozen=True)
class Publication:
    """The files that one job published to the sink."""

    job: str
    """Id of the job; empty for files that existed before the first job published."""
    manifest: int
    """Number of the job's manifest."""
    mode: str
    files: tuple[PublishedFile, ...]
    """Files that no later publication has replaced."""
    name: str = ""
    """Name of an incremental job. Empty for other jobs, as are ``work``, ``inputs`` and ``replaces``."""
    work: str = ""
    """Digest of the model and the steps."""
    inputs: tuple[PublishedInput, ...] = ()
    """Input files of the publication."""
    replaces: tuple[str, ...] = ()
    """Files of earlier publications that this publication removed."""
    files_replaced: int = 0
    """Number of files of this publication that later publications have replaced."""
    plan: str = ""
    """Digest of the job's plan. It distinguishes jobs of the same id; empty in manifests of older versions."""

    def to_record(self) -> dict[str, Any]:
        """Return the record for JSON."""
        record = asdict(self)
        if not self.name:
            for name in ("name", "work", "inputs", "replaces"):
                del record[name]
        if not self.files_replaced:
            del record["files_replaced"]
        if not self.plan:
            del record["plan"]
        record["files"] = [to_older(file) for file in record["files"]]
        return {**record, "rows": sum(file.rows for file in self.files)}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Publication:
        """Inverse of `to_record`."""
        return Publication(
            record["job"],
            record["manifest"],
            record["mode"],
            tuple(PublishedFile(**from_stored(file)) for file in record["files"]),
            name=record.get("name", ""),
            work=record.get("work", ""),
            inputs=tuple(
                PublishedInput(**{**input_file, "outputs": tuple(input_file["outputs"])})
                for input_file in record.get("inputs", ())
            ),
            replaces=tuple(record.get("replaces", ())),
            files_replaced=record.get("files_replaced", 0),
            plan=record.get("plan", ""),
        )

    def without(self, names: Collection[str]) -> Publication:
        """Return the publication without the files named in ``names``, counted as replaced."""
        remaining = tuple(file for file in self.files if file.name not in names)
        return replace(self, files=remaining, files_replaced=self.files_replaced + len(self.files) - len(remaining))


@dataclass(frozen=True)
class SinkState:
    """The content of ``_manifest.json``."""

    publications: tuple[Publication, ...]
    schema: str = ""
    """Arrow schema (IPC), in hexadecimal digits."""
    replaced: tuple[tuple[str, int], ...] = ()
    """Job and manifest number of overwritten publications: resuming such a job must not publish again. At most 1000."""

    @property
    def files(self) -> tuple[PublishedFile, ...]:
        """Files of all publications."""
        return tuple(file for publication in self.publications for file in publication.files)

    def find(self, job: str, number: int) -> Publication | None:
        """Return the publication of a job's manifest; None if there is none."""
        return next(
            (
                publication
                for publication in self.publications
                if (publication.job, publication.manifest) == (job, number)
            ),
            None,
        )

    def of_job(self, job: str) -> Publication | None:
        """Return the publication of a job, from any of its manifests; None if there is none."""
        return next((publication for publication in self.publications if publication.job == job), None)

    def is_gone(self, job: str) -> bool:
        """True if another job has overwritten the publication of ``job``."""
        return self.of_job(job) is None and any(replaced_job == job for replaced_job, _ in self.replaced)

    @property
    def _schema_version(self) -> int:
        """1 while every file is of an older job: ``_SUCCESS`` has the digest of such a state."""
        return SCHEMA_VERSION if any("checksum" in to_older(asdict(file)) for file in self.files) else 1

    def to_json_bytes(self) -> bytes:
        """Return the content of ``_manifest.json``."""
        publications = [publication.to_record() for publication in self.publications]
        record: dict[str, Any] = {
            "schema_version": self._schema_version,
            "rows": sum(file.rows for file in self.files),
            "schema": self.schema,
            "publications": publications,
            "replaced": self.replaced,
        }
        return json.dumps(record, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes, *, where: str) -> SinkState:
        """Inverse of `to_json_bytes`.

        :raises StateCorrupt: for any other content.
        """
        try:
            record = json.loads(data)
            if record["schema_version"] not in (1, SCHEMA_VERSION):
                raise ValueError("unknown schema_version")
            publications = tuple(Publication.from_record(publication) for publication in record["publications"])
            return SinkState(publications, record["schema"], tuple((job, n) for job, n in record["replaced"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StateCorrupt(
                "the output's manifest is damaged",
                where=where,
                found=f"{type(error).__name__}: {error}",
                expected="the JSON that a job published",
                next_step="restore it, or publish to another sink.path",
            ) from error


def read_state(store: Store) -> SinkState | None:
    """Read ``_manifest.json``; return None if no job has published to the sink."""
    try:
        return SinkState.from_json(store.read(MANIFEST), where=store.url(MANIFEST))
    except FileNotFoundError:
        return None


def next_state(before: SinkState | None, publication: Publication, *, schema: str, overwrite: bool) -> SinkState:
    """Return the state after ``publication``, which replaces an earlier publication of the same job."""
    if before is None:
        return SinkState((publication,), schema)
    if before.of_job(publication.job) is not None:
        repaired = tuple(publication if earlier.job == publication.job else earlier for earlier in before.publications)
        return SinkState(repaired, schema, before.replaced)
    if not overwrite:
        remaining = before.publications
        if publication.replaces:
            replaced_names = set(publication.replaces)
            remaining = tuple(earlier.without(replaced_names) for earlier in remaining)
        return SinkState((*remaining, publication), schema, before.replaced)
    overwritten = tuple((earlier.job, earlier.manifest) for earlier in before.publications if earlier.job)
    return SinkState((publication,), schema, (*before.replaced, *overwritten)[-_REPLACED_KEPT:])


def read_published_inputs(state: SinkState | None, name: str) -> tuple[PublishedInputs, ...]:
    """Return the publications of incremental jobs named ``name``, oldest first."""
    return tuple(
        PublishedInputs(publication.job, publication.manifest, publication.work, publication.inputs)
        for publication in (state.publications if state else ())
        if publication.name == name
    )


def success_text(state: SinkState) -> bytes:
    """Return the content of ``_SUCCESS``, which is valid for this state only."""
    last = state.publications[-1]
    text = {"manifest_sha256": digest_bytes(state.to_json_bytes()), "job": last.job, "manifest": last.manifest}
    return json.dumps(text).encode() + b"\n"


def job_tag(job: str) -> str:
    """Return the part of a file name that all files of a job share."""
    return digest_bytes(job.encode())[:8]


def file_name(partition: str, manifest: Manifest, *, attempt: str = "") -> str:
    """Return the name of the file that begins with the rows of ``partition``.

    :param attempt: unique text of this attempt to publish; required if the folder is changed in place.
    """
    return f"part-{partition}-{job_tag(manifest.job)}-{manifest.number}{'-' if attempt else ''}{attempt}{SUFFIX}"


def tag_of(name: str) -> str:
    """Return the `job_tag` in a name made by `file_name`; empty for any other name."""
    match = _PART.fullmatch(name)
    return match[1] if match else ""


def number_of(name: str) -> int:
    """Return the manifest number in a name made by `file_name`; 0 for any other name."""
    match = _PART.fullmatch(name)
    return int(match[2]) if match else 0


def is_file_of(name: str, job: str) -> bool:
    """True if ``job`` wrote the file, complete or not."""
    return bool(job) and tag_of(name) == job_tag(job)


def uncounted(names: Iterable[str], state: SinkState | None) -> list[str]:
    """Return the Parquet files among ``names`` that no publication lists.

    A decision to remove a file needs a ``state`` that was read after ``names`` was listed.
    """
    counted = {file.name for file in state.files} if state else set()
    return [name for name in names if name.endswith(SUFFIX) and name not in counted]


def data_names(store: Store, *, job: str = "") -> list[str]:
    """List the files, then the folders in the sink, without files that ``job`` left after a crash."""
    names = [name for name in store.list() if not is_file_of(name, job)]
    return names + [f"{name}/" for name in store.list_folders()]


def check_replaceable(store: Store) -> None:
    """Refuse to overwrite a folder that contains anything except output.

    :raises RefusedForSafety: with the first such file or folder.
    """
    for name in data_names(store):
        if name in (MANIFEST, SUCCESS, *_OF_PARQUET) or (name.endswith(SUFFIX) and _is_parquet(store, name)):
            continue
        raise RefusedForSafety(
            "overwriting would remove a file that is not the output of a job",
            where=f"sink.path: {store.root}",
            found=name,
            expected="a folder with Parquet files only",
            next_step="move it away, or choose another sink.path",
        )


def check_flat(store: Store) -> None:
    """Refuse to append to a folder that contains folders.

    :raises OutputConflict: with the first such folder.
    """
    if folders := store.list_folders():
        raise OutputConflict(
            "the existing output has another layout than the files to append",
            where=f"sink.path: {store.root}",
            found=f"the folder {folders[0]}/",
            expected="Parquet files directly in the folder",
            next_step="choose another sink.path",
        )


def _is_parquet(store: Store, name: str) -> bool:
    try:
        with store.open_input(name) as file:
            return file.read(4) == b"PAR1"
    except FileNotFoundError:
        # Another publisher has removed it since the folder was listed.
        return True
