"""A service scores a table: faults of all kinds, chats and embeddings, and what the report says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.errors import BudgetExhausted, ModelError
from pipeline.jobs.budget import read_budget
from pipeline.jobs.listing import find_job
from pipeline.jobs.status import Status
from pipeline.report.verify import verify
from pipeline.runner import resume, retry, run
from pipeline.settings import Settings
from pipeline.spec.budget import Budget
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.fake_service import KEY, MODEL, FakeService, Fault, embedding_of, fake_service

ROWS = 60
FAULTS = (
    Fault(429, headers={"Retry-After": "0.1"}),
    Fault(500),
    Fault(drops=True),
    Fault(200, raw=b"<html>"),
    Fault(503, headers={"Retry-After": "0.05"}),
)


@pytest.fixture
def service(client: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeService]:
    monkeypatch.setenv("SERVICE_KEY", KEY)
    client.run(_set_key, KEY)
    with fake_service() as service:
        yield service


def _set_key(key: str) -> None:
    import os

    os.environ["SERVICE_KEY"] = key


def spec_of(service: FakeService, folder: Path, *, rows: int = ROWS, **endpoint: Any) -> JobSpec:
    (folder / "in").mkdir(exist_ok=True)
    for part in range(2):
        ids = range(part * rows // 2, (part + 1) * rows // 2)
        frame = pd.DataFrame({"id": ids, "text": [f"row {number}" for number in ids]})
        frame.to_parquet(folder / f"in/{part}.parquet", index=False)
    given = {"url": service.url, "model": MODEL, "key": "env:SERVICE_KEY", "concurrency": 4, **endpoint}
    return JobSpec.build(
        name="asked",
        source={"path": str(folder / "in")},
        steps=[{"score": {"endpoint": given, "output": "said", "keep": ["id"]}}],
        sink={"path": str(folder / "out")},
        errors={"max_rows": 1},
    )


def rows_of(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "out").sort_values("id").reset_index(drop=True)


def test_a_chat_with_faults(service: FakeService, settings: Settings, tmp_path: Path) -> None:
    def choose(text: str, number: int) -> Fault | None:
        row = int(text.rsplit(maxsplit=1)[-1])
        if row == 7:
            return Fault(400, {"error": {"message": "no", "code": "content_filter"}})
        return FAULTS[row % 10] if number == 1 and row % 10 < len(FAULTS) else None

    service.choose = choose
    prices = {"input": 1.0, "output": 2.0}
    report = run(spec_of(service, tmp_path, messages="{{text}}", prices=prices), settings=settings)
    expected = [f"ROW {number}" for number in range(ROWS) if number != 7]
    assert rows_of(tmp_path)["said"].tolist() == expected
    assert report.reasons == {"score:ContentFilter": 1}
    assert service.answered == {f"row {number}": 1 for number in range(ROWS) if number != 7}
    assert report.engines is not None
    usage = report.engines.use.usage
    assert usage["calls"] == sum(service.asked.values()) == ROWS + 30
    assert usage["cost"] == pytest.approx((59 * 2 + 59 * 2 * 2) / 1e6)
    assert "90 requests, 30 of them sent again, 118 tokens in, 118 tokens out, cost 0.000354" in str(report)
    job = find_job(settings.directory, report.job)
    assert KEY not in "".join(path.read_text(errors="replace") for path in Path(job.root).rglob("*.json*"))
    assert not list(Path(job.root).glob("rounds/0/answers/*"))
    before = sum(service.asked.values())
    checks = {check.name: check for check in verify(job).checks}
    assert "not scored again" in checks["sample"].detail
    assert sum(service.asked.values()) == before
    again = {check.name: check for check in verify(job, sample=5, call_services=True).checks}
    assert "other answers in 0 ranges" in again["sample"].detail
    assert sum(service.asked.values()) > before


def test_structured_answers_and_embeddings(service: FakeService, settings: Settings, tmp_path: Path) -> None:
    service.reply = lambda text: f'{{"number": {text.split()[-1]}, "mood": "good"}}'
    answer = {"mood": ["good", "bad"], "number": "int64"}
    run(spec_of(service, tmp_path, messages="{{text}}", answer=answer), settings=settings)
    frame = rows_of(tmp_path)
    assert frame["said_number"].tolist() == frame["id"].tolist() == list(range(ROWS))
    assert set(frame["said_mood"]) == {"good"}
    other = tmp_path / "embed"
    other.mkdir()
    run(spec_of(service, other, input="{{text}}", rows_per_request=7), settings=settings)
    frame = rows_of(other)
    assert [list(one) for one in frame["said"]] == [embedding_of(f"row {number}") for number in range(ROWS)]


def test_a_retry_asks_about_rejects_only(service: FakeService, settings: Settings, tmp_path: Path) -> None:
    service.choose = lambda text, number: Fault(400) if text == "row 3" else None
    run(spec_of(service, tmp_path, messages="{{text}}"), settings=settings)
    service.choose = lambda text, number: None
    report = retry("@last", overrides=["steps.0.score.endpoint.max_tokens=400"], settings=settings)
    assert (report.rows.output, report.rows.rejected) == (ROWS, 0)
    assert (sum(service.asked.values()), service.bodies[-1]["max_tokens"]) == (ROWS + 1, 400)


def test_a_refused_key_ends_the_job_and_a_resume_pays_nothing_twice(
    service: FakeService, settings: Settings, tmp_path: Path
) -> None:
    def choose(text: str, number: int) -> Fault | None:
        return Fault(401) if sum(service.answered.values()) >= 20 else None

    service.choose = choose
    with pytest.raises(ModelError, match="refuses the key"):
        run(spec_of(service, tmp_path, messages="{{text}}"), settings=settings)
    assert 20 <= sum(service.answered.values()) < 30
    service.choose = lambda text, number: None
    report = resume("@last", settings=settings)
    assert report.rows.output == ROWS
    assert set(service.answered.values()) == {1}
    assert report.engines is not None
    assert report.engines.use.usage["reused_answers"] >= 15


MANY, BATCH, PRICE = 600, 8, 0.002
"""Rows, rows of a batch, and the cost of a row of two words."""


def budgeted(service: FakeService, folder: Path, *, rows: int, **fields: Any) -> JobSpec:
    """A job with the budget of 60 rows."""
    service.seconds = 0.03
    endpoint = {"messages": "{{text}}", "prices": {"input": 1000.0}, "concurrency": 2}
    spec = spec_of(service, folder, rows=rows, **endpoint)
    return JobSpec.build(**{**spec.to_dict(), "budget": {"cost": 60 * PRICE}, **fields})


def test_a_budget_ends_the_job_and_a_larger_one_goes_on(
    service: FakeService, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(BudgetExhausted, match="nothing was published") as caught:
        run(budgeted(service, tmp_path, rows=MANY), settings=settings)
    assert caught.value.exit_code == 9
    job = find_job(settings.directory, "@last")
    assert job.status() is Status.INCOMPLETE
    assert not (tmp_path / "out").exists()
    asked = sum(service.asked.values())
    assert 60 <= asked < MANY - 64
    use = read_budget(job)
    assert use is not None
    assert use.cost == pytest.approx(asked * PRICE)
    with pytest.raises(BudgetExhausted):
        resume(job.id, settings=settings)
    assert sum(service.asked.values()) == asked
    service.seconds = 0.0
    report = resume(job.id, budget=Budget(cost=10.0), settings=settings)
    assert report.rows.output == sum(service.asked.values()) == MANY
    assert "budget     cost 1.20 of 10.00" in str(report)
    assert report.budget is not None
    assert report.budget.cost == pytest.approx(MANY * PRICE)


def test_a_fan_out_has_one_budget(service: FakeService, settings: Settings, tmp_path: Path) -> None:
    fields = {"fan_out": {"by": ["a", "b"]}, "sink": {"path": str(tmp_path / "out" / "${fan_out.value}")}}
    with pytest.raises(BudgetExhausted):
        run(budgeted(service, tmp_path, rows=MANY, **fields), settings=settings)
    job = find_job(settings.directory, "@last")
    assert job.status() is Status.INCOMPLETE
    assert sum(service.asked.values()) < 2 * MANY - 128
    service.seconds = 0.0
    report = resume(job.id, budget=Budget(cost=10.0), settings=settings)
    assert report.rows.output == 2 * MANY
    assert report.budget is not None
    assert report.budget.cost == pytest.approx(2 * MANY * PRICE)


def test_stages_have_one_budget_of_node_hours(
    service: FakeService, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.driver.budget.SECONDS", 0.1)
    spec = budgeted(service, tmp_path, rows=MANY).to_dict()
    spec |= {"steps": [{"filter": "id >= 0"}, {"checkpoint": True}, *spec["steps"]], "budget": {"node_hours": 1 / 3600}}
    with pytest.raises(BudgetExhausted):
        run(JobSpec.build(**spec), settings=settings)
    job = find_job(settings.directory, "@last")
    use = read_budget(job)
    assert job.status() is Status.INCOMPLETE
    assert use is not None
    assert 1.0 <= use.node_hours * 3600 < 30.0
    asked = sum(service.asked.values())
    assert asked < MANY - 64
    service.seconds = 0.0
    report = resume(job.id, budget=Budget(node_hours=1.0), settings=settings)
    assert report.rows.output == sum(service.asked.values()) == MANY
    assert report.budget is not None
    assert report.budget.node_hours > use.node_hours
