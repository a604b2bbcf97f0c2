DEFAULT_SHARD_SIZE = 2_000_000_000  # bytes of tensors in an output file: so few that workers have files of their own
