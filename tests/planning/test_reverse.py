"""Back to training: rank files written by the engine are those that training would have written."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import engine
from engine.errors import EngineError
from tests.support.cases import layouts_of, rank_files, request, same_files, writable_cases
from tests.support.depth import examples, sampled
from tests.support.genuine import FIXTURES, GENUINE, family_of
from tests.support.shards import Model, State, same, save

common = settings(deadline=None, max_examples=examples(25), suppress_health_check=list(HealthCheck))


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# The head of one is normalised, and the embedding of the other, whole on every rank, is written cut.
@sampled(3)
@pytest.mark.parametrize("fixture", [name for name in GENUINE if not name.endswith(("_normhead", "_whole"))])
def test_a_genuine_checkpoint_comes_back_bit_for_bit(fixture: str, tmp_path: Path) -> None:
    mapping, source = family_of(fixture), FIXTURES / fixture
    letters: dict[str, Any] = {}
    try:
        engine.convert(mapping, source, tmp_path / "hf")
    except EngineError as error:
        assert error.code == "E202"
        letters = {"mlp_letters": "w2_is_down"}
        engine.convert(mapping, source, tmp_path / "hf", settings=letters)
    engine.reverse(mapping, tmp_path / "hf", tmp_path / "back", like=source, settings=letters)
    same_files(rank_files(tmp_path / "back"), rank_files(source))


@common
@given(st.data())
def test_reversing_writes_what_training_would_have_written(data: st.DataObject) -> None:
    """The independent sharder cuts the same weights by itself."""
    model, layout = data.draw(writable_cases())
    layout = layout | {"wrapped": False, "legacy": False}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = save(model, folder / "genuine", **layout)
        write_whole(model, expected, folder / "hf")
        asked = request(layout)
        asked["settings"] |= {"mlp_letters": model.letters, "rotary": model.rotary, "embedding": model.embedding}
        asked["settings"] |= {"fusion": "fused" if model.fused else "apart"}
        engine.reverse(model.mapping, folder / "hf", folder / "back", **asked)
        same_files(rank_files(folder / "back"), rank_files(folder / "genuine"))
        plan = engine.plan(model.mapping, folder / "back", settings={"mlp_letters": model.letters})
        same(dict(engine.iter_tensors(plan)), expected)


@common
@given(st.data())
def test_a_checkpoint_comes_back_as_it_was_with_like(data: st.DataObject) -> None:
    model, layout = data.draw(writable_cases())
    letters = {"mlp_letters": model.letters}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(model, folder / "genuine", **layout)
        engine.convert(model.mapping, folder / "genuine", folder / "hf", settings=letters)
        engine.reverse(model.mapping, folder / "hf", folder / "back", like=folder / "genuine", settings=letters)
        same_files(rank_files(folder / "back"), rank_files(folder / "genuine"))


@common
@given(st.data())
def test_resharding_keeps_the_model_and_leads_back(data: st.DataObject) -> None:
    model, layout = data.draw(writable_cases())
    other = data.draw(layouts_of(model))
    letters = {"mlp_letters": model.letters}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = save(model, folder / "a", **layout)
        asked = request(other)
        asked["settings"] |= letters
        engine.reshard(model.mapping, folder / "a", folder / "b", **asked)
        same(dict(engine.iter_tensors(engine.plan(model.mapping, folder / "b", settings=letters))), expected)
        kept = layout["wrapped"] and other["chunks"] == 1  # names stay as they were
        save(model, folder / "genuine", **other, wrapped=kept)
        same_files(rank_files(folder / "b"), rank_files(folder / "genuine"))
        engine.reshard(model.mapping, folder / "b", folder / "c", like=folder / "a", settings=letters)
        same_files(rank_files(folder / "c"), rank_files(folder / "a"))


def write_whole(model: Model, state: State, folder: Path, **config: Any) -> None:
    """A Hugging Face checkpoint as transformers would save it."""
    import json

    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    head = "LlamaForSequenceClassification" if model.head == "reward" else "LlamaForCausalLM"
    values = {
        "architectures": [head],
        "model_type": "llama",
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
        "attention_bias": model.bias,
    }
    (folder / "config.json").write_text(json.dumps(values | config))


V1 = Model("v1")
V2 = Model("v2", groups=2, bias=False)


def hf(model: Model, tmp_path: Path, **config: Any) -> Path:
    expected = save(model, tmp_path / "step")
    write_whole(model, expected, tmp_path / "hf", **config)
    return tmp_path / "hf"


def test_rank_files_are_sound_zips_that_torch_maps(tmp_path: Path) -> None:
    engine.reverse(V1.mapping, hf(V1, tmp_path), tmp_path / "back", tp=2)
    path = tmp_path / "back" / "model_tp1_pp0.pt"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    state = torch.load(path, weights_only=True, mmap=True)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in state.values())
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * 2 for tensor in state.values())


@sampled(2)
@pytest.mark.parametrize("fixture", ["v1_tp2_pp2", "v2_tp2_pp2", "v1_isp_tp1_wp2"])
def test_rank_files_load_strictly_into_modules_of_the_genuine_names(fixture: str, tmp_path: Path) -> None:
    mapping, source = family_of(fixture), FIXTURES / fixture
    engine.convert(mapping, source, tmp_path / "hf")
    engine.reverse(mapping, tmp_path / "hf", tmp_path / "back", like=source)
    for name, genuine in rank_files(source).items():
        tree = torch.nn.Module()
        for key, tensor in genuine.items():
            *path, leaf = key.split(".")
            module = tree
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, torch.nn.Parameter(torch.zeros_like(tensor)))
        tree.load_state_dict(torch.load(tmp_path / "back" / name, weights_only=True), strict=True)
        for key, tensor in genuine.items():
            assert torch.equal(tree.get_parameter(key), tensor)


def test_the_training_configuration_is_a_plain_mapping_with_what_training_wrote(tmp_path: Path) -> None:
    source = FIXTURES / "v2_tp2_pp2"
    engine.convert("families/internlm2.yaml", source, tmp_path / "hf")
    engine.reverse("families/internlm2.yaml", tmp_path / "hf", tmp_path / "back", like=source)
    written = torch.load(tmp_path / "back" / "model_config.pt", weights_only=True)
    assert type(written) is dict
    wanted = {
        "num_layers": 4, "hidden_size": 64, "vocab_size": 256, "num_attention_heads": 8, "num_kv_attention_heads": 4,
        "multiple_of": 64, "layer_norm_epsilon": 1e-05, "norm_type": "rmsnorm", "no_bias": True,
        "num_chunks": 1, "adapt_hf": True, "embed_split_hidden": True, "dtype": torch.bfloat16,
    }  # fmt: skip
    ffn = next(t for n, t in rank_files(source)["model_tp0_pp0.pt"].items() if n.endswith("w1.weight")).shape[0] * 2
    multiple = written.get("multiple_of", 256)
    assert -(-int(64 * written["mlp_ratio"]) // multiple) * multiple == ffn
    assert {key: written[key] for key in wanted if key != "multiple_of"} == {
        key: value for key, value in wanted.items() if key != "multiple_of"
    }
    assert torch.load(tmp_path / "back" / "topo_tp1_pp1.json", weights_only=True) == {}


@sampled(3)
@pytest.mark.parametrize("ffn", [7, 25, 49, 97, 11008, 13824, 10922])
def test_the_ratio_gives_the_width_again_whatever_it_is(ffn: int, tmp_path: Path) -> None:
    model = Model("v2", layers=1, hidden=12, heads=2, groups=2, ffn=ffn, vocab=8, bias=False)
    engine.reverse(model.mapping, hf(model, tmp_path), tmp_path / "back")
    written = torch.load(tmp_path / "back" / "model_config.pt", weights_only=True)
    multiple = written.get("multiple_of", 256)
    assert -(-int(12 * written["mlp_ratio"]) // multiple) * multiple == ffn


# In one file without ranks no other file is of another run, and no rank is missing.
NO_RANKS = "Either the mapping or the configuration is not the one for this checkpoint."


def refuse(
    code: str, *words: str, model: Model, tmp_path: Path, config: dict[str, Any] | None = None, **asked: Any
) -> None:
    folder = hf(model, tmp_path, **(config or {}))
    with pytest.raises(EngineError) as caught:
        engine.reverse(model.mapping, folder, tmp_path / "back", **asked)
    assert caught.value.code == code, str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_more_ranks_than_key_value_heads_are_refused_with_the_numbers_that_work(tmp_path: Path) -> None:
    refuse("E214", "stored 2 times", "--tp 1, 2", model=V2, tmp_path=tmp_path, tp=4)


def test_an_axis_that_each_term_of_a_sum_has_is_cut_once(tmp_path: Path) -> None:
    """All queries, then all keys, then all values: it was read, and then refused as an axis for each of the three."""
    family = Path(__file__).parents[2] / "mappings" / "families" / "internlm2.yaml"
    text = family.read_text(encoding="utf-8")
    start = text.index("  - name: qkv ")
    rule = text[start : text.index("  - name: ", start + 9)]
    packed = rule.replace("(groups (queries + k + v) head_dim)", "((groups queries + groups k + groups v) head_dim)")
    packed = "\n".join(line for line in packed.split("\n") if "pieces:" not in line)
    assert packed.count("groups k + groups v") == 1
    (tmp_path / "m.yaml").write_text(text.replace(rule, packed), encoding="utf-8")
    source = FIXTURES / "v2_tp2_pp2"
    engine.convert(tmp_path / "m.yaml", source, tmp_path / "hf")
    engine.reverse(tmp_path / "m.yaml", tmp_path / "hf", tmp_path / "back", like=source)
    same_files(rank_files(tmp_path / "back"), rank_files(source))


def test_heads_that_do_not_divide_by_the_ranks_are_refused_with_the_numbers_that_work(tmp_path: Path) -> None:
    """Training cuts qkv by rows and then splits it per group, or per head: it could not load such files."""
    groups = Model("v2", hidden=24, heads=6, groups=3, ffn=32, bias=False)
    refuse("E214", "axis `groups` of 3", "--tp 1, 3\n", model=groups, tmp_path=tmp_path / "groups", tp=2)
    heads = Model("v1", hidden=24, heads=6, groups=6, ffn=32)
    refuse("E214", "axis `heads` of 6", "--tp 1, 2, 3, 6\n", model=heads, tmp_path=tmp_path / "heads", tp=4)


def test_weight_ranks_may_cut_inside_heads_but_tensor_ranks_deal_them_out(tmp_path: Path) -> None:
    model = Model("v2", hidden=24, heads=6, groups=3, ffn=32, bias=False)
    refuse("E214", "axis `groups`", "--tp 1, 3\n", model=model, tmp_path=tmp_path / "a", mode="isp", tp=2, wp=2)
    for number, asked in enumerate(({"mode": "isp", "tp": 1, "wp": 4}, {"mode": "isp_wp", "wp": 4})):
        made = engine.reverse(model.mapping, hf(model, tmp_path / str(number)), tmp_path / f"back{number}", **asked)
        assert made.tensors


@pytest.mark.parametrize("mode", [{"mode": "isp", "tp": 1}, {"mode": "isp_wp"}])
def test_weight_ranks_that_do_not_divide_rows_are_told_as_training_cannot_gather_them(
    mode: dict[str, Any], tmp_path: Path
) -> None:
    """It allocates ranks × its own rows, and NCCL gathers as many from each."""
    model = Model("v2", hidden=24, heads=6, groups=3, ffn=32, bias=False)
    source = hf(model, tmp_path)
    told = {
        wp: [one for one in engine.plan_reverse(model.mapping, source, **mode, wp=wp).notices if "rows" in one]
        for wp in (1, 2, 3)
    }
    assert not told[1] and not told[2]
    (notice,) = told[3]
    assert "rows of `layers.{layer}.feed_forward.w1.weight`" in notice and notice.endswith("--wp 1, 2, 4, 8")


def test_resharding_refuses_heads_that_do_not_divide_too_but_reads_them(tmp_path: Path) -> None:
    """Files that an earlier version wrote so can still be cut for other ranks."""
    model = Model("v2", hidden=24, heads=6, groups=3, ffn=32, bias=False)
    expected = save(model, tmp_path / "step", tp=2)
    letters = {"mlp_letters": model.letters}
    with pytest.raises(EngineError) as caught:
        engine.reshard(model.mapping, tmp_path / "step", tmp_path / "a", settings=letters)  # as it is
    assert caught.value.code == "E214" and "--tp 1, 3" in str(caught.value)
    engine.reshard(model.mapping, tmp_path / "step", tmp_path / "b", settings=letters, tp=3)
    same(dict(engine.iter_tensors(engine.plan(model.mapping, tmp_path / "b", settings=letters))), expected)


def test_widths_and_vocabularies_may_still_be_cut_unevenly(tmp_path: Path) -> None:
    model = Model("v2", heads=4, groups=2, ffn=25, vocab=31, bias=False)
    made = engine.reverse(model.mapping, hf(model, tmp_path), tmp_path / "back", tp=2)
    assert made.tensors


def test_layers_that_do_not_divide_into_chunks_are_refused_with_those_that_do(tmp_path: Path) -> None:
    refuse("E214", "1, 2", model=V2, tmp_path=tmp_path, pp=2, chunks=3)


def test_chunks_of_one_pipeline_rank_are_refused(tmp_path: Path) -> None:
    refuse("E214", "--chunks 1, or several ranks of pp", model=V2, tmp_path=tmp_path, chunks=2)


def test_no_chunk_is_refused(tmp_path: Path) -> None:
    refuse("E001", "at least one chunk", model=V2, tmp_path=tmp_path, chunks=0)


def test_more_pipeline_ranks_than_layers_are_refused(tmp_path: Path) -> None:
    refuse("E214", "at most 4", model=V2, tmp_path=tmp_path, pp=5)
    refuse("E214", "at most 4", model=V2, tmp_path=tmp_path / "many", pp=1 << 40)  # at once
    refuse("E214", "at most 4", model=V2, tmp_path=tmp_path / "chunks", pp=5, chunks=3)  # no number of chunks would do
    refuse("E214", "2 layers of a chunk are too few", model=V2, tmp_path=tmp_path / "one each", pp=4, chunks=2)


def test_a_mode_that_the_layout_lacks_is_refused_with_those_it_has(tmp_path: Path) -> None:
    refuse("E001", "mtp", "isp", model=V2, tmp_path=tmp_path, mode="zero")


def test_weight_ranks_in_a_mode_without_them_are_refused(tmp_path: Path) -> None:
    refuse("E001", "--mode", model=V2, tmp_path=tmp_path, wp=2)


def test_a_configuration_of_another_model_is_refused(tmp_path: Path) -> None:
    got = "layers counted\n    expected  5"
    refuse("E203", "layer", got, NO_RANKS, model=V2, tmp_path=tmp_path, config={"num_hidden_layers": 5})


def test_a_configuration_with_other_heads_is_refused(tmp_path: Path) -> None:
    heads = {"hidden_size": 32, "num_attention_heads": 8}
    refuse("E203", "hidden", NO_RANKS, model=V2, tmp_path=tmp_path, config=heads)


def test_a_tensor_that_no_rule_writes_is_refused(tmp_path: Path) -> None:
    folder = hf(V2, tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"model.adapter.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(EngineError) as caught:
        engine.reverse(V2.mapping, folder, tmp_path / "back")
    assert caught.value.code == "E205"


@pytest.mark.parametrize("lost", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_that_is_missing_is_named(lost: str, tmp_path: Path) -> None:
    folder = hf(V2, tmp_path)
    state = load_file(folder / "model.safetensors")
    del state[lost]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(EngineError) as caught:
        engine.reverse(V2.mapping, folder, tmp_path / "back")
    assert caught.value.code == "E207"
    assert lost in str(caught.value)


BARE: dict[str, Any] = {"model_config": {"hidden_size": 64, "no_bias": True}, "config_file": ""}
LIKE_FAULTS: dict[str, Callable[[Path], object]] = {
    "E304": lambda folder: (folder / "model_config.pt").unlink(),
    "E306": lambda folder: shutil.copy(folder / "model_tp1_pp0.pt", folder / "model_tp0_pp0.pt"),
    "E212": lambda folder: torch.save('model_type = "LLAMA2"', folder / "config_file.pt"),
    "E105": lambda folder: [torch.save(held, folder / f"{name}.pt") for name, held in BARE.items()],
}


@pytest.mark.parametrize("code", LIKE_FAULTS)
def test_what_is_wrong_with_like_is_not_blamed_on_the_source(code: str, tmp_path: Path) -> None:
    """Both have files of the same names."""
    source, like = FIXTURES / "v2_tp2_pp2", tmp_path / "like"
    shutil.copytree(source, like)
    LIKE_FAULTS[code](like)
    with pytest.raises(EngineError) as caught:
        engine.plan_reshard("families/internlm2.yaml", source, like=like)
    named = str(like) if code == "E304" else f"{code} --like {like}: "  # where a place names the folder, it is enough
    assert caught.value.code == code and named in str(caught.value)


def test_a_rule_that_does_not_invert_is_refused_unless_named(tmp_path: Path) -> None:
    source = FIXTURES / "v2_tp2_pp1_normhead"
    engine.convert("families/internlm2.yaml", source, tmp_path / "hf")
    with pytest.raises(EngineError) as caught:
        engine.reverse("families/internlm2.yaml", tmp_path / "hf", tmp_path / "back", like=source)
    assert caught.value.code == "E215"
    assert "--lossy head_normalised" in str(caught.value)
    engine.reverse(
        "families/internlm2.yaml", tmp_path / "hf", tmp_path / "back", like=source, lossy=["head_normalised"]
    )
    written = torch.load(tmp_path / "back" / "model_config.pt", weights_only=True)
    assert written["norm_head"] is True and "qk_interleaved" not in written
    plain = engine.reverse("families/internlm2.yaml", tmp_path / "hf", tmp_path / "plain", tp=2)
    assert plain.variants["head"] == "plain"


def test_a_model_without_its_configuration_is_refused_by_that(tmp_path: Path) -> None:
    source = hf(V1, tmp_path)
    (source / "config.json").unlink()
    with pytest.raises(EngineError, match=r"E304 `config.json` is missing"):
        engine.reverse(V1.mapping, source, tmp_path / "back")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ('{vocab_size: "{{ 3 if F32 else vocab_size }}"}', "E216 axis `vocab` would be read as 3"),
        ("{norm_type: \"{{ 'layernorm' if F32 else 'rmsnorm' }}\"}", "E216 what is written would be refused"),
    ],
    ids=["a size", "a key"],
)
def test_what_would_be_read_otherwise_than_it_was_meant_is_refused(more: str, told: str, tmp_path: Path) -> None:
    source, mine = hf(V1, tmp_path), tmp_path / "mine.yaml"
    text = f"mapping: 1\nname: mine\nversion: 1.0.0\nextends: {V1.mapping.removeprefix('families/')}\n"
    text += "training_config: " + more.replace("F32", "dtype == 'torch.float32'") + "\n"
    mine.write_text(text, encoding="utf-8")
    with pytest.raises(EngineError, match=told):
        engine.reverse(str(mine), source, tmp_path / "back", dtype="float32")
    engine.reverse(str(mine), source, tmp_path / "back")


def test_biases_of_row_parallel_linears_are_on_rank_0_only(tmp_path: Path) -> None:
    engine.reverse(V1.mapping, hf(V1, tmp_path), tmp_path / "back", tp=4)
    files = rank_files(tmp_path / "back")
    holding = [name for name, state in files.items() if "blocks.0.mixer.out_proj.bias" in state]
    assert holding == ["model_tp0_pp0.pt"]


def test_extra_layers_go_to_the_last_stages(tmp_path: Path) -> None:
    model = Model("v2", layers=5, groups=2, bias=False)
    engine.reverse(model.mapping, hf(model, tmp_path), tmp_path / "back", pp=3)
    files = rank_files(tmp_path / "back")
    held = [len({n.split(".")[1] for n in state if n.startswith("layers.")}) for state in files.values()]
    assert held == [1, 2, 2]


def test_an_older_config_without_rope_parameters_reverses_alike(tmp_path: Path) -> None:
    folder = hf(V2, tmp_path, rope_theta=1000000.0)
    import json

    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    engine.reverse(V2.mapping, folder, tmp_path / "back")
    assert torch.load(tmp_path / "back" / "model_config.pt", weights_only=True)["rope_base"] == 1000000.0


@pytest.mark.parametrize("settings", [{}, {"expert_weight": 1}])  # which says nothing of names
def test_what_reshard_is_not_told_stays_as_it_is(settings: dict[str, Any], tmp_path: Path) -> None:
    mode = "isp_wp" if settings else "tensor"
    save(V1, tmp_path / "a", tp=2, pp=2, wrapped=True)
    engine.reshard(V1.mapping, tmp_path / "a", tmp_path / "b", tp=1, mode=mode, settings=settings)
    files = rank_files(tmp_path / "b")
    dim = "wp" if settings else "tp"
    assert sorted(files) == [f"model_{dim}0_pp0.pt", f"model_{dim}0_pp1.pt"]
    assert all(name.startswith("model.") for state in files.values() for name in state)


def test_a_cast_spares_what_a_rule_keeps_and_reaches_the_configuration(tmp_path: Path) -> None:
    engine.reverse(V2.mapping, hf(V2, tmp_path), tmp_path / "back", tp=2, dtype="float32")
    assert all(t.dtype == torch.float32 for state in rank_files(tmp_path / "back").values() for t in state.values())
    assert torch.load(tmp_path / "back" / "model_config.pt", weights_only=True)["dtype"] == torch.float32
