"""Keep the sources of a job's steps in its directory, so that the job can go on with the code it was planned with."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.common.secrets import redact
from pipeline.common.step_code import CodeFile, StepCode, code_digest, pack_sources, unpack_source
from pipeline.jobs import layout
from pipeline.plan.plan import Plan
from pipeline.storage.store import Store, open_store


def put_sources(store: Store, plan: Plan) -> None:
    """Store the sources of a plan's steps. Not stored: native code, sources of unusual size, files with a secret."""
    archive = pack_sources(plan.code, {digest: source for digest, source in plan.sources.items() if _is_open(source)})
    if archive:
        store.put_if_absent(layout.code_path(code_digest(plan.code)), archive)


def _is_open(source: bytes) -> bool:
    """Return True for a source without anything that messages and logs mask."""
    text = source.decode(errors="replace")
    return redact(text) == text


def read_archived(directory: str, code: Sequence[StepCode], file: CodeFile) -> bytes | None:
    """Return the source of a file from the directory of its job; None if the directory has none,
    or not this one.

    :raises StateCorrupt: if the archive is damaged.
    """
    if not file.is_source:
        return None
    store, name = open_store(directory, private=True), layout.code_path(code_digest(code))
    try:
        archive = store.read(name)
    except FileNotFoundError:
        return None
    return unpack_source(archive, file, where=store.url(name))
