"""A tokenizer in Hugging Face's form is copied with the model that it belongs to, and no other is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import engine
from engine.assets import bundle
from engine.assets.beside import other_ids
from engine.assets.bundle import make_assets
from engine.assets.generation import check_tokens
from engine.assets.ready import for_each_release, names_of, read_ready, together
from engine.assets.ready_ids import ids_of
from engine.errors import EngineError, Place
from engine.storage.local import LocalStore
from tests.support.depth import sampled
from tests.support.frameworks import FIXTURES, source_of
from tests.support.shards import Model, save

MODEL = FIXTURES / "dcp" / "hf_verl_fsdp4"  # bos 1, eos 2, 131 tokens
CONFIG = MODEL / "hf_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers saves of a tokenizer of 120 tokens, with a template and generation settings."""
    known = Tokenizer(models.WordLevel({f"w{i}": i for i in range(118)} | {"<unk>": 118}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    known.add_special_tokens([AddedToken("<extra>", special=True)])
    loaded = PreTrainedTokenizerFast(tokenizer_object=known, bos_token="w1", eos_token="w2", unk_token="<unk>")
    loaded.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = tmp_path_factory.mktemp("saved")
    loaded.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.5}))
    return folder


def test_a_folder_of_named_templates_is_read(tmp_path: Path) -> None:
    (tmp_path / "hf" / "additional_chat_templates").mkdir(parents=True)
    for name in ("tokenizer.json", "additional_chat_templates/tool_use.jinja", "additional_chat_templates/notes.txt"):
        (tmp_path / "hf" / name).write_text("")
    expected = ["hf/tokenizer.json", "hf/additional_chat_templates/tool_use.jinja"]
    assert names_of(LocalStore(tmp_path), "hf") == expected


def convert(out: Path, tokenizer: Path | None = None, source: Path | None = None, **how: Any) -> engine.Report:
    return engine.convert("transformers", source or source_of(MODEL), out, tokenizer=tokenizer, **how)


def test_given_files_are_copied_byte_for_byte_but_for_settings_that_transformers_4_does_not_read(
    saved: Path, tmp_path: Path
) -> None:
    (saved / "README.md").write_text("of another model")
    report = convert(tmp_path / "out", saved, config=CONFIG)
    names = {one.name for one in saved.iterdir()} - {"README.md"}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    changed = {name for name in names if (tmp_path / "out" / name).read_bytes() != (saved / name).read_bytes()}
    assert changed == {"tokenizer_config.json"}
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "m.content" in settings["chat_template"]
    older = shutil.copytree(saved, tmp_path / "older")
    (older / "tokenizer_config.json").write_text(json.dumps(settings))  # as transformers 4 saves them
    convert(tmp_path / "again", older, config=CONFIG)
    assert all((tmp_path / "again" / name).read_bytes() == (older / name).read_bytes() for name in names)
    assert [one for one in report.notices if "tokenizer" in one] == [
        "the tokenizer has 120 tokens, fewer than the embedding's 131 rows; make sure that it is this model's"
    ]
    text = "w5 w7 <extra> other"
    ids = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (saved, tmp_path / "out")]
    assert ids[0] == ids[1] == [5, 7, 119, 118]
    assert "AutoTokenizer" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["TokenizersBackend", "LlamaTokenizer", "GemmaTokenizer"])
def test_classes_that_transformers_4_would_give_other_bos_eos_and_inputs_are_written_as_plain_ones(kind: str) -> None:
    saved = {"tokenizer_class": kind, "backend": "tokenizers", "extra_special_tokens": ["<a>"]}
    assert for_each_release({**saved, "additional_special_tokens": None}, None) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "backend": "tokenizers",
        "additional_special_tokens": ["<a>"],
        "model_input_names": ["input_ids", "attention_mask"],
    }
    by_4 = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    assert for_each_release(by_4, None) == by_4


