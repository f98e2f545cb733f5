"""The page of jobs on a scheduler's dashboard, and what happens to it when Dask's internals change."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from tornado.routing import PathMatches

from pipeline.execution.dashboard_page import KEPT_JOBS, OPERATION, LivePage, PipelinePage


class FakeSite:
    def __init__(self) -> None:
        self.routes: list[Any] = []

    def add_handlers(self, host: str, routes: list[Any]) -> None:
        self.routes += routes


def test_plugin_serves_the_last_figures_of_each_job() -> None:
    page, scheduler = PipelinePage(), SimpleNamespace(handlers={}, http_application=FakeSite())

    async def play() -> None:
        await page.start(scheduler)
        for number in range(KEPT_JOBS + 5):
            await scheduler.handlers[OPERATION](figures={"job": f"j-{number}", "done": 0})
        await scheduler.handlers[OPERATION](figures={"job": "j-10", "done": 1})

    asyncio.run(play())
    assert len(page.jobs) == KEPT_JOBS
    assert list(page.jobs)[-1] == "j-10"
    assert page.jobs["j-10"]["done"] == 1
    paths = [PathMatches(route[0]).regex for route in scheduler.http_application.routes]
    assert [bool(path.match("/pipeline")) for path in paths] == [True, False, False]
    assert [bool(path.match("/pipeline.json")) for path in paths] == [False, True, False]
    assert [bool(path.match("/pipeline/metrics")) for path in paths] == [False, False, True]


@pytest.mark.parametrize("broken", ["register_plugin", "scheduler", "dashboard_link"])
def test_a_change_inside_of_dask_costs_the_page_and_one_line(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    class Client:
        status = "running"

        def __getattr__(self, name: str) -> Any:
            if name == broken or name in ("sync", "loop"):
                raise AttributeError(f"Dask has no {name} any more")
            return lambda *arguments, **options: None

    page = LivePage(Client())
    with caplog.at_level(logging.WARNING):
        page.install()
        for _ in range(3):
            page.send(lambda: {"job": "j"})
        page.send(lambda: {"job": "j"}, waits=True)
    assert page.url == ""
    (record,) = caplog.records
    assert "the job is not affected" in record.getMessage()


def test_figures_that_cannot_be_made_cost_the_page_only(caplog: pytest.LogCaptureFixture) -> None:
    page = LivePage(SimpleNamespace(loop=SimpleNamespace(add_callback=lambda *_: None)))

    def broken() -> dict[str, Any]:
        raise ZeroDivisionError

    page.send(broken)
    assert not page.is_on
    assert len(caplog.records) == 1


def test_a_scheduler_that_is_gone_is_no_change_inside_of_dask(caplog: pytest.LogCaptureFixture) -> None:
    page = LivePage(SimpleNamespace(status="closed"))
    page.send(lambda: {"job": "j"})
    assert not page.is_on
    assert caplog.records == []
