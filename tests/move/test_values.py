"""Casts, held against torch's on every number of 16 bits."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import EngineError
from engine.move.tensors import Tensors, unlike
from engine.move.values import Converter, normalize
from engine.planning.model import Output
from tests.support.readers import read_safetensors

KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@pytest.mark.parametrize(("read", "wanted"), [*product(("BF16", "F16"), ("BF16", "F32", "F64"))])
def test_every_number_becomes_what_torch_makes_of_it(read: str, wanted: str) -> None:
    bits = torch.arange(1 << 16).to(torch.uint16)
    output = Output("w", wanted, read, (1 << 16,), "rule", "", "w")
    given = bits.view(KINDS[read])
    data = Converter().convert(output, memoryview(bits.numpy()).cast("B"))
    found, expected = torch.frombuffer(bytearray(data), dtype=KINDS[wanted]), given.to(KINDS[wanted])
    numbers = ~expected.isnan()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[numbers].view(torch.uint8), expected[numbers].view(torch.uint8))


def test_one_is_added_in_float32_and_taken_off_again() -> None:
    """To every number of 16 bits: the sum is torch's, and gives the number back where float32 holds the sum."""
    bits = torch.arange(1 << 16).to(torch.uint16)
    given = bits.view(torch.bfloat16)
    add, back = (
        Output("w", wanted, read, (1 << 16,), "rule", "", "w", ("add", number), 0)
        for wanted, read, number in (("F32", "BF16", "1"), ("BF16", "F32", "-1"))
    )
    data = bytes(Converter().convert(add, memoryview(bits.numpy()).cast("B")))
    found = torch.frombuffer(bytearray(data), dtype=torch.float32)
    again = torch.frombuffer(bytearray(Converter().convert(back, memoryview(data))), dtype=torch.bfloat16)
    held = (given.abs() >= 2.0**-16) & (given.abs() < 2.0**16)
    assert torch.equal(found[held], given[held].float() + 1)
    assert torch.equal(again[held], given[held])


def test_a_nan_differs_from_a_number_of_another_type_but_not_from_a_nan() -> None:
    nan = float("nan")
    one = torch.tensor([nan, nan, 1, 1], dtype=torch.bfloat16).view(torch.uint16).numpy()
    two = torch.tensor([-nan, 1, nan, 1], dtype=torch.float32).view(torch.uint32).numpy()
    for kind in ("F32", "BF16"):
        assert unlike(one, "BF16", two, "F32", kind).tolist() == [False, True, True, False]


def test_what_is_read_of_two_tensors_is_each_s_own_and_of_a_turned_one_turned(tmp_path: Path) -> None:
    one, two = torch.arange(9.0).view(3, 3), torch.arange(9.0, 18.0).view(3, 3)
    save_file({"one": one, "two": two}, tmp_path / "a.safetensors")
    box = ((0, 3), (0, 3))
    with Tensors([read_safetensors(tmp_path / "a.safetensors")]) as tensors:
        here, there = (tensors.sides[0][name] for name in ("one", "two"))
        x, y = tensors.read(here, box), tensors.read(there, box, 1)
        assert x.view("f4").tolist() == one.flatten().tolist() and y.view("f4").tolist() == two.flatten().tolist()
        assert tensors.values(here.swap(0, 1), box).tolist() == one.t().tolist()


@pytest.mark.parametrize("wanted", ["F16", "BF16", "F32"])
def test_a_tensor_without_elements_is_cast_to_one_without(wanted: str) -> None:
    output = Output("w", wanted, "F64", (0, 4), "rule", "", "w")
    assert bytes(Converter().convert(output, memoryview(b""))) == b""


@pytest.mark.parametrize("transform", [None, ("normalize", "hidden"), ("add", "1")])
def test_a_number_beyond_what_it_is_computed_or_written_in_is_refused(transform: tuple[str, str] | None) -> None:
    output = Output("w", "F32", "F64", (1, 2), "rule", "", "w", transform, 1)
    given = torch.tensor([[1e300, 1.0]], dtype=torch.float64)
    with pytest.raises(EngineError, match="does not fit float32") as caught:
        Converter().convert(output, memoryview(given.numpy()).cast("B"))
    assert caught.value.code == "E406"


def test_a_sum_beyond_the_type_that_is_read_and_written_is_refused() -> None:
    output = Output("w", "F16", "F16", (1,), "rule", "", "w", ("add", "32"), 0)
    with pytest.raises(EngineError, match="E406 `w` does not fit float16"):
        Converter().convert(output, memoryview(torch.tensor([65504.0]).half().numpy()).cast("B"))


def test_rows_of_tiny_numbers_are_normalised_as_torch_does() -> None:
    """Rows shorter than 1e-12 alone do not get length 1."""
    rows = torch.tensor([[3.0, 4.0]]) * torch.tensor([[1.0], [1e-8], [1e-11], [1e-13]])
    found = torch.from_numpy(normalize(rows.numpy()))
    torch.testing.assert_close(found, torch.nn.functional.normalize(rows), rtol=1e-6, atol=0)
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1, 1, 0.5], rel=1e-3)
