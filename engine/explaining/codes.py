"""The meaning of each error and lint code, from the pages of `docs/codes`."""

from __future__ import annotations

import re
from difflib import get_close_matches

from engine.errors import EngineError
from engine.language.search import bundled


def is_code(text: str) -> bool:
    """
    >>> is_code("E203"), is_code("l001"), is_code("E203.weight")
    (True, True, False)
    """
    return re.fullmatch(r"[EL]\d{3}", text, re.I) is not None


def list_codes() -> dict[str, str]:
    """Every code with its title: errors first, then lint findings.

    >>> list_codes()["E203"]
    'sizes disagree'
    """
    pages = sorted((bundled("docs") / "codes").glob("*.md"))
    return {one.stem: one.read_text("utf-8").partition("\n")[0].removeprefix(f"# {one.stem}: ") for one in pages}


def explain_code(code: str) -> str:
    """The page of a code, as Markdown.

    >>> explain_code("E203").splitlines()[0]
    '# E203: sizes disagree'

    Raises:
        EngineError: E001 with similar codes.
    """
    known = list_codes()
    wanted = code.strip().upper()
    if wanted not in known:
        exchanged = [name for name in known if sorted(name) == sorted(wanted)]
        near = exchanged or get_close_matches(wanted, known, 3, 0.5)
        raise EngineError(
            "E001",
            f"there is no code `{code}`",
            got=code,
            expected=", ".join(near) if near else f"one of: {', '.join(known)}",
            fix=f"Did you mean `{near[0]}`?" if near else "A code is the first word of a message, such as E203.",
        )
    return (bundled("docs") / "codes" / f"{wanted}.md").read_text(encoding="utf-8")
