"""An independent sharder: whole random weights → genuine-looking rank files, and the expected result.

Written from the facts about InternEvo's files, with plain torch indexing; it shares no code and no
rule with the engine or its mappings, so that agreement means something.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Model:
    """A tiny InternLM (`v1`) or InternLM2 (`v2`) as training would have it."""

    family: str = "v1"
    layers: int = 4
    hidden: int = 16
    heads: int = 4
    groups: int = 4  # key/value heads; v1 has as many as heads
    ffn: int = 24
    vocab: int = 32
    bias: bool = True
    dtype: torch.dtype = torch.bfloat16
    rotary: str = "halves"
    letters: str = "w2_is_down"
    embedding: str = "by_hidden"
    head: str = "lm"  # lm | reward | normalised (rows scaled to length 1 at run time)
    seed: int = 0
    fused: bool = True  # queries, keys and values in one linear, as `enable_qkv_fusion` has them

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def mapping(self) -> str:
        return {"v1": "families/internlm.yaml", "v2": "families/internlm2.yaml"}[self.family]

    @property
    def model_type(self) -> str:
        return {"v1": "INTERNLM", "v2": "INTERNLM2_PUBLIC"}[self.family]

    @property
    def block(self) -> str:
        return "blocks" if self.family == "v1" else "layers"

    def config(self, chunks: int) -> dict[str, Any]:
        multiple = next(m for m in (256, 64, 16, 8, 4, 2, 1) if self.ffn % m == 0)
        config: dict[str, Any] = {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "vocab_size": self.vocab,
            "num_attention_heads": self.heads,
            "mlp_ratio": self.ffn / self.hidden,
            "multiple_of": multiple,
            "layer_norm_epsilon": 1e-5,
            "norm_type": "rmsnorm",
            "dtype": self.dtype,
            "num_chunks": chunks,
        }
        if self.family == "v2":
            config |= {"num_kv_attention_heads": self.groups, "no_bias": not self.bias}
            config["adapt_hf"] = self.rotary == "halves"
        else:
            config |= {} if self.bias else {"no_bias": True}
            config |= {"qk_interleaved": True} if self.rotary == "pairs" else {}
        if not self.fused:
            config["enable_qkv_fusion"] = False
        if self.head == "normalised":
            config["norm_head"] = True
        if self.head == "reward":
            config["is_reward"] = True
        return config


@dataclass(frozen=True)
class Whole:
    """One unsharded training tensor and how training cuts it.

    `kind` is `column` (rows cut), `row` (columns cut), `lone` (bias of a row-parallel linear),
    `replicated`, `vocab` or `hidden`; `unit` is the number of rows that stay together, and `blocks`
    the number of equal blocks (q, k, v) that are cut alike.
    """

    name: str
    data: torch.Tensor
    kind: str
    unit: int = 1
    blocks: int = 1
    where: str = "layers"


def build(m: Model) -> tuple[list[list[Whole]], list[Whole], list[Whole], State]:
    """(per layer, first stage, last stage, expected Hugging Face tensors)."""
    g = torch.Generator().manual_seed(m.seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(m.dtype)

    per, group_rows = m.heads // m.groups, (m.heads // m.groups + 2) * m.head_dim
    expected: State = {}
    layers: list[list[Whole]] = []
    for i in range(m.layers):
        out = f"model.layers.{i}."
        q, k, v = (rand(n * m.head_dim, m.hidden) for n in (m.heads, m.groups, m.groups))
        biases = [rand(t.shape[0]) for t in (q, k, v)] if m.bias else []
        gate, up, down = rand(m.ffn, m.hidden), rand(m.ffn, m.hidden), rand(m.hidden, m.ffn)
        o, o_bias = rand(m.hidden, m.hidden), rand(m.hidden)
        norms = rand(m.hidden), rand(m.hidden)
        for name, weight, heads in (("q_proj", q, m.heads), ("k_proj", k, m.groups), ("v_proj", v, m.groups)):
            turn = name != "v_proj" and m.rotary == "pairs"
            expected[out + f"self_attn.{name}.weight"] = to_halves(weight, heads) if turn else weight
        for name, one, heads in zip(
            ("q_proj", "k_proj", "v_proj"), biases, (m.heads, m.groups, m.groups), strict=False
        ):
            turn = name != "v_proj" and m.rotary == "pairs"
            expected[out + f"self_attn.{name}.bias"] = to_halves(one, heads) if turn else one
        expected[out + "self_attn.o_proj.weight"] = o
        expected |= {
            out + "mlp.gate_proj.weight": gate,
            out + "mlp.up_proj.weight": up,
            out + "mlp.down_proj.weight": down,
        }
        expected |= {out + "input_layernorm.weight": norms[0], out + "post_attention_layernorm.weight": norms[1]}
        if m.bias:
            expected[out + "self_attn.o_proj.bias"] = o_bias
        v1 = m.family == "v1"
        qkv, wo = ("mixer.Wqkv", "mixer.out_proj") if v1 else ("attention.wqkv", "attention.wo")
        mlp, n1, n2 = ("mlp", "norm1", "norm2") if v1 else ("feed_forward", "attention_norm", "ffn_norm")

        def pack(parts: list[torch.Tensor], v1: bool = v1) -> torch.Tensor:
            if v1:
                return torch.cat(parts)
            split = [t.view(m.groups, -1, *t.shape[1:]) for t in parts]
            return torch.cat(split, dim=1).reshape(-1, *parts[0].shape[1:])

        unit, blocks = (m.head_dim, 3) if v1 else (group_rows, 1)
        assert v1 or per * m.groups == m.heads
        w2, w3 = ((down, "row"), (up, "column")) if m.letters == "w2_is_down" else ((up, "column"), (down, "row"))
        listed = [Whole(f"{qkv}.weight", pack([q, k, v]), "column", unit, blocks)]
        if m.bias:
            listed.append(Whole(f"{qkv}.bias", pack(biases), "column", unit, blocks))
        if not m.fused:
            units = [m.head_dim * rows for rows in (1 if v1 else per, 1, 1)]
            names = [f"{qkv.partition('.')[0]}.{name}" for name in ("wq", "wk", "wv")]
            linears = list(zip(names, (q, k, v), units, strict=True))
            listed = [Whole(f"{name}.weight", one, "column", rows) for name, one, rows in linears]
            offsets = zip(names, biases, units, strict=False)
            listed += [Whole(f"{name}.bias", one, "column", rows) for name, one, rows in offsets]
        listed.append(Whole(f"{wo}.weight", o, "row", m.head_dim * (1 if v1 else per)))
        if m.bias:
            listed.append(Whole(f"{wo}.bias", o_bias, "lone"))
        listed += [
            Whole(f"{mlp}.w1.weight", gate, "column"),
            Whole(f"{mlp}.w2.weight", *w2),
            Whole(f"{mlp}.w3.weight", *w3),
        ]
        listed += [Whole(f"{n1}.weight", norms[0], "replicated"), Whole(f"{n2}.weight", norms[1], "replicated")]
        layers.append(listed)
    embed, norm = rand(m.vocab, m.hidden), rand(m.hidden)
    head = rand(1, m.hidden) if m.head == "reward" else rand(m.vocab, m.hidden)
    stem = "embedding" if m.family == "v1" else "tok_embeddings"
    kind = {"by_hidden": "hidden", "by_vocab": "vocab", "whole": "replicated"}[m.embedding]
    first = [Whole(f"{stem}.word_embeddings.weight" if kind == "vocab" else f"{stem}.weight", embed, kind)]
    out_name = "head.weight" if m.family == "v1" else "output.weight"
    last = [
        Whole("norm.weight", norm, "replicated"),
        Whole(out_name, head, "replicated" if m.head == "reward" else "vocab"),
    ]
    expected |= {"model.embed_tokens.weight": embed, "model.norm.weight": norm}
    if m.head == "normalised":
        expected["lm_head.weight"] = torch.nn.functional.normalize(head.float(), dim=1).to(m.dtype)
    else:
        expected["score.weight" if m.head == "reward" else "lm_head.weight"] = head
    return layers, first, last, expected


def to_halves(t: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleaved pairs (0,1),(2,3),… of each head to [0,2,4…, 1,3,5…]."""
    each = t.view(heads, -1, *t.shape[1:])
    return torch.cat([each[:, 0::2], each[:, 1::2]], dim=1).reshape(t.shape)


