"""The mutation score and the careless edits as a page of the documentation: `make score` writes it, `make soak` checks.

Every mutant of every family must be caught, or be listed here with the reason why it is the same mapping. Every
careless edit must turn the pull request's workflow red, and be told in its comment when its meaning is committed too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from engine.language.mapping_file import load_mapping
from engine.proving.mutants import mutants_of, try_mutants
from engine.proving.proof import Mutant
from tests.careless import ROOT, Known, Outcome, edits_of, known_of, outcome

PAGE = ROOT / "docs" / "mutation-score.md"
KEPT = ROOT / "build" / "score.jsonl"  # what was found, as it is found
SHARE = 60  # mutants or edits that a process tries at a time
WORKERS = int(os.environ.get("WORKERS") or os.cpu_count() or 1)
_UNSCALED = r"megatron-(mixtral|qwen2|qwen3|qwen2-moe|qwen3-moe)"
_DEFAULTED = r"not \((attention_bias|tie_word_embeddings)( \| default\(true\))?\) "
# Of which families, where, what is written instead, and why nothing can show it: the mapping is the same.
EQUAL = (
    (r".*", r"generation\.\w+_token_id", r"left out", "the file takes the same number from config.json"),
    (
        r".*",
        r"dims\.\w+",
        r"default\([\w.]+( \| default\(omit\))?, false\)",
        "a null counts as absent before an expression sees it",
    ),
    (
        r"megatron-.*",
        r"dims\.vocab",
        r"^`given\.vocab_size \| default\(options\.vocab_size(\)| \| default\(given\.)",
        "a vocabulary that nothing tells is not among what is tried; a test of the family reshards without it",
    ),
    (
        r".*",
        r"training_config\.(no_bias|untie_embeddings_and_output_weights)",
        _DEFAULTED,
        "`keys` gives the default false to config.json before an expression sees it",
    ),
    (
        _UNSCALED,
        r"config\.rope_(scaling|parameters\.(rope_type|factor|\w+_freq_factor|original_max_position_embeddings))",
        r"",
        "`keys` refuses `use_rope_scaling`, which alone leads there",
    ),
    (
        r"megatron-.*",
        r"vocabulary",
        r"",
        "a vocabulary that was padded for other ranks is not among what is tried; a test of the family tries it",
    ),
    (
        r"megatron-llama",
        r"provider",
        r"(not \(|number or )use_rope_scaling( \| default\(true\))?(\) or| and)",
        "`use_rope_scaling` is there wherever the configuration is computed from the given one",
    ),
    (
        r"megatron-.*",
        r"rotary",
        r"training\.model\.rotary_interleaved",
        "what Megatron-Bridge saves of a run is not among what is tried; a test of the family tries it",
    ),
    (
        r"megatron-llama",
        r"provider",
        r"training\.model\.",
        "what Megatron-Bridge saves of a run is not among what is tried; a test of the family tries it",
    ),
    (
        r"megatron-(mixtral|qwen2|qwen3|qwen2-moe|qwen3-moe)",
        r"provider|padding_token",
        r"training\.model|given\.pad_token_id",
        "it is megatron-llama's, whose own meaning shows it",
    ),
    (
        r"internlm.*|llama|moe-.*|internevo-baichuan2",
        r"attention_biases|mlp_biases",
        r"wq\.bias'\) (or|and) present\('[\w.{}]+wk\.bias'\) (or|and) present"
        r"|w1\.bias'\) or present\('[\w.{}]+w3\.bias'\) or ",
        "biases of only some of three linears are not among what is tried; a test of the families tries each",
    ),
    (
        r"internlm-moe|moe-.*",
        r"config\.num_experts_per_tok",
        r"^`\{\{ top_k \}\}` instead",
        "what is tried in place of that key is more than there are experts; a test of the family tries what fits",
    ),
    (
        r"internlm-moe|moe-.*",
        r"weighing",
        r"moe_type",
        "one expert per token is not tried together with every kind of experts; a test of the families tries each",
    ),
    (
        r"torchtitan-llama",
        r"rotary",
        r"^as_configured: ",
        "the four numbers of scaled angles at once are not among what is tried; tests of the family try each",
    ),
    (_UNSCALED, r"scaling", r"", "`keys` refuses `use_rope_scaling`, which alone leads there"),
    (
        r"megatron-.*",
        r"training_config\.num_query_groups",
        r"^`\{\{ num_key_value_heads( \| default\(\w+\))? if num_key_value_heads \| default\(num_attention_heads\) != ",
        "where the number is absent, the other branch is taken",
    ),
    (
        r"megatron-.*|internevo-qwen3-moe",
        r"training_config\.(kv_channels|head_dim)",
        r"^`\{\{ head_dim( \| default\(| \}\}` instead)",
        "`head_dim` is an axis, whose size is known when the configuration is written",
    ),
    (
        r"llama",
        r"rotary",
        r"^halves: not \(qk_interleaved \| default\(not \(adapt_hf \| default\(true\)\)\)\)",
        "where both are absent, `pairs` holds and comes first",
    ),
    (
        r"internlm-moe|moe-.*",
        r"rotary",
        r"^halves: not \(qk_interleaved \| default\(not \(\w+ \| default\(true\)\)\)\) and \(adapt_hf",
        "where `qk_interleaved` is absent, `adapt_hf` alone decides, in the second half",
    ),
    (
        r"xtuner-moe|torchtitan-.*",
        r"output",
        r"not \(tie_word_embeddings( \| default\(true\))?\)$",
        "`keys` gives the default false before an expression sees it",
    ),
    (
        r"internlm-moe|moe-.*",
        r"routing",
        r"^told: top_k is number or \(training \| length\) <= 0",
        "whether a file lies beside the checkpoint is not among what is tried; a test of the family tries it",
    ),
    (r".*", r"dims\.groups", r"default\(num_attention_heads\)", "the axis `heads` is that key"),
    (
        r"megatron-(mixtral|qwen2-moe|qwen3-moe)",
        r"dims\.expert",
        r"`num_experts if moe_router_topk <=",
        "the axis `chosen` is that key",
    ),
    (
        r"torchtitan-.*|xtuner-moe",
        r"config\.rope_scaling",
        r"left out",
        "scaled angles are several keys together, or are asked about; a test of the family tries them",
    ),
    (
        r"internevo-.*",
        r"config\.pad_token_id",
        r"^`\{\{ [\w.]+ if given\.pad_token_id is number and given\.pad_token_id < \w+ else ",
        "a padding id that a given configuration has is not among what is tried; tests of the families try it",
    ),
    (
        r"meta-llama",
        r"theta",
        r"or \(vocab_size\) < 0 ",
        "where that number is absent, the base is asked for either way",
    ),
    (
        r"megatron-llama",
        r"scaling",
        r"^told: not \((use_rope_scaling \| default\(true\)|options\.rope_factor \| default\(false\))\)",
        "no Megatron writes the factor without the switch",
    ),
    (
        r"llama|internlm3",
        r"fusion",
        r"^fused: enable_qkv_fusion( \| default\(true\))?$",
        "where the key is absent, `apart` holds and comes first",
    ),
    (
        r"megatron-llama",
        r"padding_token",
        r"given\.pad_token_id < \((given\.)?\w+ \| default\(options\.vocab_size\)\)",
        "a padding id beyond a given vocabulary is not among what is tried; a test of the family tries it",
    ),
    (
        r"meta-llama",
        r"theta",
        r"given\.rope_theta \| default\(given\.\w+",
        "a base that only `rope_parameters` has is not among what is tried; a test of the family tries it",
    ),
    (
        r"torchtitan-qwen3|internevo-.*",
        r"queries|wv|down|up|head|router|layers\.\{layer\}\.feed_forward\.w1\.weight",
        r"without `when`",
        "the rule has an empty one, in place of that of the family that it extends",
    ),
    (
        r"internevo-qwen\d-moe",
        r"dims\.shared",
        r"^`\(\(\(hidden \* mlp_ratio\) \* num_shared_experts\) \| int",
        "a ratio that gives no whole width is not among what is tried; a test of the family tries one",
    ),
    (
        r"internevo-(mixtral|qwen3-moe)",
        r"dims\.ffn",
        r"^`\(\(hidden_size \* mlp_ratio\)",
        "the axis `hidden` is that key",
    ),
    (r"meta-llama", r"dims\.ffn", r"^`\(\(\(8 \* dim ", "the axis `hidden` is that key"),
    (
        r"megatron-.*",
        r"norms",
        r"^fused: not \(apply_layernorm_1p \| default\((?!training\.)[\w.]+ \| ",
        "what Megatron-Bridge saves has neither numbered layers nor arguments, so it is never `fused`",
    ),
    (
        r"megatron-.*",
        r"norms",
        r"^(fused|minus_one): .*layernorm_zero_centered_gamma \| default\((true|false)\)",
        "norms' names, with arguments that say nothing of them, are not among what is tried; tests try each",
    ),
    (
        r"internlm2(-official)?",
        r"fusion",
        r"^apart: not \(enable_qkv_fusion \| default\(false\)\) and not present",
        "linears apart of which no key says what they are are not among what is tried; a test of the family tries them",
    ),
)
# Of which families, which edits, and why the workflow or its comment is silent.
SILENT = (
    (
        r"internevo-baichuan2",
        r".*`queries groups` for `groups queries` .*|config: num_(key_value|attention)_heads: .*",
        "each head of queries has keys of its own, so the order and the number are the same",
    ),
    (
        r"internevo-qwen3-moe",
        r"config: rms_norm_eps: .*",
        "another epsilon is refused, and one that is not said is asked about",
    ),
    (
        r"torchtitan-llama",
        r"variants: (`'linear'` for `'llama3'`|`4096` for `8192`)",
        "red; the comment compares what is tried of both, and of either another constant is",
    ),
    (
        r"torchtitan-.*|xtuner-moe",
        r"config: (rope_scaling left out|rms_norm_eps: 1e-06)",
        "scaled angles, and another epsilon than XTuner's, are asked about; a test of the family tries them",
    ),
    (
        r".*",
        r"training_config: `default\(true\)` for `default\(false\)`",
        "`keys` gives the default false to config.json before an expression sees it",
    ),
    (
        r"xtuner-moe|torchtitan-.*",
        r"(variants|config): `default\(true\)` for `default\(false\)`",
        "`keys` gives the default false before an expression sees it",
    ),
    (
        _UNSCALED,
        r"(config|variants): (rope_(scaling|parameters).*|`default\(4\.0\)` .*|`'linear'` .*|`2\.0 if` .*"
        r"|`4096` for `8192`)",
        "`keys` refuses `use_rope_scaling`, which alone leads there",
    ),
)


Found = Mutant | Outcome


@dataclass(frozen=True)
class Score:
    family: str
    mutants: list[Mutant]
    edits: list[Outcome]


@dataclass(frozen=True)
class Share:
    """Some mutants or edits of a family, by their numbers."""

    family: str
    of: str  # mutants | edits
    numbers: tuple[int, ...]


def families() -> list[str]:
    """Families with rules of their own."""
    names = sorted(path.stem for path in (ROOT / "mappings" / "families").glob("*.yaml"))
    return [name for name in names if load_mapping(_file(name)).rules]


def _file(family: str) -> Path:
    return ROOT / "mappings" / "families" / f"{family}.yaml"


@lru_cache(maxsize=1)
def _known(family: str) -> Known:
    return known_of(load_mapping(_file(family)))


def try_share(share: Share) -> list[Found]:
    """What shows each mutant or edit of a share."""
    known = _known(share.family)
    if share.of == "edits":
        edits = list(edits_of(known.mapping))
        return [outcome(known, edits[number]) for number in share.numbers]
    mutants = list(mutants_of(known.mapping))
    return [*try_mutants(known.mapping, [mutants[number] for number in share.numbers])]


def score(names: Sequence[str], every: int, *, go_on: bool) -> list[Score]:
    """Families; of their mutants and edits every so many. What is found is kept at once.

    Args:
        go_on: take what was kept of the same mapping and was shown, and try the rest.
    """
    digests = {name: load_mapping(_file(name)).digest for name in names}
    found: dict[tuple[str, str], dict[int, Found]] = {}
    KEPT.parent.mkdir(exist_ok=True)
    if go_on and KEPT.is_file():
        for digest, family, of, number, data in map(json.loads, KEPT.read_text("utf-8").splitlines()):
            one = Mutant(**data) if of == "mutants" else Outcome(**data)
            if digests.get(family) == digest and not problem(family, one):
                found.setdefault((family, of), {})[number] = one
    running: dict[Future[list[Found]], Share] = {}
    with (
        ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool,
        KEPT.open("a" if go_on else "w") as kept,
    ):
        for family in names:
            mapping = load_mapping(_file(family))
            for of, listed in (("mutants", mutants_of(mapping)), ("edits", edits_of(mapping))):
                known = found.setdefault((family, of), {})
                left = [i for i, _ in enumerate(listed) if i % every == 0 and i not in known]
                for at in range(0, len(left), SHARE):
                    share = Share(family, of, tuple(left[at : at + SHARE]))
                    running[pool.submit(try_share, share)] = share
        for done in as_completed(running):
            share = running[done]
            for number, one in zip(share.numbers, done.result(), strict=True):
                found[share.family, share.of][number] = one
                line = [digests[share.family], share.family, share.of, number, asdict(one)]
                print(json.dumps(line), file=kept, flush=True)
                if told := problem(share.family, one):
                    print(told, flush=True)
    ordered = {key: [by[number] for number in sorted(by)] for key, by in found.items()}
    return [Score(name, ordered[name, "mutants"], ordered[name, "edits"]) for name in names]


def reason(family: str, one: Found) -> str | None:
    """Why a mutant is no other mapping, or an edit none; None where nothing says so."""
    if isinstance(one, Mutant):
        listed = (e for e in EQUAL if re.fullmatch(e[1], one.where) and re.search(e[2], one.what))
    else:
        listed = (e for e in SILENT if re.fullmatch(e[1], one.edit))
    return next((entry[-1] for entry in listed if re.fullmatch(entry[0], family)), None)


def problem(family: str, one: Found) -> str | None:
    """What is wrong: a mutant that survives without a reason, an edit that stays green or that no comment tells."""
    if isinstance(one, Mutant):
        told = f"{one.kind}: {one.where}: {one.what} survives" if one.caught_by is None else None
    else:
        green = (
            "the workflow is green" if one.red is None else "the comment says nothing" if one.comment is None else ""
        )
        told = f"{one.edit}: {green}" if green else None
    return None if told is None or reason(family, one) is not None else f"{family}: {told}"


def tried(scores: Sequence[Score], every: int, known: Sequence[str]) -> str:
    """Which share of what a command tried of which families, and which it left out: a score is of no more than that."""
    left = [name for name in known if name not in {one.family for one in scores}]
    share = "every mutant and edit" if every == 1 else f"one of {every} mutants and edits"
    told = f"Tried: {share} of {', '.join(one.family for one in scores)}."
    return told + (f" Not tried: {', '.join(left)}." if left else "")


def page(scores: Sequence[Score], every: int, known: Sequence[str]) -> str:
    lines = [
        "# How wrong mappings are caught",
        "",
        "`make score` regenerates this page from every mutant and edit of every family. `make soak` fails if one is",
        "not caught and no reason is given for it.",
        "",
        f"**{tried(scores, every, known)}**",
        "",
        "## Mutants",
        "",
        "A mutant is a family's file with one change: in a rule, split, stage or order of axes, or in an expression,",
        "option, key or token. It counts for the first check that catches it.",
        "",
    ]
    kinds = sorted({m.kind for one in scores for m in one.mutants})
    lines += [
        "| kind | mutants | loading | lint | the committed meaning | equivalent | not caught |",
        "|---|---|---|---|---|---|---|",
    ]
    every_mutant = [(one.family, m) for one in scores for m in one.mutants]
    for kind in [*kinds, "all"]:
        listed = [(family, m) for family, m in every_mutant if kind in ("all", m.kind)]
        by = Counter(m.caught_by for _, m in listed)
        rest = len(listed) - by["loading"] - by["lint"] - by[None]
        same = sum(m.caught_by is None and reason(family, m) is not None for family, m in listed)
        shown = f"{by['loading']} | {by['lint']} | {rest} | {same} | {by[None] - same}"
        lines.append(f"| {kind} | {len(listed)} | {shown} |")
    lines += [
        "",
        "Mutants that no check catches, and why they are equivalent to the mapping or are caught elsewhere:",
        "",
        *_why([(f, m, f"`{m.where}`: {m.what}") for f, m in every_mutant if m.caught_by is None]),
    ]
    lines += [
        "",
        "## Careless edits",
        "",
        "Mistakes that people make when they edit a mapping (`tests/careless.py`), chosen before anyone knew which of",
        "them are caught. The workflow is red if lint or `engine prove` fails. If the edit's meaning is committed with",
        "it, the comment on the pull request names the tensor or value that differs.",
        "",
        "| family | edits | workflow red | named in the comment |",
        "|---|---|---|---|",
    ]
    for one in scores:
        red, told = (sum(getattr(e, name) is not None for e in one.edits) for name in ("red", "comment"))
        lines.append(f"| {one.family} | {len(one.edits)} | {red} | {told} |")
    quiet = [(one.family, e, e.edit) for one in scores for e in one.edits if e.red is None or e.comment is None]
    lines += ["", "Edits that are not both, and why: most change only what `keys` already decides.", "", *_why(quiet)]
    return "\n".join(lines) + "\n"


def _why(listed: Sequence[tuple[str, Found, str]]) -> list[str]:
    """A table of what the same reason is given for."""
    by: dict[str, dict[str, list[str]]] = {}
    for family, one, what in listed:
        by.setdefault(reason(family, one) or "**not known**", {}).setdefault(what, []).append(family)
    rows = [(", ".join(names), what, why) for why, held in by.items() for what, names in held.items()]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return ["| families | what | why |", "|---|---|---|", *lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=families())
    parser.add_argument("--every", type=int, default=1, help="try one of so many")
    parser.add_argument("--go-on", action="store_true", help="keep what an earlier run showed, and try the rest")
    parser.add_argument("--write", action="store_true", help="write the page")
    options = parser.parse_args()
    scores = score(options.families, options.every, go_on=options.go_on)
    if options.write:
        PAGE.write_text(page(scores, options.every, families()), encoding="utf-8")
    print(tried(scores, options.every, families()))
    return 1 if any(problem(by.family, one) for by in scores for one in (*by.mutants, *by.edits)) else 0


if __name__ == "__main__":
    sys.exit(main())
