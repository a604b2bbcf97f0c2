"""`engine verify --load` and `--logits`: an output run, beside a forward pass as training computes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import engine
from engine.commands.main import cli
from engine.errors import EngineError
from engine.formats.configs import read_pickled_mapping
from engine.oracle import internevo, logits
from engine.oracle.frameworks import forward_of
from engine.oracle.internevo import Forward
from engine.oracle.load_model import fixed_tokens
from engine.storage.local import local_file
from tests.support.depth import sampled
from tests.support.families import InternLM3, Llama, save_family
from tests.support.fsdp import save_fsdp
from tests.support.genuine import MODELS
from tests.support.shards import Model, save

FOLDER = Path(__file__).parents[1] / "fixtures" / "internevo"
FAMILIES = {"v1": "internlm", "v2": "internlm2", "llama": "llama"}
NAMES = sorted(p.name for p in FOLDER.iterdir() if not p.name.startswith("moe"))
AMBIGUOUS = ["v1_tp4_pp1", "v2_tp4_pp1_nohf"]
LETTERS = {"mlp_letters": "w2_is_down"}
V2 = "v2_tp2_pp2"


def mapping_of(name: str) -> str:
    return next(f"families/{family}.yaml" for key, family in FAMILIES.items() if key in name)


def settings_of(name: str) -> dict[str, str]:
    return LETTERS if name in AMBIGUOUS else {}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "hf"
    engine.convert(mapping_of(V2), FOLDER / V2, out)
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of an output, to be damaged; without its manifest, which would tell that it was."""
    shutil.copytree(made, tmp_path / "hf")
    (tmp_path / "hf" / "conversion.json").unlink()
    return tmp_path / "hf"


def swapped(tmp_path: Path, one: str, two: str) -> str:
    """A copy of a bundled mapping in which two targets are exchanged."""
    text = (Path(engine.__file__).parent.parent / "mappings" / "families" / "internlm2.yaml").read_text()
    assert one in text and two in text
    text = text.replace(one, "\0").replace(two, one).replace("\0", two)
    path = tmp_path / "swapped.yaml"
    path.write_text(text)
    return str(path)


def change(out: Path, how: Any) -> None:
    state = load_file(out / "model.safetensors")
    how(state)
    save_file(state, out / "model.safetensors", {"format": "pt"})


def configure(out: Path, **values: Any) -> None:
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits_of(out: Path, source: Path = FOLDER / V2, code: int = 1, **settings: str) -> dict[str, Any]:
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    result = CliRunner().invoke(cli, ["verify", str(out), "--src", str(source), "--logits", "--json", *sets])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.output)["logits"]
    return found


