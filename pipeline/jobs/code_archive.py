"""Keep the sources of a job's steps in its directory, so that the job can go on with the code it was planned with."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.common.secrets import redact
from pipeline.common.step_code import CodeFile, StepCode, code_digest, pack_sources, unpack_source
from pipeline.common.travel import PackedValue, digest_of, is_packed, known, remember
from pipeline.jobs import layout
from pipeline.plan.plan import Plan
from pipeline.storage.store import Store, open_store


def put_sources(store: Store, plan: Plan) -> None:
    """Store the sources of a plan's steps, and its functions that travel by value, with their source text beside.

    Not stored: native code, sources of unusual size, files with a secret.
    """
    packed = packed_sources(plan)
    for digest, stored in packed.items():
        store.put_if_absent(layout.packed_path(digest), stored)
        value = PackedValue.from_bytes(stored, sha256=digest, where=layout.packed_path(digest))
        store.put_if_absent(layout.packed_source_path(digest), value.source.encode())
    sources = {digest: source for digest, source in plan.sources.items() if digest not in packed and _is_open(source)}
    archive = pack_sources(plan.code, sources)
    if archive:
        store.put_if_absent(layout.code_path(code_digest(plan.code)), archive)


def copy_sources(store: Store, other: Store, plan: Plan) -> None:
    """Store the sources that one job directory has in another one, whose plan has the same steps."""
    names = [layout.code_path(code_digest(plan.code))] if plan.code else []
    for digest in [digest_of(step.module) for step in plan.code if is_packed(step.module)]:
        names += [layout.packed_path(digest), layout.packed_source_path(digest)]
    for name in names:
        if store.exists(name):
            other.put_if_absent(name, store.read(name))


def _is_open(source: bytes) -> bool:
    """Return True for a source without anything that messages and logs mask."""
    text = source.decode(errors="replace")
    return redact(text) == text


def packed_sources(plan: Plan) -> dict[str, bytes]:
    """Return the functions of a plan that travel by value, as stored, by SHA-256."""
    digests = {digest_of(step.module) for step in plan.code if is_packed(step.module)}
    return {digest: plan.sources[digest] for digest in sorted(digests & plan.sources.keys())}


def read_packed(directory: str, digest: str) -> bytes | None:
    """Return a function that travels by value from the directory of its job; None if it is not there."""
    try:
        return open_store(directory, private=True).read(layout.packed_path(digest)) if directory else None
    except FileNotFoundError:
        return None


def remember_packed(directory: str, plan: Plan) -> None:
    """Read the functions of a job that travel by value, so that this process can plan with them."""
    for step in plan.code:
        if is_packed(step.module) and known(digest_of(step.module)) is None:
            stored = read_packed(directory, digest_of(step.module))
            if stored is not None:
                remember(stored)


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
