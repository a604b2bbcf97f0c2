"""The page that lists what is served and says what each model is. Loads nothing, sends nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import visible
from engine.show import page as shown

_TEMPLATES = Path(__file__).parent / "templates"


def page(models: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The page and its Content-Security-Policy.

    Args:
        models: `name`, `revision`, `revisions`, and either `why` there is nothing to serve or `step`, `commit`,
            `facts` of the model card and the `files` to list. All of it is untrusted: the template escapes it.
    """
    from jinja2 import FileSystemLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from markupsafe import Markup

    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(size=shown.decimal)
    style = (shown.TEMPLATES / "view.css").read_text("utf-8")
    text = environment.get_template("models.html.j2").render(models=models, style=Markup(style))
    return visible(text, "\n\t"), shown.policy(style, "")
