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
    opening = _Opening(scheduler)
    opening.door = web.Application([(r".*", _FirstVisit, {"opening": opening})])
    scheduler.http_application.add_application(opening.door)


class _Opening:
    """Puts the real pages in the place of the door, once."""

    door: web.Application

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        async with self._lock:
            applications = self._scheduler.http_application.applications
            if self.door not in applications:
                return
            # In a thread, so that the scheduler goes on meanwhile.
            pages = await asyncio.get_running_loop().run_in_executor(
                None, import_module, "distributed.dashboard.scheduler"
            )
            pages.connect(self._scheduler.http_application, self._scheduler.http_server, self._scheduler, prefix=PREFIX)
            applications.remove(self.door)


class _FirstVisit(web.RequestHandler):
    def initialize(self, opening: _Opening) -> None:
        self._opening = opening

    async def get(self) -> None:
        try:
            await self._opening.open()
        except ImportError as error:
            self.set_status(503)
            self.finish(f"The dashboard needs bokeh, which cannot be imported here ({error}): pip install bokeh")
            return
        self.redirect(self.request.uri or PREFIX)
