"""Score a partition: files, receipt, rejects, and several attempts."""

from __future__ import annotations

import logging
import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.common import warn_once
from pipeline.common.checksum import checksum_bytes
from pipeline.common.rows import RowCounts
from pipeline.common.sketch import Sketches
from pipeline.common.step_output import OutputLine
from pipeline.errors import (
    DiskFull,
    InputChanged,
    InputError,
    ModelDigestMismatch,
    PlanMismatch,
    ReconciliationFailed,
    SchemaDrift,
    StepFailed,
)
from pipeline.jobs.receipts import Receipt
from pipeline.models.flavors.xgboost import XGBoostPredictor
from pipeline.models.model import ModelVersion
from pipeline.models.registry import resolve
from pipeline.plan.recipe import ColumnRule, MapRecipe, StageRecipe
from pipeline.scoring import checkpoint as part_file
from pipeline.scoring import partition
from pipeline.scoring import partition as reread
from pipeline.scoring.checkpoint import dictionary_columns
from pipeline.scoring.frames import score_pandas, score_to_frame, scored_meta
from pipeline.scoring.partition import score_partition
from pipeline.spec.model_ref import ModelRef
from pipeline.spec.parts import Errors
from pipeline.spec.score import Output
from pipeline.storage.local import LocalStore
from pipeline.testing.fake_device import FakeGpu, installed
from pipeline.testing.oracle import FEATURES, Lake, make_lake, oracle
from pipeline.testing.recipes import make_partition, make_recipe

COLUMNS = ("id", *FEATURES, "name", "tags", "price", "seen", "segment")


@pytest.fixture(scope="module")
def version(model_path: Path) -> ModelVersion:
    return resolve(ModelRef(str(model_path)))


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """Make a lake of the sizes that the tests below count on."""
    return make_lake(tmp_path / "lake", rows=(3000, 500, 1200, 40), row_group=700)


@pytest.fixture
def make(version: ModelVersion, lake: Lake, tmp_path: Path) -> Callable[..., StageRecipe]:
    schema = pq.read_schema(lake.files[0]).remove_metadata()

    def recipe(**fields: Any) -> StageRecipe:
        return make_recipe(version, schema, directory=str(tmp_path / "job"), **{"batch_rows": 512, **fields})

    return recipe


def output_of(recipe: StageRecipe, receipt: Receipt) -> pa.Table:
    assert receipt.data is not None
    return pq.read_table(Path(recipe.directory) / "rounds" / "0" / receipt.data.name, page_checksum_verification=True)


