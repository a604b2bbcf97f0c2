"""What every bundled mapping means over every layout is committed; a change shows as a diff."""

from __future__ import annotations

from difflib import unified_diff

import pytest

from tests.support.snapshots import FOLDER, names, path_of, text_of

AGAIN = "run `make snapshots` and review what it changes"


@pytest.mark.parametrize("name", names())
def test_a_mapping_means_what_its_snapshot_says(name: str) -> None:
    path = path_of(name)
    assert path.is_file(), f"{path.name} is missing: {AGAIN}"
    then, now = path.read_text("utf-8"), text_of(name)
    if then != now:
        lines = unified_diff(then.splitlines(), now.splitlines(), "committed", "now", lineterm="", n=2)
        pytest.fail(f"{name} means something else: {AGAIN}\n" + "\n".join(list(lines)[:120]), pytrace=False)


def test_every_snapshot_is_of_a_bundled_mapping_and_stays_small() -> None:
    found = sorted(FOLDER.rglob("*.json"))
    assert found == sorted(map(path_of, names()))
    assert all(path.stat().st_size < 60_000 for path in found)
