"""docs/clients.md is what `make clients` wrote of the clients as they are now; running them is left to it."""

from __future__ import annotations

from pathlib import Path

from engine import api
from tests.clients.__main__ import ABOUT, LIMITS, PAGE
from tests.clients.clients import NEWEST, OLDEST, VERSIONS, clients
from tests.clients.models import FAMILIES, FIXTURES, NARROW, texts

PROGRAMS = Path(__file__).parent / "programs"


def test_every_client_stands_in_the_table_with_its_version() -> None:
    page = PAGE.read_text()
    assert page.startswith(ABOUT) and page.endswith(LIMITS)
    rows = [line.split(" | ") for line in page[len(ABOUT) : -len(LIMITS)].splitlines()]
    known = [f"| {client.name}" for client in clients(official=True)]
    versions = [client.version for client in clients(official=True)]
    assert {tuple(row[:2]) for row in rows} == set(zip(known, versions, strict=True))


def test_the_oldest_and_newest_transformers_of_both_series_are_among_them() -> None:
    assert (VERSIONS[0], VERSIONS[-1]) == (NEWEST, OLDEST)
    fours, fives = ([version for version in VERSIONS if version.startswith(series)] for series in ("4.", "5."))
    assert len(fours) >= 3 and len(fives) >= 3


def test_every_program_is_run() -> None:
    assert {path.stem for path in PROGRAMS.glob("*.py")} == {client.program for client in clients(official=True)}


def test_the_texts_are_many_and_the_same_each_time() -> None:
    assert len(texts()) > 400 and texts() == texts()


def test_what_is_converted_has_a_row_for_each_piece_of_the_tokenizer() -> None:
    layout = api.load_layout("internevo")
    sources = [one for one in FIXTURES.iterdir() if any(key in one.name for key in FAMILIES)]
    narrow = [one.name for one in sources if api.read_checkpoint(one, layout).config["vocab_size"] < 256]
    assert len(sources) > 10 and sorted(narrow) == sorted(NARROW)
