"""The target: find a source, pull its own shard, verify it, decide with the other ranks, report."""
