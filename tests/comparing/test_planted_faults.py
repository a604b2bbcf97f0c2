"""Faults planted in genuine checkpoints: `compare` names each, and names none that is not there."""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine import api
from tests.support.depth import deep, examples, sampled
from tests.support.planted import FAULTS, SOURCES, Fault, convert, row, settings_table, told_of

PAGE = Path(__file__).parents[2] / "docs" / "compare-faults.md"


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("references")
    return {source: convert(source, folder / source) for source in SOURCES}


@sampled(12, "fault.kind")
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.what for fault in FAULTS])
def test_a_planted_fault_is_named_and_the_page_says_so(
    fault: Fault, references: dict[str, Path], tmp_path: Path
) -> None:
    """`python -m tests.support.planted docs/compare-faults.md` writes the page anew."""
    kind, note, means = told_of(fault, references[fault.source], tmp_path / "out")
    assert kind == fault.kind, (note, means)
    for word in fault.words:
        assert word in f"{note} · {means}"
    assert f"\n{row(fault, kind, note, means)}\n" in PAGE.read_text(encoding="utf-8")


def test_the_page_has_every_planted_fault_and_setting_and_no_other(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    faults, _, rest = page.partition("\n## Settings\n")
    rows = faults.partition("| fault |")[2].splitlines()[2:]
    assert [line.split(" | ")[0] for line in rows if line] == [f"| {fault.what}" for fault in FAULTS]
    assert "| no |" not in page and settings_table(tmp_path) in rest


SHAPES = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
)


@settings(max_examples=examples(150), deadline=None)
@given(SHAPES, st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(0, 2**20), st.booleans())
def test_random_tensors_are_different_and_nothing_else(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, norm: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as made:
        _random_tensors(Path(made), shape, dtype, generator, norm)


def _random_tensors(
    folder: Path, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, norm: bool
) -> None:
    for side in ("out", "ref"):
        (folder / side).mkdir()
        state = {
            name: (torch.randn(shape, generator=generator) * 0.1 + norm).to(dtype)
            for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.norm.weight")
        }
        save_file(state, folder / side / "model.safetensors")
    done = api.compare(folder / "out", folder / "ref")
    small = torch.Size(shape).numel() < 8
    for found in done.verdicts:
        named = found.kind == "different" and (not found.note or found.note.startswith("close"))
        few = found.kind in ("equal", "changed") or small
        assert named or few, found


@pytest.mark.parametrize("kind", [pytest.param("different", marks=deep), "permuted"])
def test_a_search_in_large_tensors_takes_little_memory_and_time(kind: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(4096, 2048, generator=generator)
    another = torch.randn(4096, 2048, generator=generator)  # of one generator, or a shift of the first may come out
    two = one[torch.randperm(4096, generator=generator)] if kind == "permuted" else another
    save_file({"a.weight": one}, tmp_path / "one.safetensors")
    save_file({"a.weight": two.contiguous()}, tmp_path / "two.safetensors")
    del one, two, another
    tracemalloc.start()
    start = time.process_time()
    try:
        done = api.compare(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert done.verdicts[0].kind == kind
    assert peak < 24 << 20  # of 32 MiB
    assert time.process_time() - start < 10
