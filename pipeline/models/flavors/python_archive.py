"""`PythonArchive`: the code of a model in Python, as one file: its sources, and a pickled object if it is one.

Sources are named by their place below the folders that modules are imported from, so that equal code has equal bytes
wherever it lies. Pure.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.common.code_search import OWN, is_pinned
from pipeline.common.digest import digest_bytes
from pipeline.common.step_code import CodeFile, FoundCode, StepCode, unique_files
from pipeline.errors import ModelError, SpecError

MANIFEST = "pipeline-model.json"
"""Name of the list of contents in an archive."""
_OBJECT = "object.pickle"
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class PythonArchive:
    """The code of a model."""

    entrypoint: str
    """``module:Class`` or ``module:function``; empty for an object."""
    files: tuple[tuple[str, str, str], ...] = ()
    """Module, path below the folder of imports, and SHA-256 of each source."""
    installed: tuple[tuple[str, str, str], ...] = ()
    """The same for a module that is not of the job's folders: it is imported where it is installed."""
    sources: Mapping[str, bytes] = field(default_factory=dict)
    """Sources by SHA-256."""
    pickled: bytes = b""
    """The object; empty for an ``entrypoint``."""

    def to_bytes(self) -> bytes:
        """Return the archive; equal contents give equal bytes."""
        manifest = {"entrypoint": self.entrypoint, "files": self.files, "installed": self.installed}
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(zipfile.ZipInfo(MANIFEST, _EPOCH), json.dumps(manifest, indent=1))
            for _, path, sha256 in self.files:
                archive.writestr(zipfile.ZipInfo(f"code/{path}", _EPOCH), self.sources[sha256])
            if self.pickled:
                archive.writestr(zipfile.ZipInfo(_OBJECT, _EPOCH), self.pickled)
        return packed.getvalue()

    @staticmethod
    def from_bytes(data: bytes, *, where: str) -> PythonArchive:
        """Inverse of `to_bytes`.

        :raises ModelError: for other bytes.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                manifest = json.loads(archive.read(MANIFEST))
                files, installed = (
                    tuple((str(module), str(path), str(sha256)) for module, path, sha256 in manifest[name])
                    for name in ("files", "installed")
                )
                sources = {sha256: archive.read(f"code/{path}") for _, path, sha256 in files}
                pickled = archive.read(_OBJECT) if _OBJECT in archive.namelist() else b""
            if any(digest_bytes(source) != sha256 for sha256, source in sources.items()):
                raise ValueError("a source has another digest")
            return PythonArchive(str(manifest["entrypoint"]), files, installed, sources, pickled)
        except (zipfile.BadZipFile, KeyError, TypeError, ValueError, EOFError, NotImplementedError) as error:
            raise ModelError(
                "the archive of a model in Python is damaged",
                where=where,
                found=f"{type(error).__name__}: {error}"[:300],
                expected="the code that the job was planned with",
                next_step="run the job spec as a new job",
            ) from error

    def steps(self, folder: str) -> tuple[StepCode, ...]:
        """Return the code as `pipeline.common.step_modules` imports it, below ``folder``."""
        files = [
            CodeFile(module, os.path.join(folder, path), len(self.sources[sha256]), sha256)
            for module, path, sha256 in self.files
        ]
        files += [CodeFile(module, path, 0, sha256) for module, path, sha256 in self.installed]
        return (StepCode(self.entrypoint.partition(":")[0], tuple(files)),) if files else ()


def archive_of(entrypoint: str, code: FoundCode, *, import_paths: Sequence[str], pickled: bytes = b"") -> PythonArchive:
    """Return the archive of the code of a model.

    :param import_paths: folders from which its modules were found.
    :raises SpecError: for native code in these folders, which an archive cannot hold.
    """
    folders = tuple(map(os.path.abspath, import_paths))
    files, installed = list[tuple[str, str, str]](), list[tuple[str, str, str]]()
    for module, file in sorted(unique_files(code.steps).items()):
        if not is_pinned(file.path, folders) or module.partition(".")[0] == OWN:
            installed.append((module, os.path.basename(file.path), file.sha256))
            continue
        if file.sha256 not in code.sources:
            raise SpecError(
                "the code of the model is not Python source",
                where=entrypoint,
                found=file.path,
                expected="modules of Python; native code is installed as a package",
                next_step="install the module for driver and workers",
            )
        folder = next(folder for folder in folders if file.path.startswith(os.path.join(folder, "")))
        files.append((module, os.path.relpath(file.path, folder).replace(os.sep, "/"), file.sha256))
    kept = {sha256: code.sources[sha256] for _, _, sha256 in files}
    return PythonArchive(entrypoint, tuple(files), tuple(installed), kept, pickled)
