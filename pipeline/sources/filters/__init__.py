"""Row filters: parse the text, evaluate it on a table, prune row groups with it."""
