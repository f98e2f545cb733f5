"""`map_partitions` on real processes: a worker dies, rows fail, and what was finished is read the next time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client
from partitions_for_tests import Priced, people, priced

import pipeline
from pipeline import Settings
from pipeline.errors import SpecError, StepFailed

PARTITIONS = 4


def test_equals_dasks_own_though_a_worker_dies(client: Client, settings: Settings, tmp_path: Path) -> None:
    frame = dd.from_pandas(people(), npartitions=PARTITIONS)
    function = Priced(tmp_path)
    mapped = pipeline.map_partitions(frame, function, checkpoint=tmp_path / "kept", settings=settings, callbacks=[])
    assert (tmp_path / "dead").exists()
    assert (mapped.npartitions, mapped.divisions) == (PARTITIONS, frame.divisions)
    expected = priced(people())
    pd.testing.assert_frame_equal(mapped.compute(), expected)
    pd.testing.assert_frame_equal(mapped[["n"]].partitions[2].compute(), expected.loc[800:1198, ["n"]])
    assert len(mapped.rejects) == 0
    assert mapped.report.rows.input == 800
    calls = (tmp_path / "calls").stat().st_size
    again = pipeline.map_partitions(frame, function, checkpoint=tmp_path / "kept", settings=settings, callbacks=[])
    pd.testing.assert_frame_equal(again.compute(), expected)
    assert (tmp_path / "calls").stat().st_size == calls


def test_rows_that_fail_are_rejects(client: Client, settings: Settings, tmp_path: Path) -> None:
    rows = people()
    rows.iloc[[3, 700], 1] = -1.0
    frame = dd.from_pandas(rows, npartitions=PARTITIONS)
    with pytest.raises(StepFailed, match="too many rows were rejected"):
        pipeline.map_partitions(frame, priced, checkpoint=tmp_path, settings=settings, callbacks=[])
    mapped = pipeline.map_partitions(
        frame, priced, checkpoint=tmp_path, errors={"max_fraction": 0.01}, settings=settings, callbacks=[]
    )
    pd.testing.assert_frame_equal(mapped.compute(), priced(rows.drop(index=rows.index[[3, 700]])))
    rejects = mapped.rejects
    pd.testing.assert_frame_equal(rejects[list(rows)], rows.iloc[[3, 700]])
    assert list(rejects["_partition"]) == [0, 3]
    assert set(rejects["_reason"]) == {"step:priced:ValueError"}


def test_a_fitted_model_scores_a_frame(client: Client, settings: Settings, tmp_path: Path) -> None:
    from sklearn.linear_model import LinearRegression

    rows = people()
    frame = dd.from_pandas(rows, npartitions=PARTITIONS)
    model = LinearRegression().fit(rows[["key", "amount"]], rows["amount"] * 3)
    score = pipeline.Score(model=model, output="guess")
    mapped = pipeline.map_partitions(frame, score, checkpoint=tmp_path, settings=settings, callbacks=[]).compute()
    np.testing.assert_allclose(mapped["guess"], model.predict(rows[["key", "amount"]]), rtol=1e-6)
    pd.testing.assert_frame_equal(mapped[list(rows)], rows)


def test_what_breaks_the_contract_is_refused(client: Client, settings: Settings, tmp_path: Path) -> None:
    frame = dd.from_pandas(people(), npartitions=PARTITIONS)
    with pytest.raises(StepFailed):
        pipeline.map_partitions(
            frame,
            lambda part: part.assign(mean=part["amount"].mean()),
            checkpoint=tmp_path,
            settings=settings,
            callbacks=[],
        )
    with pytest.raises(StepFailed, match="lost the index"):
        pipeline.map_partitions(
            frame, lambda part: part.reset_index(drop=True), checkpoint=tmp_path, settings=settings, callbacks=[]
        )
    with pytest.raises(SpecError, match="have all columns of the frame"):
        pipeline.map_partitions(frame, priced, checkpoint=tmp_path, errors={"keep_columns": ["key"]})
    with pytest.raises(SpecError, match="Dask DataFrame"):
        pipeline.map_partitions(people(), priced, checkpoint=tmp_path)  # type: ignore[arg-type]


def test_another_process_finds_what_was_kept(client: Client, settings: Settings, tmp_path: Path) -> None:
    frame = dd.from_pandas(people(), npartitions=PARTITIONS)
    first = pipeline.map_partitions(frame, priced, checkpoint=tmp_path, settings=settings, callbacks=[])
    script = (
        "import dask.dataframe as dd, pipeline, sys\n"
        "from partitions_for_tests import people, priced\n"
        f"frame = dd.from_pandas(people(), npartitions={PARTITIONS})\n"
        "mapped = pipeline.map_partitions(frame, priced, checkpoint=sys.argv[1], callbacks=[])\n"
        "print(mapped['twice'].sum().compute())\n"
    )
    paths = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) == pytest.approx(float(first["twice"].sum().compute()))
    assert len(list((tmp_path / "jobs").glob("map-partitions-*"))) == 1


def test_a_function_that_runs_out_of_memory_gets_fewer_rows(client: Client, settings: Settings, tmp_path: Path) -> None:
    def heavy(part: pd.DataFrame) -> pd.DataFrame:
        if len(part) > 100 and part.index[-1] >= 1000:
            raise MemoryError("too many rows at a time")
        return part.assign(n=1)

    frame = dd.from_pandas(people().rename_axis(None), npartitions=2)
    mapped = pipeline.map_partitions(
        frame, heavy, checkpoint=tmp_path, row_wise="unchecked", settings=settings, callbacks=[]
    )
    rows = mapped.compute()
    assert int(rows["n"].sum()) == 800
    assert rows.index.name is None
