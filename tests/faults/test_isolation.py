"""Partitions with rows that crash every process, scored in a separate process, without a cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.errors import PartitionStuck, StepFailed
from pipeline.jobs.receipts import Receipt
from pipeline.models.registry import resolve
from pipeline.plan.recipe import MapRecipe, StageRecipe
from pipeline.scoring.isolation import PIECES, Isolation, Streak, cut_range, resident_bytes
from pipeline.scoring.partition import score_partition
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.oracle import Lake, make_lake, oracle
from pipeline.testing.recipes import make_partition, make_recipe

HEAD = "from pipeline.testing.faults import Fault, FaultTable\n"
STEP = MapRecipe("poison:step")
Score = Callable[..., tuple[Receipt, pd.DataFrame, pd.DataFrame]]


@pytest.fixture
def two_file_lake(tmp_path: Path) -> Lake:
    return make_lake(tmp_path / "lake", rows=(3000, 2000), row_group=700)


@pytest.fixture
def score(two_file_lake: Lake, model_path: Path, tmp_path: Path) -> Score:
    version = resolve(ModelRef(str(model_path)))
    schema = pq.read_schema(two_file_lake.files[0]).remove_metadata()

    def read(recipe: StageRecipe, name: str) -> pd.DataFrame:
        return pq.read_table(f"{recipe.directory}/rounds/0/{name}").to_pandas()

    def run(text: str, step: MapRecipe = STEP, **limits: float) -> tuple[Receipt, pd.DataFrame, pd.DataFrame]:
        (tmp_path / "poison.py").write_text(HEAD + text)
        recipe = make_recipe(
            version,
            schema,
            directory=str(tmp_path / "job"),
            maps=(step,),
            import_paths=(str(tmp_path),),
            batch_rows=2000,
        )
        isolation = Isolation(**limits) if step == STEP else None  # type: ignore[arg-type]
        receipt = score_partition(recipe, make_partition(*two_file_lake.files), isolation=isolation)
        out = read(recipe, receipt.data.name) if receipt.data else pd.DataFrame()
        return receipt, out, read(recipe, receipt.rejects.name) if receipt.rejects else pd.DataFrame()

    return run


def table(*faults: str) -> str:
    return f"step = FaultTable(__file__ + '.attempts', ({' '.join(f'{one},' for one in faults)}))\n"


@pytest.fixture
def expected(two_file_lake: Lake, model_path: Path) -> pd.DataFrame:
    return oracle(two_file_lake.files, model_path)


def test_without_faults_it_equals_the_oracle(score: Score, expected: pd.DataFrame) -> None:
    receipt, out, _ = score(table())
    pd.testing.assert_frame_equal(out, expected, check_exact=True)
    assert receipt.rows.to_dict() == {"in": 5000, "out": 5000, "rejected": 0, "filtered": 0}


@pytest.mark.fault(21)
def test_single_rows_that_end_the_process_are_found_and_named(score: Score, expected: pd.DataFrame) -> None:
    receipt, out, rejects = score(
        table(
            'Fault("segfault", ids=range(1234, 1235))',
            'Fault("exit", ids=range(3500, 3502))',
            'Fault("raise", ids=range(40, 41))',
        )
    )
    bad = {1234: "crash:SIGSEGV", 3500: "crash:exit3", 3501: "crash:exit3", 40: "step:poison:step:FaultError"}
    assert dict(zip(rejects["id"], rejects["_reason"], strict=True)) == bad
    pd.testing.assert_frame_equal(out, expected[~expected["id"].isin(bad)].reset_index(drop=True), check_exact=True)
    assert receipt.rows.rejected == 4
    for file, row, identity in zip(rejects["_file"], rejects["_row"], rejects["id"], strict=True):
        assert pq.read_table(file)["id"][row].as_py() == identity


@pytest.mark.fault(18)
def test_a_row_that_never_ends_is_stopped_at_its_deadline(score: Score) -> None:
    begin = time.monotonic()
    receipt, _, rejects = score(table('Fault("loop", ids=range(77, 78))'), seconds=4.0)
    assert receipt.reasons == {"timeout:PartitionTimeout": 1}
    assert list(rejects["id"]) == [77]
    assert time.monotonic() - begin < 60


def test_rows_beyond_the_time_limit_of_a_step_are_rejected_though_nothing_can_interrupt_it(
    score: Score, expected: pd.DataFrame
) -> None:
    step = MapRecipe("poison:step", timeout=1.0, row_timeout=0.5)
    receipt, out, rejects = score(table('Fault("loop", ids=range(77, 78))'), step)
    assert receipt.reasons == {"timeout:StepTimeout": 1}
    assert list(rejects["id"]) == [77]
    assert list(rejects["_message"]) == ["more than 0.5 s"]
    pd.testing.assert_frame_equal(out, expected[expected["id"] != 77].reset_index(drop=True), check_exact=True)


@pytest.mark.fault(19)
def test_rows_that_take_too_much_memory_are_named_and_the_worker_keeps_its_own(score: Score) -> None:
    before = resident_bytes(os.getpid())
    receipt, _, rejects = score(table('Fault("memory", ids=range(77, 78), bytes=3 << 30)'), memory=800 << 20)
    assert receipt.reasons == {"memory:OutOfMemory": 1}
    assert list(rejects["id"]) == [77]
    assert resident_bytes(os.getpid()) - before < 400 << 20


def test_when_every_row_ends_the_process_it_ends_nevertheless(score: Score) -> None:
    receipt, out, rejects = score(table('Fault("segfault", ids=range(0))'))
    assert receipt.reasons == {"crash:SIGSEGV": 5000}
    assert len(rejects) == 5000
    assert out.empty


def test_errors_of_a_step_arrive(score: Score) -> None:
    with pytest.raises(StepFailed, match="rows"):
        score("import pandas as pd\n\n\ndef step(frame):\n    return pd.concat([frame, frame])\n")


def test_module_that_ends_the_process_is_reported(score: Score) -> None:
    with pytest.raises(PartitionStuck, match="cannot be loaded"):
        score("import os\nos._exit(7)\n")


def test_output_of_a_step_does_no_harm(score: Score) -> None:
    receipt, _, _ = score("def step(frame):\n    print('x' * 100_000)\n    return frame\n")
    assert receipt.rows.output == 5000


def ends_of(bad: set[int], rows: int) -> tuple[int, set[int]]:
    """Return the number of processes that end, and the rejected rows, of the search in `IsolatedScorer.score`."""
    waiting, streak, ends, rejected = [(0, rows)], Streak(), 0, set[int]()
    while waiting:
        start, stop = streak.next_range(waiting)
        if not bad & set(range(start, stop)):
            continue
        ends += 1
        if stop - start <= max(1, streak.reach(start)):
            streak.add(start, stop)
            rejected |= set(range(start, stop))
        else:
            waiting.extend(reversed(cut_range(start, stop, pieces=PIECES)))
    return ends, rejected


@pytest.mark.parametrize("first", [0, 777, 4900])
def test_neighbouring_bad_rows_cost_few_ends(first: int) -> None:
    bad = set(range(first, first + 100))
    ends, rejected = ends_of(bad, 5000)
    assert ends <= 40
    assert bad <= rejected
    assert len(rejected) <= 125


@pytest.mark.parametrize("bad", [{0}, {4999}, {17, 18, 19}, {5, 7, 9, 3000}, set(range(0, 5000, 500))])
def test_few_bad_rows_are_found_exactly(bad: set[int]) -> None:
    assert ends_of(bad, 5000)[1] == bad


def test_a_range_is_cut_without_a_gap() -> None:
    assert cut_range(3, 6, pieces=16) == [(3, 4), (4, 5), (5, 6)]
    pieces = cut_range(0, 1000, pieces=16)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == 1000
    assert all(one[1] == other[0] for one, other in pairwise(pieces))
