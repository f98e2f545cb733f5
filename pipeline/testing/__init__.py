"""Tools for tests of steps, of adapters and of this package; ``docs/testing.md`` shows how to use them.

- `faults`: a map step that fails as a table says; attempts are counted on disk
- `oracle`: small real data, a small real model, and the plain loop that every path must equal
- `row_check`: counts of lost, duplicated and changed rows; a reader that polls an output
- `processes`: a scheduler, workers and drivers as processes to send signals to; `held`: a job that waits for the test;
  `sockets`: the addresses on which processes listen
- `stores`: storage that fails at the k-th operation; `memory_store`: a file system with simulated power cuts
- `s3`: real S3 servers on loopback; `s3_proxy`: a proxy that loses replies and resets connections
- `sink_contract`: sinks that die at any step, and second drivers; `postgres`: a real Postgres on loopback
- `jobs`, `recipes`, `inline`: jobs, plans and receipts without a cluster; `trigger_world`: triggers, simulated
- `chaos` with `sample`, `strikes`, `trial`: ``python -m pipeline chaos``
"""
