"""The page that lists what is served and says what each model is. Loads nothing, sends nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import visible
from engine.show import page as shown

_TEMPLATE = Path(__file__).parent / "templates" / "models.html.j2"


def page(models: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The page and its Content-Security-Policy.

    Args:
        models: `name`, `revision`, `revisions`, and either `why` there is nothing to serve or `step`, `commit`,
            `facts` of the model card and the `files` to list. All of it is untrusted: the template escapes it.
    """
    from markupsafe import Markup

    style = (shown.TEMPLATES / "view.css").read_text("utf-8")
    text = shown.template(_TEMPLATE).render(models=models, style=Markup(style))
    return visible(text, "\n\t"), shown.policy(style, "")
