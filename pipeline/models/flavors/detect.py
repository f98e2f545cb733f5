"""Detect the format of a model file by its bytes, never by its name."""

from __future__ import annotations

import bz2
import difflib
import json
import lzma
import pickletools
import struct
import zlib
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import cast

from pipeline.errors import ModelError, PipelineError, RefusedForSafety
from pipeline.storage.urls import file_system, is_local_path, local_path, storage_errors

HEAD_BYTES = 1 << 16
"""Bytes at the start of a file that are examined."""
_EXPECTED = "an xgboost model file (JSON or UBJ)"
_SAVE_AGAIN = "save the model again with booster.save_model('model.ubj')"
_MAX_JSON = 1 << 26
_OPCODES = 200
"""Opcodes of a pickle that are examined."""


def detect(uri: str) -> str:
    """Return the flavor of the model file at ``uri`` (path or fsspec URL).

    :raises RefusedForSafety: for a pickle, under any file name.
    :raises ModelError: when the file does not exist, or its format is unknown.
    """
    return detect_bytes(read_model(uri), where=uri)


def detect_bytes(data: bytes, *, where: str = "") -> str:
    """Return the flavor of the bytes of a model file; see `detect`."""
    head = data[:HEAD_BYTES]
    _refuse_pickle(head, where=where)
    text = head.lstrip()
    if text[:1] == b"{":
        if b'"learner"' in head or b"learner" in head[:32]:
            return "xgboost"
        raise _not_a_model(_describe_object(data), where=where)
    if _is_old_xgboost(head):
        raise ModelError(
            "the model file has xgboost's old binary format, which xgboost no longer reads",
            where=where,
            expected=_EXPECTED,
            next_step="load it with xgboost older than 3.1, then booster.save_model('model.ubj')",
        )
    raise _not_a_model(_describe(head), where=where)


def read_model(uri: str) -> bytes:
    """Read the model file at ``uri``.

    :raises ModelError: when the file does not exist.
    """
    try:
        with storage_errors(uri):
            if is_local_path(uri):
                return local_path(uri).read_bytes()
            system, name = file_system(uri)
            with system.open(name, "rb") as file:
                return cast(bytes, file.read())
    except FileNotFoundError as error:
        near = _near_files(uri)
        raise ModelError(
            "model file not found",
            where=uri,
            found="no such file",
            expected=_EXPECTED,
            next_step=f"did you mean {near}?" if near else "give the path of the file",
        ) from error
    except PipelineError as error:
        if is_local_path(uri) and local_path(uri).is_dir():
            raise ModelError(
                "the model is a folder", where=uri, expected=_EXPECTED, next_step="give the path of the file in it"
            ) from error
        raise


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


def _refuse_pickle(head: bytes, *, where: str) -> None:
    inner = _decompressed(head)
    if not (_is_pickle(head) or _is_pickle(inner) or (head[:2] == b"PK" and b"data.pkl" in head)):
        return
    kind = "a pickle"
    if head[:2] == b"PK":
        kind = "a torch archive with a pickle in it"
    elif inner and not _is_pickle(head):
        kind = "a compressed pickle, as joblib writes it"
    raise RefusedForSafety(
        f"the model file is {kind}: to open it would run the code in it",
        where=where,
        found=kind,
        expected=_EXPECTED,
        next_step=_SAVE_AGAIN + "; a scikit-learn wrapper has save_model too",
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
            return lzma.LZMADecompressor().decompress(head, 64)
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
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b":", b"\x1a"):
        return "an ONNX model, by the look of it"
    if b"\0" not in head[:1024]:
        with suppress(UnicodeDecodeError):
            return f"text that begins with {head[:40].decode()!r}"
    return f"unknown bytes that begin with {head[:8].hex(' ')}"


_MAGIC = (
    (b"tree\n", "a LightGBM model (text)"),
    (b"PK\x03\x04", "a zip archive (skops, torch, Keras or numpy)"),
    (b"PAR1", "a Parquet file"),
    (b"\x89HDF", "an HDF5 file (Keras)"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x78\x01", "a zlib stream"),
    (b"\x78\x9c", "a zlib stream"),
    (b"\x78\xda", "a zlib stream"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"CBM1", "a CatBoost model"),
    (b"\x93NUMPY", "a numpy array"),
)
