"""Tensors whose names number the slices of an axis, as InternEvo's grouped experts: each expert rank's are in one.

The fixtures were saved by InternEvo's own code (January and May 2025), on two expert ranks.
"""

from __future__ import annotations

import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file

import engine
from engine import api
from engine.errors import EngineError
from engine.formats.configs import read_pickled_mapping
from engine.storage.local import LocalStore
from engine.storage.store import File
from tests.support.depth import crossed

GENUINE = Path(__file__).parents[1] / "fixtures" / "internevo_2025"
STACKED, ROWS = GENUINE / "moe_ep2", GENUINE / "moe_isp_wp2_ep2"
MAPPING, EXPERTS, LAYERS = "families/moe-grouped.yaml", 4, 2
NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
PREFIX = "model.blocks.{}.mlp.moe_layer.experts.wrapped_experts.{}.{}.weight"


def experts_of(step: Path) -> dict[str, torch.Tensor]:
    """Hugging Face name → tensor: `GroupedFeedForward` multiplies tokens with [expert, in, out] from the right."""
    found: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for weight, name in NAMES.items():
            parts: list[torch.Tensor] = []
            files = {tuple(map(int, re.findall(r"expert(\d+)_.p(\d+)", one.name)[0])): one
                     for one in step.glob(f"model_moe_layer{layer}_*.pt")}  # fmt: skip
            for group in sorted({group for group, _ in files}):
                held = [torch.load(one) for (at, _), one in sorted(files.items()) if at == group]
                parts += [torch.cat([one[PREFIX.format(layer, group, weight)] for one in held])]
            groups = [one.reshape(EXPERTS // len(parts), -1, one.shape[-1]) for one in parts]
            for number, one in enumerate(torch.cat(groups)):
                found[f"model.layers.{layer}.mlp.experts.{number}.{name}.weight"] = one.T.contiguous()
    return found


def regrouped(source: Path, step: Path, groups: int, ranks: int) -> Path:
    """The experts of a checkpoint on other expert ranks, and their rows cut over other weight ranks."""
    whole = experts_of(source)
    shutil.copytree(source, step, ignore=shutil.ignore_patterns("model_moe_*"))
    for layer in range(LAYERS):
        for group in range(groups):
            numbers = range(group * EXPERTS // groups, (group + 1) * EXPERTS // groups)
            files: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
            for weight, name in NAMES.items():
                each = [whole[f"model.layers.{layer}.mlp.experts.{n}.{name}.weight"].T for n in numbers]
                for file, rows in zip(files, torch.tensor_split(torch.cat(each), ranks), strict=True):
                    file[PREFIX.format(layer, group, weight)] = rows.clone()
            for rank, file in enumerate(files):
                torch.save(file, step / f"model_moe_layer{layer}_expert{group}_wp{rank}.pt")
    return step


def converted(step: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    engine.convert(MAPPING, step, out, **options)
    return {name: one for name, one in load_file(out / "model.safetensors").items() if ".experts." in name}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys() and len(one) == EXPERTS * LAYERS * len(NAMES)
    assert all(torch.equal(one[name], two[name]) for name in one)


def refused(step: Path, code: str, *told: str) -> None:
    with pytest.raises(EngineError) as caught:
        engine.plan(MAPPING, step)
    assert caught.value.code == code and all(text in str(caught.value) for text in told), str(caught.value)


@pytest.mark.parametrize("source", [STACKED, ROWS], ids=lambda one: one.name)
def test_experts_of_each_expert_rank_come_apart_in_order(source: Path, tmp_path: Path) -> None:
    same(converted(source, tmp_path / "hf"), experts_of(source))


@pytest.mark.parametrize(("groups", "ranks"), crossed([1, 2, 4], [1, 2, 5]))
def test_any_number_of_expert_and_weight_ranks_gives_the_same_experts(groups: int, ranks: int, tmp_path: Path) -> None:
    same(converted(regrouped(ROWS, tmp_path / "step", groups, ranks), tmp_path / "hf"), experts_of(ROWS))


def test_gate_and_up_of_slices_are_columns_of_one_matrix_where_they_are_fused(tmp_path: Path) -> None:
    """Weight ranks cut its rows, and InternEvo saves the first columns as `w1`: each rank's rows of it."""
    step = regrouped(ROWS, tmp_path / "step", 2, 2)
    config = read_pickled_mapping(File(LocalStore(ROWS), "model_config.pt"))
    torch.save({**config, "dtype": torch.float32, "mlp_layer_fusion": True}, step / "model_config.pt")
    (step / "config_file.pt").unlink()
    same(converted(step, tmp_path / "hf"), experts_of(ROWS))


@pytest.mark.parametrize(
    ("count", "kept"), crossed([1, 2, 4], [(STACKED, {"tp": 2}), (ROWS, {"mode": "isp_wp", "wp": 2})])
)
def test_experts_are_written_in_as_many_slices_as_are_asked_for(
    count: int, kept: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source, how = kept
    whole = converted(source, tmp_path / "hf")
    for number, job in enumerate((engine.reverse, engine.reshard)):
        job(MAPPING, source if number else tmp_path / "hf", tmp_path / f"back{number}", ranks={"expert": count}, **how)
        written = {one.name.split("_")[3] for one in (tmp_path / f"back{number}").glob("model_moe_*")}
        assert written == {f"expert{rank}" for rank in range(count)}
        same(converted(tmp_path / f"back{number}", tmp_path / f"again{number}"), whole)


@pytest.mark.parametrize("source", [STACKED, ROWS], ids=lambda one: one.name)
def test_training_gets_its_own_slices_again(source: Path, tmp_path: Path) -> None:
    """By `reverse --like` and by `reshard`, which keeps what is not asked for."""
    engine.convert(MAPPING, source, tmp_path / "hf")
    engine.reverse(MAPPING, tmp_path / "hf", tmp_path / "like", like=source)
    engine.reshard(MAPPING, source, tmp_path / "kept")
    for folder in (tmp_path / "like", tmp_path / "kept"):
        same(experts_of(folder), experts_of(source))
        for file in source.glob("model_*p*.pt"):  # the names of every slice, in files of the same names
            assert torch.load(file).keys() == torch.load(folder / file.name).keys()


@pytest.mark.parametrize("job", ["reverse", "reshard"])
def test_a_saved_plan_of_slices_writes_what_the_job_writes(job: str, tmp_path: Path) -> None:
    engine.convert(MAPPING, ROWS, tmp_path / "hf")
    src = tmp_path / "hf" if job == "reverse" else ROWS
    how: dict[str, Any] = {"ranks": "expert=2,wp=2", "mode": "isp_wp"}
    saved, parts = tmp_path / "plan.json", tmp_path / "parts"
    plan = api.save_plan(saved, MAPPING, src, job=job, **how)
    rules = [rule["target"] for rule in api.describe_plan(plan)["rules"]]
    assert "blocks.{0…1}.mlp.moe_layer.experts.wrapped_experts.{0…1}.w1.weight" in rules
    for number in (1, 2):
        api.part(saved, f"{number}/2", parts)
    api.commit(saved, parts)
    getattr(engine, job)(MAPPING, src, tmp_path / "back", **how)
    assert all(one.read_bytes() == (parts / one.name).read_bytes() for one in (tmp_path / "back").glob("model_*.pt"))


def test_slices_that_experts_do_not_divide_into_are_refused(tmp_path: Path) -> None:
    engine.convert(MAPPING, STACKED, tmp_path / "hf")
    with pytest.raises(EngineError, match=r"E214(.|\n)*`expert` of 4 does not divide by 3(.|\n)*expert=1, 2, 4"):
        engine.plan_reverse(MAPPING, tmp_path / "hf", ranks="expert=3")
    with pytest.raises(EngineError, match=r"E001(.|\n)*no expert ranks"):
        engine.plan_reverse("families/internlm-moe.yaml", tmp_path / "hf", ranks="expert=2")
    with pytest.raises(EngineError, match=r"E001(.|\n)*no wp ranks(.|\n)*or give --mode isp or --mode isp_wp"):
        engine.plan_reverse(MAPPING, tmp_path / "hf", ranks="expert=2,wp=2")
    mapping = own(tmp_path / "own.yaml", "name: grouped_w2, axes: (expert ffn) hidden")
    with pytest.raises(EngineError, match=r"E214(.|\n)*expert=2 and --tp 2, which cut `expert ffn`"):
        engine.plan_reverse(mapping, tmp_path / "hf", ranks="expert=2,tp=2")


@pytest.mark.parametrize("kind", ["MegaBlock", "MegaBlock-Dropless"])
def test_megablocks_matrices_are_read_too(kind: str, tmp_path: Path) -> None:
    """`MegaBlockFeedForward` has them as [expert, in, out], `MegaBlockGroupedFeedForward` as [expert ffn, hidden]."""
    whole, step, tp = experts_of(STACKED), tmp_path / "step", 2
    made = {"moe_type": kind, "capacity_factor": 1.0} if kind == "MegaBlock" else {"moe_type": kind}
    engine.reshard(MAPPING, STACKED, step, tp=tp, ranks="expert=1")
    for rank in range(tp):
        file = step / f"model_tp{rank}_pp0.pt"
        torch.save({name.replace("gate.wg.", "gate."): value for name, value in torch.load(file).items()}, file)
    for layer in range(LAYERS):
        files: list[dict[str, torch.Tensor]] = [{} for _ in range(tp)]
        for weight, name in NAMES.items():
            each = [whole[f"model.layers.{layer}.mlp.experts.{n}.{name}.weight"] for n in range(EXPERTS)]
            if kind == "MegaBlock":
                parts = torch.stack([one.T for one in each]).chunk(tp, 1 if weight == "w2" else 2)
            else:
                blocks = torch.stack([one.T if weight == "w2" else one for one in each])
                parts = [one.flatten(0, 1) for one in blocks.chunk(tp, 1)]
            for file, part in zip(files, parts, strict=True):
                file[f"blocks.{layer}.mlp.moe_layer.experts.wrapped_experts.0.{weight}"] = part.contiguous()
        for rank, file in enumerate(files):
            torch.save(file, step / f"model_moe_layer{layer}_expert0_tp{rank}.pt")
    config = torch.load(step / "model_config.pt", weights_only=False)
    torch.save({**config, **made}, step / "model_config.pt")
    same(converted(step, tmp_path / "hf"), whole)
    if kind == "MegaBlock-Dropless":  # which does not run with expert ranks
        for file in step.glob("model_moe_*"):
            held = {name.replace("experts.0", "experts.1"): one for name, one in torch.load(file).items()}
            torch.save(held, file.with_name(file.name.replace("expert0", "expert1")))
        refused(step, "E204", "`(expert ffn) hidden`, of which expert and ffn are cut")


def test_a_slice_that_is_missing_or_in_anothers_place_is_refused(tmp_path: Path) -> None:
    step = regrouped(ROWS, tmp_path / "step", 4, 1)
    one, other = (step / f"model_moe_layer0_expert{group}_wp0.pt" for group in (1, 2))
    held = one.read_bytes()
    one.unlink()
    refused(step, "E207", "expert1")
    one.write_bytes(held)
    torch.save({name: value + 1 for name, value in torch.load(other).items()}, one)
    refused(step, "E208", "wrapped_experts.2.w1.weight` is not in the file of expert 2", one.name)
    one.write_bytes(held)
    for last in step.glob("model_moe_layer*_expert3_*"):
        last.unlink()
    refused(step, "E203", "axis `expert hidden`", "rows cut over expert and wp")


def test_settings_of_experts_that_change_what_they_compute_are_refused(tmp_path: Path) -> None:
    shutil.copytree(STACKED, tmp_path / "step", ignore=shutil.ignore_patterns("config_file.pt"))
    config = tmp_path / "step" / "model_config.pt"
    plain = {"hidden_size": 32, "num_attention_heads": 4, "num_layers": 2, "vocab_size": 64, "mlp_ratio": 1.5,
             "multiple_of": 16, "num_experts": 4, "top_k": 2, "layer_norm_epsilon": 1e-5}  # fmt: skip
    for kwargs in ({"scoring_func": "sigmoid"}, {"normalize_expert_weights": False}, {"routed_scaling_factor": 2.5}):
        torch.save({**plain, "moe_layer_kwargs": kwargs}, config)
        refused(tmp_path / "step", "E209", f"moe_layer_kwargs.{next(iter(kwargs))}")
    torch.save({**plain, "moe_layer_kwargs": {"capacity_factor": None, "use_grouped_mlp": True}}, config)
    engine.plan(MAPPING, tmp_path / "step")


def own(path: Path, *rules: str) -> str:
    """A family of one's own that changes rules of the bundled one."""
    head = ["mapping: 1", "name: own", "version: 1.0.0", "description: its own axes", f"extends: {MAPPING}", "rules:"]
    path.write_text("\n".join([*head, *(f"  - {{{rule}}}" for rule in rules)]) + "\n", encoding="utf-8")
    return str(path)


def test_rows_of_slices_that_do_not_follow_each_other_are_refused(tmp_path: Path) -> None:
    """Over weight ranks the rows of one slice come before those of the next: the number must be the outermost axis."""
    inner = own(tmp_path / "inner.yaml", "name: rows_w1, axes: (hidden expert) ffn")
    with pytest.raises(EngineError, match="do not follow each other in the whole tensor") as caught:
        engine.plan(inner, ROWS)
    assert caught.value.code == "E208"


def test_slices_whose_rows_are_cut_by_split_rows_follow_each_other(tmp_path: Path) -> None:
    step = tmp_path / "step"
    shutil.copytree(STACKED, step, ignore=shutil.ignore_patterns("config_file.pt"))
    for file in step.glob("model_moe_*"):
        rows = {name: torch.randn(one.flatten(0, 1).shape).chunk(2) for name, one in torch.load(file).items()}
        for rank in range(2):
            held = {name: parts[rank].clone() for name, parts in rows.items()}
            torch.save(held, file.with_name(file.name.replace("tp0", f"tp{rank}")))
    engine.reshard(MAPPING, STACKED, tmp_path / "dense", tp=2)
    for rank in range(2):
        shutil.copy(tmp_path / "dense" / f"model_tp{rank}_pp0.pt", step)
    mapping = own(tmp_path / "own.yaml", *(f"name: rows_{weight}, split: rows" for weight in NAMES))
    engine.convert(mapping, step, tmp_path / "hf")
    same({n: one for n, one in load_file(tmp_path / "hf" / "model.safetensors").items() if ".experts." in n},
         experts_of(step))  # fmt: skip


@pytest.mark.parametrize("source", [STACKED, ROWS], ids=lambda one: one.name)
def test_experts_may_be_equal_as_after_upcycling(source: Path, tmp_path: Path) -> None:
    step = tmp_path / "step"
    shutil.copytree(source, step)
    for file in step.glob("*_expert1_*"):
        held = torch.load(step / file.name.replace("expert1", "expert0"))
        torch.save({name.replace("experts.0", "experts.1"): one for name, one in held.items()}, file)
    same(converted(step, tmp_path / "hf"), experts_of(step))


def test_a_target_is_never_in_slices(tmp_path: Path) -> None:
    name = "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
    for rule in (f'targets: [{{name: "{name}", axes: expert ffn hidden}}]', f'target: "{name}"'):
        with pytest.raises(EngineError, match="`expert` is in the name of a target and among its axes"):
            engine.plan(own(tmp_path / "own.yaml", f"name: grouped_w1, {rule}"), STACKED)


def test_files_without_the_number_hold_slice_0(tmp_path: Path) -> None:
    """As a distributed checkpoint of one expert rank; more slices, each recorded as a whole tensor, are refused."""
    whole = experts_of(STACKED)
    for groups in (1, 2):
        step = tmp_path / f"step{groups}"
        shutil.copytree(STACKED, step, ignore=shutil.ignore_patterns("model_moe_*", "model_tp*"))
        state = torch.load(STACKED / "model_tp0_pp0.pt")
        for layer, (weight, name) in product(range(LAYERS), NAMES.items()):
            each = [whole[f"model.layers.{layer}.mlp.experts.{number}.{name}.weight"].T for number in range(EXPERTS)]
            for group, part in enumerate(torch.stack(each).chunk(groups)):
                state[PREFIX.format(layer, group, weight)] = part.clone()
        torch.distributed.checkpoint.save(state, checkpoint_id=step, no_dist=True)
    same(converted(tmp_path / "step1", tmp_path / "hf"), whole)
    refused(tmp_path / "step2", "E208", "or 0 alone in names of tensors", "save the checkpoint in another mode")
