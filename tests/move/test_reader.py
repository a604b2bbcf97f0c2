"""Any bytes of any output can be read from the source, and are those that a run writes."""

from __future__ import annotations

import random
from pathlib import Path
from unittest.mock import patch

import pytest
from safetensors import safe_open

import engine
from engine.move import blocks
from engine.move.blocks import output_blocks
from engine.move.reader import Reader, _Needs
from engine.storage.sources import SourceFiles
from tests.support.depth import sampled
from tests.support.readers import read_safetensors

FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"
CASES = [
    ("v1_tp2_pp2", "families/internlm.yaml", "auto"),
    ("v2_tp2_pp2", "families/internlm2.yaml", "float32"),
    ("v2_tp2_pp1_normhead", "families/internlm2.yaml", "bfloat16"),
    ("llama_tp2_pp1_default", "families/llama.yaml", "float16"),
]


@sampled(2)
@pytest.mark.parametrize(("folder", "mapping", "dtype"), CASES)
def test_random_ranges_are_the_bytes_of_a_run(folder: str, mapping: str, dtype: str, tmp_path: Path) -> None:
    engine.convert(mapping, FIXTURES / folder, tmp_path / "out", dtype=dtype)
    file = tmp_path / "out" / "model.safetensors"
    data, header = file.read_bytes(), read_safetensors(file)
    written = {one.name: data[one.offset : one.offset + one.nbytes] for one in header.tensors}
    plan = engine.plan(mapping, FIXTURES / folder, dtype=dtype)
    assert len(plan.outputs) == len(written) > 10
    draw = random.Random(folder)
    with SourceFiles(plan.files) as files:
        reader = Reader(plan, files)
        for _ in range(300):
            index = draw.randrange(len(plan.outputs))
            one = plan.outputs[index]
            start, stop = sorted(draw.randrange(one.nbytes + 1) for _ in range(2))
            buffer = bytearray(stop - start)
            reader.read_into(index, start, memoryview(buffer))
            assert buffer == written[one.name][start:stop], (one.name, start, stop)


def test_a_block_whose_buffer_another_output_took_is_computed_again() -> None:
    plan = engine.plan("families/internlm.yaml", FIXTURES / "v1_tp2_pp2", dtype="float32")
    with SourceFiles(plan.files) as files:
        reader = Reader(plan, files)

        def start_of(index: int) -> bytes:
            reader.read_into(index, 0, memoryview(data := bytearray(64)))
            return bytes(data)

        starts = [next(bytes(data[:64]) for _, data in reader.blocks(index)) for index in (0, 1)]  # the buffer grew
        assert start_of(0) == starts[0]
        assert next(bytes(data[:64]) for _, data in reader.blocks(1)) == starts[1] != starts[0] == start_of(0)


def test_bytes_beyond_an_output_are_no_bytes() -> None:
    plan = engine.plan("families/internlm.yaml", FIXTURES / "v1_tp2_pp2")
    with SourceFiles(plan.files) as files, pytest.raises(ValueError, match="bytes"):
        Reader(plan, files).read_into(0, plan.outputs[0].nbytes - 1, memoryview(bytearray(2)))


def test_tensors_that_are_handed_out_are_those_that_are_written(tmp_path: Path) -> None:
    folder, mapping, dtype = CASES[2]
    engine.convert(mapping, FIXTURES / folder, tmp_path / "out", dtype=dtype)
    with safe_open(str(tmp_path / "out" / "model.safetensors"), "pt") as file:
        names = set(file.keys())
        for name, tensor in engine.iter_tensors(engine.plan(mapping, FIXTURES / folder, dtype=dtype)):
            assert tensor.dtype == file.get_tensor(name).dtype and tensor.equal(file.get_tensor(name))
            names.remove(name)
    assert not names


def test_what_blocks_of_an_output_read_is_not_what_another_reads() -> None:
    plan = engine.plan("families/internlm.yaml", FIXTURES / "v1_tp2_pp2")
    needs, found = _Needs(plan), []
    for index, output in enumerate(plan.outputs):
        for block in output_blocks(output, plan.copies(index)):
            found += needs.of(index, block)
            assert sum(end - begin for _, (begin, end) in found) >= block.high - block.low
    assert len(set(found)) == len(found) >= len(plan.outputs)


def test_reading_piece_by_piece_computes_each_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1024)
    plan = engine.plan("families/internlm2.yaml", FIXTURES / "v2_tp2_pp2")
    for index, output in enumerate(plan.outputs):
        with SourceFiles(plan.files) as files:
            reader = Reader(plan, files)
            with patch.object(reader, "convert", wraps=reader.convert) as converts:
                for start in range(0, output.nbytes, 1100):
                    reader.read_into(index, start, memoryview(bytearray(min(1100, output.nbytes - start))))
        assert converts.call_count <= len(list(output_blocks(output, plan.copies(index)))), output.name
