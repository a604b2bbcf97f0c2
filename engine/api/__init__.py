"""The public Python functions. Each is what one command of the command line does.

What a name needs is imported when it is first used, from where type checkers read that it is.
"""

import ast
import importlib
import pathlib
import typing

if typing.TYPE_CHECKING:
    from engine.api.authoring import lint, mapping_files
    from engine.api.looks import explain, inspect, mappings, view
    from engine.api.outputs import clean, environment, kept
    from engine.api.parts import commit, part
    from engine.api.plans import load_plan, plan, plan_reshard, plan_reverse, save_plan
    from engine.api.reviews import compare, verify
    from engine.api.runs import convert, iter_tensors, reshard, reverse, run_plan
    from engine.api.serving import Model, open, serve, virtual
    from engine.discover.files import new_mapping
    from engine.discover.inspect import find_mapping
    from engine.errors import EngineError, EngineErrors
    from engine.explaining.codes import explain_code
    from engine.explaining.describe import describe_plan
    from engine.language.format import format_mapping
    from engine.language.layout_file import load_layout
    from engine.language.mapping_file import load_mapping
    from engine.planning.reading import read_checkpoint
    from engine.proving.committed import write_meanings
    from engine.proving.mapping_diff import diff
    from engine.proving.prove import prove
    from engine.run.execute import Report
    from engine.serve.mount import mount

__all__ = [
    "EngineError",
    "EngineErrors",
    "Model",
    "Report",
    "clean",
    "commit",
    "compare",
    "convert",
    "describe_plan",
    "diff",
    "environment",
    "explain",
    "explain_code",
    "find_mapping",
    "format_mapping",
    "inspect",
    "iter_tensors",
    "kept",
    "lint",
    "load_layout",
    "load_mapping",
    "mapping_files",
    "mappings",
    "new_mapping",
    "load_plan",
    "mount",
    "open",
    "part",
    "plan",
    "plan_reshard",
    "plan_reverse",
    "prove",
    "read_checkpoint",
    "reshard",
    "reverse",
    "serve",
    "run_plan",
    "save_plan",
    "verify",
    "view",
    "virtual",
    "write_meanings",
]

_NODES = ast.walk(ast.parse(pathlib.Path(__file__).read_text("utf-8")))
_PLACES = {one.name: str(node.module) for node in _NODES if isinstance(node, ast.ImportFrom) for one in node.names}


def __getattr__(name: str) -> typing.Any:
    if name not in __all__:
        raise AttributeError(f"module 'engine.api' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    return found
