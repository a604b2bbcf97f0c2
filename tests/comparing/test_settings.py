"""Comparing everything of two models but their tensors: by what it means, and what it does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sentencepiece import sentencepiece_model_pb2

import engine
from engine import api
from engine.assets.tokenizer import convert_tokenizer
from engine.commands.main import cli
from engine.comparing.effects import Difference, effect_of
from engine.comparing.settings import _added_tokens, compare_settings
from engine.comparing.texts import unlike_merges
from tests.support.depth import deep, sampled
from tests.support.planted import SETTINGS
from tests.support.sentencepiece_models import train

FIXTURE = Path(__file__).parents[1] / "fixtures" / "internevo" / "v2_tp2_pp2"
MAPPING = "families/internlm2.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A genuine checkpoint converted with a tokenizer, and a chat template beside it."""
    folder = tmp_path_factory.mktemp("made")
    engine.convert(MAPPING, FIXTURE, folder / "hf")
    (folder / "tokenizer.model").write_bytes(train())  # with more pieces than the fixture has rows
    for name, data in convert_tokenizer(
        folder / "tokenizer.model", {"bos": "<s>", "eos": "</s>", "pad": "</s>"}
    ).items():
        (folder / "hf" / name).write_bytes(data)
    template = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    (folder / "hf" / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    return folder / "hf"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / name).read_text(encoding="utf-8"))
    change(data)
    (folder / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def compare(out: Path, made: Path, *more: str) -> Result:
    return CliRunner().invoke(cli, ["compare", str(out), str(made), *more])


def differences(out: Path, made: Path) -> dict[tuple[str, str], Difference]:
    done = api.compare(out, made)
    assert {verdict.kind for verdict in done.verdicts} == {"equal"}
    return {(one.part, one.what): one for one in done.differences}


def test_a_folder_equals_itself(made: Path) -> None:
    done = api.compare(made, made)
    assert done.same() and not done.differences and not done.unchecked


@sampled(3)
@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_changes_the_function_is_told_with_what_it_does(case: str, out: Path, made: Path) -> None:
    values, key, effect = SETTINGS[case]
    edit(out, "config.json", lambda config: config.update(values))
    found = differences(out, made)
    assert found["config", key].grade == "function"
    assert effect in found["config", key].effect
    printed = compare(out, made)
    assert printed.exit_code == 1 and f"config {key} is " in printed.output
    assert compare(out, made, "--allow-cast").exit_code == 1


def test_the_effect_of_every_key_that_changes_the_function_is_known() -> None:
    more = {
        "sliding_window": "distance", "layer_types": "distances", "partial_rotary_factor": "part of each head",
        "rope_parameters.factor": "scaled differently", "num_labels": "outputs", "auto_map": "remote code",
        "num_experts_per_tok": "number of experts", "norm_topk_prob": "weighted differently",
        "decoder_sparse_step": "have experts", "num_local_experts": "chooses among", "layer_norm_eps": "every norm",
        "moe_intermediate_size": "do not fit", "hidden_activation": "activation",
    }  # fmt: skip
    for key, told in {key: told for _, key, told in SETTINGS.values()}.items() | more.items():
        effect, grade = effect_of(key)
        assert told in effect and grade == "function", key


def test_a_length_is_told_and_is_no_other_function(out: Path, made: Path) -> None:
    edit(out, "config.json", lambda config: config.update(max_position_embeddings=4096))
    assert differences(out, made)["config", "max_position_embeddings"].grade == "told"
    printed = compare(out, made)
    assert printed.exit_code == 0 and "shorter ones are computed alike" in printed.output


def test_a_length_takes_part_where_angles_are_scaled(out: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "ref")
    for folder, length in ((out, 4096), (tmp_path / "ref", 2048)):
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        edit(folder, "config.json", lambda c, r=rope, n=length: c.update(rope_parameters=r, max_position_embeddings=n))
    assert differences(out, tmp_path / "ref")["config", "max_position_embeddings"].grade == "function"


@pytest.mark.parametrize("name", ("config.json", "generation_config.json"))
def test_true_in_the_place_of_1_is_told(name: str, out: Path, tmp_path: Path) -> None:
    """It is 1 to Python, and no number to programs of other languages."""
    ids: list[Any] = [1, True] if name == "config.json" else [[1, 2], [True, 2]]
    shutil.copytree(out, tmp_path / "other")
    for folder, value in zip((out, tmp_path / "other"), ids, strict=True):
        edit(folder, name, lambda data, value=value: data.update(bos_token_id=value))
    assert [one for one in api.compare(out, tmp_path / "other").differences if one.what == "bos_token_id"]


def test_a_type_is_a_matter_of_precision(out: Path, made: Path) -> None:
    edit(out, "config.json", lambda config: config.update(dtype="float16", torch_dtype="float16"))
    assert differences(out, made)["config", "dtype"].grade == "cast"
    assert compare(out, made).exit_code == 1 and compare(out, made, "--allow-cast").exit_code == 0


@sampled(3)
@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": None},  # transformers 4 alone
        {"rope_theta": None},
        {"rope_parameters": {"rope_theta": 10000, "type": "default"}},
        {"head_dim": None},
        {"hidden_act": None},
        {"mlp_bias": None, "attention_bias": None},
        {"eos_token_id": [2]},
        {"torch_dtype": None},
        {"torch_dtype": None, "dtype": None},  # the weights' own
        {"transformers_version": "4.40.0", "_name_or_path": "there"},
        {"initializer_range": 0.5, "attention_dropout": 0.0, "use_cache": True, "pretraining_tp": 1},
    ],
)
def test_another_spelling_of_the_same_is_no_other_function(values: dict[str, Any], out: Path, made: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del config[key]

    edit(out, "config.json", change)
    assert all(one.grade == "told" and one.what == "initializer_range" for one in differences(out, made).values())
    assert compare(out, made).exit_code == 0


def test_a_key_that_transformers_does_not_read_is_told(out: Path, made: Path) -> None:
    edit(out, "config.json", lambda config: config.update(rms_norm_epsilon=1e-3))
    assert "does not read it" in differences(out, made)["config", "rms_norm_epsilon"].effect


@pytest.mark.parametrize(
    "key",
    ["is_causal", "layer_types", "kv_sharing_modes", "number_of_conv_states", "per_layer_config", "num_mtp_layers"],
)
def test_a_key_that_only_shared_code_of_transformers_reads_is_not_said_to_be_unread(key: str) -> None:
    assert effect_of(key, own=frozenset())[1] == "function"


def test_remote_code_is_compared_key_by_key(out: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "ref")
    for folder in (out, tmp_path / "ref"):
        edit(folder, "config.json", lambda config: config.update(model_type="internlm9", own_key=1))
        (folder / "modeling_internlm9.py").write_text("pass\n")
    assert not differences(out, tmp_path / "ref")
    edit(out, "config.json", lambda config: config.update(own_key=2, rms_norm_eps=1e-6))
    (out / "modeling_internlm9.py").write_text("raise SystemExit\n")
    found = differences(out, tmp_path / "ref")
    assert set(found) == {("config", "own_key"), ("config", "rms_norm_eps"), ("code", "modeling_internlm9.py")}
    assert all(one.grade == "function" for one in found.values())


def test_a_configuration_that_transformers_refuses_is_compared_key_by_key(out: Path, made: Path) -> None:
    edit(out, "config.json", lambda config: config.update(hidden_size="wide"))
    assert differences(out, made)["config", "hidden_size"].grade == "function"


def test_a_folder_without_configuration_is_no_model(out: Path, made: Path) -> None:
    (out / "config.json").unlink()
    assert "does not load" in differences(out, made)["config", "config.json"].effect


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b"\xff"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_is_no_json_is_refused(broken: bytes, name: str, out: Path, made: Path) -> None:
    (out / name).write_bytes(broken)
    assert compare(out, made).output.startswith("E30")


@pytest.mark.parametrize(
    ("values", "key", "grade"),
    [
        ({"eos_token_id": [2, 7]}, "eos_token_id", "function"),
        ({"temperature": 0.7, "do_sample": True}, "temperature", "function"),
        ({"max_new_tokens": 5}, "max_new_tokens", "function"),
        ({"use_cache": False}, "use_cache", "told"),
    ],
)
def test_generation_settings_are_compared(values: dict[str, Any], key: str, grade: str, out: Path, made: Path) -> None:
    edit(out, "generation_config.json", lambda data: data.update(values))
    assert differences(out, made)["generation", key].grade == grade


def test_without_a_generation_file_the_configuration_s_tokens_hold(out: Path, made: Path) -> None:
    (out / "generation_config.json").unlink()
    assert not differences(out, made)
    edit(out, "config.json", lambda config: config.update(eos_token_id=9))
    assert set(differences(out, made)) == {("config", "eos_token_id"), ("generation", "eos_token_id")}


def tokenizer_parts(out: Path, made: Path) -> dict[str, Difference]:
    return {what: one for (part, what), one in differences(out, made).items() if part == "tokenizer"}


def test_another_order_of_the_vocabulary_gives_other_ids(out: Path, made: Path) -> None:
    def exchange(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        plain = [name for name in vocab if len(name) == 1 and name.isalpha() and name.isascii()]
        vocab[plain[0]], vocab[plain[1]] = vocab[plain[1]], vocab[plain[0]]

    edit(out, "tokenizer.json", exchange)
    found = tokenizer_parts(out, made)
    assert any(what.startswith("ids of") for what in found)
    assert all(one.grade == "function" for one in found.values())
    assert compare(out, made).exit_code == 1


def test_a_merge_that_is_lost_gives_other_ids(out: Path, made: Path) -> None:
    edit(out, "tokenizer.json", lambda data: data["model"].update(merges=data["model"]["merges"][:-40]))
    assert any(what.startswith("ids of") for what in tokenizer_parts(out, made))


def test_a_merge_that_another_rank_of_its_own_replaces_gives_other_ids(out: Path, made: Path) -> None:
    edit(out, "tokenizer.json", lambda data: data["model"]["merges"].append(data["model"]["merges"][0]))
    assert any(what.startswith("ids of") for what in tokenizer_parts(out, made))


def test_merges_that_compete_among_many_in_another_order_are_tried() -> None:
    few = [[f"x{i}", f"y{i}"] for i in range(150)]
    merges = [*few, ["a", "b"], ["b", "c"], *([one.upper(), two] for one, two in few)]
    files = [{"tokenizer.json": json.dumps({"model": {"merges": some}}).encode()} for some in (merges, merges[::-1])]
    assert "abc" in unlike_merges(*files)


@pytest.mark.parametrize("character", ["\u2019", "\u00ad"])
def test_a_character_that_only_the_tokenizer_names_is_tried(character: str, out: Path, made: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        step = {"type": "Replace", "pattern": {"String": character}, "content": "e"}
        data["normalizer"] = {"type": "Sequence", "normalizers": [step, *filter(None, [data["normalizer"]])]}

    edit(out, "tokenizer.json", change)
    assert any(what.startswith("ids of") for what in tokenizer_parts(out, made))


def test_a_token_that_only_the_decoder_names_is_tried(out: Path, made: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        token = max(data["model"]["vocab"], key=lambda name: len(name))
        data["decoder"] = {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": token}, "content": "!"}, data["decoder"]]}  # fmt: skip

    edit(out, "tokenizer.json", change)
    assert any(what.startswith("text from ids") for what in tokenizer_parts(out, made))


def test_a_dummy_prefix_gives_other_ids(out: Path, made: Path) -> None:
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
               {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}  # fmt: skip
    edit(out, "tokenizer.json", lambda data: data.update(normalizer=prepend))
    assert any(what.startswith("ids of") for what in tokenizer_parts(out, made))


@pytest.mark.parametrize(("key", "value"), [("eos_token", "<unk>"), ("pad_token", "<unk>")])
def test_special_tokens_are_compared(key: str, value: str, out: Path, made: Path) -> None:
    edit(out, "tokenizer_config.json", lambda data: data.update({key: value}))
    edit(out, "special_tokens_map.json", lambda data: data.update({key: value}))
    assert tokenizer_parts(out, made)[key].grade == "function"


@sampled(2)
@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("truncation", {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}, "truncation"),
        ("added_tokens", lambda tokens: [*tokens[:-1], {**tokens[-1], "content": "<other>"}], "the "),
        ("model", lambda model: {**model, "vocab": _exchanged(model["vocab"])}, "the id of"),
    ],
)
def test_what_few_texts_show_of_a_tokenizer_is_told(key: str, value: Any, told: str, out: Path, made: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data[key] = value(data[key]) if callable(value) else value

    edit(out, "tokenizer.json", change)
    assert any(what.startswith(told) for what in tokenizer_parts(out, made))


@sampled(3)
@pytest.mark.parametrize(("key", "value"), (("special", False), ("lstrip", True), ("single_word", True)))
def test_a_token_that_programs_without_transformers_read_otherwise_is_told(
    key: str, value: Any, out: Path, made: Path
) -> None:
    """transformers takes flags of tokens from tokenizer_config.json; others read tokenizer.json alone."""

    def change(data: dict[str, Any]) -> None:
        data["added_tokens"][2][key] = value

    edit(out, "tokenizer.json", change)
    assert [one.grade for what, one in tokenizer_parts(out, made).items() if "alone" in what] == ["function"]


def test_a_model_of_pieces_that_transformers_does_not_read_beside_tokenizer_json_is_told(out: Path, made: Path) -> None:
    pieces = sentencepiece_model_pb2.ModelProto.FromString((out / "tokenizer.model").read_bytes())
    pieces.pieces[-1].piece, pieces.pieces[-2].piece = pieces.pieces[-2].piece, pieces.pieces[-1].piece
    (out / "tokenizer.model").write_bytes(pieces.SerializeToString())
    found = [one.grade for what, one in tokenizer_parts(out, made).items() if "tokenizer.model alone" in what]
    assert found and set(found) == {"function"}


@sampled(2)
@pytest.mark.parametrize("key", ("content", "special", "id"))
def test_tokens_that_llama_cpp_takes_from_the_settings_are_compared(key: str, out: Path, made: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        tokens = data["added_tokens_decoder"]
        tokens["3"] |= {"special": True} if key == "special" else {"content": "<x>"} if key == "content" else {}
        if key == "id":
            tokens["9"] = tokens.pop("3")

    edit(out, "tokenizer_config.json", change)
    assert [one.grade for what, one in tokenizer_parts(out, made).items() if "tokenizer_config.json" in what][-1:] == [
        "function"
    ]


def _exchanged(vocabulary: dict[str, int]) -> dict[str, int]:
    """The ids of the last two tokens exchanged."""
    *_, one, two = sorted(vocabulary, key=lambda token: vocabulary[token])
    return vocabulary | {one: vocabulary[two], two: vocabulary[one]}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "rope_theta", 77.5),
        ("config.json", "auto_map", {"AutoModel": "x.X"}),
        ("tokenizer_config.json", "clean_up_tokenization_spaces", True),
    ],
)
def test_a_key_that_another_program_reads_is_told(name: str, key: str, value: Any, out: Path, made: Path) -> None:
    """transformers 5 reads another place; others and its older versions read this one."""
    edit(out, name, lambda data: data.update({key: value}))
    told = [one for (_, what), one in differences(out, made).items() if what.startswith(key)]
    assert [one.grade for one in told] == ["function"]


@sampled(2)
@pytest.mark.parametrize(
    ("name", "key", "told"),
    [
        ("config.json", "rope_theta", "rope_theta of config.json"),
        ("tokenizer_config.json", "add_prefix_space", "add_prefix_space of tokenizer_config.json"),
        ("tokenizer_config.json", "added_tokens_decoder", "added_tokens_decoder.0 of tokenizer_config.json"),
        ("tokenizer_config.json", None, "add_prefix_space of tokenizer_config.json"),
    ],
)
def test_a_key_that_another_program_misses_is_told(name: str, key: str | None, told: str, out: Path) -> None:
    """transformers 5 does without it; its older versions take other angles, llama.cpp other tokens."""
    edit(out, "config.json", lambda data: data.update(rope_theta=5e5, rope_parameters={"rope_theta": 5e5}))
    ref = shutil.copytree(out, out.parent / "ref")
    if key is None:
        (out / name).unlink()
    else:
        edit(out, name, lambda data: data.pop(key))
    assert differences(out, ref)["config" if name == "config.json" else "tokenizer", told].grade == "function"
    assert compare(out, ref).exit_code == 1


@pytest.mark.parametrize("key", ["add_prefix_space", "add_bos_token", "add_eos_token"])
def test_what_llama_cpp_takes_otherwise_where_it_is_not_said_is_told(key: str, out: Path) -> None:
    edit(out, "tokenizer_config.json", lambda data: data.pop(key, None))
    ref = shutil.copytree(out, out.parent / "ref")
    edit(ref, "tokenizer_config.json", lambda data: data.update({key: False}))
    assert differences(out, ref)["tokenizer", f"{key} of tokenizer_config.json"].grade == "function"


def test_the_old_spelling_of_angles_that_every_version_takes_is_not_missed(out: Path, made: Path) -> None:
    edit(out, "config.json", lambda data: data.pop("rope_theta"))
    assert not differences(out, made)


def test_the_keys_are_told_whose_bytes_alone_differ(out: Path, made: Path) -> None:
    edit(out, "tokenizer_config.json", lambda data: data.update(errors="replace", chat_template=""))
    assert tokenizer_parts(out, made)["tokenizer_config.json (errors)"].grade == "told"


def test_a_first_token_that_is_left_out_is_told(out: Path, made: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["post_processor"] = None

    edit(out, "tokenizer.json", change)
    edit(out, "tokenizer_config.json", lambda data: data.update(add_bos_token=False))
    assert any("ids with special tokens" in what for what in tokenizer_parts(out, made))


def test_padding_on_the_other_side_is_told(out: Path, made: Path) -> None:
    edit(out, "tokenizer_config.json", lambda data: data.update(padding_side="left"))
    assert tokenizer_parts(out, made)["padding_side"].grade == "function"


def test_other_bytes_of_the_same_tokenizer_are_no_other_function(out: Path, made: Path) -> None:
    edit(out, "tokenizer.json", lambda data: data.update(truncation=None))
    (out / "tokenizer.json").write_text(json.dumps(json.loads((out / "tokenizer.json").read_text()), indent=1))
    found = tokenizer_parts(out, made)
    assert all(one.grade == "told" for one in found.values()) and found
    assert compare(out, made).exit_code == 0


def test_a_configuration_that_transformers_refuses_is_told(out: Path, made: Path) -> None:
    edit(out, "config.json", lambda config: config.update(pretraining_tp=[]))
    found = differences(out, made)["config", "config.json"]
    assert (found.out, found.ref, found.grade) == ("refused", "loadable", "function")
    assert compare(out, made).exit_code == 1


def test_a_tokenizer_on_one_side_only_is_told(out: Path, made: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        (out / name).unlink()
    assert tokenizer_parts(out, made)["a tokenizer"].out == "absent"


@sampled(2)
@pytest.mark.parametrize(
    "damaged",
    [
        {"tokenizer.json": b"{}", "tokenizer.model": b"{}"},
        {"tokenizer.json": b"{}"},  # transformers does not go on to the other file
        {"continuing_subword_prefix": "##"},  # at which `tokenizers` panics, which is no Exception
        {
            "continuing_subword_prefix": "##",
            "merges": [["▁", "\u2581"]],
            "vocab": {"▁": 0, "▁\u2581": 1},
        },  # it ends Python
        {"type": "WordLevel", "unk_token": "[UNK]"},  # loads, and raises when a word is unknown
    ],
    ids=["both files", "one file", "a panic", "an abort", "a word"],
)
def test_a_damaged_tokenizer_is_told_and_nothing_raises(damaged: dict[str, Any], out: Path, made: Path) -> None:
    for name, data in damaged.items():
        if isinstance(data, bytes):
            (out / name).write_bytes(data)
    model = {name: value for name, value in damaged.items() if not isinstance(value, bytes)}
    if model:
        edit(out, "tokenizer.json", lambda data: data["model"].update(model))
    assert "not loadable" in tokenizer_parts(out, made)["a tokenizer"].out
    assert compare(out, made).exit_code == 1


@pytest.mark.parametrize(
    "change",
    [
        ("{{ m.role }}\n", "{{ m.role }} "),
        ("<s>assistant\n", "<s>"),
        ("</s>\n", "\n"),
        ("{{ m.content }}", "{{ m.content if m.content is string else '' }}"),
        ("{{ m.content }}", "{{ m.content if loop.index < 10 else '' }}"),
    ],
)
def test_a_template_that_renders_otherwise_is_told(change: tuple[str, str], out: Path, made: Path) -> None:
    path = out / "chat_template.jinja"
    path.write_text(path.read_text().replace(*change))
    (found,) = [one for (part, _), one in differences(out, made).items() if part == "chat template"]
    assert found.grade == "function" and found.what.startswith("what it renders of")


@pytest.mark.parametrize("name", ["documents", "enable_thinking"])
def test_a_template_that_reads_more_is_told(name: str, out: Path, made: Path) -> None:
    path = out / "chat_template.jinja"
    path.write_text(path.read_text() + f"{{% if {name} is defined and {name} %}}{{{{ {name} }}}}{{% endif %}}")
    found = differences(out, made)["chat template", "what the template reads"]
    assert (found.out, found.ref, found.grade) == (name, "no more", "function")


def test_another_text_that_renders_the_same_is_no_other_function(out: Path, made: Path) -> None:
    path = out / "chat_template.jinja"
    path.write_text("{# a comment #}" + path.read_text().replace("m.role", "m['role']"))
    (found,) = [one for (part, _), one in differences(out, made).items() if part == "chat template"]
    assert found.grade == "told" and compare(out, made).exit_code == 0


@deep
def test_a_template_without_end_is_told_and_not_waited_for(out: Path, made: Path) -> None:
    loop = "{% for i in range(99999) %}"
    (out / "chat_template.jinja").write_text(loop * 4 + "{% set x = 1 %}" + "{% endfor %}" * 4)
    (found,) = [one for (part, _), one in differences(out, made).items() if part == "chat template"]
    assert found.out == '"refused: no end within 5 s"'


def test_a_template_that_only_other_programs_find_is_told(out: Path, made: Path) -> None:
    path = out / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ messages[0].content }}"}))
    (told,) = [what for part, what in differences(out, made) if part == "chat template"]
    assert told.startswith("what template `tokenizer_config.json` renders of")


def test_a_template_for_tools_on_one_side_only_is_told(out: Path, made: Path) -> None:
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages[0].content }}")
    assert differences(out, made)["chat template", "template `tool_use`"].out == "there"


