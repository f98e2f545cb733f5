"""Preparing a job: the files it scores, the digest of its work, and the rejected specs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from pipeline.driver.prepare import first_sink, prepare, refuse_incremental, select_input, work_digest
from pipeline.errors import SpecError
from pipeline.plan.incremental import FULL_INPUT
from pipeline.plan.plan import Plan
from pipeline.scoring import contract
from pipeline.settings import Settings
from pipeline.sources.filters.compare import compare
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.jobs import SmallJob, small_job
from pipeline.testing.oracle import make_lake


@pytest.fixture
def small(tmp_path: Path) -> SmallJob:
    return small_job(tmp_path / "lake", sink=str(tmp_path / "out"))


def changed(spec: JobSpec, section: str, **fields: Any) -> JobSpec:
    record = spec.to_dict()
    return JobSpec.model_validate({**record, section: {**record[section], **fields}})


class TestSelectInput:
    """Files that a job scores."""

    def test_job_that_is_not_incremental_scores_all_files(self, small: SmallJob, tmp_path: Path) -> None:
        settings = Settings.load(directory=str(tmp_path / "jobs"))
        discovery, state = select_input(small.plan.spec, small.plan.model, settings=settings)
        assert [file.path for file in discovery.files] == [file.path for file in small.plan.files]
        assert state is FULL_INPUT

    def test_incremental_job_must_append(self, small: SmallJob, tmp_path: Path) -> None:
        spec = changed(small.plan.spec, "source", incremental=True)
        settings = Settings.load(directory=str(tmp_path / "jobs"))
        with pytest.raises(SpecError) as caught:
            select_input(spec, small.plan.models, settings=settings)
        assert (caught.value.where, caught.value.expected) == ("sink.mode", "append")


def is_old(frame: pd.DataFrame) -> pd.DataFrame:
    """Map step that makes a truth value of a number."""
    return frame.assign(age=frame["age"] > 30)


class TestContract:
    """Contracts that only workers could find wrong."""

    def test_contract_that_a_step_makes_incomparable_is_refused(self, model_path: Path, tmp_path: Path) -> None:
        """The contract fits the source; after the step, the allowed numbers stand beside truth values."""
        lake = make_lake(tmp_path / "lake", rows=(50,))
        steps = [
            {"map": "tests.unit.driver.test_prepare:is_old"},
            {"score": {"model": str(model_path), "output": "p"}},
        ]
        spec = JobSpec.build(
            name="j",
            source={"path": str(lake.path)},
            steps=steps,
            sink={"path": str(tmp_path / "out")},
            contract={"age": {"allowed": list(range(100))}},
        )
        with pytest.raises(SpecError, match="cannot be compared") as caught:
            prepare(spec, settings=Settings(directory=str(tmp_path / "jobs"), workers=1, threads=1))
        assert caught.value.where == "contract.age"

    @pytest.mark.parametrize("maps", [[], [{"map": "tests.unit.driver.test_prepare:is_old"}]], ids=["no step", "step"])
    def test_check_that_fails_on_rows_is_refused(
        self, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maps: list[dict[str, str]]
    ) -> None:
        """A comparison that fails for values, not for the type: every worker would fail."""

        def fail_on_rows(comparison: Any, column: pa.ChunkedArray, limit: Any) -> pa.ChunkedArray:
            if len(column):
                raise pa.ArrowInvalid("such values do not compare")
            return compare(comparison, column, limit)

        monkeypatch.setattr(contract, "compare", fail_on_rows)
        lake = make_lake(tmp_path / "lake", rows=(50,))
        with pytest.raises(SpecError, match="'balance' cannot be checked") as caught:
            plan_of(lake.path, maps, model_path, tmp_path, contract={"balance": {"max": 5000.0}})
        assert caught.value.where == "contract.balance"
        assert "in 50 rows of a sample" in (caught.value.found or "")

    def test_rows_of_the_sample_that_break_the_contract_are_no_error(self, model_path: Path, tmp_path: Path) -> None:
        lake = make_lake(tmp_path / "lake", rows=(50,))
        plan = plan_of(lake.path, [], model_path, tmp_path, contract={"balance": {"max": -1e9}})
        assert plan.rows == 50

    def test_sample_is_read_for_values_alone(
        self, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A footer is enough for other rules: a plan of a remote source opens no more than it must."""
        monkeypatch.setattr("pipeline.driver.prepare.sample_batch", lambda *_, **__: pytest.fail("read"))
        lake = make_lake(tmp_path / "lake", rows=(50,))
        assert plan_of(lake.path, [], model_path, tmp_path, contract={"balance": {"nullable": False}}).rows == 50


def plan_of(lake: Path, maps: list[dict[str, str]], model: Path, folder: Path, *, contract: dict[str, Any]) -> Plan:
    spec = JobSpec.build(
        name="j",
        source={"path": str(lake)},
        steps=[*maps, {"score": {"model": str(model), "output": "p"}}],
        sink={"path": str(folder / "out")},
        contract=contract,
    )
    return prepare(spec, settings=Settings(directory=str(folder / "jobs"), workers=1, threads=1)).plan


class TestWorkDigest:
    """The digest of the work covers everything that changes a scored row."""

    def test_sink_is_not_part_of_it(self, small: SmallJob) -> None:
        spec, models = small.plan.spec, small.plan.models
        assert work_digest(changed(spec, "sink", path="elsewhere"), models) == work_digest(spec, models)

    def test_filter_and_model_are_part_of_it(self, small: SmallJob) -> None:
        spec, model = small.plan.spec, small.plan.model
        digests = {
            work_digest(spec, [model]),
            work_digest(changed(spec, "source", filter="id > 3"), [model]),
            work_digest(spec, [replace(model, digest="0" * 64)]),
        }
        assert len(digests) == 3


def test_fan_out_over_an_incremental_source_is_refused(small: SmallJob) -> None:
    refuse_incremental(small.plan.spec)
    with pytest.raises(SpecError) as caught:
        refuse_incremental(changed(small.plan.spec, "source", incremental=True))
    assert caught.value.where == "source.incremental"


def test_first_sink_of_a_job_without_children_is_its_own(small: SmallJob) -> None:
    assert first_sink(small.plan) == small.plan.spec.sink
