"""The names that a web server's page of a folder links to: there is no other way to list one."""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

from engine.errors import EngineError, Place

_MOST = 16 << 20  # bytes of a page


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def linked_names(page: bytes, place: str) -> list[str]:
    """Names of what lies directly in the folder, sorted, folders with a slash; E304 when the page links to none.

    >>> linked_names(b'<a href="../">up</a> <a href="model_tp0_pp0.pt">x</a> <a href="a/">a</a>', "")
    ['a/', 'model_tp0_pp0.pt']
    """
    links = _Links()
    links.feed(page[:_MOST].decode("utf-8", "replace"))
    names: set[str] = set()
    for link in links.found:
        parts = urlsplit(link)
        name = unquote(parts.path).removeprefix("./")
        plain = name.removesuffix("/")
        if not parts.scheme and not parts.netloc and plain and "/" not in plain and plain != ".." and not parts.query:
            names.add(name)
    if not names:
        raise EngineError(
            "E304",
            "the server does not list this folder",
            place=Place(place),
            expected="a page that links to the files in it, as most servers of files give",
            fix="Give a weight file or its index instead, copy the folder, or use a server that lists it.",
        )
    return sorted(names)
