"""One partition on a worker: read, check, run the steps, score, write a checkpoint and a receipt. No Dask."""
