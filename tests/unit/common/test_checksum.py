"""Checksums of data files: algorithm by name, older files with SHA-256."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from pipeline.common.checksum import ChecksumFile, checksum_bytes, checksum_file, from_stored, short, to_older
from pipeline.errors import StateCorrupt
from pipeline.jobs.manifest import Manifest
from pipeline.jobs.receipts import Receipt
from pipeline.sinks.parquet.layout import SinkState, success_text

STORED = Path(__file__).parents[2] / "data" / "stored_job"
RECEIPT = STORED / "jobs/finished/rounds/0/receipts/00000.json"
DATA = bytes(range(256)) * 9000  # more than two reads of a file
SHA256 = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


class TestChecksum:
    def test_checksum_names_its_algorithm(self) -> None:
        assert checksum_bytes(DATA) == f"xxh3-128:{xxhash.xxh3_128_hexdigest(DATA)}"

    def test_writing_in_pieces_and_reading_give_the_same_checksum(self) -> None:
        out = io.BytesIO()
        file = ChecksumFile(out)
        for start in range(0, len(DATA), 70_001):
            file.write(DATA[start : start + 70_001])
        assert (out.getvalue(), file.size) == (DATA, len(DATA))
        assert file.checksum == checksum_bytes(DATA) == checksum_file(io.BytesIO(DATA), like=file.checksum)

    def test_file_with_sha256_is_checked_with_sha256(self) -> None:
        assert checksum_file(io.BytesIO(DATA), like=SHA256) == SHA256

    @pytest.mark.parametrize("place", [0, len(DATA) // 2, len(DATA) - 1])
    @pytest.mark.parametrize("like", [checksum_bytes(DATA), SHA256], ids=["current", "older"])
    def test_every_flipped_bit_changes_the_checksum(self, place: int, like: str) -> None:
        for bit in range(8):
            damaged = bytearray(DATA)
            damaged[place] ^= 1 << bit
            assert checksum_file(io.BytesIO(damaged), like=like) != like

    def test_unknown_algorithm_is_refused_by_name(self) -> None:
        with pytest.raises(ValueError, match=r"crc9:.*expected one of xxh3-128, sha256"):
            checksum_file(io.BytesIO(DATA), like="crc9:00")
        with pytest.raises(ValueError, match="crc9"):
            from_stored({"name": "a", "checksum": "crc9:00"})

    def test_messages_have_algorithm_and_first_digits(self) -> None:
        assert short("sha256:0123456789abcdef") == "sha256:0123456789ab…"


class TestStoredFormats:
    """Receipts, manifests and states of sinks that were written with SHA-256."""

    def test_receipt_of_version_2_has_its_sha256(self) -> None:
        receipt = Receipt.from_json(RECEIPT.read_bytes())
        assert receipt.data is not None
        assert receipt.data.checksum == f"sha256:{json.loads(RECEIPT.read_bytes())['data']['sha256']}"
        assert Receipt.from_json(receipt.to_json_bytes()) == receipt

    def test_receipt_with_unknown_algorithm_is_damaged(self) -> None:
        record = json.loads(RECEIPT.read_bytes())
        del record["data"]["sha256"]
        record["data"]["checksum"] = "crc9:00"
        with pytest.raises(StateCorrupt, match="crc9"):
            Receipt.from_json(json.dumps(record).encode())

    def test_manifest_of_version_1_has_its_sha256(self) -> None:
        manifest = Manifest.from_json((STORED / "jobs/finished/manifests/1.json").read_bytes())
        assert {file.checksum.partition(":")[0] for file in (*manifest.files, *manifest.rejects)} == {"sha256"}
        assert Manifest.from_json(manifest.to_json_bytes()) == manifest

    def test_state_of_version_1_keeps_its_bytes_and_its_success(self) -> None:
        data = (STORED / "scored-finished/_manifest.json").read_bytes()
        state = SinkState.from_json(data, where="here")
        assert all(file.checksum.startswith("sha256:") for file in state.files)
        assert state.to_json_bytes() == data
        assert success_text(state) == (STORED / "scored-finished/_SUCCESS").read_bytes()

    def test_state_with_newer_files_has_version_2_and_both_checksums(self) -> None:
        state = SinkState.from_json((STORED / "scored-finished/_manifest.json").read_bytes(), where="here")
        (publication,) = state.publications
        first, *others = publication.files
        newer = replace(publication, files=(replace(first, checksum=checksum_bytes(DATA)), *others))
        text = SinkState((newer,), state.schema).to_json_bytes()
        assert json.loads(text)["schema_version"] == 2
        assert SinkState.from_json(text, where="here").publications == (newer,)

    def test_empty_checksum_of_files_without_a_job_is_kept(self) -> None:
        assert from_stored(to_older({"name": "a", "checksum": ""})) == {"name": "a", "checksum": ""}
