"""The plan of a job, made before anything runs: columns, partitions, memory, batch sizes, children. Pure."""
