"""An independent sharder for the other families: Llama, InternLM3, the mixture of experts, Meta's files.

As in `shards`: written from the facts about the files, in plain torch, sharing nothing with the
engine or its mappings. Meta's tensors have InternEvo's Llama names, only their files differ.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.support.shards import (
    Model,
    State,
    Whole,
    build,
    flattened,
    once,
    stages,
    to_halves,
    tp_slice,
    wp_slice,
    write,
)

Parts = tuple[list[list[Whole]], list[Whole], list[Whole], State]
WRAPPED = "mlp.moe_layer.experts.wrapped_experts"
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
LETTERS = {"w2_is_down": {"w1": GATE, "w2": DOWN, "w3": UP}, "w2_is_up": {"w1": GATE, "w2": UP, "w3": DOWN}}


@dataclass(frozen=True)
class Llama(Model):
    """A tiny Llama as InternEvo trains it; Hugging Face's names for it are `LlamaForCausalLM`'s.

    `key` is the configuration's word on rotary pairs: `qk_interleaved` (later code), `adapt_hf` (its
    opposite, earlier) or none, which means pairs.
    """

    family: str = "llama"
    groups: int = 2
    bias: bool = False
    mlp_bias: bool = False
    rotary: str = "pairs"
    key: str = "qk_interleaved"
    rope_base: float = 10000.0

    @property
    def mapping(self) -> str:
        return "families/llama.yaml"

    @property
    def model_type(self) -> str:
        return "LLAMA2"

    def config(self, chunks: int) -> dict[str, Any]:
        config = replace(self, family="v2").base_config(chunks)
        if self.key == "qk_interleaved":
            config["qk_interleaved"] = self.rotary == "pairs"
        elif self.key == "adapt_hf":
            config["adapt_hf"] = self.rotary == "halves"
        else:
            assert self.rotary == self.unsaid
        if self.rope_base != 10000.0:
            config["rope_base"] = self.rope_base
        return config

    @property
    def unsaid(self) -> str:
        """How rotary pairs are stored where the configuration has neither key."""
        return "pairs"

    def base_config(self, chunks: int) -> dict[str, Any]:
        config = Model.config(self, chunks)
        del config["adapt_hf"]
        return config


@dataclass(frozen=True)
class InternLM3(Llama):
    """Llama's names, later code only, a large rope base."""

    rotary: str = "halves"
    rope_base: float = 5e7

    @property
    def mapping(self) -> str:
        return "families/internlm3.yaml"

    @property
    def model_type(self) -> str:
        return "INTERNLM3"

    @property
    def unsaid(self) -> str:
        return "halves"


@dataclass(frozen=True)
class Experts(Model):
    """InternLM with a mixture of experts: v1 names, each expert in files of its own."""

    family: str = "v1"
    experts: int = 3

    @property
    def mapping(self) -> str:
        return "families/internlm-moe.yaml"

    @property
    def model_type(self) -> str:
        return "INTERNLM_MoE"

    def config(self, chunks: int) -> dict[str, Any]:
        return super().config(chunks) | {"num_experts": self.experts, "moe_type": "GShard", "moe_use_residual": False}


