"""Triggers submit jobs on a schedule, when files arrive, or after another job. Pure functions decide; a log records.

`schedule` and `arrivals` find what is due, `decide` decides, `log` stores the decisions, and `evaluate` runs one round.
A trigger's log (``<root>/.triggers/<name>/``) is a sequence of numbered records, each created if absent. A server that
decided on an outdated state cannot store its record, and decides again. So any number of servers may evaluate the same
trigger, and any of them may die at any moment.
"""
