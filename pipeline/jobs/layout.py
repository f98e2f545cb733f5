"""Paths of the files of a job directory, relative to that directory. No other module spells out a path.

docs/job-directory.md shows the tree. The plan of round 0 is `pipeline.plan.table.PLAN_FILE`.
"""

from __future__ import annotations

from collections.abc import Iterable

JOB_FILE = "job.json"
SPEC_FILE = "spec.yaml"
EVENTS_FILE = "events.jsonl"
EVENTS = "events"
"""Holds the events on an object store, an object for each epoch."""
REPORT_FILE = "report.json"
REPORT_PAGE = "report.html"
PROGRESS_FILE = "progress.json"
SKETCHES_FILE = "sketches.json"
GATE = "gate"
GATE_RESULT = f"{GATE}/result.json"
PROBE_FILE = "probe.json"
REMOVED_FILE = "removed.json"
"""Mark of a stage whose data files were removed, because the job has succeeded."""
REJECTS_REMOVED_FILE = "rejects-removed.json"
"""Mark of a job or stage whose rejected rows were removed, because ``errors.retain`` has passed."""
SUPERSEDED_FILE = "superseded.json"
"""Mark of a job whose input belongs to another job from now on."""

ROUNDS = "rounds"
MANIFESTS = "manifests"
LEASES = "lease"
CANCEL_REQUESTS = "cancel"
LOGS = "logs"
WORKER_LOGS = f"{LOGS}/workers"
PARTITION_LOGS = f"{LOGS}/partitions"
SUBMISSIONS = "submissions"
STARTS = "starts"
CHILDREN = "children"
"""Holds the job directories of a fan-out's children."""
STEPS = "steps"
"""Holds the job directories of the stages of a job."""
PUBLICATIONS = "publications"
"""Holds a record of each manifest that a table or another transactional sink has published."""
COMMITS = "commits"
"""Holds the commits of a fan-out."""
CERTIFICATES = "tls"
BUDGET = "budget"
"""Holds what the job may spend, and has spent."""
BUDGET_LIMIT = f"{BUDGET}/limit.json"
CLUSTER = "cluster"
"""Holds the batch jobs of each driver."""
CODE = "code"
"""Holds the sources of the steps."""

DATA = "data"
REJECTS = "rejects"
RECEIPTS = "receipts"
ANSWERS = "answers"
"""Holds the answers of a service for partitions that are not committed."""
MERGED = "merged"
"""Holds output files that a sink merges before it publishes them."""


def gate_acceptance_path(digest: str) -> str:
    """Path of the record that the output is published although its gate failed.

    :param digest: Digest of the figures that were accepted.
    """
    return f"{GATE}/accepted-{digest[:16]}.json"


def publications_folder(sink: str) -> str:
    """Folder of the publications of a job to one sink.

    :param sink: Digest of the sink's place.
    """
    return f"{PUBLICATIONS}/{sink}"


def publication_path(sink: str, number: int) -> str:
    """Path of the record that the manifest with that number is published to a sink."""
    return f"{publications_folder(sink)}/{number}.json"


def spending_path(epoch: str) -> str:
    """Path of what a driver has spent.

    :param epoch: its epoch, or a name of its own.
    """
    return f"{BUDGET}/spent-{epoch}.json"


def numbers_of(names: Iterable[str], *, suffix: str = ".json") -> list[int]:
    """Return the numbers of files named ``<number><suffix>``, ascending. Other names are ignored."""
    stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return sorted(int(stem) for stem in stems if stem.isdigit())


def round_folder(round: int) -> str:
    """Folder of the files that the workers of a round write."""
    return f"{ROUNDS}/{round}"


def round_file(round: int, name: str) -> str:
    """Path of a file whose ``name`` is relative to the round's folder, as in receipts."""
    return f"{round_folder(round)}/{name}"


def data_folder(round: int) -> str:
    """Folder of the checkpoints of a round."""
    return round_file(round, DATA)


def rejects_folder(round: int) -> str:
    """Folder of the rejected rows of a round."""
    return round_file(round, REJECTS)


def receipts_folder(round: int) -> str:
    """Folder of the receipts of a round."""
    return round_file(round, RECEIPTS)


