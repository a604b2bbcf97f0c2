"""Every rule is pinned: a mutated mapping gives an error or other bytes, never the same result.

Mutants are made from the resolved mapping's data: targets of equal shape exchanged, axes turned, a
split moved, a permutation dropped, a sum reordered. The truth is the independent sharder's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.errors import EngineError
from engine.language.documents import plain
from tests.support.depth import SOAK, sampled
from tests.support.families import model_of, save_family
from tests.support.shards import Model, State, save

V1 = Model("v1", layers=3, hidden=16, heads=4, groups=4, ffn=24, vocab=32)
V2 = Model("v2", layers=3, hidden=24, heads=6, groups=3, ffn=40, vocab=32)
CHANGES: list[dict[str, Any]] = [
    {},
    {"rotary": "pairs"},
    {"embedding": "by_vocab"},
    {"letters": "w2_is_up"},
    {"head": "reward"},
    {"head": "normalised"},
    {"fused": False},
    {"fused": False, "rotary": "pairs"},
]


def turned(axes: str) -> str | None:
    """Two storage dimensions exchanged, or the two axes of a rotary pair."""
    if "half pair" in axes:
        return axes.replace("half pair", "pair half")
    if axes in ("vocab hidden", "ffn hidden", "labels hidden"):
        return " ".join(reversed(axes.split()))
    return None


def mutants(data: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(rule, what, mutated data)."""
    rules = data["rules"]
    names = list(rules)

    def changed(name: str, **keys: Any) -> dict[str, Any]:
        mutant = plain(data)
        mutant["rules"][name].update(keys)
        return mutant

    for name, rule in rules.items():
        split = rule.get("split")
        if isinstance(split, str):
            other = "hidden" if split != "hidden" else "vocab"
            if other in rule["axes"]:
                yield name, f"split on {other}", changed(name, split=other)
            mutant = plain(data)
            del mutant["rules"][name]["split"]
            yield name, "no split", mutant
        else:
            axis = rule["axes"].split()[-1].strip("()")
            yield name, f"split on {axis}", changed(name, split=axis)
        targets = rule.get("targets", [])
        if len(targets) >= 2:
            swapped = plain(targets)
            for one, two in ((0, 1), (1, 2), (0, 2)):
                if one < len(targets) and two < len(targets):
                    again = plain(swapped)
                    again[one]["name"], again[two]["name"] = targets[two]["name"], targets[one]["name"]
                    yield name, f"targets {one} and {two} exchanged", changed(name, targets=again)
            yield name, "sum reordered", changed(name, axes=rule["axes"].replace("+ k + v", "+ v + k"))
        for index, target in enumerate(targets):
            if other_axes := turned(target["axes"]):
                again = plain(targets)
                again[index]["axes"] = other_axes
                yield name, f"target {index} turned", changed(name, targets=again)
        if "target" in rule:
            if other_axes := turned(rule["axes"]):
                yield (
                    name,
                    "target turned",
                    changed(name, **{"target": None, "targets": [{"name": rule["target"], "axes": other_axes}]}),
                )
            for partner in names:
                same = rules[partner]
                if (
                    partner > name
                    and "target" in same
                    and same["axes"] == rule["axes"]
                    and same.get("when") == rule.get("when")
                ):
                    mutant = changed(name, target=same["target"])
                    mutant["rules"][partner]["target"] = rule["target"]
                    yield name, f"exchanged with {partner}", mutant
            partners = [n for n in names if n != name and rules[n].get("axes") == rule["axes"] and "target" in rules[n]]
            if not partners:
                yield (
                    name,
                    "renamed",
                    changed(name, target="model.elsewhere.{layer}" if "{layer}" in rule["target"] else "x"),
                )


def dump(data: dict[str, Any], path: Path) -> Path:
    """JSON is YAML: write the resolved mapping as a file of its own."""
    whole = {**data, "rules": [{k: v for k, v in r.items() if v is not None} for r in data["rules"].values()]}
    path.write_text(json.dumps(whole, indent=1))
    return path


