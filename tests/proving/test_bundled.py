"""Every bundled family is proved, and in the soak every release; `engine prove --all` does so on the command line."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

import engine
from engine.language.mapping_file import load_mapping
from engine.language.search import list_names
from engine.proving.committed import check_meaning, committed, read_meaning
from engine.proving.prove import shared_rules
from tests.support.depth import SOAK

# Families whose model transformers lacks.
WITHOUT_CLASS = [
    f"families/{name}.yaml" for name in ("internlm-moe", "internlm2-official", "moe-grouped", "moe-stacked")
]

# Families whose models have no experts, in a layout that has ranks for them.
WITHOUT_EXPERTS = [f"families/megatron-{name}.yaml" for name in ("llama", "qwen2", "qwen3")]


def proved_together() -> list[list[str]]:
    """The names of bundled mappings, those with the same rules together, families first."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(list_names(), key=lambda name: not name.startswith("families/")):
        found[shared_rules(load_mapping(name))].append(name)
    return list(found.values())


@pytest.mark.parametrize("name", [name for name in sorted(list_names()) if name.startswith("families/")])
def test_what_is_proved_of_configurations_is_of_one_that_is_not_refused(name: str) -> None:
    known = committed(load_mapping(name))
    assert known is not None
    for direction in ("reading", "writing"):
        assert (direction, "gives", "refused") not in read_meaning(known[1])


def changes(name: str) -> set[str]:
    """The rules that change values."""
    return {rule.name for rule in load_mapping(name).rules if rule.transform is not None}


@pytest.mark.parametrize("names", proved_together(), ids=lambda names: names[0].removesuffix(".yaml"))
def test_a_bundled_family_and_its_releases_are_proved(names: list[str]) -> None:
    proofs = engine.prove(names if SOAK else names[:1])  # others at their own sizes: test_prove.py
    for name in names[len(proofs) :]:
        meaning = check_meaning(load_mapping(name))
        assert meaning.holds, [failure.message for failure in meaning.failures]
    for proof in proofs:
        assert proof.holds, [failure.message for check in proof.checks for failure in check.failures]
    (model,) = [check for check in proofs[0].checks if check.name == "model"]
    assert (model.holds is None and "has no model of type" in model.told) == (names[0] in WITHOUT_CLASS)
    (trip,) = [check for check in proofs[0].checks if check.name == "round trip"]
    if trip.holds is None:
        assert names == ["families/transformers.yaml"]  # nothing can be written for it
        return
    assert "every element back at its place" in trip.told
    # No layout is left out, but for ranks that divide what the model does not have.
    left_out = re.findall("; not over .*?: ([^;]*)", trip.told)
    assert left_out == ["the model has no `expert`"] * (names[0] in WITHOUT_EXPERTS), trip.told
    # What changes values is not compared, and said so.
    assert ("only totality for head_normalised" in trip.told) == ("head_normalised" in changes(names[0]))
