from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.errors import CorruptInput, SchemaDrift, SpecError
from pipeline.execution.frame_checkpoint import KeptPartition, frame_content, keep_partition

PARTITIONS = 6


@pytest.fixture(autouse=True)
def one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def people(rows: int = 600) -> pd.DataFrame:
    random = np.random.default_rng(3)
    return pd.DataFrame(
        {
            "key": np.arange(rows) % 7,
            "amount": random.random(rows, dtype=np.float32),
            "size": pd.Categorical(random.choice(["s", "m", "l"], rows), ["s", "m", "l"], ordered=True),
            "name": [f"n{n}" if n % 5 else None for n in range(rows)],
            "when": pd.date_range("2024-01-01", periods=rows, tz="Europe/Berlin"),
            "some": pd.array([n if n % 3 else None for n in range(rows)], "Int16"),
        },
        index=pd.Index(np.arange(rows) * 2, name="row"),
    )


def expected() -> pd.DataFrame:
    """Return the rows in Dask's types."""
    return dd.from_pandas(people(), npartitions=1).compute()


def in_order(made: dd.DataFrame) -> pd.DataFrame:
    rows = made.compute()
    return rows.sort_values(rows.columns[0], kind="stable").reset_index(drop=True)


def counted(part: pd.DataFrame, folder: str, *, fails: int | None = None) -> pd.DataFrame:
    """Return the partition, and leave a line for each time that it was computed."""
    if len(part):
        first = int(part.index[0])
        if fails is not None and not Path(folder, "mended").exists() and len(computed(Path(folder))) >= fails:
            raise ValueError("a bug in a step")
        with open(Path(folder) / "computed", "a") as file:
            file.write(f"{first}\n")
    return part


def computed(folder: Path) -> Counter[str]:
    file = folder / "computed"
    return Counter(file.read_text().split() if file.exists() else ())


def frame(folder: Path, **options: object) -> dd.DataFrame:
    made = dd.from_pandas(people(), npartitions=PARTITIONS)
    return made.map_partitions(counted, str(folder), meta=made._meta, **options)


def test_a_partition_is_computed_once(tmp_path):
    kept = pipeline.checkpoint(frame(tmp_path), tmp_path / "kept")
    again = pipeline.checkpoint(frame(tmp_path), tmp_path / "kept")
    assert set(computed(tmp_path).values()) == {1}
    assert len(computed(tmp_path)) == PARTITIONS
    for found in (kept, again):
        pd.testing.assert_frame_equal(found.compute(), expected())
        assert found.divisions == frame(tmp_path).divisions
        pd.testing.assert_series_equal(found.dtypes, frame(tmp_path).dtypes)
    assert set(computed(tmp_path).values()) == {1}, "reading computes nothing"


@pytest.mark.parametrize(
    "build",
    [
        lambda d: d[d.amount > 0.5],
        lambda d: d.merge(d.groupby("key").amount.mean().to_frame("mean").reset_index(), on="key"),
        lambda d: d.groupby("key").amount.sum().to_frame(),
        lambda d: d.assign(double=d.amount * 2).repartition(npartitions=4),
        lambda d: d[d.amount > 2],
        lambda d: d.assign(size=d["size"].cat.as_unknown()),
    ],
    ids=["filter", "join", "groupby", "repartition", "no rows", "unknown categories"],
)
def test_any_expression_equals_itself(tmp_path, build):
    expression = build(dd.from_pandas(people(), npartitions=PARTITIONS))
    for _ in range(2):
        kept = pipeline.checkpoint(expression, tmp_path)
        pd.testing.assert_frame_equal(in_order(kept), in_order(expression))
        assert kept.npartitions == expression.npartitions


def test_what_was_finished_before_an_error_is_not_computed_again(tmp_path):
    with pytest.raises(ValueError, match="a bug in a step") as caught:
        pipeline.checkpoint(frame(tmp_path, fails=3), tmp_path / "kept")
    assert "finished partitions are kept" in caught.value.__notes__[-1]
    done = computed(tmp_path)
    assert len(done) == 3
    (tmp_path / "mended").touch()
    kept = pipeline.checkpoint(frame(tmp_path, fails=3), tmp_path / "kept")
    assert sorted(computed(tmp_path).values()) == [1] * 5 + [2], "one is computed again, and compared"
    pd.testing.assert_frame_equal(kept.compute(), expected())


