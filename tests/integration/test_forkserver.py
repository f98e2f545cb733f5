"""The process from which workers are forked, in separate processes: each process has one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.common.cores import core_count
from pipeline.common.forkserver import likely_environment, thread_environment
from pipeline.testing.processes import wait_until

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork servers are used on Linux only")

CLUSTER = """
import gc, json, os, sys
from pipeline.common import forkserver as forks
from pipeline.execution.clusters.local import LocalProcesses
from pipeline.settings import Settings

def seen():
    names = ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "ARROW_DEFAULT_MEMORY_POOL")
    with open(f"/proc/{os.getppid()}/environ") as file:
        given = dict(line.split("=", 1) for line in file.read().split("\\0") if "=" in line)
    loaded = "pipeline.execution.tasks" in sys.modules and "xgboost" in sys.modules
    parent = open(f"/proc/{os.getppid()}/cmdline").read()
    kept = gc.get_freeze_count() > 100_000
    variables = [given.get(name) for name in names]
    return {"variables": variables, "loaded": loaded, "kept": kept, "forked": "forkserver" in parent}

def look(workers, threads):
    with LocalProcesses(Settings(workers=workers, threads=threads, memory_limit="1 GiB")).open() as client:
        return list(client.run(seen).values())
"""


def run(folder: Path, code: str) -> Any:
    (folder / "main.py").write_text(CLUSTER + "\nif __name__ == '__main__':\n    " + "\n    ".join(code.splitlines()))
    done = subprocess.run([sys.executable, "main.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_workers_are_forked_with_their_variables_and_imports_which_no_collection_visits(tmp_path: Path) -> None:
    first, second = run(
        tmp_path, "forks.start(forks.likely_environment(2, 1))\nprint(json.dumps([look(2, 1), look(1, 1)]))"
    )
    cores = core_count()
    expected = {
        "variables": [str(max(1, cores // 2)), "65536", "jemalloc"],
        "loaded": True,
        "kept": True,
        "forked": True,
    }
    assert first == [expected, expected]
    assert second == [{**expected, "variables": [str(cores), "65536", "jemalloc"]}], "another shape gets another server"


def test_a_cluster_beside_another_one_of_another_shape_does_without(tmp_path: Path) -> None:
    code = """
with LocalProcesses(Settings(workers=1, threads=1, memory_limit="1 GiB")).open() as client:
    other = look(2, 1)
    print(json.dumps([list(client.run(seen).values()), other]))
"""
    one, other = run(tmp_path, code)
    assert [found["forked"] for found in one] == [True]
    assert [found["forked"] for found in other] == ([False] * 2 if core_count() > 1 else [True] * 2)


ENVIRONMENT = """
def variables():
    return [os.environ.get(name) for name in ("LAKE_KEY", "GONE", "NEW")] + [seen()["forked"]]

def ask():
    with LocalProcesses(Settings(workers=1, threads=1, memory_limit="1 GiB")).open() as client:
        return list(client.run(variables).values())[0]

names = list(forks.likely_environment(1, 1))
before = [os.environ.get(name) for name in names]
os.environ.update(LAKE_KEY="first", GONE="x")
first = ask()
os.environ.update(LAKE_KEY="second", NEW="y")
second = ask()
del os.environ["GONE"]
third = ask()
print(json.dumps([first, second, third, before == [os.environ.get(name) for name in names]]))
"""


@pytest.mark.fault(84)
def test_workers_have_the_environment_of_now(tmp_path: Path) -> None:
    """Credentials that a notebook sets, rotates or removes after its first job; the notebook's own are untouched."""
    first, second, third, is_untouched = run(tmp_path, ENVIRONMENT)
    assert first == ["first", "x", None, True]
    assert second == ["second", "x", "y", True]
    assert third == ["second", None, "y", True]
    assert is_untouched


def test_unknown_fork_server_is_left_alone(tmp_path: Path) -> None:
    code = """
import multiprocessing
multiprocessing.get_context("forkserver").Process(target=seen).start()
print(json.dumps([forks.start(forks.likely_environment(1, 1)), forks.is_running()]))
"""
    assert run(tmp_path, code) == [False, False]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_fork_server_leaves_nothing_when_its_process_ends(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "main.py").write_text(
        "import time\nfrom pipeline.common import forkserver as forks\nfrom multiprocessing import forkserver\n"
        "forks.start(forks.likely_environment(1, 1))\n"
        "print(forkserver._forkserver._forkserver_pid, flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        server = int(process.stdout.readline())
        assert Path(f"/proc/{server}").exists()
        process.send_signal(number)
        process.wait(30)
        wait_until(lambda: not Path(f"/proc/{server}").exists(), seconds=30)


def test_the_likely_environment_is_that_of_the_shape() -> None:
    cores = core_count()
    assert likely_environment(1, 1) == thread_environment(cores, 1)
    assert likely_environment(None, cores) == thread_environment(cores, cores)
    assert thread_environment(8, 2)["OMP_NUM_THREADS"] == "4"
    assert thread_environment(2, 16)["OMP_NUM_THREADS"] == "1"


def test_allocator_of_arrow_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARROW_DEFAULT_MEMORY_POOL", raising=False)
    assert thread_environment(2, 2)["ARROW_DEFAULT_MEMORY_POOL"] == "jemalloc"
    monkeypatch.setenv("ARROW_DEFAULT_MEMORY_POOL", "system")
    assert thread_environment(2, 2)["ARROW_DEFAULT_MEMORY_POOL"] == "system"


def test_other_users_cannot_reach_the_fork_server(tmp_path: Path) -> None:
    code = """
from multiprocessing import forkserver
forks.start(forks.likely_environment(1, 1))
where = forkserver._forkserver._forkserver_address
print(json.dumps([os.stat(path).st_mode & 0o777 for path in (where, os.path.dirname(where))]))
"""
    assert run(tmp_path, code) == [0o600, 0o700]


PARTS = """
def scores_alone():
    from pipeline.execution.clusters.client import warm_up
    warm_up("xgboost", has_steps=False)
    return "xgboost" in sys.modules, "sklearn" in sys.modules

def scores_and_steps():
    from pipeline.execution.clusters.client import warm_up
    warm_up("xgboost", has_steps=False)
    warm_up("xgboost", has_steps=True)
    return "xgboost" in sys.modules, "sklearn" in sys.modules

def whole_after_a_step():
    from pipeline.common.imports import require_whole_imports
    require_whole_imports()
    import xgboost
    return type(xgboost.XGBClassifier()).__mro__[-2].__module__.partition(".")[0]

def ask(steps, question):
    place = LocalProcesses(Settings(workers=1, threads=1, memory_limit="1 GiB"))
    place.preload(has_steps=steps)
    with place.open() as client:
        return list(client.run(question).values())[0]

first = ask(False, scores_alone)
print(json.dumps([first, ask(False, whole_after_a_step), ask(True, scores_alone), ask(False, scores_and_steps)]))
"""


def test_worker_that_only_scores_imports_xgboost_without_scikit_learn(tmp_path: Path) -> None:
    """It takes longer than all else. A process that runs a step gets all of xgboost, and a server for steps has it."""
    pytest.importorskip("sklearn")
    alone, base, with_steps, next_job_with_steps = run(tmp_path, PARTS)
    assert alone == [True, False]
    assert next_job_with_steps == [True, True]
    assert base in ("sklearn", "xgboost")
    assert with_steps == [True, True]
