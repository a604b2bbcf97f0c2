"""Facts that travel with a mapping: where each target's elements come from, as committed beside it.

No shape tells gate from up: with the two exchanged, a mapping is as total and as invertible as before.
So `internlm2.yaml` has `internlm2.facts.json` beside it, written from its rules once its tests had passed:
genuine checkpoints where there are some, an independent sharder elsewhere. Whoever changes a rule changes
both, or hears of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.formats.configs import read_json
from engine.language.model import Mapping as MappingFile
from engine.language.search import find_file, search_folders
from engine.planning.matching import is_active
from engine.planning.stored import instances
from engine.proving.counterexamples import moves_of
from engine.proving.proof import Check, Failure, check_of
from engine.proving.tiny import guess_sizes, settle
from engine.storage.local import local_file
from engine.storage.replacing import write_file

FACTS = "facts"

Moves = dict[str, dict[str, list[str]]]  # target and choices → source → digest of its moves, and what cuts it


def facts_of(mapping: MappingFile, sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What is committed: tiny sizes, and for every target what it takes from where."""
    free = dict(sizes) if sizes is not None else guess_sizes(mapping)
    choices = {v.name: v.default or list(v.choices)[-1] for v in mapping.variants.values()}
    every = instances(mapping)
    solved, _ = settle(mapping, choices, [one for one in every if is_active(one, choices)], free)
    moves: Moves = {}
    for instance in every:
        if instance.param == "bias":
            continue
        rule = instance.rule
        when = ", ".join(f"{name}={'|'.join(allowed)}" for name, allowed in sorted(rule.when.items()))
        for target, copies in moves_of(instance, solved).items():
            moved = json.dumps([rule.transform, [[a, b, *astuple(copy)] for a, b, copy in copies]])
            digest = hashlib.sha256(moved.encode()).hexdigest()[:16]
            cut = "+".join(rule.split) or "not split"
            moves.setdefault(target + (f" ({when})" if when else ""), {})[instance.sources[0].text] = [digest, cut]
    return {"facts": 1, "mapping": mapping.name, "sizes": free, "moves": moves}


def write_facts(name: str | Path) -> Path:
    """Commit the facts of a mapping file beside it, as they are now."""
    from engine.language.mapping_file import load_mapping

    path = find_file(str(name)).with_suffix(".facts.json")
    text = json.dumps(facts_of(load_mapping(name)), indent=1, ensure_ascii=False) + "\n"
    write_file(path, text.encode(), overwrite=True, ours=is_facts)
    return path


def is_facts(start: bytes) -> bool:
    """Whether a file of these first bytes was written as facts."""
    return start.startswith(b'{\n "facts": ')


def committed(mapping: MappingFile) -> tuple[str, dict[str, Any]] | None:
    """The nearest facts: the mapping's own, else those of what it extends; and the file they are of."""
    for file in reversed(mapping.files):
        for base in (Path(), *(folder.parent for folder in search_folders())):
            path = (base / file).with_suffix(".facts.json")
            if path.is_file():
                return file, read_json(local_file(path))
    return None


def check_facts(mapping: MappingFile) -> Check:
    """Whether every target still takes what it took when the facts were committed."""
    found = committed(mapping)
    if found is None:
        told = "none are committed beside the mapping, so a swap of equal shapes goes unseen; --write-facts writes them"
        return Check(FACTS, None, told)
    file, facts = found
    failures = differences(mapping, facts)
    if failures and file != mapping.files[-1]:
        return Check(FACTS, None, f"its rules are not those of {file}, and no facts of its own are committed")
    moves = facts.get("moves")
    count = len(moves) if isinstance(moves, dict) else 0
    return check_of(
        FACTS,
        f"{count} targets come from where {file} had them when it was checked",
        failures,
    )


def differences(mapping: MappingFile, facts: Mapping[str, Any]) -> list[Failure]:
    """Targets that take something else than the facts say, in words."""
    try:
        now: Moves = facts_of(mapping, facts["sizes"])["moves"]
        then: Moves = facts["moves"]
        told = [(t, _differs(t, now, then)) for t in dict.fromkeys([*then, *now])]
    except (EngineError, KeyError, TypeError, AttributeError, ValueError) as error:
        return [Failure(f"the committed facts cannot be compared: {str(error).splitlines()[0]}", str(mapping.place))]
    places = {target.name: str(rule.place) for rule in mapping.rules for target in rule.targets}
    return [Failure(words, places.get(target.split(" (")[0])) for target, words in told if words]


def _differs(target: str, all_now: Moves, all_then: Moves) -> str | None:
    now, then = all_now.get(target, {}), all_then.get(target, {})
    if now == then:
        return None
    if set(now) != set(then):
        return f"{target} comes from {_sources(target, all_now)}; the committed facts say {_sources(target, all_then)}"
    source = next(name for name in now if now[name] != then[name])
    if now[source][0] == then[source][0]:
        return f"{source} is cut on {now[source][1]}; the committed facts say {then[source][1]}"
    return f"{target} takes the elements of {source} in another order than the committed facts say"


def _sources(target: str, moves: Moves) -> str:
    """What a target takes, under its own choices or else under whichever there are."""
    if moves.get(target):
        return " and ".join(moves[target])
    name = target.split(" (")[0]
    others = [f"{source}{key[len(name) :]}" for key, m in moves.items() if key.split(" (")[0] == name for source in m]
    return " or ".join(others) or "nowhere"
