"""`engine explain` and `engine view`: what a plan does, told and drawn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from engine.commands.options import EXPLAINED, asks, reports_errors
from engine.commands.say import say


@click.command()
@click.argument("what", metavar="[TENSOR|CODE]", required=False)
@click.option("--from", "source", metavar="[FILE:]TENSOR", help="Explain where a stored source tensor goes.")
@asks(*EXPLAINED)
@reports_errors
def explain(
    as_json: bool, /, what: str | None, source: str | None, mapping: str | None, src: str, **options: Any
) -> None:
    """Say where part of a tensor comes from or goes to, or what an error code means.

    \b
    engine explain -m internlm2-7b -s DIR 'model.layers.7.self_attn.k_proj.weight[0:128, :]'
    engine explain -m internlm2-7b -s DIR --from 'model_tp1_pp0.pt:layers.3.attention.wqkv.weight[0:4]'
    engine explain E203
    """
    from engine import api
    from engine.show import render, render_explain

    if (what is None) == (source is None):
        raise click.UsageError("Give a tensor or a code to explain, or a source tensor with --from; one of them.")
    if what is not None and render_explain.is_code(what):
        from engine.explaining.codes import explain_code

        text = explain_code(what)
        say(render.as_json({"code": what, "text": text}) if as_json else text)
        return
    if mapping is None:
        raise click.UsageError("Missing option '--mapping' / '-m'.")
    told = api.explain(what or source or "", mapping, src, backward=source is not None, **options).as_dict()
    say(render.as_json(told) if as_json else render_explain.explanation(told))


@click.command()
@click.option("--out", "-o", default="view.html", show_default=True, metavar="FILE", help="The page to write.")
@click.option("--overwrite", is_flag=True, help="Replace the page if it exists.")
@click.option("--png", metavar="FILE", help="Draw it too, by an installed Chromium.")
@asks(*EXPLAINED)
@reports_errors
def view(as_json: bool, /, mapping: str | None, src: str, out: str, png: str | None, **options: Any) -> None:
    """Write one HTML page that shows what `run` would do: decisions, rules, a picture of each."""
    from engine import api
    from engine.show import render
    from engine.show.screenshot import is_picture, screenshot
    from engine.storage.replacing import check_file_free, given_path

    if mapping is None:
        raise click.UsageError("Missing option '--mapping' / '-m'.")
    if png is not None:
        check_file_free(given_path(png, "the picture"), options["overwrite"], is_picture)
    done = api.view(mapping, src, out, **options)
    if png is not None:
        screenshot(Path(done["out"]), Path(png), root=os.geteuid() == 0, overwrite=options["overwrite"])
        done["png"] = png
    say(render.as_json(done) if as_json else f"wrote {done['out']}, {render.amount(done['bytes'])}")
