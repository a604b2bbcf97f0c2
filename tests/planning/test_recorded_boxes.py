"""Shards that record which box of a tensor they hold: put together whatever file they lie in, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from engine.checkpoint.grid import read_grid
from engine.errors import EngineError
from engine.explaining.links import spots
from engine.formats.headers import FileHeader, Recorded, TensorHeader
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.planning.attempts import Checkpoint
from engine.planning.model import Plan
from engine.planning.planner import make_plan
from engine.planning.recorded import first_fault
from engine.storage.store import File
from engine.storage.virtual import VirtualStore
from tests.support.depth import examples

modest = settings(deadline=None, max_examples=examples(60), suppress_health_check=list(HealthCheck))
Box = tuple[tuple[int, int], ...]

LAYOUT = """layout: 1
name: boxes
version: 1.0.0
config: {file: config.json, format: json}
keys: {source: {"*": {noted: nothing}}}
prefixes: [{prefix: "module."}, {prefix: ""}]
layers: {stage: 0, uneven: last}
uneven: first
lone_rank: {}
modes:
  boxes:
    only_read: its tensors record which boxes they are
    files: [{name: "shard_{number}.bin", boxes: recorded}]
skip: []
refuse: []
"""

MAPPING = """mapping: 1
name: stacked
version: 1.0.0
description: A model whose layers and experts are stacked
source: {layout: boxes}
target: {model_type: llama, architecture: LlamaForCausalLM}
keys: {target: {"*": {noted: nothing}}}
dims: {layer: layers, queries: 2, k: 1, v: 1, head_dim: 4, gate: 1, up: 1, expert: experts}
rules:
  - {source: embedding.weight, target: model.embed.weight, axes: vocab hidden, stage: first}
  - name: qkv
    source: layers.qkv.{param}
    axes: layer (groups (queries + k + v) head_dim) | hidden
    targets:
      - {name: "model.layers.{layer}.q.{param}", axes: (groups queries head_dim) | hidden}
      - {name: "model.layers.{layer}.k.{param}", axes: (groups k head_dim) | hidden}
      - {name: "model.layers.{layer}.v.{param}", axes: (groups v head_dim) | hidden}
  - name: experts
    source: layers.experts.weight
    axes: layer expert ((gate + up) ffn) hidden
    targets:
      - {name: "model.layers.{layer}.experts.{expert}.gate.weight", axes: (gate ffn) hidden}
      - {name: "model.layers.{layer}.experts.{expert}.up.weight", axes: (up ffn) hidden}
  - {source: "layers.{layer}.norm.weight", target: "model.layers.{layer}.norm.weight", axes: hidden}
config: {architectures: [LlamaForCausalLM], model_type: llama, num_hidden_layers: "{{ layer }}"}
"""
LAYERS, GROUPS, EXPERTS, FFN, HIDDEN, VOCAB = 3, 2, 2, 3, 5, 7
SHAPES = {
    "embedding.weight": (VOCAB, HIDDEN),
    "layers.qkv.weight": (LAYERS, GROUPS * 4 * 4, HIDDEN),
    "layers.qkv.bias": (LAYERS, GROUPS * 4 * 4),
    "layers.experts.weight": (LAYERS, EXPERTS, 2 * FFN, HIDDEN),
    **{f"layers.{i}.norm.weight": (HIDDEN,) for i in range(LAYERS)},
}


def truth(whole: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the mapping means, by numpy alone."""
    result = {"model.embed.weight": whole["embedding.weight"]}
    for i in range(LAYERS):
        result[f"model.layers.{i}.norm.weight"] = whole[f"layers.{i}.norm.weight"]
        for param in ("weight", "bias"):
            grouped = whole[f"layers.qkv.{param}"][i].reshape(GROUPS, 4, 4, -1)
            for name, rows in (("q", grouped[:, :2]), ("k", grouped[:, 2]), ("v", grouped[:, 3])):
                flat = rows.reshape(-1, rows.shape[-1])
                result[f"model.layers.{i}.{name}.{param}"] = flat if param == "weight" else flat[:, 0]
        for e in range(EXPERTS):
            gate, up = np.split(whole["layers.experts.weight"][i, e], 2)
            result |= {f"model.layers.{i}.experts.{e}.gate.weight": gate}
            result |= {f"model.layers.{i}.experts.{e}.up.weight": up}
    return result


