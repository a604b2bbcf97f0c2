"""The tensors of a class that transformers built, and the names under which its releases load them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from engine.language.documents import grouped
from engine.planning.wanted import Wanted


def wanted_of(model: Any, ties: bool) -> Wanted:
    """The tensors that a model without memory loads; `ties` says whether its configuration ties its head."""
    state = model.state_dict()
    tied = _ties(model, state) if ties else {}
    own, *others = (_wanted_as(one, state, tied) for one in _forms(model, state))
    text = model.config.get_text_config(decoder=True)  # transformers 4 reads this part to tie, 5 the whole
    alike = bool(getattr(text, "tie_word_embeddings", ties)) == ties
    others = [replace(one, ties=ties and alike, versions=None if alike else ">=5") for one in others]
    return replace(own, ties=ties and alike, versions=None if others == [] and alike else ">=5", others=tuple(others))


def _wanted_as(named: Mapping[str, Any], state: Mapping[str, Any], tied: Mapping[str, str]) -> Wanted:
    """The tensors of a class under other names; each tensor of `named` is in `state`, or made of tensors in it."""
    numbers, last = {id(tensor): number for number, tensor in enumerate(state.values())}, 0
    order: dict[str, int] = {}
    for name, tensor in named.items():  # one that is made of several follows its predecessor
        order[name] = last = numbers.get(id(tensor), last)
    kept = sorted(order, key=order.__getitem__)
    called = {id(tensor): name for name, tensor in named.items()}
    ties = {called.get(id(state[name]), ""): called.get(id(state[to]), "") for name, to in tied.items()}
    types = {name: _TYPES[str(named[name].dtype)] for name in kept if str(named[name].dtype) in _TYPES}
    return Wanted({name: tuple(named[name].shape) for name in kept if name not in ties}, ties, types=types)


_TYPES = {"torch.bool": "BOOL", "torch.uint8": "U8", "torch.int8": "I8"} | {
    f"torch.int{bits}": f"I{bits}" for bits in (16, 32, 64)
}


def _ties(model: Any, names: Collection[str]) -> dict[str, str]:
    """Names of the same parameter, and tied ones: each → the one that the class lists, or the first."""
    listed = getattr(model, "_tied_weights_keys", None)
    tied = {n: to for n, to in listed.items() if n in names and to in names} if isinstance(listed, Mapping) else {}
    owners = grouped((id(parameter), name) for name, parameter in model.named_parameters(remove_duplicate=False))
    for alike in owners.values():
        first = next((name for name in alike if name not in tied), alike[0])
        tied |= {name: first for name in alike if name != first}
    return tied


def _shapes(named: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in named.items()}


def _forms(model: Any, state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A class's tensors with its own names, and with names of older releases, which transformers loads as well.

    Since 5, transformers stacks experts and renames parts of models, but saves many of them with the older names.
    """
    forms = [state]
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, revert_weight_conversion

        every = get_model_conversion_mapping(model, add_legacy=False)
        for changes in (
            every,
            [one for one in every if not isinstance(one, PrefixChange)],  # as saved
            [one for one in every if one.scope_prefix],  # as 4 named renamed parts in memory
        ):
            model._weight_conversions = changes
            named = revert_weight_conversion(model, state) if changes else state
            if all(_shapes(named) != _shapes(other) for other in forms):
                forms.append(named)
    except ImportError:  # transformers 4 has one name for each tensor
        return forms
    except Exception:  # not a public interface: other names are not known
        return [*forms, state]
    return forms
