"""The report of a job, its rejects and its proof; live progress, the job log, hooks and lineage while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.common.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.report.build import make_report
    from pipeline.report.output import output_dask, output_frame
    from pipeline.report.rejects import RejectSummary, rejects_frame
    from pipeline.report.report import ChildReport, Report
    from pipeline.report.verify import Check, Verification

__all__ = [
    "Check",
    "ChildReport",
    "RejectSummary",
    "Report",
    "Verification",
    "make_report",
    "output_dask",
    "output_frame",
    "rejects_frame",
]

__getattr__, __dir__ = lazy_face(
    "pipeline.report",
    {
        "build": "make_report",
        "output": "output_dask output_frame",
        "rejects": "RejectSummary rejects_frame",
        "report": "ChildReport Report",
        "verify": "Check Verification",
    },
)
