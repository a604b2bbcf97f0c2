"""Fuzzing: whatever the input, the answer is a result or one of our errors, in bounded time and memory.

`make test` tries forty inputs per reader, `make fuzz` as many as FUZZ_MINUTES allow. Seeds are
small genuine files; an input that ever found something is kept as an `@example` or an attack.
"""
