"""Read model files, and tell their format by their bytes, never by their name."""

from __future__ import annotations

import bz2
import difflib
import io
import json
import lzma
import os
import pickletools
import stat
import struct
import zipfile
import zlib
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.common.units import format_bytes
from pipeline.errors import ModelError, RefusedForSafety
from pipeline.storage.urls import file_system, is_local_path, local_path, storage_errors

HEAD_BYTES = 1 << 16
"""Bytes at the start of a file that are examined."""
EXPECTED = "a model file: xgboost (JSON or UBJ), LightGBM (text), scikit-learn (skops), ONNX or CatBoost (cbm)"
_EXPECTED = EXPECTED
_SAVE_AGAIN = (
    "save the model again: xgboost's with booster.save_model('model.ubj'), LightGBM's with "
    "booster.save_model('model.txt'), scikit-learn's with skops.io.dump(model, 'model.skops')"
)
_MAX_JSON = 1 << 20
"""Bytes of a JSON file that are parsed to name its keys in a message."""
_MAX_DICTIONARY = 1 << 26
"""Bytes of memory that a compressed file may request before it is called unknown."""
MAX_BYTES = 8 << 30
"""Default limit for the size of a model file."""
_OPCODES = 200
"""Opcodes of a pickle that are examined."""


def is_xgboost(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` is JSON or UBJSON with a learner in it."""
    return head.lstrip()[:1] == b"{" and (b'"learner"' in head or b"learner" in head[:32])


def archive_names(data: bytes) -> tuple[str, ...]:
    """Return the names of the files in a zip archive; none for other bytes, or a damaged archive."""
    if data[:4] != b"PK\x03\x04":
        return ()
    with suppress(zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return tuple(zipfile.ZipFile(io.BytesIO(data)).namelist())
    return ()


def is_torch_program(names: tuple[str, ...]) -> bool:
    """Return True for the files of an archive that ``torch.export.save`` wrote."""
    return all(any(name.endswith(end) for name in names) for end in ("archive_format", "models/model.json"))


def unknown_format(data: bytes, *, where: str) -> ModelError:
    """Return the error for a file that no flavor accepts."""
    head = data[:HEAD_BYTES]
    if head.lstrip()[:1] == b"{":
        return _not_a_model(_describe_object(data), where=where)
    if _is_old_xgboost(head):
        return ModelError(
            "the model file has xgboost's old binary format, which xgboost no longer reads",
            where=where,
            expected=_EXPECTED,
            next_step="load it with xgboost older than 3.1, then booster.save_model('model.ubj')",
        )
    return _not_a_model(_describe(head), where=where)


def read_model(uri: str, *, limit: int = MAX_BYTES) -> bytes:
    """Read the model file at ``uri``.

    :param limit: largest size in bytes.
    :raises ModelError: when the file does not exist, is not a regular file, or is larger than ``limit``.
    """
    try:
        with storage_errors(uri):
            if is_local_path(uri):
                return _read_local(local_path(uri), uri=uri, limit=limit)
            system, name = file_system(uri)
            with system.open(name, "rb") as file:
                return _read_at_most(file, int(getattr(file, "size", None) or limit), uri=uri, limit=limit)
    except FileNotFoundError as error:
        near = _near_files(uri)
        raise ModelError(
            "model file not found",
            where=uri,
            found="file not found",
            expected=_EXPECTED,
            next_step=f"did you mean {near}?" if near else "give the path of the file",
        ) from error


def _read_local(path: Path, *, uri: str, limit: int) -> bytes:
    # Opening a FIFO waits for a writer, and opening a device can change its state: look first.
    _check_regular(os.stat(path), uri=uri)
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        _check_regular(status, uri=uri)
        return _read_at_most(file, status.st_size, uri=uri, limit=limit)


_FILE_TYPES = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


def _check_regular(status: os.stat_result, *, uri: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ModelError(
            "the model is a folder", where=uri, expected=_EXPECTED, next_step="give the path of the file in it"
        )
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(
            "the model is not a regular file",
            where=uri,
            found=_FILE_TYPES.get(stat.S_IFMT(status.st_mode), "a special file"),
            expected=_EXPECTED,
            next_step="write the model to a regular file, and give the path of that file",
        )


def _read_at_most(file: Any, size: int, *, uri: str, limit: int) -> bytes:
    """Read ``file``, which had ``size`` bytes; no more than ``limit`` bytes even if the file grows."""
    data = b"" if size > limit else bytes(file.read(size + 1))
    if size > limit or len(data) > limit:
        raise ModelError(
            "the model file is too large",
            where=uri,
            found=format_bytes(max(size, len(data))),
            expected=f"at most {format_bytes(limit)}",
            next_step="give the path of the model file, or raise the setting max_model_size",
        )
    return data


def _near_files(uri: str) -> str:
    if not is_local_path(uri):
        return ""
    path = local_path(uri)
    with suppress(OSError):
        near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
        return str(Path(uri).with_name(near[0])) if near else ""
    return ""


def _not_a_model(found: str, *, where: str) -> ModelError:
    return ModelError(
        "unknown format of the model file",
        where=where,
        found=found,
        expected=_EXPECTED,
        next_step=_SAVE_AGAIN,
    )


def pickle_kind(head: bytes) -> str:
    """Describe the pickle that a file beginning with ``head`` is; empty for other files. Nothing is unpickled."""
    inner = _decompressed(head)
    if not (_is_pickle(head) or _is_pickle(inner) or (head[:2] == b"PK" and b"data.pkl" in head)):
        return ""
    if head[:2] == b"PK":
        return "a torch archive with a pickle in it"
    return "a compressed pickle, as joblib writes it" if inner and not _is_pickle(head) else "a pickle"


def refused_pickle(kind: str, *, where: str) -> RefusedForSafety:
    """Return the error for a pickle that nobody has allowed.

    :param kind: result of `pickle_kind`.
    """
    return RefusedForSafety(
        f"the model file is {kind}: to open it would run the code in it",
        where=where,
        found=kind,
        expected=_EXPECTED,
        next_step=_SAVE_AGAIN + "; a scikit-learn wrapper of xgboost has save_model too. "
        "If you trust whoever made the file: score.allow_code: true, for models of scikit-learn",
    )


def _is_pickle(head: bytes) -> bool:
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    known = (b"ccopy_reg\n", b"c__builtin__\n", b"cbuiltins\n", b"(dp0\n", b"(lp0\n", b"(i__main__\n")
    return head.startswith(known) or _is_unmarked_pickle(head)


def _is_unmarked_pickle(head: bytes) -> bool:
    """Return True if the bytes are a pickle of protocol 0 or 1 that imports code. The code is not run."""
    names = set()
    # Other bytes soon give an invalid opcode, which raises one of many errors.
    with suppress(Exception):
        for opcode, _, _ in islice(pickletools.genops(head), _OPCODES):
            names.add(opcode.name)
        return not names.isdisjoint(("GLOBAL", "INST"))
    return False


def _decompressed(head: bytes) -> bytes:
    """Return the first bytes inside a compressed file; empty for any other file."""
    with suppress(zlib.error, OSError, EOFError, lzma.LZMAError, ValueError):
        if head[:2] == b"\x1f\x8b" or (head[:1] == b"\x78" and head[1:2] in b"\x01\x5e\x9c\xda"):
            return zlib.decompressobj(wbits=47).decompress(head, 64)
        if head[:3] == b"BZh":
            return bz2.BZ2Decompressor().decompress(head, 64)
        if head[:6] == b"\xfd7zXZ\x00" or head[:3] == b"\x5d\x00\x00":
            return lzma.LZMADecompressor(memlimit=_MAX_DICTIONARY).decompress(head, 64)
    return b""


def _is_old_xgboost(head: bytes) -> bool:
    if head[:4] in (b"binf", b"bs64"):
        return True
    if len(head) < 136:
        return False
    # The old header: float base_score, then the number of features; the objective's name follows within 300 bytes.
    _, features = struct.unpack_from("<fI", head)
    names = (b"binary:", b"reg:", b"multi:", b"rank:", b"count:", b"survival:")
    return 0 < features < 10_000_000 and any(name in head[:300] for name in names)


def _describe_object(data: bytes) -> str:
    if len(data) <= _MAX_JSON:
        with suppress(ValueError, RecursionError):
            keys = list(json.loads(data))
            return "a JSON object with " + (f"the keys {', '.join(map(repr, keys[:5]))}" if keys else "no keys")
    after = data.lstrip()[1:2]
    return "a UBJSON object without a learner" if after and after in b"$#iUIlL" else "text that begins like JSON"


def _describe(head: bytes) -> str:
    if not head:
        return "an empty file"
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if b"\0" not in head[:1024]:
        with suppress(UnicodeDecodeError):
            return f"text that begins with {head[:40].decode()!r}"
    return f"unknown bytes that begin with {head[:8].hex(' ')}"


_MAGIC = (
    (b"tree\n", "text like a LightGBM model's, without its fields"),
    (b"PK\x03\x04", "a zip archive without skops' schema.json (torch, Keras or numpy)"),
    (b"PAR1", "a Parquet file"),
    (b"\x89HDF", "an HDF5 file (Keras)"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x78\x01", "a zlib stream"),
    (b"\x78\x9c", "a zlib stream"),
    (b"\x78\xda", "a zlib stream"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"\x93NUMPY", "a numpy array"),
)
