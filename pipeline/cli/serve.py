"""``serve``: the server that runs queued jobs and triggers."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import directory_option, emit, is_quiet, output_options, settings_for

if TYPE_CHECKING:
    from pipeline.service.server import PollResult, Server
    from pipeline.settings import Settings


@click.command(short_help="Run queued jobs and triggers.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Jobs that run at once.")
@click.option(
    "--starts",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Driver starts per job, counting restarts.",
)
@click.option(
    "--every", type=click.FloatRange(min=0.05), default=2.0, show_default=True, help="Seconds between rounds."
)
@click.option("-f", "--file", "triggers", metavar="FILE", multiple=True, help="Triggers; default: triggers.yaml.")
@click.option("--once", is_flag=True, help="Poll once and exit, for cron.")
@click.option("--wait", is_flag=True, help="With --once: wait until the jobs that it started have ended.")
@click.option("--status", "is_status", is_flag=True, help="Show the running servers.")
@click.option("--print", "template", type=click.Choice(["systemd", "cron", "kubernetes"]), help="Print a template.")
@directory_option
@output_options
def serve(*, is_status: bool, template: str | None, once: bool, wait: bool, **options: Any) -> None:
    """Run queued jobs and triggers until a signal comes. Running jobs survive the server.

    Several servers may share one root of job directories. SIGTERM or Ctrl-C shuts down cleanly, with exit code 0.
    """
    if wait and not once:
        raise click.UsageError("--wait needs --once")
    settings = settings_for(directory=options["directory"], triggers=options["triggers"] or None)
    if template is not None:
        _print_template(template, options)
    elif is_status:
        _show_servers(settings)
    elif once:
        _serve_once(_server(settings, options), wait=wait)
    else:
        _serve(_server(settings, options), seconds=options["every"])


def _server(settings: Settings, options: dict[str, Any]) -> Server:
    from pipeline.service.queue import RestartPolicy
    from pipeline.service.server import Server, load_server_tasks

    policy = RestartPolicy(starts=options["starts"])
    return Server(settings, limit=options["jobs"], restart_policy=policy, tasks=load_server_tasks(settings))


def _serve(server: Server, *, seconds: float) -> None:
    import logging

    from pipeline.service.server import serve as serve_until

    is_over = threading.Event()

    def end(number: int, frame: object) -> None:
        if is_over.is_set():
            # Asked twice: whatever it hangs in is left as it is; nothing is held in memory.
            os._exit(128 + number)
        is_over.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    if not is_quiet():
        # What a server does is told as it happens; there is nobody who asked for more with -v.
        logging.getLogger("pipeline.service.server").setLevel(logging.INFO)
    serve_until(server, wait=is_over.wait, seconds=seconds)


def _serve_once(server: Server, *, wait: bool) -> None:
    served = server.serve_once()
    server.beat(served, state="stopped")
    details = {name: list(getattr(served, name)) for name in ("started", "running", "waiting", "failed")}
    if wait:
        details["ended"] = _ends(server, served)
    emit(details, lambda: _summary_text(details))


def _ends(server: Server, served: PollResult) -> list[Any]:
    from pipeline.errors import DriverLost
    from pipeline.jobs.directory import JobDirectory
    from pipeline.service.follow import EndMonitor

    ends = []
    for name in served.started:
        job = JobDirectory.open(f"{server.root.root}/{name}")
        try:
            ends.append([name, str(EndMonitor(job, server.settings.lease_seconds).wait())])
        except DriverLost:
            # The next round starts another one.
            ends.append([name, str(job.status())])
    return ends


def _summary_text(details: dict[str, list[Any]]) -> str:
    lines = [f"{word:<10}{job}" for word in ("started", "failed", "waiting") for job in details[word]]
    lines += [f"{'ended':<10}{job} {status}" for job, status in details.get("ended", [])]
    return "\n".join(lines) or "Nothing was to be started."


def _print_template(template: str, options: dict[str, Any]) -> None:
    from pipeline.cli.templates import TEMPLATES

    arguments = ["--jobs", str(options["jobs"])]
    arguments += ["--directory", options["directory"]] if options["directory"] else []
    arguments += [part for file in options["triggers"] for part in ("--file", file)]
    text = TEMPLATES[template](python=sys.executable, arguments=tuple(arguments), folder=os.getcwd())
    emit({"template": template, "text": text}, lambda: text.rstrip("\n"))


def _show_servers(settings: Settings) -> None:
    from pipeline.common.text import table_text
    from pipeline.common.units import utc_now
    from pipeline.service.queue import queued_marks
    from pipeline.service.servers import find_servers
    from pipeline.storage.store import open_store

    root, now = open_store(settings.directory), utc_now()
    servers = [server.to_dict(now=now) for server in find_servers(root)]
    marks = queued_marks(root)
    rows = [_row(server) for server in servers]
    header = ["SERVER", "STATE", "SEEN", "RUNNING", "WAITING"]
    emit(
        {"servers": servers, "marked": marks},
        lambda: table_text(header, rows) if rows else "No server was ever here.\n  next:     python -m pipeline serve",
    )


def _row(server: dict[str, Any]) -> list[str]:
    state = "alive" if server["alive"] else "stopped" if server["state"] == "stopped" else "gone"
    running = f"{server['running']} of {server['jobs']}"
    return [server["name"], state, server["beat"], running, str(server["queued"])]