def files_of(recipe: StageRecipe) -> list[str]:
    root = Path(recipe.directory)
    return sorted(str(path.relative_to(root / "rounds" / "0")) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("batch_rows", [100, 512, 100_000])
def test_a_partition_equals_the_oracle(
    make: Callable[..., StageRecipe], lake: Lake, version: ModelVersion, batch_rows: int
) -> None:
    recipe = make(batch_rows=batch_rows, row_group_rows=1000)
    receipt = score_partition(recipe, make_partition(*lake.files))
    found = output_of(recipe, receipt)
    wanted = oracle(lake.files, Path(version.uri))
    pd.testing.assert_frame_equal(found.to_pandas(), wanted, check_exact=True)
    source = pa.concat_tables([pq.read_table(file) for file in lake.files])
    kept = found.select(source.column_names)
    assert kept.schema.remove_metadata().equals(source.schema.remove_metadata())
    assert repr(kept.to_pylist()) == repr(source.to_pylist())
    assert receipt.rows == RowCounts(lake.rows, lake.rows, 0, 0)


class TestOnGpu:
    @pytest.mark.parametrize(
        ("device_rows", "memory", "batch_rows", "largest"),
        [
            (2048, 1 << 30, 2048, 2048),
            (0, 1 << 30, 512, 512),
            (256, 1 << 30, 1024, 512),
            # Room for 1,024 rows of 9 features at a time.
            (4096, 64 << 10, 1024, 1024),
        ],
    )
    def test_batches_are_as_large_as_the_gpu_takes(
        self,
        make: Callable[..., StageRecipe],
        lake: Lake,
        version: ModelVersion,
        device_rows: int,
        memory: int,
        batch_rows: int,
        largest: int,
    ) -> None:
        """But no smaller than on a CPU; the receipt has what fits on the GPU."""
        recipe = make(device="cuda", device_batch_rows=device_rows)
        with installed(FakeGpu(memory=memory)) as opened:
            receipt = score_partition(recipe, make_partition(*lake.files))
        wanted = oracle(lake.files, Path(version.uri))
        pd.testing.assert_frame_equal(output_of(recipe, receipt).to_pandas(), wanted, check_exact=True)
        assert receipt.device == "GPU-fake-1"
        assert receipt.batch_rows == min(batch_rows, max(device_rows, 512))
        assert opened[0].largest == largest

    def test_rows_with_infinite_values_are_rejected_as_on_a_cpu(
        self, make: Callable[..., StageRecipe], lake: Lake, tmp_path: Path
    ) -> None:
        """The GPU tells that there are some; then the host finds them, and the other rows are sent again."""
        table = pq.read_table(lake.files[0])
        values = table.column("balance").to_numpy().copy()
        values[[5, 900]] = [np.inf, -np.inf]
        changed = table.set_column(table.schema.get_field_index("balance"), "balance", pa.array(values))
        pq.write_table(changed, lake.files[0])
        rules = (ColumnRule("balance", finite=True),)
        found = {}
        for device in ("cpu", "cuda"):
            recipe = replace(make(device=device, source_rules=rules), directory=str(tmp_path / device))
            with installed() as opened:
                receipt = score_partition(recipe, make_partition(*lake.files))
            found[device] = output_of(recipe, receipt).to_pandas()
            assert receipt.reasons == {"contract:balance:finite": 2}
        pd.testing.assert_frame_equal(found["cuda"], found["cpu"], check_exact=True)
        batches = -(-lake.rows // 512)
        assert opened[0].looks >= batches

    def test_batch_on_the_cpu_is_that_of_the_plan(self, make: Callable[..., StageRecipe], lake: Lake) -> None:
        receipt = score_partition(make(device="auto", device_batch_rows=4096), make_partition(*lake.files))
        assert (receipt.device, receipt.batch_rows) == ("", 512)


def test_written_row_group_ends_where_its_bytes_are_reached(make: Callable[..., StageRecipe], lake: Lake) -> None:
    """Also of rows that are wider than planned, and of the rejects, so that a worker with little memory holds few."""
    recipe = make(source_rules=(ColumnRule("age", max=40),), batch_rows=256, row_group_bytes=20_000)
    receipt = score_partition(recipe, make_partition(*lake.files))
    for file in (receipt.data, receipt.rejects):
        assert file is not None
        footer = pq.read_metadata(Path(recipe.directory) / "rounds" / "0" / file.name)
        sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        assert sum(sizes) == file.rows
        assert len(sizes) > 2
        assert max(sizes) <= 1024


def test_receipt_agrees_with_the_files(make: Callable[..., StageRecipe], lake: Lake) -> None:
    recipe = make(source_rules=(ColumnRule("age", max=80),), filter="id != 7")
    receipt = score_partition(recipe, make_partition(*lake.files))
    ages = pa.concat_tables([pq.read_table(file) for file in lake.files])["age"].to_numpy()
    bad = int((np.delete(ages, 7) > 80).sum())
    assert receipt.rows == RowCounts(lake.rows, lake.rows - bad - 1, bad, 1)
    assert [Path(file.path) for file in receipt.files] == list(lake.files)
    assert RowCounts.total(file.rows for file in receipt.files) == receipt.rows
    assert receipt.reasons == {"contract:age:max": bad}
    root = Path(recipe.directory) / "rounds" / "0"
    assert receipt.data is not None
    assert receipt.rejects is not None
    for file, rows in ((receipt.data, receipt.rows.output), (receipt.rejects, receipt.rows.rejected)):
        data = (root / file.name).read_bytes()
        assert file.name.endswith(f"/00000-{receipt.attempt}.parquet")
        assert (file.rows, file.bytes, file.checksum) == (rows, len(data), checksum_bytes(data))
    assert Receipt.from_json((root / "receipts" / "00000.json").read_bytes()) == receipt
    assert files_of(recipe) == sorted([receipt.data.name, receipt.rejects.name, "receipts/00000.json"])
    assert receipt.seconds.total > 0
    assert receipt.seconds.read > 0
    assert receipt.seconds.score > 0
    assert receipt.seconds.write > 0


def test_receipt_has_the_distributions_of_its_rows(make: Callable[..., StageRecipe], lake: Lake) -> None:
    recipe = make(sketch_every=1, filter="id != 7")
    receipt = score_partition(recipe, make_partition(*lake.files))
    root = Path(recipe.directory) / "rounds" / "0"
    assert receipt.data is not None
    written = Sketches()
    written.add(pq.read_table(root / receipt.data.name).select([*recipe.sketched_features, *recipe.score_columns]))
    stored = Receipt.from_json((root / "receipts" / "00000.json").read_bytes())
    assert stored.sketches == receipt.sketches == written.pack()
    apart = Sketches()
    for number, file in enumerate(lake.files):
        apart.add_packed(score_partition(recipe, make_partition(file, id=f"1000{number}")).sketches)
    assert apart.pack() == written.pack()


def test_rejects_say_where_they_are_from(make: Callable[..., StageRecipe], lake: Lake) -> None:
    recipe = make(source_rules=(ColumnRule("id", allowed=tuple(i for i in range(lake.rows) if i not in (5, 3007))),))
    receipt = score_partition(recipe, make_partition(*lake.files))
    assert receipt.rejects is not None
    rejects = pq.read_table(Path(recipe.directory) / "rounds" / "0" / receipt.rejects.name)
    assert rejects.column_names == [*COLUMNS, "_file", "_row", "_reason", "_message"]
    rows = rejects.select(["id", "_file", "_row", "_reason"]).to_pylist()
    assert rows == [
        {"id": 5, "_file": str(lake.files[0]), "_row": 5, "_reason": "contract:id:allowed"},
        {"id": 3007, "_file": str(lake.files[1]), "_row": 7, "_reason": "contract:id:allowed"},
    ]


def test_files_name_their_job_plan_and_model(
    make: Callable[..., StageRecipe], lake: Lake, version: ModelVersion
) -> None:
    recipe = make()
    metadata = output_of(recipe, score_partition(recipe, make_partition(lake.files[3]))).schema.metadata
    assert metadata[b"pipeline.job"] == b"job-1"
    assert metadata[b"pipeline.plan"] == recipe.plan.encode()
    assert version.digest.encode() in metadata[b"pipeline.model"]


def test_state_is_private_whatever_the_umask(make: Callable[..., StageRecipe], lake: Lake) -> None:
    before = os.umask(0)
    try:
        recipe = make()
        score_partition(recipe, make_partition(lake.files[3]))
    finally:
        os.umask(before)
    for path in (Path(recipe.directory), *Path(recipe.directory).rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_a_partition_that_is_done_is_not_opened_again(make: Callable[..., StageRecipe], lake: Lake) -> None:
    recipe = make()
    whole = make_partition(*lake.files)
    receipt = score_partition(recipe, whole)
    before = files_of(recipe)
    for file in lake.files:
        file.unlink()
    assert score_partition(recipe, whole) == receipt
    assert files_of(recipe) == before


def test_the_loser_of_a_race_removes_its_files(
    make: Callable[..., StageRecipe], lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, whole = make(source_rules=(ColumnRule("age", max=80),)), make_partition(*lake.files)
    winner: list[Receipt] = []
    real = partition._Attempt.score

    def run(self: Any, *args: Any, **options: Any) -> Receipt:
        receipt = real(self, *args, **options)
        if not winner:
            winner.append(receipt)  # not yet: the nested call below sees no receipt either
            winner[0] = score_partition(recipe, whole)
        return receipt

    monkeypatch.setattr(partition._Attempt, "score", run)
    assert score_partition(recipe, whole) == winner[0]
    assert winner[0].data is not None
    assert winner[0].rejects is not None
    assert files_of(recipe) == sorted([winner[0].data.name, winner[0].rejects.name, "receipts/00000.json"])


def test_a_receipt_of_another_plan_is_refused(make: Callable[..., StageRecipe], lake: Lake) -> None:
    score_partition(make(), make_partition(lake.files[3]))
    with pytest.raises(PlanMismatch, match="another plan"):
        score_partition(make(plan="1" * 64), make_partition(lake.files[3]))


class FailingStore:
    """Fails at the n-th write of a file or receipt, from 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.left = at
        real_write = part_file.ChecksumFile.write
        real_put = LocalStore.put_if_absent

        def write(file: Any, data: bytes) -> int:
            if not file.is_abandoned:  # the Parquet library closes a file of an earlier attempt when it is collected
                self.count()
            return real_write(file, data)

        def put(store: Any, name: str, data: bytes) -> bool:
            self.count()
            return real_put(store, name, data)

        monkeypatch.setattr(part_file.ChecksumFile, "write", write)
        monkeypatch.setattr(LocalStore, "put_if_absent", put)

    def count(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise OSError(28, "No space left on device")


@pytest.mark.fault(30)
def test_failed_write_leaves_nothing_and_the_next_attempt_works(
    make: Callable[..., StageRecipe], lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_partition(*lake.files)
    recipe = make(source_rules=(ColumnRule("age", max=80),), keep=("id",), row_group_rows=2000)
    at = 0
    while True:
        with monkeypatch.context() as patch:
            FailingStore(patch, at)
            try:
                receipt = score_partition(recipe, whole)
                break
            except (DiskFull, OSError) as error:
                left = [name for name in files_of(recipe) if not name.startswith("receipts/")]
                if isinstance(error, DiskFull):
                    assert left == [], f"after write {at}"
                for name in left:  # the receipt's outcome was unknown, so that the files stay
                    (Path(recipe.directory) / "rounds" / "0" / name).unlink()
        at += 1
    assert at > 20
    assert receipt.rows.is_reconciled
    assert len(files_of(recipe)) == 3


def test_a_step_that_breaks_leaves_no_file(make: Callable[..., StageRecipe], lake: Lake, in_folder: Path) -> None:
    (in_folder / "late_features.py").write_text(
        "def build(frame):\n    if (frame['id'] > 2500).any():\n        return None\n    return frame\n"
    )
    recipe = make(maps=[MapRecipe("late_features:build")], row_group_rows=500)
    with pytest.raises(StepFailed, match="must return a DataFrame"):
        score_partition(recipe, make_partition(*lake.files))
    assert files_of(recipe) == []


def test_errors_of_a_step_are_not_taken_for_storage(
    make: Callable[..., StageRecipe], lake: Lake, in_folder: Path
) -> None:
    (in_folder / "net_features.py").write_text(
        "def build(frame):\n"
        "    if (frame['id'] > 2500).any():\n"
        "        raise ConnectionError('lookup')\n"
        "    return frame\n"
    )
    recipe = make(maps=[MapRecipe("net_features:build")], row_group_rows=500)
    with pytest.raises(ConnectionError, match="lookup"):
        score_partition(recipe, make_partition(*lake.files))
    assert files_of(recipe) == []


def test_prints_of_steps_and_models_are_kept_with_their_partition(
    make: Callable[..., StageRecipe],
    lake: Lake,
    version: ModelVersion,
    in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (in_folder / "loud_features.py").write_text(
        "import warnings\n"
        "print('imported')\n"
        "def build(frame):\n"
        "    print(len(frame), 'rows')\n"
        "    warnings.warn('old')\n"
        "    return None if len(frame) == 3 else frame\n"
    )
    predict = XGBoostPredictor.predict

    def loud(self: XGBoostPredictor, *arguments: Any, **options: Any) -> Any:
        print("predicting")
        return predict(self, *arguments, **options)

    monkeypatch.setattr(XGBoostPredictor, "predict", loud)
    monkeypatch.setattr(warnings, "filters", [])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(logging, "lastResort", logging.NullHandler())
    warn_once.install()
    recipe, seen = make(maps=[MapRecipe("loud_features:build")]), list[OutputLine]()
    (step, score) = recipe.chain
    recipe = replace(recipe, chain=(step, replace(score, engine="library")))
    receipt = score_partition(recipe, make_partition(*lake.files), on_message=seen.append)
    counts = {(count.step, count.kind, count.place): count.count for count in receipt.messages}
    printed = counts["loud_features:build", "print", "loud_features.py:4"]
    assert printed > 1
    assert counts["loud_features:build", "warning", "loud_features.py:5"] == printed
    assert counts["", "print", "loud_features.py:2"] == 1
    assert sum(count for (step, _, _), count in counts.items() if step == version.name) > 0
    assert len(seen) == len(counts)
    (path,) = Path(recipe.directory, "logs", "partitions").iterdir()
    assert path.name == f"{receipt.partition}-{receipt.attempt}.jsonl"
    assert len(path.read_text().splitlines()) == sum(counts.values())
    assert Receipt.from_json(receipt.to_json_bytes()) == receipt


def test_map_steps_equal_the_oracle(
    make: Callable[..., StageRecipe], lake: Lake, version: ModelVersion, in_folder: Path
) -> None:
    def build(frame: pd.DataFrame) -> pd.DataFrame:
        frame["balance"] = frame["balance"].fillna(0) * 2
        frame = frame[frame["id"] % 5 != 0]
        return frame.assign(wealth=frame["balance"] / frame["age"])

    (in_folder / "equal_features.py").write_text(
        "def build(frame):\n"
        "    frame['balance'] = frame['balance'].fillna(0) * 2\n"
        "    frame = frame[frame['id'] % 5 != 0]\n"
        "    return frame.assign(wealth=frame['balance'] / frame['age'])\n"
    )
    schema = pq.read_schema(lake.files[0]).remove_metadata().append(pa.field("wealth", pa.float64()))
    recipe = make(maps=[MapRecipe("equal_features:build")], frame=schema)
    receipt = score_partition(recipe, make_partition(*lake.files))
    wanted = oracle(lake.files, Path(version.uri), steps=[build])
    pd.testing.assert_frame_equal(output_of(recipe, receipt).to_pandas(), wanted, check_exact=True)
    assert receipt.rows.filtered == lake.rows - len(wanted)
    assert receipt.seconds.steps > 0


@pytest.mark.fault(40)
def test_changed_input_is_refused(make: Callable[..., StageRecipe], lake: Lake) -> None:
    versions = {str(file): (file.stat().st_size, f"mtime:{file.stat().st_mtime_ns}") for file in lake.files}
    os.utime(lake.files[2], ns=(1, 1))
    recipe = make()
    with pytest.raises(InputChanged):
        score_partition(recipe, make_partition(*lake.files), versions)
    assert files_of(recipe) == []


@pytest.mark.fault(41)
def test_a_changed_model_is_refused(make: Callable[..., StageRecipe], lake: Lake, version: ModelVersion) -> None:
    recipe = make()
    other = replace(recipe, chain=(replace(recipe.scores[0], model=replace(version, digest="f" * 64)),))
    with pytest.raises(ModelDigestMismatch):
        score_partition(other, make_partition(lake.files[0]))
    assert files_of(recipe) == []


def test_missing_rows_do_not_reconcile(
    make: Callable[..., StageRecipe], lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reread.read_batches
    monkeypatch.setattr(reread, "read_batches", lambda *a, **o: (b for n, b in enumerate(real(*a, **o)) if n != 2))
    recipe = make()
    with pytest.raises(ReconciliationFailed, match="unaccounted") as caught:
        score_partition(recipe, make_partition(*lake.files))
    assert str(lake.files[0]) in caught.value.where
    assert files_of(recipe) == []


def test_without_rows_there_is_a_receipt_and_no_file(make: Callable[..., StageRecipe], lake: Lake) -> None:
    recipe = make(filter="id < 0")
    receipt = score_partition(recipe, make_partition(*lake.files))
    assert (receipt.data, receipt.rejects) == (None, None)
    assert receipt.rows == RowCounts(lake.rows, 0, 0, lake.rows)
    assert files_of(recipe) == ["receipts/00000.json"]


def test_memory_does_not_grow_with_the_partition(
    make: Callable[..., StageRecipe], tmp_path: Path, version: ModelVersion
) -> None:
    schema = pa.schema([(name, pa.float32()) for name in (*FEATURES, *(f"x{i}" for i in range(20)))])

    def peak(groups: int) -> int:
        path = tmp_path / f"{groups}.parquet"
        columns = [np.random.default_rng(i).random(20_000, np.float32) for i in range(len(schema))]
        with pq.ParquetWriter(path, schema) as writer:
            for _ in range(groups):
                writer.write_table(pa.table(columns, schema=schema))
        recipe = make_recipe(
            version, schema, directory=str(tmp_path / f"job-{groups}"), batch_rows=4096, row_group_rows=16_384
        )
        pool = pa.proxy_memory_pool(pa.default_memory_pool())
        before = pa.default_memory_pool()
        pa.set_memory_pool(pool)
        try:
            receipt = score_partition(recipe, make_partition(path))
        finally:
            pa.set_memory_pool(before)
        assert receipt.rows.output == groups * 20_000
        return int(pool.max_memory())

    assert peak(8) < 1.25 * peak(2)


def test_score_to_frame_is_the_output_before_it_is_written(
    make: Callable[..., StageRecipe], lake: Lake, version: ModelVersion
) -> None:
    recipe = make(source_rules=(ColumnRule("age", max=80),))
    frame = score_to_frame(recipe, make_partition(*lake.files))
    wanted = oracle(lake.files, Path(version.uri))
    pd.testing.assert_frame_equal(frame, wanted[wanted["age"] <= 80].reset_index(drop=True), check_exact=True)
    bad = int((wanted["age"] > 80).sum())
    assert frame.attrs["rows"] == {"in": lake.rows, "out": lake.rows - bad, "rejected": bad, "filtered": 0}
    assert frame.attrs["reasons"] == {"contract:age:max": bad}
    assert not Path(recipe.directory).exists()
    meta = scored_meta(recipe)
    assert len(meta) == 0
    assert list(meta.columns) == list(frame.columns)
    empty = score_to_frame(make(filter="id < 0"), make_partition(*lake.files))
    pd.testing.assert_frame_equal(empty, meta)


def test_score_pandas_adds_the_output(lake: Lake, version: ModelVersion) -> None:
    frame = pq.read_table(lake.files[0]).to_pandas().set_index("id")
    scored = score_pandas(frame, version, output=Output(column="p"))
    wanted = oracle(lake.files[:1], Path(version.uri), output="p").set_index("id")
    pd.testing.assert_frame_equal(scored, wanted, check_exact=True)
    assert "p" not in frame
    labels = score_pandas(
        frame.rename(columns={"age": "years"}),
        version,
        features=("years", *FEATURES[1:]),
        output=Output(column="c", kind="label"),
    )
    assert (labels["c"] == (wanted["p"] > 0.5)).all()
    empty = score_pandas(frame.iloc[:0], version, output=Output(column="p"))
    assert empty["p"].dtype == np.float32


def test_score_pandas_refuses_what_cannot_be_scored(lake: Lake, version: ModelVersion) -> None:
    frame = pq.read_table(lake.files[0]).to_pandas()
    with pytest.raises(SchemaDrift, match="lacks features"):
        score_pandas(frame.drop(columns="age"), version, output=Output(column="p"))
    with pytest.raises(SchemaDrift, match="the model cannot take"):
        score_pandas(frame.assign(age=frame["name"]), version, output=Output(column="p"))
    with pytest.raises(InputError, match="rows cannot be scored") as caught:
        score_pandas(frame.assign(balance=np.where(frame.index == 9, np.inf, 1.0)), version, output=Output(column="p"))
    assert caught.value.where.startswith("row 9 ")


def test_dictionaries_are_for_what_repeats() -> None:
    schema = pa.schema(
        [
            ("text", pa.string()),
            ("float", pa.float32()),
            ("id", pa.int64()),
            ("small", pa.int8()),
            ("day", pa.date32()),
            ("kind", pa.dictionary(pa.int32(), pa.string())),
        ]
    )
    assert dictionary_columns(schema) == ["text", "small", "day", "kind"]


def test_masked_rejects(
    make: Callable[..., StageRecipe], lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte of a file of rejects has a value of a column that is not kept."""
    monkeypatch.setenv("REJECT_KEY", "k" * 32)
    errors = Errors.model_validate({"keep_columns": ["price"], "hash_columns": ["name"], "hash_key": "env:REJECT_KEY"})
    table = pq.read_table(lake.files[0])
    names = [f"Ann Onym {number}" for number in range(table.num_rows)]
    table = table.set_column(table.column_names.index("name"), "name", pa.array(names))
    feature = FEATURES[0]
    infinite = pa.array([float("inf")] * table.num_rows, pa.float64())
    path = tmp_path / "bad.parquet"
    pq.write_table(table.set_column(table.column_names.index(feature), feature, infinite), path)
    schema = pq.read_schema(path).remove_metadata()
    recipe = replace(make(), schema=schema.serialize().to_pybytes(), errors=errors)
    receipt = score_partition(recipe, make_partition(path))
    assert receipt.rejects
    stored = Path(recipe.directory, "rounds/0", receipt.rejects.name)
    found = pq.read_table(stored)
    assert set(found.column_names) == {"price", "name", "_file", "_row", "_reason", "_message"}
    assert b"Onym" not in stored.read_bytes()
    assert b" inf" not in stored.read_bytes()
    assert set(map(len, found["name"].to_pylist())) == {64}
