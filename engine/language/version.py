"""The engine's version: what plans, manifests, journals and model cards record as their writer."""

__version__ = "0.1.0"
