"""Commands for writing and reviewing mappings; only `new` needs a checkpoint."""

from __future__ import annotations

import click

import engine
from engine.commands.completion import mapping_names, paths
from engine.commands.options import asks, reports_errors
from engine.commands.progress import progress
from engine.commands.say import answer, say
from engine.errors import EngineError, Place, visible
from engine.language.documents import plain
from engine.language.search import find_file, kind_of, spelled
from engine.show.findings import beside_lines, unified
from engine.show.findings import findings as in_words
from engine.show.render import proofs as shown
from engine.show.render import render
from engine.show.render import resolved as as_resolved
from engine.show.text import quoted, read_text
from engine.storage.replacing import write_file

_PATHS = "engine.diff.paths"


@click.command()
@asks("src", "config")
@click.option("--name", metavar="NAME", help="The mapping's name.  [default: the file's or the folder's]")
@click.option("--out", "-o", metavar="FILE", help="The file to write.  [default: print it]")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@reports_errors
def new(as_json: bool, /, src: str, config: str | None, name: str | None, out: str | None, overwrite: bool) -> None:
    """Draft a mapping for a checkpoint, from its headers.

    Questions for you are marked `# decide:` in the draft; the rest has no lint errors.

    \b
    Example:
      engine new -s ckpt/20000 -o mappings/my-7b.yaml
    """
    found = engine.api.new_mapping(src, name=name, out=out, overwrite=overwrite, config=config)
    if as_json:
        answer(True, {"file": out, **found.as_dict()}, str)
        return
    if out is None:
        say(found.text, nl=False, raw=True)
    kinds = {
        "release": "a release of {parent}, which fits",
        "renamed": "{parent} with other sources",
        "own": "rules of its own, as no family is near",
    }
    parent = spelled(found.parent or "")
    options = f"--src {quoted(src)}" + (f" --config {quoted(config)}" if config else "")
    facts = {"found": found, "kinds": kinds, "parent": parent, "out": out, "file": quoted(out or "")}
    say(render("draft.txt", **facts, options=options), err=out is None)


@click.command()
@click.argument("files", nargs=-1, metavar="[FILES|FOLDERS|NAMES]...", shell_complete=mapping_names)
@click.option("--format", "form", type=click.Choice(["text", "github", "json"]), default="text", show_default=True,
              help="How to print it; github: annotations for a workflow run.")  # fmt: skip
@reports_errors
@click.pass_context
def lint(ctx: click.Context, as_json: bool, files: tuple[str, ...], form: str) -> None:
    """Check mapping files: keys, types, overlaps, gaps, unused names.

    In a folder, every mapping below it is checked; without FILES, all bundled ones are.

    \b
    Examples:
      engine lint mappings/my-7b.yaml
      engine lint mappings --format github
    """
    findings = engine.api.lint(files)
    if as_json or form == "json":
        answer(True, {"findings": [{**one.as_dict(), "severity": one.severity} for one in findings]}, str)
    elif form == "github":
        say(beside_lines(findings), raw=True, nl=bool(findings))
    else:
        say(in_words(findings))
    if any(finding.severity == "error" for finding in findings):
        ctx.exit(1)


@click.command()
@click.argument("mappings", nargs=-1, metavar="[MAPPINGS]...", shell_complete=mapping_names)
@click.option("--all", "every", is_flag=True, help="Prove every bundled mapping.")
@click.option(
    "--mutants",
    is_flag=True,
    help="Also change the mapping in one place at a time, and say which check detects each change.",
)
@click.option("--write-meaning", "--write-facts", "write_meaning", is_flag=True,
              help="First write the current meaning of each mapping, to commit beside it.")  # fmt: skip
@reports_errors
@click.pass_context
def prove(
    ctx: click.Context, as_json: bool, mappings: tuple[str, ...], every: bool, mutants: bool, write_meaning: bool
) -> None:
    """Prove that mappings are complete and invertible in every layout.

    No checkpoint is needed. Exits with 0 when everything holds, else with 1.

    \b
    Examples:
      engine prove mappings/my-7b.yaml
      engine prove --all
    """
    if bool(mappings) == every:
        raise click.UsageError("Give mappings to prove, or --all.")
    if write_meaning:
        engine.api.write_meanings(mappings)
    with progress(show=not as_json, doing="proving") as listener:
        proofs = engine.api.prove(mappings, mutants=mutants, progress=listener)
    holds = all(proof.holds for proof in proofs)
    data = {"holds": holds, "proofs": [proof.as_dict() for proof in proofs]}
    answer(as_json, data, lambda: shown(proofs))
    if not holds:
        ctx.exit(1)


