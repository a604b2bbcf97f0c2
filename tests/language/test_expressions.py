import time
from contextlib import nullcontext
from typing import Any

import pytest

from engine.errors import EngineError, Place
from engine.language.expressions import OMIT, compile_expression, evaluate, names_in, render_tree, whole_number
from engine.language.model import Expression

PLACE = Place("x.yaml", 3, 9)


def value(text: str, **names: Any) -> Any:
    return evaluate(Expression(text, PLACE), names)


def refused(text: str, **names: Any) -> EngineError:
    with pytest.raises(EngineError) as caught:
        value(text, **names)
    assert caught.value.code == "E105" and caught.value.place == PLACE
    return caught.value


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        (
            "((hidden * mlp_ratio) | int + multiple - 1) // multiple * multiple",
            {"hidden": 4096, "mlp_ratio": 8 / 3, "multiple": 256},
            11008,
        ),
        ("num_kv | default(heads)", {"heads": 32}, 32),
        ("adapt_hf | default(true)", {"adapt_hf": False}, False),
        ("bias | int", {"bias": True}, 1),
        ("2.0 ** 100", {}, 2.0**100),
        ("sizes[-3] | default(7)", {"sizes": [1, 2]}, 7),
        ("qk_interleaved | default(not (adapt_hf | default(true)))", {}, False),
        ("norm_head | default(false) and qk_interleaved is not defined", {"norm_head": True}, True),
        ("training.parallel.pipeline.mode | default('1F1B')", {"training": {}}, "1F1B"),
        (
            "training.parallel.pipeline.mode | default('1F1B')",
            {"training": {"parallel": {"pipeline": {"mode": "ZBV"}}}},
            "ZBV",
        ),
        ("training.parallel.pipeline.mode is defined", {"training": {"parallel": None}}, False),
        ("[tps, wps] | max", {"tps": 2, "wps": 4}, 4),
        (
            "(name | length, rows | length, facts | length) | max",
            {"name": "ab", "rows": [1, 2, 3], "facts": {"a": 1}},
            3,
        ),
        ("facts | length + 1", {"facts": {"a": 1}}, 2),
        ("max(tps, wps) + min([1, 2])", {"tps": 2, "wps": 4}, 5),
        (
            "chunk * pps + (pps - 1 - pp if schedule == 'zbv' and chunk % 2 == 1 else pp)",
            {"chunk": 1, "pps": 4, "pp": 1, "schedule": "zbv"},
            6,
        ),
        ("['A' if is_reward | default(false) else 'B']", {}, ["B"]),
        ("true if 'B' in architectures else omit", {"architectures": ["A"]}, OMIT),
        ("gcd(intermediate_size, 256)", {"intermediate_size": 96}, 32),
        ("9007199254740993 * 3", {}, 27021597764222979),
        ("'12'", {}, "12"),
        ("x['a b'][0] + x.c", {"x": {"a b": [1], "c": 2}}, 3),
        ("2.4 | round + (7 | float) / 2 + (x | abs)", {"x": -1}, 6.5),
        ("'v' + (n | string)", {"n": 3}, "v3"),
        ("items", {"items": [1, 2]}, [1, 2]),
        ("(['near'] * (every - 1) + ['far']) * (layers // every)", {"every": 2, "layers": 4}, ["near", "far"] * 2),
        ("['near'] * -1", {}, []),
    ],
)
def test_expressions_give_plain_values(text: str, names: dict[str, Any], expected: object) -> None:
    result = value(text, **names)
    assert result == expected and type(result) is type(expected)


def test_present_is_asked_with_the_pattern() -> None:
    asked: list[str] = []
    assert value("present('a.{layer}')", present=lambda p: asked.append(p) or True) is True
    assert asked == ["a.{layer}"]
    assert "tensors" in str(refused("present('a')"))


@pytest.mark.parametrize(
    "text", ["hiden // 2", "[hiden]", "{'a': hiden}", "hiden == 1", "hiden", "hiden | int", "-hiden"]
)
def test_an_undefined_name_is_named_with_the_near_ones(text: str) -> None:
    error = refused(text, hidden=4096)
    assert "`hiden`" in error.message and "hidden" in str(error.expected)


def test_an_undefined_path_is_named_whole() -> None:
    error = refused("training.parallel.pipeline.mode == 'x'", training={"parallel": {}})
    assert "`training.parallel.pipeline.mode`" in error.message


