"""Genuine InternEvo checkpoints: stock transformers must give InternEvo's own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import engine
from engine.errors import EngineError
from tests.support.depth import sampled
from tests.support.genuine import AMBIGUOUS, logits, settings_of

FOLDER = Path(__file__).parents[1] / "fixtures" / "internevo"
FAMILIES = {"v1": "internlm", "v2": "internlm2", "llama": "llama"}
NAMES = sorted(p.name for p in FOLDER.iterdir() if not p.name.startswith("moe"))  # no stock model has its experts
ONE_MODEL = [
    "v1_tp1_pp1",
    "v1_tp2_pp1_vocabsplit",
    "v1_tp2_pp2",
    "v1_tp2_pp2_wrapped",
    "v1_tp4_pp1",
    "v1_isp_tp1_wp2",
    "old_v1_tp2_pp2",
]


def mapping_of(name: str) -> str:
    return next(f"families/{family}.yaml" for key, family in FAMILIES.items() if key in name)


@sampled(3)
@pytest.mark.parametrize("name", NAMES)
def test_stock_transformers_gives_internevos_own_logits(name: str, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    engine.convert(mapping_of(name), FOLDER / name, out, dtype="float32", settings=settings_of(name))
    oracle = torch.load(FOLDER / name / "oracle.pt", weights_only=True)
    torch.testing.assert_close(logits(out, oracle["input_ids"]), oracle["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_where_both_letterings_fit_the_run_asks_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        engine.convert(mapping_of(name), FOLDER / name, tmp_path / "hf")
    assert caught.value.code == "E202"
    assert "--set mlp_letters=w2_is_down" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@sampled(2)
@pytest.mark.parametrize("name", AMBIGUOUS)
def test_the_wrong_lettering_gives_other_logits_so_asking_is_right(name: str, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    settings = {"mlp_letters": "w2_is_up"}
    engine.convert(mapping_of(name), FOLDER / name, out, dtype="float32", settings=settings)
    oracle = torch.load(FOLDER / name / "oracle.pt", weights_only=True)
    assert (logits(out, oracle["input_ids"]) - oracle["logits"]).abs().max() > 1


def test_all_layouts_of_one_model_give_byte_identical_weights(tmp_path: Path) -> None:
    written = set()
    for name in ONE_MODEL:
        for size in (5_000_000_000, 200_000):
            out = tmp_path / f"{name}-{size}"
            settings = settings_of(name)
            engine.convert(mapping_of(name), FOLDER / name, out, settings=settings, max_shard_size=size, workers=2)
            weights = sorted(p for p in out.iterdir() if p.name.startswith("model"))
            written.add((size, tuple((p.name, p.read_bytes()) for p in weights)))
    assert len(written) == 2


def test_shards_respect_their_size_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    import json

    from safetensors import safe_open

    out = tmp_path / "hf"
    engine.convert(mapping_of("v1_tp2_pp2"), FOLDER / "v1_tp2_pp2", out, max_shard_size=200_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) == 3
    total = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            size = sum(opened.get_tensor(n).nbytes for n in opened.keys())  # noqa: SIM118
            assert size <= 200_000
            total += size
            assert all(index["weight_map"][n] == file.name for n in opened.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == total


@sampled(2)
@pytest.mark.parametrize("name", [n for n in NAMES if "v2" in n])
def test_the_official_names_pack_the_same_weights(name: str, tmp_path: Path) -> None:
    """Unpacking wqkv by the official layout gives the Llama mapping's projections."""
    settings = settings_of(name)
    source = FOLDER / name
    llama = dict(engine.iter_tensors(engine.plan("families/internlm2.yaml", source, settings=settings)))
    official = dict(engine.iter_tensors(engine.plan("families/internlm2-official.yaml", source, settings=settings)))
    for layer in range(4):
        packed = official[f"model.layers.{layer}.attention.wqkv.weight"].view(
            4, 4, 8, 64
        )  # groups, q q k v, head, hidden
        parts = {"q_proj": packed[:, :2], "k_proj": packed[:, 2], "v_proj": packed[:, 3]}
        for proj, rows in parts.items():
            assert torch.equal(rows.reshape(-1, 64), llama[f"model.layers.{layer}.self_attn.{proj}.weight"])
        assert torch.equal(
            official[f"model.layers.{layer}.feed_forward.w3.weight"], llama[f"model.layers.{layer}.mlp.up_proj.weight"]
        )
    assert torch.equal(official["output.weight"], llama["lm_head.weight"])