def test_a_template_in_two_places_and_named_ones_are_written_as_every_release_reads_them() -> None:
    files = {
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b'{"chat_template": "old"}',
        "chat_template.jinja": b"new",
    }
    made = together(files, {}, chat=False)
    assert (made["chat_template.jinja"], json.loads(made["tokenizer_config.json"])) == (
        b"new",
        {"chat_template": "new"},
    )
    more = {**files, "additional_chat_templates/tool_use.jinja": b"tools"}
    assert json.loads(together(more, {}, chat=False).pop("tokenizer_config.json"))["chat_template"] == [
        {"name": "default", "template": "new"},
        {"name": "tool_use", "template": "tools"},
    ]
    assert sorted(together(more, {}, chat=False)) == ["tokenizer.json", "tokenizer_config.json"]
    assert together(more, {"chat_template.jinja": b"own"}, chat=True).keys() == files.keys()


def test_a_language_models_tokenizer_json_alone_gets_no_tokens_of_the_models_class_in_transformers_4() -> None:
    added = [{"id": 7, "content": "<begin>", "special": True}, {"id": 8, "content": "plain", "special": False}]
    files = {"tokenizer.json": json.dumps({"added_tokens": added}).encode()}
    own = {
        "config.json": json.dumps(
            {"architectures": ["LlamaForCausalLM"], "bos_token_id": 7, "eos_token_id": 8}
        ).encode()
    }
    assert json.loads(together(files, own, chat=False)["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": "<begin>",
    }
    some = {**files, "tokenizer_config.json": b'{"bos_token": null, "tokenizer_class": null}'}
    assert json.loads(together(some, own, chat=False)["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": None,
    }
    other = {"config.json": b'{"architectures": ["BertModel"]}'}
    assert together(files, other, chat=False) == {**files, **other}


def test_a_token_that_begins_as_a_statement_of_a_template_does_is_no_template(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "given")
    file = tmp_path / "given" / "tokenizer.json"
    file.write_text(file.read_text().replace('"w5"', '"{% w5"'))
    store = LocalStore(tmp_path / "given")
    assert read_ready(store, names_of(store, ""), 131, {}, {})[1]["{% w5"] == 5


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_generation_settings_have_ids_of_the_models_rows_only(key: str) -> None:
    for right in (130, [1, 130], None):
        check_tokens({key: right}, 131, Place("generation_config.json"))
    for wrong in (131, [1, 131]):
        with pytest.raises(EngineError, match="E502"):
            check_tokens({key: wrong}, 131, Place("generation_config.json"))


def test_a_token_of_the_mappings_template_has_the_id_that_the_mapping_says(saved: Path) -> None:
    store = LocalStore(saved)
    read_ready(store, names_of(store, ""), 131, {}, {"5": "w5"})
    for number, token in (("6", "w5"), ("5", "<none>")):
        with pytest.raises(EngineError, match=r"E501 the tokenizer lacks a token of the mapping's chat template"):
            read_ready(store, names_of(store, ""), 131, {}, {number: token})


def test_what_lies_beside_the_configuration_is_copied_and_told(saved: Path, tmp_path: Path) -> None:
    step = shutil.copytree(source_of(MODEL), tmp_path / "step")
    shutil.copytree(saved, step / "huggingface")
    shutil.copy(CONFIG, step / "huggingface" / "config.json")
    assert engine.inspect(step).facts["tokenizer"] == "huggingface/tokenizer.json"
    report = convert(tmp_path / "out", source=step)
    assert any(one.startswith("copied from beside the weights: huggingface/") for one in report.notices)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (saved / "tokenizer.json").read_bytes()
    assert engine.verify(tmp_path / "out", src=step, mapping="transformers").problems == ()


def test_a_stray_file_that_is_no_json_does_not_matter(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "tokenizer")
    (folder / "tokenizer.config.json").write_text("{")
    convert(tmp_path / "out", folder, config=CONFIG)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(EngineError, match="the file is not JSON"):
        convert(tmp_path / "other", folder, config=CONFIG)


def test_it_is_copied_where_the_mapping_describes_another_kind_that_is_not_there(saved: Path, tmp_path: Path) -> None:
    """As of a Llama that InternEvo trained with a tokenizer of the Hub."""
    step = shutil.copytree(FIXTURES / "internevo" / "llama_tp2_pp1_default", tmp_path / "step")
    shutil.copytree(saved, step, dirs_exist_ok=True)
    report = engine.convert("llama", step, tmp_path / "out")
    told = next(one for one in report.notices if "tokenizer" in one)
    assert told.startswith("copied from beside the weights: chat_template.jinja, generation_config.json, tokenizer")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (saved / "tokenizer.json").read_bytes()
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 2, "temperature": 0.5}


def test_where_generation_stops_is_as_said_beside_the_template_that_is_written(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "tokenizer")
    changed("tokenizer_config.json", eos_token="w7")(folder)
    source, file = FIXTURES / "internevo" / "llama_tp2_pp1_default", tmp_path / "chat.yaml"
    report = engine.convert("llama", source, tmp_path / "out", tokenizer=folder)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    told = "the chat template never writes `w7`, id 7, at which generation stops; a chat may not stop after an answer"
    assert told in report.notices
    about = "mapping: 1\nname: chat\nversion: 1.0.0\ndescription: A chat\nextends: families/llama.yaml\n"
    file.write_text(f"{about}generation: {{eos_token_id: [2, 9]}}\nchat_template: internlm2-chat\n")
    report = engine.convert(str(file), source, tmp_path / "own", tokenizer=saved)
    assert any("the chat template never writes `w9`, id 9" in one for one in report.notices)
    assert json.loads((tmp_path / "own" / "generation_config.json").read_text())["eos_token_id"] == [2, 9]
    templates = [json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())["chat_template"]]
    templates.append((tmp_path / "own" / "chat_template.jinja").read_text())
    assert all("<|im_start|>" in text for text in templates)
    file.write_text(f'{about}tokenizer: {{rename: {{9: "<|im_end|>"}}}}\nchat_template: internlm2-chat\n')
    with pytest.raises(EngineError, match="lacks a token of the mapping's chat template"):
        engine.convert(str(file), source, tmp_path / "lacks", tokenizer=saved)