@pytest.mark.parametrize("kill_at", [0, 3, 5])
def test_a_killed_process_leaves_what_it_finished(tmp_path, kill_at):
    """The process is killed between a partition's file and its receipt."""
    code = """
import importlib, os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[4].split(os.pathsep)
import dask, pipeline
from pipeline.storage.local import LocalStore
frame = importlib.import_module(sys.argv[3]).frame
put = LocalStore.put_if_absent
def die(self, name, data):
    if name == f"receipts/{int(sys.argv[2]):05d}.json":
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, name, data)
LocalStore.put_if_absent = die
dask.config.set(scheduler="synchronous")
pipeline.checkpoint(frame(Path(sys.argv[1])), sys.argv[1] + "/kept")
"""
    arguments = [str(tmp_path), str(kill_at), __name__, os.pathsep.join(sys.path)]
    died = subprocess.run([sys.executable, "-c", code, *arguments], check=False)
    assert died.returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "kept").iterdir()
    finished = {int(path.stem) for path in folder.glob("receipts/*.json")}
    before = computed(tmp_path)
    kept = pipeline.checkpoint(frame(tmp_path), tmp_path / "kept")
    pd.testing.assert_frame_equal(kept.compute(), expected())
    again = {first for first, times in computed(tmp_path).items() if times > 1}
    checked = min(1, len(finished))
    assert len(before) - len(again) == len(finished) - checked, "what had no receipt, and one that is compared"
    assert len(list(folder.glob("data/*"))) == PARTITIONS, "the file without a receipt is gone"


def test_another_expression_is_computed_anew_beside_it(tmp_path, caplog):
    first = dd.from_pandas(people(), npartitions=2)
    pipeline.checkpoint(first, tmp_path)
    with caplog.at_level(logging.INFO, "pipeline"):
        other = pipeline.checkpoint(first.assign(amount=0.0), tmp_path)
    assert "another expression (expression" in caplog.text
    assert other.amount.sum().compute() == 0.0
    assert len(list(tmp_path.iterdir())) == 2
    pd.testing.assert_frame_equal(pipeline.checkpoint(first, tmp_path).compute(), expected())


def test_only_used_columns_are_read(tmp_path):
    kept = pipeline.checkpoint(dd.from_pandas(people(), npartitions=2), tmp_path)
    chosen = kept[["amount", "key"]]
    assert "columns=['amount', 'key']" in str(chosen.optimize().expr.tree_repr())
    pd.testing.assert_frame_equal(chosen.compute(), expected()[["amount", "key"]])


def test_of_two_attempts_the_first_receipt_counts(tmp_path):
    part = people(10)
    first = keep_partition(part, 4, str(tmp_path))
    assert keep_partition(part.iloc[:3], 4, str(tmp_path)) == first
    size = os.path.getsize(tmp_path / first.file)
    assert first == KeptPartition(4, first.file, 10, size, frame_content(part).to_dict())


def test_an_attempt_that_lost_the_race_removes_its_file(tmp_path, monkeypatch):
    from pipeline.execution import frame_checkpoint

    write = frame_checkpoint._write

    def slow(folder, name, table):
        size = write(folder, name, table)
        if not list(tmp_path.glob("receipts/*")):
            monkeypatch.setattr(frame_checkpoint, "_write", write)
            keep_partition(people(5), 1, str(tmp_path))
        return size

    monkeypatch.setattr(frame_checkpoint, "_write", slow)
    winner = keep_partition(people(10), 1, str(tmp_path))
    assert winner.rows == 5
    assert [path.name for path in tmp_path.glob("data/*")] == [winner.file.removeprefix("data/")]


