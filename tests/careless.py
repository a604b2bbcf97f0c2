"""Careless edits of every family, as people make them, and what the pull request's workflow does about each.

The edits were written down before it was looked at which are caught. Each is applied to the family written out whole.
It is caught when the workflow turns red, and it is told when, with its meaning committed as well, the comment on the
pull request shows a tensor or a value that differs, or lint an error. `make soak` asks for both.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.language.documents import flat, tree_of
from engine.language.model import MappingFile
from engine.proving.changes import tensor_changes, value_changes
from engine.proving.committed import committed, differences, read_meaning
from engine.proving.lint import lint
from engine.proving.meaning import Meaning, facts_of, meaning_of
from engine.proving.meaning import Path as KeyPath
from engine.proving.mutants import rebuilt

ROOT = Path(__file__).resolve().parent.parent
Data = dict[str, Any]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "wqkv", "wo", "w1", "w2", "w3")
NORMS = ("input_layernorm", "post_attention_layernorm", "attention_norm", "ffn_norm", "model.norm")
PAIRS = (
    ("q_proj", "k_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj"), ("up_proj", "down_proj"), ("w1", "w3"),
    ("w1", "w2"), ("input_layernorm", "post_attention_layernorm"), ("attention_norm", "ffn_norm"),
)  # fmt: skip
CONSTANTS = {  # key → values that a hasty hand writes
    "rms_norm_eps": [1e-6, 1e-5, "{{ layer_norm_epsilon | default(1e-6) }}"],
    "tie_word_embeddings": [True],
    "hidden_act": ["gelu", "silu_and_mul"],
    "num_key_value_heads": ["{{ heads }}", 8],
    "num_attention_heads": ["{{ groups }}", "{{ heads + 1 }}"],
    "head_dim": [128, "{{ hidden // groups }}"],
    "intermediate_size": ["{{ 4 * hidden }}", "{{ hidden }}"],
    "vocab_size": ["{{ vocab + 1 }}", "{{ hidden }}"],
    "hidden_size": ["{{ ffn }}"],
    "num_hidden_layers": ["{{ layer - 1 }}", "{{ heads }}"],
    "attention_bias": [True, False],
    "mlp_bias": [True],
    "bos_token_id": [2, 0],
    "eos_token_id": [1, 0],
    "rope_theta": [10000, 1000000, "{{ rope_base | default(1000000) }}"],
    "max_position_embeddings": [2048, "{{ options.max_position_embeddings * 2 }}"],
    "architectures": [["LlamaForCausalLn"], ["LlamaModel"]],
    "num_experts": [8],
    "num_experts_per_tok": [1],
    "num_local_experts": ["{{ expert - 1 }}"],
    "norm_topk_prob": [False],
    "moe_intermediate_size": ["{{ hidden }}"],
    "sliding_window": [4096],
    "rope_parameters.rope_theta": [10000, "{{ rope_theta | default(500000) }}"],
    "rope_parameters.rope_type": ["default", "linear"],
    "rope_parameters.factor": [1.0, None],
    "rope_parameters.low_freq_factor": [2.0],
    "rope_parameters.original_max_position_embeddings": [4096, None],
    "rope_scaling": [None],
}
TRAINING = {
    "layer_norm_epsilon": [1e-5, None], "norm_eps": [1e-5, None], "rope_base": [10000, None],
    "rope_theta": [500000, None], "num_kv_attention_heads": ["{{ num_attention_heads }}", None],
    "n_kv_heads": ["{{ num_attention_heads }}", None], "num_attention_heads": ["{{ num_key_value_heads }}"],
    "num_layers": ["{{ num_hidden_layers - 1 }}"], "hidden_size": ["{{ intermediate_size }}"],
    "qk_interleaved": [False, None, "{{ rotary == 'halves' }}"], "adapt_hf": ["{{ rotary == 'pairs' }}", None],
    "no_bias": [True], "norm_head": [None], "is_reward": [None], "mlp_ratio": [4, 2.6667], "multiple_of": [256],
    "ffn_dim_multiplier": [1.3, None], "embed_split_hidden": [True, None],
    "rotary_base": [10000, None], "layernorm_epsilon": [1e-5, None], "rotary_interleaved": [True, False, None],
    "group_query_attention": [True, False, None], "num_query_groups": ["{{ num_attention_heads }}", 1, None],
    "ffn_hidden_size": ["{{ hidden_size }}"], "kv_channels": ["{{ hidden_size // num_attention_heads }}", None],
    "untie_embeddings_and_output_weights": [True, False, None], "padded_vocab_size": ["{{ vocab_size }}"],
    "swiglu": [False, None], "add_qkv_bias": [True, False, None], "qk_layernorm": [True, False, None],
    "num_experts": [8, None], "moe_router_topk": [1, None], "moe_ffn_hidden_size": ["{{ hidden_size }}", None],
    "use_rope_scaling": [True, False, None], "rope_scaling_factor": [1.0, None], "rotary_percent": [0.5, None],
    "normalization": ["LayerNorm"], "add_bias_linear": [True, None], "params_dtype": ["torch.float32"],
    "tensor_model_parallel_size": [1, None], "ckpt_format": ["torch"],
}  # fmt: skip
WORDS = (  # what is written for what in expressions
    ("default(1e-5)", "default(1e-6)"), ("default(10000)", "default(1000000)"), ("default(256)", "default(128)"),
    ("default(heads)", "default(1)"), ("hidden // heads", "hidden // groups"), ("heads // groups", "groups"),
    ("head_dim // 2", "head_dim // 4"), ("+ multiple - 1", ""), ("mlp_ratio", "4"), ("8 * hidden // 3", "4 * hidden"),
    ("is_reward | default(false)", "is_reward | default(true)"), ("default(true)", "default(false)"),
    ("qk_interleaved | default(false)", "qk_interleaved | default(true)"),
    ("norm_head | default(false) and", "norm_head and"),
    ("rope_base | default(10000)", "10000"), ("rope_theta | default(10000)", "10000"), ("num_layers", "num_layers - 1"),
    ("not (", "("), (" and ", " or "), ("== 'all'", "!= 'all'"), ("== 'reward'", "== 'lm'"),
    ("default(8.0)", "default(4.0)"), ("'llama3'", "'linear'"), ("1.0 if", "2.0 if"), ("8192", "4096"),
    ("rotary_base", "rope_theta"), ("layernorm_epsilon", "norm_epsilon"),
    ("head_dim | default(hidden // heads)", "hidden // heads"), (" else heads", " else 1"),
    ("kv_channels | default(hidden // heads)", "hidden // heads"), ("num_query_groups", "num_attention_heads"),
    ("given.vocab_size | ", ""), ("not present(", "present("), ("default(false)", "default(true)"),
)  # fmt: skip


@dataclass(frozen=True)
class Edit:
    what: str
    data: Data


@dataclass(frozen=True)
class Outcome:
    """Whether the workflow is red, and why; what its comment would say if the meaning were committed too."""

    edit: str
    red: str | None
    comment: str | None


def edits_of(mapping: MappingFile) -> Iterator[Edit]:
    """Every edit that applies to a family, each once."""
    seen: list[Data] = [_plain(mapping.resolved)]
    for what, change in _changes(seen[0]):
        data = copy.deepcopy(seen[0])
        try:
            change(data)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):  # as where a family has no tokenizer
            continue
        if data not in seen:
            seen.append(data)
            yield Edit(what, data)


def _changes(data: Data) -> Iterator[tuple[str, Callable[[Data], None]]]:
    for name, rule in (data.get("rules") or {}).items():
        yield from _of_rule(name, rule, data)
    for one, two in PAIRS:
        yield f"targets {one} and {two} exchanged", lambda d, a=one, b=two: _swap(d, a, b, "target")
        yield f"sources {one} and {two} exchanged", lambda d, a=one, b=two: _swap(d, a, b, "source")
    for part, listed in (("config", CONSTANTS), ("training_config", TRAINING)):
        for key, values in listed.items():
            for value in values:
                path = (part, *key.split("."))
                told = f"{part}: {key} left out" if value is None else f"{part}: {key}: {value}"
                yield told, lambda d, p=path, v=value: _set(d, p, v)
    for part in ("dims", "variants", "config", "training_config"):
        for old, new in WORDS:
            yield f"{part}: `{new}` for `{old}`", lambda d, p=part, a=old, b=new: _replace(d, p, a, b)
    for name, variant in (data.get("variants") or {}).items():
        yield f"variant {name}: no default", lambda d, n=name: d["variants"][n].pop("default")
        yield f"variant {name}: its first two exchanged", lambda d, n=name: _exchange(d["variants"][n])
        for choice in variant["choices"]:
            if choice != variant.get("default"):
                told = f"variant {name}: default {choice}"
                yield told, lambda d, n=name, c=choice: d["variants"][n].__setitem__("default", c)
    for name, option in (data.get("options") or {}).items():
        if isinstance(option.get("default"), int | float):
            told = f"option {name}: default doubled"
            yield told, lambda d, n=name, v=option["default"]: d["options"][n].__setitem__("default", v * 2)
            yield f"option {name}: default as text", lambda d, n=name: _texted(d["options"][n])
        yield f"option {name}: no default", lambda d, n=name: d["options"][n].pop("default")
    for number, entry in enumerate(data.get("refuse") or ()):
        yield f"refuses {entry.get('source')} no more", lambda d, n=number: d["refuse"].pop(n)
    for key, value in (("bos", "</s>"), ("eos", "<s>"), ("pad", "<unk>"), ("file", "tokeniser.model")):
        yield f"tokenizer: {key}: {value}", lambda d, k=key, v=value: d["tokenizer"].__setitem__(k, v)
    for value in (1, [2, 3]):
        yield f"generation: eos_token_id: {value}", lambda d, v=value: d["generation"].__setitem__("eos_token_id", v)
    yield "generation: eos_token", lambda d: d["generation"].__setitem__("eos_token", "</s>")
    yield "the layout misspelt", lambda d: d["source"].__setitem__("layout", d["source"]["layout"] + "x")
    yield from _of_keys(data)
    for kind, name in (("mistral", "MistralForCausalLM"), ("llama", "LlamaForSequenceClassification")):
        target = {"model_type": kind, "architecture": name}
        yield f"the target {name}", lambda d, t=target: d["target"].update(t)
    for layout in ("internevo", "megatron", "meta-llama", "torch-dcp"):
        yield f"the layout {layout}", lambda d, v=layout: d["source"].__setitem__("layout", v)
    yield "another chat template", lambda d: _set(d, ("chat_template",), "internlm-chat")
    yield "no chat template", lambda d: d.pop("chat_template")
    for number in (data.get("tokenizer") or {}).get("rename") or ():
        yield f"tokenizer: {number} not renamed", lambda d, n=number: d["tokenizer"]["rename"].pop(n)
    yield "another even axis", lambda d: d.__setitem__("even", ["hidden"])
    yield "no even axis", lambda d: d.pop("even")


def _of_rule(name: str, rule: Data, data: Data) -> Iterator[tuple[str, Callable[[Data], None]]]:
    axes = re.findall(r"\w+", rule["axes"])
    yield f"{name}: removed", lambda d: d["rules"].pop(name)
    if "split" in rule:
        yield f"{name}: not split", lambda d: d["rules"][name].pop("split")
        turned = {"rows": "columns", "columns": "rows"}.get(str(rule["split"]), "rows")
        yield f"{name}: split on {turned}", lambda d: d["rules"][name].__setitem__("split", turned)
        other = next((a for a in ("hidden", "ffn", "vocab") if a in axes and a != rule["split"]), None)
        if other is not None:
            yield f"{name}: split on {other}", lambda d: d["rules"][name].__setitem__("split", other)
    elif "hidden" in axes:
        yield f"{name}: split on hidden", lambda d: d["rules"][name].__setitem__("split", "hidden")
    if "stage" in rule:
        turned = "first" if rule["stage"] == "last" else "last"
        yield f"{name}: stage {turned}", lambda d: d["rules"][name].__setitem__("stage", turned)
    for old, new in (
        ("groups queries", "queries groups"), ("queries + k + v", "k + queries + v"), ("q + k + v", "q + v + k"),
        ("(q + k + v) heads", "heads (q + k + v)"), ("half pair", "pair half"), ("pair half", "half pair"),
        ("heads head_dim", "head_dim heads"), ("ffn hidden", "hidden ffn"), ("hidden ffn", "ffn hidden"),
        ("gate + up", "up + gate"), ("groups head_dim", "head_dim groups"), ("vocab hidden", "hidden vocab"),
    ):  # fmt: skip
        for where in ("axes", "targets"):
            told = f"{name}: `{new}` for `{old}` in its {where}"
            yield told, lambda d, w=where, a=old, b=new: _reorder(d["rules"][name], w, a, b)
    for variant, chosen in (rule.get("when") or {}).items():
        others = [c for c in data["variants"][variant]["choices"] if c != chosen]
        for other in others[:1]:
            told = f"{name}: when {variant}: {other}"
            yield told, lambda d, v=variant, o=other: d["rules"][name]["when"].__setitem__(v, o)
        if others:
            yield f"{name}: whatever {variant}", lambda d, v=variant: d["rules"][name]["when"].pop(v)
    for key in ("transform", "keep", "optional", "tied_to", "drop", "zeros", "stage"):
        if key in rule:
            yield f"{name}: without {key}", lambda d, k=key: d["rules"][name].pop(k)
    yield f"{name}: without biases", lambda d: _replace(d["rules"], name, ".{param}", ".weight")
    yield (
        f"{name}: a bias",
        lambda d: _replace(d["rules"], name, ".weight", ".{param}") or d["rules"][name].__setitem__("name", name),
    )
    yield f"{name}: optional", lambda d: d["rules"][name].__setitem__("optional", True)
    yield f"{name}: its own dtype", lambda d: d["rules"][name].__setitem__("keep", "dtype")
    if isinstance(rule["source"], list):
        yield f"{name}: an old name forgotten", lambda d: d["rules"][name]["source"].pop()


def _of_keys(data: Data) -> Iterator[tuple[str, Callable[[Data], None]]]:
    """What is declared of keys, loosened."""
    for side, keys in (data.get("keys") or {}).items():
        for name, said in keys.items():
            at = ("keys", side, name)
            for word in ("default", "same_as", "only"):
                if word in said:
                    yield f"{side} {name}: no {word}", lambda d, p=(*at, word): _set(d, p, None)
            if "only" in said:
                listed = [*said["only"], True]
                yield f"{side} {name}: also true", lambda d, p=(*at, "only"), v=listed: _set(d, p, v)
                yield f"{side} {name}: ignored", lambda d, p=at: _set(d, p, {"ignored": "it does not matter"})
            if isinstance(said.get("default"), int | float):
                other = not said["default"] if isinstance(said["default"], bool) else said["default"] * 10
                yield f"{side} {name}: default {other}", lambda d, p=(*at, "default"), v=other: _set(d, p, v)


def _set(data: Data, path: tuple[str, ...], value: Any) -> None:
    """Another value of a key that is there; None takes it out."""
    *above, last = path
    for key in above:
        data = data[key]
    if last not in data or (value is None and data[last] == "{{ omit }}"):
        raise KeyError(last)
    if value is None:
        del data[last]
    else:
        data[last] = value


def _exchange(variant: Data) -> None:
    """The conditions of the first two choices exchanged."""
    one, two, *_ = variant["choices"]
    variant["choices"] |= {one: variant["choices"][two], two: variant["choices"][one]}


def _reorder(rule: Data, where: str, old: str, new: str) -> None:
    """Other axes of the source alone, or of the targets alone."""
    if old not in (rule["axes"] if where == "axes" else str(rule["targets"])):
        raise KeyError(old)
    if where == "axes":
        if rule.get("target") is not None:
            rule["targets"] = [{"name": rule.pop("target"), "axes": rule["axes"]}]
        rule["axes"] = rule["axes"].replace(old, new)
    else:
        for target in rule["targets"]:
            target["axes"] = target["axes"].replace(old, new)


def _swap(data: Data, one: str, two: str, side: str) -> None:
    """Two words exchanged in every name of a side."""
    pattern = re.compile(rf"(?<=\.)({one}|{two})(?=[._]|$)")

    def swapped(name: str) -> str:
        return pattern.sub(lambda found: two if found[1] == one else one, name)

    for rule in data["rules"].values():
        if side == "source":
            source = rule["source"]
            rule["source"] = [swapped(s) for s in source] if isinstance(source, list) else swapped(source)
        elif rule.get("target") is not None:
            rule["target"] = swapped(rule["target"])
        else:
            for target in rule["targets"]:
                target["name"] = swapped(target["name"])


def _replace(data: Data, part: str, old: str, new: str) -> None:
    def walk(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {k: v if k in ("help", "default", "decide") else walk(v) for k, v in tree.items()}
        if isinstance(tree, list):
            return [walk(item) for item in tree]
        return tree.replace(old, new) if isinstance(tree, str) else tree

    data[part] = walk(data[part])


def _texted(option: Data) -> None:
    option["default"] = str(option["default"])


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(item) for item in tree] if isinstance(tree, list | tuple) else tree


@dataclass(frozen=True)
class Known:
    """What the workflow compares an edit with: the mapping before it, its meaning, and what is committed of that."""

    mapping: MappingFile
    meaning: Meaning
    committed: dict[KeyPath, Any]
    errors: frozenset[str]  # of lint, when a mapping is written out whole: what its parent alone needs is not excused


def known_of(mapping: MappingFile) -> Known:
    whole = rebuilt(mapping, _plain(mapping.resolved))  # else every edit would seem to be told by loading
    found = committed(mapping)
    known = Known(mapping, meaning_of(mapping), {} if found is None else read_meaning(found[1]), _errors(whole))
    assert outcome(known, Edit("none", _plain(mapping.resolved))).red is None, f"{mapping.name} is red as it is"
    return known


def _errors(mapping: MappingFile) -> frozenset[str]:
    return frozenset(f"{one.code} {one.message}" for one in lint(mapping) if one.severity == "error")


def outcome(known: Known, edit: Edit) -> Outcome:
    """What the workflow says of an edit."""
    try:
        edited = rebuilt(known.mapping, edit.data)
    except EngineError as error:
        told = f"{error.code} {error.message}"
        return Outcome(edit.what, told, told)
    if errors := sorted(_errors(edited) - known.errors):
        return Outcome(edit.what, errors[0], errors[0])
    red: str | None = None
    comment: str | None = None
    now: Meaning = {}
    for name, facts in groupby(facts_of(edited), key=lambda fact: fact[0][0]):  # what is quickly known comes first
        part = tree_of(dict(facts))[name]
        now |= {} if part in ({}, [], None) else {name: part}
        before = {key: known.meaning.get(key, {}) for key in (*now, name)}
        if red is None:
            then = {path: value for path, value in known.committed.items() if path[0] == name}
            differ = differences(edited, then, dict(flat({name: part} if name in now else {})))
            red = differ[0].message if differ else None
        if comment is None and now.get(name, {}) != before[name]:
            told_of = [f"{one.kind} {one.target}" for one in tensor_changes(before, now, [known.mapping, edited])]
            told_of += [f"{one.file} {one.name}" for one in value_changes(before, now)]
            comment = told_of[0] if told_of else None
        if red is not None and comment is not None:
            break
    return Outcome(edit.what, red, comment)
