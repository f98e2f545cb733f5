"""Any chain of steps gives the rows and columns that plain pandas gives for the whole table at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.rows import RowCounts
from pipeline.driver.prepare import draft
from pipeline.models.flavors.xgboost_train import predict
from pipeline.models.model import ModelVersion
from pipeline.models.registry import resolve
from pipeline.plan.table import plan_from_table, plan_to_table
from pipeline.scoring.partition import score_partition
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.examples import choose
from pipeline.testing.inline import seal_inline
from pipeline.testing.oracle import FEATURES, make_lake, train_model

STEPS = """
def older(frame):
    return frame.assign(age=frame["age"] + 1) if "age" in frame else frame

def made(frame):
    return frame.assign(made=frame["id"] * 2)

def some(frame):
    return frame[frame["id"] % 5 != 0]
"""
MAPS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {}
exec(STEPS, MAPS)  # type: ignore[arg-type]
COLUMNS = ["id", *FEATURES, "name"]
CONDITIONS: dict[str, tuple[set[str], Callable[[pd.DataFrame], Any]]] = {
    "id >= 40 and id < 1100": ({"id"}, lambda frame: (frame["id"] >= 40) & (frame["id"] < 1100)),
    "age < 60": ({"age"}, lambda frame: frame["age"] < 60),
    "isnull(balance) or isnan(balance) or balance > 900": (
        {"balance"},
        lambda frame: frame["balance"].isna() | (frame["balance"] > 900),
    ),
    "name is not None": ({"name"}, lambda frame: frame["name"].notna()),
    "p0 > 0.5": ({"p0"}, lambda frame: frame["p0"] > 0.5),
    "made / 3 > 100": ({"made"}, lambda frame: frame["made"] / 3 > 100),
}


COMBINED: dict[str, Callable[[list[np.ndarray]], np.ndarray]] = {
    "None": lambda every: every[0],
    "mean": lambda every: (every[0] + every[1] + every[2]) / 3,
    "median": lambda every: np.sort(np.array(every), axis=0)[1],
    "max": lambda every: np.array(every).max(axis=0),
    "[2.0, 1.0, 1.0]": lambda every: (2 * every[0] + every[1] + every[2]) / 4,
}


@dataclass
class Chain:
    """A chain of steps, and what it gives in pandas."""

    frame: pd.DataFrame
    model: Path
    others: tuple[Path, Path]
    steps: list[dict[str, Any]] = field(default_factory=list)
    scores: list[str] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    """Numbers of the steps that made a column that was not there."""

    def add(self, kind: str, choice: Callable[[Sequence[Any]], Any]) -> None:
        """Add a step of a kind, if the columns allow it."""
        known = set(self.frame.columns)
        conditions = [text for text, (needed, _) in CONDITIONS.items() if needed <= known]
        if kind == "filter" and conditions:
            text = choice(conditions)
            self.steps.append({"filter": text})
            self.frame = self.frame[self.mask(text)]
        elif kind == "select" and len(known) > 2:
            left = [name for name in self.frame.columns if name in ("id", *self.scores) or choice([True, True, False])]
            new = {("number" if name == "visits" and choice([True, False]) else name): name for name in left}
            self.steps.append({"select": left if list(new) == left else new})
            self.frame = self.frame[left].set_axis(list(new), axis=1)
        elif kind == "map":
            name = choice(["older", "made", "some"])
            self.steps.append({"map": f"chain_steps:{name}"})
            self.frame = MAPS[name](self.frame)
            if len(self.frame.columns) > len(known):
                self.made.append(len(self.steps) - 1)
        elif kind == "score" and {*FEATURES} - {"visits"} <= known and {"visits", "number"} & known:
            features = [name if name in known else "number" for name in FEATURES]
            where = choice([None, *conditions])
            output = f"p{len(self.scores)}"
            combine = choice([None, "mean", "median", "max", [2.0, 1.0, 1.0]])
            models = [self.model] if combine is None else [self.model, self.others[0], self.others[1]]
            names = str(self.model) if combine is None else list(map(str, models))
            score = {"model": names, "output": output, "where": where, "combine": combine}
            if features != list(FEATURES):
                score["features"] = features
            self.steps.append({"score": {name: value for name, value in score.items() if value is not None}})
            self.scores.append(output)
            columns = self.frame[features].set_axis(list(FEATURES), axis=1)
            every = [predict(columns, model=model).astype(np.float64) for model in models]
            scores = COMBINED[str(combine)](every).astype(np.float32)
            chosen = np.ones(len(scores), dtype=bool) if where is None else self.mask(where).to_numpy()
            self.frame = self.frame.assign(**{output: np.where(chosen, scores, np.float32(np.nan))})

    def mask(self, text: str) -> Any:
        """Return the rows for which a condition holds."""
        return CONDITIONS[text][1](self.frame).astype(bool)

    def written(self) -> list[str]:
        """Return the columns of the output."""
        last = max((n for n, step in enumerate(self.steps) if "score" in step), default=-1)
        names, scores = list(COLUMNS), iter(self.scores)
        for number, step in enumerate(self.steps):
            if "select" in step:
                names = list(step["select"])
            elif "score" in step:
                names.append(next(scores))
            elif number in self.made and number > last:
                names.append("made")
        return [name for name in names if name in self.frame.columns]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chains")
    (made / "chain_steps.py").write_text(STEPS)
    for file in make_lake(made / "lake", rows=(900, 400), row_group=150).files:
        pq.write_table(pq.read_table(file).select(COLUMNS), file, row_group_size=150)
    for number, name in enumerate(("m", "n", "o")):
        train_model(made / f"{name}.ubj", rounds=4 + number, max_depth=3, seed=number)
    return made


@pytest.fixture(scope="module")
def pins(folder: Path) -> dict[str, ModelVersion]:
    found = [resolve(ModelRef.parse(str(folder / f"{name}.ubj"))) for name in "mno"]
    return {version.uri: version for version in found}


def run(
    folder: Path, pins: dict[str, ModelVersion], steps: list[dict[str, Any]], job: Path
) -> tuple[pd.DataFrame, RowCounts]:
    """Plan a job, store the plan, and score its partitions. Return the output and the counts."""
    spec = JobSpec.build(name="c", source={"path": folder / "lake"}, steps=steps, sink={"path": job / "out"})
    options = Settings(
        directory=str(job), workers=2, threads=1, fsync=False, max_model_size="1 GiB", import_paths=(str(folder),)
    )
    drafted = draft(spec, settings=options, pins=pins).plan
    plan = plan_from_table(plan_to_table(drafted))
    assert plan.digest == drafted.digest
    recipe = plan.recipe(job="c", directory=str(job), fsync=False, import_paths=(str(folder),))
    receipts = [score_partition(recipe, partition, plan.versions) for partition in plan.partitions]
    files = [f"{job}/rounds/0/{receipt.data.name}" for receipt in receipts if receipt.data is not None]
    empty = pa.ipc.read_schema(pa.py_buffer(plan.output_schema)).empty_table()
    output = pa.concat_tables([empty, *(pq.read_table(file).replace_schema_metadata(None) for file in files)])
    counts = RowCounts.total(receipt.rows for receipt in receipts)
    return output.to_pandas(), replace(counts, input=counts.input + plan.pruned_rows)


def run_stages(
    folder: Path, pins: dict[str, ModelVersion], steps: list[dict[str, Any]], job: Path
) -> tuple[pd.DataFrame, RowCounts]:
    """Run a job with checkpoints, each stage planned from the files of the one before. Return the output and counts."""
    spec = JobSpec.build(name="c", source={"path": folder / "lake"}, steps=steps, sink={"path": job / "out"})
    options = Settings(
        directory=str(job), workers=2, threads=1, fsync=False, max_model_size="1 GiB", import_paths=(str(folder),)
    )
    made, manifest = seal_inline(
        draft(spec, settings=options, pins=pins).plan, directory=job, job="c", settings=options
    )
    empty = pa.ipc.read_schema(pa.py_buffer(made.plan.output_schema)).empty_table()
    tables = (pq.read_table(f"{made.root}/{file.name}").replace_schema_metadata(None) for file in manifest.files)
    return pa.concat_tables([empty, *tables]).to_pandas(), manifest.rows


def draw_chain(data: st.DataObject, folder: Path) -> Chain:
    chain = Chain(pq.read_table(folder / "lake").to_pandas(), folder / "m.ubj", (folder / "n.ubj", folder / "o.ubj"))
    kinds = data.draw(st.lists(st.sampled_from(["filter", "select", "map", "score"]), min_size=1, max_size=6))
    for kind in kinds:
        chain.add(kind, lambda options: data.draw(st.sampled_from(list(options))))
    return chain


@settings(deadline=None, max_examples=choose(40, of=1000))
@given(data=st.data())
def test_a_chain_gives_what_pandas_gives(data: st.DataObject, folder: Path, pins: dict[str, ModelVersion]) -> None:
    chain = draw_chain(data, folder)
    if not chain.steps:
        return
    job = folder / "jobs" / f"{abs(hash(json.dumps(chain.steps))):x}"
    check(chain, *run(folder, pins, chain.steps, job))


@settings(deadline=None, max_examples=choose(25, of=1000))
@given(data=st.data())
def test_checkpoints_change_no_row(data: st.DataObject, folder: Path, pins: dict[str, ModelVersion]) -> None:
    chain = draw_chain(data, folder)
    if len(chain.steps) < 2:
        return
    ends = data.draw(st.sets(st.integers(1, len(chain.steps) - 1), min_size=1))
    size = data.draw(st.sampled_from([True, {"partition_bytes": "4 KiB"}]))
    steps = [
        one for n, step in enumerate(chain.steps) for one in ([{"checkpoint": size}, step] if n in ends else [step])
    ]
    job = folder / "staged" / f"{abs(hash(json.dumps(steps))):x}"
    check(chain, *run_stages(folder, pins, steps, job))


def check(chain: Chain, output: pd.DataFrame, rows: RowCounts) -> None:
    assert list(output.columns) == chain.written()
    assert (rows.input, rows.output, rows.rejected) == (1300, len(chain.frame), 0)
    for name in output.columns:
        expected = chain.frame[name].reset_index(drop=True)
        pd.testing.assert_series_equal(output[name], expected, check_exact=True, check_dtype=False)
