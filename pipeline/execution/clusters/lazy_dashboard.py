"""Import the scheduler's dashboard at the first visit.

Importing bokeh and building its models takes 0.6 s of a core while workers start, and most jobs end without a visit.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import Any

from tornado import web

from pipeline.execution.dashboard_page import add_link

PREFIX = "/"
"""URL prefix of the scheduler's pages, distributed's default."""


def add_dashboard(scheduler: Any) -> None:
    """Serve the pages of ``scheduler``, which was created with ``dashboard=False``, from the first visit on."""
    placeholder = web.Application([(r".*", _FirstVisit, {"scheduler": scheduler, "lock": asyncio.Lock()})])
    scheduler.http_application.add_application(placeholder)


class _FirstVisit(web.RequestHandler):
    """Replaces this placeholder application by the real pages."""

    def initialize(self, scheduler: Any, lock: asyncio.Lock) -> None:
        self._scheduler = scheduler
        self._lock = lock

    async def get(self) -> None:
        try:
            async with self._lock:
                await self._load_pages()
        except ImportError as error:
            self.set_status(503)
            self.finish(f"The dashboard needs bokeh, which cannot be imported here ({error}): pip install bokeh")
            return
        self.redirect(self.request.uri or PREFIX)

    async def _load_pages(self) -> None:
        site = self._scheduler.http_application
        if self.application not in site.applications:
            return
        # Import in a thread: the scheduler keeps running.
        loop = asyncio.get_running_loop()
        pages = await loop.run_in_executor(None, import_module, "distributed.dashboard.scheduler")
        pages.connect(site, self._scheduler.http_server, self._scheduler, prefix=PREFIX)
        site.applications.remove(self.application)
        add_link(self._scheduler)
