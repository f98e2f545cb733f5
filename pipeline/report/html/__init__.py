"""The report of a job as one HTML file, which requests nothing from a network."""
