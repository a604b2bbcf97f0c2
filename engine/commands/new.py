"""`engine new`: a first draft of a mapping for a checkpoint that no bundled one may know."""

from __future__ import annotations

import click

from engine.commands.options import asks, reports_errors
from engine.commands.say import say


@click.command()
@asks("src")
@click.option("--name", metavar="NAME", help="The mapping's name.  [default: the file's or the folder's]")
@click.option("--like", metavar="FAMILY", help="The family or mapping to extend.  [default: the nearest]")
@click.option("--out", "-o", metavar="FILE", help="The file to write.  [default: print it]")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@reports_errors
def new(as_json: bool, /, src: str, name: str | None, like: str | None, out: str | None, overwrite: bool) -> None:
    """Draft a mapping for a checkpoint, from its headers.

    The draft lints clean. What a person must decide is marked `# decide:` in it.
    """
    from engine import api
    from engine.discover.text import shown
    from engine.show import render

    found = api.new_mapping(src, name=name, like=like, out=out, overwrite=overwrite)
    if as_json:
        say(render.as_json({"file": out, **found.as_dict()}))
        return
    if out is None:
        say(found.text, nl=False)
    else:
        say(f"wrote {out}: {_KINDS[found.kind].format(parent=found.parent)}")
        for line, text in found.decisions:
            say(f"  {out}:{line}  decide: {text}")
    for notice in found.notices:
        say(f"note {notice}", err=out is None)
    if found.state is not None:
        say(f"now a run would say {found.state['code']} {shown(found.state['message'])}", err=out is None)
    elif out is not None:
        say(f"next: engine plan --mapping {out} --src {src}")


_KINDS = {
    "release": "a release of {parent}, which fits",
    "renamed": "{parent} with other sources",
    "own": "rules of its own, no family is near",
}
