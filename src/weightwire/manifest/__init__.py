"""What a shard consists of, where its bytes lie, and what they digest to. No torch in the pure modules."""
