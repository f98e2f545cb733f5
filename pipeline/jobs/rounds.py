"""Rounds: the numbered passes of a job. Round 0 runs the plan; a later round does some of the work again.

A later round has its own plan, made of rejected rows, of partitions that it supersedes in earlier rounds, and of input
files. Its record ``rounds/<n>.json`` is created, if absent, before any of its partitions runs. Its receipts and files
lie in ``rounds/<n>``. `pipeline.jobs.ledger` decides what counts over all rounds.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property

from pipeline.common.rows import QuarantinedFile
from pipeline.common.step_code import digests_of
from pipeline.errors import Fenced, StateCorrupt
from pipeline.jobs import layout
from pipeline.jobs.code_archive import put_sources
from pipeline.jobs.lease import rounds_seen_after
from pipeline.plan.plan import Plan
from pipeline.plan.table import plan_bytes, read_plan
from pipeline.storage.store import Store

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 2
STEP_EVENT = "step_change"
"""Name of the event about changed code that a job ignores."""


class RoundReason(StrEnum):
    """Reason of a round."""

    PLAN = "plan"
    """Round 0: the plan of the job."""
    RETRY = "retry"
    """Rejected rows, pending partitions and repaired files are scored again."""
    ALIAS_CHANGE = "alias change"
    """The model reference resolves to another version: all rows are scored again."""
    STEP_CHANGE = "step change"
    """The code of a step changed: all rows are scored again."""
    UPSTREAM = "upstream"
    """A retry of an earlier stage has added files to those that the stage reads."""
    NOT_DETERMINISTIC = "not deterministic"
    """A partition of a ``dask`` step had other rows when it was computed again: all are computed in one run."""
    MEMORY = "memory"
    """Workers ran out of memory in a ``dask`` step: all its partitions are computed anew, from smaller ones."""
    VERSIONS = "versions"
    """Other versions of Dask give other partitions of a ``dask`` step: all are computed anew."""
    FILES_QUARANTINED = "files quarantined"
    """Input files turned out bad while they were read. The other rows are scored without them."""


@dataclass(frozen=True)
class RoundRecord:
    """The content of ``rounds/<n>.json``. The file never changes; a round exists once it has this file."""

    round: int
    """Number of the round, as in the name of the file; from 1."""
    reason: RoundReason
    plan: str
    """Digest of the round's plan."""
    model: dict[str, str]
    """Name, version and digest of the model version that scores its rows."""
    maps: tuple[str, ...]
    """``map`` steps of the round."""
    changes: tuple[str, ...]
    """Differences of its spec from that of the round before, in words."""
    partitions: int
    rows: int
    """Number of rows to score in the round."""
    rejected_rows: int
    """Number of rows that earlier rounds had rejected."""
    supersedes: dict[int, tuple[str, ...]]
    """Partitions of earlier rounds, per round, whose rows this round scores. Their receipts no longer count."""
    rescore_all: bool
    """True if the round does all the work again, so that earlier rounds count nowhere."""
    quarantined_files: tuple[QuarantinedFile, ...]
    """Input files that are quarantined from this round on."""
    repaired_files: tuple[str, ...]
    """Input files that had been quarantined, and that this round reads."""
    epoch: int
    """Epoch of the driver that opened the round."""
    created: str
    """UTC, ISO 8601."""
    step_code: dict[str, str] = field(default_factory=dict)
    """Digest of the code of each step module of the round."""

    def to_json_bytes(self) -> bytes:
        """The record as stored, with a schema version."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes, *, where: str) -> RoundRecord:
        """Inverse of `to_json_bytes`.

        :raises StateCorrupt: for anything else.
        """
        try:
            record = json.loads(data)
            if record.pop("schema_version") != SCHEMA_VERSION:
                raise ValueError("unknown schema_version")
            record["reason"] = RoundReason(record["reason"])
            for name in ("maps", "changes", "repaired_files"):
                record[name] = tuple(record[name])
            record["supersedes"] = {int(number): tuple(ids) for number, ids in record["supersedes"].items()}
            record["quarantined_files"] = tuple(QuarantinedFile.from_dict(file) for file in record["quarantined_files"])
            return RoundRecord(**record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateCorrupt(
                "the record of a round is damaged",
                where=where,
                found=f"{type(error).__name__}: {error}",
                expected="the JSON that was written when the round began",
                next_step="restore the file, or run the job spec again as a new job",
            ) from error


@dataclass(frozen=True)
class Round:
    """One round of a job."""

    number: int
    digest: str
    """Digest of the plan of the round."""
    load: Callable[[], Plan] = field(repr=False, compare=False)
    record: RoundRecord | None = None
    """None for round 0, which the job's own plan describes."""

    @cached_property
    def plan(self) -> Plan:
        """Plan of the round, read when it is first needed."""
        return self.load()

    @property
    def reason(self) -> RoundReason:
        """Reason of the round."""
        return self.record.reason if self.record else RoundReason.PLAN

    @property
    def rescore_all(self) -> bool:
        """True if earlier rounds count nowhere."""
        return self.record is None or self.record.rescore_all

    def supersedes(self, number: int) -> tuple[str, ...]:
        """Return the partitions of an earlier round that this round supersedes."""
        return self.record.supersedes.get(number, ()) if self.record else ()