def shares(n: int, ranks: int) -> list[tuple[int, int]]:
    """Intervals of n units over ranks, the first ranks one more."""
    sizes = [n // ranks + (r < n % ranks) for r in range(ranks)]
    return [(sum(sizes[:r]), sum(sizes[: r + 1])) for r in range(ranks)]


def tp_slice(w: Whole, rank: int, tp: int) -> torch.Tensor | None:
    if w.kind == "replicated":
        return w.data
    if w.kind == "lone":
        return w.data if rank == 0 else None
    if w.kind in ("row", "hidden"):
        low, high = shares(w.data.shape[1] // w.unit, tp)[rank]
        return w.data[:, low * w.unit : high * w.unit]
    blocks = w.data.view(w.blocks, -1, *w.data.shape[1:])
    low, high = shares(blocks.shape[1] // w.unit, tp)[rank]
    return blocks[:, low * w.unit : high * w.unit].reshape(-1, *w.data.shape[1:])


def wp_slice(w: Whole, rank: int, wp: int) -> torch.Tensor:
    """isp: storage rows of every linear, output and bias included, wherever the cut falls."""
    if w.kind == "replicated":
        return w.data
    low, high = shares(w.data.shape[0], wp)[rank]
    return w.data[low:high]


def stages(layers: int, pp: int, chunks: int, zbv: bool) -> dict[tuple[int, int], range]:
    """(chunk, pp) → global layers: chunk first, extras to the last stages; ZBV turns odd chunks round."""
    per_chunk = layers // chunks
    found: dict[tuple[int, int], range] = {}
    start = 0
    for chunk in range(chunks):
        order = range(pp - 1, -1, -1) if zbv and chunk % 2 else range(pp)
        for place, rank in enumerate(order):
            size = per_chunk // pp + (place >= pp - per_chunk % pp)
            found[chunk, rank] = range(start, start + size)
            start += size
    return found


_SAVED: dict[object, tuple[State, dict[str, bytes]]] = {}  # small ones, as they were written
_SMALL, _MOST_SAVED = 1 << 20, 64


def once(make: Callable[..., State]) -> Callable[..., State]:
    """What writes a checkpoint folder; one that was written before is written from memory."""

    @wraps(make)
    def write_again(m: Model, folder: Path, **layout: Any) -> State:
        changed = build, torch.serialization.get_crc32_options()  # by tests
        key = (make.__name__, changed, m, *sorted(layout.items()))
        if key in _SAVED:
            folder.mkdir(parents=True)
            expected, files = _SAVED[key]
            for name, data in files.items():
                (folder / name).write_bytes(data)
            return {name: tensor.clone() for name, tensor in expected.items()}
        expected = make(m, folder, **layout)
        if sum(path.stat().st_size for path in folder.iterdir()) <= _SMALL:
            while len(_SAVED) >= _MOST_SAVED:
                del _SAVED[next(iter(_SAVED))]
            kept = {name: tensor.clone() for name, tensor in expected.items()}
            _SAVED[key] = kept, {path.name: path.read_bytes() for path in folder.iterdir()}
        return expected

    return write_again


@once
def save(m: Model, folder: Path, **layout: Any) -> State:
    """Write a checkpoint folder; returns the expected Hugging Face state dict."""
    layers, first, last, expected = build(m)
    write(m, folder, layers, first, last, **layout)
    return expected


def write(
    m: Model,
    folder: Path,
    layers: list[list[Whole]],
    first: list[Whole],
    last: list[Whole],
    *,
    mode: str = "tensor",
    tp: int = 1,
    pp: int = 1,
    wp: int = 1,
    chunks: int = 1,
    zbv: bool = False,
    wrapped: bool = False,
    legacy: bool = False,
) -> None:
    """The rank files of whole tensors, and their neighbours."""
    folder.mkdir(parents=True)
    places = stages(m.layers, pp, chunks, zbv)
    for name, t, w, p in ranks(mode, tp, pp, wp):
        state: dict[str, torch.Tensor] = OrderedDict()
        for chunk in range(chunks):
            prefix = f"{chunk}.model." if chunks > 1 else "model." if wrapped else ""
            mine = places[chunk, p]
            if mine.start == 0 and len(mine):
                put(state, prefix, first, mode, t, w, tp, wp)
            for local, layer in enumerate(mine):
                for whole in layers[layer]:
                    cut = tp_slice(whole, t, tp) if mode == "tensor" else wp_slice(whole, w, wp)
                    if cut is not None:
                        state[f"{prefix}{m.block}.{local}.{whole.name}"] = cut
            if mine.stop == m.layers and len(mine):
                put(state, prefix, last, mode, t, w, tp, wp)
        torch.save(flattened(state, m.seed + t + p), folder / name, _use_new_zipfile_serialization=not legacy)
    write_config(m, folder, chunks, mode, tp, pp, wp, zbv)


def put(state: State, prefix: str, tensors: list[Whole], mode: str, t: int, w: int, tp: int, wp: int) -> None:
    """Embedding, norm and head: cut over tp, in later isp over wp."""
    rank, count = (w, wp) if mode == "isp_wp" else (t, tp)
    for whole in tensors:
        cut = tp_slice(whole, rank, count)
        assert cut is not None
        state[prefix + whole.name] = cut


def ranks(mode: str, tp: int, pp: int, wp: int) -> Iterator[tuple[str, int, int, int]]:
    """(file name, tp, wp, pp) of every file; isp writes one per process, not a cross product."""
    for p in range(pp):
        if mode == "tensor":
            yield from ((f"model_tp{t}_pp{p}.pt", t, 0, p) for t in range(tp))
        elif mode == "isp":
            yield from ((f"model_tp{r % tp}_wp{r % wp}_pp{p}.pt", r % tp, r % wp, p) for r in range(max(tp, wp)))
        else:
            yield from ((f"model_wp{w}_pp{p}.pt", 0, w, p) for w in range(wp))


def flattened(state: State, seed: int) -> State:
    """Tensors as views into one storage per type, in another order than the keys, as the optimizer leaves them."""
    order = sorted(state, key=lambda name: (hash((seed, len(name))), name[::-1]))
    views = {}
    for dtype in {state[name].dtype for name in order}:
        mine = [name for name in order if state[name].dtype == dtype]
        sizes = [state[name].numel() for name in mine]
        flat = torch.cat([state[name].reshape(-1) for name in mine]).split(sizes)
        views |= {name: piece.view(state[name].shape) for name, piece in zip(mine, flat, strict=True)}
    return OrderedDict((name, views[name]) for name in state)


def with_root(path: Path, root: str) -> None:
    """Give a torch zip another root: `archive` is what torch writes when it saves into a buffer."""
    with zipfile.ZipFile(path) as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members:
            file.writestr(f"{root}/{name.partition('/')[2]}", data)


def write_config(m: Model, folder: Path, chunks: int, mode: str, tp: int, pp: int, wp: int, zbv: bool) -> None:
    """model_config.pt as a pickled class that is not importable where it is read, and its neighbours."""
    module = types.ModuleType("internlm.core.context.parallel_context")
    config_class = type("Config", (dict,), {"__module__": module.__name__})
    module.Config = config_class
    parents = ["internlm", "internlm.core", "internlm.core.context"]
    saved = {name: sys.modules.get(name) for name in [*parents, module.__name__]}
    sys.modules.update({name: types.ModuleType(name) for name in parents} | {module.__name__: module})
    try:
        torch.save(config_class(m.config(chunks)), folder / "model_config.pt")
    finally:
        for name, before in saved.items():
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
    pipeline = f'dict(size={pp}, mode="{"ZBV" if zbv else "1F1B"}")'
    tensor = f'dict(size={tp}, mode="{"mtp" if mode == "tensor" else "isp"}")'
    parallel = f"dict(tensor={tensor}, pipeline={pipeline}, weight=dict(size={wp}))"
    source = f'model_type = "{m.model_type}"\nparallel = {parallel}\n'
    torch.save(source, folder / "config_file.pt")
    torch.save({}, folder / "context.pt")
    torch.save({}, folder / "topo_tp0_pp0.json")
    torch.save({"step": 10}, folder / "10.step")
    (folder / "gpus-8.pt").write_bytes(pickle.dumps({}))
    for path in folder.glob("model_tp0_pp0.pt"):
        path.with_name(f"{path.name}.md5").write_text(hashlib.md5(path.read_bytes()).hexdigest())


def same(left: State, right: State) -> None:
    """Equal names, types, shapes and bytes; the first difference is told."""
    assert sorted(left) == sorted(right)
    for name, tensor in right.items():
        got = left[name]
        assert got.dtype == tensor.dtype, name
        assert got.shape == tensor.shape, name
        equal = torch.equal(got.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        assert equal, f"{name} differs"
