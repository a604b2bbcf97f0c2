"""Rank files that are not the ranks their names say are refused by every command, in every mode of a layout."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import engine
from engine.checkpoint import identity
from engine.commands.main import cli
from engine.errors import EngineError
from engine.formats.headers import ITEM_SIZES, FileHeader, TensorHeader, dense_strides
from engine.language.layout_file import load_layout
from engine.run import slices
from engine.storage.local import LocalStore
from engine.storage.store import File
from tests.attacks.faults import swap
from tests.support.depth import sampled
from tests.support.families import model_of, save_family
from tests.support.readers import read_rank_file
from tests.support.shards import Model, save, with_root

V2 = Model("v2", layers=6, groups=2, bias=False)
LETTERS = {"mlp_letters": "w2_is_down"}
FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"
META = model_of("meta", heads=4, groups=4)
EXPERTS = model_of("moe")

# Model, layout, and two files of it that are exchanged: none of these was seen before.
EXCHANGED: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "tensor ranks": (V2, {"tp": 2}, "model_tp0_pp0.pt", "model_tp1_pp0.pt"),
    "middle stages": (V2, {"tp": 1, "pp": 4}, "model_tp0_pp1.pt", "model_tp0_pp2.pt"),
    "isp": (V2, {"mode": "isp", "tp": 1, "wp": 2}, "model_tp0_wp0_pp0.pt", "model_tp0_wp1_pp0.pt"),
    "isp, both": (V2, {"mode": "isp", "tp": 2, "wp": 4}, "model_tp0_wp0_pp0.pt", "model_tp0_wp2_pp0.pt"),
    "later isp": (V2, {"mode": "isp_wp", "wp": 2}, "model_wp0_pp0.pt", "model_wp1_pp0.pt"),
    "experts' ranks": (EXPERTS, {"tp": 2}, "model_moe_layer0_expert0_tp0.pt", "model_moe_layer0_expert0_tp1.pt"),
    "experts": (EXPERTS, {"tp": 1}, "model_moe_layer0_expert0_tp0.pt", "model_moe_layer0_expert1_tp0.pt"),
    "layers of experts": (EXPERTS, {"tp": 1, "pp": 2}, "model_moe_layer0_expert0_tp0.pt",
                          "model_moe_layer2_expert0_tp0.pt"),
    "Meta's ranks": (META, {"tp": 2}, "consolidated.00.pth", "consolidated.01.pth"),
}  # fmt: skip


def made(model: Any, folder: Path, **layout: Any) -> Path:
    (save if isinstance(model, Model) and type(model) is Model else save_family)(model, folder, **layout)
    return folder


def refused(model: Any, folder: Path) -> EngineError:
    with pytest.raises(EngineError) as caught:
        engine.convert(model.mapping, folder, folder.parent / "hf", settings=settings_of(model))
    assert not (folder.parent / "hf").exists()
    return caught.value


def settings_of(model: Any) -> dict[str, str]:
    return {} if model is META else LETTERS


@sampled(2)
@pytest.mark.parametrize("case", EXCHANGED.values(), ids=EXCHANGED)
def test_exchanged_files_are_refused_by_the_names_they_were_saved_under(case: Any, tmp_path: Path) -> None:
    model, layout, one, other = case
    folder = made(model, tmp_path / "step", **layout)
    engine.plan(model.mapping, folder, settings=settings_of(model))  # it is well before
    swap(folder / one, folder / other)
    error = refused(model, folder)
    assert error.code == "E306" and {one, other} <= set(str(error).replace("`", " ").split())


def test_slices_of_queries_that_are_copied_in_pairs_are_no_repeated_heads(tmp_path: Path) -> None:
    """Only key and value heads are ever repeated over neighbouring ranks."""
    folder = made(Model("v2", layers=2, groups=4, bias=False), tmp_path / "step", tp=4)
    states = [torch.load(folder / f"model_tp{rank}_pp0.pt", weights_only=True) for rank in range(4)]
    name = next(name for name in states[0] if name.endswith("wqkv.weight"))
    for one, other in ((0, 1), (2, 3)):
        torch.save({**states[other], name: states[one][name].clone()}, folder / f"model_tp{other}_pp0.pt")
    error = refused(V2, folder)
    assert error.code == "E306" and "same slice" in str(error)


@pytest.mark.parametrize("size", [3, 8, 12, 16])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_bytes_are_compared_to_the_last_whatever_their_number(size: int, kind: Any) -> None:
    one = memoryview(kind(range(size)))
    for other in (bytes(range(size)), bytearray(b"-" + bytes(range(size)))):
        assert slices.same(one, memoryview(other)[-size:])
        changed = memoryview(bytearray(other))[-size:]
        changed[-1] += 1
        assert not slices.same(one, changed)


def test_heads_that_repeat_are_compared_with_tensors_of_as_many_slices() -> None:
    header = TensorHeader("w", "F32", (4, 4), (4, 1), 0)
    cut = [slices.Slices(sources, name, 0) for name, sources in (("k", (0, 1)), ("moved", (2, 3, 4)), ("v", (5, 6)))]
    plan: Any = SimpleNamespace(sources=[SimpleNamespace(header=header)] * 7, slices=cut)
    assert [slices._next(plan, one).name for one in cut] == ["v", "moved", "k"]


class Bytes:
    """Gathers from dense tensors that are whole in memory."""

    def __init__(self, held: list[bytes]) -> None:
        self._held = held

    def gather(self, block: Any, dtype: str) -> memoryview:
        item = ITEM_SIZES[dtype]
        found = bytearray()
        for copy, shift in zip(block.template, block.shifts, strict=True):
            start = (copy.source_offset + block.step * shift) * item
            found += self._held[copy.source][start : start + prod(copy.shape) * item]
        return memoryview(found)


SOME, OTHER = (np.random.default_rng(seed).integers(1, 1 << 30, 64, dtype=np.uint32).tobytes() for seed in (1, 2))
PART = SOME[:128] + OTHER[128:]  # 32 elements are those of `SOME`


@pytest.mark.parametrize(
    ("dtypes", "two", "size", "repeats", "copied"),
    [
        (("F32", "F32"), PART, 64, 1, "a part of the same slice"),
        (("F32", "F32"), PART, 64, 4, None),  # experts, of which training may have changed a part
        (("I32", "I32"), PART, 64, 1, None),
        (("I32", "I32"), SOME, 64, 1, "the same slice"),
        (("F32", "I32"), SOME, 64, 1, None),
        (("F32", "F32"), SOME, 32, 1, "the same slice"),
        (("F32", "F32"), SOME, 31, 1, None),
    ],
)
def test_slices_are_compared_by_their_type_and_size(
    dtypes: tuple[str, str], two: bytes, size: int, repeats: int, copied: str | None
) -> None:
    sources = [SimpleNamespace(header=TensorHeader("w", dtype, (size,), (1,), 0), file=at, name="w")
               for at, dtype in enumerate(dtypes)]  # fmt: skip
    one = slices.Slices((0, 1), "w", repeats)
    plan: Any = SimpleNamespace(sources=sources, slices=[one], files=[SimpleNamespace(name=name) for name in "ab"])
    gather: Any = Bytes([SOME, two])
    meter: Any = SimpleNamespace(stopped=Event())
    with nullcontext() if copied is None else pytest.raises(EngineError, match=f"hold {copied} of"):
        slices.compare_slices(plan, one, gather, gather, meter, {})


@pytest.mark.parametrize("room", [64, 24], ids="a block of {} elements".format)
@pytest.mark.parametrize(
    ("shape", "held", "copied"),
    [
        ((4, 16), [SOME, OTHER[::-1]], True),
        ((16, 4), [SOME, OTHER[::-1]], True),
        ((16, 4), [SOME, OTHER], True),
        ((4, 16), [SOME, OTHER], False),
        ((16, 4), [SOME[::-1], OTHER[::-1]], False),
        ((2, 16), [SOME[:128], OTHER[::-1]], False),
        ((64,), [SOME, OTHER[::-1]], False),
    ],
    ids=[
        "its shape",
        "another shape",
        "another shape, all ranks",
        "all ranks",
        "other bytes",
        "the first half",
        "vectors",
    ],
)
def test_a_slice_with_the_bytes_of_another_tensor_is_a_copy_whatever_its_shape(
    shape: tuple[int, ...], held: list[bytes], copied: bool, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of tensors larger than a block, of which rows of 16 and of 4 elements fill another number.

    Tensors of one shape may be equal on all ranks, as after upcycling, and vectors on any.
    """
    monkeypatch.setattr(slices, "BLOCK_BYTES", room * ITEM_SIZES["F32"])
    monkeypatch.setattr(slices, "_SAMPLE", 128)
    shapes = ((4, 16) if len(shape) == 2 else shape, shape)
    headers = [TensorHeader(name, "F32", one, dense_strides(one), 0) for name, one in zip("wv", shapes, strict=True)]
    sources = [SimpleNamespace(header=headers[at // 2], file=at % 2, name="wv"[at // 2]) for at in range(4)]
    both = [slices.Slices((0, 1), "w"), slices.Slices((2, 3), "v")]
    plan: Any = SimpleNamespace(sources=sources, slices=both, files=[SimpleNamespace(name=name) for name in "ab"])
    gather: Any = Bytes([SOME, OTHER, *held])
    meter: Any = SimpleNamespace(stopped=Event())
    others: slices.Others = {}
    with pytest.raises(EngineError, match="`a` holds the same slice of `v` as of `w`") if copied else nullcontext():
        for one in both:
            slices.compare_slices(plan, one, gather, gather, meter, others)


def test_slices_of_every_tensor_that_is_cut_are_compared(tmp_path: Path) -> None:
    folder = made(V2, tmp_path / "step", tp=2, pp=2)
    plan = engine.plan(V2.mapping, folder, settings=LETTERS)
    cut = {at for at, one in enumerate(plan.sources) if "norm" not in one.name}
    assert {source for one in plan.slices for source in one.sources} == cut
    assert all(len(one.sources) == 2 for one in plan.slices)


@pytest.mark.parametrize(("part", "copied"), [(slice(31), None), (slice(32), 0), (slice(-32, None), 224)])
def test_slices_that_are_equal_in_a_few_elements_are_no_copies(
    part: slice, copied: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "_SAMPLE", 64)
    folder = made(V2, tmp_path / "step", tp=2)
    states = [torch.load(folder / f"model_tp{rank}_pp0.pt", weights_only=True) for rank in range(2)]
    name = next(name for name in states[0] if name.endswith("wqkv.weight"))
    states[1][name].view(-1)[part] = states[0][name].view(-1)[part]
    torch.save(states[1], folder / "model_tp1_pp0.pt")
    told = rf"(?s)E306.*a part of the same slice.*from element {copied} on"
    with nullcontext() if copied is None else pytest.raises(EngineError, match=told):
        engine.convert(V2.mapping, folder, tmp_path / "hf", settings=LETTERS)


@pytest.mark.parametrize("equal", [32, None], ids=["in a part", "all"])
def test_slices_of_few_values_may_be_equal_by_chance(equal: int | None, tmp_path: Path) -> None:
    folder = made(V2, tmp_path / "step", tp=2)
    for rank in range(2):  # as norms of which a short training in bfloat16 changed one in eight, cut by FSDP
        state = torch.load(folder / f"model_tp{rank}_pp0.pt", weights_only=True)
        name = next(name for name in state if name.endswith("wqkv.weight"))
        state[name].view(-1)[:] = 1
        state[name].view(-1)[rank :: 8 + rank] = 1.0078125
        state[name].view(-1)[:equal] = torch.tensor([1.0, 0.99609375]).repeat(state[name].numel() // 2)[:equal]
        torch.save(state, folder / f"model_tp{rank}_pp0.pt")
    engine.convert(V2.mapping, folder, tmp_path / "hf", settings=LETTERS)


@pytest.mark.parametrize("sample", [4096, 512], ids=["in a sample of all", "in a sample of the end"])
def test_rows_that_are_equal_since_tokens_were_added_with_one_value_are_no_copies(
    sample: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "_SAMPLE", sample)
    model = replace(V2, embedding="by_vocab", hidden=64, vocab=64)
    folder = made(model, tmp_path / "step", tp=2)
    added = torch.randn(64)
    for rank in range(2):
        state = torch.load(folder / f"model_tp{rank}_pp0.pt", weights_only=True)
        state["tok_embeddings.word_embeddings.weight"][-5:] = added
        torch.save(state, folder / f"model_tp{rank}_pp0.pt")
    engine.convert(model.mapping, folder, tmp_path / "hf", settings=LETTERS)


@pytest.mark.parametrize(("layers", "taken"), [(range(6), True), (range(1), False)], ids=["all layers", "one layer"])
def test_key_heads_that_ranks_repeat_in_fused_attention_are_no_copies_if_all_layers_do(
    layers: range, taken: bool, tmp_path: Path
) -> None:
    folder = made(replace(V2, vocab=64), tmp_path / "step", tp=2)  # no other tensor has the same shape
    states = [torch.load(folder / f"model_tp{rank}_pp0.pt", weights_only=True) for rank in range(2)]
    for layer in layers:
        name = f"layers.{layer}.attention.wqkv.weight"
        states[1][name][-8:] = states[0][name][-8:]
    torch.save(states[1], folder / "model_tp1_pp0.pt")
    with nullcontext() if taken else pytest.raises(EngineError, match=r"E306.*a part of the same slice"):
        engine.convert(V2.mapping, folder, tmp_path / "hf", settings=LETTERS)


@pytest.mark.parametrize("names", ["[.]wk[.]", "1.*[.]w[kv][.]"], ids=["keys alone", "one layer alone"])
def test_keys_that_are_copied_in_pairs_are_no_repeated_heads_if_other_keys_or_values_are_not(
    names: str, tmp_path: Path
) -> None:
    model = Model("v2", layers=2, groups=4, bias=False, fused=False)
    folder = made(model, tmp_path / "step", tp=4)
    engine.plan(model.mapping, folder, settings=settings_of(model))
    states = [torch.load(folder / f"model_tp{rank}_pp0.pt", weights_only=True) for rank in range(4)]
    for one, other in ((0, 1), (2, 3)):
        copied = {name: value.clone() for name, value in states[one].items() if re.search(names, name)}
        torch.save({**states[other], **copied}, folder / f"model_tp{other}_pp0.pt")
    error = refused(model, folder)
    assert error.code == "E306" and "same slice" in str(error)


@sampled(2)
@pytest.mark.parametrize("put", [shutil.copy, Path.hardlink_to, Path.symlink_to], ids=["copy", "link", "symlink"])
@pytest.mark.parametrize("case", EXCHANGED.values(), ids=EXCHANGED)
def test_one_file_under_two_names_is_refused_also_where_no_name_was_saved(case: Any, put: Any, tmp_path: Path) -> None:
    model, layout, one, other = case
    folder = made(model, tmp_path / "step", **layout)
    with_root(folder / one, "archive")
    (folder / other).unlink()
    put(folder / one, folder / other) if put is shutil.copy else put(folder / other, folder / one)
    error = refused(model, folder)
    # a copy of another expert's, or of another layer's experts, has tensors of other names
    assert error.code == "E306" or (put is shutil.copy and model is EXPERTS and error.code in ("E206", "E207", "E211"))


def test_an_experts_file_whose_tensors_name_a_layer_that_its_number_is_not_of_is_refused(tmp_path: Path) -> None:
    folder = made(EXPERTS, tmp_path / "step", tp=1, pp=2)
    path = folder / "model_moe_layer1_expert0_tp0.pt"
    state = torch.load(path, weights_only=True)
    torch.save({name.replace("blocks.1.", "blocks.0."): tensor for name, tensor in state.items()}, path)
    error = refused(EXPERTS, folder)
    assert error.code == "E211" and "it fits [1]" in str(error) and "copy the folder again" in str(error)


COMMANDS: dict[str, list[str]] = {
    "run": ["run", "-m", V2.mapping, "--src", "{src}", "-o", "{out}"],
    "run --check-source": ["run", "-m", V2.mapping, "--src", "{src}", "-o", "{out}", "--check-source"],
    "plan": ["plan", "-m", V2.mapping, "--src", "{src}"],
    "reshard": ["reshard", "-m", V2.mapping, "--src", "{src}", "-o", "{out}", "--tp", "1"],
    "reverse --like": ["reverse", "-m", V2.mapping, "--src", "{hf}", "-o", "{out}", "--like", "{src}"],
    "inspect": ["inspect", "{src}"],
    "verify --src": ["verify", "{hf}", "--src", "{src}", "-m", V2.mapping],
    "verify --logits": ["verify", "{hf}", "--src", "{src}", "--logits"],
    "run --plan": ["run", "--plan", "{plan}", "-o", "{out}"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_that_reads_a_training_checkpoint_refuses_exchanged_ranks(
    command: list[str], tmp_path: Path
) -> None:
    source = FIXTURES / "v2_tp2_pp2"
    folder = shutil.copytree(source, tmp_path / "step")
    paths = {name: str(tmp_path / name) for name in ("hf", "out", "plan")} | {"src": str(folder)}
    engine.convert(V2.mapping, folder, tmp_path / "hf")
    run = CliRunner().invoke(cli, ["plan", "-m", V2.mapping, "--src", str(folder), "-o", paths["plan"]])
    assert run.exit_code == 0, run.output
    for pp in range(2):
        swap(folder / f"model_tp0_pp{pp}.pt", folder / f"model_tp1_pp{pp}.pt")
    result = CliRunner().invoke(cli, [word.format(**paths) for word in command])
    assert result.exit_code != 0 and not (tmp_path / "out").exists()
    assert "E306" in result.output, result.output


def test_files_that_the_engine_writes_have_the_roots_that_training_writes(tmp_path: Path) -> None:
    folder = made(V2, tmp_path / "step", tp=2, pp=2)
    modes: list[dict[str, Any]] = [
        {"tp": 2, "pp": 2},
        {"mode": "isp", "tp": 1, "wp": 2},
        {"mode": "isp_wp", "wp": 2},
    ]
    for number, asked in enumerate(modes):
        out = tmp_path / str(number)
        engine.reshard(V2.mapping, folder, out, settings=LETTERS, **asked)
        for path in out.glob("*.pt"):
            with zipfile.ZipFile(path) as file:
                assert {name.partition("/")[0] for name in file.namelist()} == {path.stem}
        ranks = sorted(out.glob("model_*p0.pt"))
        for one, other in pairwise(ranks):
            swap(one, other)
        assert refused(V2, out).code == "E306"


def test_ranks_that_hold_the_same_layers_are_no_copies(tmp_path: Path) -> None:
    """In isp, tensor ranks of one weight rank hold the same rows; only embedding and head differ."""
    folder = made(V2, tmp_path / "step", mode="isp", tp=4, wp=2, pp=3)
    one, other = (torch.load(folder / f"model_tp{tp}_wp0_pp1.pt", weights_only=True) for tp in (0, 2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    engine.plan(V2.mapping, folder, settings=LETTERS)


def test_a_rank_with_the_same_start_of_every_tensor_is_no_copy(tmp_path: Path) -> None:
    """Only what is equal to the last bit is one: samples are a first look."""
    model = Model("v2", layers=1, hidden=64, heads=4, groups=2, ffn=512, vocab=512, bias=False)
    folder = made(model, tmp_path / "step", tp=2)
    state = torch.load(folder / "model_tp0_pp0.pt", weights_only=True)
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed["layers.0.feed_forward.w1.weight"][-1, -1] += 1
    torch.save(changed, folder / "model_tp1_pp0.pt")
    engine.plan(model.mapping, folder, settings=LETTERS)


def claims_of(folder: Path, files: list[tuple[bytes, bytes]]) -> list[identity.Claim]:
    """Files of two tensors of bytes, without roots, each in a place of its own."""
    made = []
    for at, held in enumerate(files):
        (folder / str(at)).write_bytes(b"".join(held))
        begins = zip("ab", held, (0, len(held[0])), strict=True)
        tensors = tuple(TensorHeader(name, "U8", (len(one),), (1,), begin) for name, one, begin in begins)
        header = FileHeader(File(LocalStore(folder), str(at)), 0, tensors, "")
        made.append(identity.Claim(header, None, (at,), (at,)))
    return made


START = b"12345678"  # as long as a sample


@pytest.mark.parametrize(
    ("files", "copies"),
    [
        ([(START + b"1", START), (START + b"2", START), (START + b"1", START)], ("2", "0")),
        ([(START + b"1", b"1"), (START + b"2", b"1"), (START + b"1", b"2"), (START + b"1", b"2")], ("3", "2")),
        ([(START + b"1", START + b"1"), (START + b"1", START + b"2")], None),
        ([(bytes(9), bytes(9)), (bytes(9), bytes(9))], None),
    ],
    ids=["the first and the last", "two that begin as others do not", "the larger tensor only", "constants"],
)
def test_files_are_copies_if_all_their_bytes_are_equal(
    files: list[tuple[bytes, bytes]], copies: tuple[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_SAMPLE", len(START))
    claims = claims_of(tmp_path, files)
    if copies is None:
        identity.check_identities(claims)
        return
    with pytest.raises(EngineError, match=r"E306 `{}` and `{}` hold the same tensors".format(*copies)):
        identity.check_identities(claims)


@pytest.mark.parametrize(("held", "copied"), [("xx", True), ("xxx", False), ("xxy", True)])
def test_files_of_all_expert_ranks_may_be_equal_if_they_are_three_or_more(
    held: str, copied: bool, tmp_path: Path
) -> None:
    """Each has one expert, as Mixtral's on eight ranks."""
    claims = claims_of(tmp_path, [(START + one.encode(), START) for one in held])
    with pytest.raises(EngineError, match="E306 `1` and `0` hold the same tensors") if copied else nullcontext():
        identity.check_identities([replace(one, unnumbered=("the same",)) for one in claims])


@pytest.mark.parametrize(
    ("said", "elsewhere", "copied"),
    [("01", False, False), ("0", False, True), ("1", False, True), ("", False, True), ("01", True, True)],
    ids=["both say it", "the first says it", "the other says it", "neither says it", "of other layers"],
)
def test_files_of_experts_may_be_equal_if_both_say_which_ranks_they_are(
    said: str, elsewhere: bool, copied: bool, tmp_path: Path
) -> None:
    claims = [
        replace(one, saved_as=one.name if one.name in said else None, unnumbered=(elsewhere and one.name,))
        for one in claims_of(tmp_path, [(START, START)] * 2)
    ]
    with pytest.raises(EngineError, match="E306 `1` and `0` hold the same tensors") if copied else nullcontext():
        identity.check_identities(claims)


def test_equal_bytes_in_another_order_of_elements_are_no_copy(tmp_path: Path) -> None:
    one, other = claims_of(tmp_path, [(START + b"1", START)] * 2)
    square = [TensorHeader("a", "U8", (3, 3), strides, 0) for strides in ((3, 1), (1, 3))]
    one, other = (replace(claim, header=replace(claim.header, tensors=(held,)))
                  for claim, held in zip((one, other), square, strict=True))  # fmt: skip
    identity.check_identities([one, other])
    with pytest.raises(EngineError, match="hold the same tensors"):
        identity.check_identities([one, replace(other, header=replace(other.header, tensors=one.header.tensors))])


def test_links_to_one_file_are_refused_even_if_it_holds_only_zeros(tmp_path: Path) -> None:
    """Some file systems give one inode to two files: what is saved in them tells these apart."""
    torch.save({"w": torch.zeros(4, 4)}, tmp_path / "one.pt")
    (tmp_path / "other.pt").hardlink_to(tmp_path / "one.pt")
    one, other = (
        identity.Claim(read_rank_file(tmp_path / name), None, (name,), (name,)) for name in ("one.pt", "other.pt")
    )
    identity.check_identities([one, replace(other, header=replace(other.header, identity="another"))])
    with pytest.raises(EngineError, match=r"E306 `other[.]pt` and `one[.]pt` are one file"):
        identity.check_identities([one, other])


@pytest.mark.parametrize("key", ["step", "seed"])
def test_files_of_one_save_agree_in_everything_that_they_say_of_it(key: str) -> None:
    layout = replace(load_layout("internevo"), says_alike=("step", "seed"))
    said = [{"step": 1, "seed": 1}, {"step": 1, "seed": 1, key: 2}]
    files = [FileHeader(File(LocalStore(Path()), "f"), 0, (), "", says=one) for one in said]
    identity.check_alike(files[:1] * 2, layout)
    with pytest.raises(EngineError, match=rf"(?s)E306.*got +{key} 2"):
        identity.check_alike(files, layout)


def test_whether_roots_tell_anything_is_the_layout_s_to_say() -> None:
    layout = load_layout("internevo")
    assert identity.saved_as("model_tp1_pp0", layout) == "model_tp1_pp0.pt"
    assert identity.saved_as("model_tp1_pp0.pt", layout) == "model_tp1_pp0.pt"  # saved as model_tp1_pp0.pt.tmp
    assert identity.saved_as("model_tp1_pp0", replace(layout, zip_root=None)) is None
    assert identity.saved_as("consolidated.01", load_layout("meta-llama")) == "consolidated.01.pth"
    assert identity.saved_as("consolidated", load_layout("meta-llama")) is None  # as in Meta's own


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (["layers.0.mlp.experts.3.w"], True),
        (["layers.0.norm.w", "layers.0.mlp.experts.weight3"], True),
        (["layers.0.norm.w", "layers.11.mlp.w1.weight"], False),
        (["embedding.weight"], False),
    ],
)
def test_expert_ranks_count_in_files_in_which_something_has_a_number_besides_that_of_its_layer(
    names: list[str], counts: bool
) -> None:
    layout = load_layout("megatron")
    (file,) = (one for mode in layout.modes for one in mode.files if mode.name == "torch_pp_ep")
    tensors = tuple(TensorHeader(name, "U8", (1,), (1,), 0) for name in names)
    header = FileHeader(File(LocalStore(Path()), "f"), 0, tensors, "")
    claims = [identity.claim_of(header, file, {"tp": 0, "pp": 1, "ep": ep}, layout, None) for ep in range(2)]
    assert len({one.place for one in claims}) == (2 if counts else 1)
    assert len({one.unnumbered for one in claims}) == 1


STACK = {
    "mapping": 1,
    "name": "stack",
    "version": "1.0.0",
    "source": {"layout": "torch-dcp"},
    "target": {"model_type": "mixtral", "architecture": "MixtralForCausalLM"},
    "dims": {"layer": "num_hidden_layers", "expert": "num_local_experts"},
    "rules": [
        {
            "source": "layers.{layer}.experts.weight",
            "axes": "expert ffn hidden",
            "targets": [{"name": "layers.{layer}.experts.{expert}.weight", "axes": "ffn hidden"}],
        }
    ],
    "config": {"num_hidden_layers": "{{ layer }}", "num_local_experts": "{{ expert }}"},
}


@pytest.mark.parametrize(
    ("same_as", "taken"),
    [
        (lambda layer, expert: (layer, 0), True),
        (lambda layer, expert: (layer, expert // 2), False),
        (lambda layer, expert: (layer, expert % 2), False),
        (lambda layer, expert: (layer, expert if layer else 0), False),
    ],
    ids=["all of every layer, as after upcycling", "in pairs", "of two files", "those of one layer"],
)
def test_experts_in_one_tensor_of_each_layer_may_be_equal_on_all_ranks_or_on_none(
    same_as: Callable[[int, int], tuple[int, int]], taken: bool, tmp_path: Path
) -> None:
    (tmp_path / "stack.yaml").write_text(json.dumps(STACK))
    made = torch.arange(2 * 4 * 8 * 8.0).reshape(2, 4, 8, 8)
    every = {(layer, expert): made[same_as(layer, expert)].clone() for layer in range(2) for expert in range(4)}
    (tmp_path / "hf").mkdir()
    state = {f"layers.{layer}.experts.{expert}.weight": one for (layer, expert), one in every.items()}
    save_file(state, tmp_path / "hf" / "model.safetensors")
    config = {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    engine.reverse(tmp_path / "stack.yaml", tmp_path / "hf", tmp_path / "step", ranks={"dp": 4})
    refused = nullcontext() if taken else pytest.raises(EngineError, match=r"E306.*hold the same slice")
    with refused:
        engine.convert(tmp_path / "stack.yaml", tmp_path / "step", tmp_path / "out", config=tmp_path / "hf")
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(one, written[name]) for name, one in state.items())
