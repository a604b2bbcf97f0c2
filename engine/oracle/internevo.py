"""A forward pass computed straight from the rank files, the way training computes it.

Each tensor rank multiplies by its own columns, attends with its own heads and multiplies by its own
rows; the results of the ranks are summed, and the bias that only rank 0 holds is added. Layers are
read one after another, and only one rank's tensor at a time; everything is float32.

What training computes is taken from InternEvo's model code: how q, k and v are packed, which MLP
letter is which, what rotary pairs are. No mapping and no plan is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.functional import gelu, linear, normalize, silu

from engine.errors import EngineError, Place
from engine.oracle.internevo_said import Said
from engine.oracle.internevo_shards import Shards, Spot, Stored, positive, setting
from engine.planning.attempts import Checkpoint

_ROWS = 4096  # rows of the head that are read at a time


class Forward(Shards):
    """The layers of a training checkpoint as functions. A context manager that closes the files.

    A layer's trace holds its intermediate results, by names in the order of computation:
    `attention_norm`, `q`, `k`, `v`, `mixed`, `o`, `mlp_norm`, `gate`, `up`, `gated`, `down`, `out`.
    Of q and k, elements of a head are in halves (all first elements of rotary pairs, then all second),
    as in transformers, however training stores them.

    Attributes:
        layers: their number.
        head_dim: width of an attention head.
        normalised: whether training divides the rows of the head by their length.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
        super().__init__(checkpoint)
        config, self._folder = self.config, checkpoint.folder
        self._v1 = self.block == "blocks"
        self._late = self.holds("embed_tokens.", "attention.out_proj.")  # Qwen2 and Baichuan2: all keys mean one thing
        self.hidden, self._heads = (positive(config, key) for key in ("hidden_size", "num_attention_heads"))
        self._groups = int(setting(config, "num_kv_attention_heads", self._heads))
        self.head_dim = int(setting(config, "head_dim", self.hidden // self._heads))
        self._gemma = bool(config.get("add_unit_offset"))  # it scales embeddings too, and has GELU by default
        self._act = "gelu_python" if self._gemma and not config.get("use_swiglu") else "silu"
        self.eps = float(setting(config, "layer_norm_epsilon", 1e-5))
        self._base = float(setting(config, "rope_base", 10000))
        self.reward = bool(config.get("is_reward"))
        self.layers = len(self.spots)
        fused = bool(self.spots) and self.has(self.spots[0], "attention.wqkv.weight") is not None
        kind = str(self.training.get("model_type", "")).upper()
        said = Said(config, kind, self._v1, self._late, fused)
        self.normalised = said.normalises(settings.get("head"), self._folder)
        self._pairs = said.in_pairs(settings.get("rotary"))
        self._fused = said.in_pieces(settings.get("fusion"))
        self._letters: str | None = None
        self._told_letters: str | None = "w2_is_down" if self._late else settings.get("mlp_letters")
        self._check()

    @property
    def numbers(self) -> dict[str, Any]:
        """The values that config.json must have for the model to compute what training does."""
        return {
            "rms_norm_eps": self.eps,
            "rope_parameters.rope_theta": self._base,
            "hidden_size": self.hidden,
            "num_attention_heads": self._heads,
            "num_key_value_heads": self._groups,
            "head_dim": self.head_dim,
            "num_hidden_layers": self.layers,
            "hidden_act": self._act,
            "tie_word_embeddings": False,
        }

    def _check(self) -> None:
        """E303 for models that this forward pass does not support."""
        claimed = self.config.get("num_layers")
        if not self.spots or (isinstance(claimed, int) and claimed != len(self.spots)):
            raise EngineError(
                "E201",
                "the rank files do not hold every layer",
                place=Place(self._folder),
                got=f"{len(self.spots)} layers",
                expected=f"num_layers {claimed} of model_config.pt",
                fix="Copy the missing files from the training run.",
            )
        held = partial(self.has, self.spots[0])
        for unknown, what in (
            (held("norm1.bias", "attention_norm.bias"), "layer norms"),
            (held("mlp.moe_layer.gate.wg.weight", "feed_forward.moe_layer.gate.wg.weight"), "a mixture of experts"),
            (self.config.get("apply_post_layer_norm"), "norms after the layers (apply_post_layer_norm)"),
        ):
            if unknown:
                raise EngineError(
                    "E303",
                    f"training's own forward pass is not known for {what}",
                    place=Place(self._folder),
                    fix="Leave --logits out; --src and --mapping compare every tensor all the same.",
                )

    def vocab(self) -> int:
        """Rows of the embedding, over all ranks."""
        parts, by_vocab = self._embedding()
        return sum(part.shape[0] for part in (parts if by_vocab else parts[:1]))

    def _embedding(self) -> tuple[list[Stored], bool]:
        """Its parts, one if all ranks hold it whole, and whether they are parts of the vocabulary, as the key shows."""
        stems = ("embedding",) if self._v1 else ("tok_embeddings", "embed_tokens")
        spot, key = self.edge(*(f"{stem}{of}.weight" for stem in stems for of in ("", ".word_embeddings")))
        parts, by_vocab = self.edges(spot, key), "word_embeddings" in key
        return (parts if by_vocab or parts[0].shape[1] < self.hidden else parts[:1]), by_vocab

    def embedding(self, low: int, high: int) -> torch.Tensor:
        """Rows low..high of the embedding, put together from all ranks."""
        parts, by_vocab = self._embedding()
        if not by_vocab:
            return torch.cat([self.rows(part, low, high) for part in parts], dim=1)
        found, first = [], 0
        for part, count in ((one, one.shape[0]) for one in parts):
            found.append(self.rows(part, min(max(low - first, 0), count), min(max(high - first, 0), count)))
            first += count
        return torch.cat(found)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The first hidden state: each id's row, from the rank that has it or joined from all ranks."""
        rows = {one: self.embedding(one, one + 1)[0] for one in sorted(set(ids.flatten().tolist()))}
        found = torch.stack([rows[one] for one in ids.flatten().tolist()]).view(*ids.shape, -1)
        return found * self.hidden**0.5 if self._gemma else found

    def layer(self, number: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """A layer's results for a hidden state, step by step."""
        spot = self.spots[number]
        norms = ("norm1.weight", "norm2.weight") if self._v1 else ("attention_norm.weight", "ffn_norm.weight")
        mixer, mlp = ("mixer", "mlp") if self._v1 else ("attention", "feed_forward")
        out = "out_proj" if self.has(spot, f"{mixer}.out_proj.weight") else "wo"
        trace = {"attention_norm": self._norm(x, self.replicated(spot, norms[0]))}
        trace |= self._attention(spot, mixer, trace["attention_norm"])
        trace["o"] = self._row_parallel(spot, f"{mixer}.{out}", trace["mixed"])
        x = x + trace["o"]
        trace["mlp_norm"] = self._norm(x, self.replicated(spot, norms[1]))
        trace |= self._mlp(spot, mlp, trace["mlp_norm"])
        trace["out"] = x + trace["down"]
        return trace

    def head(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last norm, and the logits; of a reward model the rewards of every position.

        Every rank of a reward model holds the same single row; of other heads, a cut of the vocabulary.
        """
        y = self._norm(x, self.replicated(*self.edge("norm.weight")))
        parts = self.edges(*self.edge("head.weight" if self._v1 else "output.weight"))
        found = []
        for part in parts[:1] if self.reward else parts:
            for low in range(0, part.shape[0], _ROWS):
                rows = self.rows(part, low, low + _ROWS)
                found.append(linear(y, normalize(rows, dim=1) if self.normalised else rows))
        return y, torch.cat(found, dim=-1)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (weight + self._gemma)

    def _column_parallel(self, spot: Spot, x: torch.Tensor, *names: str) -> list[torch.Tensor]:
        """Each rank's own part of the output, of a linear that it may hold in pieces."""
        weights, biases = (self.linear(spot, *(f"{name}.{param}" for name in names)) for param in ("weight", "bias"))
        return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True) if weight is not None]

    def _row_parallel(self, spot: Spot, name: str, x: torch.Tensor) -> torch.Tensor:
        """Each rank's own columns with its part of the input, summed; then the bias that one rank holds."""
        weights, biases = (self.linear(spot, f"{name}.{param}") for param in ("weight", "bias"))
        total, low = x.new_zeros(()), 0
        for weight in weights:
            if weight is not None:
                total = total + x[..., low : low + weight.shape[1]] @ weight.T
                low += weight.shape[1]
        return total if biases[0] is None else total + biases[0]

    def _attention(self, spot: Spot, name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """q, k and v of all ranks, and the attention of each rank's heads, joined."""
        apart = [f"{name}.{word}" for word in ("wq", "wk", "wv")]
        if self.has(spot, f"{apart[0]}.weight") and self._fused:
            ranks = [list(self._unpack(part)) for part in self._column_parallel(spot, x, *apart)]
        elif self.has(spot, f"{apart[0]}.weight"):
            each = [self._column_parallel(spot, x, one) for one in apart]
            ranks = [
                [part.view(*part.shape[:2], -1, self.head_dim) for part in rank] for rank in zip(*each, strict=True)
            ]
        else:
            key = self.has(spot, f"{name}.Wqkv.weight", f"{name}.wqkv.weight") or f"{name}.wqkv.weight"
            ranks = [list(self._unpack(part)) for part in self._column_parallel(spot, x, key.removesuffix(".weight"))]
        turned = [[*(self._halves(one) for one in rank[:2]), rank[2]] for rank in ranks]
        mixed = [self._attend(*rank) for rank in turned]
        q, k, v = (torch.cat([part.flatten(2) for part in parts], dim=-1) for parts in zip(*turned, strict=True))
        return {"q": q, "k": k, "v": v, "mixed": torch.cat(mixed, dim=-1)}

    def _unpack(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v (batch, length, heads, head_dim) of one rank's packed output.

        v1 and Baichuan2: all queries, all keys, all values. InternLM2: for each key/value head the queries that share
        it, then the key, then the value.
        """
        if self._v1 or self._late:
            q, k, v = fused.view(*fused.shape[:2], 3, -1, self.head_dim).unbind(2)
            return q, k, v
        grouped = fused.view(*fused.shape[:2], -1, self._heads // self._groups + 2, self.head_dim)
        return grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]

    def _halves(self, heads: torch.Tensor) -> torch.Tensor:
        """Elements of each head with the first ones of all rotary pairs before the second ones."""
        return torch.cat([heads[..., 0::2], heads[..., 1::2]], dim=-1) if self._pairs else heads

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Causal attention of one rank's heads; queries share keys and values in order."""
        length, dim = q.shape[1], q.shape[-1]
        angles = torch.outer(
            torch.arange(length).float(), self._base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        )
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]

        def turn(x: torch.Tensor) -> torch.Tensor:
            one, two = x.chunk(2, dim=-1)
            return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)

        shared = q.shape[2] // k.shape[2]
        keys, values = (one.repeat_interleave(shared, dim=2) for one in (turn(k), v))
        scores = torch.einsum("bihd,bjhd->bhij", turn(q), keys) / dim**0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, values).flatten(2)

    def _mlp(self, spot: Spot, name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
        down, up = ("w2", "w3") if self._letters_of(spot, name) == "w2_is_down" else ("w3", "w2")
        if self.config.get("mlp_layer_fusion") and self.by_rows:  # halves of each rank's rows of one linear
            both = torch.cat(self._column_parallel(spot, x, f"{name}.w1", f"{name}.w3"), dim=-1)
            gate, raised = both.chunk(2, dim=-1)
        else:
            gate, raised = (torch.cat(self._column_parallel(spot, x, f"{name}.{w}"), dim=-1) for w in ("w1", up))
        gated = (silu if self._act == "silu" else gelu)(gate) * raised
        return {"gate": gate, "up": raised, "gated": gated, "down": self._row_parallel(spot, f"{name}.{down}", gated)}

    def _letters_of(self, spot: Spot, name: str) -> str:
        """Which of w2 and w3 projects down. They changed places on 2024-02-01, and only shapes show it."""
        if self._letters is None:
            each = (self.linear(spot, f"{name}.{w}.weight") for w in ("w1", "w2", "w3"))
            w1, w2, w3 = ([tuple(part.shape) for part in parts if part is not None] for parts in each)
            fits = {letters for letters, up, down in (("w2_is_down", w3, w2), ("w2_is_up", w2, w3))
                    if up == w1 and down == [shape[::-1] for shape in w1]}  # fmt: skip
            if len(fits) == 2 and self._told_letters is not None:
                fits = {self._told_letters}
            if len(fits) != 1:
                raise EngineError(
                    "E202",
                    "shapes do not tell which of w2 and w3 is which",
                    place=Place(self._folder, tensor=f"{name}.w2.weight"),
                    got=f"w1 {w1[:1]}, w2 {w2[:1]}, w3 {w3[:1]}",
                    expected="exactly one of w2 and w3 to be w1 transposed",
                    fix="Say which one goes down: --set mlp_letters=w2_is_down (trained with code since 2024-02-01) "
                    "or --set mlp_letters=w2_is_up.",
                )
            (self._letters,) = fits
        return self._letters
