"""Lint finds, without a checkpoint, what would go wrong with one; bundled mappings are clean."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine.api
from engine.errors import CODES, LINTS
from engine.proving.lint import lint_file

Data = dict[str, Any]


def base() -> Data:
    return copy.deepcopy(dict(engine.api.load_mapping("families/internlm.yaml").resolved))


def findings(data: Data, tmp_path: Path) -> dict[str, str]:
    """code → message, for a changed family."""
    path = tmp_path / "changed.yaml"
    path.write_text(json.dumps({**data, "rules": list(data["rules"].values())}, indent=1))
    found = lint_file(str(path))
    for finding in found:
        assert finding.fix
        assert finding.place is not None and finding.place.line
    return {f.code: f.message for f in found}


def test_bundled_mappings_are_clean() -> None:
    assert engine.api.lint() == []


def test_a_family_written_out_whole_is_clean_too(tmp_path: Path) -> None:
    assert findings(base(), tmp_path) == {}


def overlap(data: Data) -> None:
    del data["rules"]["up"]["when"]


def overlap_by_placeholder(data: Data) -> None:
    data["rules"]["zero"] = {
        "name": "zero",
        "source": "blocks.{layer}.norm{number}.weight",
        "target": "x.{layer}.{number}",
        "axes": "hidden",
    }
    data["rules"]["blocks.{layer}.norm1.weight"]["source"] = "blocks.{layer}.norm0.weight"


def gap(data: Data) -> None:
    del data["rules"]["qkv_pairs"]


def unused_dim(data: Data) -> None:
    data["dims"]["lonely"] = 3


def unused_option(data: Data) -> None:
    data["options"]["lonely"] = {"type": "integer", "default": 1}


def shadowed(data: Data) -> None:
    data.setdefault("ignore", []).append({"source": "norm.weight", "why": "not needed"})


def pieces(data: Data) -> None:
    data["rules"]["qkv"]["targets"][0]["axes"] = "(k heads head_dim) | hidden"


def expectation(data: Data) -> None:
    data["expect"] = {"hiden": 4096}


def misspelt_axis(data: Data) -> None:
    data["rules"]["down"].update(axes="hidden fnf", split="fnf")


def unreachable(data: Data) -> None:
    choices = data["variants"]["rotary"]["choices"]
    data["variants"]["rotary"]["choices"] = {"halves": "otherwise", "pairs": choices["pairs"]}


@pytest.mark.parametrize(
    ("code", "told", "change"),
    [
        ("L001", "mlp.w3.weight", overlap),
        ("L001", "norm{number}", overlap_by_placeholder),
        ("L002", "mixer.Wqkv", gap),
        ("L003", "dim `lonely`", unused_dim),
        ("L003", "option `lonely`", unused_option),
        ("L004", "norm.weight", shadowed),
        ("L005", "layer, q}", pieces),
        ("E108", "hiden", expectation),
        ("L007", "fnf", misspelt_axis),
        ("L008", "rotary: pairs", unreachable),
    ],
)
def test_each_defect_is_found_and_told(code: str, told: str, change: Callable[[Data], None], tmp_path: Path) -> None:
    data = base()
    change(data)
    found = findings(data, tmp_path)
    assert code in found, found
    assert told in found[code]
    assert code in LINTS or code in CODES


def test_what_keeps_a_file_from_loading_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("mapping: 1\nname: x\nname: y\n")
    (finding,) = lint_file(str(path))
    assert (finding.code, finding.severity) == ("E101", "error")
    assert finding.place is not None and finding.place.line == 3
