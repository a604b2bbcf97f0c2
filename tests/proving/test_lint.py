"""Lint finds, without a checkpoint, what would go wrong with one; bundled mappings are clean."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine.api
from engine.language.documents import plain
from engine.proving.lint import lint_file
from tests.support.depth import sampled

Data = dict[str, Any]


def base() -> Data:
    return dict(plain(engine.api.load_mapping("families/internlm.yaml").resolved))


def findings(data: Data, tmp_path: Path) -> dict[str, str]:
    """code → message, for a changed family."""
    path = tmp_path / "changed.yaml"
    path.write_text(json.dumps({**data, "rules": list(data["rules"].values())}, indent=1))
    found = lint_file(str(path))
    for finding in found:
        assert finding.fix
        assert finding.place is not None and finding.place.line
    return {f.code: f.message for f in found}


def test_bundled_mappings_are_clean() -> None:
    assert engine.api.lint() == []


def test_a_family_written_out_whole_is_clean_too(tmp_path: Path) -> None:
    assert findings(base(), tmp_path) == {}


def overlap(data: Data) -> None:
    del data["rules"]["up"]["when"]


def overlap_by_placeholder(data: Data) -> None:
    data["rules"]["zero"] = {
        "name": "zero",
        "source": "blocks.{layer}.norm{number}.weight",
        "target": "x.{layer}.{number}",
        "axes": "hidden",
    }
    data["rules"]["blocks.{layer}.norm1.weight"]["source"] = "blocks.{layer}.norm0.weight"


def gap(data: Data) -> None:
    del data["rules"]["qkv_pairs"]


def unused_dim(data: Data) -> None:
    data["dims"]["lonely"] = 3


def unused_option(data: Data) -> None:
    data["options"]["lonely"] = {"type": "integer", "default": 1}


def shadowed(data: Data) -> None:
    data.setdefault("ignore", []).append({"source": "norm.weight", "why": "not needed"})


def pieces(data: Data) -> None:
    data["rules"]["qkv"]["targets"][0]["axes"] = "(k heads head_dim) | hidden"


def expectation(data: Data) -> None:
    data["expect"] = {"hiden": 4096}


def misspelt_axis(data: Data) -> None:
    data["rules"]["down"].update(axes="hidden fnf", split="fnf")


def unreachable(data: Data) -> None:
    choices = data["variants"]["rotary"]["choices"]
    data["variants"]["rotary"]["choices"] = {"halves": "otherwise", "pairs": choices["pairs"]}


@sampled(2, "code")
@pytest.mark.parametrize(
    ("code", "told", "change"),
    [
        ("L001", "mlp.w3.weight", overlap),
        ("L001", "norm{number}", overlap_by_placeholder),
        ("L002", "nothing writes `model.layers.{layer}.self_attn.k_proj", gap),
        ("L003", "dim `lonely`", unused_dim),
        ("L003", "option `lonely`", unused_option),
        ("L004", "norm.weight", shadowed),
        ("L005", "layer, q}", pieces),
        ("E108", "hiden", expectation),
        ("L007", "fnf", misspelt_axis),
        ("L008", "never active", unreachable),
    ],
)
def test_each_defect_is_found_and_told(code: str, told: str, change: Callable[[Data], None], tmp_path: Path) -> None:
    data = base()
    change(data)
    found = findings(data, tmp_path)
    assert code in found, found
    assert told in found[code]


def test_what_keeps_a_file_from_loading_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("mapping: 1\nname: x\nname: y\n")
    (finding,) = lint_file(str(path))
    assert (finding.code, finding.severity) == ("E101", "error")
    assert finding.place is not None and finding.place.line == 3


ROOT = Path(__file__).parents[2]
INTERNLM2 = "families/internlm2"
# Mistakes in the text of a family: file, what is replaced, code, and a word that is told.
MISTAKES = {
    "a twin of two generations is missing": (INTERNLM2, "- name: up_old\n", "L002", "feed_forward.w2"),
    "a misspelt key of config": (
        INTERNLM2,
        ('  vocab_size: "{{ vocab }}"', '  vocb_size: "{{ vocab }}"'),
        "L010",
        "vocab_size",
    ),
    "a misspelt key where transformers lacks the model": (
        "families/internlm2-official",
        ("  model_type: internlm2\n  num", "  model_type: internlm2\n  vocb_size: 5\n  num"),
        "L010",
        "vocab_size",
    ),
    "a misspelt key of training_config": (
        INTERNLM2,
        ('  num_layers: "{{ num_h', '  num_layer: "{{ num_h'),
        "L010",
        "num_layers",
    ),
    "a misspelt key of generation": (
        INTERNLM2,
        ("generation: {eos_token_id: 2}", "generation: {eos_tokn_id: 2}"),
        "L010",
        "eos_token_id",
    ),
    "a key of the tokenizer in generation": (
        INTERNLM2,
        ("{eos_token_id: 2}", "{eos_token_id: 2, eos_token: x}"),
        "L010",
        "tokenizer",
    ),
    "an architecture that does not exist": (
        INTERNLM2,
        ("architecture: LlamaForCausalLM", "architecture: LlamaForCausalLn"),
        "L011",
        "LlamaForCausalLM",
    ),
    "an architecture of config that does not exist": (
        INTERNLM2,
        ("else 'LlamaForCausalLM'", "else 'LlamaForCasualLM'"),
        "L011",
        "LlamaForCausalLM",
    ),
    "a model type that does not exist": (
        INTERNLM2,
        ("  model_type: llama\n  arch", "  model_type: lama\n  arch"),
        "L011",
        "`llama`",
    ),
    "two model types": (INTERNLM2, ("  model_type: llama\n  num", "  model_type: mistral\n  num"), "L011", "mistral"),
    "an activation that does not exist": (
        INTERNLM2,
        ('  mlp_bias: "', '  hidden_act: sillu\n  mlp_bias: "'),
        "L011",
        "silu",
    ),
    "another activation": (INTERNLM2, ('  mlp_bias: "', '  hidden_act: gelu\n  mlp_bias: "'), "L014", "silu or swish"),
    "a list where keys want a text": (
        INTERNLM2,
        ('  mlp_bias: "', '  hidden_act: [silu]\n  mlp_bias: "'),
        "L014",
        "hidden_act",
    ),
    "keys and values where keys allow none": (
        INTERNLM2,
        ('  mlp_bias: "', '  quantization_config: {bits: 4, quant_method: gptq}\n  mlp_bias: "'),
        "L014",
        "allows null",
    ),
    "a number in quotes": (INTERNLM2, ("  eos_token_id: 2\n", '  eos_token_id: "2"\n'), "L014", 'eos_token_id: "2"'),
    "a value that keys forbid": (
        INTERNLM2,
        ("tie_word_embeddings: false", "tie_word_embeddings: true"),
        "L014",
        "tie_word_embeddings",
    ),
    "a tensor that no rule has": (
        INTERNLM2,
        ("present('layers.{layer}.attention.wqkv.bias')", "present('layers.{layer}.attention.wkqv.bias')"),
        "L012",
        "wqkv.bias",
    ),
    "a choice that does not exist": (
        INTERNLM2,
        ("if head == 'reward' else 'Llama", "if head == 'rewrad' else 'Llama"),
        "L013",
        "reward",
    ),
    "a choice of an option that does not exist": (
        INTERNLM2,
        ("options.rope_scaling in ['linear', 'yarn']", "options.rope_scaling in ['linaer', 'yarn']"),
        "L013",
        "linear",
    ),
    "bos and eos exchanged": (INTERNLM2, ("bos: <s>, eos: </s>", "bos: </s>, eos: <s>"), "L015", "ends a text"),
    "their numbers exchanged": (
        INTERNLM2,
        ("bos_token_id: 1\n  eos_token_id: 2", "bos_token_id: 2\n  eos_token_id: 1"),
        "L015",
        "`<s>` is 1",
    ),
    "an answer that ends where one begins": (
        INTERNLM2,
        (
            "pad: </s>}\ngeneration: {eos_token_id: 2}",
            'pad: </s>, rename: {98: "<|im_end|>", 99: "<|im_start|>"}}\ngeneration: {eos_token_id: [2, 99]}',
        ),
        "L015",
        "begins",
    ),
    "generation that does not stop where config says": (
        INTERNLM2,
        ("generation: {eos_token_id: 2}", "generation: {eos_token_id: 3}"),
        "L015",
        "`config` says 2",
    ),
    "a default of another type": (INTERNLM2, ("default: 32768", 'default: "32768"'), "L016", "max_position_embeddings"),
    "a default that is none of the choices": (INTERNLM2, ("default: none", "default: nona"), "L016", "rope_scaling"),
    "theta that ignores the checkpoint in one spelling": (
        INTERNLM2,
        ('  rope_theta: "{{ rope_base | default(10000) }}"\n  rope_sc', "  rope_theta: 10000\n  rope_sc"),
        "L017",
        "rope_parameters.rope_theta",
    ),
    "a misspelt layout": (INTERNLM2, ("layout: internevo,", "layout: internevoo,"), "E002", "internevo"),
    "a chat template that is missing": (
        INTERNLM2,
        ("generation: {", "chat_template: internlm-chta\ngeneration: {"),
        "E002",
        "internlm-chat",
    ),
    "a misspelt option": (
        INTERNLM2,
        ("options.max_position_embeddings if", "options.max_positoin_embeddings if"),
        "E108",
        "max_position_embeddings",
    ),
    "a misspelt key of the tokenizer": (INTERNLM2, ("tokenizer: {file:", "tokenizer: {fiel:"), "E102", "`file`"),
    "a misspelt dim in an expression": (
        INTERNLM2,
        ('hidden_size: "{{ hidden }}"', 'hidden_size: "{{ hiddn }}"'),
        "L009",
        "hidden",
    ),
    "a dim before one that it is computed from": (
        INTERNLM2,
        ("head_dim: head_dim | default(hidden // heads)", "head_dim: pair * 2"),
        "L009",
        "move `pair` up",
    ),
    "a misspelt key in an expression": (
        INTERNLM2,
        ("layer_norm_epsilon | default(1e-5)", "layer_norm_epsilom | default(1e-5)"),
        "L009",
        "layer_norm_epsilon",
    ),
}


def edited(family: str, change: str | tuple[str, str]) -> str:
    """A bundled mapping with some text replaced, or without the rule that begins with a line."""
    text = (ROOT / "mappings" / f"{family}.yaml").read_text("utf-8")
    if isinstance(change, str):
        start = text.index("  " + change)
        end = text.index("\n  - ", start + 4) if "\n  - " in text[start + 4 :] else len(text)
        following = text.index("\n\n", start)
        return text[:start] + text[min(end, following) + 1 :]
    assert change[0] in text
    return text.replace(change[0], change[1])


@sampled(3)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_and_the_right_word_named(mistake: str, tmp_path: Path) -> None:
    family, change, code, word = MISTAKES[mistake]
    path = tmp_path / "mine.yaml"
    path.write_text(edited(family, change), encoding="utf-8")  # type: ignore[arg-type]
    found = [f for f in lint_file(str(path)) if f.code == code]
    assert found, lint_file(str(path))
    assert any(word in f"{f.message} {f.fix} {f.expected}" for f in found), found
    assert all(f.severity == "error" and f.place is not None for f in found)
    assert all(f.place.line for f in found if f.place is not None and "chat template" not in f.message)


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = (ROOT / "mappings" / f"{INTERNLM2}.yaml").read_text("utf-8")
    for old, new in (
        ("axes: vocab hidden\n    split: hidden", "axes: vocab (hidden\n    split: hidden"),
        ("* options.rope_factor) | int", "* options.rop_factor) | int"),
        ("fused, rotary: halves}", "fused, rotary: halfs}"),
        ("multiple_of | default(256)", "multiple_of | defalt(256)"),
        ('num_layers: "{{ num_hidden_layers }}"', 'num_layers: "{{ num_hidden_layers + }}"'),
    ):
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    found = lint_file(str(path))
    told = " ".join(f"{f.code} {f.message}" for f in found)
    assert {f.code for f in found} == {"E103", "E105", "E108"}
    assert all(word in told for word in ("group is not closed", "halfs", "defalt", "it ends where", "rop_factor")), told
    places = [(f.place.line, f.place.column) for f in found if f.place is not None]
    assert places == sorted(places, key=lambda at: at[0] or 0)


def test_all_words_that_a_file_does_not_know_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mapping: 1\nname: x\nversion: 1.0.0\nextnds: families/internlm2.yaml\nrule: []\n")
    found = lint_file(str(path))
    assert {f.message.split("`")[1] for f in found if "no key" in f.message} == {"extnds", "rule"}


def test_what_is_known_of_targets_is_what_transformers_has() -> None:
    from engine.proving.targets import _data
    from tests.support.targets import taken

    now = taken()
    assert _data() == now, "run `make targets`"


def test_a_pipe_among_the_mappings_of_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "my.yaml").write_text(
        "mapping: 1\nname: my\nversion: 1.0.0\ndescription: x\nextends: internlm2\n", encoding="utf-8"
    )
    assert engine.api.mapping_files([tmp_path]) == [tmp_path / "my.yaml"]
    with pytest.raises(engine.EngineError, match="is no file"):
        engine.load_mapping(tmp_path / "pipe.yaml")
