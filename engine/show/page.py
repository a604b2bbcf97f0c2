"""The HTML view: one self-contained page that shows what a plan does. Loads nothing, sends nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import visible
from engine.explaining.describe import describe_plan
from engine.planning.model import Plan
from engine.show.drawing import colour, draw, strip
from engine.show.pictures import pictures
from engine.show.text import amount, times

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "templates"
STRIP = 920


def view_page(plan: Plan) -> str:
    """The page: summary, table of rules, a picture of every rule.

    Names of tensors, files and folders are untrusted: the template escapes all of them, data for the
    script is JSON without `<`, and a Content-Security-Policy allows nothing but this style and script.
    """
    from markupsafe import Markup

    style, script = ((TEMPLATES / name).read_text("utf-8") for name in ("view.css", "view.js"))
    drawn = pictures(plan)
    page = template(TEMPLATES / "view.html.j2").render(
        facts=describe_plan(plan),
        description=plan.mapping.description,
        figures=[(picture, draw(picture)) for picture in drawn],
        bands=strip(plan.stages, STRIP),
        strip_width=STRIP,
        config=json.dumps(dict(plan.config), indent=2, default=str, ensure_ascii=False),
        policy=policy(style, script),
        style=Markup(style),
        script=Markup(script),
        lookup=Markup(script_data([picture.lookup for picture in drawn])),
    )
    return visible(page, "\n\t")


def template(path: Path) -> Template:
    """A page's template, which escapes all that is put into it."""
    from jinja2 import FileSystemLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(times=times, size=amount, colour=colour)
    return environment.get_template(path.name)


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


def script_data(data: Any) -> str:
    """JSON that cannot end the script element it stands in.

    >>> script_data(["</script><!--"])
    '["\\\\u003c/script\\\\u003e\\\\u003c!--"]'
    """
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
