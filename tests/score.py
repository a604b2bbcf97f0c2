"""The mutation score and the careless edits as a page of the documentation: `make score` writes it, `make soak` checks.

Every mutant of every family must be caught, or be listed here with the reason why it is the same mapping. Every
careless edit must turn the pull request's workflow red, and be told in its comment when its meaning is committed too.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from engine.language.mapping_file import load_mapping
from engine.proving.mutants import mutants_of, try_mutants
from engine.proving.proof import Mutant
from tests.careless import ROOT, Outcome, edits_of, outcome

PAGE = ROOT / "docs" / "mutation-score.md"
# Where, what is written instead, and why nothing can show it: the mapping is the same.
EQUAL = (
    (r"generation\.\w+_token_id", r"left out", "the file takes the same number from config.json"),
    (r"dims\.\w+", r"default\(\+1\)", "of an absent size both are above 0, and what is absent is read off the tensors"),
    (r"dims\.\w+", r"default\([\w.]+, false\)", "a null counts as absent before an expression sees it"),
    (
        r"training_config\.(no_bias|untie_embeddings_and_output_weights)",
        r"not \((attention_bias|tie_word_embeddings)\) ",
        "`keys` gives the same default to config.json before an expression sees it",
    ),
    (r"dims\.ffn", r"8 \* dim ", "`hidden` is `dim`"),
    (r"dims\.\w+", r"^`(?:hidden|heads|layer|vocab) ", "the axis is the key it stands for"),
)


@dataclass(frozen=True)
class Score:
    family: str
    mutants: list[Mutant]
    edits: list[Outcome]


def families() -> list[str]:
    """Families with rules of their own."""
    names = sorted(path.stem for path in (ROOT / "mappings" / "families").glob("*.yaml"))
    return [name for name in names if load_mapping(_file(name)).rules]


def _file(family: str) -> Path:
    return ROOT / "mappings" / "families" / f"{family}.yaml"


def score(family: str, every: int) -> Score:
    """One family; of its mutants and edits every so many."""
    mapping = load_mapping(_file(family))
    mutants = try_mutants(mapping, list(mutants_of(mapping))[::every])
    return Score(family, mutants, [outcome(mapping, edit) for edit in list(edits_of(mapping))[::every]])


def reason(mutant: Mutant) -> str | None:
    """Why a mutant is no other mapping; None where it is one that nothing shows."""
    return next(
        (why for where, what, why in EQUAL if re.fullmatch(where, mutant.where) and re.search(what, mutant.what)), None
    )


def problems(scores: Sequence[Score]) -> list[str]:
    """Mutants that survive without a reason, and edits that stay green or are told by nothing."""
    found: list[str] = []
    for one in scores:
        survivors = [m for m in one.mutants if m.caught_by is None and reason(m) is None]
        found += [f"{one.family}: {m.kind}: {m.where}: {m.what} survives" for m in survivors]
        found += [f"{one.family}: {e.edit}: the workflow is green" for e in one.edits if e.red is None]
        found += [f"{one.family}: {e.edit}: the comment says nothing" for e in one.edits if e.comment is None]
    return found


def tried(scores: Sequence[Score], every: int, known: Sequence[str]) -> str:
    """Which share of what a command tried of which families, and which it left out: a score is of no more than that."""
    left = [name for name in known if name not in {one.family for one in scores}]
    share = "every mutant and edit" if every == 1 else f"one of {every} mutants and edits"
    told = f"Tried: {share} of {', '.join(one.family for one in scores)}."
    return told + (f" Not tried: {', '.join(left)}." if left else "")


def page(scores: Sequence[Score], every: int, known: Sequence[str]) -> str:
    lines = [
        "# What a wrong mapping shows by",
        "",
        "`make score` writes this page anew, with every mutant and edit of every family; `make soak` fails on one that",
        "nothing shows.",
        "",
        f"**{tried(scores, every, known)}**",
        "",
        "## Mutants",
        "",
        "Everything that a family's file says, changed in one place: each rule, split, stage and order of axes, each",
        "expression, option, key, token. A mutant is caught by the first that shows it.",
        "",
    ]
    kinds = sorted({m.kind for one in scores for m in one.mutants})
    lines += [
        "| kind | mutants | loading | lint | the committed meaning | the same mapping | nothing shows it |",
        "|---|---|---|---|---|---|---|",
    ]
    every_mutant = [m for one in scores for m in one.mutants]
    for kind in [*kinds, "all"]:
        listed = [m for m in every_mutant if kind in ("all", m.kind)]
        by = Counter(m.caught_by for m in listed)
        rest = len(listed) - by["loading"] - by["lint"] - by[None]
        same = sum(m.caught_by is None and reason(m) is not None for m in listed)
        shown = f"{by['loading']} | {by['lint']} | {rest} | {same} | {by[None] - same}"
        lines.append(f"| {kind} | {len(listed)} | {shown} |")
    lines += [
        "",
        "Those that nothing shows, and why they are the same mapping:",
        "",
        "| family | where | what | why |",
        "|---|---|---|---|",
    ]
    for one in scores:
        for m in one.mutants:
            if m.caught_by is None:
                cells = (one.family, m.where, m.what, reason(m) or "**not known**")
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        "## Careless edits",
        "",
        "Edits as people make them, written down before it was looked at which are caught",
        "(`tests/careless.py`). The workflow is red when lint or `engine prove` is. When the edit's meaning is",
        "committed with it, the comment says which tensor or value differs.",
        "",
        "| family | edits | workflow red | told in the comment |",
        "|---|---|---|---|",
    ]
    for one in scores:
        red, told = (sum(getattr(e, name) is not None for e in one.edits) for name in ("red", "comment"))
        lines.append(f"| {one.family} | {len(one.edits)} | {red} | {told} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=families())
    parser.add_argument("--every", type=int, default=1, help="try one of so many")
    parser.add_argument("--write", action="store_true", help="write the page")
    options = parser.parse_args()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(score, name, options.every) for name in options.families]
        scores: list[Score] = []
        for one in running:
            scores.append(one.result())
            print(f"{scores[-1].family}: {len(scores[-1].mutants)} mutants, {len(scores[-1].edits)} edits", flush=True)
            print("\n".join(problems(scores[-1:])), flush=True)
    if options.write:
        PAGE.write_text(page(scores, options.every, families()), encoding="utf-8")
    print(tried(scores, options.every, families()))
    return 1 if problems(scores) else 0


if __name__ == "__main__":
    sys.exit(main())
