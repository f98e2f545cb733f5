from __future__ import annotations

import pickle

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client
from distributed.shuffle._shuffle import DataFrameShuffleRun

import pipeline
from pipeline.errors import ReconciliationFailed
from pipeline.execution import counted_shuffles
from pipeline.execution.counted_shuffles import (
    CountedRun,
    check_rows,
    count_on_workers,
    lost_rows,
    rows_sent,
    uncounted_reason,
)


@pytest.fixture(scope="module")
def client():
    """Two workers in this process: shuffles between them use messages as between processes."""
    with (
        dask.config.set({"dataframe.shuffle.method": "p2p"}),
        Client(n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as client,
    ):
        yield client


def keyed(rows: int = 4000) -> pd.DataFrame:
    return pd.DataFrame({"key": np.arange(rows) % 97, "x": np.arange(rows)})


def shuffled() -> dd.DataFrame:
    return dd.from_pandas(keyed(), npartitions=8).shuffle("key", npartitions=5)


def joined() -> dd.DataFrame:
    other = pd.DataFrame({"key": np.arange(97), "y": np.arange(97)})
    return dd.from_pandas(keyed(), npartitions=8).merge(dd.from_pandas(other, npartitions=3), on="key")


@pytest.fixture
def losing(monkeypatch):
    """Let every third message between workers lose its first shard."""
    send, calls = DataFrameShuffleRun.send, []

    async def lose(self, address, shards):
        calls.append(1)
        return await send(self, address, shards[1:] if len(calls) % 3 == 0 else shards)

    monkeypatch.setattr(DataFrameShuffleRun, "send", lose)


def test_the_internals_of_this_version_are_known():
    assert uncounted_reason() == ""


def test_other_internals_are_named_once(monkeypatch, caplog):
    name = "distributed.shuffle._worker_plugin.ShuffleWorkerPlugin.barrier"
    monkeypatch.setattr(counted_shuffles, "_INTERNALS", {name: ("self", "number")})
    reasons = {count_on_workers(object()) for _ in range(2)}
    assert len(reasons) == 1
    assert reasons.pop().endswith("barrier(self, number)")
    assert caplog.text.count("rows of shuffles are not counted") == 1


def test_a_number_of_a_run_keeps_its_rows():
    run = pickle.loads(pickle.dumps(CountedRun(7, np.array([1, 2]))))
    assert run == 7
    assert run.rows.tolist() == [1, 2]


def test_targets_outside_of_the_partitions_are_refused():
    assert rows_sent(np.array([0, 2, 2]), 4, shuffle="s").tolist() == [1, 0, 2, 0]
    for wrong in (-1, 4):
        with pytest.raises(ReconciliationFailed, match="would lose rows") as caught:
            rows_sent(np.array([0, wrong]), 4, shuffle="s")
        assert caught.value.found == f"1 row for output partition {wrong}"


@pytest.mark.parametrize(("came", "message"), [(2, "lost"), (4, "doubled")])
def test_other_rows_than_sent(came, message):
    run = CountedRun(1, np.array([5, 3]))
    check_rows(3, run, 1, shuffle="s")
    with pytest.raises(ReconciliationFailed, match=f"a shuffle {message} rows") as caught:
        check_rows(came, run, 1, shuffle="s")
    assert caught.value.where == "output partition 1 of shuffle s"


@pytest.mark.parametrize("build", [shuffled, joined], ids=["shuffle", "join"])
def test_all_rows_arrive(client, tmp_path, build):
    kept = pipeline.checkpoint(build(), tmp_path)
    assert sorted(kept.compute()["x"]) == list(range(4000))


@pytest.mark.parametrize("build", [shuffled, joined], ids=["shuffle", "join"])
def test_lost_rows_are_an_error(client, losing, tmp_path, build):
    with pytest.raises(ReconciliationFailed, match="a shuffle lost rows") as caught:
        pipeline.checkpoint(build(), tmp_path)
    assert "came out" in caught.value.found
    assert not client.futures


def test_dask_alone_does_not_notice(client, losing, monkeypatch):
    """The premise of the guard: without it the shuffle ends well, with fewer rows."""
    monkeypatch.setattr(counted_shuffles, "check_rows", lambda *_, **__: None)
    assert len(shuffled().compute()) < 4000


def test_the_error_is_found_behind_others():
    cause = ReconciliationFailed("lost")
    wrapped = RuntimeError("P2P failed")
    wrapped.__cause__ = cause
    assert lost_rows(wrapped) is cause
    assert lost_rows(RuntimeError("other")) is None
