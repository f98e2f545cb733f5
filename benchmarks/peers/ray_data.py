"""Ray Data: ``read_parquet``, ``map_batches`` with an actor that holds the model, ``write_parquet``."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pyarrow as pa
import ray

from benchmarks.peers.common import BATCH, CORES, arguments, features, load, matrix


class Scorer:
    def __init__(self, path: str) -> None:
        self.booster = load(path, threads=1)
        self.names = features(self.booster)

    def __call__(self, batch: pa.Table) -> pa.Table:
        found = self.booster.inplace_predict(matrix(batch, self.names))
        return batch.append_column("prediction", pa.array(found))


def main() -> None:
    data, model, out = arguments()
    ray.init(
        # Twice the processors, since actors and reading tasks reserve one each: otherwise nothing is read.
        num_cpus=2 * CORES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _node_ip_address="127.0.0.1",
        object_store_memory=2 << 30,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}},
    )
    frame = ray.data.read_parquet(str(data))
    scored = frame.map_batches(
        Scorer,
        fn_constructor_args=(str(model),),
        batch_format="pyarrow",
        batch_size=BATCH,
        concurrency=CORES,
        num_cpus=1,
    )
    scored.write_parquet(str(out))
    ray.shutdown()


if __name__ == "__main__":
    main()
