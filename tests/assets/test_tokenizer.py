"""Tokenizers: the converted files must give SentencePiece's ids, on any text."""

from __future__ import annotations

import itertools
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from engine.assets.beside import tokens_beside
from engine.assets.merges import ranked_merges
from engine.assets.symbols import symbols_of
from engine.assets.tokenizer import convert_tokenizer
from engine.assets.tokenizer_read import Pieces, understand_tokenizer
from engine.errors import EngineError
from engine.storage.local import LocalStore
from tests.support.chats import SPEC
from tests.support.depth import examples
from tests.support.sentencepiece_models import RESERVED, WORDS, train


@pytest.fixture(scope="module")
def theirs(model_file: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file))


@pytest.fixture(scope="module")
def ours(model_file: Path) -> Tokenizer:
    return Tokenizer.from_str(convert_tokenizer(model_file, SPEC)["tokenizer.json"].decode())


def unlike_specials(text: str) -> bool:
    return not any(special in text for special in ("<s>", "</s>", "<unk>"))


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*WORDS, *RESERVED, " ", "  ", "   ", "\t", "\n", "-", "--", "a", "b", "ab", "▁", "0", "🙂", "\0"])
).map("".join)


@settings(max_examples=examples(400), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT.filter(unlike_specials))
def test_ids_equal_sentencepieces_on_any_text(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs.encode(text)
    assert ours.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


@pytest.mark.parametrize("count", range(1, 200, 7))
@pytest.mark.parametrize("char", [" ", "-", "a", "ab", "ba", "\n"])
def test_runs_are_joined_from_the_left(ours: Tokenizer, theirs: Any, char: str, count: int) -> None:
    assert ours.encode(char * count, add_special_tokens=False).ids == theirs.encode(char * count)


def test_of_equal_scores_the_left_pair_wins() -> None:
    pieces = {"a": 0.0, "b": 0.0, "ba": -1.0, "aba": -2.0, "bab": -2.0}
    merges = ranked_merges(pieces)
    assert merges.index(("a", "ba")) < merges.index(("ba", "b"))


def ranked_one_by_one(scores: dict[str, float]) -> list[tuple[str, str]]:
    """What `ranked_merges` does without its short cuts: every pair of a score is weighed against the others."""
    pairs = [(p[:cut], p[cut:]) for p in scores for cut in range(1, len(p)) if p[:cut] in scores and p[cut:] in scores]
    pairs.sort(key=lambda pair: (-scores["".join(pair)], -len(pair[0]), pair))
    merges = []
    for _, group in itertools.groupby(pairs, key=lambda pair: scores["".join(pair)]):
        rest = list(group)
        while rest:
            free = (b for b in rest if not any(a[1] == b[0] for a in rest if a != b))
            merges.append(next(free, rest[0]))
            rest.remove(merges[-1])
    return merges


@given(st.dictionaries(st.text("ab", min_size=1, max_size=7), st.integers(-9, 0).map(float), max_size=60))
def test_merges_are_ranked_as_if_all_pairs_were_compared(scores: dict[str, float]) -> None:
    scores |= {"a": 0.0, "b": 0.0}
    assert ranked_merges(scores) == ranked_one_by_one(scores)


@given(st.text("ab", min_size=1, max_size=12))
@example("ababa")  # (ab, aba) competes with (aba, ba), though its left part is shorter
def test_merges_of_unequal_scores_are_ranked_so_too(text: str) -> None:
    pieces = dict.fromkeys(text[a:b] for a, b in itertools.combinations(range(len(text) + 1), 2))
    scores = {piece: -float(index) for index, piece in enumerate(pieces)}
    assert ranked_merges(scores) == ranked_one_by_one(scores)


def test_no_dummy_prefix_is_added(model_file: Path, ours: Tokenizer, theirs: Any) -> None:
    assert ours.encode("the", add_special_tokens=False).ids == theirs.encode("the") != theirs.encode(" the")


PLAIN: dict[str, Any] = {"user_defined_symbols": []}
BOTH = {"add_dummy_prefix": True, "remove_extra_whitespaces": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"add_dummy_prefix": True, **PLAIN},
        {"remove_extra_whitespaces": True, **PLAIN},
        {"byte_fallback": False, "vocab_size": 120},
        {"user_defined_symbols": ["a b", " x", "the"]},  # symbols with spaces are never found
        {"add_dummy_prefix": True},
        {"add_dummy_prefix": True, "user_defined_symbols": ["a b", "the", "▁cat", "▁▁"]},
        {"remove_extra_whitespaces": True, "user_defined_symbols": ["ba", "bana", "nab", "[a-z]+", "\\n", "\n"]},
        {"remove_extra_whitespaces": True, "user_defined_symbols": ["<0", "<0x41>x", "cat"]},
        {**BOTH, "user_defined_symbols": ["<|im_start|>", "<|im|>", "|>", "世", "🙂"]},
        {**BOTH, "byte_fallback": False, "vocab_size": 120, "user_defined_symbols": ["a", "(", "$"]},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_the_models_own_flags_and_symbols_are_obeyed(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(**changes))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = Tokenizer.from_str(convert_tokenizer(path, SPEC)["tokenizer.json"].decode())
    texts = ["the cat", " the", "the  cat ", "ａ①", "🙂🙂 x", "banana\n\nx", "", "the ▁▁", "▁", "<0x41>", "the<0x0A>\n"]
    for one in changes.get("user_defined_symbols", RESERVED):
        texts += [one, f"{one}<0x41>{one}", f" {one} {one}", f"a{one}{one[:1]}cat{one}  ", f"{one}the{one}\\n{one}"]
    for text in texts:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
        if theirs.unk_id() not in theirs.encode(text):
            assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text)), text
    space = theirs.piece_to_id("▁")
    for ids in [theirs.encode("the cat"), theirs.encode("▁the"), [space] * 3 + theirs.encode("cat  "), [space, space]]:
        assert ours.decode(ids) == theirs.decode(ids), ids


