"""The live page in a browser: its numbers are those of the receipts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from distributed import Client, LocalCluster

import pipeline
from pipeline.cli.dashboard import make_server
from pipeline.execution.dashboard_page import LivePage
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.jobs import small_job, write_receipts

DEADLY = """
import os, signal

from distributed import get_worker


def kill_once(frame):
    try:
        get_worker()
        os.close(os.open("{mark}", os.O_CREAT | os.O_EXCL))
    except (ValueError, FileExistsError):
        return frame
    os.kill(os.getpid(), signal.SIGKILL)
"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    small = small_job(tmp_path, sink=str(tmp_path / "out"), bad_every=10)
    directory = JobDirectory.create(tmp_path / "jobs", small.plan, job="small-1")
    directory.set_status(Status.RUNNING)
    directory.events.append("partition", partition="00000", outcome="retry", attempt=1, reason="its worker died")
    write_receipts(directory, small)
    JobDirectory.create(tmp_path / "jobs", small.plan, job="queued-1").set_status(Status.QUEUED)
    return directory


@pytest.fixture
def site(tmp_path: Path, job: JobDirectory) -> Iterator[str]:
    server = make_server(Settings(directory=str(tmp_path / "jobs")), port=0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def visited(url: str, folder: Path) -> str:
    """Return the page as a browser shows it."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def figures_of(page: str) -> dict[str, int]:
    found = re.findall(r'data-figure="(\w+)">([\d,]+)<', page)
    return {name: int(text.replace(",", "")) for name, text in found}


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_scheduler_of_the_user_shows_two_jobs_to_their_end(make_spec: Callable[..., JobSpec], tmp_path: Path) -> None:
    """Both run at once, and a worker is killed meanwhile."""
    (tmp_path / "deadly_steps.py").write_text(DEADLY.replace("{mark}", str(tmp_path / "killed")))
    settings = Settings.load(directory=str(tmp_path / "jobs"), import_paths=[str(tmp_path), str(Path(__file__).parent)])
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        jobs = [
            pipeline.Job(
                settings=settings,
                **{**make_spec(maps=(step,), sink={"path": str(tmp_path / name)}).to_dict(), "name": name},
            )
            for name, step in (("first", "deadly_steps:kill_once"), ("second", "steps_for_tests:add_ratio"))
        ]
        with ThreadPoolExecutor(2) as pool:
            reports = list(pool.map(lambda job: job.run(client=client, callbacks=[]), jobs))
        page = visited(LivePage(client).url, tmp_path)
    cards = {name: card for card in page.split("<article")[1:] for name in re.findall(r'data-job="(\w+)-', card)}
    assert cards.keys() == {"first", "second"}
    for report in reports:
        figures = figures_of(cards[report.name])
        assert f'<span class="state">{report.status}</span>' in cards[report.name]
        assert figures["rows_done"] == report.rows.input
        assert (figures["done"], figures["running"], figures["waiting"]) == (report.partitions.done, 0, 0)
    assert figures_of(cards["first"])["lost_workers"] >= 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_numbers_on_the_page_are_those_of_the_receipts(site: str, job: JobDirectory, tmp_path: Path) -> None:
    shown = visited(f"{site}/pipeline", tmp_path)
    figures = figures_of(shown)
    ledger = job.ledger()
    assert figures["rows_done"] == sum(receipt.rows.input for receipt in ledger.done)
    assert figures["rejected"] == ledger.rows.rejected > 0
    assert (figures["done"], figures["running"], figures["lost_workers"]) == (len(ledger.done), 0, 1)
    for reason, rows in ledger.reasons.items():
        assert f'<td>{reason}</td><td class="n">{rows:,}</td>' in shown
    assert "queued-1" in shown
    assert "QUEUED" in shown


def test_server_answers_for_this_machine_only(site: str) -> None:
    """A page of the web could make its own name point to 127.0.0.1 and read the figures."""
    assert json.load(urlopen(f"{site}/pipeline.json"))["jobs"][0]["job"] == "small-1"
    metrics = urlopen(f"{site}/pipeline/metrics").read().decode()
    assert 'pipeline_job_status{job="small-1",name="small",status="RUNNING"} 1\n' in metrics
    with pytest.raises(HTTPError) as caught:
        urlopen(Request(f"{site}/pipeline.json", headers={"Host": "evil.example:80"}))
    assert caught.value.code == 403
    caught.value.close()
