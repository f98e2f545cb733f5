"""Versions of input files: texts that change with the content, and their comparison.

On object stores a version is ``etag:<etag>`` or ``modified:<time>``, and two versions are equal or not. On local disks
it has up to four parts, ``mtime:<ns> inode:<number> ctime:<ns> tail:<bytes>-<sha256>``:

- Another size or modification time is another version.
- Another inode or change time alone is not: a restored backup has others, ``chmod`` and a hard link set the change
  time, and a file system in user space numbers its inodes anew at each start. But ``rsync -t`` puts another inode, and
  ``cp -p`` another change time, on a file that it replaces by one of the same size and modification time. The digest
  of the last bytes, which hold the footer, decides.
- A part that one side does not know is not compared.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

_LOCAL = "mtime:"
TAIL_BYTES = 1 << 16
"""Largest number of bytes at the end of a file that are part of a version."""


def stat_version(status: os.stat_result) -> tuple[int, str]:
    """Return the size in bytes and the version of a local file, without the digest of its last bytes."""
    return status.st_size, f"mtime:{status.st_mtime_ns} inode:{status.st_ino} ctime:{status.st_ctime_ns}"


def with_tail(version: str, tail: bytes) -> str:
    """Return ``version`` with the digest of the file's last bytes; a version of an object store stays as it is."""
    if not version.startswith(_LOCAL) or "tail" in _parts(version):
        return version
    tail = tail[-TAIL_BYTES:]
    return f"{version} tail:{len(tail)}-{_digest(tail)}"


def content_version(version: str) -> str:
    """Return ``version`` without inode and change time: equal texts before and after a restore to another disk."""
    return " ".join(part for part in version.split(" ") if not part.startswith(("inode:", "ctime:")))


def is_same_version(path: str, planned: tuple[int, str], current: tuple[int, str]) -> bool:
    """True if two sizes and versions are those of the same content.

    :param path: path of the current file, whose last bytes are read if only its inode or change time differs.
    :raises OSError: if the bytes cannot be read.
    """
    if planned == current:
        return True
    before, now = _parts(planned[1]), _parts(current[1])
    if planned[0] != current[0] or not before or not now or before.get("mtime") != now.get("mtime"):
        return False
    if all(name not in before or name not in now or before[name] == now[name] for name in ("inode", "ctime")):
        return True
    return "tail" in before and before["tail"] == _tail(path, before["tail"])


def _parts(version: str) -> Mapping[str, str]:
    """Return the parts of a local version by name; empty for a version of an object store."""
    if not version.startswith(_LOCAL):
        return {}
    return dict(part.split(":", 1) for part in version.split(" ") if ":" in part)


def _tail(path: str, like: str) -> str:
    length = int(like.partition("-")[0])
    with open(path.removeprefix("file://"), "rb", buffering=0) as file:
        file.seek(-min(length, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return f"{length}-{_digest(file.read(length))}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