def run(training: Forward, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = training.embed(ids)
        for i in range(training.layers):
            x = training.layer(i, x)["out"]
        return training.head(x)[1]


@sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_training_s_own_forward_pass_gives_internevo_s_own_logits(name: str) -> None:
    oracle = torch.load(FOLDER / name / "oracle.pt", weights_only=True)
    with forward_of(FOLDER / name, settings_of(name)) as training:
        torch.testing.assert_close(run(training, oracle["input_ids"]), oracle["logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(("name", "dim"), [("v1_tp2_pp1_vocabsplit", 0), ("v1_tp2_pp2_chunks2", 1)])
def test_rows_of_the_embedding_and_the_head_are_read_some_at_a_time(
    name: str, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(internevo, "_ROWS", 7)
    oracle = torch.load(FOLDER / name / "oracle.pt", weights_only=True)
    states = [torch.load(FOLDER / name / f"model_tp{tp}_pp0.pt", weights_only=True) for tp in range(2)]
    embedding = torch.cat([one for state in states for key, one in state.items() if "embed" in key], dim).float()
    with forward_of(FOLDER / name, settings_of(name)) as training:
        torch.testing.assert_close(run(training, oracle["input_ids"]), oracle["logits"], atol=2e-5, rtol=0)
        for low in range(0, len(embedding), 7):
            assert torch.equal(training.embedding(low, min(low + 7, len(embedding))), embedding[low : low + 7])


@sampled(3)
@pytest.mark.parametrize("name", [name for name in MODELS if name in NAMES])
def test_every_genuine_dense_checkpoint_passes(name: str, tmp_path: Path) -> None:
    engine.convert(mapping_of(name), FOLDER / name, tmp_path / "hf", settings=settings_of(name))
    found = engine.api.verify(tmp_path / "hf", src=FOLDER / name, load=True, logits=True, settings=settings_of(name))
    assert found.problems == ()
    assert found.logits is not None and found.model is not None
    assert max(found.logits.states[:-1]) < 1e-5
    reward = name == "v1_tp2_pp1_reward"
    assert found.model.architecture == ("LlamaForSequenceClassification" if reward else "LlamaForCausalLM")


OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "zbv": (Model("v2", layers=6, groups=2, bias=False), {"tp": 2, "pp": 2, "chunks": 2, "zbv": True}),
    "uneven": (Model("v1", heads=4, ffn=26, letters="w2_is_up"), {"tp": 3, "pp": 3}),
    "isp": (Model("v2", groups=2, rotary="pairs"), {"mode": "isp", "tp": 2, "wp": 4}),
    "llama": (Llama(rotary="halves", key="adapt_hf", bias=True), {"tp": 2, "wrapped": True}),
    "internlm3": (InternLM3(embedding="by_vocab"), {"mode": "isp_wp", "wp": 3, "pp": 2}),
    "float32": (Model("v1", dtype=torch.float32), {"tp": 2}),
}


@sampled(2)
@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "auto") for kind in OTHERS), ("float32", "bfloat16")])
def test_other_ranks_and_families_pass_too(kind: str, dtype: str, tmp_path: Path) -> None:
    model, layout = OTHERS[kind]
    (save_family if isinstance(model, Llama) else save)(model, tmp_path / "step", **layout)
    told = {"mlp_letters": model.letters}
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf", settings=told, dtype=dtype)
    found = engine.api.verify(tmp_path / "hf", src=tmp_path / "step", logits=True, settings=told)
    assert found.problems == ()


def test_defaults_of_torch_in_the_callers_process_change_nothing(made: Path) -> None:
    with torch.device("meta"), torch.autocast("cpu"):
        found = engine.api.verify(made, src=FOLDER / V2, load=True, logits=True)
    assert found.problems == ()


def test_a_schedule_that_no_file_tells_is_seen_by_where_the_last_norm_is(tmp_path: Path) -> None:
    model, layout = OTHERS["zbv"]
    save(model, tmp_path / "step", **layout)
    (tmp_path / "step" / "config_file.pt").unlink()
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf")
    assert engine.api.verify(tmp_path / "hf", src=tmp_path / "step", logits=True).problems == ()


def test_gate_and_up_exchanged_in_a_mapping_are_caught_in_layer_0(tmp_path: Path) -> None:
    mapping = swapped(tmp_path, "mlp.gate_proj.{param}", "mlp.up_proj.{param}")
    engine.convert(mapping, FOLDER / V2, tmp_path / "hf")
    result = CliRunner().invoke(
        cli, ["verify", str(tmp_path / "hf"), "--src", str(FOLDER / V2), "--mapping", mapping, "--load", "--logits"]
    )
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("layer ")]
    assert line.startswith("layer 0: the MLP differs (max ")
    assert "gate_proj and up_proj are exchanged; first model.layers.0.mlp.gate_proj; so in 3 more layers" in line
    assert "as they were written" not in result.output
    assert "as the source gives them" in result.output  # the mapping agrees with itself: only this check can tell