class DiffCommand(click.Command):
    """Everything after `--` is a path, as in git."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            ctx.meta[_PATHS] = tuple(args[at + 1 :])
            args = args[:at]
        return super().parse_args(ctx, args)


@click.command(cls=DiffCommand, options_metavar="[OPTIONS]")
@click.argument("old", metavar="OLD|REVISION", shell_complete=mapping_names)
@click.argument("new", metavar="[NEW|REVISION] [-- FILES...]", required=False,
                shell_complete=mapping_names)  # fmt: skip
@click.option("--format", "form", type=click.Choice(["text", "markdown", "json", "github"]), default="text",
              show_default=True, help="How to print it; github: a comment for a pull request.")  # fmt: skip
@click.option("--exit-code", is_flag=True, help="Exit with 1 when there are differences.")
@reports_errors
@click.pass_context
def diff(ctx: click.Context, as_json: bool, /, old: str, new: str | None, form: str, exit_code: bool) -> None:
    """Say what changes between mappings, or since a revision.

    OLD and NEW are mapping files, names of bundled ones, or git revisions. Without NEW, a revision is
    compared with the working tree; without FILES, for all mappings below mappings/.

    \b
    Examples:
      engine diff internlm2 mappings/my-family.yaml
      engine diff main -- mappings/my-7b.yaml
      engine diff v1 v2
    """
    from engine.proving.mapping_diff import is_mapping
    from engine.show.changes import rendered

    paths: tuple[str, ...] = ctx.meta.get(_PATHS, ())
    if new is not None and not paths and _PATHS not in ctx.meta and is_mapping(old):
        found = engine.api.diff(old, new)
    elif new is not None and not paths and is_mapping(new):
        found = engine.api.diff(old, None, [new])  # `engine diff main x.yaml`
    else:
        found = engine.api.diff(old, new, paths, revisions=True)
    form = "json" if as_json else form
    say(rendered(found, form), raw=form != "text")
    if exit_code and found:
        ctx.exit(1)


@click.command()
@click.argument("mapping", metavar="FILE|NAME", shell_complete=mapping_names)
@click.option("--resolved", is_flag=True, help="Merge it with what it extends, as the engine reads it.")
@reports_errors
def show(as_json: bool, /, mapping: str, resolved: bool) -> None:
    """Print a mapping, as written or merged with what it extends.

    \b
    Example:
      engine show --resolved internlm2-chat-7b
    """
    if as_json:
        answer(True, plain(engine.api.load_mapping(mapping).resolved), str)
    elif resolved:
        say(as_resolved(engine.api.load_mapping(mapping)), nl=False, raw=True)
    else:
        say(read_text(find_file(mapping)), nl=False, raw=True)


@click.command("format")
@click.argument("files", nargs=-1, required=True, metavar="FILES|FOLDERS...", shell_complete=paths)
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if a file is not formatted.")
@click.option("--diff", "differences", is_flag=True, help="Change nothing; print what would change.")
@reports_errors
@click.pass_context
def format_(ctx: click.Context, as_json: bool, files: tuple[str, ...], check: bool, differences: bool) -> None:
    """Format mapping files.

    \b
    Example:
      engine format --diff mappings
    """
    changed: dict[str, tuple[str, str]] = {}
    paths = engine.api.mapping_files(files)
    for file in paths:
        before = read_text(file)
        after = engine.api.format_mapping(before, str(file))
        if not kind_of(file):
            raise EngineError(
                "E102", "this is neither a mapping nor a layout", place=Place(str(file)),
                expected="a file with `mapping:` or `layout:`", fix="Other files are left as they are.",
            )  # fmt: skip
        if after != before:
            changed[str(file)] = before, after
            if not (check or differences):
                write_file(file.resolve(), after.encode(), overwrite=True, ours=lambda start: True)
    if as_json:
        answer(True, {"changed": list(changed), "checked": len(paths)}, str)
    elif differences:
        say("".join(unified(name, *texts) for name, texts in changed.items()), nl=False, raw=True)
    else:
        for name in changed:
            say(f"{'would format' if check else 'formatted'} {visible(name)}")
    if check and changed:
        ctx.exit(1)