def test_a_template_on_one_side_only_is_told(out: Path, made: Path) -> None:
    (out / "chat_template.jinja").unlink()
    assert differences(out, made)["chat template", "the template"].out == "absent"


def test_nothing_of_a_template_or_a_setting_is_run(out: Path, made: Path, tmp_path: Path) -> None:
    planted = tmp_path / "ran"
    code = f"open({str(planted)!r}, 'w')"
    (out / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}" + f"{{{{ {code} }}}}")
    (out / "tokenization_own.py").write_text(code)
    edit(
        out,
        "tokenizer_config.json",
        lambda data: data.update(auto_map={"AutoTokenizer": ["tokenization_own.Own", None]}),
    )
    edit(out, "config.json", lambda data: data.update(auto_map={"AutoConfig": "tokenization_own.Own"}))
    assert compare(out, made).exit_code == 1
    assert not planted.exists()


def test_settings_are_compared_by_their_files_alone() -> None:
    assert compare_settings({}, {}) == ()


def test_a_training_checkpoint_is_compared_by_what_a_mapping_makes_of_it(out: Path) -> None:
    (out / "chat_template.jinja").unlink()
    for sides in ((out, FIXTURE), (FIXTURE, out), (FIXTURE, FIXTURE)):
        done = api.compare(*sides, mapping=MAPPING)
        assert done.same(), done.differences
        assert {verdict.kind for verdict in done.verdicts} == {"equal"}
    edit(out, "config.json", lambda config: config.update(rms_norm_eps=1e-6))
    assert not api.compare(out, FIXTURE, mapping=MAPPING).same()


