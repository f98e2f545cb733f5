"""PySpark on local cores: ``mapInArrow`` with the model loaded once in each Python worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import SparkSession
from pyspark.sql.types import FloatType, StructField, StructType

from benchmarks.peers.common import BATCH, CORES, arguments, features, load, matrix


def main() -> None:
    data, model, out = arguments()
    os.environ["PYSPARK_PYTHON"] = sys.executable
    session = (
        SparkSession.builder.master(f"local[{CORES}]")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.memory", "4g")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", str(BATCH))
        .config("spark.executorEnv.OMP_NUM_THREADS", "1")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    frame = session.read.option("recursiveFileLookup", "true").parquet(str(data))
    path = str(model)

    def score(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        booster = load(path, threads=1)
        names = features(booster)
        for batch in batches:
            found = pa.array(booster.inplace_predict(matrix(batch, names)))
            yield pa.RecordBatch.from_arrays([*batch.columns, found], names=[*batch.schema.names, "prediction"])

    schema = StructType([*frame.schema.fields, StructField("prediction", FloatType())])
    frame.mapInArrow(score, schema).write.mode("overwrite").parquet(str(out))
    session.stop()


if __name__ == "__main__":
    main()
