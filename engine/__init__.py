"""A declarative engine that converts training checkpoints, from rules in YAML."""

__version__ = "0.1.0"
