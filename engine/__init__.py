"""A declarative engine that converts training checkpoints, from rules in YAML.

>>> import engine
>>> engine.convert("internlm2-7b", "ckpt/20000", "internlm2-7b-hf")  # doctest: +SKIP
Report(out='internlm2-7b-hf', tensors=227, ...)

Importing this package is instant: each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.language.version import __version__

if TYPE_CHECKING:
    from engine import api as api
    from engine.api import *

__all__ = [
    "EngineError",
    "EngineErrors",
    "Report",
    "__version__",
    "compare",
    "convert",
    "diff",
    "explain",
    "find_mapping",
    "inspect",
    "iter_tensors",
    "lint",
    "load_mapping",
    "mappings",
    "new_mapping",
    "open",
    "plan",
    "plan_reshard",
    "plan_reverse",
    "prove",
    "reshard",
    "reverse",
    "run_plan",
    "save_plan",
    "verify",
    "virtual",
]

_FROM_API = frozenset(__all__) - {"__version__"}


def __getattr__(name: str) -> Any:
    if name != "api" and name not in _FROM_API:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    api = import_module("engine.api")
    return api if name == "api" else getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
