"""Jobs that run in the background: submit, queue, serve, trigger, follow and remove jobs."""
