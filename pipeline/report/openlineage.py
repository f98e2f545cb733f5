"""OpenLineage events of a job: inputs and outputs, with schemas and row counts (the extra ``openlineage``).

The transport (console, file, HTTP, Kafka, …) is configured by OpenLineage itself: ``openlineage.yml`` or variables
``OPENLINEAGE_…``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from pipeline.errors import SpecError
from pipeline.jobs.directory import JobDirectory
from pipeline.report.hook_delivery import DeliveryAttempt, Message
from pipeline.spec.parts import Hook
from pipeline.storage.urls import is_local_path, local_path

PRODUCER = "https://pypi.org/project/dask-batch-pipeline/"
STATES = {
    "start": "START",
    "success": "COMPLETE",
    "warnings": "COMPLETE",
    "failure": "FAIL",
    "cancelled": "ABORT",
    "interrupted": "ABORT",
}
"""The OpenLineage state for each event of a job."""


def dataset_of(path: str) -> tuple[str, str]:
    """Return namespace and name of the dataset at ``path``, by OpenLineage's naming rules."""
    if is_local_path(path):
        return "file", str(local_path(path))
    parts = urlsplit(path)
    return f"{parts.scheme}://{parts.netloc}", parts.path.strip("/") or "/"


class Lineage:
    """Send events about one run of one job."""

    def __init__(self, job: JobDirectory) -> None:
        self._job = job
        number = sum(event["event"] == "driver" for event in job.events.read())
        self.run = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PRODUCER}{job.id}/{number}"))
        """Run id, common to all events of one driver."""

    @cached_property
    def _client(self) -> Any:
        try:
            from openlineage.client import OpenLineageClient
        except ImportError as error:
            raise SpecError(
                "OpenLineage's client is not installed",
                where="hooks.openlineage",
                found=str(error),
                next_step="pip install 'dask-batch-pipeline[openlineage]'",
            ) from error
        return OpenLineageClient()

    def send(self, hook: Hook, message: Message) -> DeliveryAttempt:
        """Send ``message`` as an OpenLineage event.

        :raises SpecError: if the extra is not installed.
        """
        self._client.emit(self.make_event(hook, json.loads(message.body)))
        return DeliveryAttempt(True)

    def make_event(self, hook: Hook, facts: Mapping[str, Any]) -> Any:
        """Build the OpenLineage event for the facts of a message."""
        from openlineage.client.event_v2 import Job, Run, RunEvent, RunState

        return RunEvent(
            eventType=RunState[STATES[facts["event"]]],
            eventTime=facts["time"],
            run=Run(self.run, facets=_run_facets(facts)),
            job=Job(str(hook.openlineage), str(facts["name"]), facets=_job_facets()),
            producer=PRODUCER,
            inputs=self._inputs(facts),
            outputs=self._outputs(facts),
        )

    def _inputs(self, facts: Mapping[str, Any]) -> list[Any]:
        from openlineage.client.event_v2 import InputDataset
        from openlineage.client.facet_v2 import input_statistics_input_dataset as statistics

        plan = self._job.plan
        parts = [child.plan for child in self._job.children()] or [plan]
        paths = plan.spec.source.path
        paths = (paths,) if isinstance(paths, str) else paths
        # Counts are of the whole source. With several paths, they cannot be assigned to one of them.
        counts = {}
        if len(paths) == 1:
            files = {file.path: file for part in parts for file in part.files}.values()
            counts["inputStatistics"] = statistics.InputStatisticsInputDatasetFacet(
                rowCount=sum(file.rows for file in files),
                size=sum(file.size for file in files),
                fileCount=len(files),
            )
        schema = {"schema": _schema_facet(parts[0].source_schema)}
        return [
            InputDataset(*dataset_of(self._job.resolve(path)), facets=dict(schema), inputFacets=dict(counts))
            for path in paths
        ]

    def _outputs(self, facts: Mapping[str, Any]) -> list[Any]:
        from openlineage.client.event_v2 import OutputDataset
        from openlineage.client.facet_v2 import output_statistics_output_dataset as statistics

        parts = [(child.plan.spec.sink.place, child.plan) for child in self._job.children()]
        plan = self._job.plan
        rows = (facts.get("rows") or {}).get("out")
        is_whole = facts["event"] in ("success", "warnings") and rows is not None and not parts
        counts = {"outputStatistics": statistics.OutputStatisticsOutputDatasetFacet(rowCount=rows)} if is_whole else {}
        return [
            OutputDataset(
                *dataset_of(self._job.resolve(path)),
                facets={"schema": _schema_facet(part.output_schema)},
                outputFacets=dict(counts),
            )
            for path, part in parts or [(plan.spec.sink.place, plan)]
        ]

    def close(self, seconds: float) -> None:
        """Send the events that the client still holds, for up to ``seconds``."""
        if "_client" in self.__dict__:
            self._client.close(seconds)


def _schema_facet(schema: bytes) -> Any:
    from openlineage.client.facet_v2 import schema_dataset

    fields = pa.ipc.read_schema(pa.py_buffer(schema))
    return schema_dataset.SchemaDatasetFacet(
        fields=[schema_dataset.SchemaDatasetFacetFields(name=field.name, type=str(field.type)) for field in fields]
    )


def _run_facets(facts: Mapping[str, Any]) -> dict[str, Any]:
    from openlineage.client.facet_v2 import error_message_run

    error = facts.get("error")
    if not error:
        return {}
    message = str(error.get("message") or error.get("kind"))
    return {"errorMessage": error_message_run.ErrorMessageRunFacet(message=message, programmingLanguage="python")}


def _job_facets() -> dict[str, Any]:
    from openlineage.client.facet_v2 import job_type_job

    kind = job_type_job.JobTypeJobFacet(processingType="BATCH", integration="DASK_BATCH_PIPELINE", jobType="JOB")
    return {"jobType": kind}