def test_keys_and_values_exchanged_in_a_mapping_are_named(tmp_path: Path) -> None:
    mapping = swapped(tmp_path, "self_attn.k_proj.{param}", "self_attn.v_proj.{param}")
    engine.convert(mapping, FOLDER / V2, tmp_path / "hf")
    wrong = logits_of(tmp_path / "hf")["wrong"]
    assert [one["place"] for one in wrong] == [f"layer {i}" for i in range(4)]
    assert wrong[0]["part"] == "the attention differs"
    assert wrong[0]["why"] == "k_proj and v_proj are exchanged"


def test_norms_are_said_to_be_exchanged_only_if_they_are(out: Path) -> None:
    norms = [f"model.layers.1.{name}_layernorm.weight" for name in ("input", "post_attention")]

    def exchange(state: Any) -> None:
        state.update(zip(norms, [state[name] for name in reversed(norms)], strict=True))

    change(out, exchange)
    (wrong,) = logits_of(out)["wrong"]
    assert wrong["why"] == "input_layernorm and post_attention_layernorm are exchanged"
    change(out, lambda state: state.update({norms[0]: state[norms[0]] * 1.2}))
    (wrong,) = logits_of(out)["wrong"]
    assert wrong["why"] == "input_layernorm is wrong; post_attention_layernorm is wrong"


@sampled(2)
@pytest.mark.parametrize("name", ["v2_tp4_pp1_nohf", V2])
def test_rotary_pairs_in_the_wrong_order_are_named(name: str, tmp_path: Path) -> None:
    """The setting that made the output wrong is given again, and must not mislead training's own forward."""
    settings = settings_of(name) | {"rotary": "halves" if name in AMBIGUOUS else "pairs"}
    engine.convert(mapping_of(name), FOLDER / name, tmp_path / "hf", settings=settings)
    wrong = logits_of(tmp_path / "hf", FOLDER / name, **settings)["wrong"]
    why = "; ".join(f"{name} has its rotary pairs in another order than training" for name in ("q_proj", "k_proj"))
    assert {one["why"] for one in wrong} == {why}


DAMAGE = {
    "v_proj": ("model.layers.2.self_attn.v_proj", "layer 2", "v_proj is wrong"),
    "o_proj": ("model.layers.2.self_attn.o_proj", "layer 2", "o_proj is wrong"),
    "down_proj": ("model.layers.3.mlp.down_proj", "layer 3", "down_proj is wrong"),
    "norm": ("model.layers.1.post_attention_layernorm", "layer 1", "post_attention_layernorm is wrong"),
    "last norm": ("model.norm", "head", "model.norm is wrong"),
    "head": ("lm_head", "head", "lm_head or score is wrong"),
    "embedding": ("model.embed_tokens", "embedding", "model.embed_tokens is wrong"),
}


@sampled(2)
@pytest.mark.parametrize("kind", DAMAGE)
def test_one_wrong_tensor_is_named_alone_though_all_later_states_differ(kind: str, out: Path) -> None:
    module, place, why = DAMAGE[kind]
    change(out, lambda state: state[f"{module}.weight"].mul_(1.1))
    found = logits_of(out)
    (wrong,) = found["wrong"]
    assert (wrong["place"], wrong["why"]) == (place, why)
    if place.startswith("layer"):
        assert wrong["tensor"] == module
        after = [f"layer {i}" for i in range(int(place[-1]), 4)]
        differing = [name for name, off in found["deviations"].items() if off > found["tolerance"]]
        assert differing == [*after, "logits"]


