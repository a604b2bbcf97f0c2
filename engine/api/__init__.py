"""The public Python functions. Each is what one command of the command line does."""

from engine.api.authoring import lint, mapping_files, new_mapping, prove, write_meanings
from engine.api.outputs import clean, environment, kept
from engine.api.parts import commit, part
from engine.api.plans import load_plan, plan, plan_reshard, plan_reverse, save_plan
from engine.api.reviews import compare, describe_plan, explain, find_mapping, inspect, mappings, verify, view
from engine.api.runs import convert, iter_tensors, reshard, reverse, run_plan
from engine.api.serving import Model, mount, open, serve, virtual
from engine.errors import EngineError, EngineErrors
from engine.explaining.codes import explain_code
from engine.language.format import format_mapping
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.planning.reading import read_checkpoint
from engine.proving.mapping_diff import diff
from engine.run.execute import Report

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
