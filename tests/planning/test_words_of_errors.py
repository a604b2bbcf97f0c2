"""What errors say of sizes, dims and folders: functions by themselves, without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.checkpoint.folder import list_folder
from engine.checkpoint.hf_folder import other_weights
from engine.comparing.settings import small_files
from engine.errors import EngineError, EngineErrors, Place
from engine.formats.dcp import read_dcp_directory
from engine.formats.safetensors import INDEX, index_json
from engine.language.model import Expression
from engine.planning.attempts import _count_numbers, _other_layers, claims
from engine.planning.sizes import Contradiction, Fact, size_error
from engine.planning.variants import _undecided
from engine.run.written import check_index, extra_files
from engine.storage.folders import one_of_two
from engine.storage.local import LocalStore
from engine.storage.store import Store

PLACE = Place("m.yaml", 1)


@pytest.mark.parametrize(
    ("file", "files", "ranks", "told"),
    [
        ("", 2, {"tp": 2}, "r. All ranks agree. Either {}, or rank files are missing at the end."),
        ("f", 2, {"tp": 2}, "r. Either {}, or f is from another run (…), or rank files are missing at the end."),
        ("f", 2, {}, "r. Either {}, or f is from another run (…)."),
        ("f", 1, {}, "r. Either {}."),
        ("", 1, {}, "r. Either {}."),
    ],
)
def test_sizes_that_disagree_may_be_of_other_files_or_ranks_only_if_there_are_any(
    file: str, files: int, ranks: dict[str, int], told: str
) -> None:
    grid: Any = SimpleNamespace(files=[None] * files, sizes=ranks)
    error = size_error(Contradiction("a", "1", "2", PLACE, "r", file), grid)
    fix = str(error.fix).replace("compare its date and training step with the others", "…")
    assert fix == told.format("the mapping or the configuration is not the one for this checkpoint")


@pytest.mark.parametrize(("text", "moved"), [("late * 2", True), ("early + gone", False), ("gone", False)])
def test_a_dim_that_reads_a_later_one_is_told_to_be_moved(text: str, moved: bool) -> None:
    dims = {"early": Expression(text, PLACE), "late": Expression("size", PLACE)}
    mapping: Any = SimpleNamespace(dims=dims, rules=())
    facts, unread = claims(mapping, {"size": 4}, "config.json")
    assert facts["late"].value == 4
    assert ("move `late` up" in str(unread["early"].fix)) is moved
    assert "move `early`" not in str(unread["early"].fix)
    assert unread["early"].message == f"`{text.split()[0]}` has no value in config.json"


@pytest.mark.parametrize(("known", "wrong"), [(3, ["4 from {expert} in tensor names"]), (4, []), (5, [])])
def test_numbers_in_names_may_not_be_more_than_are_known(known: int, wrong: list[str]) -> None:
    sizes: Any = SimpleNamespace(facts={"expert": Fact("expert", known, "config.json")}, contradictions=[])
    rule: Any = SimpleNamespace(axis_names=("layer", "expert"))
    groups: Any = {number: SimpleNamespace(fixed={"layer": 9, "expert": number}) for number in (2, 3, 0)}
    _count_numbers(sizes, [rule], groups)
    assert [one.got for one in sizes.contradictions] == wrong


@pytest.mark.parametrize(
    ("help", "told"), [("say it", "Say it."), ("rope_theta is not there", "rope_theta is not there.")]
)
def test_a_question_begins_with_a_capital_letter_unless_with_a_key(help: str, told: str) -> None:
    variant: Any = SimpleNamespace(
        name="v", help=help, place=PLACE, choices={"a": None, "b": None}, answers={"v": ["a"]}
    )
    assert str(_undecided(variant, "why", "otherwise").fix).startswith(told)


@pytest.mark.parametrize(
    ("counts", "got", "odd"),
    [
        ({(0, 0): 3}, "3 layers counted", ""),
        ({(0, 0): 3, (1, 0): 1}, "4 layers counted over 2 pipeline stages (pp0: 3, pp1: 1)", "a stage"),
    ],
)
def test_stages_are_told_if_there_are_several(counts: dict[tuple[int, int], int], got: str, odd: str) -> None:
    stages: Any = SimpleNamespace(layers=sum(counts.values()), counts=counts, name=lambda stage: f"pp{stage[0]}")
    told = _other_layers(stages, Fact("layer", 5, "config.json"))
    assert (told.got, told.expected, told.file) == (got, "5 from config.json", odd)


def test_every_one_of_several_errors_names_its_folder_once() -> None:
    with pytest.raises(EngineErrors) as caught, one_of_two("like", "--like "):
        raise EngineErrors([EngineError("E205", "one"), EngineError("E206", "two", place=Place("like/f"))])
    assert [one.message for one in caught.value.errors] == ["--like like: one", "two"]
    with pytest.raises(EngineErrors) as caught, one_of_two("like", "--like "):
        raise EngineErrors([EngineError("E205", "one", place=Place("like/f")), EngineError("E206", "two")])
    assert [one.message for one in caught.value.errors] == ["one", "--like like: two"]


LISTS: list[Callable[[Store], object]] = [
    list_folder,
    read_dcp_directory,
    small_files,
    lambda folder: other_weights(folder, ()),
    lambda folder: extra_files(folder, ()),
]


@pytest.mark.parametrize("listed", LISTS, ids=["names", "DCP", "small files", "other weights", "extra files"])
def test_a_folder_that_is_gone_is_told_as_that_whatever_lists_it(
    listed: Callable[[Store], object], tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="E304 there is no such checkpoint folder"):
        listed(LocalStore(tmp_path / "gone"))


def test_an_index_of_one_weights_file_is_none_that_the_engine_wrote(tmp_path: Path) -> None:
    tensors = {"w": {"file": "model.safetensors", "dtype": "F32", "shape": [2]}}
    assert check_index(LocalStore(tmp_path), tensors) == []
    (tmp_path / INDEX).write_bytes(index_json({"w": "model.safetensors"}, 8))
    assert check_index(LocalStore(tmp_path), tensors) == [f"{INDEX} was changed"]
