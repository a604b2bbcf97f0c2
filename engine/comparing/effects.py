"""What settings do to a model: which of them change its function, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.planning.config_keys import shown

Grade = Literal["function", "cast", "told"]  # changes what is computed; only its precision; neither


@dataclass(frozen=True, slots=True)
class Difference:
    """Something of a model, other than a tensor, that two checkpoints have otherwise.

    Attributes:
        part: `config`, `generation`, `tokenizer`, `chat template` or `code`.
        what: the key, file or property.
        out, ref: what each side has, in words.
        effect: what that does to the model.
    """

    part: str
    what: str
    out: str
    ref: str
    effect: str
    grade: Grade = "function"

    def __str__(self) -> str:
        return f"{self.part}: {self.what} is {self.out}, the reference's is {self.ref}: {self.effect}"


_SHAPE = "the weights do not fit, or are split differently"
_TRAINING: tuple[str, Grade] = ("only training reads it", "told")
_ROPE = "rotary angles are scaled differently: attention changes with position"

# The last part of a key → what another value does.
_EFFECTS: dict[str, tuple[str, Grade]] = {
    "model_type": ("different code runs the weights", "function"),
    "architectures": ("a different class is loaded, with a different head or layers", "function"),
    "auto_map": ("different remote code is loaded", "function"),
    "hidden_act": ("the MLP uses a different activation function", "function"),
    "hidden_activation": ("the MLP uses a different activation function", "function"),
    "rms_norm_eps": ("every norm gives different values, most where its input is small", "function"),
    "layer_norm_eps": ("every norm gives different values, most where its input is small", "function"),
    "rope_theta": ("rotary pairs turn at different speeds: attention differs from the second token on", "function"),
    "rope_type": (_ROPE, "function"),
    "factor": (_ROPE, "function"),
    "original_max_position_embeddings": (_ROPE, "function"),
    "partial_rotary_factor": ("a different part of each head is rotated by position", "function"),
    "tie_word_embeddings": ("the head is tied to the embedding on one side only", "function"),
    "num_attention_heads": ("queries are split into different heads", "function"),
    "num_key_value_heads": ("queries share different keys and values", "function"),
    "head_dim": ("heads have a different width", "function"),
    "num_hidden_layers": ("layers are left out, or filled with random weights", "function"),
    "hidden_size": (_SHAPE, "function"),
    "intermediate_size": (_SHAPE, "function"),
    "vocab_size": ("embedding and head have a different number of rows: ids beyond them are not valid", "function"),
    "num_labels": ("the head has a different number of outputs", "function"),
    "attention_bias": ("attention has biases on one side only", "function"),
    "mlp_bias": ("the MLP has biases on one side only", "function"),
    "sliding_window": ("attention reaches a different distance", "function"),
    "num_experts_per_tok": ("each token goes to a different number of experts", "function"),
    "bos_token_id": ("text begins with a different token", "function"),
    "eos_token_id": ("generation stops at a different token, or not at all", "function"),
    "pad_token_id": ("batches are padded with a different token, and rewards read elsewhere", "function"),
    "quantization_config": ("the weights are read as quantised", "function"),
    "max_position_embeddings": ("only the longest sequence changes: within both lengths nothing does", "told"),
    "dtype": ("weights are loaded in a different type, and the model computes in that precision", "cast"),
    "pretraining_tp": ("sums are taken in slices: equal but for rounding", "told"),
    "use_cache": ("speed alone", "told"),
    "initializer_range": _TRAINING,
    "attention_dropout": _TRAINING,
    "hidden_dropout": _TRAINING,
    "output_router_logits": _TRAINING,
    "router_aux_loss_coef": _TRAINING,
    "problem_type": _TRAINING,
    "output_attentions": ("only more values are returned", "told"),
    "output_hidden_states": ("only more values are returned", "told"),
    "return_dict": ("only the form of the result changes", "told"),
    "chunk_size_feed_forward": ("equal but for rounding", "told"),
    "tokenizer_class": ("see what the tokenizers give", "told"),
}


def effect_of(key: str, *, scaled: bool = False, own: frozenset[str] | None = None) -> tuple[str, Grade]:
    """What another value of a configuration's key does.

    Args:
        scaled: whether rotary angles are scaled, so that lengths take part.
        own: the keys that transformers' class has, if it is known.
    """
    last = key.rsplit(".", 1)[-1]
    if scaled and last == "max_position_embeddings":
        return _ROPE, "function"
    for part in reversed(key.split(".")):
        if part in _EFFECTS:
            return _EFFECTS[part]
    if own is not None and key not in own and key.split(".")[0] not in own:
        return "transformers has no such key for this model, and does not read it", "told"
    return "it may change what the model computes", "function"


def differing(
    part: str,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    said: Any,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> list[Difference]:
    """A difference for each key whose values are not the same.

    Args:
        said: takes a key, gives what another value does and its grade.
        defaults: what an absent key comes to.
    """
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        one, two = ((defaults or {}).get(key) if key not in side else side[key] for side in (ours, theirs))
        if one != two or (type(one) is not type(two) and bool in (type(one), type(two))):
            effect, grade = said(key)
            found.append(Difference(part, key, worded(one), worded(two), effect, grade))
    return found


def worded(value: Any) -> str:
    """A value as its file would write it; None is a key that is not there."""
    return "absent" if value is None else shown(value)


def both(show: Callable[[Any], str], one: Any, two: Any) -> tuple[str, str]:
    """What each side has, in words."""
    return show(one), show(two)