def test_a_head_that_is_a_tenth_too_large_is_told_also_where_training_divides_its_rows(tmp_path: Path) -> None:
    """The output holds the divided rows, rounded: each is off by less than one unit in the last place."""
    engine.convert("internlm2", FOLDER / "v2_tp2_pp1_normhead", tmp_path / "hf")
    change(tmp_path / "hf", lambda state: state["lm_head.weight"].mul_(1.1))
    (wrong,) = logits_of(tmp_path / "hf", FOLDER / "v2_tp2_pp1_normhead")["wrong"]
    assert wrong["why"] == "lm_head or score is wrong"


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5000}}, "see rope_theta"),
        ({"hidden_act": "gelu"}, "see hidden_act"),
        ({"rms_norm_eps": 0.1}, "input_layernorm is wrong"),
    ],
)
def test_a_wrong_configuration_is_told_from_wrong_tensors(values: dict[str, Any], why: str, out: Path) -> None:
    configure(out, **values)
    found = logits_of(out)
    assert all(why in one["why"] for one in found["wrong"] if one["place"] != "head")
    assert found["problems"][0].startswith("layer 0: ")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10001.0}, "rope_theta": 10001.0},
         "rope_parameters.rope_theta is 10001, training has 10000"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, training has 1e-05"),
        ({"rms_norm_eps": 1.0000001e-5}, "rms_norm_eps is 1.0000001e-05, training has 1e-05"),
    ],
)  # fmt: skip
def test_a_number_that_shows_in_no_logits_is_compared_itself(values: dict[str, Any], told: str, out: Path) -> None:
    configure(out, **values)
    found = logits_of(out)
    assert found["problems"] == [f"config.json: {told}"]


def test_rows_of_the_embedding_that_no_token_reads_are_compared_too(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "_EMBEDDED", 3)
    read = set(fixed_tokens(256).flatten().tolist())
    row = next(i for i in reversed(range(256)) if i not in read)
    change(out, lambda state: state["model.embed_tokens.weight"][row].zero_())
    assert logits_of(out)["problems"] == [f"embedding: row {row} of 256 differs from training's"]


def test_a_model_that_holds_nan_is_told_and_no_tensor_is_blamed(made: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(FOLDER / V2, tmp_path / "step"))
    for path in source.glob("model_tp*_pp1.pt"):
        state = torch.load(path, weights_only=True)
        state["layers.1.ffn_norm.weight"][3] = float("nan")
        torch.save(state, path)
    engine.convert("internlm2", source, tmp_path / "out")
    found = logits_of(tmp_path / "out", source)
    assert found["wrong"] == [] and "after layer 3 holds NaN" in found["problems"][0]


@pytest.mark.parametrize("null", [True, False])
def test_null_is_false_for_adapt_hf_as_training_has_it(null: bool, made: Path, tmp_path: Path) -> None:
    """Training hands `adapt_hf` on as it is, so that null does not become the default."""
    shutil.copytree(FOLDER / V2, tmp_path / "step")
    config = read_pickled_mapping(local_file(tmp_path / "step" / "model_config.pt"))
    config = {key: value for key, value in config.items() if key not in ("qk_interleaved", "adapt_hf", "dtype")}
    torch.save({**config, **({"adapt_hf": None} if null else {})}, tmp_path / "step" / "model_config.pt")
    with forward_of(tmp_path / "step", {}) as training:
        assert training._pairs is null


@sampled(2)
@pytest.mark.parametrize(("dp", "tp", "zero"), [(3, 1, None), (4, 2, 2)])
def test_fsdp_shards_are_run_too(dp: int, tp: int, zero: int | None, tmp_path: Path) -> None:
    model = Model("v2", groups=2, bias=False, layers=2)
    save_fsdp(model, tmp_path / "step", dp=dp, tp=tp, zero=zero)
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf")
    found = engine.api.verify(tmp_path / "hf", src=tmp_path / "step", logits=True)
    assert found.problems == ()
    change(tmp_path / "hf", lambda state: state["model.layers.1.mlp.up_proj.weight"].mul_(1.1))
    (tmp_path / "hf" / "conversion.json").unlink()
    (wrong,) = logits_of(tmp_path / "hf", tmp_path / "step")["wrong"]
    assert wrong["why"] == "up_proj is wrong"


