"""The HTML view: one self-contained page that shows what a plan does, and where its drawings put tensors and boxes.

It loads nothing and sends nothing. No text is escaped in a drawing; the page's template does that.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.assets.model_card import environment
from engine.errors import visible
from engine.explaining.describe import describe_plan
from engine.planning.model import Plan
from engine.planning.stages import Stages
from engine.show.pictures import Box, Picture, Tile, flat_shape, pictures
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
    pages = environment(path.parent, escape=True)
    pages.filters.update(times=times, size=amount, colour=colour)
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


def script_data(data: Any) -> str:
    """JSON that cannot end the script element it stands in.

    >>> script_data(["</script><!--"])
    '["\\\\u003c/script\\\\u003e\\\\u003c!--"]'
    """
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


LEFT, RIGHT = 600, 320  # widths of the sources' and the targets' half
WIDE, HIGH = 250, 260  # the largest tensor as it is drawn
SMALLEST = 14
GAP, LABEL = 12, 14


@dataclass(frozen=True, slots=True)
class Frame:
    """A tensor: its outline, what stands above it, and its boxes. `target` is an index, or None on the left."""

    x: float
    y: float
    width: float
    height: float
    label: str
    title: str
    target: int | None
    tile: Tile

    def place(self, box: Box) -> tuple[float, float, float, float]:
        """Left, top, width and height of a box of it."""
        rows, columns = flat_shape(self.tile.shape)
        across, down = self.width / max(columns, 1), self.height / max(rows, 1)
        left, top = self.x + box.columns[0] * across, self.y + box.rows[0] * down
        width, height = (box.columns[1] - box.columns[0]) * across, (box.rows[1] - box.rows[0]) * down
        return round(left, 2), round(top, 2), round(width, 2), round(height, 2)


@dataclass(frozen=True, slots=True)
class Drawing:
    """The tensors of a picture; `colours` is how many its sources have."""

    width: int
    height: int
    frames: tuple[Frame, ...]
    colours: int


@dataclass(frozen=True, slots=True)
class Band:
    """The layers of one pipeline stage in the strip of all layers."""

    x: float
    width: float
    fill: str
    label: str
    title: str


def colour(number: int, count: int, shade: int = 0) -> str:
    """A colour of `count`, in one of three shades.

    >>> colour(0, 4), colour(1, 4, 1)
    ('hsl(210, 55%, 44%)', 'hsl(300, 55%, 60%)')
    """
    step = 360 / count if count <= 12 else 137.5
    return f"hsl({round(210 + number * step) % 360}, 55%, {44 + 16 * (shade % 3)}%)"


def draw(picture: Picture) -> Drawing:
    """Sources flow on the left, targets stand one under another on the right, all at one scale."""
    shapes = [flat_shape(tile.shape) for tile in (*picture.sources, *picture.targets)]
    vectors = all(columns == 1 for _, columns in shapes)
    scale_y = (HIGH / 3 if vectors else HIGH) / max(max(rows for rows, _ in shapes), 1)
    scale_x = 40.0 if vectors else WIDE / max(max(columns for _, columns in shapes), 1)
    frames: list[Frame] = []
    x = y = line = 0.0
    narrow = 0.45 if len(picture.sources) > 16 else 1.0
    for tile in picture.sources:
        width, height = _size(tile, scale_x * narrow, scale_y)
        across = max(width, 7.0 * min(len(tile.label), 24))
        if x and x + across > LEFT:
            x, y, line = 0.0, y + line + GAP, 0.0
        more = f" and {tile.replicas - 1} equal" if tile.replicas > 1 else ""
        title = f"{tile.file}:{tile.name}, {times(tile.shape)}{more}"
        frames.append(Frame(x, y + LABEL, width, height, tile.label, title, None, tile))
        x += across + GAP
        line = max(line, height + LABEL)
    bottom = y + line
    y = 0.0
    for index, tile in enumerate(picture.targets):
        width, height = _size(tile, scale_x, scale_y)
        label = tile.name if len(tile.name) <= 42 else "…" + tile.name[-41:].lstrip(".")
        title = f"{tile.name}, {times(tile.shape)}"
        frames.append(Frame(LEFT + GAP * 2, y + LABEL, width, height, label, title, index, tile))
        y += height + LABEL + GAP
    colours = max(len(picture.sources) + picture.hidden, 1)
    return Drawing(LEFT + RIGHT, int(max(bottom, y)) + 4, tuple(frames), colours)


def _size(tile: Tile, scale_x: float, scale_y: float) -> tuple[float, float]:
    rows, columns = flat_shape(tile.shape)
    return round(max(SMALLEST, columns * scale_x), 1), round(max(SMALLEST, rows * scale_y), 1)


def strip(stages: Stages, width: float) -> tuple[Band, ...]:
    """All layers from left to right, coloured by the pipeline rank that holds them."""
    ranks = sorted({stage[1:] for stage in stages.counts})
    each = width / max(stages.layers, 1)
    bands = []
    for stage, start in sorted(stages.starts.items(), key=lambda entry: entry[1]):
        held = stages.counts[stage]
        if held:
            last = start + held - 1
            where = stages.name(stage)
            label = f"{start}…{last}" if held > 1 else str(start)
            title = f"layers {label}: {where}, there numbered from 0"
            text = f"{where}: {label}" if held * each >= 70 else label if held * each >= 30 else ""
            fill = colour(ranks.index(stage[1:]), len(ranks), 1)
            bands.append(Band(round(start * each, 2), round(held * each, 2), fill, text, title))
    return tuple(bands)
