"""Find what a reader of a published folder would count wrongly: unlisted files, a wrong ``_SUCCESS``."""

from __future__ import annotations

from pipeline.common.units import plural
from pipeline.jobs.manifest import Manifest
from pipeline.sinks.parquet import layout
from pipeline.sinks.parquet.cleanup import read
from pipeline.storage.store import Store


def unlisted_files(store: Store, job: str) -> list[str]:
    """Return the files of ``job`` in the sink that no publication lists: left by a crash before a commit."""
    names = [name for name in store.list() if layout.is_file_of(name, job)]
    return layout.uncounted(names, layout.read_state(store)) if names else []


def find_strays(store: Store, manifest: Manifest, *, mode: str) -> tuple[str, ...]:
    """Return one text per problem of the sink that the publication of ``manifest`` is in.

    - In modes ``error`` and ``overwrite`` the job owns the folder: every Parquet file must be listed, and no
      publication may be older than that of the job.
    - In mode ``append`` only unlisted files of the job itself count.
    - ``_SUCCESS`` must be of the current state. A later publication of another job answers for it.
    """
    names = store.list()
    state = layout.read_state(store)
    own = state.of_job(manifest.job) if state else None
    if state is None or own is None:
        return ()
    unlisted = layout.uncounted(names, state)
    if mode == "append":
        unlisted = [name for name in unlisted if layout.is_file_of(name, manifest.job)]
    problems = []
    if unlisted:
        problems.append(f"{plural(len(unlisted), 'Parquet file')} that no publication lists, such as {unlisted[0]}")
    older = [publication.job for publication in state.publications[: state.publications.index(own)]]
    if mode != "append" and older:
        problems.append(f"an older publication in a sink of mode {mode}, of {older[0] or 'files without a job'}")
    if state.publications[-1] is own:
        stored = read(store, layout.SUCCESS)
        if stored is None:
            problems.append(f"no {layout.SUCCESS}")
        elif stored != layout.success_text(state):
            problems.append(f"{layout.SUCCESS} is of another state than {layout.MANIFEST}")
    return tuple(problems)
