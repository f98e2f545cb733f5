"""Compare predictors of tree ensembles: the library that trained a model, engines that read it, and the tree engine.

    python benchmarks/engines.py                        # one thread; about half an hour
    python benchmarks/engines.py --threads 2            # of each predictor
    python benchmarks/engines.py --models lightgbm --rows 1 4096 --repeats 3

All score the same float32 rows in turns. Each round gives a ratio to the library in that round, and the medians of the
ratios are printed: ratios hold on another machine, times do not. Outputs are compared with the library's: equal in
every bit, or by how much they differ at most. A predictor that is not installed, or does not take a model, says so.

    pip install lightgbm scikit-learn scikit-learn-intelex onnxruntime onnxmltools skl2onnx treelite tl2cgen lleaves
    pip install "llvmlite<0.45"  # for lleaves 1.3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.models.trees import TreeEngine, kernel_name, read_xgboost
from pipeline.models.trees.lightgbm import lightgbm_output, read_lightgbm
from pipeline.models.trees.sklearn import read_sklearn, sklearn_output

FEATURES = 28
SHORTEST = 0.02
"""Seconds of one timing: small batches are scored so often that they take that long."""
COMPILED_LEAVES = 60_000
"""Leaves up to which models are compiled to C or LLVM: a thousand trees take hours."""

Score = Callable[[np.ndarray], np.ndarray]


class Unsupported(Exception):
    """A predictor does not take this model."""


class Model(NamedTuple):
    """A trained model, and how the library itself scores it."""

    kind: str
    library: Any
    leaves: int
    score: Score


def make_data(rows: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, FEATURES), dtype=np.float32)
    score = 2 * np.sin(3 * matrix[:, 0]) + matrix @ np.linspace(-1, 1, FEATURES, dtype=np.float32)
    return matrix, (score + rng.standard_normal(rows, dtype=np.float32) > 0).astype(np.float32)


def train_xgboost(trees: int, depth: int, threads: int) -> Model:
    import xgboost

    data = xgboost.DMatrix(*make_data(50_000, seed=0))
    parameters = {"objective": "binary:logistic", "max_depth": depth, "eta": 0.05, "verbosity": 0, "nthread": threads}
    booster = xgboost.train(parameters, data, trees)
    return Model("xgboost", booster, trees << depth, booster.inplace_predict)


def train_lightgbm(trees: int, leaves: int, threads: int) -> Model:
    import lightgbm

    parameters = {"objective": "binary", "num_leaves": leaves, "learning_rate": 0.05, "verbose": -1}
    booster = lightgbm.train(parameters, lightgbm.Dataset(*make_data(50_000, seed=0)), trees)
    return Model("lightgbm", booster, trees * leaves, lambda rows: booster.predict(rows, num_threads=threads))


def train_sklearn(trees: int, leaves: int | None, threads: int) -> Model:
    from sklearn.ensemble import RandomForestClassifier

    model = RandomForestClassifier(trees, max_leaf_nodes=leaves, n_jobs=threads, random_state=0)
    model.fit(*make_data(50_000, seed=0))
    count = sum(tree.tree_.n_leaves for tree in model.estimators_)
    return Model("sklearn", model, count, lambda rows: model.predict_proba(rows)[:, 1])


MODELS: dict[str, Callable[[int], Model]] = {
    "xgboost, 300 x depth 6": lambda threads: train_xgboost(300, 6, threads),
    "xgboost, 1000 x depth 8": lambda threads: train_xgboost(1000, 8, threads),
    "lightgbm, 300 x 100 leaves": lambda threads: train_lightgbm(300, 100, threads),
    "sklearn, forest of 200 x 200 leaves": lambda threads: train_sklearn(200, 200, threads),
    "sklearn, forest of 100 full trees": lambda threads: train_sklearn(100, None, threads),
}
SMALL: dict[str, Callable[[int], Model]] = {
    "xgboost, 20 x depth 4": lambda threads: train_xgboost(20, 4, threads),
    "lightgbm, 20 x 20 leaves": lambda threads: train_lightgbm(20, 20, threads),
    "sklearn, forest of 20 x 20 leaves": lambda threads: train_sklearn(20, 20, threads),
}
"""Models of ``--small``: they prove that the script works."""


def use_ours(model: Model, threads: int) -> Score:
    if model.kind == "xgboost":
        engine = TreeEngine(read_xgboost(json.loads(bytes(model.library.save_raw("json")))), transform="sigmoid")
    elif model.kind == "lightgbm":
        text = model.library.model_to_string()
        engine = TreeEngine(read_lightgbm(text, value_type=np.float32), transform=lightgbm_output(text))
    else:
        engine = TreeEngine(read_sklearn(model.library), transform=sklearn_output(model.library))
        return lambda rows: engine.predict(rows, threads=threads)[:, 1]
    return lambda rows: engine.predict(rows, threads=threads)


def use_onedal(model: Model, threads: int) -> Score:
    import daal4py

    if model.kind == "sklearn":
        raise Unsupported("daal4py.mb converts no forests of scikit-learn")
    daal4py.daalinit(threads)
    converted = daal4py.mb.convert_model(model.library)
    return lambda rows: converted.predict_proba(rows)[:, 1]


def use_onnx(model: Model, threads: int) -> Score:
    import onnxmltools
    import onnxruntime
    from onnxmltools.convert.common.data_types import FloatTensorType

    types = [("input", FloatTensorType([None, FEATURES]))]
    if model.kind == "sklearn":
        import skl2onnx

        types = [("input", skl2onnx.common.data_types.FloatTensorType([None, FEATURES]))]
        made = skl2onnx.convert_sklearn(model.library, initial_types=types, options={"zipmap": False})
    elif model.kind == "lightgbm":
        made = onnxmltools.convert_lightgbm(model.library, initial_types=types, zipmap=False)
    else:
        made = onnxmltools.convert_xgboost(model.library, initial_types=types)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_outputs()[-1].name
    return lambda rows: session.run([name], {"input": rows})[0][:, 1]


def _treelite(model: Model) -> Any:
    import treelite

    if model.kind == "sklearn":
        return treelite.sklearn.import_model(model.library)
    reader = treelite.frontend.from_xgboost if model.kind == "xgboost" else treelite.frontend.from_lightgbm
    return reader(model.library)


def _second(found: np.ndarray) -> np.ndarray:
    """Return the probabilities of the second class."""
    found = found.reshape(len(found), -1)
    return found[:, -1]


def use_treelite(model: Model, threads: int) -> Score:
    import treelite

    converted = _treelite(model)
    return lambda rows: _second(treelite.gtil.predict(converted, rows, nthread=threads))


def use_tl2cgen(model: Model, threads: int) -> Score:
    import tl2cgen

    _check_size(model)
    converted = _treelite(model)
    folder = tempfile.mkdtemp()
    file = str(Path(folder, "model.so"))
    tl2cgen.export_lib(converted, toolchain="gcc", libpath=file, params={"parallel_comp": 8})
    predictor = tl2cgen.Predictor(file, nthread=threads)
    kind = "float64" if model.kind == "lightgbm" else "float32"
    return lambda rows: _second(predictor.predict(tl2cgen.DMatrix(rows.astype(kind), dtype=kind)))


def use_lleaves(model: Model, threads: int) -> Score:
    import lleaves

    if model.kind != "lightgbm":
        raise Unsupported("lleaves compiles models of LightGBM only")
    _check_size(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.txt")
        model.library.save_model(file)
        compiled = lleaves.Model(model_file=str(file))
        compiled.compile()
    return lambda rows: compiled.predict(rows, n_jobs=threads)


def _check_size(model: Model) -> None:
    if model.leaves > COMPILED_LEAVES:
        raise Unsupported(f"not compiled: {model.leaves:,} leaves, more than {COMPILED_LEAVES:,}")


CONTENDERS: dict[str, Callable[[Model, int], Score]] = {
    "ours": use_ours,
    "oneDAL": use_onedal,
    "ONNX Runtime": use_onnx,
    "treelite (GTIL)": use_treelite,
    "tl2cgen": use_tl2cgen,
    "lleaves": use_lleaves,
}


def build(model: Model, threads: int, chosen: list[str]) -> Iterator[tuple[str, Score]]:
    """Yield the contenders that take this model, and say why the others do not."""
    rows, _ = make_data(3, seed=2)
    for name in chosen:
        begin = time.perf_counter()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                score = CONTENDERS[name](model, threads)
                score(rows)
        except Unsupported as reason:
            print(f"- {name}: {reason}", flush=True)
        except Exception as error:
            message = str(error).strip().splitlines() or [""]
            print(f"- {name}: {type(error).__name__}: {message[0][:150]}", flush=True)
        else:
            print(f"- {name}: ready after {time.perf_counter() - begin:.1f} s", flush=True)
            yield name, score


def timed(score: Score, rows: np.ndarray, calls: int = 1) -> tuple[float, np.ndarray]:
    """Return the seconds of one call, and its result."""
    begin = time.perf_counter()
    for _ in range(calls):
        found = score(rows)
    return (time.perf_counter() - begin) / calls, found


def difference(found: np.ndarray, wanted: np.ndarray) -> str:
    if found.dtype == wanted.dtype and found.tobytes() == wanted.tobytes():
        return "equal"
    return f"{np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max():.1e}"


def compare(model: Model, scores: dict[str, Score], *, rows: int, repeats: int, longest: float) -> None:
    """Print the ratios of one batch size, and drop the contenders that take too long."""
    matrix, _ = make_data(rows, seed=1)
    _, wanted = timed(model.score, matrix)
    calls, outputs = {}, {}
    for name, score in [("the library", model.score), *list(scores.items())]:
        part = matrix[: max(1, rows // 20)]
        guess = timed(score, part)[0] * rows / len(part)
        if name in scores and guess > longest:
            print(f"- {name}: {rows:,} rows take about {guess:.1f} s, more than --longest")
            del scores[name]
            continue
        first, outputs[name] = timed(score, matrix)
        calls[name] = max(1, int(SHORTEST / first))
    chosen = {"the library": model.score, **scores}
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(repeats):
        first_name = turn % len(chosen)
        for name in [*list(chosen)[first_name:], *list(chosen)[:first_name]]:
            times[name].append(timed(chosen[name], matrix, calls[name])[0])
    print(
        f"\n| {rows:,} rows | times the library | lowest - highest | rows/s | bits |\n| --- | --- | --- | --- | --- |"
    )
    for name, found in times.items():
        ratios = [theirs / own for theirs, own in zip(times["the library"], found, strict=True)]
        span = f"{min(ratios):.2f} - {max(ratios):.2f}"
        speed = f"{rows / statistics.median(found):,.0f}"
        same = difference(outputs[name], wanted)
        print(f"| {name} | {statistics.median(ratios):.2f} | {span} | {speed} | {same} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of each predictor")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4096, 200_000], help="rows of a batch")
    parser.add_argument("--longest", type=float, default=15.0, help="seconds that a contender may take for a batch")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--models", default="", help="only models with this in their name")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--small", action="store_true", help="small models: to see whether the script works")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ.setdefault("OMP_NUM_THREADS", str(chosen.threads))
    print(f"{chosen.threads} threads, {kernel_name()}, outputs are probabilities")
    for name, train in (SMALL if chosen.small else MODELS).items():
        if chosen.models in name:
            print(f"\n## {name}\n", flush=True)
            model = train(chosen.threads)
            scores = dict(build(model, chosen.threads, chosen.contenders))
            for rows in chosen.rows:
                compare(model, scores, rows=rows, repeats=chosen.repeats, longest=chosen.longest)


if __name__ == "__main__":
    main()
