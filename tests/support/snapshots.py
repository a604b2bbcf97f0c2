"""Snapshots of what bundled mappings mean; `make snapshots` writes them, the diff is the review.

A family is planned at a tiny size over every parallel layout, and its variants over one; a release
at its real size. No checkpoint is read: the headers are invented.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.explaining.describe import describe_plan
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.model import Mapping as MappingFile
from engine.language.search import bundled, list_names
from engine.planning.destination import Request
from engine.planning.model import Plan
from engine.planning.planner import make_plan
from engine.proving.normal import normal_form, shape_text
from engine.proving.saved_plan import compact_json
from tests.support.invented import invent

FOLDER = Path(__file__).parent.parent / "snapshots"
TINY = {"layer": 4, "hidden": 32, "heads": 8, "groups": 4, "ffn": 24, "vocab": 64, "expert": 4, "labels": 1}
LAYOUTS = {
    "tp1 pp1": Request(None, {}, 1),
    "tp2 pp2": Request(None, {"tp": 2, "pp": 2}, 1),
    "tp4": Request(None, {"tp": 4}, 1),
    "pp3, uneven": Request(None, {"pp": 3}, 1),
    "tp2 pp2, 2 chunks": Request(None, {"tp": 2, "pp": 2}, 2),
    "isp wp2": Request("isp", {"wp": 2}, 1),
    "isp tp2 wp4": Request("isp", {"tp": 2, "wp": 4}, 1),
}
META = {"tp1": Request(None, {}, 1), "tp2": Request(None, {"tp": 2}, 1), "tp4": Request(None, {"tp": 4}, 1)}
USUAL = ("lm", "plain", "none")  # choices of variants without a default
BIASED = {
    "attention_biases": ("attention.", "mixer."),
    "mlp_biases": ("feed_forward.", "mlp.w"),
    "biases": ("attention.", "feed_forward."),
}
TRAINING = {"meta-llama": {"norm_eps": 1e-5}}
AS_TRAINED = {name: {"attention_biases": "all"} for name in ("internlm", "internlm-7b", "internlm-chat-7b")}


def names() -> list[str]:
    """Every bundled mapping: `families/internlm2.yaml`, `internlm2-7b.yaml`."""
    folder = bundled("mappings")
    return [name for name in list_names() if (folder / name).is_file()]


def path_of(name: str) -> Path:
    kind = "" if name.startswith("families/") else "releases/"
    return FOLDER / f"{kind}{name.removesuffix('.yaml')}.json"


def text_of(name: str) -> str:
    """A mapping's snapshot."""
    mapping = load_mapping(bundled("mappings") / name)
    return compact_json(family(mapping) if name.startswith("families/") else release(mapping), 140)


def usual(mapping: MappingFile) -> dict[str, str]:
    """A choice for every variant: what is written by default, or the usual one."""
    chosen = {
        v.name: v.default or next((c for c in USUAL if c in v.choices), next(iter(v.choices)))
        for v in mapping.variants.values()
    }
    return {**chosen, **{k: v for k, v in AS_TRAINED.get(mapping.name, {}).items() if k in chosen}}


def planned(mapping: MappingFile, request: Request, sizes: Mapping[str, int], choices: Mapping[str, str]) -> Plan:
    """The plan of an invented checkpoint; what the planner decides must be what was invented."""
    layout = load_layout(mapping.layout)
    biased = [part for name, parts in BIASED.items() if choices.get(name) == "all" for part in parts]
    training = TRAINING.get(layout.name)
    checkpoint = invent(mapping, layout, request, sizes=sizes, choices=choices, biased=biased, training=training)
    settings = {v.name: choices[v.name] for v in mapping.variants.values() if v.decide == "shapes"}
    plan = make_plan(mapping, layout, checkpoint, settings=settings)
    decided = {name: d.choice for name, d in plan.decisions.items()}
    for name, choice in choices.items():
        if decided[name] != choice:
            raise EngineError("E202", f"variant `{name}` is read as {decided[name]}", got=choice)
    return plan


