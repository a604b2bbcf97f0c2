DEFAULT_SHARD_SIZE = 2_000_000_000  # bytes of tensors in an output file: small enough that each worker has its own file