def test_two_training_checkpoints_of_other_ranks_are_compared(tmp_path: Path) -> None:
    engine.reshard(MAPPING, FIXTURE, tmp_path / "tp1", tp=1, pp=1)
    engine.reshard(MAPPING, FIXTURE, tmp_path / "tp4", tp=4, pp=2)
    letters = {"mlp_letters": "w2_is_down"}  # four ranks' shapes do not tell
    assert api.compare(tmp_path / "tp1", tmp_path / "tp4", mapping=MAPPING, settings=letters).same()


def test_a_training_checkpoint_without_a_mapping_is_told_to_give_one(made: Path) -> None:
    printed = compare(FIXTURE, made)
    assert printed.output.startswith("E304") and "give --mapping" in printed.output
    assert compare(made, made, "-m", MAPPING).output.startswith("E001")


@pytest.mark.parametrize(
    ("ours", "theirs", "what"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "float16"}, "dtype"),
        ({"rope_theta": 1e4}, {"rope_theta": 5e4}, "rope_parameters.rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {"type": "linear", "factor": 4.0}},
         "rope_parameters.factor"),
    ],
)  # fmt: skip
def test_a_key_that_is_told_as_transformers_5_spells_it_is_not_told_again(
    ours: dict[str, Any], theirs: dict[str, Any], what: str
) -> None:
    sides = [{"config.json": json.dumps({"model_type": "llama", **one}).encode()} for one in (ours, theirs)]
    assert [one.what for one in compare_settings(*sides)] == [what]


@pytest.mark.parametrize("special", [True, False])
def test_of_tokens_that_one_table_lacks_only_special_ones_are_told(special: bool) -> None:
    table = {"added_tokens_decoder": {"5": {"content": "<x>", "special": special}}}
    assert [one.what for one in _added_tokens({}, table)] == (
        ["added_tokens_decoder.5 of tokenizer_config.json"] if special else []
    )


def test_lengths_matter_to_angles_that_one_side_scales() -> None:
    scaled = {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.0}}
    pair = ({"model_type": "llama", **one} for one in (scaled, {"max_position_embeddings": 128}))
    found = compare_settings(*({"config.json": json.dumps(one).encode()} for one in pair))
    told = {one.what: (one.effect, one.grade) for one in found}
    assert told["max_position_embeddings"] == effect_of("max_position_embeddings", scaled=True)


def test_an_end_of_generation_is_told_as_that_and_not_as_any_setting() -> None:
    sides = ({"generation_config.json": json.dumps({"eos_token_id": one}).encode()} for one in (1, 2))
    assert [(one.effect, one.grade) for one in compare_settings(*sides)] == [effect_of("eos_token_id")]
