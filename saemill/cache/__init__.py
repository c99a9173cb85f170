"""Stage 2: the transformer runs once over the rows; its activations go to disk, shard by shard."""
