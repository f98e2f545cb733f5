"""An attempt is asked to stop at a batch boundary: its scored rows count, the rest becomes other partitions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.rows import InputFile, RowCounts, RowGroup
from pipeline.errors import InfrastructureError, StateCorrupt
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.splits import even_split_points, parts_of, pieces
from pipeline.models.registry import resolve
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import MapRecipe, StageRecipe
from pipeline.scoring import progress
from pipeline.scoring.partition import round_folder, score_partition
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.oracle import Lake, make_lake, oracle
from pipeline.testing.recipes import make_partition, make_recipe

STEP = """
import sys
import pandas as pd

def step(frame: pd.DataFrame) -> pd.DataFrame:
    state = sys.modules["cut_state"]
    state.calls.append(len(frame))
    for act in state.actions.pop(len(state.calls), ()):
        act()
    return frame
"""


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return make_lake(tmp_path / "lake", rows=(3000, 500, 1200, 40), row_group=700)


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Yield the state of a map step: the ``actions`` of its n-th call, from 1, and the rows of its ``calls``.

    Workers import the step under a name of its code, so that its state has to live in another module.
    """
    (tmp_path / "cut_steps.py").write_text(STEP)
    monkeypatch.syspath_prepend(str(tmp_path))
    state: Any = ModuleType("cut_state")
    state.calls, state.actions = [], {}
    monkeypatch.setitem(sys.modules, "cut_state", state)
    return state


@pytest.fixture
def recipe(model_path: Path, lake: Lake, tmp_path: Path) -> StageRecipe:
    schema = pq.read_schema(lake.files[0]).remove_metadata()
    return make_recipe(
        resolve(ModelRef(str(model_path))),
        schema,
        directory=str(tmp_path / "job"),
        maps=(MapRecipe("cut_steps:step"),),
        batch_rows=512,
    )


def files_by_path(lake: Lake) -> dict[str, InputFile]:
    found = {}
    for path in map(str, lake.files):
        footer = pq.read_metadata(path)
        sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        found[path] = InputFile(path, 1, "v", tuple(RowGroup(rows, rows, rows) for rows in sizes))
    return found


def asking(parts: int) -> Callable[[], object]:
    return lambda: progress.request_split("00000", parts)


def output(recipe: StageRecipe, *receipts: Receipt) -> pd.DataFrame:
    root = Path(round_folder(recipe))
    frames = [pq.read_table(root / one.data.name).to_pandas() for one in receipts if one.data]
    return pd.concat(frames, ignore_index=True)


def stored(recipe: StageRecipe, partition: str) -> Receipt:
    return Receipt.from_json((Path(round_folder(recipe)) / "receipts" / f"{partition}.json").read_bytes())


@pytest.mark.parametrize("keep", [None, "id < 900 or id > 3100"])
def test_scored_part_and_rest_equal_the_oracle(
    recipe: StageRecipe, lake: Lake, step: Any, model_path: Path, keep: str | None
) -> None:
    """The first part and the rest of a split together equal the oracle, row for row."""
    recipe = replace(recipe, filter=keep)
    whole = make_partition(*lake.files)
    step.actions[3] = [asking(3)]
    cut = score_partition(recipe, whole)
    assert cut.splits == ("00000.0", "00000.1", "00000.2", "00000.3")
    assert cut == stored(recipe, "00000")
    assert cut.rows == RowCounts()
    parts = parts_of(whole, cut, files_by_path(lake))
    first = stored(recipe, "00000.0")
    assert 0 < first.rows.input == parts[0].rows == cut.split_points[0] < lake.rows
    assert [(f.path, f.row_start, f.row_stop) for f in first.files] == [
        (f.path, f.row_start, f.row_stop) for f in parts[0].fragments
    ]
    step.calls.clear()
    rest = [score_partition(recipe, part) for part in parts[1:]]
    assert sum(step.calls) == sum(receipt.rows.input - receipt.rows.filtered for receipt in rest)
    wanted = oracle(lake.files, model_path)
    if recipe.filter:
        wanted = wanted.query(str(recipe.filter)).reset_index(drop=True)
    pd.testing.assert_frame_equal(output(recipe, first, *rest), wanted, check_exact=True)
    assert sum(receipt.rows.input for receipt in (first, *rest)) == lake.rows


def test_request_at_the_last_batch_does_not_split(recipe: StageRecipe, lake: Lake, step: Any) -> None:
    """A request at the last batch is ignored: the partition ends without a split."""
    whole = make_partition(lake.files[0])
    score_partition(replace(recipe, directory=f"{recipe.directory}-before"), whole)
    last = len(step.calls)
    step.calls.clear()
    step.actions[last] = [asking(2)]
    receipt = score_partition(recipe, whole)
    assert receipt.splits == ()
    assert receipt.rows.output == 3000


def test_a_cut_that_comes_too_late_leaves_no_trace(recipe: StageRecipe, lake: Lake, step: Any) -> None:
    """A split after the receipt of a backup leaves one receipt and one data file."""
    # While the first attempt is at it, a backup does the whole partition.
    whole = make_partition(*lake.files)
    done: list[Receipt] = []
    step.actions[2] = [asking(2), lambda: done.append(score_partition(recipe, whole))]
    found = score_partition(recipe, whole)
    assert found == done[0] == stored(recipe, "00000")
    root = Path(round_folder(recipe))
    assert [path.name for path in (root / "receipts").iterdir()] == ["00000.json"]
    assert len(list((root / "data").iterdir())) == 1