def test_a_data_parallel_rank_that_is_missing_is_told(tmp_path: Path) -> None:
    model = Model("v2", groups=2, bias=False, layers=1)
    save_fsdp(model, tmp_path / "step", dp=3)
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf")
    for rank, code in ((2, "E207"), (1, "E201")):  # of the last, only the tensors tell that it is missing
        (tmp_path / "step" / f"model_tp0_pp0_dp{rank}.pt").rename(tmp_path / "gone.pt")
        with pytest.raises(EngineError) as caught:
            engine.api.verify(tmp_path / "hf", src=tmp_path / "step", logits=True)
        assert caught.value.code == code
        (tmp_path / "gone.pt").rename(tmp_path / "step" / f"model_tp0_pp0_dp{rank}.pt")


def test_layers_in_another_order_are_found(out: Path) -> None:
    def exchange(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if ".layers.1." in name]:
            other = name.replace(".layers.1.", ".layers.2.")
            state[name], state[other] = state[other], state[name]

    change(out, exchange)
    found = logits_of(out)
    assert [one["place"] for one in found["wrong"]] == ["layer 1", "layer 2"]


def test_a_model_of_other_sizes_than_its_files_or_without_a_tensor_is_told(out: Path) -> None:
    configure(out, intermediate_size=96)
    change(out, lambda state: state.pop("model.layers.3.mlp.up_proj.weight"))
    problems = logits_of(out)["problems"]
    assert "config makes it [96, 64]" in problems[0]
    assert "model.layers.3.mlp.up_proj.weight is missing" in problems
    assert engine.api.verify(out, load=True).problems


@pytest.mark.parametrize(
    "values", [{"hidden_size": "wide"}, {"num_attention_heads": 7}, {"model_type": None}, {"num_hidden_layers": 10**9}]
)
def test_a_configuration_that_transformers_refuses_is_a_problem_not_a_crash(values: dict[str, Any], out: Path) -> None:
    configure(out, **values)
    found = engine.api.verify(out, src=FOLDER / V2, load=True, logits=True)
    assert found.model is not None and found.model.problems
    assert found.logits is not None and found.logits.problems


def test_a_gate_and_up_exchange_shows_through_rounding_too(tmp_path: Path) -> None:
    mapping = swapped(tmp_path, "mlp.gate_proj.{param}", "mlp.up_proj.{param}")
    save(Model("v2", groups=2, bias=False, dtype=torch.float32), tmp_path / "step", tp=2)
    engine.convert(mapping, tmp_path / "step", tmp_path / "hf", dtype="bfloat16")
    wrong = logits_of(tmp_path / "hf", tmp_path / "step")["wrong"]
    assert [one["place"] for one in wrong] == [f"layer {i}" for i in range(4)]
    assert {one["why"] for one in wrong} == {"gate_proj and up_proj are exchanged"}