def test_symbols_that_texts_can_hold_are_found_the_longest_first() -> None:
    pieces = Pieces(["b", "a b", "ab", "x", "aa"], [4, 4, 4, 4, 1], [0.0] * 5)
    assert symbols_of(pieces, ["b", "a b", "ab", "renamed", "aa"]) == ["ab", "b"]


def test_a_piece_that_joins_never_make_stays_one_that_no_text_becomes(tmp_path: Path) -> None:
    """`[UNUSED_TOKEN_1]` becomes an ordinary piece, which a symbol before and behind it cut out."""
    model = sentencepiece_model_pb2.ModelProto.FromString(train(add_dummy_prefix=True))
    piece = next(piece for piece in model.pieces if piece.piece == RESERVED[1])
    piece.piece, piece.type = "catmat", 1
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = Tokenizer.from_str(convert_tokenizer(path, SPEC)["tokenizer.json"].decode())
    text, at = f"{RESERVED[0]}catmat{RESERVED[0]}", theirs.piece_to_id("catmat")
    assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)
    assert at not in theirs.encode(text) and ours.decode([at]) == "catmat"


@pytest.mark.parametrize("kind", [1, 4])
def test_a_nul_piece_keeps_its_id_and_is_not_encoded(kind: int, tmp_path: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(train())
    at = next(i for i, piece in enumerate(model.pieces) if piece.piece == "世")
    model.pieces[at].piece, model.pieces[at].type = "\0", kind
    for piece in model.pieces:
        if "世" in piece.piece:
            piece.piece, piece.type = f"[UNUSED_{piece.piece}]", 4
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = Tokenizer.from_str(convert_tokenizer(path, SPEC)["tokenizer.json"].decode())
    assert ours.encode("a\0\0b", add_special_tokens=False).ids == theirs.encode("a\0\0b")
    assert ours.decode([at]) == theirs.decode([at]) == "\0"
    assert ours.get_vocab_size() == len(model.pieces)


@pytest.fixture(scope="module")
def loaded(model_file: Path, tmp_path_factory: pytest.TempPathFactory, theirs: Any) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("hf")
    renamed = theirs.piece_to_id(RESERVED[0])
    for name, data in convert_tokenizer(model_file, {**SPEC, "rename": {renamed: "<|im_start|>"}}).items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return AutoTokenizer.from_pretrained(folder)


class TestInTransformers:
    @pytest.mark.parametrize("text", ["", "Hello", " the  cat\n", "你好 🙂\t——"])
    def test_bos_comes_first_unless_declined(self, loaded: Any, theirs: Any, text: str) -> None:
        assert loaded(text).input_ids == [1, *theirs.encode(text)]
        assert loaded(text, add_special_tokens=False).input_ids == theirs.encode(text)

    @pytest.mark.parametrize("text", ["", "Hello", " the  cat\n", "你好 🙂\t——", unicodedata.normalize("NFD", "é .,!")])
    def test_decoding_gives_the_text_back(self, loaded: Any, text: str) -> None:
        assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text

    def test_renamed_ids_are_special_tokens(self, loaded: Any, theirs: Any) -> None:
        at = theirs.piece_to_id(RESERVED[0])
        ids = loaded("<|im_start|>cat", add_special_tokens=False).input_ids
        assert ids == [at, *theirs.encode("cat")]
        assert loaded.decode(ids, skip_special_tokens=True) == "cat"
        assert "<|im_start|>" in loaded.all_special_tokens

    def test_named_tokens_have_their_ids(self, loaded: Any) -> None:
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id) == (1, 2, 2, 0)
        assert len(loaded) == loaded.vocab_size == len(loaded.get_vocab())

    def test_specials_written_as_text_are_specials(self, loaded: Any, theirs: Any) -> None:
        assert loaded("<s>cat</s>", add_special_tokens=False).input_ids == [1, *theirs.encode("cat"), 2]


