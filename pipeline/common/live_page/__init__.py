"""The live page of jobs: one HTML file that reads ``pipeline.json`` beside it every second and draws the figures.

The scheduler's dashboard and ``python -m pipeline dashboard`` serve the same file; `pipeline.report.live_figures` makes
the figures.
"""

from __future__ import annotations

from importlib.resources import files

PAGE = "pipeline"
"""Last part of the URL of the page."""
DATA = "pipeline.json"
"""Last part of the URL of the figures: ``{"jobs": [figures of a job, …]}``."""
METRICS = "pipeline/metrics"
"""URL of the same figures as metrics of Prometheus."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
}
"""Headers of both: nothing is loaded from elsewhere, and no text of a job is run."""


def page() -> bytes:
    """Return the page."""
    return (files(__name__) / "index.html").read_bytes()
