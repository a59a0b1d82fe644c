"""Pure per-device functions: arrays in, arrays out, mesh axes as keywords. Run them inside `jax.shard_map`."""
