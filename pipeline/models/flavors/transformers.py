"""The transformers flavor: embeddings of texts, by encoders of sentence-transformers and transformers.

Each row is padded to its own next multiple of 16 tokens, and rows of one padded length share a call. A row thus has the
same bits whatever else is in its batch, and little is computed for nothing.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ModelError, PipelineError, SchemaDrift
from pipeline.models.flavors import Flavor
from pipeline.models.flavors.first_load import Described, first_load
from pipeline.models.flavors.library import LibraryPredictor, check_digest, import_or_explain
from pipeline.models.flavors.transformers_file import EncoderFiles, is_encoder, read_encoder
from pipeline.models.model import Feature, ModelData, ModelVersion, OutputType
from pipeline.models.process import threads_wanted
from pipeline.spec.model_ref import OutputKind

PAD = 16
"""Tokens of whose multiple every row is padded to the next. Padded to the longest row of a call, bits would depend on
that row (measured)."""
CALL_TOKENS = 4096
"""Padded tokens of a call of the encoder."""
_FEATURES = (Feature("text", "text"),)
_WORDS = (
    "the",
    "of",
    "and",
    "order",
    "late",
    "refund",
    "paid",
    "open",
    "customer",
    "asked",
    "again",
    "why",
    "42",
    "sent",
)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Texts as numbers of tokens, with the operations of a matrix."""

    ids: np.ndarray
    """Array of int64 for each row; None for a null."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | np.ndarray) -> TokenRows:
        return TokenRows(self.ids[rows])


def inspect(uri: str, data: ModelData, *, name: str | None = None, allow_code: bool = False) -> ModelVersion:
    """Describe the encoder at ``uri``; see `pipeline.models.flavors.first_load.first_load`."""
    return first_load("transformers", uri, data, name=name, library="transformers")


def describe(version: ModelVersion, data: ModelData, *, allow_code: bool = False) -> Described:
    """Load the encoder, and describe it. To be called in a child process.

    :raises ModelError: when a file is damaged, or transformers does not have the architecture.
    """
    files = read_encoder(data, where=version.uri)
    described = replace(version, features=_FEATURES, task="other", objective=str(files.config.get("model_type", "")))
    predictor = TransformersPredictor(described, files, threads=1)
    # Texts of many lengths: their padded lengths are what bits could depend on.
    texts = [" ".join((_WORDS * 5)[:count]) for count in (1, 3, 8, 13, 14, 15, 27, 31, 45, 62)]
    outputs = (OutputType("prediction", "float32", predictor.width, is_list=True),)
    return Described(described, predictor, ("prediction",), {"text": texts}, outputs)


def load(version: ModelVersion, data: ModelData, *, threads: int | None = None) -> TransformersPredictor:
    """Load the predictor for ``version``.

    :param data: the folder, or an archive of it; the digest is verified before it is read.
    :param threads: threads of one call. Default: ``score.threads``, ``OMP_NUM_THREADS``, or 1.
    :raises ModelDigestMismatch: when ``data`` differs from what was pinned.
    :raises ModelError: when a library is not installed, or cannot read the encoder.
    """
    check_digest(version, data)
    files = read_encoder(data, where=version.uri)
    return TransformersPredictor(version, files, threads=threads or version.threads or threads_wanted())


class TransformersPredictor(LibraryPredictor):
    """A loaded encoder."""

    def __init__(self, version: ModelVersion, files: EncoderFiles, *, threads: int) -> None:
        super().__init__(version, threads=threads)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._torch: Any = import_or_explain("torch", library="PyTorch", extra="text", where=version.uri)
        self._files = files
        try:
            self._tokenizer, self._model = _tokenizer(files), self._encoder()
        except (PipelineError, MemoryError):
            raise
        except Exception as error:
            raise ModelError(
                "transformers cannot read the encoder",
                where=version.uri,
                found=f"{type(error).__name__}: {error}"[:300],
                expected="a folder as SentenceTransformer.save writes it, of an architecture that is installed",
                next_step="copy the folder again, or install a newer version of transformers",
            ) from error
        self.width = int(self._model.config.hidden_size)
        if self._torch.get_num_threads() != threads:
            self._torch.set_num_threads(threads)
        self._counts = threading.local()

    def _encoder(self) -> Any:
        library: Any = import_or_explain("transformers", library="transformers", extra="text", where=self.version.uri)
        safetensors: Any = import_or_explain("safetensors.torch", library="safetensors", extra="text", where="")
        config = library.AutoConfig.for_model(**self._files.config)
        model = library.AutoModel.from_config(config).eval()
        prefix = f"{model.base_model_prefix}."
        weights = {name.removeprefix(prefix): tensor for name, tensor in safetensors.load(self._files.weights).items()}
        missing = [name for name in model.load_state_dict(weights, strict=False).missing_keys if "pooler" not in name]
        if missing:
            raise ValueError(f"no weights for {', '.join(missing[:5])}")
        return model.float()

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> Any:
        """See `pipeline.models.model.Predictor.encode`: the tokens of each text.

        :raises SchemaDrift: for a column that holds no texts.
        """
        column = table.column(0)
        if pa.types.is_dictionary(column.type):
            column = pc.cast(column, column.type.value_type)
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        if not (is_text or pa.types.is_string_view(column.type) or pa.types.is_null(column.type)):
            raise SchemaDrift(
                "the model cannot take a column",
                where=table.column_names[0],
                found=str(column.type),
                expected="texts",
                next_step="convert it in a map step, or name the column of texts: features: [name]",
            )
        texts = column.to_pylist()
        given = [text.lower() if self._files.lower else text for text in texts if text is not None]
        found = iter(self._tokenizer.encode_batch(given))
        ids = np.empty(len(texts), dtype=object)
        for row, text in enumerate(texts):
            ids[row] = None if text is None else np.asarray(next(found).ids, np.int64)
        return TokenRows(ids)

    def example(self) -> Any:
        """See `pipeline.models.model.Predictor.example`."""
        return self.encode(pa.table({"text": ["the"]}))

    def call(self, rows: TokenRows, kind: OutputKind) -> np.ndarray:
        """Return the embeddings; rows of one padded length share calls.

        :raises ValueError: for a null.
        """
        if any(row is None for row in rows.ids):
            raise ValueError("null in place of a text")
        lengths = np.array([len(row) for row in rows.ids], np.int64)
        padded = np.maximum(1, -(-lengths // PAD)) * PAD
        found = np.empty((len(rows), self.width), np.float32)
        for places, width in _calls(padded):
            ids, mask = (np.zeros((len(places), width), np.int64) for _ in range(2))
            for row, place in enumerate(places):
                ids[row, : lengths[place]] = rows.ids[place]
                mask[row, : lengths[place]] = 1
            found[places] = self._embed(ids, mask)
        self._count(tokens=int(lengths.sum()), padded_tokens=int((padded - lengths).sum()))
        return found

    def _embed(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        torch, pooling = self._torch, self._files.pooling
        with torch.inference_mode():
            seen = torch.from_numpy(mask)
            hidden = self._model(input_ids=torch.from_numpy(ids), attention_mask=seen).last_hidden_state
            weights = seen.unsqueeze(-1).to(hidden.dtype)
            if pooling == "mean":
                vectors = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
            elif pooling == "max":
                vectors = hidden.masked_fill(weights == 0, -math.inf).max(1).values
            else:
                vectors = hidden[:, 0]
            if self._files.normalizes:
                vectors = torch.nn.functional.normalize(vectors, dim=1)
            result: np.ndarray = vectors.numpy()
            return result

    def _count(self, **counts: int) -> None:
        known = getattr(self._counts, "usage", {})
        self._counts.usage = {name: known.get(name, 0) + count for name, count in counts.items()}

    def take_usage(self) -> dict[str, float]:
        """Return the tokens, and those of padding, that this thread has computed since the last call."""
        usage: dict[str, float] = getattr(self._counts, "usage", {})
        self._counts.usage = {}
        return usage


def _calls(padded: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the places of the rows of each call, and their padded length, by ascending length."""
    order = np.argsort(padded, kind="stable")
    widths, starts = np.unique(padded[order], return_index=True)
    for width, places in zip(widths.tolist(), np.split(order, starts[1:]), strict=True):
        rows = max(1, CALL_TOKENS // width)
        for start in range(0, len(places), rows):
            yield places[start : start + rows], width


def _tokenizer(files: EncoderFiles) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(files.tokenizer)
    tokenizer.no_padding()
    tokenizer.enable_truncation(files.longest)
    return tokenizer


FLAVOR = Flavor(
    "transformers",
    inspect,
    load,
    accepts=lambda head, names: is_encoder(names),
    accepts_folder=is_encoder,
    describe=describe,
    takes="frame",
    libraries=("torch", "transformers"),
    distributions=("torch", "transformers", "tokenizers"),
)
