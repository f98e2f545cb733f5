"""The estimate of a job from a probe."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.rows import Fragment, RowCounts
from pipeline.jobs.receipts import DataFile, Receipt, Timings
from pipeline.plan.plan import Partition, Plan
from pipeline.report.estimate import Estimate, Interval, choose_sample, compare_estimate, make_estimate
from pipeline.testing.jobs import small_job


def partition(number: int, rows: int) -> Partition:
    return Partition(f"{number:05d}", (Fragment("in.parquet", 0, rows, 0, 1, 10 * rows),))


def receipt(one: Partition, seconds: float, *, model_load: float = 0.0, size: int = 100, memory: int = 0) -> Receipt:
    return Receipt(
        partition=one.id,
        plan="p",
        model="m",
        attempt="a",
        data=DataFile("data/x.parquet", one.rows, size, "0"),
        rejects=None,
        rows=RowCounts(one.rows, one.rows),
        files=(),
        seconds=Timings(model_load=model_load, total=seconds + model_load),
        peak_memory=memory,
    )


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return small_job(tmp_path / "in", sink=str(tmp_path / "out")).plan


def estimate(plan: Plan, seconds: dict[int, float], rows: list[int], **fields: object) -> Estimate:
    partitions = tuple(partition(number, count) for number, count in enumerate(rows))
    receipts = {partitions[n].id: receipt(partitions[n], value) for n, value in seconds.items()}
    options = {"workers": 2, "threads": 1, "start_seconds": 4.0, "projected": 1000, **fields}
    return make_estimate(replace(plan, partitions=partitions), receipts, **options)  # type: ignore[arg-type]


def test_time_in_proportion_to_rows_is_estimated_exactly(plan: Plan) -> None:
    rows = [100, 200, 300, 400, 500, 600]
    made = estimate(plan, {0: 1.0, 2: 3.0, 4: 5.0}, rows)
    assert made.task_seconds == Interval(pytest.approx(21.0), pytest.approx(21.0), pytest.approx(21.0))
    assert made.seconds.low == pytest.approx(4.0 + 21.0 / 2)
    assert made.seconds.high == pytest.approx(4.0 + 21.0 / 2 + 6.0 / 2)
    assert made.worker_hours.low == pytest.approx(made.seconds.low * 2 / 3600)


def test_a_sample_of_everything_leaves_no_doubt(plan: Plan) -> None:
    made = estimate(plan, {0: 1.0, 1: 7.0, 2: 2.0}, [100, 100, 100])
    assert made.task_seconds == Interval(10.0, 10.0, 10.0)


def test_estimate_of_one_partition_has_a_wide_interval(plan: Plan) -> None:
    made = estimate(plan, {0: 1.0}, [100] * 10)
    found = (made.task_seconds.low, made.task_seconds.expected, made.task_seconds.high)
    assert found == pytest.approx((5.0, 10.0, 20.0))


def test_the_load_of_the_model_is_part_of_the_start(plan: Plan) -> None:
    parts = tuple(partition(number, 100) for number in range(4))
    done = {parts[0].id: receipt(parts[0], 1.0, model_load=9.0), parts[1].id: receipt(parts[1], 1.0, memory=77)}
    made = make_estimate(replace(plan, partitions=parts), done, workers=1, threads=1, start_seconds=2.0, projected=1000)
    assert made.task_seconds.expected == pytest.approx(4.0)
    assert made.start_seconds == 11.0
    assert made.peak_memory == 77


def test_estimate_needs_a_completed_partition(plan: Plan) -> None:
    with pytest.raises(ValueError, match="partition that is done"):
        estimate(plan, {}, [100])


def test_estimate_round_trip(plan: Plan) -> None:
    made = estimate(plan, {0: 1.25, 1: 2.5}, [100] * 8)
    assert Estimate.from_dict(made.to_dict()) == Estimate.from_dict(Estimate.from_dict(made.to_dict()).to_dict())


def test_comparison_marks_the_figures_that_held(plan: Plan) -> None:
    made = estimate(plan, {0: 1.0, 2: 3.0, 4: 5.0}, [100, 200, 300, 400, 500, 600])
    found = compare_estimate(made, seconds=15.0, task_seconds=40.0, output_bytes=600)
    assert found.held["seconds"] is True
    assert found.held["task_seconds"] is False


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 12))
def test_a_sample_spans_the_sizes_and_has_no_partition_twice(rows: list[int], count: int) -> None:
    partitions = [partition(number, one) for number, one in enumerate(rows)]
    chosen = choose_sample(partitions, count=count)
    assert len({one.id for one in chosen}) == len(chosen) == min(count, len(rows))
    assert [one.rows for one in chosen] == sorted(one.rows for one in chosen)


def test_intervals_hold_about_as_often_as_they_say(plan: Plan) -> None:
    """400 made-up jobs, of which a sample of six is seen; the true sum lies in the interval nearly always."""
    held, generator = 0, random.Random(7)
    for _ in range(400):
        rows = [generator.randint(500, 2000) for _ in range(80)]
        times = [count / 1000 * generator.lognormvariate(0, 0.3) for count in rows]
        partitions = tuple(partition(number, count) for number, count in enumerate(rows))
        sample = choose_sample(partitions, count=6)
        done = {one.id: receipt(one, times[int(one.id)]) for one in sample}
        made = make_estimate(
            replace(plan, partitions=partitions), done, workers=4, threads=1, start_seconds=0, projected=1
        )
        held += made.task_seconds.holds(sum(times))
    assert 0.90 <= held / 400 <= 0.99
