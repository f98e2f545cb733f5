"""Complete a publication after its commit: remove files that can never count again, and write ``_SUCCESS``.

Every file name tells the job that wrote it and the number of the manifest. A file that no publication lists may be an
unfinished publication of a job that is alive, unless the lock of the sink excludes it. These files are removed:

- files of the job itself, up to the manifest that was committed;
- files that the publication replaces, see `pipeline.sinks.parquet.layout.Publication.replaces`;
- files of jobs whose publication was overwritten: such a job never publishes again;
- in mode ``overwrite``, files that no job wrote, and files of other jobs. Without a lock the latter must be old.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.errors import OutputConflict, RefusedForSafety
from pipeline.jobs.manifest import Manifest
from pipeline.sinks.parquet import layout, swap
from pipeline.storage.local import LocalStore
from pipeline.storage.store import Store

logger = logging.getLogger(__name__)
ABANDONED_SECONDS = 24 * 3600.0
"""Age from which an unlisted file of another job is abandoned where no lock excludes a publisher."""
_ATTEMPTS = 20


def removable(
    names: Iterable[str],
    state: layout.SinkState,
    own: layout.Publication,
    *,
    is_locked: bool,
    is_abandoned: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """Return the files among ``names`` that no publication lists and that none can list any more. Pure.

    :param names: names in the sink, listed before ``state`` was read.
    :param own: publication that completes, one of ``state``.
    :param is_locked: True if no other publisher can be active.
    :param is_abandoned: True for an old file; asked about files of other jobs only.
    """
    alive = {layout.job_tag(publication.job) for publication in state.publications}
    overwritten = {layout.job_tag(job) for job, _ in state.replaced} - alive
    owns_folder = own is state.publications[-1] and own.mode == "overwrite"

    def is_removable(name: str) -> bool:
        tag = layout.tag_of(name)
        if tag == layout.job_tag(own.job):
            return is_locked or layout.number_of(name) <= own.manifest
        if name in own.replaces or tag in overwritten:
            return True
        return owns_folder and (not tag or is_locked or is_abandoned(name))

    return [name for name in layout.uncounted(names, state) if is_removable(name)]


def complete(
    store: Store, manifest: Manifest, *, is_locked: bool, check_lease: Callable[[], object] = lambda: None
) -> None:
    """Remove what the publication of ``manifest`` replaced, and write ``_SUCCESS``. Can be repeated."""
    if store.is_local:
        for number in range(1, manifest.number + 1):
            for staging in swap.find_staging(Path(store.root), job=manifest.job, number=number):
                check_lease()
                _remove_staging(staging)
    names = store.list()
    state = layout.read_state(store)
    own = state.find(manifest.job, manifest.number) if state else None
    if state is None or own is None:
        return
    unneeded = removable(names, state, own, is_locked=is_locked, is_abandoned=lambda name: _is_abandoned(store, name))
    if unneeded:
        check_lease()
    for name in unneeded:
        store.remove(name)
    settle_success(store, check_lease=check_lease)


def settle_success(store: Store, *, check_lease: Callable[[], object] = lambda: None) -> None:
    """Write ``_SUCCESS`` of the state that ``_manifest.json`` has, unless it is there.

    The version of ``_SUCCESS`` is read before the state. If another publisher commits in between, this write does not
    happen or that publisher replaces it: in the end ``_SUCCESS`` is of the last state.
    """
    for _ in range(_ATTEMPTS):
        version = store.version(layout.SUCCESS)
        stored = read(store, layout.SUCCESS) if version else None
        state = layout.read_state(store)
        if state is None or (text := layout.success_text(state)) == stored:
            return
        check_lease()
        if store.replace_if_unchanged(layout.SUCCESS, text, version=version):
            return
    raise OutputConflict(
        "other jobs publish to the same sink all the time",
        where=f"sink.path: {store.root}",
        found=f"{layout.SUCCESS} changed {_ATTEMPTS} times while it was being written",
        next_step="resume the job when the others are done",
    )


def read(store: Store, name: str) -> bytes | None:
    """Return the content of ``name``; None if it does not exist."""
    try:
        return store.read(name)
    except FileNotFoundError:
        return None


def _is_abandoned(store: Store, name: str) -> bool:
    """True if ``name`` is much older than the manifest, which was just written, by the clock of the storage."""
    try:
        return store.modified(layout.MANIFEST) - store.modified(name) > ABANDONED_SECONDS
    except FileNotFoundError:
        return False


def _remove_staging(staging: Path) -> None:
    """Remove the replaced folder, unless it contains anything except output (added after the check)."""
    try:
        layout.check_replaceable(LocalStore(staging))
    except RefusedForSafety as reason:
        logger.warning("kept the replaced output in %s: it holds %s", staging, reason.found)
        return
    swap.remove_staging(staging)
