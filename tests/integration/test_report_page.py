"""The HTML report in a real browser: what it shows, and that it requests nothing."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.jobs.directory import JobDirectory
from pipeline.report.build import make_report
from pipeline.report.html.page import write_page
from pipeline.testing.jobs import REASON, small_job, write_receipts

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")


class Recorder(SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def page(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a job's page, and what was asked of its server."""
    made = small_job(tmp_path / "lake", sink=str(tmp_path / "out"), bad_every=10)
    job = JobDirectory.create(tmp_path / "jobs", made.plan, job="small-1")
    write_receipts(job, made)
    write_page(job, make_report(job))
    asked: list[str] = []
    handler = type("Handler", (Recorder,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=job.root))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/report.html", asked
    server.shutdown()
    server.server_close()
    thread.join()


def browse(*options: str, folder: Path) -> str:
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", *options],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


def test_a_browser_shows_the_page_and_requests_nothing_else(page: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = page
    shown = browse("--dump-dom", address, folder=tmp_path / "profile")
    assert f"8 × {REASON}" in shown
    assert shown.count("<figure>") >= 4
    assert "small-1</title>" in shown
    assert set(asked) <= {"/report.html", "/favicon.ico"}


@pytest.mark.parametrize("width", [420, 1080])
def test_nothing_is_wider_than_the_screen(page: tuple[str, list[str]], tmp_path: Path, width: int) -> None:
    """A page wider than its window is cut on a phone; the page measures itself in a frame of that width."""
    address, _ = page
    frame = tmp_path / "jobs" / "small-1" / "frame.html"
    frame.write_text(
        f'<iframe src=report.html width={width} height=900 onload="document.title = '
        'this.contentDocument.documentElement.scrollWidth"></iframe>'
    )
    shown = browse(
        "--dump-dom", "--virtual-time-budget=5000", address.replace("report.html", "frame.html"), folder=tmp_path / "p"
    )
    assert int(shown.partition("<title>")[2].partition("</title>")[0]) <= width
