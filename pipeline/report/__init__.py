"""The report of a job, its rejects and its proof; live progress, the job log, hooks and lineage while it runs."""
