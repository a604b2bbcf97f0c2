"""Tensors larger than a block: whatever the block size, the bytes are the same.

Test models are far smaller than a block of half a MiB, so blocks are made tiny here; one test has
tensors of several real blocks.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import engine
from engine.errors import EngineError
from engine.formats.headers import TensorHeader
from engine.move import blocks as cutting
from engine.move import moves, runs
from engine.move.blocks import Block, block_bytes, blocks, largest_block
from engine.move.moves import Moves, Scatterer
from engine.planning.boxes import Copy
from engine.planning.model import Output
from engine.planning.stored import Stored
from engine.run import replicas as comparing
from engine.run import schedule as scheduling
from engine.run.schedule import _scatters, schedule
from tests.support.cases import cases, layouts_of, rank_files, request, same_files, writable_cases
from tests.support.depth import SOAK, crossed, deep, examples, sampled
from tests.support.shards import Model, State, same, save

LETTERS = {"mlp_letters": "w2_is_down"}
common = settings(deadline=None, max_examples=examples(60), suppress_health_check=list(HealthCheck))


def written(model: Model, source: Path, out: Path, **options: Any) -> State:
    engine.convert(model.mapping, source, out, settings={"mlp_letters": model.letters}, **options)
    state: State = {}
    for file in sorted(out.glob("*.safetensors")):
        state |= load_file(file)
    return state


def blocks_of(nbytes: int, row: int = 2048) -> Any:
    """Blocks of at most `nbytes`, for writing and for comparing replicas; rows of so many bytes move by themselves."""
    runner = mock.patch.multiple(cutting, BLOCK_BYTES=nbytes, LARGE_BLOCK_BYTES=nbytes)
    replicas = mock.patch.object(comparing, "BLOCK_BYTES", nbytes)
    through = (
        mock.patch.multiple(moves, READ_THROUGH=8),
        mock.patch.object(scheduling, "READ_THROUGH", 8),
    )
    return runner, replicas, *through, mock.patch.multiple(runs, LEAST_ROW=row, FEW_ROWS=0)


def little_at_a_time(nbytes: int) -> Any:
    """A system that reads and writes at most `nbytes` in one call, wherever in the buffers that ends."""
    preadv, pwritev = os.preadv, os.pwritev

    def first(parts: Any) -> list[memoryview]:
        left, taken = nbytes, []
        for part in map(memoryview, parts):
            taken.append(part[: max(left, 0)])
            left -= len(part)
        return taken

    return mock.patch.multiple(
        os,
        preadv=lambda descriptor, parts, at: preadv(descriptor, first(parts), at),
        pwritev=lambda descriptor, parts, at: pwritev(descriptor, first(parts), at),
    )


@contextmanager
def all_of(patches: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


@common
@given(cases(), st.sampled_from([8, 16, 24, 40, 64, 136, 520]), st.sampled_from([1, 8, 2048]))
def test_tiny_blocks_write_the_unsharded_truth(case: tuple[Model, dict[str, Any]], nbytes: int, row: int) -> None:
    model, layout = case
    every = blocks_of(nbytes, row)
    with tempfile.TemporaryDirectory() as folder, all_of(every):
        expected = save(model, Path(folder) / "step", **layout)
        same(written(model, Path(folder) / "step", Path(folder) / "hf"), expected)


@sampled(2)
@pytest.mark.parametrize(("rotary", "row"), crossed(["halves", "pairs"], [1, 2048]))
def test_a_system_that_moves_little_at_a_time_changes_no_byte(rotary: str, row: int, tmp_path: Path) -> None:
    model = Model("v2", hidden=24, heads=6, groups=3, ffn=40, rotary=rotary)
    expected = save(model, tmp_path / "step", tp=3)
    save(model, tmp_path / "genuine", tp=3)
    with all_of((*blocks_of(200, row), little_at_a_time(7))):
        same(written(model, tmp_path / "step", tmp_path / "hf"), expected)
        engine.reverse(model.mapping, tmp_path / "hf", tmp_path / "back", like=tmp_path / "genuine", settings=LETTERS)
    same_files(rank_files(tmp_path / "back"), rank_files(tmp_path / "genuine"))


@sampled(2)
@pytest.mark.parametrize(("nbytes", "dtype"), crossed([8, 64, 200], ["float32", "float16", "bfloat16"]))
def test_tiny_blocks_cast_and_normalise_alike(nbytes: int, dtype: str, tmp_path: Path) -> None:
    model = Model("v2", hidden=24, heads=6, groups=3, ffn=40, head="normalised", rotary="pairs")
    expected = save(model, tmp_path / "step", tp=3, pp=2)
    whole = written(model, tmp_path / "step", tmp_path / "whole", dtype=dtype)
    every = blocks_of(nbytes)
    with all_of(every):
        same(written(model, tmp_path / "step", tmp_path / "tiny", dtype=dtype), whole)
    kind = getattr(torch, dtype)
    cast = {name: t.to(kind) for name, t in expected.items() if name != "lm_head.weight"}
    same({name: t for name, t in whole.items() if name != "lm_head.weight"}, cast)


def test_replicas_that_differ_in_a_late_block_are_found(tmp_path: Path) -> None:
    model = Model(layers=2)
    save(model, tmp_path / "step", tp=2)
    path = tmp_path / "step" / "model_tp1_pp0.pt"
    state = {name: t.clone() for name, t in torch.load(path, weights_only=True).items()}
    state["norm.weight"][-1] += 1
    torch.save(state, path)
    every = blocks_of(8)
    with all_of(every), pytest.raises(EngineError) as caught:
        engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf", settings=LETTERS)
    assert caught.value.code == "E402"
    assert "1 of 16 elements" in str(caught.value)


@sampled(2)
@pytest.mark.parametrize(
    ("layout", "rotary"),
    crossed([{"tp": 4}, {"mode": "isp_wp", "wp": 3}, {"tp": 2, "pp": 2, "chunks": 2}], ["halves", "pairs"]),
)
def test_tensors_of_several_real_blocks_are_exact(layout: dict[str, Any], rotary: str, tmp_path: Path) -> None:
    model = Model("v2", layers=4, hidden=512, heads=8, groups=4, ffn=1408, vocab=1000, bias=False, rotary=rotary)
    expected = save(model, tmp_path / "step", **layout)
    assert max(t.nbytes for t in expected.values()) > 2 * 512 * 1024
    same(written(model, tmp_path / "step", tmp_path / "hf"), expected)
    wide = written(model, tmp_path / "step", tmp_path / "wide", dtype="float32", max_shard_size=5_000_000, workers=2)
    same(wide, {name: t.float() for name, t in expected.items()})


def test_rows_shorter_than_one_are_normalised_too(tmp_path: Path) -> None:
    """Scaling by max(length, 1) instead of the length would leave short rows short."""
    model = replace(Model("v2", hidden=24, heads=6, groups=3, ffn=40, head="normalised"), dtype=torch.float32)
    save(model, tmp_path / "step", tp=1)
    path = tmp_path / "step" / "model_tp0_pp0.pt"
    state = {name: t.clone() for name, t in torch.load(path, weights_only=True).items()}
    state["output.weight"] *= 1e-3
    state["output.weight"][5] = 0
    torch.save(state, path)
    lengths = written(model, tmp_path / "step", tmp_path / "hf")["lm_head.weight"].norm(dim=1)
    assert lengths[5] == 0
    torch.testing.assert_close(lengths[lengths != 0], torch.ones(model.vocab - 1))


@settings(deadline=None, max_examples=examples(27), suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from([8, 24, 64, 136, 520]), st.sampled_from([1, 8, 2048]))
def test_tiny_blocks_write_the_rank_files_that_training_would_have_written(
    data: st.DataObject, nbytes: int, row: int
) -> None:
    model, layout = data.draw(writable_cases())
    other = data.draw(layouts_of(model))
    letters = {"mlp_letters": model.letters}
    with tempfile.TemporaryDirectory() as name, all_of(blocks_of(nbytes, row)):
        folder = Path(name)
        save(model, folder / "a", **layout | {"wrapped": False})
        save(model, folder / "b", **other)
        asked = request(other)
        asked["settings"] |= letters
        engine.reshard(model.mapping, folder / "a", folder / "again", **asked)
        same_files(rank_files(folder / "again"), rank_files(folder / "b"))
        engine.convert(model.mapping, folder / "a", folder / "hf", settings=letters)
        engine.reverse(model.mapping, folder / "hf", folder / "back", like=folder / "b", **{"settings": letters})
        same_files(rank_files(folder / "back"), rank_files(folder / "b"))
        for path in (folder / "back").glob("model_*.pt"):
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None


@deep
def test_columns_cut_into_many_ranks_are_scattered_and_come_out_right(tmp_path: Path) -> None:
    """Real block sizes: rows of 16 KiB cut into 16 ranks would be read sixteen times over by gathering."""
    model = Model("v2", layers=2, hidden=512, heads=16, groups=16, ffn=8192, vocab=64, bias=False)
    expected = save(model, tmp_path / "whole")
    engine.convert(model.mapping, tmp_path / "whole", tmp_path / "hf", settings=LETTERS)
    plan = engine.plan_reverse(model.mapping, tmp_path / "hf", tp=16)
    assert any(unit.scattered for job in schedule(plan) for unit in job.units)
    save(model, tmp_path / "genuine", tp=16)
    genuine = rank_files(tmp_path / "genuine")
    for workers in (1, 5) if SOAK else (5,):
        engine.reverse(model.mapping, tmp_path / "hf", tmp_path / "back", tp=16, workers=workers, overwrite=True)
        same_files(rank_files(tmp_path / "back"), genuine)
    same(dict(engine.iter_tensors(engine.plan(model.mapping, tmp_path / "back", settings=LETTERS))), expected)


@pytest.mark.parametrize("count", [1, 20])
def test_blocks_stay_within_what_memory_is_predicted_for(count: int) -> None:
    """Rows that interleave stay together, though not beyond the largest block; scratch is taken once."""
    rows = 1 << 10
    copies = [
        Copy(i, 0, 0, i * rows * 2048, (2, rows // 2, 2048), (2048, 4096, 1), (rows * 1024, 2048, 1))
        for i in range(count)
    ]
    limit, most = block_bytes(count) // 2, largest_block(2)
    found = list(blocks(copies, count * rows * 2048, limit, most=most))
    assert max(block.high - block.low for block in found) <= most
    together = [
        Copy(i, 0, 0, i * 256 * 2048, (2, 128, 2048), (2048, 4096, 1), (128 * 2048, 2048, 1)) for i in range(count)
    ]
    assert len(list(blocks(together, count * 256 * 2048, limit, most=most))) == count


def test_scratch_is_as_large_as_the_largest_run_needs() -> None:
    parts = tuple(Copy(i, 0, 0, i * 4096, (512 << i, 2), (4, 1), (16, 1)) for i in range(3))
    moves = Moves(8192).of(Block(0, 1 << 16, parts, (0, 0, 0), 0), 2)
    buffers = {id(part.obj): len(part.obj) for move in moves for part in move.parts}
    assert sorted(buffers.values()) == [(2048 - 1) * 8 + 4]


def test_moves_are_of_the_size_of_an_element_and_the_template_that_are_asked_for() -> None:
    moves = Moves(0)
    for count, item in [(4, 4), (4, 2), (2, 2), (4, 2)]:
        one = Block(0, count, (Copy(0, 0, 0, 0, (count,), (1,), (1,)),), (0,), 0)
        for size in (item, item, 1, item):
            assert [part.nbytes for move in moves.of(one, size) for part in move.parts] == [count * size]


@pytest.mark.parametrize("strides", [(100, 10, 1), (10, 50, 2), (1, 2, 10)], ids=str)
def test_scattering_writes_no_byte_between_its_runs(strides: tuple[int, int, int]) -> None:
    """The output holds what another source fills there."""
    given, out = torch.arange(24, dtype=torch.uint8), torch.full((200,), 255, dtype=torch.uint8)
    expected = out.clone()
    expected.as_strided((2, 3, 4), strides).copy_(given.view(2, 3, 4))

    def write(output: int, at: int, parts: Sequence[memoryview]) -> None:
        data = torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)
        out[at : at + len(data)] = data

    files: Any = SimpleNamespace(read_into=lambda _, at, parts: parts[0].__setitem__(slice(None), given.numpy().data))
    source = Stored(0, TensorHeader("w", "U8", (24,), (1,), 0), "w")
    Scatterer(files, [source], write).scatter(
        0, Block(0, 24, (Copy(0, 0, 0, 0, (2, 3, 4), strides, (12, 4, 1)),), (0,), 0)
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("columns", "strides", "dtype", "scattered"),
    [
        ([0, 1], (64, 1), "F32", True),
        ([0, 1, 1], (64, 1), "F32", False),
        ([0], (64, 1), "F32", False),
        ([0, 1], (1, 4096), "F32", False),
        ([0, 1], (64, 1), "F16", False),
    ],
    ids=["each column once", "some twice", "some not", "a transposed view", "a cast"],
)
def test_only_a_dense_tensor_whose_elements_each_go_to_one_place_is_scattered(
    columns: list[int], strides: tuple[int, int], dtype: str, scattered: bool
) -> None:
    source = SimpleNamespace(header=TensorHeader("w", "F32", (4096, 64), strides, 0))
    outputs = [Output("w", dtype, "F32", (4096, 32), "rule", "", "w") for _ in columns]
    copies = [Copy(0, to, 32 * at, 0, (4096, 32), (64, 1), (32, 1)) for to, at in enumerate(columns)]
    plan: Any = SimpleNamespace(sources=[source], outputs=outputs)
    assert _scatters(plan, range(len(columns)), copies) == scattered
