"""`engine format`: keys in their usual order, rules with more than three keys in block form.

Lines are moved, never rewritten: values keep their spelling, and comments stay with the key that they
are beside or above. What cannot be moved safely is left as it is, and a result that would not load to
the same data is not returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from engine.language.loader import load_text
from engine.language.mapping_file import digest_of

_MAPPING_ORDER = (
    "mapping", "layout", "name", "version", "description", "extends", "remove", "source", "target",
    "options", "keys", "variants", "dims", "even", "rules", "ignore", "refuse", "config", "training_config",
    "tokenizer", "generation", "chat_template", "expect",
)  # fmt: skip
_LAYOUT_ORDER = (
    "layout", "name", "version", "description", "config", "training", "keys", "prefixes", "wrappers", "options",
    "layers", "indices", "sizes", "uneven", "even", "whole", "lone_rank", "joined", "zip_root", "says", "modes", "skip",
    "skip_tensors", "refuse",
)  # fmt: skip
_RULE_ORDER = (
    "name", "source", "pieces", "target", "axes", "split", "stage", "when", "optional", "transform", "keep", "drop",
    "tied_to", "targets", "notice",
)  # fmt: skip
_FLOW_KEYS = 3


def format_mapping(text: str, name: str = "text.yaml") -> str:
    """A mapping or layout file in its usual form; it still loads to the same data.

    Args:
        name: the file's name, for errors.

    Raises:
        EngineError: E101 when the text cannot be read.

    >>> print(format_mapping("rules:\\n- {source: a, target: b, axes: c, split: c}\\nmapping: 1\\n"), end="")
    mapping: 1
    <BLANKLINE>
    rules:
    - source: a
      target: b
      axes: c
      split: c
    """
    before = load_text(text, name)
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if any(c in text for c in "\r\x85\u2028\u2029"):
        return text  # line breaks for YAML but not for editors: positions would be wrong
    after = _format(text)
    return after if digest_of(load_text(after).data) == digest_of(before.data) else text


def _format(text: str) -> str:
    root: Any = yaml.compose(text, yaml.CSafeLoader)
    lines = text.split("\n")
    if root.flow_style or not root.value or any(key.start_mark.column for key, _ in root.value):
        return text
    kept = _scalar_lines(root)
    lines = [line if i in kept else line.rstrip() for i, line in enumerate(lines)]
    for key, value in reversed(root.value):
        if key.value == "rules" and isinstance(value, yaml.SequenceNode) and not value.flow_style:
            for item in reversed(value.value):
                _format_rule(lines, item)
    root = yaml.compose("\n".join(lines), yaml.CSafeLoader)
    layout = root.value[0][0].value == "layout"
    head, blocks = _split(lines, root.value, 0)
    ordered = sorted(blocks, key=lambda block: _rank(block.key, _LAYOUT_ORDER if layout else _MAPPING_ORDER))
    result = head
    for index, block in enumerate(ordered):
        long = block.multiline or (index > 0 and ordered[index - 1].multiline)
        if index and (block.spaced or long):
            result.append("")
        result += block.above + block.body
    while result and not result[-1]:
        result.pop()
    return "\n".join(result) + "\n"


@dataclass
class _Block:
    """A key with its value: the comments right above it, and its own lines."""

    key: str
    above: list[str]
    body: list[str]
    spaced: bool  # whether a blank line was before it
    multiline: bool  # whether the value is, whatever comments follow it


def _split(lines: list[str], pairs: list[Any], column: int) -> tuple[list[str], list[_Block]]:
    """Cut lines into those before the first key, and one block per key.

    Comment lines directly above a key, no deeper than it, belong to that key.
    """
    starts: list[int] = []
    for index, (key, _) in enumerate(pairs):
        first = key.start_mark.line
        floor = _last_line(pairs[index - 1][1]) + 1 if index else 0
        while index and first > floor and _is_comment(lines[first - 1], column):
            first -= 1
        starts.append(first)
    head = lines[: starts[0]]
    blocks: list[_Block] = []
    for index, (key, value) in enumerate(pairs):
        line = key.start_mark.line
        end = starts[index + 1] if index + 1 < len(pairs) else len(lines)
        last = _last_line(value)
        body = lines[line:end]
        while not body[-1]:  # also those that end a `|` or `>`: a text that keeps them is left as it is
            body.pop()
        spaced = starts[index] > 0 and not lines[starts[index] - 1] and index > 0
        blocks.append(_Block(str(key.value), lines[starts[index] : line], body, spaced, last > line))
    return head, blocks


def _is_comment(line: str, column: int) -> bool:
    stripped = line.lstrip(" ")
    return stripped.startswith("#") and len(line) - len(stripped) <= column


def _rank(key: str, order: tuple[str, ...]) -> int:
    return order.index(key) if key in order else len(order)


def _last_line(node: Any) -> int:
    """The last line with text of a value; the end mark of a block collection is where the next node starts."""
    if isinstance(node, yaml.ScalarNode):
        end = node.end_mark
        return int(end.line if end.column or end.line == node.start_mark.line else end.line - 1)
    if node.flow_style or not node.value:
        return int(node.end_mark.line)
    last = node.value[-1]
    return _last_line(last[1] if isinstance(last, tuple) else last)


def _scalar_lines(node: Any) -> set[int]:
    """Lines inside multi-line scalars, where trailing blanks may be text."""
    if isinstance(node, yaml.ScalarNode):
        first = node.start_mark.line
        return set(range(first, node.end_mark.line + 1)) if _last_line(node) > first else set()
    children = [n for pair in node.value for n in (pair if isinstance(pair, tuple) else (pair,))]
    return set().union(*map(_scalar_lines, children))


def _format_rule(lines: list[str], item: Any) -> None:
    """Rewrite the lines of one rule in place; an unusually written rule is left as it is."""
    if not isinstance(item, yaml.MappingNode) or len(item.value) < 2:
        return
    first, last = item.start_mark.line, _last_line(item)
    column = item.start_mark.column
    dash = lines[first][:column]
    if dash.strip() != "-" or _scalar_lines(item):
        return
    if item.flow_style:
        if first != last or len(item.value) <= _FLOW_KEYS:
            return
        lines[first : last + 1] = _block_form(lines[first], item, dash)
        return
    if any(key.start_mark.column != column for key, _ in item.value):
        return
    own = [" " * column + lines[first][column:], *lines[first + 1 : last + 1]]
    shifted = [""] * first + own
    head, blocks = _split(shifted, item.value, column)
    ordered = sorted(blocks, key=lambda block: _rank(block.key, _RULE_ORDER))
    if ordered[0].above or any(head):
        return
    result = [line for block in ordered for line in block.above + block.body]
    if sorted(result) == sorted(own):  # nothing is lost if blank lines were between keys
        lines[first : last + 1] = [dash + result[0][column:], *result[1:]]


def _block_form(line: str, item: Any, dash: str) -> list[str]:
    """`- {source: a, axes: b, …}  # why` as a block, the comment on its first line."""
    comment = line[item.end_mark.column :].strip()
    indent = " " * len(dash)
    result: list[str] = []
    for key, value in sorted(item.value, key=lambda pair: _rank(pair[0].value, _RULE_ORDER)):
        name = line[key.start_mark.column : key.end_mark.column]
        if key.value == "targets" and isinstance(value, yaml.SequenceNode):
            result.append(f"{indent}{name}:")
            for target in value.value:
                result.append(f"{indent}  - {line[target.start_mark.column : target.end_mark.column].rstrip()}")
        else:
            result.append(f"{indent}{name}: {line[value.start_mark.column : value.end_mark.column].rstrip()}".rstrip())
    result[0] = dash + result[0][len(dash) :] + (f"   {comment}" if comment else "")
    return result
