"""Encoders of texts: their files, padding, and the vectors of the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.errors import ModelError, SchemaDrift
from pipeline.models.cache import get_predictor
from pipeline.models.engines import EngineUse
from pipeline.models.flavors.transformers import CALL_TOKENS, _calls
from pipeline.models.flavors.transformers_file import is_encoder, pack_folder, read_encoder
from pipeline.models.model import ModelVersion
from pipeline.models.registry import resolve
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.inline import plan_inline, publish_inline, score_inline

FILES = {
    "config.json": b'{"model_type": "bert", "max_position_embeddings": 64}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"",
    "modules.json": json.dumps(
        [
            {"type": "sentence_transformers.models.Transformer", "path": ""},
            {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
            {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
        ]
    ).encode(),
    "1_Pooling/config.json": b'{"word_embedding_dimension": 8, "pooling_mode_cls_token": true}',
    "sentence_bert_config.json": b'{"max_seq_length": 256, "do_lower_case": true}',
}


def packed() -> bytes:
    return pack_folder(list(FILES), FILES.__getitem__)


class TestFiles:
    def test_what_they_say(self) -> None:
        found = read_encoder(packed(), where="")
        assert (found.pooling, found.normalizes, found.lower, found.longest) == ("cls", True, True, 64)

    def test_without_modules_the_mean_is_taken(self) -> None:
        files = {name: data for name, data in FILES.items() if name != "modules.json"}
        found = read_encoder(pack_folder(list(files), files.__getitem__), where="")
        assert (found.pooling, found.normalizes) == ("mean", False)

    @pytest.mark.parametrize(
        ("name", "data", "text"),
        [
            ("config.json", b'{"model_type": "x", "auto_map": {"AutoModel": "code.py"}}', "not known"),
            ("config.json", b"{", "damaged"),
            ("modules.json", b'[{"type": "sentence_transformers.models.Dense", "path": "2"}]', "not known"),
            ("1_Pooling/config.json", b'{"pooling_mode_weightedmean_tokens": true}', "damaged"),
        ],
    )
    def test_others_are_refused(self, name: str, data: bytes, text: str) -> None:
        files = FILES | {name: data}
        with pytest.raises(ModelError, match=text):
            read_encoder(pack_folder(list(files), files.__getitem__), where="")

    def test_equal_folders_have_equal_archives(self) -> None:
        assert packed() == packed()
        assert is_encoder(list(FILES))
        assert not is_encoder(["config.json", "pytorch_model.bin", "tokenizer.json"])


def test_rows_of_one_padded_length_share_calls() -> None:
    padded = np.array([32, 16, 48, 16] * 200)
    calls = list(_calls(padded))
    assert sorted(np.concatenate([places for places, _ in calls]).tolist()) == list(range(800))
    assert all((padded[places] == width).all() and len(places) * width <= CALL_TOKENS for places, width in calls)
    assert len(calls) == 2 + 2 + 3


def test_usage_is_added_and_left_out_where_there_is_none() -> None:
    used = EngineUse(usage={"tokens": 3.0}) + EngineUse(usage={"tokens": 4.0, "padded_tokens": 1.0})
    assert EngineUse.from_dict(used.to_dict()).usage == {"padded_tokens": 1.0, "tokens": 7.0}
    assert "usage" not in EngineUse().to_dict()


WORDS = ("late", "paid", "open", "refund", "order")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small encoder with random weights."""
    reason = "not in the extra dev: PyTorch's wheel has 550 MB"
    torch: Any = pytest.importorskip("torch", reason=reason)
    transformers: Any = pytest.importorskip("transformers", reason=reason)
    import safetensors.torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    safetensors.torch.save_file(transformers.BertModel(config).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(config.to_json_string())
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {word: at for at, word in enumerate(WORDS, 1)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("modules.json", "1_Pooling/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(FILES[name].replace(b"cls_token", b"mean_tokens"))
    return folder


@pytest.fixture(scope="module")
def version(encoder: Path) -> ModelVersion:
    return resolve(ModelRef(str(encoder)))


def sentences(rows: int) -> list[str]:
    random = np.random.default_rng(3)
    return [" ".join(random.choice(WORDS, random.integers(1, 60))) for _ in range(rows)]


def expected_of(folder: Path, texts: list[str]) -> np.ndarray:
    """Return what transformers gives for one text at a time, without padding."""
    import torch
    import transformers
    from tokenizers import Tokenizer

    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    with torch.inference_mode():
        for text in texts:
            hidden = model(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state
            found.append(torch.nn.functional.normalize(hidden.mean(1), dim=1)[0].numpy())
    return np.stack(found)


class TestVectors:
    def test_promise_is_exact(self, version: ModelVersion) -> None:
        assert (version.flavor, version.promise and version.promise.kind) == ("transformers", "exact")
        assert (version.output_types[0].width, version.output_types[0].is_list) == (16, True)

    def test_they_are_those_of_the_library(self, encoder: Path, version: ModelVersion) -> None:
        texts = sentences(40)
        scored = pipeline.score(pd.DataFrame({"text": texts}), encoder, output="v")
        found = np.stack(scored["v"].to_list())
        np.testing.assert_allclose(found, expected_of(encoder, texts), atol=5e-7)

    def test_bits_do_not_depend_on_the_batch(self, version: ModelVersion) -> None:
        predictor, _ = get_predictor(version)
        rows = predictor.encode(pa.table({"text": sentences(90)}))
        whole = predictor.predict(rows, kind="prediction")
        order = np.random.default_rng(1).permutation(90)
        assert np.array_equal(predictor.predict(rows[order], kind="prediction"), whole[order])
        parts = [predictor.predict(rows[start : start + 7], kind="prediction") for start in range(0, 90, 7)]
        assert np.array_equal(np.concatenate(parts), whole)

    def test_job_rejects_nulls_and_reports_padding(self, encoder: Path, tmp_path: Path) -> None:
        pq.write_table(pa.table({"note": ["late paid", None, "open order refund"]}), tmp_path / "a.parquet")
        spec = JobSpec.model_validate(
            {
                "name": "embed",
                "source": {"path": str(tmp_path / "a.parquet")},
                "steps": [{"score": {"model": str(encoder), "features": ["note"], "output": "v"}}],
                "sink": {"path": str(tmp_path / "out")},
                "errors": {"max_fraction": 1.0},
            }
        )
        job = score_inline(plan_inline(spec, directory=tmp_path / "jobs"), directory=tmp_path / "jobs", job="e-1")
        publish_inline(job)
        (receipt,) = job.ledger().done
        assert receipt.reasons == {"score:ValueError": 1}
        assert receipt.engine is not None
        assert receipt.engine.usage["tokens"] >= 5
        found = pq.read_table(tmp_path / "out")
        assert found.schema.field("v").type == pa.list_(pa.float32(), 16)
        assert found.num_rows == 2

    def test_number_for_a_text(self, encoder: Path) -> None:
        with pytest.raises(SchemaDrift) as caught:
            pipeline.score(pd.DataFrame({"text": [1.0]}), encoder)
        assert caught.value.expected == "texts"

    def test_registry_keeps_an_archive(self, encoder: Path, version: ModelVersion, tmp_path: Path) -> None:
        registry = pipeline.Registry(tmp_path / "models")
        registry.register(encoder, name="minilm", alias="best")
        found = registry.resolve("models:/minilm@best")
        assert (found.flavor, found.output_types, found.files) == ("transformers", version.output_types, ())
        predictor, _ = get_predictor(found)
        rows = predictor.encode(pa.table({"text": ["late order"]}))
        other, _ = get_predictor(version)
        assert np.array_equal(predictor.predict(rows, kind="prediction"), other.predict(rows, kind="prediction"))