def test_what_lies_beside_a_given_sentencepiece_model_is_told(saved: Path, model_file: Path, tmp_path: Path) -> None:
    save(Model("v2", layers=1, vocab=420), tmp_path / "step")
    folder = shutil.copytree(saved, tmp_path / "tokenizer")
    shutil.copy(model_file, folder)
    how: Any = {"tokenizer": folder, "settings": {"mlp_letters": "w2_is_down"}}
    report = engine.convert("internlm2", tmp_path / "step", tmp_path / "out", **how)
    told = next(one for one in report.notices if "not read" in one)
    assert told.startswith("beside tokenizer.model and not read: chat_template.jinja, generation_config.json, tok")


@pytest.mark.parametrize("given", [True, False])
def test_tokens_that_lie_beside_a_sentencepiece_model_are_those_of_the_model(
    given: bool, model_file: Path, tmp_path: Path
) -> None:
    """As transformers saves a slow tokenizer to which tokens were added; a file that is given is taken alone."""
    save(Model("v2", layers=1, vocab=424), tmp_path / "step")
    folder = tmp_path / ("tokenizer" if given else "step")
    folder.mkdir(exist_ok=True)
    shutil.copy(model_file, folder / "tokenizer.model")
    table = {"1": {"content": "<s>", "special": True}, "3": {"content": "<|im_start|>", "special": True}}
    changed("tokenizer_config.json", added_tokens_decoder=table, chat_template="{{ 1 }}")(folder)
    changed("added_tokens.json", **{"[PAD]": 420, "<tool>": 421})(folder)
    changed("special_tokens_map.json", pad_token="[PAD]")(folder)
    how: Any = {"settings": {"mlp_letters": "w2_is_down"}, "tokenizer": folder if given else None}
    report = engine.convert("internlm2", tmp_path / "step", tmp_path / "out", **how)
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert written.encode("<|im_start|><tool>[PAD]").ids == [1, 3, 421, 420]
    assert written.decode([3, 421, 420]) == "<tool>"
    told = next(one for one in report.notices if "names of tokens" in one)
    assert told.endswith("of these only the names of tokens are read: <|im_start|>, [PAD], <tool>")
    how["tokenizer"] = folder / "tokenizer.model"
    engine.convert("internlm2", tmp_path / "step", tmp_path / "alone", **how)
    assert Tokenizer.from_file(str(tmp_path / "alone" / "tokenizer.json")).get_vocab_size() == 420


