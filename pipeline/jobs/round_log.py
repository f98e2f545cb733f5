"""`RoundLog`: the opened rounds of a job, with their plans."""

from __future__ import annotations

from pipeline.jobs import layout
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
        self._known: dict[int, Round | None] = {first.number: first}

    def all(self) -> tuple[Round, ...]:
        """Return the rounds by number, including those that other drivers opened meanwhile. Void ones are left out."""
        self._known = read_rounds(self._store, self.first, known=self._known)
        return tuple(round for round in self._known.values() if round is not None)

    def next_number(self) -> int:
        """Return the number of the next round. Numbers of void rounds are not used again."""
        return max(layout.numbers_of(self._store.list(layout.ROUNDS)), default=0) + 1

    def open(self, record: RoundRecord, plan: Plan) -> Round:
        """Store the record of the next round. From then on, no other round has partitions left.

        :raises Fenced: when another driver has taken over the job, or has opened a round of that number.
        """
        opened = put_round(self._store, record, plan, check_lease=self._events.check_lease)
        self._events.append("round", round=record.round, reason=str(record.reason), rows=record.rows)
        return opened
