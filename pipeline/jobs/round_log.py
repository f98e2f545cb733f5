"""`RoundLog`: the opened rounds of a job, with their plans."""

from __future__ import annotations

from pipeline.jobs.event_log import EventLog
from pipeline.jobs.rounds import Round, RoundRecord, put_round, read_rounds
from pipeline.plan.plan import Plan
from pipeline.storage.store import Store


class RoundLog:
    """The rounds of a job. Each record is read once, because records never change."""

    def __init__(self, store: Store, first: Round, *, events: EventLog) -> None:
        """:param first: Round 0, which the job's own plan describes."""
        self.first = first
        self._store = store
        self._events = events
        self._known = {first.number: first}

    def all(self) -> tuple[Round, ...]:
        """Return all rounds by number, including those that other drivers opened meanwhile."""
        rounds = read_rounds(self._store, self.first, known=self._known)
        self._known |= {round.number: round for round in rounds}
        return rounds

    def open(self, record: RoundRecord, plan: Plan) -> Round:
        """Store the record of the next round. From then on, no other round has partitions left.

        :raises Fenced: when another driver has opened a round of that number.
        """
        opened = put_round(self._store, record, plan)
        self._events.append("round", round=record.round, why=record.why, rows=record.rows)
        return opened
