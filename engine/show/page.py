"""The HTML view: one self-contained page that shows what a plan does. It loads nothing and sends nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from engine.assets.model_card import environment
from engine.errors import counted, span, visible
from engine.explaining.describe import describe_plan
from engine.planning.given import amount
from engine.planning.model import Plan
from engine.show.pictures import flat_shape, pictures
from engine.show.text import times

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "templates"


def view_page(plan: Plan) -> str:
    """The page: summary, table of rules, a picture of every rule.

    Names of tensors, files and folders are untrusted: the template escapes all of them, data for the
    script is JSON without `<`, and a Content-Security-Policy allows nothing but this style and script.
    """
    style, script = ((TEMPLATES / name).read_text("utf-8") for name in ("view.css", "view.js"))
    drawn = pictures(plan)
    page = template(TEMPLATES / "view.html.j2").render(
        facts=describe_plan(plan),
        description=plan.mapping.description,
        pictures=drawn,
        stages=plan.stages,
        places=sorted({stage[1:] for stage in plan.stages.counts}),
        config=json.dumps(dict(plan.config), indent=2, default=str, ensure_ascii=False),
        policy=policy(style, script),
        style=style,
        script=script,
        lookup=[picture.lookup for picture in drawn],
    )
    return visible(page, "\n\t")


@cache
def template(path: Path) -> Template:
    """A page's template, which escapes all that is put into it."""
    pages = environment(path.parent, escape=True)
    pages.filters.update(times=times, size=amount, counted=counted, colour=colour, flat=flat_shape, span=span)
    return pages.get_template(path.name)


def is_page(start: bytes) -> bool:
    """Whether a file of these first bytes was written as a page."""
    return b'<meta name="generator" content="engine view">' in start


def policy(style: str, script: str) -> str:
    """Nothing is loaded from anywhere; this style and this script, by their digests, may act."""
    return (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def colour(number: int, count: int, shade: int = 0) -> str:
    """A colour of `count`, in one of three shades.

    >>> colour(0, 4), colour(1, 4, 1)
    ('hsl(210, 55%, 44%)', 'hsl(300, 55%, 60%)')
    """
    step = 360 / count if count <= 12 else 137.5
    return f"hsl({round(210 + number * step) % 360}, 55%, {44 + 16 * (shade % 3)}%)"