@pytest.mark.parametrize("damage", ["remove", "cut", "flip", "other rows"])
def test_a_damaged_file_is_told_with_what_to_do(tmp_path, damage):
    kept = pipeline.checkpoint(dd.from_pandas(people(), npartitions=2), tmp_path)
    file = sorted(tmp_path.glob("*/data/*"))[1]
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[:-100])
    elif damage == "flip":
        data[pq.read_metadata(file).row_group(0).column(1).data_page_offset + 60] ^= 1
        file.write_bytes(data)
    else:
        pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(CorruptInput) as caught:
        kept.compute()
    assert caught.value.where.endswith(file.name)
    receipt = caught.value.next_step.removeprefix("remove ").partition(",")[0]
    os.remove(receipt)
    pd.testing.assert_frame_equal(
        pipeline.checkpoint(dd.from_pandas(people(), npartitions=2), tmp_path).compute(), expected()
    )


def test_values_that_parquet_cannot_hold_are_named(tmp_path):
    mixed = pd.DataFrame({"a": [1, "x", 2.0, None]}, dtype=object)
    with dask.config.set({"dataframe.convert-string": False}):
        expression = dd.from_pandas(mixed, npartitions=1)
    with pytest.raises(SchemaDrift) as caught:
        pipeline.checkpoint(expression, tmp_path)
    assert "column a" in caught.value.found
    assert caught.value.where == "partition 0 of a checkpoint"


@pytest.mark.parametrize("value", [people(3), dd.from_pandas(people(), npartitions=1).amount], ids=["pandas", "series"])
def test_only_dask_frames_have_a_checkpoint(tmp_path, value):
    with pytest.raises(SpecError, match="only a Dask DataFrame"):
        pipeline.checkpoint(value, tmp_path)


def test_the_folder_says_what_it_holds(tmp_path):
    expression = dd.from_pandas(people(), npartitions=2)
    pipeline.checkpoint(expression, tmp_path)
    (about,) = tmp_path.glob("*/checkpoint.json")
    record = json.loads(about.read_text())
    assert record["partitions"] == 2
    assert record["expression"] == expression.expr._name
    assert set(record["versions"]) == {"dask", "pandas", "pyarrow"}


def drawn(part: pd.DataFrame, folder: str) -> pd.DataFrame:
    """Return the partition with a number that is another one at each call; the third call fails once."""
    with open(Path(folder) / "drawn", "a") as file:
        file.write("x")
    calls = len(Path(folder, "drawn").read_text())
    if calls == 3:
        raise ValueError("a bug in a step")
    return part.assign(key=calls)


def test_pieces_of_runs_that_differ_are_not_mixed(tmp_path, caplog):
    made = dd.from_pandas(people(), npartitions=PARTITIONS)
    expression = made.map_partitions(drawn, str(tmp_path), meta=made._meta)
    with pytest.raises(ValueError, match="a bug"):
        pipeline.checkpoint(expression, tmp_path / "kept")
    kept = pipeline.checkpoint(expression, tmp_path / "kept")
    assert "computed again, has other values" in caplog.text
    (folder,) = (tmp_path / "kept").iterdir()
    assert json.loads((folder / "differs.json").read_text())["found"] == "other values in the same number of rows"
    keys = kept.map_partitions(lambda part: part.iloc[:1]).compute()["key"]
    assert max(keys) - min(keys) == PARTITIONS - 1, "all are of one run"
    pd.testing.assert_frame_equal(pipeline.checkpoint(expression, tmp_path / "kept").compute(), kept.compute())
    assert len((tmp_path / "drawn").read_text()) == max(keys), "the run in one piece is kept"


def test_receipts_of_earlier_versions_are_read(tmp_path):
    with pytest.raises(ValueError, match="a bug"):
        pipeline.checkpoint(frame(tmp_path, fails=3), tmp_path / "kept")
    for path in (tmp_path / "kept").glob("*/receipts/*.json"):
        record = json.loads(path.read_text())
        del record["content"]
        path.write_text(json.dumps(record))
    (tmp_path / "mended").touch()
    kept = pipeline.checkpoint(frame(tmp_path, fails=3), tmp_path / "kept")
    assert set(computed(tmp_path).values()) == {1}, "there is nothing to compare with"
    pd.testing.assert_frame_equal(kept.compute(), expected())
