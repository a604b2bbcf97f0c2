"""The meaning of differing steps in a layer: which tensor is wrong, and in what way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.errors import counted
from engine.language.documents import grouped

Steps = Mapping[str, tuple[float, "torch.Tensor", "torch.Tensor"]]  # deviation, actual result, expected result

# Step of training's forward pass → the module of a transformers layer (itself if empty), and whether
# the step is what goes into it rather than what comes out.
STEPS: dict[str, tuple[str, bool]] = {
    "attention_norm": ("input_layernorm", False),
    "q": ("self_attn.q_proj", False),
    "k": ("self_attn.k_proj", False),
    "v": ("self_attn.v_proj", False),
    "mixed": ("self_attn.o_proj", True),
    "o": ("self_attn.o_proj", False),
    "mlp_norm": ("post_attention_layernorm", False),
    "gate": ("mlp.gate_proj", False),
    "up": ("mlp.up_proj", False),
    "gated": ("mlp.down_proj", True),
    "down": ("mlp.down_proj", False),
    "out": ("", False),
}
_ATTENTION, _MLP = ("attention_norm", "q", "k", "v", "mixed", "o"), ("mlp_norm", "gate", "up", "gated", "down")
_NO_TENSOR = {
    "mixed": "the attention differs, though q, k and v agree: see rope_theta, rope scaling and head counts "
    "in config.json",
    "gated": "the activation differs: see hidden_act in config.json",
    "out": "the layer adds its parts differently",
}
_NORMS = {"attention_norm": "mlp_norm", "mlp_norm": "attention_norm"}
_ALIKE = 0.05  # of the usual size: recognises a tensor despite rounding, far from chance


@dataclass(frozen=True, slots=True)
class Wrong:
    """What is wrong in one place.

    Attributes:
        place: `embedding`, `layer 3` or `head`.
        part: in words, with its verb.
        largest: the largest absolute difference of any step.
        tensor: the module of the first wrong tensor; None when no tensor is wrong, but the configuration.
        why: what the differing steps mean.
    """

    place: str
    part: str
    largest: float
    tensor: str | None
    why: str
    steps: Mapping[str, float]


def explain(place: str, steps: Steps, tolerance: float, head_dim: int) -> Wrong | None:
    """What is wrong in a layer, the embedding or the head; None when every step agrees."""
    wrong = [step for step, (off, _, _) in steps.items() if off > tolerance]
    if not wrong:
        return None
    largest = max(_largest(steps[step][1], steps[step][2]) for step in wrong)
    deviations = {step: steps[step][0] for step in wrong}
    if not place.startswith("layer"):
        name = {"embedding": "model.embed_tokens", "norm": "model.norm"}.get(wrong[0], "lm_head or score")
        return Wrong(place, f"the {place} differs", largest, name, f"{name} is wrong", deviations)
    both = [any(step in wrong for step in group) for group in (_ATTENTION, _MLP)]
    part = {
        (True, True): "attention and MLP differ",
        (True, False): "the attention differs",
        (False, True): "the MLP differs",
    }.get((both[0], both[1]), "the sum differs")
    named = [step for step in wrong if step not in _NO_TENSOR]
    path = STEPS[named[0]][0] if named else None
    tensor = f"model.layers.{place.split()[1]}.{path}" if path else None
    why = "; ".join(_reasons(steps, wrong, named, head_dim))
    return Wrong(place, part, largest, tensor, why, deviations)


def _reasons(steps: Steps, wrong: Sequence[str], named: Sequence[str], head_dim: int) -> list[str]:
    held = {step: _held(step, steps, head_dim) for step in named}
    told: list[str] = []
    done: set[str] = set()
    for step, other in held.items():
        if step in done:
            continue
        if other in held and held[other] == step:
            told.append(f"{_name(step)} and {_name(other)} are exchanged")
            done.add(other)
        elif other == "pairs":
            told.append(f"{_name(step)} has its rotary pairs in another order than training")
        elif other is not None:
            told.append(f"{_name(step)} holds what {_name(other)} should")
        elif steps[step][1].shape != steps[step][2].shape:
            told.append(f"{_name(step)} gives {steps[step][1].shape[-1]} columns, not {steps[step][2].shape[-1]}")
        else:
            told.append(f"{_name(step)} is wrong")
    return told + [_NO_TENSOR[step] for step in wrong if step in _NO_TENSOR and (step != "out" or len(wrong) == 1)]


def _name(step: str) -> str:
    return STEPS[step][0].rsplit(".", 1)[-1]


def _held(step: str, steps: Steps, head_dim: int) -> str | None:
    """What a wrong step holds instead: another step, or its own in another order of rotary pairs."""
    got = steps[step][1]
    norm = _NORMS.get(step, "")
    if norm in steps and _undo(steps[step], steps[norm]) and _undo(steps[norm], steps[step]):
        return norm
    for group in (("q", "k", "v"), ("gate", "up")):
        for other in group if step in group else ():
            if other != step and _same(got, steps[other][2]):
                return other
    if step in ("q", "k") and got.shape[-1] % head_dim == 0:
        stem = (*got.shape[:-1], -1)
        for inner in ((head_dim // 2, 2), (2, head_dim // 2)):
            order = got.reshape(*stem, *inner).transpose(-1, -2)
            if _same(order.flatten(-3), steps[step][2]):
                return "pairs"
    return None


def _undo(norm: tuple[float, torch.Tensor, torch.Tensor], other: tuple[float, torch.Tensor, torch.Tensor]) -> bool:
    """Whether what scales the columns of one norm by mistake undoes the mistake of the other: they are exchanged."""
    (_, got, wanted), (_, theirs, right) = norm, other
    if got.shape != wanted.shape or theirs.shape != right.shape:
        return False
    columns = tuple(range(right.dim() - 1))
    scale = (theirs * right).sum(columns) / right.pow(2).sum(columns).clamp_min(1e-30)
    return bool((got * scale - wanted).abs().max() <= _ALIKE * (got - wanted).abs().max())


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.shape != two.shape or not one.numel():
        return False
    return bool((one - two).abs().max() <= _ALIKE * two.pow(2).mean().sqrt())


def _largest(one: torch.Tensor, two: torch.Tensor) -> float:
    if one.shape != two.shape or not one.numel():
        return float("inf")
    off = float((one - two).abs().max())
    return off if off == off else float("inf")


def in_lines(wrong: Sequence[Wrong]) -> tuple[str, ...]:
    """A line per thing that is wrong, however many layers have it.

    >>> both = [Wrong(f"layer {i}", "the MLP differs", 0.93, "model.layers.0.mlp.up_proj", "up_proj is wrong", {})
    ...         for i in (0, 1)]
    >>> in_lines(both)
    ('layer 0: the MLP differs (max 0.93): up_proj is wrong; first model.layers.0.mlp.up_proj; so in 1 more layer',)
    """
    lines = []
    for first, *more in grouped(((one.part, one.why), one) for one in wrong).values():
        layers = f"; so in {counted(len(more), 'more layer')}" if more else ""
        tensor = f"; first {first.tensor}" if first.tensor and first.place.startswith("layer") else ""
        lines.append(f"{first.place}: {first.part} (max {first.largest:.3g}): {first.why}{tensor}{layers}")
    return tuple(lines)
