"""`engine new`: drafts that are right, or refuse, or ask; and never a file that is not clean."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine
from engine import api
from engine.commands.main import cli
from engine.discover.names import _patterns
from engine.discover.notes import block, comment, flow, shown
from engine.discover.scaffold import DECIDED_LATER, Scaffold
from engine.errors import EngineError
from tests.support.depth import crossed, examples, sampled
from tests.support.families import model_of, save_family
from tests.support.fsdp import save_fsdp
from tests.support.genuine import MODELS
from tests.support.shards import Model, State, same, save

FOLDER = Path(__file__).parents[1] / "fixtures" / "internevo"
FAMILIES = {"moe": "internlm-moe", "v1": "internlm", "v2": "internlm2", "llama": "llama"}
ASKS = {"mlp_letters": "w2_is_down"}

V1_NAMES = {
    "blocks.": "layers.",
    "mixer.Wqkv": "attention.qkv_proj",
    "mixer.out_proj": "attention.out_proj",
    "embedding.": "tok_embeddings.",
    "head.": "lm_head.",
}
V2_NAMES = {"attention.wqkv": "attn.qkv_proj", "attention.wo": "attn.out_proj", "feed_forward": "ffn"}
HF_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "embed_tokens",
    "output.": "lm_head.",
}
FOREIGN = {
    "attention.wqkv": "sa.pack",
    "attention.wo": "sa.back",
    "feed_forward.w": "m.l",
    "attention_norm": "u0",
    "ffn_norm": "u1",
    "layers.": "trunk.layers.",
    "tok_embeddings": "entry",
    "output": "exit",
    "norm.": "z.",
}


def rewritten(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """Every rank file saved again with changed tensors."""
    for path in folder.glob("model_*.pt"):
        if path.name != "model_config.pt":
            torch.save(change(torch.load(path, weights_only=True)), path)
    return folder


def renamed(folder: Path, names: Mapping[str, str]) -> Path:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        result = {}
        for name, tensor in state.items():
            for old, new in names.items():
                name = name.replace(old, new)
            result[name] = tensor
        return result

    return rewritten(folder, change)


def undecided(file: Path) -> list[str]:
    """Findings of a draft, apart from what a person has to decide."""
    return [one.code for one in api.lint([file]) if one.code not in DECIDED_LATER]


def drafted(folder: Path, file: Path, **asked: Any) -> Scaffold:
    """A draft, written, which must lint clean and be in its usual form."""
    made = api.new_mapping(folder, out=file, **asked)
    assert undecided(file) == []
    assert api.format_mapping(made.text) == made.text == file.read_text()
    lines = made.text.split("\n")
    assert made.decisions
    assert all("# decide:" in lines[line - 1] for line, _ in made.decisions)
    return made


def tensors(mapping: Path | str, folder: Path, **chosen: str) -> State:
    return dict(engine.iter_tensors(engine.plan(mapping, folder, settings=chosen)))


@sampled(3)
@pytest.mark.parametrize("name", MODELS)
def test_a_genuine_checkpoint_gives_a_release_that_converts_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    family = next(value for key, value in FAMILIES.items() if key in name)
    file = tmp_path / "release.yaml"
    made = api.new_mapping(FOLDER / name, out=file)
    assert (made.kind, made.parent) == ("release", f"families/{family}.yaml")
    assert undecided(file) == []
    assert api.format_mapping(made.text) == made.text
    loaded = engine.load_mapping(file)
    assert loaded.expect["hidden"] == (32 if name.endswith("_whole") else 64)
    chosen = ASKS if made.state is not None and made.state["code"] == "E202" else {}
    for mapping in (str(file), f"families/{family}.yaml"):
        engine.convert(mapping, FOLDER / name, tmp_path / Path(mapping).stem, settings=chosen, strict=True)
    weights = sorted(p.name for p in (tmp_path / family).glob("*") if p.suffix in (".safetensors", ".json"))
    for weight in set(weights) - {"conversion.json"}:
        assert (tmp_path / "release" / weight).read_bytes() == (tmp_path / family / weight).read_bytes()


@sampled(3)
@pytest.mark.parametrize(
    ("named", "layout"),
    crossed(
        [
            (Model(family="v2", groups=2, ffn=40), V2_NAMES),
            (Model(family="v2", groups=2, ffn=40, bias=False), V2_NAMES),
            (Model(family="v2", groups=2, ffn=40, rotary="pairs"), V2_NAMES),
            (Model(family="v2", groups=2, ffn=40, letters="w2_is_up"), V2_NAMES),
            (Model(family="v1", ffn=40), V1_NAMES),
            (model_of("llama", ffn=40, heads=4, groups=2, bias=True, mlp_bias=True), HF_NAMES),
            (model_of("llama", ffn=40, heads=4, groups=4), HF_NAMES),
            (model_of("internlm3", ffn=40, heads=4, groups=2), HF_NAMES),
        ],
        [{"tp": 1}, {"tp": 2, "pp": 2}, {"tp": 2, "pp": 2, "chunks": 2}],
    ),
)
def test_renamed_tensors_convert_right(
    named: tuple[Any, Mapping[str, str]], layout: dict[str, int], tmp_path: Path
) -> None:
    model, names = named
    expected = (
        save_family(model, tmp_path / "src", **layout)
        if model.family == "llama"
        else save(model, tmp_path / "src", **layout)
    )
    plain = shutil.copytree(tmp_path / "src", tmp_path / "plain")
    made = drafted(renamed(tmp_path / "src", names), tmp_path / "x.yaml")
    assert (made.kind, made.parent, made.state) == ("renamed", model.mapping, None)
    same(tensors(tmp_path / "x.yaml", tmp_path / "src"), expected)
    ours, theirs = (
        engine.plan(m, s).config for m, s in ((tmp_path / "x.yaml", tmp_path / "src"), (model.mapping, plain))
    )
    assert ours == theirs


@sampled(2)
@pytest.mark.parametrize(
    "names",
    [
        {"feed_forward.w1": "mlp.a", "feed_forward.w2": "mlp.b", "feed_forward.w3": "mlp.c"},
        {"attention_norm": "ln_1", "ffn_norm": "ln_2"},
        {"attention.wq": "attn.x", "attention.wk": "attn.y", "attention.wv": "attn.z"},
        {"tok_embeddings": "one", "output": "two"},
    ],
)
def test_names_that_do_not_tell_are_left_to_a_person(names: Mapping[str, str], tmp_path: Path) -> None:
    save_family(model_of("llama", ffn=40, heads=4, groups=4), tmp_path / "src")
    made = drafted(renamed(tmp_path / "src", names), tmp_path / "x.yaml")
    assert made.kind == "renamed"
    assert made.state is not None and made.state["code"] in ("E205", "E207", "E202")
    with pytest.raises(EngineError):
        engine.plan(tmp_path / "x.yaml", tmp_path / "src")
    for new in names.values():
        assert any("no rule reads" in text and new in text for _, text in made.decisions)


def test_a_name_that_the_family_has_too_is_told_beside_the_one_that_is_left(tmp_path: Path) -> None:
    """The fork may call `up` what the family calls `gate`: who reads the doubt must see that name too."""
    save_family(model_of("llama", ffn=40, heads=4, groups=4), tmp_path / "src")
    made = drafted(renamed(tmp_path / "src", {"feed_forward.w3": "mlp.gate"}), tmp_path / "x.yaml")
    (told,) = (text for _, text in made.decisions if "feed_forward.w3" in text)
    assert "`layers.{layer}.feed_forward.w1.{param}`" in told


def test_what_is_proposed_in_a_comment_can_be_taken_by_deleting_the_hash(tmp_path: Path) -> None:
    model = Model(family="v1", ffn=40)
    expected = save(model, tmp_path / "src", tp=2)
    made = drafted(renamed(tmp_path / "src", {"mixer.Wqkv": "attn.query_key_value"}), tmp_path / "x.yaml")
    assert made.state is not None
    taken = made.text.replace("\n#  - ", "\n  - ").replace("\n#rules:", "\nrules:")
    assert taken != made.text
    (tmp_path / "y.yaml").write_text(taken)
    assert undecided(tmp_path / "y.yaml") == []
    same(tensors(tmp_path / "y.yaml", tmp_path / "src"), expected)
    assert engine.plan(tmp_path / "y.yaml", tmp_path / "src").config["attention_bias"] is True


def test_two_orders_of_one_shape_are_not_chosen_between(tmp_path: Path) -> None:
    """Without a model type, q k v in blocks and by groups are both possible."""
    save(Model(family="v1", ffn=40), tmp_path / "src", tp=2)
    (tmp_path / "src" / "config_file.pt").unlink()
    made = drafted(renamed(tmp_path / "src", V1_NAMES), tmp_path / "x.yaml")
    assert made.state is not None
    assert "qkv_proj" not in "".join(line for line in made.text.split("\n") if "source: " in line and "#" not in line)


@sampled(2)
@pytest.mark.parametrize("layout", [{"tp": 1}, {"tp": 2}, {"tp": 3, "pp": 2}, {"mode": "isp", "wp": 2}])
def test_a_foreign_checkpoint_gets_a_rule_for_every_pattern(layout: dict[str, Any], tmp_path: Path) -> None:
    model = Model(family="v2", hidden=48, heads=6, groups=3, ffn=56, vocab=64)
    save(model, tmp_path / "whole")
    whole = torch.load(renamed(tmp_path / "whole", FOREIGN) / "model_tp0_pp0.pt", weights_only=True)
    save(model, tmp_path / "src", **layout)
    made = drafted(renamed(tmp_path / "src", FOREIGN), tmp_path / "x.yaml")
    assert made.kind == "own"
    if layout != {"tp": 1}:
        with pytest.raises(EngineError):
            engine.plan(tmp_path / "x.yaml", tmp_path / "src")
        decide(tmp_path / "x.yaml", {
            "pack": ("(groups (queries + k + v) head_dim) | hidden", "groups"),
            "back": ("hidden | (heads head_dim)", "heads"),
            "m.l1": ("ffn hidden", "ffn"), "m.l3": ("ffn hidden", "ffn"), "m.l2": ("hidden ffn", "ffn"),
        })  # fmt: skip
    same(tensors(tmp_path / "x.yaml", tmp_path / "src"), whole)


def decide(file: Path, decided: Mapping[str, tuple[str, str]]) -> None:
    """Take rules that stand in comments, one for each name, with the axes and the split that a person knows."""
    lines, taken = [], set()
    for line in file.read_text().split("\n"):
        rule = yaml.safe_load(line[1:])[0] if line.startswith("#  - ") else {}
        of = next((name for name in decided if name in rule.get("source", "")), None)
        if of is not None and of not in taken:
            taken.add(of)
            axes, split = decided[of]
            source = re.sub("weight$|bias$", "{param}", rule["source"]) if "|" in axes else rule["source"]
            line = f"  - {flow({'source': source, 'target': source, 'axes': axes, 'split': split})}"
        lines.append(line)
    file.write_text("\n".join(lines).replace("\nrules:", "  queries: heads // groups\n  k: 1\n  v: 1\n\nrules:"))


def test_keys_and_values_in_one_tensor_of_the_size_of_the_queries_are_asked_for(tmp_path: Path) -> None:
    save(Model(family="v2", hidden=48, heads=6, groups=3, ffn=56, vocab=64), tmp_path / "src", tp=3)

    def change(state: dict[str, Any]) -> dict[str, Any]:
        split = {}
        for name, tensor in state.items():
            if "wqkv" in name:  # one group on each rank: two heads of queries, one of keys, one of values
                split[name.replace("attention.wqkv", "sa.askers")] = tensor[:16].clone()
                split[name.replace("attention.wqkv", "sa.pack_kv")] = tensor[16:].clone()
        return {name: tensor for name, tensor in state.items() if "wqkv" not in name} | split

    parts = [torch.load(file, weights_only=True) for file in sorted((tmp_path / "src").glob("model_tp*.pt"))]
    keys, values = (
        torch.cat([part["layers.0.attention.wqkv.weight"][low : low + 8] for part in parts]) for low in (16, 24)
    )
    made = drafted(renamed(rewritten(tmp_path / "src", change), FOREIGN), tmp_path / "x.yaml")
    assert any("several things, as keys and values" in text for _, text in made.decisions)
    packed = ("((k + v) groups head_dim) | hidden", "groups")
    mlp = {"m.l1": ("ffn hidden", "ffn"), "m.l3": ("ffn hidden", "ffn"), "m.l2": ("hidden ffn", "ffn")}
    decide(tmp_path / "x.yaml", {"pack_kv": packed, "askers": ("(heads head_dim) | hidden", "heads"), **mlp})
    got = tensors(tmp_path / "x.yaml", tmp_path / "src")
    assert torch.equal(got["trunk.layers.0.sa.pack_kv.weight"], torch.cat([keys, values]))


def test_shards_that_record_their_rows_are_read_as_what_they_are_part_of(tmp_path: Path) -> None:
    model = Model(family="v2", hidden=48, heads=6, groups=3, ffn=56, vocab=64, layers=1)
    expected = save_fsdp(model, tmp_path / "src", dp=3, tp=2)
    made = api.new_mapping(tmp_path / "src", out=tmp_path / "x.yaml")
    assert (made.kind, made.state) == ("release", None)
    same(tensors(tmp_path / "x.yaml", tmp_path / "src"), expected)


def test_a_distributed_checkpoint_of_an_unknown_class_gives_a_draft_too(tmp_path: Path) -> None:
    """Its configuration is the target's, of which the layout says nothing that a size may be."""
    tensors = {"trunk.layers.0.w.weight": torch.randn(8, 64), "entry.weight": torch.randn(32, 64)}
    torch.distributed.checkpoint.save(tensors, checkpoint_id=tmp_path / "step", no_dist=True)
    config = {"model_type": "unheard", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    (tmp_path / "step" / "config.json").write_text(json.dumps(config))
    made = drafted(tmp_path / "step", tmp_path / "x.yaml")
    assert made.kind == "own" and "num_hidden_layers: {type: integer, min: 1}" in made.text


def test_a_foreign_cut_that_no_size_explains_is_refused_and_not_joined(tmp_path: Path) -> None:
    save(Model(family="v2", groups=2, ffn=40), tmp_path / "src", tp=2)

    def change(state: dict[str, Any]) -> dict[str, Any]:
        return {f"a.{name}": tensor for name, tensor in state.items()} | {"odd.weight": torch.randn(11, 3)}

    renamed(tmp_path / "src", FOREIGN)
    made = drafted(rewritten(tmp_path / "src", change), tmp_path / "x.yaml")
    assert made.kind == "own"
    assert "no cut is proposed" in " ".join(text for _, text in made.decisions)
    with pytest.raises(EngineError):
        tensors(tmp_path / "x.yaml", tmp_path / "src")


HOSTILE = [
    "a: b",
    "x\nmapping: 2",
    "x # y",
    '"quoted"',
    "it's",
    "- item",
    "{layer}",
    "a}b",
    "null",
    "yes",
    "1e5",
    "& anchor",
    "*alias",
    "!!python/object",
    "%TAG",
    "\\x00",
    "tab\there",
    "\x1b[31mred",
    "ünïcode",
    "\U0001f600",
    "  ",
    "layers.00.weight",
    "layers.99999999999999999999.weight",
    "{{ 7 * 7 }}",
    "a.#.b",
    "=",
    "\u2028line",
    "\x85next",
]


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    save(Model(family="v1"), tmp_path / "src")
    sizes = {name: 3 + i for i, name in enumerate(HOSTILE)}
    made = drafted(
        rewritten(tmp_path / "src", lambda _: {name: torch.zeros(n) for name, n in sizes.items()}), tmp_path / "x.yaml"
    )
    data = yaml.safe_load(made.text)
    assert data["mapping"] == 1
    rules = {rule["source"] for rule in data["rules"]}
    assert rules == {name for name in HOSTILE if not set("{}*\\") & set(name)}
    assert made.text.isascii() and "\x1b" not in made.text
    with pytest.raises(EngineError):  # those with braces, stars and backslashes have no rule
        engine.plan(tmp_path / "x.yaml", tmp_path / "src")


@given(st.text(max_size=40))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_is_one_scalar_and_one_comment(text: str) -> None:
    assert yaml.safe_load(flow(text)) == text or "\ud800" <= max(text, default="") <= "\udfff"
    lines = comment(f"decide: {shown(text)} ends")
    assert yaml.safe_load("\n".join([*lines, "a: 1"])) == {"a": 1}
    if text.isascii():
        assert yaml.safe_load("\n".join(block("key", text))) == {"key": text}


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        (["0.weight", "1.weight"], ["0.weight", "1.weight"]),  # no word before a number says what it counts
        (["0.layers.1.w", "0.layers.2.w"], ["0.layers.{layer}.w"]),
        (["layers.0.blocks.0.w", "layers.0.blocks.1.w"], ["layers.{layer}.blocks.{blocks_number}.w"]),
        (["layers.0.blocks.1.w", "layers.1.blocks.1.w"], ["layers.{layer}.blocks.1.w"]),
        (["experts.0.experts.0.w", "experts.0.experts.1.w"], ["experts.{expert}.experts.{experts_number}.w"]),
        (["a.0.a.0.w", "a.1.a.1.w"], ["a.{a_number}.a.{a_number_2}.w"]),
    ],
)  # fmt: skip
def test_a_number_is_called_by_the_word_before_it(names: list[str], texts: list[str]) -> None:
    assert list(dict.fromkeys(text for _, text, _ in _patterns(names))) == texts


