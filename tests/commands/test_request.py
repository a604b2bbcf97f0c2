"""Options are declared once: the keywords of the API and the command line follow the fields of the request."""

from __future__ import annotations

from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

import engine
from engine import api
from engine.commands.main import cli
from engine.errors import EngineError
from engine.planning import request
from engine.planning.request import Request
from engine.run import running
from engine.run.running import Running

FIELDS = {one.name: one for kind in (Request, Running) for one in fields(kind)}
GIVEN = ("mapping", "src", "reads", "writes")  # arguments, or what the function itself says
KEYWORDS = {
    "convert": running.ConvertOptions,
    "reverse": running.ReverseRunOptions,
    "reshard": running.ReshardRunOptions,
}


def test_every_field_is_a_keyword_of_some_function_and_every_keyword_a_field() -> None:
    named = {name for kind in KEYWORDS.values() for name in kind.__annotations__}
    assert named - {"tp", "pp", "wp"} == FIELDS.keys() - set(GIVEN)


@pytest.mark.parametrize("kind", KEYWORDS.values(), ids=KEYWORDS)
def test_keywords_take_the_types_of_the_fields(kind: type) -> None:
    """And maybe more: what is parsed may be given as text."""
    names = {**vars(request), **vars(running), "MappingFile": Any, "End": str}
    declared = {**get_type_hints(Request, names), **get_type_hints(Running, names)}
    for name, wanted in get_type_hints(kind, names).items():
        if name not in ("tp", "pp", "wp"):
            assert wanted is object or kinds(declared[name]) <= kinds(wanted), name


def kinds(hint: Any) -> set[Any]:
    """The types that a union is of."""
    return set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}


@pytest.mark.parametrize(("command", "function"), [("run", "convert"), ("reverse", "reverse"), ("reshard", "reshard")])
def test_a_command_offers_every_keyword_of_its_function(command: str, function: str) -> None:
    offered = {param.name for param in cli.commands[command].params}
    assert KEYWORDS[function].__annotations__.keys() - {"progress", "ranks"} <= offered


@pytest.mark.parametrize("function", ["plan", "plan_reverse", "plan_reshard", "convert", "reverse", "reshard"])
def test_a_keyword_that_is_none_is_refused_with_the_near_one(function: str) -> None:
    with pytest.raises(TypeError, match="there is no option `dtpye`; did you mean `dtype`"):
        getattr(api, function)("internlm2-7b", "x", *(["y"] if function[:2] == "re" else []), dtpye="float32")


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2G B", "", 10**30])
def test_a_shard_size_that_is_no_number_of_bytes_is_refused(size: Any) -> None:
    with pytest.raises(engine.EngineError, match="max_shard_size") as caught:
        engine.plan("internlm2-7b", "x", max_shard_size=size)
    assert caught.value.code == "E001"


def test_two_numbers_of_one_dimension_are_refused() -> None:
    assert request.request_of("internlm2", ".", {"ranks": "tp=2,pp=3", "tp": 2}, "reverse").ranks == {"tp": 2, "pp": 3}
    with pytest.raises(EngineError, match="two numbers of tp ranks"):
        request.request_of("internlm2", ".", {"ranks": "tp=2", "tp": 4}, "reverse")
