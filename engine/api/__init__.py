"""The public Python functions. Each does what one command of the command line does.

A name is imported when it is first used. `__init__.pyi` lists the same names for type checkers and editors.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    "engine.api.authoring": "lint mapping_files",
    "engine.api.looks": "explain inspect mappings view",
    "engine.api.outputs": "clean environment kept",
    "engine.api.parts": "commit part",
    "engine.api.plans": "load_plan plan plan_reshard plan_reverse save_plan",
    "engine.api.reviews": "compare verify",
    "engine.api.runs": "convert iter_tensors reshard reverse run_plan",
    "engine.api.serving": "Model open serve virtual",
    "engine.discover.files": "new_mapping",
    "engine.discover.inspect": "find_mapping",
    "engine.errors": "EngineError EngineErrors",
    "engine.explaining.codes": "explain_code",
    "engine.explaining.describe": "describe_plan",
    "engine.language.format": "format_mapping",
    "engine.language.layout_file": "load_layout",
    "engine.language.mapping_file": "load_mapping",
    "engine.planning.reading": "read_checkpoint",
    "engine.proving.committed": "write_meanings",
    "engine.proving.mapping_diff": "diff",
    "engine.proving.prove": "prove",
    "engine.run.execute": "Report",
    "engine.serve.mount": "mount",
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names.split()}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'engine.api' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return found
