"""The files of a text encoder, as sentence-transformers and transformers save it: in a folder, or in one archive. Pure.

Only JSON and safetensors are read, never code or pickles.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import ModelError
from pipeline.models.model import ModelData, ModelFolder

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
NEEDED = (CONFIG, TOKENIZER, WEIGHTS)
_LONGEST = 512
"""Tokens of a text where no file says."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
Pooling = Literal["mean", "cls", "max"]


@dataclass(frozen=True)
class EncoderFiles:
    """What the files of a text encoder say."""

    config: dict[str, Any]
    tokenizer: str
    weights: bytes
    longest: int
    """Most tokens of a text; longer ones are cut."""
    pooling: Pooling
    normalizes: bool
    lower: bool
    """True: texts are put into lower case first."""


def is_encoder(names: Sequence[str]) -> bool:
    """Return True for the files of a text encoder."""
    return set(NEEDED) <= set(names)


def pack_folder(names: Sequence[str], read: Callable[[str], bytes]) -> bytes:
    """Return the files of a folder as one archive; equal files give equal bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(names):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), read(name))
    return packed.getvalue()


def read_encoder(data: ModelData, *, where: str) -> EncoderFiles:
    """Return what the files of a text encoder say.

    :raises ModelError: if a file is damaged, or asks for a step that is not known.
    """
    try:
        names, read = _reader(data)
        modules = json.loads(read("modules.json")) if "modules.json" in names else []
        steps = [(str(module["type"]).rsplit(".", 1)[-1], str(module["path"])) for module in modules]
        sizes = json.loads(read("sentence_bert_config.json")) if "sentence_bert_config.json" in names else {}
        tokenizer = json.loads(read("tokenizer_config.json")) if "tokenizer_config.json" in names else {}
        config = dict(json.loads(read(CONFIG)))
        longest = sizes.get("max_seq_length") or tokenizer.get("model_max_length") or _LONGEST
        pooling = [json.loads(read(f"{path}/config.json")) for kind, path in steps if kind == "Pooling"]
        unknown = [kind for kind, _ in steps if kind not in ("Transformer", "Pooling", "Normalize")]
        found = EncoderFiles(
            config,
            read(TOKENIZER).decode(),
            read(WEIGHTS),
            min(int(longest), int(config.get("max_position_embeddings") or longest)),
            _pooling(pooling[0]) if pooling else "mean",
            any(kind == "Normalize" for kind, _ in steps),
            bool(sizes.get("do_lower_case")),
        )
    except (KeyError, TypeError, ValueError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ModelError(
            "the text encoder is damaged",
            where=where,
            found=f"{type(error).__name__}: {error}"[:300],
            expected="a folder as SentenceTransformer.save writes it",
            next_step="copy the folder again, or save the model again",
        ) from error
    if unknown or config.get("auto_map"):
        raise ModelError(
            "the text encoder has a step that is not known",
            where=where,
            found=", ".join(unknown) or "auto_map: code of its own",
            expected="Transformer, Pooling and Normalize, of an architecture of transformers",
            next_step="write a model in Python: model: module:Class, and its folder under model_files",
        )
    return found


def _pooling(config: dict[str, Any]) -> Pooling:
    modes = [name.removeprefix("pooling_mode_") for name, value in config.items() if value is True]
    known: dict[str, Pooling] = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}
    modes = [mode for mode in modes if mode not in ("include_prompt",)]
    if len(modes) != 1 or modes[0] not in known:
        raise ValueError(f"pooling by {', '.join(modes) or 'nothing'}, not one of {', '.join(known)}")
    return known[modes[0]]


def _reader(data: ModelData) -> tuple[Sequence[str], Callable[[str], bytes]]:
    if isinstance(data, ModelFolder):
        return data.names, data.read
    archive = zipfile.ZipFile(io.BytesIO(data))
    return archive.namelist(), archive.read
