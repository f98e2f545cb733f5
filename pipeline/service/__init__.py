"""Jobs that run in the background: submit, queue, server, triggers; follow them and remove old ones."""