@st.composite
def partitions(draw: st.DrawFn, shape: Sequence[int]) -> list[Box]:
    """Boxes that make up a tensor: cut again and again anywhere, some of them to nothing, in any order."""
    boxes: list[Box] = [tuple((0, n) for n in shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(*box[dim]))
        boxes += [(*box[:dim], (box[dim][0], at), *box[dim + 1 :]), (*box[:dim], (at, box[dim][1]), *box[dim + 1 :])]
    return draw(st.permutations(boxes))


def cells(box: Box) -> set[tuple[int, ...]]:
    return set(product(*(range(low, high) for low, high in box)))


@given(st.data())
@modest
def test_the_first_fault_is_the_first_element_that_not_one_box_holds(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    boxes = [box for box in data.draw(partitions(shape)) if cells(box)]
    assert first_fault(boxes, shape) is None
    change = data.draw(st.sampled_from(["lost", "twice", "moved"]))
    index = data.draw(st.integers(0, len(boxes) - 1))
    changed = [*boxes[:index], *boxes[index + 1 :]]
    if change == "twice":
        changed = [*boxes, data.draw(st.sampled_from(boxes))]
    elif change == "moved":
        low = [data.draw(st.integers(0, n - 1)) for n in shape]
        changed.append(tuple((a, data.draw(st.integers(a + 1, n))) for a, n in zip(low, shape, strict=True)))
    count = np.zeros(shape, int)
    for box in changed:
        count[tuple(slice(*side) for side in box)] += 1
    wrong = sorted(map(tuple, np.argwhere(count != 1).tolist()))
    fault = first_fault(changed, shape)
    assert (fault is None) == (not wrong)
    if fault is not None:
        at = tuple(low for low, _ in fault[0])
        assert at == wrong[0]
        assert len(fault[1]) == min(2, count[at])
        assert all(at in cells(box) for box in fault[1])


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mappings")
    (folder / "layouts").mkdir()
    (folder / "layouts" / "boxes.yaml").write_text(LAYOUT, encoding="utf-8")
    (folder / "stacked.yaml").write_text(MAPPING, encoding="utf-8")
    return load_mapping(str(folder / "stacked.yaml")), load_layout(str(folder / "layouts" / "boxes.yaml"))


class Files:
    """Files of shards in memory: what a reader would tell of them, and their elements."""

    def __init__(self, count: int) -> None:
        self.tensors: list[list[TensorHeader]] = [[] for _ in range(count)]
        self.data: dict[tuple[int, int], np.ndarray] = {}

    def put(self, file: int, name: str, whole: np.ndarray, box: Box, *, columns: bool = False) -> None:
        part = whole[tuple(slice(*side) for side in box)].copy(order="F" if columns else "C")
        strides = tuple(step // whole.itemsize for step in part.strides)
        place = Recorded(tuple(low for low, _ in box), whole.shape)
        self.data[file, len(self.tensors[file])] = part
        self.tensors[file].append(TensorHeader(name, "F32", part.shape, strides, len(self.tensors[file]), place))

    def checkpoint(self, layout: Any) -> Checkpoint:
        names = [f"shard_{i}.bin" for i in range(len(self.tensors))]
        grid = read_grid([*names, "config.json"], layout, "step")
        headers = {
            f"shard_{i}.bin": FileHeader(File(VirtualStore("memory"), f"shard_{i}.bin"), 0, tuple(held), str(i))
            for i, held in enumerate(self.tensors)
        }
        config = {"layers": LAYERS, "experts": EXPERTS}
        return Checkpoint("step", grid, tuple(headers[f.name] for f in grid.files), config, {}, "config.json")

    def run(self, plan: Plan) -> dict[str, np.ndarray]:
        """Every output, filled by its copies: one strided assignment each."""
        result: dict[str, np.ndarray] = {}
        for index, output in enumerate(plan.outputs):
            target = np.full(prod(output.shape), np.nan, np.float32)
            for copy in plan.copies(index):
                one = plan.sources[copy.source]
                number = int(plan.files[one.file].name.removesuffix(".bin").split("_")[1])
                flat = self.data[number, one.header.offset].ravel(order="K")
                steps = [4 * step for step in copy.source_strides], [4 * step for step in copy.target_strides]
                as_strided(target[copy.target_offset :], copy.shape, steps[1])[...] = as_strided(
                    flat[copy.source_offset :], copy.shape, steps[0]
                )
            result[output.name] = target.reshape(output.shape)
        return result


def wholes(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.random(shape, np.float32) for name, shape in SHAPES.items()}


@given(st.data())
@modest
def test_boxes_of_any_sizes_in_any_files_are_put_together(rules: Any, data: st.DataObject) -> None:
    mapping, layout = rules
    tensors, files = wholes(), Files(data.draw(st.integers(1, 4)))
    for name, whole in tensors.items():
        for box in data.draw(partitions(whole.shape)):
            for _ in range(data.draw(st.sampled_from([1, 1, 2]))):  # replicas
                file = data.draw(st.integers(0, len(files.tensors) - 1))
                files.put(file, name, whole, box, columns=data.draw(st.booleans()))
    plan = make_plan(mapping, layout, files.checkpoint(layout))
    got, wanted = files.run(plan), truth(tensors)
    assert sorted(got) == sorted(wanted)
    for name, array in wanted.items():
        assert np.array_equal(got[name], array), name
    assert plan.sizes["layer"] == plan.stages.layers == LAYERS
    shared = sum(len(one.sources) for one in plan.replicas)
    boxes = {(t.name, t.starts, t.shape) for held in files.tensors for t in held if prod(t.shape)}
    assert sum(len(g.shards) for g in plan.copies.source.groups) == len(boxes)
    assert (shared > 0) == (len(boxes) < sum(bool(prod(t.shape)) for held in files.tensors for t in held))


def one_file_each(tensors: Mapping[str, np.ndarray]) -> Files:
    files = Files(2)
    for name, whole in tensors.items():
        middle = whole.shape[-1] // 2
        for file, last in enumerate(((0, middle), (middle, whole.shape[-1]))):
            files.put(file, name, whole, (*((0, n) for n in whole.shape[:-1]), last))
    return files


def refusal(files: Files, rules: Any) -> EngineError:
    with pytest.raises(EngineError) as caught:
        make_plan(rules[0], rules[1], files.checkpoint(rules[1]))
    return caught.value


def test_a_hole_is_refused_and_named(rules: Any) -> None:
    files = one_file_each(wholes())
    files.tensors[1] = [t for t in files.tensors[1] if t.name != "layers.experts.weight"]
    error = refusal(files, rules)
    assert error.code == "E208"
    assert "[0:1, 0:1, 0:1, 2:5]" in str(error) or "[0:3, 0:2, 0:6, 2:5]" in str(error)
    assert "layers.experts.weight" in str(error)


def test_an_overlap_is_refused_and_both_files_are_named(rules: Any) -> None:
    tensors = wholes()
    files = one_file_each(tensors)
    files.put(0, "embedding.weight", tensors["embedding.weight"], ((2, 3), (1, 4)))
    error = refusal(files, rules)
    assert error.code == "E208"
    assert "[2:3, 1:2]" in str(error)
    assert "shard_0.bin" in str(error)


@pytest.mark.parametrize("box", [((5, 8), (0, 5)), ((0, 7), (-1, 4))])
def test_a_box_out_of_its_tensor_is_refused(box: Box, rules: Any) -> None:
    files = one_file_each(wholes())
    part = Recorded(tuple(low for low, _ in box), (VOCAB, HIDDEN))
    shape = tuple(high - low for low, high in box)
    files.tensors[0].append(TensorHeader("embedding.weight", "F32", shape, (5, 1), 0, part))
    assert refusal(files, rules).code == "E208"


def test_shards_that_record_other_wholes_are_refused(rules: Any) -> None:
    files = one_file_each(wholes())
    part = Recorded((0, 0), (VOCAB + 1, HIDDEN))
    files.tensors[1].append(TensorHeader("embedding.weight", "F32", (1, 5), (5, 1), 0, part))
    error = refusal(files, rules)
    assert error.code == "E208"
    assert "7 × 5" in str(error)
    assert "8 × 5" in str(error)


def test_boxes_that_cross_each_other_without_end_are_refused_in_time() -> None:
    many = 6000
    boxes = [((i, many + i), (i, i + 1)) for i in range(many)]
    assert first_fault(boxes, (2 * many, many)) is not None


def test_a_grid_of_many_boxes_is_looked_at_quickly(rules: Any) -> None:
    files = Files(4)
    tensors = wholes()
    for name, whole in tensors.items():
        for number, at in enumerate(np.ndindex(*whole.shape)):
            files.put(number % 4, name, whole, tuple((i, i + 1) for i in at))
    plan = make_plan(rules[0], rules[1], files.checkpoint(rules[1]))
    got = files.run(plan)
    assert all(np.array_equal(got[name], array) for name, array in truth(tensors).items())


def test_where_a_box_lies_is_told_with_its_axes(rules: Any) -> None:
    plan = make_plan(rules[0], rules[1], one_file_each(wholes()).checkpoint(rules[1]))
    source = plan.copies.source
    group = next(g for g in source.groups if g.name == "layers.experts.weight")
    second = source.shards(group)[1]
    (gate, up) = spots(source, group, second)
    assert gate.box == {"layer": (0, 3), "expert": (0, 2), "gate": (0, 1), "ffn": (0, 3), "hidden": (2, 5)}
    assert up.dims[3].base == -2


@pytest.mark.parametrize(("held", "code"), [(3, "E203"), (1, "E207")])
def test_names_that_count_more_or_fewer_than_the_configuration_says_are_refused(
    held: int, code: str, tmp_path: Path
) -> None:
    (tmp_path / "layouts").mkdir()
    (tmp_path / "layouts" / "boxes.yaml").write_text(LAYOUT, encoding="utf-8")
    text = MAPPING[: MAPPING.index("rules:")] + (
        "rules:\n"
        '  - {source: "expert.{expert}.weight", target: "out.{expert}.weight", axes: ffn hidden, stage: first}\n'
        "config: {architectures: [LlamaForCausalLM], model_type: llama}\n"
    )
    (tmp_path / "named.yaml").write_text(text, encoding="utf-8")
    layout = load_layout(str(tmp_path / "layouts" / "boxes.yaml"))
    files = Files(1)
    for expert in range(held):
        files.put(0, f"expert.{expert}.weight", np.zeros((FFN, HIDDEN), np.float32), ((0, FFN), (0, HIDDEN)))
    with pytest.raises(EngineError) as caught:
        make_plan(load_mapping(str(tmp_path / "named.yaml")), layout, files.checkpoint(layout))
    assert caught.value.code == code
    assert "expert" in str(caught.value)