def beside(tokens: dict[int, str]) -> dict[int, dict[str, Any]]:
    """Special tokens by id, as files beside a model name them."""
    flags = {"special": True, "lstrip": False, "rstrip": False, "single_word": False}
    return {index: {"content": name, **flags} for index, name in tokens.items()}


def test_files_beside_a_model_say_which_tokens_are_special_the_settings_before_the_map(tmp_path: Path) -> None:
    table = {"5": {"content": "<p>"}, "6": {"content": "<x>"}}
    table["7"] = {"content": "<y>", "lstrip": True, "rstrip": 1, "single_word": True}
    said = {"tokenizer_config.json": {"pad_token": "<p>", "bos_token": "<x>", "added_tokens_decoder": table},
            "special_tokens_map.json": {"pad_token": "<old>"}, "added_tokens.json": {"<old>": 8}}  # fmt: skip
    table["6"]["special"] = False
    for name, one in said.items():
        (tmp_path / name).write_text(json.dumps(one))
    found, files = tokens_beside(LocalStore(tmp_path), [*said, "tokenizer.model"])
    expected = beside({5: "<p>", 6: "<x>", 7: "<y>", 8: "<old>"})
    for index in (6, 7, 8):
        expected[index]["special"] = False
    assert (
        found == {**expected, 7: {**expected[7], "lstrip": True, "single_word": True}} and files.keys() == said.keys()
    )


@pytest.mark.parametrize("prefix", [False, True])
def test_tokens_that_files_beside_the_model_add_or_rename_are_tokens(prefix: bool, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(add_dummy_prefix=prefix))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    end = theirs.get_piece_size()
    named = beside({1: "<s>", end: "<|a|>", end + 1: "<tool>", 3: "<|im_start|>", 4: RESERVED[1]})
    named[end + 1] |= {"special": False, "rstrip": True}
    files = convert_tokenizer(path, {**SPEC, "beside": named})
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    for token, index in (("<|a|>", end), ("<tool>", end + 1), ("<|im_start|>", 3), (RESERVED[1], 4)):
        expected = [*theirs.encode("the"), index, *theirs.encode("cat "), index]
        assert ours.encode(f"the{token}cat {token}", add_special_tokens=False).ids == expected
        assert ours.decode([index]) == (token if token == "<tool>" else "")
    assert ours.encode("<tool>  a", add_special_tokens=False).ids == [end + 1, *theirs.encode("a")]
    extra = json.loads(files["tokenizer_config.json"])["additional_special_tokens"]
    assert extra == ["<|im_start|>", RESERVED[1], "<|a|>"]
    assert files["tokenizer.model"] == path.read_bytes()
    spec = {**SPEC, "beside": named, "rename": {3: "<|mine|>"}}  # the mapping's own names go first
    assert understand_tokenizer(path, spec).names[3] == "<|mine|>"