def test_attempt_that_loses_the_first_part_removes_its_files(
    recipe: StageRecipe, lake: Lake, step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt whose first part another attempt has committed removes its files."""
    # Between the receipt that cuts and that of the first part a driver sees the cut, and has the first part done.
    from pipeline.scoring import partition as module

    commit = module._commit_receipt
    others: list[Receipt] = []

    def slow(store: Any, receipt: Receipt, recipe: StageRecipe) -> Receipt:
        if receipt.partition == "00000.0" and not others:
            others.append(receipt)
            others.append(score_partition(recipe, parts_of(whole, stored(recipe, "00000"), files_by_path(lake))[0]))
        return commit(store, receipt, recipe)

    whole = make_partition(*lake.files)
    step.actions[2] = [asking(1)]
    monkeypatch.setattr(module, "_commit_receipt", slow)
    assert score_partition(recipe, whole).splits
    assert stored(recipe, "00000.0").attempt == others[1].attempt != others[0].attempt
    names = [path.name for path in (Path(round_folder(recipe)) / "data").iterdir()]
    assert names == [f"00000.0-{others[1].attempt}.parquet"]


def test_crash_between_split_and_first_part_loses_no_rows(
    recipe: StageRecipe, lake: Lake, step: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash between the split and its first part, the parts are scored and equal the oracle."""
    from pipeline.scoring import partition as module

    commit = module._commit_receipt

    def dying(store: Any, receipt: Receipt, recipe: StageRecipe) -> Receipt:
        if receipt.partition == "00000.0":
            raise KeyboardInterrupt
        return commit(store, receipt, recipe)

    whole = make_partition(*lake.files)
    step.actions[2] = [asking(2)]
    monkeypatch.setattr(module, "_commit_receipt", dying)
    with pytest.raises(KeyboardInterrupt):
        score_partition(recipe, whole)
    monkeypatch.setattr(module, "_commit_receipt", commit)
    cut = score_partition(recipe, whole)
    assert cut.splits == ("00000.0", "00000.1", "00000.2")
    done = [score_partition(recipe, part) for part in parts_of(whole, cut, files_by_path(lake))]
    pd.testing.assert_frame_equal(output(recipe, *done), oracle(lake.files, model_path), check_exact=True)
    assert done[0].attempt != cut.attempt


def test_dropped_attempt_leaves_no_file(recipe: StageRecipe, lake: Lake, step: Any) -> None:
    """A dropped attempt stops at the next batch and leaves no file."""
    step.actions[2] = [lambda: progress.request_drop("00000")]
    with pytest.raises(InfrastructureError, match="another attempt has finished"):
        score_partition(recipe, make_partition(*lake.files))
    assert step.calls == step.calls[:2]
    assert not [path for path in Path(round_folder(recipe)).rglob("*") if path.is_file()]


@pytest.mark.fault(116)
def test_late_request_does_not_reach_the_next_attempt(recipe: StageRecipe, lake: Lake, step: Any) -> None:
    """Requests went by the partition: a late one ended the isolated attempt at it, or split it, on the same worker."""
    step.actions[2] = [lambda: progress.request_drop("first"), lambda: progress.request_split("first", 2)]
    step.actions[3] = [lambda: seen.append(progress.progress_of("first"))]
    seen: list[object] = []
    receipt = score_partition(recipe, make_partition(lake.files[0]), key="second")
    assert seen == [None]
    assert (receipt.splits, receipt.rows.input) == ((), sum(step.calls))


def test_progress_counts_rows_and_batches(recipe: StageRecipe, lake: Lake, step: Any) -> None:
    """The progress counts completed rows and batches; without an attempt there is none."""
    seen: list[progress.ProgressSnapshot | None] = []
    for call in (1, 3):
        step.actions[call] = [lambda: seen.append(progress.progress_of("00000"))]
    score_partition(recipe, make_partition(lake.files[0]))
    assert [(one.rows_done, one.batches) for one in seen if one] == [(0, 0), (sum(step.calls[:2]), 2)]
    assert progress.progress_of("00000") is None
    assert progress.request_split("elsewhere", 2) is None


@given(st.integers(0, 50), st.integers(0, 2000), st.integers(1, 9), st.integers(1, 300))
def test_even_split_points_are_even(start: int, rows: int, parts: int, smallest: int) -> None:
    """Parts differ by at most one row, and none is smaller than ``smallest`` unless it is the only part."""
    points = even_split_points(start, start + rows, parts=parts, smallest=smallest)
    sizes = [high - low for low, high in zip((start, *points), (*points, start + rows), strict=True)]
    assert len(sizes) <= parts
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == 1 or min(sizes) >= smallest
    assert len(sizes) == min(parts, max(1, rows // smallest))


@pytest.mark.parametrize("points", [(0,), (3000,), (10, 10), (20, 10)])
def test_split_at_no_row_is_refused(lake: Lake, points: tuple[int, ...]) -> None:
    """Split points at the ends, at one row twice or in falling order raise `StateCorrupt`."""
    with pytest.raises(StateCorrupt, match="split at rows where it cannot be"):
        pieces(make_partition(lake.files[0]), points, files_by_path(lake))


def test_partitions_are_cut_across_files(lake: Lake) -> None:
    """A split point may fall into any file; parts keep the fragments of their files."""
    whole = make_partition(*lake.files)
    parts = pieces(whole, (2900, 3500, 3600), files_by_path(lake))
    assert [part.rows for part in parts] == [2900, 600, 100, 1140]
    assert [[f.rows for f in part.fragments] for part in parts] == [[2900], [100, 500], [100], [1100, 40]]
    assert all(isinstance(part, Partition) for part in parts)
