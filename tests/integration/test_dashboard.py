"""The dashboard of a local cluster, in a separate process, since the test checks if bokeh is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CODE = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import urlopen

from pipeline.execution.clusters.local import LocalProcesses
from pipeline.execution.dashboard_page import LivePage
from pipeline.settings import Settings

def get(url):
    try:
        with urlopen(url, timeout=60) as answer:
            return answer.status, answer.url.rpartition("/")[2], answer.read().decode()
    except HTTPError as error:
        return error.code, "", error.read().decode()

if __name__ == "__main__":
    {before}
    with LocalProcesses(Settings(workers=1, threads=1, memory_limit="1 GiB")).open() as client:
        site = client.dashboard_link.removesuffix("/status")
        page = LivePage(client)
        page.install()
        page.send(lambda: {"job": "churn-1"}, waits=True)
        live = [get(page.url), get(site + "/pipeline.json")]
        began = "bokeh" in sys.modules
        alive = get(site + "/health")[0]
        with ThreadPoolExecutor(4) as pool:
            first = list(pool.map(get, [site + "/status", site + "/", site + "/workers", site + "/status"]))
        print(json.dumps([began, alive, first, get(site + "/tasks"), get(site + "/nothing"), live]))
"""


def visit(folder: Path, *, before: str = "pass") -> Any:
    (folder / "main.py").write_text(CODE.replace("{before}", before))
    done = subprocess.run([sys.executable, "main.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_dashboard_is_imported_by_its_first_visitors(tmp_path: Path) -> None:
    began, alive, first, later, nothing, live = visit(tmp_path)
    assert (began, alive, nothing[0]) == (False, 200, 404)
    assert [page[:2] for page in first] == [[200, "status"], [200, "status"], [200, "workers"], [200, "status"]]
    assert all("bokeh" in page[2] for page in (*first, later))
    assert 'href="pipeline"' in later[2].replace("./pipeline", "pipeline")
    assert [page[:2] for page in live] == [[200, "pipeline"], [200, "pipeline.json"]]
    assert json.loads(live[1][2]) == {"is_dask": True, "jobs": [{"job": "churn-1"}]}


def test_cluster_works_without_bokeh(tmp_path: Path) -> None:
    began, alive, first, _, _, live = visit(tmp_path, before="sys.modules['distributed.dashboard.scheduler'] = None")
    assert (began, alive) == (False, 200)
    assert [page[0] for page in first] == [503] * 4
    assert "pip install bokeh" in first[0][2]
    assert [page[0] for page in live] == [200, 200]
