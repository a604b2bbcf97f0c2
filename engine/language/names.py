"""Name patterns: `layers.{layer}.attention.wqkv.{param}`, matched whole and invertible.

A placeholder stands for an integer (decimal, no leading zeros, or padded as in `{tp:02}`);
`{param}` stands for `weight` or `bias`. There is nothing else, so names invert exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from engine.errors import EngineError, Place

PARAMS = ("weight", "bias")
WILD = "*?|\\^$"  # wildcards of other pattern languages
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_INSIDE = re.compile(r"([a-z_][a-z0-9_]*)(?::0([1-9]))?\Z")
_DIGITS = re.compile(r"[0-9]+")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


def is_number(part: str) -> bool:
    """Whether a part of a name counts layers or experts."""
    return _NUMBER.fullmatch(part) is not None


def numbers_in(name: str) -> tuple[int, ...]:
    """The numbers among the parts of a name: its layer, and its expert if it has one.

    >>> numbers_in("model.layers.3.mlp.experts.7.w1.weight")
    (3, 7)
    """
    return tuple(int(part) for part in name.split(".") if is_number(part))


def without_numbers(name: str) -> str:
    """
    >>> without_numbers("model.layers.3.mlp.experts.7.w1.weight")
    'model.layers.{}.mlp.experts.{}.w1.weight'
    """
    return ".".join("{}" if is_number(part) else part for part in name.split("."))


def form(name: str) -> str:
    """A name with 0 for every number; names that a pattern matches have the form of its sample.

    >>> form("model.layers.13.mlp.w1.weight")
    'model.layers.0.mlp.w0.weight'
    """
    return _DIGITS.sub("0", name)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled name pattern. `placeholders` are its integer placeholders, in order."""

    text: str
    placeholders: tuple[str, ...]
    has_param: bool
    regex: re.Pattern[str]

    def match(self, name: str) -> dict[str, int] | None:
        """The placeholder values when the whole name matches.

        >>> pattern("model_tp{tp}_pp{pp}.pt").match("model_tp3_pp0.pt")
        {'tp': 3, 'pp': 0}
        """
        found = self.regex.fullmatch(name)
        if found is None:
            return None
        values = found.groupdict()
        values.pop("param", None)
        return {key: int(value) for key, value in values.items()}

    def format(self, values: Mapping[str, int | str]) -> str:
        """Write the name; every placeholder must have a value.

        >>> pattern("consolidated.{tp:02}.pth").format({"tp": 3})
        'consolidated.03.pth'
        """
        return self.text.format_map(values)  # checked by `pattern`: there are no other placeholders

    def sample(self) -> str:
        """The name with 0 for every placeholder."""
        return self.format(dict.fromkeys(self.placeholders, 0))

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pattern, (self.text,)

    def with_param(self, param: str) -> Pattern:
        return pattern(self.text.replace("{param}", param)) if self.has_param else self


def spelled_out(names: Iterable[str]) -> set[str]:
    """Name patterns with `{param}` written out."""
    return {name.replace("{param}", param) for name in names for param in PARAMS}


def check_file_name(text: str, place: Place, *, folders: bool = False) -> None:
    """E104 unless a file of this name, or names of this pattern, can only lie in the folder itself.

    A leading dot is refused, since the engine's own files begin with one.

    Args:
        folders: whether it may lie in a folder inside, as in `mp_rank_{tp:02}/model_optim_rng.pt`; then torch's
            `.metadata` is allowed too.
    """
    if folders and text.count("/") == 1:
        for part in text.split("/"):
            check_file_name(part, place)
        return
    if folders and text == ".metadata":
        return
    if not text or text.startswith(".") or not text.isprintable() or any(c in "/\\" for c in text) or len(text) > 200:
        raise EngineError(
            "E104",
            "a file name leaves its folder, or is not valid",
            place=place,
            got=text,
            expected="a plain name, like model_config.pt",
            fix="Files lie beside each other in the checkpoint's folder.",
        )


def pattern(text: str, place: Place | None = None) -> Pattern:
    """Compile a pattern; E104 says what cannot be read."""
    try:
        for character in WILD if place is not None else ():
            if character in text:
                raise ValueError(f"there are no wildcards, and `{character}` is part of no tensor's name")
        return _compiled(text)
    except ValueError as error:
        raise EngineError(
            "E104",
            f"a name pattern cannot be read: {error}",
            place=place,
            got=text,
            fix="Placeholders are {name} for an integer and {param} for weight or bias.",
        ) from None


@lru_cache(maxsize=8192)
def _compiled(text: str) -> Pattern:
    parts: list[str] = []
    placeholders: list[str] = []
    has_param = False
    pieces = _PLACEHOLDER.split(text)  # a literal, and after each placeholder another
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            if "{" in piece or "}" in piece:
                raise ValueError("a brace is not closed")
            if not piece and 0 < index < len(pieces) - 1:
                raise ValueError("two placeholders touch, so names could be read in two ways")
            parts.append(re.escape(piece))
            continue
        inside = _INSIDE.match(piece)
        if inside is None:
            raise ValueError(f"`{{{piece}}}` is not a placeholder")
        name, width = inside[1], inside[2]
        if name in placeholders or (name == "param" and has_param):
            raise ValueError(f"`{{{name}}}` occurs twice")
        if name == "param":
            has_param = True
            parts.append("(?P<param>weight|bias)")
        else:
            placeholders.append(name)
            digits = f"[0-9]{{{width}}}|[1-9][0-9]{{{width},17}}" if width else "0|[1-9][0-9]{0,17}"
            parts.append(f"(?P<{name}>{digits})")
    return Pattern(text, tuple(placeholders), has_param, re.compile("".join(parts)))
