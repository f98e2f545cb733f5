"""What tests of steps, of adapters and of this package stand on; ``docs/testing.md`` shows how to use it.

- `faults`: a map step that fails as a table says; attempts are counted on disk
- `oracle`: small real data, a small real model, and the plain loop that every path must equal
- `row_check`: which rows are lost, doubled or changed; a reader who looks at an output all the time
- `processes`: a scheduler, workers and drivers as processes to send signals to; `held`: a job that waits for the test;
  `sockets`: which of them listen, and where
- `stores`: storage that fails at the k-th operation; `memory_store`: a file system that a power cut can strike
- `s3`: real S3 servers on loopback; `s3_proxy`: one that loses replies and resets connections
- `jobs`, `recipes`, `inline`: jobs, plans and receipts without a cluster; `trigger_world`: triggers, simulated
- `chaos` with `sample`, `strikes`, `trial`: ``python -m pipeline chaos``
"""
