"""The Parquet sink: a folder of files, swapped as a whole or changed in place."""
