"""The demo: the same seed gives the same files, and the files match the printed text."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.demo import BAD_ROWS, COUNTRIES, FEATURES, PLANS, make_customers, make_demo, spoil
from pipeline.demo.features import build
from pipeline.errors import OutputExists, RefusedForSafety
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.reports import sample_report

ROWS = 5_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "try"
    assert make_demo(folder, rows=ROWS).is_new
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_table_is_partitioned_and_one_file_is_far_larger(made: Path) -> None:
    rows = {path.parent.name: pq.read_metadata(path).num_rows for path in made.glob("lake/customers/*/*.parquet")}
    assert set(rows) == {f"country={country}" for country in COUNTRIES}
    assert sum(rows.values()) == ROWS
    assert rows["country=DE"] > 0.45 * ROWS


def test_a_few_dozen_rows_are_malformed(made: Path) -> None:
    table = pq.read_table(made / "lake" / "customers").to_pandas()
    is_bad = np.isinf(table["monthly_charges"]) | ~table["age"].between(18, 110) | ~table["plan"].isin(PLANS)
    assert int(is_bad.sum()) == BAD_ROWS
    assert table["monthly_charges"].isna().sum() > 0
    assert table["customer_id"].is_unique


def test_the_same_seed_gives_the_same_files(made: Path, tmp_path: Path) -> None:
    make_demo(tmp_path / "again", rows=ROWS)
    assert digests(tmp_path / "again") == digests(made)
    other = make_customers(100, seed=1)
    assert not other.equals(make_customers(100, seed=2))


def test_the_model_separates_those_who_left(made: Path) -> None:
    from pipeline.models.flavors.xgboost_train import predict

    customers = make_customers(ROWS, seed=99)
    frame = build(customers)[FEATURES].assign(plan=pd.Categorical(customers["plan"], categories=PLANS))
    scores = pd.Series(predict(frame, model=made / "churn.ubj"))
    ranks = scores.rank()
    left = customers["churned"].to_numpy()
    above = ranks[left].sum() - left.sum() * (left.sum() + 1) / 2
    assert above / (left.sum() * (~left).sum()) > 0.6


def test_job_spec_is_valid_and_commented(made: Path) -> None:
    spec = JobSpec.load(made / "job.yaml")
    assert spec.sink.mode == "overwrite"
    assert spec.errors.max_fraction == 0.01
    assert [step.map for step in spec.maps] == ["features:build"]
    columns = pq.read_schema(next(made.glob("lake/customers/country=DE/*.parquet"))).names
    assert set(spec.score.keep or ()) <= {*columns, "country"}
    assert set(spec.contract) <= set(columns)


def test_the_map_step_stands_beside_the_spec(made: Path) -> None:
    scope: dict[str, Any] = {}
    exec((made / "features.py").read_text(), scope)
    table = pq.read_table(made / "lake" / "customers").to_pandas()
    built = scope["build"](table)
    assert set(FEATURES) <= set(built.columns)
    assert built.index.equals(table.index)


def test_a_second_demo_finds_the_first(made: Path) -> None:
    before = digests(made)
    again = make_demo(made, rows=123)
    assert (again.is_new, again.rows) == (False, ROWS)
    assert again.story().startswith("Found a table of 5,000 customers")
    assert digests(made) == before


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputExists):
        make_demo(tmp_path, rows=ROWS)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RefusedForSafety):
        make_demo(tmp_path / "link", rows=ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine.txt"]


def test_the_working_directory_will_do_when_it_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make_demo(Path(), rows=ROWS)
    assert Path("job.yaml").is_file()


def test_an_empty_folder_is_taken_and_what_a_broken_demo_left_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    unfinished = tmp_path / ".demo.unfinished"
    unfinished.mkdir()
    (unfinished / "rest").write_text("x")
    make_demo(folder, rows=ROWS)
    assert (folder / "job.yaml").is_file()
    assert not (folder / "rest").exists()
    assert not unfinished.exists()


def test_spoiling_leaves_the_rest_as_it_was() -> None:
    customers = make_customers(1000, seed=3)
    spoiled = spoil(customers, seed=3)
    changed = (spoiled != customers) & ~(spoiled.isna() & customers.isna())
    assert int(changed.any(axis=1).sum()) == BAD_ROWS


def test_the_ending_names_three_commands(made: Path) -> None:
    text = make_demo(made, rows=ROWS).ending(sample_report(next=("something else",)))
    steps = text[text.index("  next") :].splitlines()
    assert len(steps) == 3
    assert f"cd {made}" in steps[0]
    assert "rejects @last" in steps[1]
    assert "verify @last" in steps[2]