def family(mapping: MappingFile) -> dict[str, Any]:
    """Every layout whole; of every other choice only the tensors and config keys that it changes."""
    layouts = LAYOUTS if mapping.layout != "meta-llama" else META
    base = usual(mapping)
    at, request = list(layouts.items())[1]
    plain = planned(mapping, request, TINY, base)
    tensors = _tensors(plan=plain)
    result: dict[str, Any] = {
        "mapping": mapping.name,
        "sizes": {name: plain.sizes[name] for name in sorted(plain.sizes)},
        "choices": dict(sorted(base.items())),
        "config": dict(sorted(plain.config.items())),
        "layouts": {name: _layout(mapping, asked, base) for name, asked in layouts.items()},
    }
    others = {
        f"{v.name}: {choice}": {**base, v.name: choice}
        for v in mapping.variants.values()
        for choice in v.choices
        if choice != base[v.name]
    }
    result[f"variants, at {at}"] = {
        told: _variant(mapping, request, choices, tensors, plain) for told, choices in others.items()
    }
    return result


def _layout(mapping: MappingFile, request: Request, choices: Mapping[str, str]) -> dict[str, Any]:
    try:
        plan = planned(mapping, request, TINY, choices)
    except EngineError as error:
        return {"refused": f"{error.code} {error.message}: {error.got}"}
    normal = normal_form(plan)
    return {"stages": normal["stages"], "tensors": _tensors(plan)}


def _tensors(plan: Plan) -> dict[str, list[str]]:
    """Target pattern → its shape, what it is read from, and the copies."""
    result: dict[str, list[str]] = {}
    for row in normal_form(plan)["tensors"]:
        lines = [f"{row['shape']} {row['dtype']}, by {row['rule']}"]
        for source in row["sources"]:
            copies = f", {source['replicas']} replicas" if "replicas" in source else ""
            shards = "; ".join(source["shards"])
            lines.append(f"from {source['source']}: {source['axes']} | {source['cut']}{copies} | {shards}")
        lines += row["copies"]
        lines += [f"{key} {row[key]}" for key in ("transform", "note", "read as") if key in row]
        lines += [f"at {place}" for place in row.get("places", ())]
        assert row["target"] not in result, row["target"]
        result[row["target"]] = lines
    return result


def _variant(
    mapping: MappingFile, request: Request, choices: Mapping[str, str], before: Mapping[str, list[str]], plain: Plan
) -> dict[str, Any]:
    """What differs under other choices."""
    try:
        plan = planned(mapping, request, TINY, choices)
    except EngineError as error:
        return {"refused": f"{error.code} {error.message}"}
    after = _tensors(plan)
    keys = sorted({*plain.config, *plan.config})
    changed = {
        "gone": [name for name in before if name not in after],
        "tensors": {name: lines for name, lines in after.items() if lines != before.get(name)},
        "config": {k: plan.config.get(k) for k in keys if plan.config.get(k) != plain.config.get(k)},
    }
    return {key: value for key, value in changed.items() if value}


def release(mapping: MappingFile) -> dict[str, Any]:
    """What `engine plan --json` says at the sizes the release expects, on two tensor parallel ranks."""
    request = Request(None, {"tp": 2}, 1)
    facts = describe_plan(planned(mapping, request, dict(mapping.expect), usual(mapping)))
    return {
        "mapping": mapping.name,
        "version": mapping.version,
        "files": facts["mapping"]["files"],
        "ranks": facts["source"]["ranks"],
        "sizes": facts["sizes"],
        "variants": {name: d["choice"] for name, d in facts["variants"].items()},
        "options": facts["options"],
        "tensors": {
            row["target"]: f"{shape_text(row['shape'])} {row['dtype']} × {row['count']}, by {row['rule']}, "
            f"{row['copies']} copies from {row['sources']} × {row['source']}"
            for row in facts["rules"]
        },
        "outputs": [f"{o['file']}: {o['tensors']} tensors, {o['bytes']} bytes" for o in facts["outputs"]],
        "count": facts["tensors"],
        "bytes": facts["bytes"],
        "config": facts["config"],
        "notices": facts["notices"],
    }


def write_all() -> None:
    wanted = {path_of(name): text_of(name) for name in names()}
    for stale in set(FOLDER.rglob("*.json")) - set(wanted):
        stale.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_all()
