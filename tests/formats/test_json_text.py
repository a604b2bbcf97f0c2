"""JSON from outside is read to a depth that every function can follow, whichever Python reads it."""

from __future__ import annotations

import pytest

from engine.storage.json_text import parse_json


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_json_is_read_to_a_hundred_levels_whatever_the_python(opening: str, closing: str) -> None:
    levels = 100 // opening.count("[") if "{" not in opening else 100 // (1 + opening.count("["))
    parse_json((opening * levels + "1" + closing * levels).encode())
    for more in (levels + 1, 400, 9000, 200_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json((opening * more + "1" + closing * more).encode())


def test_levels_are_counted_one_inside_the_other_and_not_side_by_side() -> None:
    assert parse_json(b"[" * 100 + b"1" + b"]" * 99 + b",[],{}]")[1:] == [[], {}]
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(b"[" * 101 + b"1" + b"]" * 100 + b",[],{}]")
