"""Mappings that users copied and edited: what would give a wrong model is refused by the run itself."""

from __future__ import annotations

from pathlib import Path

import pytest

import engine
from engine.errors import EngineError
from engine.language.search import bundled
from tests.support.depth import sampled
from tests.support.frameworks import FIXTURES, source_of

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "internevo" / "v2_tp2_pp2"
FAMILY = (bundled("mappings") / "families" / "internlm2.yaml").read_text("utf-8")


def edited(folder: Path, old: str = "", new: str = "") -> Path:
    assert not old or FAMILY.count(old) == 1, old
    path = folder / "internlm2.yaml"
    path.write_text(FAMILY.replace(old, new) if old else FAMILY, "utf-8")
    return path


@sampled(2)
@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("  rms_norm_eps: \"{{", "  rmsn_orm_eps: \"{{", "rms_norm_eps"),
        ("  tie_word_embeddings: false\n", "  tie_wrod_embeddings: false\n", "tie_word_embeddings"),
        ("  tie_word_embeddings: false\n", "  tie_word_embeddings: no\n", '`tie_word_embeddings: "no"`'),
        ("attention_biases == 'all' }}", "attention_biases == 'al' }}", "none of its choices"),
        ("target: model.norm.weight", "target: model.nrom.weight", "model.norm.weight"),
        ("input_layernorm.weight", "input_layer_norm.weight", "input_layer"),
        ("  tie_word_embeddings: false\n", "  tie_word_embeddings: \"{{ layer > 0 }}\"\n", "tie_word_embeddings"),
        ("  mlp_bias: \"{{ mlp", "  hidden_act: \"{{ 'gelu' }}\"\n  mlp_bias: \"{{ mlp", "hidden_act"),
        ("  pad_token_id: 2\n", "  quantization_config: {bits: 4, quant_method: gptq}\n", "quantization_config"),
    ],
)  # fmt: skip
def test_an_edited_copy_that_writes_another_model_is_refused(old: str, new: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=word) as caught:
        engine.convert(edited(tmp_path, old, new), CHECKPOINT, tmp_path / "out")
    assert caught.value.errors[0].code == "E109"
    assert not (tmp_path / "out").exists()


def test_a_copy_converts_as_the_bundled_one_and_tells_what_lint_warns_of(tmp_path: Path) -> None:
    engine.convert("internlm2", CHECKPOINT, tmp_path / "bundled")
    engine.convert(edited(tmp_path), CHECKPOINT, tmp_path / "copy")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "bundled" / name).read_bytes()
    mine = edited(tmp_path, "  pad_token_id: 2\n", "  pad_token_id: 2\n  of_my_own: 1\n")
    told = " ".join(engine.plan(mine, CHECKPOINT).notices)
    assert "of_my_own" in told and "name of the bundled internlm2" in told


def test_padding_of_which_nothing_tells_the_size_is_refused(tmp_path: Path) -> None:
    source = source_of(FIXTURES / "megatron" / "torch-tp1pp1-tied")
    engine.convert("megatron-llama", source, tmp_path / "hf", settings={"vocab_size": 259})
    text = (bundled("mappings") / "families" / "megatron-llama.yaml").read_text("utf-8")
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "\n".join(line for line in text.split("\n") if not line.startswith("  padded_vocab_size:")), "utf-8"
    )
    with pytest.raises(EngineError) as caught:
        engine.reverse(mine, tmp_path / "hf", tmp_path / "ranks")
    assert caught.value.code in ("E105", "E204")


@pytest.mark.parametrize("mapping", ["internlm", "own"])
def test_a_layout_that_skips_tensors_of_a_rule_is_refused(
    mapping: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = (bundled("mappings") / "layouts" / "internevo.yaml").read_text("utf-8")
    (tmp_path / "layouts").mkdir()
    (tmp_path / "layouts" / "internevo.yaml").write_text(f'{layout}\nskip_tensors: ["*.bias"]\n', "utf-8")
    (tmp_path / "own.yaml").write_text("mapping: 1\nname: own\nversion: 1.0.0\nextends: internlm.yaml\n", "utf-8")
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path))
    checkpoint = CHECKPOINT.parent / "v1_tp2_pp2"
    with pytest.raises(EngineError, match=r"`\*\.bias` in `skip_tensors`") as caught:
        engine.convert(mapping, checkpoint, tmp_path / "out")
    assert caught.value.errors[0].code == "E109" and not (tmp_path / "out").exists()


def test_a_copy_that_ignores_tensors_of_a_rule_is_refused(tmp_path: Path) -> None:
    family = (bundled("mappings") / "families" / "internlm.yaml").read_text("utf-8").replace(": internlm\n", ": own\n")
    entry = 'ignore:\n  - {source: "blocks.{layer}.mixer.Wqkv.bias", why: small}\n'
    assert "ignore:\n" in family
    (tmp_path / "own.yaml").write_text(family.replace("ignore:\n", entry, 1), "utf-8")
    with pytest.raises(EngineError, match="never sees") as caught:
        engine.convert(tmp_path / "own.yaml", CHECKPOINT.parent / "v1_tp2_pp2", tmp_path / "out")
    assert caught.value.errors[0].code == "E109"


def test_a_layout_in_place_of_the_bundled_one_of_its_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = (bundled("mappings") / "layouts" / "internevo.yaml").read_text("utf-8")
    (tmp_path / "layouts").mkdir()
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path))
    for old, new in (("", ""), ("zip_root: file_name", "")):
        (tmp_path / "layouts" / "internevo.yaml").write_text(layout.replace(old, new), "utf-8")
        told = [one for one in engine.plan("internlm2", CHECKPOINT).notices if "bundled internevo" in one]
        assert bool(told) == bool(old)
