"""Measure a GPU: bits, messages, the device alone, the host alone, and whole jobs. Each part stands alone.

    python -m benchmarks.gpu facts                    # card, driver, versions, and what they can do at best
    python -m benchmarks.gpu bits                     # rows whose bits differ from the CPU's
    python -m benchmarks.gpu messages                 # what libraries raise and warn
    python -m benchmarks.gpu device                   # copies, and the predictor alone
    python -m benchmarks.gpu host                     # a job without its model: what the host can feed
    python -m benchmarks.gpu jobs [--rows 10000000]   # floor and ours, on the GPU and on the CPUs of this machine
    python -m benchmarks.gpu all --out FOLDER

Prints JSON, a line for each figure, and writes it to ``FOLDER/<part>.json``. ``benchmarks/gpu_session.sh`` runs all of
it on a machine that is lent for half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import gpu_device
from benchmarks.data import FEATURES, make_data, make_model
from pipeline.devices.inventory import read_inventory
from pipeline.devices.memory import device_batch_rows, device_row_bytes

MODELS = {"light": (300, 6), "heavy": (1000, 8)}
"""Trees and depth."""
PACKAGES = ("xgboost", "xgboost-cpu", "cupy-cuda13x", "dask", "distributed", "dask-cuda", "pyarrow", "numpy", "pandas")
HOST_BYTES_A_ROW = 4 * FEATURES
COPY_BYTES_A_SECOND = 50e9
"""Assumed of pinned copies over PCIe 5 × 16; ``device`` measures it."""


class Record:
    """Figures of a part: printed as they come, and kept in a file."""

    def __init__(self, part: str, folder: Path | None) -> None:
        self._path = folder / f"{part}.json" if folder else None
        self._figures: list[dict[str, Any]] = []

    def add(self, **figure: Any) -> None:
        """Print a figure, and store it at once: the machine may be taken away."""
        self._figures.append(figure)
        sys.stdout.write(json.dumps(figure, default=str) + "\n")
        sys.stdout.flush()
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._figures, indent=1, default=str) + "\n")


def facts(record: Record, options: argparse.Namespace) -> None:
    """Record the card, versions, and bytes and operations of a row."""
    inventory = read_inventory()
    record.add(machine=platform.machine(), python=platform.python_version(), cores=os.cpu_count())
    record.add(gpus=[gpu.to_dict() for gpu in inventory.gpus], driver=inventory.driver, reason=inventory.reason)
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    record.add(packages=found, xgboost=gpu_device.build_info())
    row = device_row_bytes(features=FEATURES, outputs=1)
    for gpu in inventory.gpus:
        rows = device_batch_rows(allowed=int(0.8 * gpu.memory), row_bytes=row, threads=16)
        record.add(
            gpu=gpu.name,
            bytes_a_row=row,
            batch_rows_of_16_threads=rows,
            upload_rows_a_second=round(COPY_BYTES_A_SECOND / HOST_BYTES_A_ROW),
        )
    for name, (trees, depth) in MODELS.items():
        record.add(model=name, trees=trees, depth=depth, node_visits_a_row=trees * depth)
    record.add(**gpu_device.device_facts())


def host(record: Record, options: argparse.Namespace) -> None:
    """Time everything of a job but the model: read, check, encode, send, write. The device's part takes no time."""
    data, model = make_data("even", options.rows), make_model(*MODELS["light"])
    with tempfile.TemporaryDirectory() as folder, gpu_device.without_model():
        for threads in options.threads:
            seconds = [_score_all(data, model, Path(folder) / f"{threads}-{n}", threads) for n in range(options.repeat)]
            record.add(part="host alone", threads=threads, rows_a_second=round(options.rows / median(seconds)))


