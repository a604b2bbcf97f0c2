"""`make test` tries a sample of each kind, and `make soak` all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.depth import ALONE, in_sample, sampled

ROOT = Path(__file__).parents[1]


def rows(test: str, mark: Any, *columns: dict[str, Any]) -> list[Any]:
    def marker(name: str) -> Any:
        return mark.mark if mark is not None and mark.mark.name == name else None

    return [
        SimpleNamespace(nodeid=f"{test}[{number}]", callspec=SimpleNamespace(params=row), get_closest_marker=marker)
        for number, row in enumerate(columns)
    ]


def test_of_every_kind_the_first_row_is_tried_and_then_one_of_so_many() -> None:
    attacks = [SimpleNamespace(codes=code) for code in ("E1", "E1", "E2", "E1", "E3", "E2")]
    columns = [{"attack": attack, "number": number} for number, attack in enumerate(attacks)]
    items = [
        *rows("a", sampled(2, "attack.codes"), *columns),
        *rows("b", sampled(3), *columns),
        *rows("c", sampled(9, lambda row: row["number"] > 4), *columns),
        *rows("d", None, *columns),
    ]
    chosen, left = in_sample(items, whole=False)
    assert [item.nodeid for item in chosen] == [
        "a[0]", "a[2]", "a[3]", "a[4]", "b[0]", "b[3]", "c[0]", "c[5]", *(f"d[{number}]" for number in range(6))
    ]  # fmt: skip
    assert sorted(id(item) for item in chosen + left) == sorted(map(id, items))
    assert in_sample(items, whole=True) == (items, [])


def test_every_row_that_is_always_tried_is_of_a_test_that_is_sampled() -> None:
    for row in ALONE:
        file, _, name = row.partition("::")
        before = (ROOT / file).read_text(encoding="utf-8").partition(f"def {name.partition('[')[0]}(")
        assert before[1] and "@sampled(" in before[0].rpartition("\ndef ")[2], row
