"""The HTML view is one safe, small page that loads nothing, and its pictures tell the truth."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

import engine
from engine.commands.main import cli
from engine.explaining.tensors import explain
from engine.planning.model import Plan
from engine.show.page import policy, view_page
from engine.show.pictures import flat_shape, pictures
from tests.support.depth import sampled
from tests.support.shards import Model, save

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "internevo"
VOID = {"meta", "input", "br"}
HOSTILE = "</script><script>alert(1)</script>"


class Page(HTMLParser):
    """Elements in order, and a complaint for each that is not closed or carries an event handler."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("style", "src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


def fixture_plan(name: str, family: str) -> Plan:
    plan: Plan = engine.plan(f"families/{family}.yaml", FIXTURES / name)
    return plan


PLANS = [("v1_tp2_pp2_chunks2", "internlm"), ("v1_isp_tp1_wp2", "internlm"), ("moe_tp2_pp2_dp1", "moe-stacked")]


@sampled(2)
@pytest.mark.parametrize(("name", "family"), PLANS)
def test_the_page_is_well_formed_and_loads_nothing(name: str, family: str) -> None:
    text = view_page(fixture_plan(name, family))
    page = Page(text)
    assert not page.tags() & {"img", "link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"https?:|url\(|@import|fetch\(|innerHTML|XMLHttpRequest|eval\(", text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_the_policy_allows_this_style_and_this_script_only() -> None:
    text = view_page(fixture_plan("v2_tp2_pp2", "internlm2"))
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert style and script
    (told,) = [a["content"] for t, a in Page(text).elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert told == policy(style[1], script[1])
    assert told and told.startswith("default-src 'none'; ") and "unsafe" not in told
    assert "base-uri 'none'" in told and "form-action 'none'" in told


def test_names_from_checkpoints_and_mappings_cannot_become_markup(tmp_path: Path) -> None:
    """Tensor, file and folder names, configuration strings, rule names: all of them are shown as text."""
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    save(Model("v2", bias=False), folder)
    (folder / "<svg onload=alert(1)>.bin").write_bytes(b"")
    path = folder / "model_tp0_pp0.pt"
    state = torch.load(path, weights_only=True)
    state[HOSTILE] = state.pop("norm.weight")
    torch.save(state, path)
    data = yaml.safe_load((ROOT / "mappings" / "families" / "internlm2.yaml").read_text())
    data["description"] = "<b onclick='x'>InternLM2</b>"
    (norm,) = [rule for rule in data["rules"] if rule["source"] == "norm.weight"]
    norm |= {"name": f"r{HOSTILE}", "source": HOSTILE, "target": f"n{HOSTILE}"}
    data["target"]["architecture"] = "HostileForCausalLM"  # of which nothing is known: any name may be a target's
    data["config"]["architectures"] = ["HostileForCausalLM"]
    mapping = tmp_path / "hostile.yaml"
    mapping.write_text(json.dumps(data))
    page = view_page(engine.plan(str(mapping), folder))
    read = Page(page)
    assert [tag for tag, _ in read.elements].count("script") == 2
    assert not read.tags() & {"img", "b"}
    shown = "".join(read.words)
    assert "alert(1)" in shown and "<img src=x onerror=alert(1)>" in shown and "<svg onload=alert(1)>.bin" in shown
    lookup = re.search(r'id="lookup">(.*?)</script>', page, re.DOTALL)
    assert lookup is not None
    assert HOSTILE in [source[1] for picture in json.loads(lookup[1]) for source in picture["sources"]]


def test_a_large_model_stays_below_a_megabyte(tmp_path: Path) -> None:
    model = Model("v2", layers=32, hidden=64, heads=16, groups=8, ffn=64, vocab=64, bias=False, rotary="pairs")
    save(model, tmp_path / "step", tp=8, pp=4)
    plan = engine.plan(model.mapping, tmp_path / "step", settings={"mlp_letters": "w2_is_down"})
    text = view_page(plan)
    assert len(text.encode()) < 300_000
    assert "pp3: 24…31" in text


def test_boxes_cover_every_tensor_once() -> None:
    for name, family in PLANS:
        for picture in pictures(fixture_plan(name, family)):
            assert picture.hidden == 0
            for tile in picture.targets:
                rows, columns = flat_shape(tile.shape)
                area = sum((b.rows[1] - b.rows[0]) * (b.columns[1] - b.columns[0]) for b in tile.boxes if not b.woven)
                assert area == rows * columns or any(b.woven for b in tile.boxes)


def test_every_output_pattern_is_in_one_picture() -> None:
    for name, family in PLANS:
        plan = fixture_plan(name, family)
        drawn = [tile.name for picture in pictures(plan) for tile in picture.targets]
        first = {output.pattern: output.name for output in reversed(plan.outputs)}
        assert sorted(drawn) == sorted(first.values())


def origin(lookup: dict[str, Any], target: int, position: list[int]) -> tuple[str, str, list[int], int]:
    """What the page's script computes, in Python."""
    for source, to, here, there, axes in lookup["links"]:
        rest = [at - start for at, start in zip(position, there, strict=True)]
        index = list(here)
        inside = to == target
        for size, s, s_stride, t, t_stride in axes:
            step = rest[t] // t_stride
            inside = inside and 0 <= step < size
            rest[t] -= step * t_stride
            index[s] += step * s_stride
        if inside and not any(rest):
            file, name, offset, strides, item = lookup["sources"][source]
            return file, name, index, offset + item * sum(a * b for a, b in zip(index, strides, strict=True))
    raise AssertionError(f"{position} comes from nowhere")


@sampled(2)
@pytest.mark.parametrize(("name", "family"), [*PLANS, ("v2_tp2_pp2", "internlm2")])
def test_the_page_and_explain_say_the_same(name: str, family: str) -> None:
    plan = fixture_plan(name, family)
    for picture in pictures(plan):
        for index, (target, shape) in enumerate(picture.lookup["targets"]):
            for part in (0.0, 0.37, 0.81):
                position = [int(size * part) for size in shape]
                file, key, at, byte = origin(dict(picture.lookup), index, position)
                (flow,) = explain(plan, f"{target}{position}").tensors[0].flows
                assert (flow.source.file, flow.source.name, flow.source.slice) == (file, key, str(at))
                assert flow.byte_ranges[0][0] == byte


def test_without_scripts_the_page_is_complete_and_shows_no_dead_controls() -> None:
    page = Page(view_page(fixture_plan("v2_tp2_pp2", "internlm2")))
    shown = "".join(page.words)
    assert "groups 0…1, queries 0…1" in shown
    assert "w2_is_down" in shown
    for _, attributes in page.elements:
        if attributes.get("class") in ("asking", "searching"):
            assert "hidden" in attributes


def test_the_same_plan_gives_the_same_page() -> None:
    assert len({view_page(fixture_plan("v2_tp2_pp2", "internlm2")) for _ in range(2)}) == 1


# -- on the command line


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_command_writes_one_file_and_replaces_it_only_when_told(tmp_path: Path) -> None:
    out = tmp_path / "view.html"
    given = ("view", "-m", "families/internlm2.yaml", "-s", FIXTURES / "v2_tp2_pp2", "-o", out)
    done = invoke(*given)
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["view.html"]
    again = invoke(*given)
    assert again.exit_code == 1
    assert "E401" in again.stderr
    told = json.loads(invoke(*given, "--overwrite", "--json").stdout)
    assert told == {"out": str(out), "bytes": out.stat().st_size}


def test_no_page_is_written_where_its_picture_would_replace_another_file(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_text("keep")
    given = ("-s", FIXTURES / "v2_tp2_pp2", "-o", tmp_path / "view.html", "--png", tmp_path / "mine.png")
    done = invoke("view", "-m", "families/internlm2.yaml", *given)
    assert done.exit_code == 1 and "E401" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    done = invoke("view", "-m", "families/internlm2.yaml", "-s", FIXTURES / "v2_tp2_pp2", "-o", tmp_path / "no" / "x")
    assert done.exit_code == 1
    assert "E403" in done.stderr