def test_a_sentencepiece_model_that_disagrees_with_tokenizer_json_is_told(
    saved: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(saved, tmp_path / "tokenizer")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # of another kind
    assert not any("disagrees" in one for one in convert(tmp_path / "out", folder, config=CONFIG).notices)
    shutil.copy(model_file, folder / "tokenizer.model")
    report = convert(tmp_path / "other", folder, config=CONFIG)
    told = "tokenizer.model disagrees with tokenizer.json (`<unk>` is 0 and not 118): programs"
    assert any(one.startswith(told) for one in report.notices)
    assert other_ids(model_file.read_bytes(), {"<unk>": 0, "w": 2}) == []
    assert "(`<unk>` is 0 and not 1, and 1 more)" in other_ids(model_file.read_bytes(), {"<unk>": 1, "<s>": 0})[0]
    monkeypatch.setattr(bundle, "writes", lambda config: False)  # classes of other models may shift the model's ids
    assert not any("disagrees" in one for one in convert(tmp_path / "bert", folder, config=CONFIG).notices)


def test_a_model_of_which_no_axis_is_the_vocabulary_takes_any_tokenizer(
    saved: Path, model_file: Path, tmp_path: Path
) -> None:
    save(Model("v2", layers=1), tmp_path / "step")
    plan = engine.plan("internlm2", tmp_path / "step", settings={"mlp_letters": "w2_is_down"})
    sizes, config = ({k: v for k, v in one.items() if not k.startswith("vocab")} for one in (plan.sizes, plan.config))
    for tokenizer in (saved, model_file):
        assets = make_assets(replace(plan, sizes=sizes, config=config), tokenizer)
        assert "tokenizer.json" in assets.files and not any("fewer" in one for one in assets.notices)


def test_a_given_tokenizer_is_no_fault_to_verify(saved: Path, tmp_path: Path) -> None:
    convert(tmp_path / "out", saved, config=CONFIG)
    assert engine.verify(tmp_path / "out").problems == ()
    found = engine.verify(tmp_path / "out", src=source_of(MODEL), mapping="transformers", config=CONFIG)
    assert found.problems == () and any("tokenizer" in one for one in found.unchecked)
    (tmp_path / "out" / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert "generation_config.json" in str(engine.verify(tmp_path / "out").problems)


def changed(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**data, **values}))

    return change


def end_in_map(folder: Path) -> None:
    changed("tokenizer_config.json", eos_token=None)(folder)
    changed("special_tokens_map.json", eos_token="w3")(folder)


