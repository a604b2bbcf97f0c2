"""Mapping × Layout × headers → Plan. Reads no tensor data.

`engine.plan(...)` is a public function and `engine.plan` this package: importing any module of
it binds the package over the function. So the package is callable and does what the function does.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from engine.api import plan

        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage

DEFAULT_SHARD_SIZE = 2_000_000_000  # bytes of tensors in an output file: so few that workers have files of their own
