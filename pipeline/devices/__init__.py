"""GPUs: which there are, what their errors mean, and how many rows fit. No library of a GPU is imported here."""
