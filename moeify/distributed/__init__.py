"""Expert parallelism: running a sharded program on many ranks, and planning for it."""
