"""The worker process: one rank's shard of the model, its KV cache, and the loop that runs steps."""
