"""``dashboard``: the page of jobs from their directories, without a cluster."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import click

from pipeline.cli.options import directory_option, is_quiet, output_options, settings_for
from pipeline.errors import PipelineError, RefusedForSafety, SpecError

if TYPE_CHECKING:
    from pipeline.settings import Settings

logger = logging.getLogger(__name__)
HOST = "127.0.0.1"
SHOWN_CARDS = 5
"""Newest running jobs whose figures are shown where no job is chosen."""
SHOWN_JOBS = 100
FRESH_SECONDS = 0.9
"""Age up to which an answer is given again: browsers ask every second."""


@click.command(short_help="Show all jobs in a browser, without a cluster.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="Port; 0: any free one.")
@click.option("--open", "is_opened", is_flag=True, help="Show the page in a browser.")
@directory_option
@output_options
def dashboard(port: int, is_opened: bool, directory: str | None) -> None:
    """Serve a page with the figures of running, queued and finished jobs, from their directories, until Ctrl-C.

    It listens on 127.0.0.1 only, changes nothing, and needs no cluster.
    """
    import webbrowser

    server = make_server(settings_for(directory=directory), port=port)
    url = f"http://{HOST}:{server.server_address[1]}/pipeline"
    click.echo(url)
    if not is_quiet():
        click.echo("Ctrl-C ends it; the jobs are not affected.", err=True)
    if is_opened:
        webbrowser.open(url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


@click.command(short_help="Print metrics of jobs for Prometheus.")
@click.option("--output", metavar="FILE", help="Replace this file, as for the textfile collector of node_exporter.")
@directory_option
@output_options
def metrics(output: str | None, directory: str | None) -> None:
    """Print the metrics of running jobs, and of the newest job of each name, in the text format of Prometheus."""
    from pipeline.common.metrics import metrics_text
    from pipeline.storage.urls import storage_errors

    text = metrics_text(PageData(settings_for(directory=directory).directory).newest())
    if output is None:
        click.echo(text, nl=False)
        return
    # A collector reads the file at any time: it sees the old one or the new one.
    path = Path(output).absolute()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with storage_errors(str(path)):
        unfinished.write_text(text, encoding="utf-8")
        unfinished.chmod(0o644)
        unfinished.replace(path)


def make_server(settings: Settings, *, port: int) -> ThreadingHTTPServer:
    """Return a server of the page, which listens already.

    :raises SpecError: when the port is taken.
    """
    data = PageData(settings.directory)

    class Handler(_Handler):
        page_data = data

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise SpecError(
            "the port cannot be used",
            where="--port",
            found=f"{HOST}:{port}: {error.strerror or error}",
            next_step="choose another port, or leave --port out",
        ) from error
    server.daemon_threads = True
    return server


class PageData:
    """The figures that the page shows, read from job directories at most about once a second."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._answers: dict[str, tuple[float, dict[str, Any]]] = {}
        self._ended: dict[str, dict[str, Any]] = {}
        """Figures of jobs that have ended, by id and status: they change no more."""

    def read(self, job: str = "") -> dict[str, Any]:
        """Return the figures of a job, or of those that run and of the newest, and a line of each job."""
        with self._lock:
            read, answer = self._answers.get(job, (0.0, {}))
            if not answer or time.monotonic() - read > FRESH_SECONDS:
                answer = self._read(job)
                self._answers = {job: (time.monotonic(), answer)}
            return answer

    def newest(self) -> list[dict[str, Any]]:
        """Return the figures of the jobs that run, and of the newest job of each name."""
        from pipeline.jobs.listing import list_jobs

        chosen, names = [], set()
        for summary in list_jobs(self._root, limit=SHOWN_JOBS):
            for part in summary.children or (summary,):
                if part.status.is_active or part.record.name not in names:
                    chosen.append(part)
                names.add(part.record.name)
        with self._lock:
            figures = [self._figures(part.directory, str(part.status)) for part in chosen]
        return [known for known in figures if known is not None]

    def _read(self, job: str) -> dict[str, Any]:
        from pipeline.common.units import utc_now
        from pipeline.jobs.listing import JobSummary, list_jobs

        def lines(summary: JobSummary) -> list[dict[str, Any]]:
            line = {
                "job": summary.record.job,
                "status": str(summary.status),
                "done": summary.done,
                "planned": summary.record.partitions,
                "rows": summary.record.rows,
                "age": round(summary.age(now)),
            }
            return [line, *(entry for child in summary.children for entry in lines(child))]

        now, summaries = utc_now(), list_jobs(self._root, limit=SHOWN_JOBS)
        flat = [part for summary in summaries for part in (summary, *summary.children)]
        plain = [summary for summary in flat if not summary.children]
        running = [summary for summary in plain if summary.status.is_active]
        chosen = [part for part in plain if part.record.job == job] or running[:SHOWN_CARDS] or plain[:1]
        return {
            "is_dask": False,
            "jobs": [figures for part in chosen if (figures := self._figures(part.directory, str(part.status)))],
            "all": [line for summary in summaries for line in lines(summary)],
        }

    def _figures(self, directory: str, status: str) -> dict[str, Any] | None:
        from pipeline.jobs.directory import JobDirectory
        from pipeline.jobs.status import Status
        from pipeline.report.live_figures import stored_figures

        key = f"{directory} {status}"
        if key in self._ended:
            return self._ended[key]
        try:
            figures = stored_figures(JobDirectory.open(directory))
        except (PipelineError, OSError) as error:
            logger.warning("left out %s: %s", directory, error)
            return None
        if Status(status).is_final:
            self._ended[key] = figures
        return figures


class _Handler(BaseHTTPRequestHandler):
    page_data: PageData

    def do_GET(self) -> None:
        from pipeline.common import live_page, metrics

        url = urlsplit(self.path)
        try:
            self._check_host()
            if url.path == "/":
                self.send_response(302)
                self.send_header("Location", f"/{live_page.PAGE}")
                self.end_headers()
            elif url.path == f"/{live_page.PAGE}":
                self._answer(live_page.page(), "text/html; charset=utf-8", live_page.HEADERS)
            elif url.path == f"/{live_page.DATA}":
                job = parse_qs(url.query).get("job", [""])[0]
                body = json.dumps(self.page_data.read(job)).encode()
                self._answer(body, "application/json", live_page.HEADERS)
            elif url.path == f"/{live_page.METRICS}":
                text = metrics.metrics_text(self.page_data.newest())
                self._answer(text.encode(), metrics.CONTENT_TYPE, live_page.HEADERS)
            else:
                self.send_error(404)
        except RefusedForSafety as error:
            self.send_error(403, error.message)
        except PipelineError as error:
            self.send_error(500, error.message)

    def _check_host(self) -> None:
        """Refuse requests for another host: a page of the web whose name was made to point to this machine.

        :raises RefusedForSafety: for such a request.
        """
        host = str(self.headers.get("Host", "")).rpartition(":")[0].strip("[]")
        if host not in (HOST, "localhost", "::1"):
            raise RefusedForSafety("only this machine is answered", found=host)

    def _answer(self, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
