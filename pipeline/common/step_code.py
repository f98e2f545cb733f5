"""`StepCode`: the code of a step, pinned by content like a model. The archive of sources that a job keeps. Pure."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.common.digest import digest_bytes, digest_json
from pipeline.common.travel import shown_name
from pipeline.errors import StateCorrupt, StepChanged

MAX_ARCHIVE_BYTES = 16 << 20
"""Largest total size of the sources that a job keeps. Larger code is pinned by its digest alone."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Modification time in the archive: equal sources give equal bytes."""
SOURCE = ".py"


@dataclass(frozen=True)
class CodeFile:
    """A file with code, as planned."""

    module: str
    """Dotted name of the module."""
    path: str
    """Absolute path on the driver. No digest includes it."""
    size: int
    """Bytes."""
    sha256: str

    @property
    def is_source(self) -> bool:
        """True for Python source; False for native code and byte code."""
        return self.path.endswith(SOURCE)

    @property
    def is_package(self) -> bool:
        """True for the ``__init__`` file of a package."""
        return self.path.replace("\\", "/").rpartition("/")[2].startswith("__init__.")


@dataclass(frozen=True)
class StepCode:
    """The code of one step module: its files, and those that they import from the folders of the job."""

    module: str
    files: tuple[CodeFile, ...] = ()
    """Files sorted by module; empty for a module without a file."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and contents of the files. Their folders may differ."""
        return digest_json({"module": self.module, "files": [[file.module, file.sha256] for file in self.files]})

    def to_record(self) -> dict[str, Any]:
        """Return the code for storage as JSON."""
        return {"module": self.module, "files": [[f.module, f.path, f.size, f.sha256] for f in self.files]}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> StepCode:
        """Inverse of `to_record`."""
        return StepCode(record["module"], tuple(CodeFile(*file) for file in record["files"]))


@dataclass(frozen=True)
class FoundCode:
    """The code of all steps of a job, with the bytes of its sources."""

    steps: tuple[StepCode, ...] = ()
    sources: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    """Python sources by SHA-256."""


def code_digest(steps: Sequence[StepCode]) -> str:
    """Return the SHA-256 over the code of all steps; empty without steps."""
    return digest_json({"steps": [[step.module, step.digest] for step in steps]}) if steps else ""


def digests_of(steps: Iterable[StepCode]) -> dict[str, str]:
    """Return the digest of the code of each step module."""
    return {step.module: step.digest for step in steps}


def unique_files(steps: Iterable[StepCode]) -> dict[str, CodeFile]:
    """Return the files of all steps by module."""
    return {file.module: file for step in steps for file in step.files}


def pack_sources(steps: Sequence[StepCode], sources: Mapping[str, bytes]) -> bytes:
    """Return a zip archive of the sources, named by module. Empty without sources, or if they are too large."""
    files = [file for _, file in sorted(unique_files(steps).items()) if file.is_source and file.sha256 in sources]
    if not files or sum(file.size for file in files) > MAX_ARCHIVE_BYTES:
        return b""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.writestr(zipfile.ZipInfo(_archived_name(file), _EPOCH), sources[file.sha256])
    return packed.getvalue()


def unpack_source(archive: bytes, file: CodeFile, *, where: str) -> bytes | None:
    """Return the source of ``file`` from an archive of `pack_sources`; None if the archive has been made without it.

    :param where: path of the archive, for the message.
    :raises StateCorrupt: if the archive is damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            if _archived_name(file) not in opened.namelist():
                return None
            source = opened.read(_archived_name(file))
        if digest_bytes(source) != file.sha256:
            raise ValueError(f"{file.module} has SHA-256 {digest_bytes(source)[:12]}, not {file.sha256[:12]}")
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise StateCorrupt(
            "the archive of a job's step code is damaged",
            where=where,
            found=f"{type(error).__name__}: {error}",
            expected=f"the source of {file.module}, as planned",
            next_step="restore the file, or run the job spec again as a new job",
        ) from error
    return source


def _archived_name(file: CodeFile) -> str:
    return file.module.replace(".", "/") + ("/__init__.py" if file.is_package else SOURCE)


def changed_modules(planned: StepCode, found: StepCode) -> list[str]:
    """Return the differences between two versions of a step's code, one text per file."""
    before, after = unique_files([planned]), unique_files([found])
    texts = [
        f"{after[name].path} changed: sha256 {file.sha256[:12]} -> {after[name].sha256[:12]}"
        for name, file in before.items()
        if name in after and after[name].sha256 != file.sha256
    ]
    texts += [f"{file.path} is gone" for name, file in before.items() if name not in after]
    return texts + [f"{file.path} is imported now" for name, file in after.items() if name not in before]


def code_difference(planned: Sequence[StepCode], found: Sequence[StepCode]) -> list[str]:
    """Return the differences between the code of two plans, one text per step. Empty if all code is equal."""
    after = {step.module: step for step in found}
    return [
        f"code of step {shown_name(step.module)}: " + "; ".join(changed_modules(step, after[step.module]))
        for step in planned
        if step.module in after and step.digest != after[step.module].digest
    ]


def step_changed(differences: Sequence[str], *, step: str, job: str, expected: str = "") -> StepChanged:
    """Build the error for a job whose step code is another than planned.

    :param differences: from `changed_modules`.
    :param step: module of the step.
    """
    return StepChanged(
        f"the code of step {shown_name(step)} changed since the job was planned; nothing was published",
        where=f"step {shown_name(step)}",
        found="; ".join(differences),
        expected=expected or "the code as planned (step_change: fail)",
        next_step=f"undo the change and run: python -m pipeline resume {job}; or run the job spec as a new job; "
        f"or score only the remaining rows with the new code: python -m pipeline retry {job}",
    )