def answers_folder(partition: str) -> str:
    """Folder of the answers that attempts at a partition have paid, relative to the round's folder."""
    return f"{ANSWERS}/{partition}"


def merged_folder(round: int) -> str:
    """Folder of merged output files, kept until they are published."""
    return round_file(round, MERGED)


def receipt_path(round: int, partition: str) -> str:
    """Path of the receipt of a partition."""
    return round_file(round, receipt_name(partition))


def receipt_name(partition: str) -> str:
    """Name of a receipt, relative to the round's folder."""
    return f"{RECEIPTS}/{partition}.json"


def data_name(partition: str, attempt: str) -> str:
    """Name of an attempt's checkpoint, relative to the round's folder."""
    return f"{DATA}/{partition}-{attempt}.parquet"


def rejects_name(partition: str, attempt: str) -> str:
    """Name of the file of an attempt's rejected rows, relative to the round's folder."""
    return f"{REJECTS}/{partition}-{attempt}.parquet"


def round_of(path: str) -> int:
    """Number of the round in whose folder the file ``path`` lies."""
    return int(path.rpartition(f"{ROUNDS}/")[2].split("/")[0])


def round_record_path(round: int) -> str:
    """Path of the record of a later round."""
    return f"{ROUNDS}/{round}.json"


def round_plan_path(round: int, digest: str) -> str:
    """Path of the plan of a later round.

    :param digest: Digest of the plan, so that no two plans share a path.
    """
    return f"{ROUNDS}/{round}-{digest[:16]}.parquet"


def manifest_path(number: int) -> str:
    """Path of a manifest."""
    return f"{MANIFESTS}/{number}.json"


def lease_path(epoch: int) -> str:
    """Path of the record of the driver that acquired an epoch."""
    return f"{LEASES}/{epoch}.json"


def heartbeat_path(epoch: int) -> str:
    """Path of the heartbeat counter of the driver that acquired an epoch."""
    return f"{LEASES}/{epoch}.beat"


def events_path(epoch: int) -> str:
    """Path of the events of one driver, on an object store; epoch 0 for those from before the first lease."""
    return f"{EVENTS}/{epoch}.jsonl"


def cancel_path(epoch: int) -> str:
    """Path of the request to cancel for the driver of an epoch."""
    return f"{CANCEL_REQUESTS}/{epoch}.json"


def log_path(epoch: int) -> str:
    """Path of the log of the driver of an epoch."""
    return f"{LOGS}/{epoch}.jsonl"


def partition_log_path(partition: str, attempt: str) -> str:
    """Path of what steps printed in an attempt at a partition."""
    return f"{PARTITION_LOGS}/{partition}-{attempt}.jsonl"


def submission_path(number: int) -> str:
    """Path of a submission."""
    return f"{SUBMISSIONS}/{number}.json"


def start_path(number: int) -> str:
    """Path of the record of one start of a driver."""
    return f"{STARTS}/{number}.json"


def start_output_path(number: int) -> str:
    """Path of the stdout and stderr of a started driver."""
    return f"{STARTS}/{number}.out"


def child_folder(slug: str) -> str:
    """Job directory of a child of a fan-out."""
    return f"{CHILDREN}/{slug}"


def stage_folder(name: str) -> str:
    """Job directory of a stage."""
    return f"{STEPS}/{name}"


def family_folder(directory: str) -> str:
    """Return the job directory of the fan-out whose child lies in ``directory``; of any other job, ``directory``.

    The directory of a stage counts as that of its job.
    """
    for folder in (STEPS, CHILDREN):
        parent, _, slug = directory.rpartition(f"/{folder}/")
        directory = parent if parent and "/" not in slug else directory
    return directory


def code_path(digest: str) -> str:
    """Path of the sources of a plan's steps."""
    return f"{CODE}/{digest}.zip"


def cluster_record_path(name: str) -> str:
    """Path of the record of the batch jobs of one driver."""
    return f"{CLUSTER}/{name}.json"


def packed_path(digest: str) -> str:
    """Path of a function that travels by value."""
    return f"{CODE}/{digest}.pickle"


def packed_source_path(digest: str) -> str:
    """Path of the source text of a function that travels by value."""
    return f"{CODE}/{digest}.py"


def commit_path(number: int) -> str:
    """Path of a commit of a fan-out."""
    return f"{COMMITS}/{number}.json"