def test_a_file_beside_that_is_larger_than_any_is_refused(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").touch()
    os.truncate(tmp_path / "added_tokens.json", 300 << 20)
    with pytest.raises(EngineError, match="E501 a file of the tokenizer is too large"):
        tokens_beside(LocalStore(tmp_path), ["added_tokens.json"])


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({421: "<|a|>"}, "ends before it"),
        ({420: "<s>"}, "two ids would be named"),
        ({300: "<|a|>"}, "not a reserved piece"),
        ({0: "<|a|>"}, "not a reserved piece"),
        ({3: "\ud800"}, "no name"),
    ],
)
def test_tokens_beside_that_do_not_belong_to_the_model_are_refused(
    model_file: Path, named: dict[int, str], message: str
) -> None:
    with pytest.raises(EngineError, match=rf"{message}(?s:.*)files beside it"):
        understand_tokenizer(model_file, {**SPEC, "beside": beside(named)})


def test_without_add_bos_nothing_is_put_in_front(model_file: Path, theirs: Any) -> None:
    files = convert_tokenizer(model_file, {**SPEC, "add_bos": False})
    assert Tokenizer.from_str(files["tokenizer.json"].decode()).encode("cat").ids == theirs.encode("cat")
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is False


def test_the_size_is_the_number_of_pieces(model_file: Path, theirs: Any) -> None:
    assert len(understand_tokenizer(model_file, SPEC).names) == theirs.get_piece_size()


def test_the_model_itself_is_handed_on_and_conversion_is_deterministic(model_file: Path) -> None:
    files = convert_tokenizer(model_file, SPEC)
    assert files["tokenizer.model"] == model_file.read_bytes()
    assert files == convert_tokenizer(model_file, SPEC)


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage, not a model", b"\x80\x02}q\x00.", train()[:1000], train().replace(b"</s>", b"</\xff>")],
    ids=["empty", "text", "pickle", "truncated", "no text"],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(EngineError) as caught:
        understand_tokenizer(path, SPEC)
    assert caught.value.code == "E501"
    assert "not a SentencePiece model" in str(caught.value) and "no tokenizer.model" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be read") as caught:
        convert_tokenizer(tmp_path / "gone.model", SPEC)
    assert "gone.model" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"model_type": "unigram"}, "a unigram model"),
        # `tokenizers` leaves か\u3099 as it is, and loses the mark of \u3000\u0308
        ({"normalization_rule_name": "nfkc"}, "characters that the normaliser nfkc replaces"),
    ],
)
def test_another_kind_of_model_is_named(changes: dict[str, Any], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(**changes))
    with pytest.raises(EngineError, match="converted exactly") as caught:
        convert_tokenizer(path, SPEC)
    assert caught.value.got == kind


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"remove_extra_whitespaces": True, "user_defined_symbols": ["a b"]}, "symbols with spaces"),
        ({"add_dummy_prefix": True, "control_symbols": ["▁c"]}, "special tokens with ▁"),
    ],
)
def test_what_cannot_be_expressed_exactly_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(**changes))
    with pytest.raises(EngineError, match="converted exactly") as caught:
        understand_tokenizer(path, SPEC)
    assert told in str(caught.value.got)


SEAMS = [["<0", "0x"], ["<0", "0x", "A>", "xA", "4A", "14", "1>"], ["<0", "<0x", "<0x4", "<0x41", "2>"]]


