"""Tools that know nothing of jobs: units, digests, adapters by name, secrets, row counts, the fork server."""
