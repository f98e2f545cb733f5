"""The scheduler's dashboard in this process, imported when somebody first looks at it.

Importing bokeh and making its models takes 0.6 s of a core while workers start; most jobs end without a look.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import Any

from tornado import web

PREFIX = "/"
"""Of the scheduler's pages, as distributed has it by default."""


def add_dashboard(scheduler: Any) -> None:
    """Serve the pages of ``scheduler``, which was made with ``dashboard=False``, from the first visit on."""
    door = web.Application([(r".*", _FirstVisit, {"scheduler": scheduler, "lock": asyncio.Lock()})])
    scheduler.http_application.add_application(door)


class _FirstVisit(web.RequestHandler):
    """Puts the real pages in the place of the application it belongs to."""

    def initialize(self, scheduler: Any, lock: asyncio.Lock) -> None:
        self._scheduler = scheduler
        self._lock = lock

    async def get(self) -> None:
        try:
            async with self._lock:
                await self._open()
        except ImportError as error:
            self.set_status(503)
            self.finish(f"The dashboard needs bokeh, which cannot be imported here ({error}): pip install bokeh")
            return
        self.redirect(self.request.uri or PREFIX)

    async def _open(self) -> None:
        site = self._scheduler.http_application
        if self.application not in site.applications:
            return
        # In a thread, so that the scheduler goes on meanwhile.
        loop = asyncio.get_running_loop()
        pages = await loop.run_in_executor(None, import_module, "distributed.dashboard.scheduler")
        pages.connect(site, self._scheduler.http_server, self._scheduler, prefix=PREFIX)
        site.applications.remove(self.application)
