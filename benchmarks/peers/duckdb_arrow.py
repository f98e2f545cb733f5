"""Read and write with DuckDB; call the model on the Arrow batches that DuckDB streams."""

from __future__ import annotations

from collections.abc import Iterator

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.peers.common import BATCH, CORES, arguments, features, load, matrix


def main() -> None:
    data, model, out = arguments()
    booster = load(model, threads=CORES)
    names = features(booster)
    connection = duckdb.connect()
    connection.execute(f"SET threads = {CORES}")
    reader = connection.execute(f"SELECT * FROM read_parquet('{data}/**/*.parquet')").to_arrow_reader(BATCH)
    schema = reader.schema.append(pa.field("prediction", pa.float32()))

    def scored() -> Iterator[pa.RecordBatch]:
        for batch in reader:
            found = pa.array(booster.inplace_predict(matrix(batch, names)))
            yield pa.record_batch([*batch.columns, found], schema=schema)

    with pq.ParquetWriter(out / "part-0.parquet", schema) as writer:
        for batch in scored():
            writer.write_batch(batch)


if __name__ == "__main__":
    main()