@given(
    st.lists(
        st.lists(
            st.sampled_from(["layers", "blocks", "0", "1", "12", "experts", "w", "weight", "bias", "h"]),
            min_size=1,
            max_size=5,
        ),
        min_size=1,
        max_size=12,
    )
)
@settings(
    deadline=None,
    max_examples=examples(60),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_any_set_of_names_gives_patterns_that_read_each_name_once(tmp_path: Path, parts: list[list[str]]) -> None:
    from engine.discover.names import observe
    from engine.formats.headers import TensorHeader
    from engine.language.names import pattern
    from engine.planning.stored import Stored

    def stored(name: str) -> Stored:
        header = object.__new__(TensorHeader)
        object.__setattr__(header, "name", name)
        object.__setattr__(header, "shape", (2,))
        return Stored(0, header, name, 0)

    names = {".".join(one) for one in parts}
    found, hopeless = observe([stored(name) for name in sorted(names)])
    assert hopeless == []
    for name in names:
        assert sum(pattern(one.text).match(name) is not None for one in found) == 1


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    save(Model(family="v1"), tmp_path / "src", tp=2)
    yield tmp_path / "src"


def test_a_file_is_never_replaced_unasked(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("mine")
    with pytest.raises(EngineError) as caught:
        api.new_mapping(source, out=file)
    assert caught.value.code == "E401"
    assert file.read_text() == "mine"
    with pytest.raises(EngineError, match="E401"):
        api.new_mapping(source, out=file, overwrite=True)
    assert file.read_text() == "mine"
    with pytest.raises(EngineError, match="E401"):  # before anything is read
        api.new_mapping(tmp_path / "none", out=file)
    file.unlink()
    api.new_mapping(source, out=file)
    drafted = file.read_text()
    api.new_mapping(source, out=file, overwrite=True)
    assert file.read_text() == drafted and drafted.startswith("mapping: 1\n")
    file.write_text(drafted.replace("version: ", "version:  "))  # a person has edited it
    with pytest.raises(EngineError, match="E401"):
        api.new_mapping(source, out=file, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src", "x.yaml"]


def test_the_command_prints_writes_and_gives_data(source: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    printed = runner.invoke(cli, ["new", "--src", str(source), "--name", "mine"])
    assert printed.exit_code == 0
    assert yaml.safe_load(printed.stdout)["extends"] == "families/internlm.yaml"
    file = tmp_path / "deep" / "x.yaml"
    written = runner.invoke(cli, ["new", "--src", str(source), "-o", str(file)])
    assert f"wrote {file}: a release of internlm, which fits" in written.stdout
    assert f"next: engine plan --mapping {file} --src {source}" in written.stdout
    again = runner.invoke(cli, ["new", "--src", str(source), "-o", str(file)])
    assert again.exit_code == 1 and "E401" in again.stderr
    data = json.loads(runner.invoke(cli, ["new", "--src", str(source), "--json"]).stdout)
    assert data["file"] is None and data["kind"] == "release" and data["state"] is None
    assert yaml.safe_load(data["text"])["extends"] == "families/internlm.yaml"


def test_a_name_with_capitals_and_spaces_is_refused(source: Path) -> None:
    with pytest.raises(EngineError) as caught:
        api.new_mapping(source, name="No Name")
    assert caught.value.code == "E001"


def test_a_folder_without_a_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        api.new_mapping(tmp_path)
    assert caught.value.code == "E304"


def test_metas_files_give_a_release_of_its_family(tmp_path: Path) -> None:
    expected = save_family(model_of("meta", ffn=40, embedding="by_vocab"), tmp_path / "src", tp=2)
    made = api.new_mapping(tmp_path / "src", out=tmp_path / "x.yaml")
    assert (made.kind, made.parent) == ("release", "families/meta-llama.yaml")
    same(tensors(tmp_path / "x.yaml", tmp_path / "src"), expected)


def test_what_a_person_must_say_is_not_expected_of_the_release(tmp_path: Path) -> None:
    folder = FOLDER.parent / "megatron" / "torch-qwen3-moe"
    made = api.new_mapping(folder / "iter_0000010", out=tmp_path / "x.yaml")
    assert (made.kind, made.parent) == ("release", "families/megatron-qwen3-moe.yaml")
    assert "vocab" not in yaml.safe_load(made.text)["expect"]  # files hold padding, too
    given = folder / "hf_config.json"
    engine.plan(tmp_path / "x.yaml", folder / "iter_0000010", config=given, strict=True)
    how = ["--src", str(folder / "iter_0000010"), "--config", str(given)]
    written = CliRunner().invoke(cli, ["new", *how, "-o", str(tmp_path / "y.yaml")])
    assert f"next: engine plan --mapping {tmp_path / 'y.yaml'} {' '.join(how)}" in written.stdout
    assert yaml.safe_load((tmp_path / "y.yaml").read_text())["expect"]["vocab"] and "decide" not in written.stdout


def test_a_draft_where_a_mapping_of_a_models_own_names_fits_as_it_is_says_so() -> None:
    folder = FOLDER.parent / "dcp" / "fsdp2tp2-f32-model"
    made = api.new_mapping(folder / "step-10", config=folder / "hf_config.json", name="mine")
    assert made.kind != "release" and "`transformers` fits as it is" in made.decisions[0][1]
