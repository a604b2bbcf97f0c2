"""Every key of transformers' classes: what code reads, what an absent key means, and what a class takes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import engine
from engine import api
from engine.errors import EngineError
from engine.language.documents import leaves, prefixes, value_at
from engine.language.keys import find_key
from engine.language.model import MappingFile
from engine.planning.agreement import with_given
from tests.support.depth import SOAK
from tests.support.shards import same

# What transformers reads of configurations and no bundled mapping knows: it is refused by its name (E219).
UNKNOWN = {
    "is_causal", "layer_types", "kv_sharing_modes", "number_of_conv_states", "per_layer_config", "num_mtp_layers",
    "base_model_pp_plan", "base_model_tp_plan", "get_text_config", "standardize_rope_params", "validate_rope",
}  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, 1, -1, 0.5, 5, float("nan"), "x", "regression", "single_label_classification", [], [1],
    ["a"], ["full_attention"], {}, {"0": "a"}, {"a": 1}, {"0": 0.5},
]  # fmt: skip


@cache  # not while tests are collected, which every worker does
def families() -> tuple[list[MappingFile], Any]:
    """Families for a class of transformers, and its classes of configurations by model type."""
    known = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    found = [one for one in engine.mappings() if not one.expect and one.training_config and one.model_type in known]
    return [one for one in found if "*" not in one.keys["target"]], known


@cache
def read_by(module: Any) -> frozenset[str]:
    """The keys of a configuration that a module of transformers reads."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        match node:
            case ast.Attribute(ast.Name("config") | ast.Attribute(ast.Name("self"), "config"), name):
                found.add(name)
            case ast.Call(ast.Name("getattr" | "hasattr"), [of, ast.Constant(str(name)), *_]) if (
                "config" in ast.unparse(of)
            ):
                found.add(name)
    return frozenset(found)


def test_every_key_that_a_class_has_or_its_code_reads_is_told_of() -> None:
    """A new transformers with a new key is red here: the mapping must read, ignore or refuse it by name."""
    listed, classes = families()
    shared = ["cache_utils", "masking_utils", "modeling_rope_utils"]
    for mapping in listed:
        kind = str(mapping.model_type)
        code = "llama" if kind == "internlm3" else kind
        modules = [import_module(f"transformers.{name}") for name in (f"models.{code}.modeling_{code}", *shared)]
        keys = {field.name for field in dataclasses.fields(classes[kind])}.union(*map(read_by, modules))
        written = {above for path, _ in leaves(mapping.config) for above in prefixes(path)}
        known = {above for path in mapping.keys["target"] for above in prefixes(path)}
        untold = {one for one in keys - written - known - UNKNOWN if find_key(mapping.keys["target"], one) is None}
        assert len(keys) > 30 and not untold, mapping.name
    assert len(listed) > 5


def test_an_absent_key_means_what_transformers_takes_it_for() -> None:
    listed, classes = families()
    for mapping in listed:
        keys: dict[str, Any] = {"rope_parameters.rope_theta": 10000.0}
        keys |= {key: one.default for key, one in mapping.keys["target"].items() if one.default is not None}
        config = classes[mapping.model_type]()
        for key, default in keys.items():
            first, _, below = key.partition(".")
            value = getattr(config, first)
            assert (value_at(value, below) if below else value) == default, (mapping.name, key)
    assert len(listed) > 5


def test_whatever_is_taken_over_of_a_given_configuration_loads() -> None:
    """`run --config` writes what it is given of keys that do not matter, and transformers is strict about types."""
    tried: set[tuple[Any, ...]] = set()
    listed, classes = families()
    for mapping in listed:
        layout, kind = api.load_layout(mapping.layout), classes[str(mapping.model_type)]
        written = {"dtype", "torch_dtype", *(path.partition(".")[0] for path, _ in leaves(mapping.config))}
        for number, (path, key) in enumerate(mapping.keys["target"].items()):
            values = VALUES if SOAK else VALUES[number % 12 :: 12]
            name, _, below = path.replace("[0-9]*", "0").replace("*", "x").partition(".")
            same = (kind, path, key.limits, repr(key.only))
            for value in values if name not in written and same not in tried else ():
                try:
                    given = with_given({}, {name: {below: value} if below else value}, mapping, layout)
                except EngineError:
                    continue
                kind(**given)
            tried.add(same)
    assert len(tried) > 200


def test_what_transformers_saves_of_an_internlm3_with_biases_comes_back(tmp_path: Path) -> None:
    """It saves other names for the biases, and the class whose code it uses. Its length is that of serving."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = families()[1]["internlm3"](
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attention_bias=True, mlp_bias=True, max_position_embeddings=8192,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(kind).save_pretrained(tmp_path / "hf")
    assert "qkv_bias" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    engine.reverse("families/internlm3", tmp_path / "hf", tmp_path / "ranks")
    engine.convert("families/internlm3", tmp_path / "ranks", tmp_path / "again")
    same(load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors"))
    assert AutoConfig.from_pretrained(tmp_path / "again").attention_bias is True