@pytest.mark.parametrize("damage", ["missing", "extra", "infinite"])
def test_what_transformers_would_pass_over_is_a_problem_when_loading(damage: str, out: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def how(state: dict[str, torch.Tensor]) -> None:
        if damage == "missing":
            del state[name]
        elif damage == "extra":
            state["more.weight"] = torch.zeros(2)
        else:
            state[name][0, 0] = float("inf")

    change(out, how)
    result = CliRunner().invoke(cli, ["verify", str(out), "--load"])
    assert result.exit_code == 1
    told = {"missing": f"{name} is missing", "extra": "more.weight is not part", "infinite": "not finite"}
    assert told[damage] in result.output


def test_a_model_that_only_remote_code_runs_is_said_to_be_one(tmp_path: Path) -> None:
    engine.convert("families/internlm2-official.yaml", FOLDER / V2, tmp_path / "hf")
    result = CliRunner().invoke(
        cli, ["verify", str(tmp_path / "hf"), "--src", str(FOLDER / V2), "--load", "--logits", "--json"]
    )
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert "no model of type `internlm2` built in" in found["model"]["problems"][0]
    assert "no model of type `internlm2` built in" in found["logits"]["problems"][0]


def test_an_output_that_holds_in_every_way_says_so(made: Path) -> None:
    source = ["--src", str(FOLDER / V2), "--mapping", mapping_of(V2)]
    result = CliRunner().invoke(cli, ["verify", str(made), *source, "--load", "--logits"])
    assert result.exit_code == 0, result.output
    assert "as they were written" in result.output
    assert "as the source gives them" in result.output
    assert "transformers loads LlamaForCausalLM" in result.output
    assert "the forward pass of 4 layers is training's own" in result.output


def test_where_shapes_do_not_tell_the_letters_they_must_be_set(tmp_path: Path) -> None:
    name = AMBIGUOUS[0]
    engine.convert(mapping_of(name), FOLDER / name, tmp_path / "hf", settings=LETTERS)
    with pytest.raises(EngineError) as caught:
        engine.api.verify(tmp_path / "hf", src=FOLDER / name, logits=True)
    assert caught.value.code == "E202"
    assert "--set mlp_letters=w2_is_down" in str(caught.value)
    letters = {"mlp_letters": "w2_is_up"}
    assert engine.api.verify(tmp_path / "hf", src=FOLDER / name, logits=True, settings=letters).problems


def test_settings_that_only_a_mapping_knows_need_one(made: Path) -> None:
    with pytest.raises(EngineError) as caught:
        engine.api.verify(made, src=FOLDER / V2, logits=True, settings={"rope_factor": 2})
    assert caught.value.code == "E001"
    with pytest.raises(EngineError) as caught:
        engine.api.verify(made, src=FOLDER / V2, logits=True, settings={"mlp_letters": "w1"})
    assert caught.value.code == "E001"


def test_a_setting_of_the_mapping_that_training_does_not_leave_open_is_taken(tmp_path: Path) -> None:
    engine.convert("internlm", FOLDER / "v1_tp1_pp1", tmp_path / "hf")
    told: dict[str, Any] = {"mapping": "internlm", "settings": {"head": "lm"}}
    assert not engine.api.verify(tmp_path / "hf", src=FOLDER / "v1_tp1_pp1", logits=True, **told).problems


def test_folders_whose_forward_pass_is_not_known_are_refused_before_anything_is_compared(made: Path) -> None:
    distributed = FOLDER.parent / "dcp" / "fsdp2tp2-f32-model" / "step-10"
    for source, code in ((FOLDER / "moe_tp2_pp2_dp1", "E303"), (made, "E304"), (distributed, "E304")):
        seen: list[Any] = []
        with pytest.raises(EngineError, match="forward pass is") as caught:
            engine.api.verify(made, src=source, logits=True, progress=seen.append)
        assert caught.value.code == code and not seen


def test_a_missing_rank_file_is_found_before_anything_is_computed(made: Path, tmp_path: Path) -> None:
    for gone in ("model_tp0_pp0.pt", "model_tp1_pp1.pt", "model_tp1_pp0.pt"):
        shutil.copytree(FOLDER / V2, tmp_path / gone)
        (tmp_path / gone / gone).unlink()
        with pytest.raises(EngineError) as caught:
            engine.api.verify(made, src=tmp_path / gone, logits=True)
        assert caught.value.code == "E201"


def test_only_one_layer_s_weights_are_in_memory_at_a_time(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.oracle.streamed_model import StreamedModel

    with StreamedModel(made) as streamed, torch.no_grad():
        most = 0

        def count(*_: Any) -> None:
            nonlocal most
            most = max(most, sum(not one.is_meta for one in streamed.model.parameters()))

        for module in streamed.model.modules():
            module.register_forward_pre_hook(count)
        streamed.model(torch.zeros(1, 3, dtype=torch.long))
        assert most == 1
        assert all(one.is_meta for one in streamed.model.parameters())