@pytest.mark.parametrize("joins", SEAMS)
def test_a_text_that_is_the_name_of_a_byte_is_cut_where_no_join_crosses_it(joins: list[str], tmp_path: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(train(remove_extra_whitespaces=True))
    have = {piece.piece for piece in model.pieces}
    for name in [*"<0x>A142", *joins]:
        if name not in have:
            model.pieces.add(piece=name, type=1, score=-1000 - len(model.pieces))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    if joins == SEAMS[-1]:
        with pytest.raises(EngineError, match="join the names of bytes"):
            convert_tokenizer(path, SPEC)
        return
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = Tokenizer.from_str(convert_tokenizer(path, SPEC)["tokenizer.json"].decode())
    for byte in range(256):
        for text in (f"<0x{byte:02X}>", f"{RESERVED[0]}<0x{byte:02X}>{RESERVED[1]} <0x{byte:02X}>"):
            assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text


def test_an_unused_piece_that_no_join_makes_is_no_reason_to_refuse(tmp_path: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(train())
    at = next(i for i, piece in enumerate(model.pieces) if piece.piece == RESERVED[0])
    model.pieces[at].type = 5
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = Tokenizer.from_str(convert_tokenizer(path, SPEC)["tokenizer.json"].decode())
    assert ours.encode(RESERVED[0], add_special_tokens=False).ids == theirs.encode(RESERVED[0]) != [at]
    assert ours.decode([at]) == theirs.decode([at]) == RESERVED[0]


@pytest.mark.parametrize(
    ("changes", "length", "told"),
    [
        ({}, 2, "1 unused pieces that others are made of"),
        ({}, 1, "1 unused pieces that others are made of"),
        ({"byte_fallback": False, "vocab_size": 120}, 0, "1 unused pieces without byte fallback"),
    ],
)
def test_unused_pieces_that_no_vocabulary_expresses_are_refused(
    changes: dict[str, Any], length: int, told: str, tmp_path: Path
) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(train(**changes))
    texts = [piece.piece for piece in model.pieces if piece.type == 1]
    inner = (p for p in model.pieces if len(p.piece) == length and sum(p.piece in text for text in texts) > 1)
    spare = next(piece for piece in model.pieces if piece.piece == RESERVED[0])
    one = next(inner, spare)
    one.piece, one.type = one.piece if length else "☃", 5
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="converted exactly") as caught:
        convert_tokenizer(path, SPEC)
    assert caught.value.got == told


def test_equal_scores_whose_order_no_ranks_express_are_refused(tmp_path: Path) -> None:
    """Which once were converted, since no text that was tried showed it."""
    model = sentencepiece_model_pb2.ModelProto.FromString(train())
    for piece in model.pieces:
        piece.score = 0
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match=r"other ids than SentencePiece(?s:.*)equal scores(?s:.*)a folder"):
        convert_tokenizer(path, SPEC)


def test_a_conversion_that_gives_other_ids_is_never_handed_out(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engine.assets.tokenizer as module

    monkeypatch.setattr(module, "ranked_merges", lambda scores: ranked_merges(scores)[::-1])
    with pytest.raises(EngineError, match="other ids than SentencePiece"):
        convert_tokenizer(model_file, SPEC)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({**SPEC, "rename": {99999: "<|x|>"}}, r"ends before(?s:.*)--tokenizer"),
        ({**SPEC, "rename": {300: "<|x|>"}}, r"not a reserved piece(?s:.*)--tokenizer"),
        ({**SPEC, "rename": {3: ""}}, "no name"),
        ({**SPEC, "bos": "<bos>"}, "not a piece"),
        ({**SPEC, "eos": "a"}, "ordinary text"),
        ({**SPEC, "rename": {3: "</s>"}}, "two ids"),
    ],
)
def test_wrong_names_are_refused(model_file: Path, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        convert_tokenizer(model_file, spec)
    assert caught.value.code == "E501"
    assert caught.value.fix