def _score_all(data: Path, model: Path, folder: Path, threads: int) -> float:
    """Score all partitions of a job in this process, and return the seconds."""
    from pipeline.driver.prepare import prepare
    from pipeline.jobs.directory import JobDirectory
    from pipeline.models.process import ProcessFacts, set_process_facts
    from pipeline.scoring.partition import score_partition
    from pipeline.settings import Settings
    from pipeline.spec.job_spec import JobSpec

    spec = JobSpec.model_validate(
        {
            "name": "benchmark",
            "source": {"path": str(data)},
            "steps": [{"score": {"model": str(model)}}],
            "sink": {"path": str(folder / "published")},
        }
    )
    home = str(folder / "jobs")
    plan = prepare(spec, settings=Settings.load(directory=home, workers=1, threads=threads)).plan
    job = JobDirectory.create(home, plan, job="job")
    recipe = replace(job.recipe_of(job.rounds.all()[0]), device="cuda", fsync=False)
    set_process_facts(ProcessFacts(threads))
    score_partition(recipe, plan.partitions[0])
    rest = plan.partitions[1:]
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda partition: score_partition(recipe, partition), rest))
    seconds = time.perf_counter() - begin
    return seconds * plan.rows / max(1, sum(partition.rows for partition in rest))


def jobs(record: Record, options: argparse.Namespace) -> None:
    """Time the floor and whole jobs in turns, each in a process of its own, for each model."""
    data = make_data("even", options.rows)
    for name, shape in MODELS.items():
        model = make_model(*shape)
        contenders: dict[str, Callable[[], dict[str, Any]]] = {
            "floor (GPU)": lambda model=model: _child("benchmarks.gpu_floor", data, model, str(max(options.threads)))
        }
        for threads in options.threads:
            contenders[f"ours (GPU, {threads} threads)"] = lambda model=model, threads=threads: _ours(
                data, model, cluster=f"type: local-cuda\nthreads: {threads}\n", device="cuda"
            )
        contenders["ours (CPU, auto)"] = lambda model=model: _ours(data, model, device="cpu")
        contenders["ours (CPU, xgboost)"] = lambda model=model: _ours(data, model, device="cpu", engine="xgboost")
        found: dict[str, list[dict[str, Any]]] = {contender: [] for contender in contenders}
        for _ in range(options.repeat):
            for contender, run in contenders.items():
                found[contender].append(run())
        best = median(one["wall"] for one in found["floor (GPU)"])
        for contender, runs in found.items():
            wall = median(one["wall"] for one in runs)
            record.add(
                model=name,
                contender=contender,
                rows_a_second=round(options.rows / wall),
                of_the_floor=round(best / wall, 3),
                seconds=[round(one["wall"], 3) for one in runs],
                devices=runs[-1].get("devices"),
                engines=runs[-1].get("engines"),
            )


def _ours(data: Path, model: Path, *, cluster: str = "", device: str, engine: str = "auto") -> dict[str, Any]:
    variables = {"BENCHMARK_DEVICE": device, "BENCHMARK_ENGINE": engine}
    with tempfile.TemporaryDirectory() as folder:
        if cluster:
            (Path(folder) / "cluster.yaml").write_text(cluster)
            variables["BENCHMARK_CLUSTER"] = f"{folder}/cluster.yaml"
        return _child("benchmarks.ours", data, model, variables=variables)


def _child(
    module: str, data: Path, model: Path, *arguments: str, variables: dict[str, str] | None = None
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", module, str(data), str(model), out, *arguments]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **(variables or {})},
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


PARTS: dict[str, Callable[[Record, argparse.Namespace], None]] = {
    "facts": facts,
    "bits": gpu_device.bits,
    "messages": gpu_device.messages,
    "device": gpu_device.device,
    "host": host,
    "jobs": jobs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[4, 8, 16])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for part in PARTS if options.part == "all" else [options.part]:
        begin = time.perf_counter()
        record = Record(part, options.out)
        PARTS[part](record, options)
        record.add(part=part, seconds=round(time.perf_counter() - begin, 1))


if __name__ == "__main__":
    main()
