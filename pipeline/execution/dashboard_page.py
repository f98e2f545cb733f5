"""The page "Pipeline" on the dashboard of a running scheduler.

`PipelinePage` is a plugin of the scheduler: it keeps the last figures that each driver sent, and serves them with
`pipeline.common.live_page`. `LivePage` is the driver's side. The page is for people only: when anything about it fails,
such as after a change inside of Dask, it is given up with one line in the log, and the job continues.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin
from tornado import web

from pipeline.common import live_page, metrics

logger = logging.getLogger(__name__)
OPERATION = "pipeline_job_figures"
"""Name of the call with which drivers send figures to the scheduler."""
SEND_SECONDS = 1.0
"""Longest wait for the scheduler at the end of a job."""
KEPT_JOBS = 50
"""Jobs whose last figures a scheduler keeps."""


class PipelinePage(SchedulerPlugin):
    """Keeps the figures of the jobs on a scheduler, and serves the page."""

    name = "pipeline-page"
    idempotent = True

    def __init__(self) -> None:
        self.jobs: dict[str, Any] = {}
        """Figures by id of the job; the job that sent some last is the last."""

    async def start(self, scheduler: Any) -> None:
        """Add the page to the dashboard. Dask calls this."""
        scheduler.handlers[OPERATION] = self.update
        options = {"jobs": self.jobs}
        data = live_page.DATA.replace(".", r"\.")
        routes = [
            (f"/{live_page.PAGE}", _Page),
            (f"/{data}", _Data, options),
            (f"/{live_page.METRICS}", _Metrics, options),
        ]
        scheduler.http_application.add_handlers(r".*$", routes)
        if "distributed.dashboard.scheduler" in sys.modules:
            add_link(scheduler)

    async def update(self, figures: Mapping[str, Any], comm: Any = None) -> None:
        """Keep the figures of a job."""
        self.jobs.pop(str(figures["job"]), None)
        self.jobs[str(figures["job"])] = figures
        while len(self.jobs) > KEPT_JOBS:
            del self.jobs[next(iter(self.jobs))]


def add_link(scheduler: Any) -> None:
    """Add the page to the navigation of Dask's pages, which must be imported."""
    try:
        from distributed.dashboard.scheduler import template_variables

        pages = template_variables(scheduler)["pages"]
        if live_page.PAGE not in pages:
            pages.append(live_page.PAGE)
    except Exception:
        logger.debug("Dask's pages have no link to the page of jobs", exc_info=True)


class _Page(web.RequestHandler):
    def set_default_headers(self) -> None:
        for name, value in live_page.HEADERS.items():
            self.set_header(name, value)

    def get(self) -> None:
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.finish(live_page.page())


class _Data(_Page):
    def initialize(self, jobs: Mapping[str, Any]) -> None:
        self._jobs = jobs

    def get(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"is_dask": True, "jobs": list(self._jobs.values())[::-1]}))


class _Metrics(_Data):
    def get(self) -> None:
        self.set_header("Content-Type", metrics.CONTENT_TYPE)
        self.finish(metrics.metrics_text(self._jobs.values()))


class LivePage:
    """The driver's side: sends the figures of a job to the scheduler."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._address = str(getattr(getattr(client, "scheduler", None), "address", ""))
        self._security = getattr(client, "security", None)
        self.is_on = True
        """False: the page was given up."""

    @property
    def url(self) -> str:
        """URL of the page; empty without a dashboard."""
        try:
            site, _, _ = str(self._client.dashboard_link or "").rpartition("/")
        except Exception:  # the link is made from a template of the site, with any variables
            return ""
        return f"{site}/{live_page.PAGE}" if site and self.is_on else ""

    def install(self) -> None:
        """Add the page to the scheduler, unless it has it already."""
        self.guard(lambda: self._client.register_plugin(PipelinePage()))

    def send(self, figures: Callable[[], Mapping[str, Any]], *, waits: bool = False) -> None:
        """Send figures to the scheduler.

        :param waits: True: wait until the scheduler has them. Else they are sent in the background.
        """
        if waits:
            self.guard(lambda: self._client.sync(self._send, figures(), callback_timeout=SEND_SECONDS))
        else:
            self.guard(lambda: self._client.loop.add_callback(self._send_quietly, figures()))

    def send_last(self, figures: Callable[[], Mapping[str, Any]]) -> None:
        """Send the figures of a job that has ended, over a new connection: the job has closed its own."""
        self.guard(lambda: self._send_anew(figures()))

    def _send_anew(self, figures: Mapping[str, Any]) -> None:
        with Client(
            self._address, security=self._security, set_as_default=False, timeout=SEND_SECONDS, name="pipeline-end"
        ) as client:
            client.sync(getattr(client.scheduler, OPERATION), figures=figures, callback_timeout=SEND_SECONDS)

    def guard(self, call: Callable[[], object]) -> None:
        """Make a call for the page. After the first error, log it once and make no more."""
        if not self.is_on:
            return
        try:
            call()
        except Exception as error:
            self._give_up(error)

    async def _send(self, figures: Mapping[str, Any]) -> None:
        await getattr(self._client.scheduler, OPERATION)(figures=figures)

    async def _send_quietly(self, figures: Mapping[str, Any]) -> None:
        try:
            await self._send(figures)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self.is_on:
            return
        self.is_on = False
        # A scheduler that is gone is reported by whoever needs it.
        if getattr(self._client, "status", "running") == "running":
            logger.warning(
                "the dashboard has no page of this job (%s: %s); the job is not affected", type(error).__name__, error
            )
