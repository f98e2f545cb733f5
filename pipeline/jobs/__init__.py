"""The job directory: record, status, lease, rounds, receipts, ledger, and the manifest that commits."""