@pytest.mark.parametrize(
    "text",
    [
        "''.__class__",
        "().__class__.__base__.__subclasses__()",
        "x.__class__",
        "x.append(1)",
        "[].append(1)",
        "x|attr('__class__')",
        "x|map('a')",
        "range(9)",
        "lipsum()",
        "cycler",
        "namespace(a=1)",
        "self",
        "super()",
        "self.__init__",
        "present.__globals__",
        "max.__globals__",
        "gcd.__class__",
        "omit.__class__",
        "x[y]",
        "x[0:1]",
        "a ~ b",
        "a = 1",
        "{% if x %}",
        "1 }} {{ 2",
        "x if y",
        "max",
        "default(1)",
        "x | default",
        "dict(a=1)",
        "present(x)",
        "present('a', 'b')",
        "gcd(*x)",
        "x is callable",
        "x|tojson",
        "joiner()",
        "__import__('os')",
    ],
)
def test_what_is_not_in_the_language_is_refused(text: str) -> None:
    refused(text, x=[1], y=0, a=1, b=2, present=lambda p: True)


@pytest.mark.parametrize(
    "text",
    [
        "'a' * 1000000000",
        "1000000000 * 'a'",
        "[0] * 1000000000",
        "2 ** 1000000000",
        "2 ** (10 ** 9)",
        "[1] * 4097",
        "[[1] * 4096] * 4096",
        "'%1000000000d' % 5",
        "'%1000000000d' is odd",
        "'%1000000000d' is even",
        "'%1000000000d' is divisibleby(5)",
        "((2 ** 4000) ** 4000)",
        "x * 1000000000",
        "2 ** 3000 * 2 ** 3000",
        "9" * 1900,
        "(" * 900 + "1" + ")" * 900,
        "1+" * 990 + "1",
        "not " * 490 + "1",
        "-" * 1900 + "1",
        "[" * 900 + "]" * 900,
        "1 if a else " * 160 + "1",
        "a" * 2001,
        "a." * 900 + "b",
        "(10.0 ** 300) ** 300",
    ],
)
def test_work_and_depth_are_bounded(text: str) -> None:
    start = time.process_time()
    refused(text, x="abc", a=0)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "text",
    [
        "1 // 0",
        "'a' + 1",
        "true + 1",
        "[1] * true",
        "3 * [1]",
        "-x",
        "'a' | int",
        "(-8) ** 0.5",
        "1 < 'a'",
        "1 | length",
        "gcd(4, 0.5)",
    ],
)
def test_a_wrong_type_or_value_is_an_error_at_its_place(text: str) -> None:
    assert text in str(refused(text, x="a").got)


def test_only_data_leaves_an_expression() -> None:
    refused("x", x=object())
    refused("[x]", x=print)


def test_a_mapping_is_read_by_its_keys_never_by_its_methods() -> None:
    assert value("x.items | default(3)", x={}) == 3
    assert value("x.items", x={"items": 5}) == 5


def test_names_and_patterns_are_known_without_evaluating() -> None:
    compiled = compile_expression(
        Expression("options.a + (b | default(1)) + gcd(c, 2) if present('n') else omit", PLACE)
    )
    assert compiled.names == {"options", "b", "c"}
    assert compiled.paths == {"options.a", "b", "c"}
    assert compiled.patterns == ("n",)
    assert names_in(Expression("b + 1", PLACE)) == {"b"}


def test_a_tree_keeps_literals_and_drops_what_is_omitted() -> None:
    def e(text: str) -> Expression:
        return Expression(text, PLACE)

    tree = {"a": e("n"), "b": e("omit"), "c": "{layer}", "d": [e("omit"), e("n + 1"), None], "e": {"f": e("'{{'")}}
    assert render_tree(tree, {"n": 1}) == {"a": 1, "c": "{layer}", "d": [2, None], "e": {"f": "{{"}}


@pytest.mark.parametrize("text", ["1e400", "-1e400", "[1e400]"])
def test_numbers_beyond_any_float_are_refused_not_crashed_on(text: str) -> None:
    with pytest.raises(EngineError) as caught:
        value = evaluate(Expression(text, Place("x.yaml")), {})
        raise AssertionError(value)
    assert caught.value.code == "E105"


@pytest.mark.parametrize(("text", "held"), [("0", True), ("1", True), ("2", False), ("-1", False), ("n == 1", False)])
def test_a_number_of_a_rank_is_a_whole_one_from_0_to_the_last(text: str, held: bool) -> None:
    with nullcontext() if held else pytest.raises(EngineError, match="`stage` is not a whole number from 0 to 1"):
        assert str(whole_number(Expression(text, PLACE), {"n": 1}, "stage", 2)) == text
