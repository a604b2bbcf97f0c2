"""Commands that look at what is there and write no checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

import engine
from engine.commands import progress
from engine.commands.completion import SHELLS, codes, folders, script
from engine.commands.options import EXPLAINED, QUIET, VERIFYING, asks, chosen, given, reports_errors
from engine.commands.say import answer, say
from engine.errors import visible
from engine.explaining.codes import is_code
from engine.planning.given import amount
from engine.show.render import inspection, render
from engine.storage.json_text import as_data
from engine.storage.replacing import check_file_free, given_path


@click.command()
@click.argument("folder", metavar="DIR", default=".", shell_complete=folders)
@click.option("--all", "every", is_flag=True, help="Also say why the other mappings do not fit; check every step.")
@asks("config")
@reports_errors
def inspect(as_json: bool, /, folder: str, every: bool, config: str | None) -> None:
    """Say what a folder is, and which mappings fit.

    DIR is a training checkpoint, a Hugging Face checkpoint or a folder of steps.

    \b
    Example:
      engine inspect ckpt/20000
    """
    found = engine.api.inspect(folder, config, every=every)
    answer(as_json, found.as_dict(), lambda: inspection(found, config, every=every))


@click.command()
@reports_errors
def mappings(as_json: bool, /) -> None:
    """List all mappings, with sizes and versions.

    A mapping is given by its name alone, or by the path of a file. `ENGINE_MAPPINGS` adds folders to search.
    """
    found = engine.api.mappings()
    told = ("name", "version", "layout", "description", "expect", "files")
    data = {"mappings": [{name: as_data(getattr(one, name)) for name in told} for one in found]}
    answer(as_json, data, lambda: render("mappings.txt", found=data["mappings"]))


@click.command()
@click.argument("what", metavar="[TENSOR|CODE]", required=False, shell_complete=codes)
@click.option("--from", "source", metavar="[FILE:]TENSOR", help="Explain where a training tensor goes.")
@asks(*EXPLAINED)
@reports_errors
@click.pass_context
def explain(
    ctx: click.Context,
    as_json: bool,
    /,
    what: str | None,
    source: str | None,
    mapping: str | None,
    src: str,
    **options: Any,
) -> None:
    """Say where part of a tensor comes from, or what an error means.

    \b
    Examples:
      engine explain -m internlm2-7b -s DIR 'model.layers.7.self_attn.k_proj.weight[0:128, :]'
      engine explain -m internlm2-7b -s DIR --from 'model_tp1_pp0.pt:layers.3.attention.wqkv.weight[0:4]'
      engine explain E203
    """
    if (what is None) == (source is None):
        raise click.UsageError("Give a tensor or a code to explain, or a source tensor with --from; one of them.")
    if what is not None and is_code(what):
        if said := next((flag for name, flag in given(ctx).items() if name in EXPLAINED), None):
            raise click.UsageError(f"{said} has no effect: a code has one meaning")
        text, where = engine.api.explain_code(what), f"docs/codes/{what.strip().upper()}.md"
        answer(as_json, {"code": what, "text": text, "page": where}, lambda: f"{text}\nDocumentation: {where}")
        return
    mapping = chosen(mapping, src, options["config"], quiet=as_json)
    told = engine.api.explain(what or source or "", mapping, src, backward=source is not None, **options).as_dict()
    answer(as_json, told, lambda: render("explanation.txt", **told))


@click.command()
@click.option("--out", "-o", default="view.html", show_default=True, metavar="FILE", help="The page to write.")
@click.option("--overwrite", is_flag=True, help="Replace the page if it exists.")
@click.option("--png", metavar="FILE", help="Also write it as a picture; needs Chromium.")
@asks(*EXPLAINED)
@reports_errors
def view(as_json: bool, /, mapping: str | None, src: str, out: str, png: str | None, **options: Any) -> None:
    """Draw where each rank's tensors land, as one HTML page.

    \b
    Example:
      engine view -m internlm2-7b -s ckpt/20000 -o view.html
    """
    from engine.show.screenshot import is_picture, screenshot

    mapping = chosen(mapping, src, options["config"], quiet=as_json)
    if png is not None:
        check_file_free(given_path(png, "the picture"), options["overwrite"], is_picture)
    done = engine.api.view(mapping, src, out, **options)
    if png is not None:
        screenshot(Path(done["out"]), Path(png), overwrite=options["overwrite"])
        done["png"] = png
    answer(as_json, done, lambda: f"wrote {visible(done['out'])}, {amount(done['bytes'])}")


@click.command()
@click.argument("out", metavar="OUT", shell_complete=folders)
@VERIFYING
@click.option("--quiet", "-q", is_flag=True, help="Print only problems.")
@reports_errors
@click.pass_context
def verify(ctx: click.Context, as_json: bool, /, out: str, quiet: bool, **options: Any) -> None:
    """Check an output against its manifest, source or logits.

    Without options, compares every byte with the output's manifest. With --src and --mapping, compares
    it with the training checkpoint; with --load, runs it in transformers; with --src and --logits,
    compares it with a forward pass as training computes it.

    \b
    Examples:
      engine verify hf
      engine verify hf -m internlm2-7b -s ckpt/20000 --logits
    """
    with progress.progress(show=not (quiet or as_json), doing="verifying") as listener:
        found = engine.api.verify(out, progress=listener, **options)
    answer(as_json, found.as_dict(), lambda: render("verified.txt", found=found), quiet=quiet and not found.problems)
    if found.problems:
        ctx.exit(1)


@click.command()
@click.argument("out", metavar="OUT", shell_complete=folders)
@click.argument("ref", metavar="REF", shell_complete=folders)
@asks("mapping", "config", "settings", "dtype", mapping="How to read a side that is a training checkpoint.")
@click.option("--allow-cast", is_flag=True, help="Exit with 0 even if tensors are equal only after casting.")
@QUIET
@reports_errors
@click.pass_context
def compare(
    ctx: click.Context, as_json: bool, /, out: str, ref: str, allow_cast: bool, quiet: bool, **options: Any
) -> None:
    """Compare two whole models, and say what differs.

    OUT and REF are Hugging Face folders or weights files, or, with --mapping, training checkpoints. Tensors,
    configuration, generation settings, tokenizer, chat template and code are compared. Exits with 0 if both
    compute the same function, else with 1.

    \b
    Examples:
      engine compare hf reference
      engine compare hf ckpt/20000 -m internlm2-7b
    """
    with progress.progress(show=not (quiet or as_json), doing="comparing") as listener:
        done = engine.api.compare(out, ref, progress=listener, **options)
    answer(as_json, done.as_dict(), lambda: render("comparison.txt", **done.as_dict()), quiet=quiet)
    if not done.same(allow_cast=allow_cast):
        ctx.exit(1)


@click.command()
@reports_errors
def env(as_json: bool, /) -> None:
    """Print what a bug report needs: versions and system."""
    facts = engine.api.environment()
    answer(as_json, facts, lambda: render("environment.txt", facts=facts))


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.pass_context
def completion(ctx: click.Context, shell: str | None) -> None:
    """Print the script for bash, zsh or fish to complete.

    \b
    One line in the shell's own file:
      bash   eval "$(engine completion bash)"     in ~/.bashrc
      zsh    eval "$(engine completion zsh)"      in ~/.zshrc, after compinit
      fish   engine completion fish | source      in ~/.config/fish/config.fish
    """
    shell = shell or os.path.basename(os.environ.get("SHELL", ""))
    if shell not in SHELLS:
        raise click.UsageError(f"Which shell? Give one of {', '.join(SHELLS)}.", ctx)
    say(script(shell, ctx.find_root().command), nl=False, raw=True)