WRONG: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "not whole": ("E501", "no tokenizer.json", lambda folder: (folder / "tokenizer.json").unlink()),
    "code of its own": ("E501", "auto_map", changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["o.T"]})),
    "more ids than rows": ("E501", "ids up to 131: `<11>`, which only its settings name", changed(
        "tokenizer_config.json", additional_special_tokens=[f"<{n}>" for n in range(12)])),
    "another id than transformers gives it": ("E501", "`<125>` the id", changed(
        "tokenizer_config.json", added_tokens_decoder={"125": {"content": "<125>"}})),
    "an end that it lacks": ("E501", "another id", changed("tokenizer_config.json", eos_token="<end>")),
    "a beginning that is put before texts with another id": ("E501", "`w1` is put into texts", changed(
        "tokenizer.json", post_processor={
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "w1", "type_id": 0}},
                                                     {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"w1": {"id": "w1", "ids": [11], "tokens": ["w1"]}}})),
    "tokens for its model beyond the rows": ("E501", "ids up to 131", changed(
        "special_tokens_map.json", pad_token={"content": "<pad>"},
        extra_special_tokens={f"{n}_token": f"<{n}>" for n in range(11)})),
    "a number in place of a token": ("E501", "`bos_token` names no token", changed(
        "special_tokens_map.json", bos_token=5)),
    "text in place of tokens": ("E501", "`extra_special_tokens` names", changed(
        "special_tokens_map.json", extra_special_tokens="<x>")),
    "a list among tokens": ("E501", "`additional_special_tokens` names", changed(
        "tokenizer_config.json", additional_special_tokens=["<x>", ["<y>"]])),
    "an id that is no number": ("E501", "`added_tokens_decoder` is none", changed(
        "tokenizer_config.json", added_tokens_decoder={"x": {"content": "<x>"}})),
    "another end": ("E501", "another id", changed("tokenizer_config.json", eos_token="w3")),
    "another beginning": ("E501", "another id", changed("tokenizer_config.json", bos_token={"content": "w9"})),
    "no JSON": ("E501", "cannot be loaded", lambda folder: (folder / "tokenizer.json").write_text('{"model"') and None),
    "no such kind": ("E501", "cannot be loaded", changed("tokenizer.json", model={"type": "Other"})),
    "merges at which `tokenizers` ends the process": ("E501", "have the prefix ##", changed("tokenizer.json", model={
        "type": "BPE", "vocab": {"▁": 0, "▁▁": 1}, "merges": [["▁", "▁"]], "continuing_subword_prefix": "##"})),
    "the same, with an escape in the key": ("E501", "have the prefix x", lambda folder: (
        folder / "tokenizer.json").write_text(json.dumps({"model": {
            "type": "BPE", "vocab": {"a": 0, "é": 1, "aé": 2}, "merges": [["a", "é"]],
            "continuing_subword_prefix": "x"}}, ensure_ascii=False).replace("g_s", "g\\u005fs")) and None),
    "no token at all": ("E501", "has no token", changed(
        "tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[], post_processor=None)),
    "an added token beyond the rows": ("E501", "ids up to 131", changed(
        "added_tokens.json", **{f"<{n}>": n for n in range(120, 132)})),
    "another end, in the map alone": ("E501", "another id", end_in_map),
    "settings that are no object": (
        "E303", "not an object", lambda folder: (folder / "tokenizer_config.json").write_text("[1]") and None),
    "an id that no token has": ("E502", "eos_token_id", changed("generation_config.json", eos_token_id=[2, 131])),
    "a template in the settings that is no Jinja": (
        "E502", "Jinja", changed("tokenizer_config.json", chat_template="{{ ")),
    "one of several templates that is no Jinja": ("E502", "Jinja", changed(
        "tokenizer_config.json", chat_template=[{"name": "default", "template": "{{ "}])),
    "an older file's template that is no Jinja": ("E502", "Jinja", changed("chat_template.json", chat_template="{{ ")),
    "a folder of its name": ("E305", "not a regular file", lambda folder: (folder / "merges.txt").mkdir()),
    "a template that is no Jinja": (
        "E502", "Jinja", lambda folder: (folder / "chat_template.jinja").write_text("{% if %}") and None),
}  # fmt: skip


@sampled(4, lambda row: WRONG[row["name"]][0])
@pytest.mark.parametrize("name", WRONG)
def test_a_tokenizer_that_is_not_this_models_is_refused_if_given_and_left_out_if_only_there(
    name: str, saved: Path, tmp_path: Path
) -> None:
    code, told, change = WRONG[name]
    folder = shutil.copytree(saved, tmp_path / "tokenizer")
    change(folder)
    with pytest.raises(EngineError) as caught:
        convert(tmp_path / "out", folder, config=CONFIG)
    assert caught.value.code == code and told in str(caught.value)
    assert not (tmp_path / "out").exists()
    step = shutil.copytree(source_of(MODEL), tmp_path / "step")
    shutil.copytree(folder, step / "huggingface")
    shutil.copy(CONFIG, step / "huggingface" / "config.json")
    report = convert(tmp_path / "out", source=step)
    told = next(one for one in report.notices if one.startswith("not written: huggingface/"))
    assert "got None" not in told
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


SETTINGS: dict[str, tuple[list[Any], list[Any]]] = {  # values that transformers cannot load, and some that it can
    "padding_side": (["up", None, ["left"]], ["left"]),
    "truncation_side": ([5], ["right"]),
    "split_special_tokens": (["x", 1, None], [False]),
    "tokenizer_class": ([5, {}], [None, "GPT2Tokenizer"]),
    "model_max_length": (["9", []], [None, 1e30, 9]),
    "model_input_names": ([5, None], [["input_ids"]]),
    "added_tokens_decoder": ([None, [], {"120": 1}, {"x": {"content": "<x>"}}], [{"120": {"content": "<x>"}}]),
    "chat_template": ([["x"], [{"template": "x"}], [{"name": "x"}]], [None, "x", [{"name": "a", "template": "x"}]]),
    "<y>": ([{}, [], None, "x", "120"], [120]),
}


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_that_transformers_cannot_load_are_refused_and_no_others(
    key: str, saved: Path, tmp_path: Path
) -> None:
    name = "added_tokens.json" if key == "<y>" else "tokenizer_config.json"
    data = (saved / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(data)
    for fails, values in zip((True, False), SETTINGS[key], strict=True):
        for value in values:
            changed(name, **{key: value})(tmp_path)
            objects = {name: json.loads((tmp_path / name).read_text())}
            if not fails:
                assert AutoTokenizer.from_pretrained(tmp_path)("w1") and ids_of(data, "", 131, objects, {})
                continue
            with pytest.raises((TypeError, ValueError, LookupError, AttributeError)):
                AutoTokenizer.from_pretrained(tmp_path)("w1")
            with pytest.raises(EngineError, match=rf"`{key}`.*\n +given/{name}\n"):
                ids_of(data, "given/tokenizer.json", 131, objects, {})


def test_a_tokenizer_of_few_letters_that_has_no_token_for_others_is_right() -> None:
    model = {"type": "WordLevel", "vocab": {"A": 0, "C": 1}, "unk_token": "[UNK]"}
    assert ids_of(json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode(), "", 2, {}, {}) == (
        {"A": 0, "C": 1}, {})  # fmt: skip


def test_a_file_is_no_tokenizer_where_the_mapping_describes_none(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"tokenizer\.json, whose files are copied") as caught:
        convert(tmp_path / "out", saved / "tokenizer.json", config=CONFIG)
    assert caught.value.code == "E501"


@pytest.mark.parametrize(
    ("settings", "mapping", "source", "expected"),
    [
        (None, "internevo-qwen2", "qwen2_tp2", {"eos_token_id": 2}),
        ({"temperature": 0.5}, "internevo-mixtral", "mixtral_tp2", {"eos_token_id": 2, "temperature": 0.5}),
        ({"eos_token_id": 7}, "internevo-qwen2", "qwen2_tp2", {"eos_token_id": 7}),
    ],
)
def test_generation_stops_at_the_tokenizers_own_end_if_nothing_else_says_where(
    settings: dict[str, Any] | None, mapping: str, source: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    known = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w3"))
    eos = "w7" if settings == {"eos_token_id": 7} else "w2"
    PreTrainedTokenizerFast(tokenizer_object=known, eos_token=eos).save_pretrained(tmp_path / "saved")
    if settings is not None:
        (tmp_path / "saved" / "generation_config.json").write_text(json.dumps(settings))
    step = FIXTURES / "internevo_2025" / source
    report = engine.convert(mapping, step, tmp_path / "out", tokenizer=tmp_path / "saved")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == expected
    assert not any("never writes" in one for one in report.notices)  # it has no template
    assert engine.verify(tmp_path / "out", src=step, mapping=mapping).problems == ()
