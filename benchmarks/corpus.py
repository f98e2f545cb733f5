"""Run every file of folders through planning, a worker's scoring and the sink, and compare with pyarrow's own reading.

    python -m benchmarks.corpus FOLDER... [--step]

For the corpora of apache/parquet-testing and apache/arrow-testing. Each file is a source of its own. A child process
takes one after the other; a new one goes on after a file that ended it. A file is right if all its columns are
published bit by bit as pyarrow reads them, or refused with an `InputError`
or `InsufficientMemory`. Everything else is listed, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

STEP = "def step(frame):\n    return frame.assign(one_more=1.0)\n"
SECONDS = 120
"""Time limit of one file."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--step", action="store_true", help="with a map step")
    parser.add_argument("--from-file", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.from_file:
        return _work(json.loads(asked.from_file), has_step=asked.step)
    files = [path for folder in asked.folders for path in sorted(folder.rglob("*")) if path.is_file()]
    counts: Counter[str] = Counter()
    for path, outcome in _outcomes([str(path) for path in files], has_step=asked.step):
        counts[outcome.split(":")[0]] += 1
        if not outcome.startswith(("right", "refused:")):
            print(f"{path}: {outcome}", flush=True)
    print(json.dumps(dict(counts.most_common()), indent=1))
    return int(any(name not in ("right", "refused", "refused, but pyarrow reads it") for name in counts))


def _outcomes(files: list[str], *, has_step: bool) -> Iterator[tuple[str, str]]:
    while files:
        command = [sys.executable, __file__, "--from-file", json.dumps(files), *(["--step"] if has_step else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            assert child.stdout is not None
            done = 0
            for line in child.stdout:
                yield files[done], json.loads(line)
                done += 1
        if done < len(files):
            yield files[done], f"the process ended with {child.returncode}"
            done += 1
        files = files[done:]


def _work(files: list[str], *, has_step: bool) -> int:
    """Print one line of JSON per file."""
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as work:
        model = _model(Path(work))
        for number, path in enumerate(files):
            signal.alarm(SECONDS)
            folder = Path(work, str(number))
            folder.mkdir()
            print(json.dumps(_outcome(Path(path), folder, model, has_step=has_step)), file=answers, flush=True)
    return 0


def _model(work: Path) -> Path:
    import xgboost

    data = xgboost.DMatrix(np.arange(20.0).reshape(-1, 1), np.arange(20.0), feature_names=["feature"])
    path = work / "model.ubj"
    xgboost.train({"nthread": 1, "max_depth": 2}, data, 2).save_model(path)
    return path


def _outcome(path: Path, folder: Path, model: Path, *, has_step: bool) -> str:
    from pipeline.errors import InputError, InsufficientMemory, PipelineError

    expected = _read(path)
    # Without a name of its own in the file, the feature comes from the folder's name.
    place = folder / "lake" / "feature=1" / "file.parquet"
    place.parent.mkdir(parents=True)
    place.symlink_to(path)
    try:
        table = _run(place.parent.parent, folder, model, has_step=has_step)
    except (InputError, InsufficientMemory) as error:
        reading = "" if isinstance(expected, Exception) else ", but pyarrow reads it"
        return f"refused{reading}: {error.kind}: {error.message}: {error.found}"
    except PipelineError as error:
        return f"error {error.kind} ({error.exit_code}): {error.message}: {error.where}: {error.found}"
    except Exception as error:
        return f"defect: {type(error).__name__}: {error}\n{traceback.format_exc()}"
    if isinstance(expected, Exception):
        return f"published, but pyarrow cannot read it: {expected}"
    return _compared(expected, table)


def _read(path: Path) -> pa.Table | Exception:
    try:
        # Timestamps in INT96 in microseconds, as documented.
        file = pq.ParquetFile(path, page_checksum_verification=True, coerce_int96_timestamp_unit="us")
        return file.read(use_threads=False)
    except Exception as error:
        return error


def _run(lake: Path, folder: Path, model: Path, *, has_step: bool) -> pa.Table:
    from pipeline.spec.job_spec import JobSpec
    from pipeline.testing.inline import plan_inline, publish_inline, score_inline

    steps: list[dict[str, object]] = [{"score": {"model": str(model)}}]
    if has_step:
        (folder / "corpus_step.py").write_text(STEP)
        sys.path.insert(0, str(folder))
        steps.insert(0, {"map": "corpus_step:step"})
    spec = JobSpec.build(name="corpus", source={"path": str(lake)}, steps=steps, sink={"path": str(folder / "output")})
    job = score_inline(plan_inline(spec, directory=folder / "jobs"), directory=folder / "jobs", job="corpus")
    publish_inline(job)
    parts = [pq.ParquetFile(part).read(use_threads=False) for part in sorted((folder / "output").glob("*.parquet"))]
    return pa.concat_tables(parts)


def _compared(expected: pa.Table, table: pa.Table) -> str:
    """Return ``right``, or the first column that differs."""
    if expected.num_rows != table.num_rows:
        return f"other: {table.num_rows} rows for {expected.num_rows}"
    for name in expected.column_names:
        if name not in table.column_names:
            return f"other: no column {name!r}"
        old, new = expected[name].combine_chunks(), table[name].combine_chunks()
        # In Arrow, NaN is unequal to itself.
        if not old.equals(new) and (old.null_count, repr(old.to_pylist())) != (new.null_count, repr(new.to_pylist())):
            return f"other: column {name!r}: {old.type} -> {new.type}: {str(old)[:200]} -> {str(new)[:200]}"
    return "right"


if __name__ == "__main__":
    sys.exit(main())