@dataclass(frozen=True)
class Meta(Llama):
    """Meta's Llama: ffn follows from dim; Llama 3 cuts the embedding on its rows and names its vocabulary."""

    multiple_of: int = 8
    ffn_dim_multiplier: float | None = None

    @property
    def mapping(self) -> str:
        return "families/meta-llama.yaml"

    def sized(self) -> Meta:
        """The same with the ffn that Meta's code computes."""
        ffn = int(2 * (4 * self.hidden) / 3)
        if self.ffn_dim_multiplier is not None:
            ffn = int(self.ffn_dim_multiplier * ffn)
        return replace(self, ffn=-(-ffn // self.multiple_of) * self.multiple_of)

    def params(self) -> dict[str, Any]:
        third = self.embedding == "by_vocab"
        params: dict[str, Any] = {"dim": self.hidden, "n_layers": self.layers, "n_heads": self.heads}
        params |= {"norm_eps": 1e-5, "multiple_of": self.multiple_of, "vocab_size": self.vocab if third else -1}
        if self.groups != self.heads:
            params["n_kv_heads"] = self.groups
        if self.ffn_dim_multiplier is not None:
            params["ffn_dim_multiplier"] = self.ffn_dim_multiplier
        if third:
            params["rope_theta"] = self.rope_base
        return params


KINDS: dict[str, type[Model]] = {"llama": Llama, "internlm3": InternLM3, "moe": Experts, "meta": Meta}


def model_of(kind: str, **facts: Any) -> Any:
    model = KINDS[kind](**facts)
    return model.sized() if isinstance(model, Meta) else model


@once
def save_family(model: Model, folder: Path, **layout: Any) -> State:
    """Write a checkpoint folder of any family; returns the expected Hugging Face state dict."""
    if isinstance(model, Experts):
        return save_experts(model, folder, **layout)
    layers, first, last, expected = build_llama(model)
    if isinstance(model, Meta):
        save_meta(model, folder, layers, first, last, **layout)
    else:
        write(model, folder, layers, first, last, **layout)
    return expected


def build_llama(m: Any) -> Parts:
    """(per layer, first stage, last stage, expected Hugging Face tensors)."""
    g = torch.Generator().manual_seed(m.seed)

    def rand(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) / 4).to(m.dtype)

    per = m.heads // m.groups * m.head_dim  # query rows per key/value head
    down, up = ("w2", "w3") if m.letters == "w2_is_down" else ("w3", "w2")
    # ours, theirs, rows, columns, how it is cut, rows (or columns) that stay together, has a bias
    linears = [
        ("attention.wq", "self_attn.q_proj", m.heads * m.head_dim, m.hidden, "column", per, m.bias),
        ("attention.wk", "self_attn.k_proj", m.groups * m.head_dim, m.hidden, "column", m.head_dim, m.bias),
        ("attention.wv", "self_attn.v_proj", m.groups * m.head_dim, m.hidden, "column", m.head_dim, m.bias),
        ("attention.wo", "self_attn.o_proj", m.hidden, m.heads * m.head_dim, "row", per, m.bias),
        ("feed_forward.w1", "mlp.gate_proj", m.ffn, m.hidden, "column", 1, m.mlp_bias),
        (f"feed_forward.{up}", "mlp.up_proj", m.ffn, m.hidden, "column", 1, m.mlp_bias),
        (f"feed_forward.{down}", "mlp.down_proj", m.hidden, m.ffn, "row", 1, m.mlp_bias),
    ]
    turning = {"attention.wq": m.heads, "attention.wk": m.groups} if m.rotary == "pairs" else {}
    layers: list[list[Whole]] = []
    expected: State = {}
    for i in range(m.layers):
        listed = []
        for ours, theirs, rows, columns, kind, unit, biased in linears:
            tensors = [("weight", rand(rows, columns), kind, unit)]
            if biased:
                tensors.append(("bias", rand(rows), "lone" if kind == "row" else kind, unit))
            for param, data, cut, together in tensors:
                listed.append(Whole(f"{ours}.{param}", data, cut, together))
                whole = to_halves(data, turning[ours]) if ours in turning else data
                expected[f"model.layers.{i}.{theirs}.{param}"] = whole
        for ours, theirs in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            listed.append(Whole(f"{ours}.weight", rand(m.hidden), "replicated"))
            expected[f"model.layers.{i}.{theirs}.weight"] = listed[-1].data
        layers.append(listed)
    stem, cut = ("tok_embeddings", "hidden")
    if m.embedding == "by_vocab":
        stem, cut = ("tok_embeddings" if isinstance(m, Meta) else "tok_embeddings.word_embeddings"), "vocab"
    embed, norm = rand(m.vocab, m.hidden), rand(m.hidden)
    reward = m.head == "reward"
    head = rand(1 if reward else m.vocab, m.hidden)
    first = [Whole(f"{stem}.weight", embed, cut)]
    last = [Whole("norm.weight", norm, "replicated"), Whole("output.weight", head, "replicated" if reward else "vocab")]
    expected |= {"model.embed_tokens.weight": embed, "model.norm.weight": norm}
    if m.head == "normalised":
        head = torch.nn.functional.normalize(head.float(), dim=1).to(m.dtype)
    expected["score.weight" if reward else "lm_head.weight"] = head
    return layers, first, last, expected


def angles(base: float, head_dim: int) -> torch.Tensor:
    """How far each rotary pair turns from one position to the next, as models computed it when they kept it."""
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def save_meta(
    m: Meta, folder: Path, layers: list[list[Whole]], first: list[Whole], last: list[Whole], *, tp: int = 1
) -> None:
    """consolidated.{tp:02}.pth with global layer numbers, params.json, and a buffer that Llama 3 left out."""
    folder.mkdir(parents=True)
    named = {f"layers.{i}.{whole.name}": whole for i, listed in enumerate(layers) for whole in listed}
    named |= {whole.name: whole for whole in [*first, *last]}
    for t in range(tp):
        state = OrderedDict((name, tp_slice(whole, t, tp).clone()) for name, whole in named.items())
        if m.embedding == "by_hidden":
            state["rope.freqs"] = angles(10000.0, m.head_dim).to(torch.bfloat16)
        torch.save(state, folder / f"consolidated.{t:02}.pth")
    (folder / "params.json").write_text(json.dumps(m.params()))


def build_experts(m: Experts) -> tuple[list[list[Whole]], list[Whole], list[Whole], list[list[list[Whole]]], State]:
    """As `build`, without the dense MLP; the experts, per layer and expert, before the expected tensors."""
    layers, first, last, expected = build(m)
    layers = [[whole for whole in listed if not whole.name.startswith("mlp.")] for listed in layers]
    expected = {name: tensor for name, tensor in expected.items() if ".mlp." not in name}
    g = torch.Generator().manual_seed(m.seed + 1)
    experts: list[list[list[Whole]]] = []
    for i, listed in enumerate(layers):
        gate = torch.randn(m.experts, m.hidden, generator=g)
        listed.append(Whole("mlp.moe_layer.gate.wg.weight", gate, "replicated"))
        expected[f"model.layers.{i}.mlp.gate.weight"] = gate
        experts.append([])
        for e in range(m.experts):
            experts[-1].append([])
            for w, called in LETTERS[m.letters].items():
                shape, cut = ((m.hidden, m.ffn), "row") if called == DOWN else ((m.ffn, m.hidden), "column")
                data = (torch.randn(shape, generator=g) / 4).to(m.dtype)
                experts[-1][-1].append(Whole(f"{WRAPPED}.{e}.{w}.weight", data, cut))
                expected[f"model.layers.{i}.mlp.experts.{e}.{called}.weight"] = data
    return layers, first, last, experts, expected


def save_experts(
    m: Experts,
    folder: Path,
    *,
    survivor: str = "later",
    own: int | None = None,
    said: str = "",
    by_rows: bool = False,
    **layout: Any,
) -> State:
    """The dense tensors in rank files, a float32 gate with them, and every expert in files of its own.

    Experts are `FeedForward` at first, under isp too, whose w2 has cut columns; from 0.3.10 to 0.4.9 `ISPFeedForward`,
    whose linears are all cut `by_rows`, over the tensor parallel ranks (`get_mlp_cls` of `modules/mlp.py`).

    Since there is `expert_weight`, or `no_tp`, experts have ranks of their `own`; `said` is what `parallel` says of it.

    A file's number counts the expert layers a pipeline rank writes, over its chunks, from
    rank · (layers // ranks) on. Where stages are uneven two ranks may write the same number: only
    one's file is left, the `earlier` or the `later` rank's.
    """
    layers, first, last, experts, expected = build_experts(m)
    write(m, folder, layers, first, last, **layout)
    text = torch.load(folder / "config_file.pt")
    text = text.replace("weight=", f"{said}weight=", 1)
    text += f"moe = dict(top_k={min(2, m.experts)}, use_fused_gating=True)\n"
    torch.save(text, folder / "config_file.pt")
    listed = expert_files(m, survivor=survivor, by_rows=by_rows, **layout)
    for path, (layer, prefix, ranks, rows) in listed.items():
        cut, ranks = wp_slice if rows else tp_slice, own or ranks
        for e, wholes in enumerate(experts[layer]):
            for r in range(ranks):
                state = OrderedDict((prefix + whole.name, cut(whole, r, ranks)) for whole in wholes)
                torch.save(flattened(state, m.seed), folder / path.format(expert=e, rank=r))
    return expected


def expert_files(
    m: Experts,
    *,
    survivor: str = "later",
    mode: str = "tensor",
    tp: int = 1,
    pp: int = 1,
    wp: int = 1,
    chunks: int = 1,
    zbv: bool = False,
    wrapped: bool = False,
    legacy: bool = False,
    by_rows: bool = False,
) -> dict[str, tuple[int, str, int, bool]]:
    """File name pattern → (global layer, prefix of its names, ranks, whether rows are cut), as left on disk."""
    places = stages(m.layers, pp, chunks, zbv)
    word, ranks = ("wp", wp) if mode == "isp_wp" else ("tp", tp)
    files: dict[str, tuple[int, str, int, bool]] = {}
    for p in range(pp) if survivor == "later" else reversed(range(pp)):
        number = p * (m.layers // pp)
        for chunk in range(chunks):
            prefix = f"{chunk}.model." if chunks > 1 else "model." if wrapped else ""
            for local, layer in enumerate(places[chunk, p]):
                path = f"model_moe_layer{number}_expert{{expert}}_{word}{{rank}}.pt"
                files[path] = (layer, f"{prefix}{m.block}.{local}.", ranks, mode == "isp_wp" or by_rows)
                number += 1
    return files
