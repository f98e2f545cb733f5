"""What submits jobs when nobody is there: which triggers are due, decided by pure functions and recorded in a log.

`schedule` and `arrivals` say what is there to fire for, `decide` what is done about it, `log` keeps it, `evaluate` goes
the whole way. A trigger's log (``<root>/.triggers/<name>/``) is a sequence of numbered records, each put if absent:
whoever decides on a state that is no longer the last one does not get its record in, and decides anew. So any number of
servers may look at the same trigger, and any of them may die at any moment.
"""
