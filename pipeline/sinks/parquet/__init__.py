"""The Parquet sink: a folder of files, swapped whole or changed in place."""