def model_details(plan: Plan) -> dict[str, str]:
    """Return name, version and digest of the plan's model version."""
    return plan.model_details


def make_record(
    plan: Plan,
    *,
    number: int,
    reason: RoundReason,
    epoch: int,
    created: str,
    supersedes: Mapping[int, Sequence[str]],
    changes: Sequence[str] = (),
    rescore_all: bool = False,
    quarantined_files: Sequence[QuarantinedFile] = (),
    repaired_files: Sequence[str] = (),
) -> RoundRecord:
    """Make the record of a round that runs ``plan``; see `RoundRecord` for the parameters."""
    fragments = [fragment for partition in plan.partitions for fragment in partition.fragments]
    return RoundRecord(
        round=number,
        reason=reason,
        plan=plan.digest,
        model=model_details(plan),
        maps=tuple(step.map for step in plan.spec.maps),
        changes=tuple(changes),
        partitions=len(plan.partitions),
        rows=sum(fragment.rows for fragment in fragments),
        rejected_rows=sum(fragment.rows for fragment in fragments if fragment.rejected_from),
        supersedes={number: tuple(ids) for number, ids in supersedes.items() if ids},
        rescore_all=rescore_all,
        quarantined_files=tuple(quarantined_files),
        repaired_files=tuple(repaired_files),
        epoch=epoch,
        created=created,
        step_code=digests_of(plan.code),
    )


def put_round(store: Store, record: RoundRecord, plan: Plan, *, check_lease: Callable[[], None]) -> Round:
    """Store a round: its plan under a name that no other plan has, then its record. The round exists from then on.

    :param check_lease: Called right before the record is stored; raises `Fenced`.
    :raises Fenced: when another driver has taken over the job, or has opened a round of that number.
    """
    put_sources(store, plan)
    store.put_if_absent(plan_path(record), plan_bytes(plan))
    path = layout.round_record_path(record.round)
    data = record.to_json_bytes()
    check_lease()
    if not store.put_if_absent(path, data) and store.read(path) != data:
        raise Fenced(
            "another driver has opened a round of this job",
            where=store.url(path),
            next_step="python -m pipeline status",
        )
    return Round(record.round, record.plan, lambda: plan, record)


def read_rounds(store: Store, first: Round, *, known: Mapping[int, Round | None]) -> dict[int, Round | None]:
    """Read all rounds of a job, by number; None for a void round.

    A round is void if an older driver opened it after a newer one had acquired the lease: the lease record of the newer
    driver says how many rounds there were. Only a driver that was paused between two requests opens such a round.

    :param first: Round 0.
    :param known: Rounds that were read before.
    :raises StateCorrupt: for a record that is damaged or missing.
    """
    numbers = layout.numbers_of(store.list(layout.ROUNDS))
    if numbers != list(range(1, len(numbers) + 1)):
        raise StateCorrupt(
            "the record of a round is missing",
            where=store.url(layout.ROUNDS),
            found=", ".join(map(str, numbers)),
            expected=", ".join(map(str, range(1, max(numbers) + 1))),
            next_step="restore the file",
        )
    rounds: dict[int, Round | None] = {0: first}
    for number in numbers:
        rounds[number] = known[number] if number in known else _read_round(store, number)
    return rounds


def _read_round(store: Store, number: int) -> Round | None:
    path = layout.round_record_path(number)
    record = RoundRecord.from_json(store.read(path), where=store.url(path))
    if any(seen < number for seen in rounds_seen_after(store, record.epoch)):
        logger.warning("round %d of %s is void: a driver opened it after another driver took over", number, store.root)
        return None

    def load() -> Plan:
        plan = read_plan(store, name=plan_path(record))
        if plan.digest != record.plan:
            raise StateCorrupt(
                "a round's plan is not the one its record names",
                where=store.url(plan_path(record)),
                found=plan.digest,
                expected=record.plan,
                next_step="restore the file",
            )
        return plan

    return Round(number, record.plan, load, record)


def plan_path(record: RoundRecord) -> str:
    """Path of the plan of a round in the job directory."""
    return layout.round_plan_path(record.round, record.plan)
