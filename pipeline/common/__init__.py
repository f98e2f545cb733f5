"""Tools that do not depend on jobs: units, digests, adapters by name, secrets, row counts, the fork server."""
