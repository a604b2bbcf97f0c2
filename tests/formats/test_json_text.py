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
