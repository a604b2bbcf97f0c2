"""Lint of what a mapping writes: values that contradict what is declared, the tokenizer, or each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.errors import EngineError
from engine.language.declared import expressions_of
from engine.language.documents import leaves, prefixes, value_at
from engine.language.expressions import compile_expression
from engine.language.keys import Key, find_key
from engine.language.model import Expression, Layout, MappingFile
from engine.planning.config_keys import declared, shown
from engine.planning.variants import option_value
from engine.proving.known_names import place_of
from engine.proving.proof import Finding

_BEGINS = frozenset(("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<|im_start|>"))
_ENDS = frozenset(("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "<|im_end|>", "<|eot_id|>"))
_IDS = {"<unk>": 0, "<s>": 1, "</s>": 2}  # ids of every SentencePiece model trained with default options
_TOKENS = ("bos", "eos", "pad", "unk")


def check_declared(mapping: MappingFile, layout: Layout) -> Iterator[Finding]:
    """L014: literals that the declaration of their key does not allow; `keys` that contradict themselves."""
    sides = (("config", mapping.config, mapping.keys.get("target", {})),
             ("training_config", mapping.training_config, declared(mapping, layout, "source")))  # fmt: skip
    for part, tree, keys in sides:
        for path, value, key in not_allowed(tree, keys):
            yield Finding(
                place_of(mapping, part, path.split(".")[0]),
                contradiction(part, path, value, key),
                f'Write an expression in braces: "{{{{ {value} }}}}".'
                if isinstance(value, str) and value in {*mapping.dims, *mapping.variants}
                else "Correct the value, or its declaration in `keys`.",
            )
    for side in mapping.keys.values():
        for key in side.values():
            # One that `only` excludes refuses configurations without the key.
            if key.default is not None and not key.limits.fits(key.default):
                told = f"the default of `{key.name}` is {_text(key.default)}, and `keys` allows {key.limits}"
                yield Finding(key.place, told, "Correct one of them.")


def not_allowed(tree: Mapping[str, Any], keys: Mapping[str, Key]) -> Iterator[tuple[str, Any, Key]]:
    """(path, value, key) of a configuration's literal values that its keys do not allow."""
    values = {above: value_at(tree, above) for path, _ in leaves(tree) for above in prefixes(path)} | dict(leaves(tree))
    for path, value in values.items():
        key = find_key(keys, path)
        if key is None or value is None or list(expressions_of(value)):
            continue
        if not (key.limits.fits(value) and key.allows(value)):
            yield path, value, key


def contradiction(part: str, path: str, value: Any, key: Key) -> str:
    return f"`{part}` writes `{path}: {_text(value)}`, and `keys` allows {_allowed(key)} ({key.place})"


def _allowed(key: Key) -> str:
    return " or ".join(map(_text, key.only)) if key.only is not None else str(key.limits)


def _text(value: Any) -> str:
    plain = isinstance(value, str) and value.isidentifier() and value.lower() not in ("yes", "no", "on", "off")
    return value if plain else shown(value)


def check_tokens(mapping: MappingFile) -> Iterator[Finding]:
    """L015: begin and end tokens that are exchanged, and numbers that are not those of the tokens."""
    spec = mapping.tokenizer or {}
    wrong = [name for name, others in (("bos", _ENDS), ("eos", _BEGINS)) if spec.get(name) in others]
    if len(wrong) == 2:
        told = f"`bos` and `eos` of the tokenizer are exchanged: `{spec['bos']}` ends a text"
        yield _token(mapping, told, "tokenizer", "bos")
    for name in wrong if len(wrong) == 1 else ():
        word = "ends" if name == "bos" else "begins"
        yield _token(mapping, f"`{name}` of the tokenizer is `{spec[name]}`, which {word} a text", "tokenizer", name)
    ids = {name: mapping.config.get(f"{name}_token_id") for name in _TOKENS}
    for name, number in ids.items():
        known = _IDS.get(str(spec.get(name)))
        if known is not None and isinstance(number, int) and number != known and name not in wrong:
            told = f"`{name}_token_id` of `config` is {number}; `{spec[name]}` is {known}"
            yield _token(mapping, told, "config", f"{name}_token_id")
    if not spec and (ids["bos"], ids["eos"]) == (_IDS["</s>"], _IDS["<s>"]):
        yield _token(mapping, "`bos_token_id` and `eos_token_id` of `config` are exchanged", "config", "bos_token_id")
    generation = mapping.generation or {}
    rows = mapping.expect.get("vocab")
    renamed = {str(number): name for number, name in (spec.get("rename") or {}).items()}
    for name in _TOKENS:
        given = generation.get(f"{name}_token_id")
        listed = given if isinstance(given, list) else [given]
        number = ids[name]
        if given is not None and isinstance(number, int) and number not in listed:
            told = f"`{name}_token_id` of `generation` is {given}; `config` says {number}"
            yield _token(mapping, told, "generation", f"{name}_token_id")
        for one in listed:
            if name == "eos" and renamed.get(str(one)) in _BEGINS:
                told = f"generation stops at {one}, `{renamed[str(one)]}`, which begins a text or a turn"
                yield _token(mapping, told, "generation", "eos_token_id")
            if rows is not None and isinstance(one, int) and not 0 <= one < rows:
                told = f"`{name}_token_id` of `generation` is {one}; the vocabulary has {rows} rows"
                yield _token(mapping, told, "generation", f"{name}_token_id")
    for number, name in renamed.items():
        if rows is not None and number.isdecimal() and int(number) >= rows:
            told = f"`rename` of the tokenizer names {number} `{name}`; the vocabulary has {rows} rows"
            yield _token(mapping, told, "tokenizer", "rename")


def _token(mapping: MappingFile, message: str, *path: str) -> Finding:
    return Finding(place_of(mapping, *path), message, "Give each token its own id; see the tokenizer.")


def check_options(mapping: MappingFile) -> Iterator[Finding]:
    """L016: defaults and choices of options with a wrong type or out of range."""
    for option in mapping.options.values():
        try:
            for value in option.choices or ():
                if not option.limits.fits(value):
                    told = f"choice `{value}` of option `{option.name}` is not {option.limits}"
                    yield Finding(option.place, told, "Correct the choice, or the type.")
            if option.default is not None:
                option_value(option, option.default)
        except EngineError as error:
            told = f"the default of option `{option.name}` is `{option.default}`, but it takes {error.expected}"
            at = place_of(mapping, "options", option.name, "default")
            yield Finding(at, told, "Correct the default, or the type, range or choices.")
        limits = option.limits
        if limits.min is not None and limits.max is not None and limits.min > limits.max:
            told = f"option `{option.name}` can have no value: its `min` is above its `max`"
            yield Finding(option.place, told, "Exchange them.")


def check_spellings(mapping: MappingFile) -> Iterator[Finding]:
    """L017: `config` writes two spellings of one key with different values."""
    written = dict(leaves(mapping.config))
    for name, key in mapping.keys.get("target", {}).items():
        if key.same_as in written and name in written:
            one, other = (written[path] for path in (name, key.same_as))
            if _tree(one) != _tree(other):
                yield Finding(
                    place_of(mapping, "config", name.split(".")[0]),
                    f"`{name}` and `{key.same_as}` are one key in two spellings, and `config` writes them differently",
                    "Write the same expression in both.",
                )


def _tree(value: Any) -> Any:
    return compile_expression(value).tree if isinstance(value, Expression) else value
