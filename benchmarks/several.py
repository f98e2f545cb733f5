"""Several models in one read: champion and challenger, and chains of one model, as ratios of CPU time in one thread.

    python -m benchmarks.several [--rows 500000] [--features 28] [--rounds 100] [--repeat 7]

Contenders run in turn in one process, without Dask and files, in batches of 65,536 rows:

- ``predict``: the library's predictions of both models on matrices that exist already;
- ``both``: a chain of a champion and its challenger (``shadow``), from Arrow columns to Arrow columns;
- ``one``: a chain of the champion alone; ``apart``: two such chains, one a model;
- ``narrow``: a filter that keeps all rows, a selection, the champion, a selection;
- ``200 keys``: a model by key, the same one for each of 200 values (``score.by``).

The goal is both <= 1.15 x (predict + one - the champion's own predict): what the challenger costs is its predictions.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import thread_time

import numpy as np
import pyarrow as pa

from pipeline.models.cache import get_predictor
from pipeline.models.flavors.xgboost_train import train
from pipeline.models.model import ModelVersion, Predictor
from pipeline.models.registry import resolve
from pipeline.plan.recipe import FilterRecipe, KeyedRecipe, ScoreRecipe, SelectRecipe, Shadow, StageRecipe
from pipeline.scoring.contract import feature_rules
from pipeline.scoring.scorer import Scorer
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.recipes import make_batch, make_recipe

BATCH_ROWS = 65_536


def score_of(version: ModelVersion, output: str, shadow: Shadow | None = None) -> ScoreRecipe:
    """Return the recipe of one model."""
    rules = feature_rules(version, version.feature_names)
    return ScoreRecipe(version, version.feature_names, "prediction", (output,), rules, shadow=shadow)


def recipe_of(table: pa.Table, *scores: ScoreRecipe) -> StageRecipe:
    """Return a chain of ``scores`` whose output is their columns."""
    schema = pa.schema([(name, pa.float32()) for score in scores for name in score.outputs])
    made = make_recipe(scores[0].model, table.schema, keep=())
    return replace(made, chain=scores, output_schema=schema.serialize().to_pybytes(), batch_rows=BATCH_ROWS)


def narrow_of(table: pa.Table, score: ScoreRecipe) -> StageRecipe:
    """Return a chain of a filter that keeps all rows, a selection of all columns, the score, and a selection of it."""
    every = SelectRecipe(tuple((name, name) for name in table.column_names))
    made = recipe_of(table, score)
    chain = FilterRecipe("f0 > -1000000.0"), every, score, SelectRecipe((("p", "p"),))
    return replace(made, chain=chain)


def keyed_of(
    table: pa.Table, version: ModelVersion, predictor: Predictor, keys: int
) -> tuple[StageRecipe, list[Predictor]]:
    """Return a chain of one model for each of ``keys`` values, all the same one, and for all other values."""
    member = score_of(version, "p")
    keyed = KeyedRecipe("k", tuple(sorted(map(str, range(keys)))), (member,) * (keys + 1), "model")
    return replace(recipe_of(table, member), chain=(keyed,)), [predictor] * (keys + 1)


def scored(recipe: StageRecipe, predictors: list[Predictor], batches: list[pa.Table]) -> Callable[[], None]:
    """Return a function that scores ``batches``."""

    def run() -> None:
        scorer = Scorer(recipe, predictors)
        for batch in batches:
            scorer.score_batch(make_batch(batch))

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 500_000), ("features", 28), ("rounds", 100), ("repeat", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    random = np.random.default_rng(1)
    names = [f"f{number}" for number in range(chosen.features)]
    columns = random.normal(size=(chosen.features, chosen.rows)).astype(np.float32)
    table = pa.table(dict(zip(names, map(pa.array, columns), strict=True)))
    batches = [table.slice(start, BATCH_ROWS).combine_chunks() for start in range(0, chosen.rows, BATCH_ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        versions = [_train(Path(folder) / f"{seed}.ubj", table, seed, chosen.rounds) for seed in (1, 2)]
        predictors = [get_predictor(version)[0] for version in versions]
    champion, challenger = versions
    matrices = [predictors[0].encode(batch) for batch in batches]

    def predict(*used: Predictor) -> Callable[[], None]:
        def run() -> None:
            for predictor in used:
                for matrix in matrices:
                    predictor.predict(matrix, kind="prediction")

        return run

    keyed = [batch.append_column("k", pa.array(random.integers(0, 200, len(batch)))) for batch in batches]
    one = [recipe_of(table, score_of(version, "p")) for version in versions]
    shadow = recipe_of(table, score_of(champion, "p"), score_of(challenger, "q", Shadow("p", "half")))
    alone = [scored(recipe, [predictor], batches) for recipe, predictor in zip(one, predictors, strict=True)]
    contenders: dict[str, Callable[[], None]] = {
        "predict": predict(*predictors),
        "champion's predict": predict(predictors[0]),
        "one": alone[0],
        "apart": lambda: [run() for run in alone] and None,
        "both": scored(shadow, predictors, batches),
        "narrow": scored(narrow_of(table, score_of(champion, "p")), predictors[:1], batches),
        **{f"{keys} keys": scored(*keyed_of(table, champion, predictors[0], keys), keyed) for keys in (1, 200)},
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(chosen.repeat + 1):
        for name, run in contenders.items():
            started = thread_time()
            run()
            times[name].append(thread_time() - started)
    middle = {name: median(found[1:]) for name, found in times.items()}
    for name, seconds in middle.items():
        print(f"{name:<20}{seconds / chosen.rows * 1e9:8.0f} ns a row")
    print(f"both / predict      {middle['both'] / middle['predict']:8.3f}")
    challenger_cost = middle["both"] - middle["one"]
    challenger_predict = middle["predict"] - middle["champion's predict"]
    print(f"challenger / its predictions {challenger_cost / challenger_predict:5.3f}")
    print(f"narrow / one        {middle['narrow'] / middle['one']:8.3f}")
    print(f"200 keys / one      {middle['200 keys'] / middle['one']:8.3f}")
    print(f"apart / both        {middle['apart'] / middle['both']:8.3f}")


def _train(path: Path, table: pa.Table, seed: int, rounds: int) -> ModelVersion:
    frame = table.slice(0, 20_000).to_pandas()
    target = (frame["f0"] + frame["f1"] * frame["f2"] > 0).astype("float32")
    params = {"objective": "binary:logistic", "max_depth": 6, "seed": seed, "subsample": 0.7}
    return resolve(ModelRef(str(train(frame, target, path=path, params=params, rounds=rounds))))


if __name__ == "__main__":
    main()
