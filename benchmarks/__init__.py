"""Benchmarks: `python -m benchmarks.bench`, `benchmarks.scaling`, `benchmarks.footprint`, from the checkout."""
