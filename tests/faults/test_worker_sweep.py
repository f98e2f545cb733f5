"""A worker that dies at the k-th write or change of the file system of a partition, for every k.

Every second k per commit, every k with ``HYPOTHESIS_PROFILE=long``.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.common.checksum import checksum_bytes
from pipeline.jobs.receipts import Receipt
from pipeline.models.registry import resolve
from pipeline.plan.recipe import ColumnRule
from pipeline.scoring import checkpoint as part_file
from pipeline.scoring.partition import score_partition
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.examples import choose
from pipeline.testing.oracle import FEATURES, make_lake, oracle
from pipeline.testing.recipes import make_partition, make_recipe
from pipeline.testing.stores import Crash, Faults, faulty_os


def receipts(root: Path) -> list[Receipt]:
    folder = root / "rounds/0/receipts"
    found = [path for path in folder.glob("*.json") if not path.name.startswith(".")] if folder.exists() else []
    return [Receipt.from_json(path.read_bytes()) for path in found]


@pytest.mark.fault(2, 3)
def test_worker_death_at_any_operation_scores_the_partition_once(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = make_lake(tmp_path / "lake", rows=(1500, 300), row_group=400)
    schema = pq.read_schema(lake.files[0]).remove_metadata()
    version = resolve(ModelRef(str(model_path)))
    expected = oracle(lake.files, model_path)
    kept = expected[expected["age"] <= 80].reset_index(drop=True)
    partition = make_partition(*lake.files)
    faults = Faults()
    write = part_file.ChecksumFile.write

    def counted(file: part_file.ChecksumFile, data: bytes) -> int:
        # Buffered writes do not go through os.write.
        faults.step("write")
        return write(file, data)

    monkeypatch.setattr(part_file.ChecksumFile, "write", counted)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    k, before_receipt, after_receipt = 0, 0, 0
    while True:
        root = tmp_path / f"job-{k}"
        recipe = make_recipe(
            version, schema, directory=str(root), keep=("id",), features=FEATURES, batch_rows=512,
            source_rules=(ColumnRule("age", max=80),), fsync=True, row_group_rows=600,
        )  # fmt: skip
        faults = Faults(k)
        with suppress(Crash), faulty_os(faults):
            score_partition(recipe, partition)
        is_struck = faults.has_failed
        left = receipts(root)
        before_receipt, after_receipt = before_receipt + (not left), after_receipt + bool(left and is_struck)
        for receipt in left:
            check(root, receipt, kept)
        faults = Faults()
        again = score_partition(recipe, partition)
        assert [one.attempt for one in receipts(root)] == [again.attempt]
        assert not left or left[0].attempt == again.attempt, "what was done was done again"
        check(root, again, kept)
        if not is_struck:
            break
        k += choose(2, of=1)
    assert before_receipt > choose(7, of=15)
    assert after_receipt > 0, "it never died between its receipt and its end"


def check(root: Path, receipt: Receipt, kept: object) -> None:
    """Check that the files which a receipt names are complete."""
    assert receipt.rows.is_reconciled
    for file in (receipt.data, receipt.rejects):
        assert file is not None
        assert checksum_bytes((root / "rounds/0" / file.name).read_bytes()) == file.checksum
    assert receipt.data is not None
    table = pq.read_table(root / "rounds/0" / receipt.data.name)
    frame = kept[["id", "prediction"]]  # type: ignore[index]
    assert table.replace_schema_metadata(None).equals(
        pa.Table.from_pandas(frame, preserve_index=False)
        .cast(table.schema.remove_metadata())
        .replace_schema_metadata(None)
    )
