"""Compare the embeddings of texts with those of sentence-transformers' own encode: vectors, and time.

    python -m benchmarks.texts FOLDER [--rows 512] [--batch 512] [--rounds 3]

FOLDER is a model as ``SentenceTransformer.save`` writes it. The lengths of texts are mixed, as those of support
tickets: log-normal, with a median of 20 words. Both use one thread, and take turns; the least time of each counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from time import perf_counter, process_time

import numpy as np
import pyarrow as pa

WORDS = ("the", "of", "and", "order", "late", "refund", "paid", "open", "customer", "asked", "again", "why", "twice")


def texts(rows: int, *, seed: int = 7) -> list[str]:
    """Return texts of mixed lengths."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(3.0, 0.9, rows).astype(int), 1, 180)
    return [" ".join(random.choice(WORDS, length)) for length in lengths]


def least(calls: dict[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, tuple[float, float]]:
    """Return the least CPU seconds and wall seconds of each call; they take turns."""
    found = dict.fromkeys(calls, (float("inf"), float("inf")))
    for _ in range(rounds):
        for name, call in calls.items():
            cpu, wall = process_time(), perf_counter()
            call()
            cpu, wall = process_time() - cpu, perf_counter() - wall
            found[name] = min(found[name][0], cpu), min(found[name][1], wall)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    import torch
    from sentence_transformers import SentenceTransformer

    from pipeline.models.cache import get_predictor
    from pipeline.models.registry import resolve
    from pipeline.spec.model_ref import ModelRef

    predictor, _ = get_predictor(resolve(ModelRef(options.folder)))
    library = SentenceTransformer(options.folder, device="cpu")
    torch.set_num_threads(1)
    rows = texts(options.rows)
    batches = [rows[start : start + options.batch] for start in range(0, len(rows), options.batch)]

    def ours() -> np.ndarray:
        tables = [pa.table({"text": batch}) for batch in batches]
        return np.concatenate([predictor.predict(predictor.encode(table), kind="prediction") for table in tables])

    def theirs() -> np.ndarray:
        return np.concatenate([library.encode(batch, show_progress_bar=False) for batch in batches])

    distance = float(np.abs(ours() - theirs()).max())
    usage = predictor.take_usage()
    found = least({"ours": ours, "encode": theirs}, options.rounds)
    (cpu, wall), (other_cpu, other_wall) = found["ours"], found["encode"]
    out = sys.stdout.write
    out(f"rows {len(rows):,} in batches of {options.batch:,}; torch {torch.__version__}, one thread\n")
    out(f"vectors differ by up to {distance:.1e}\n")
    out(f"padding: {usage['padded_tokens'] / usage['tokens']:.1%} of {usage['tokens']:,.0f} tokens\n")
    out(f"CPU  ours {cpu:.2f} s ({len(rows) / cpu:.1f} rows/s), encode {other_cpu:.2f} s: {other_cpu / cpu:.2f} ×\n")
    out(f"wall ours {wall:.2f} s, encode {other_wall:.2f} s: {other_wall / wall:.2f} ×\n")


if __name__ == "__main__":
    main()
