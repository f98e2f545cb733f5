"""Memory that a plan projects for texts: enough for what a task needs, or refused before it runs."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xgboost

from pipeline.driver.prepare import prepare
from pipeline.errors import InsufficientMemory
from pipeline.plan.plan import Plan
from pipeline.scoring.partition import read_partition
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec

ROWS = 70_000

_SCORE = """
import pickle, sys
from pathlib import Path
from pipeline.testing.inline import score_inline
plan = pickle.loads(Path(sys.argv[1]).read_bytes())
score_inline(plan, directory=Path(sys.argv[2]), job="measured")
# Not ru_maxrss, which counts what the parent had before the exec.
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def plan_of(folder: Path, memory: str, *, repeats: Sequence[int] = (400,)) -> Plan:
    """Plan 8 columns of 5 texts, which take 1 encoded byte a row.

    :param repeats: for each row group, half the bytes of a text.
    """
    (folder / "lake").mkdir(exist_ok=True)
    groups = []
    for count in repeats:
        texts = np.array([f"w{n}" * count for n in range(5)], object)[np.arange(ROWS) % 5]
        columns = {f"s{number}": pa.array(texts) for number in range(8)}
        groups.append(pa.table({**columns, "x": np.arange(ROWS, dtype=np.float32)}))
    with pq.ParquetWriter(folder / "lake" / "a.parquet", groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group)
    data = xgboost.DMatrix(np.arange(20.0).reshape(-1, 1), np.arange(20.0), feature_names=["x"])
    xgboost.train({"nthread": 1}, data, 3).save_model(folder / "model.ubj")
    spec = JobSpec.build(
        name="texts",
        source={"path": str(folder / "lake")},
        steps=[{"score": {"model": str(folder / "model.ubj")}}],
        sink={"path": str(folder / "output")},
    )
    settings = Settings(directory=str(folder / "jobs"), workers=1, threads=1, memory_limit=memory, fsync=False)
    return prepare(spec, settings=settings).plan


@pytest.mark.fault(98)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_repeating_texts_are_projected_as_they_are_decoded(tmp_path: Path) -> None:
    """The plan projected 334 MiB, and workers of 1 GiB were killed."""
    plan = plan_of(tmp_path, "2 GiB")
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    command = [sys.executable, "-c", _SCORE, str(tmp_path / "plan"), str(tmp_path / "jobs")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = int(done.stdout.split()[-2]) << 10
    assert measured <= plan.task_memory <= 2 * measured, (measured >> 20, plan.task_memory >> 20)


@pytest.mark.fault(98)
def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InsufficientMemory):
        plan_of(tmp_path, "512 MiB")


def test_a_batch_of_rows_that_are_wider_than_planned_has_fewer(tmp_path: Path) -> None:
    """The plan samples the first and the last row group. A batch of the others had 65,536 rows, 411 MiB."""
    plan = plan_of(tmp_path, "1 GiB", repeats=(1, 400, 1))
    recipe = plan.recipe(job="j", directory=str(tmp_path / "jobs"))
    assert (plan.batch_rows, recipe.batch_bytes) == (65_536, plan.batch_bytes)
    rows = 0
    for partition in plan.partitions:
        for batch in read_partition(recipe, partition, versions=plan.versions):
            rows += batch.table.num_rows
            assert batch.table.nbytes <= plan.batch_bytes < 48 << 20
    assert rows == 3 * ROWS