def outcome(mapping: Path, source: Path, settings: dict[str, str]) -> State | str:
    try:
        return dict(engine.iter_tensors(engine.plan(mapping, source, settings=settings)))
    except EngineError as error:
        return error.code


def equal(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(
        left[n].shape == right[n].shape and left[n].dtype == right[n].dtype and torch.equal(left[n], right[n])
        for n in left
    )


LLAMA = model_of("llama", layers=3, hidden=24, heads=6, groups=3, ffn=40, vocab=32, key="adapt_hf")
EXPERTS = model_of("moe", layers=4, hidden=16, heads=4, groups=4, ffn=24, vocab=32)
META = model_of("meta", layers=3, hidden=24, heads=4, groups=2, vocab=32)
TWO = {"tp": 2, "pp": 2}
HALVES, PAIRS = {"rotary": "halves"}, {"rotary": "pairs"}
LLAMA_CHANGES = [{}, HALVES, *CHANGES[2:6]]
APART = {"fused": False}
EXPERTS_CHANGES = [{}, PAIRS, APART, APART | PAIRS, {"embedding": "by_vocab"}, {"letters": "w2_is_up"}]
# mapping → base model, what changes from world to world, layout
WORLDS: dict[str, tuple[Model, list[dict[str, Any]], dict[str, Any]]] = {
    "internlm": (V1, [c for c in CHANGES if c.get("head") != "normalised"], TWO),
    "internlm2": (V2, CHANGES, TWO),
    "llama": (LLAMA, LLAMA_CHANGES, TWO),
    "internlm-moe": (EXPERTS, EXPERTS_CHANGES, TWO),
    "meta-llama": (META, [{}, {"embedding": "by_vocab"}], {"tp": 2}),
}


# Others where the time does not count: what they have in common with these is most of it.
TRIED = WORLDS if SOAK else ("internlm2", "meta-llama")


@sampled(2)
@pytest.mark.parametrize("family", TRIED)
def test_every_mutant_of_every_rule_is_caught(family: str, tmp_path: Path) -> None:
    base, changes, layout = WORLDS[family]
    worlds = [("-".join(["base", *map(str, c.values())]), replace(base, **c)) for c in changes]
    data = dict(engine.load_mapping(f"families/{family}.yaml").resolved)
    given = {"mlp_letters"} & data["variants"].keys()
    original = dump(data, tmp_path / "original.yaml")

    def settings(model: Model) -> dict[str, str]:
        return {name: model.letters for name in given}

    truths = {}
    rules = {rule.name: rule for rule in engine.load_mapping(original).rules}
    reached: dict[str, list[tuple[str, Model]]] = {rule: [] for rule in rules}  # worlds that a rule is for
    for name, model in worlds:
        own = save if type(model) is Model else save_family
        truths[name] = own(model, tmp_path / name, **layout)
        result = outcome(original, tmp_path / name, settings(model))
        assert not isinstance(result, str), result
        assert equal(result, truths[name])
        decided = engine.plan(original, tmp_path / name, settings=settings(model)).decisions
        for rule, one in rules.items():
            if one.active({variant: decision.choice for variant, decision in decided.items()}):
                reached[rule].append((name, model))
    caught: set[str] = set()
    survivors = []
    found = list(mutants(data))
    firsts = {rule: number for number, (rule, *_) in reversed(list(enumerate(found)))}
    for number, (rule, what, mutant) in enumerate(found):
        if not (SOAK or number % 12 == 0 or firsts[rule] == number):
            continue
        path = dump(mutant, tmp_path / f"mutant-{number}.yaml")
        most_likely = [*reached[rule], *(one for one in worlds if one not in reached[rule])]
        results = ((outcome(path, tmp_path / n, settings(m)), truths[n]) for n, m in most_likely)
        if any(isinstance(result, str) or not equal(result, truth) for result, truth in results):
            caught.add(rule)
        else:
            survivors.append((rule, what))
    # Rules that no world here has, such as those of isp, are for tests/planning/test_pieces.py.
    never = {name for name, models in reached.items() if not models}
    assert {name for name, _ in survivors} <= never
    exempt = never | {name for name, rule in data["rules"].items() if rule.get("optional")}
    assert set(data["rules"]) - exempt <= caught
