"""The Python functions: typed, with examples, forgiving about spelling, and clear about wrong types."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine import api
from tests.support.terminal import ROOT

STEP = ROOT / "tests" / "fixtures" / "internevo" / "v1_tp2_pp2"
SHOWN = ("plan", "convert", "reverse", "reshard", "inspect", "verify", "compare", "diff", "new_mapping")


@pytest.mark.parametrize("name", SHOWN)
def test_a_function_is_typed_and_has_an_example(name: str) -> None:
    function = getattr(engine, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(one.annotation is not inspect.Parameter.empty for one in signature.parameters.values())
    assert ">>>" in (function.__doc__ or "") and "Raises:" in function.__doc__


def test_every_public_name_is_known_to_type_checkers() -> None:
    """They read `from engine.api import *`, and what is imported beside it in a stub."""
    folder = Path(engine.__file__).parent
    top, stub = (
        [node for node in ast.walk(ast.parse((folder / name).read_text())) if isinstance(node, ast.ImportFrom)]
        for name in ("__init__.py", "api/__init__.pyi")
    )
    assert ["*"] in [[alias.name for alias in node.names] for node in top if node.module == "engine.api"]
    told = {alias.asname: (node.module, alias.name) for node in stub for alias in node.names}
    assert told == {name: (module, name) for name, module in api._MODULES.items()}
    assert set(engine.__all__) - {"__version__"} <= set(api.__all__)
    assert all(getattr(api, name).__name__ for name in api.__all__)


def test_a_plan_is_one_line_and_a_table_in_a_notebook() -> None:
    plan = engine.plan("internlm", STEP)
    assert len(repr(plan)) < 200 and "internlm 1.0.0" in repr(plan) and "55 tensors" in repr(plan)
    shown = plan._repr_html_()  # type: ignore[attr-defined]
    assert "<table>" in shown and "model.layers.{0…3}.self_attn.q_proj.weight" in shown and "<script" not in shown


def test_reports_show_themselves_in_notebooks(tmp_path: Path) -> None:
    done = engine.convert("internlm", STEP, tmp_path / "hf")
    for one in (done, engine.verify(tmp_path / "hf"), engine.compare(tmp_path / "hf", tmp_path / "hf"),
                engine.inspect(STEP), engine.inspect(tmp_path / "hf")):  # fmt: skip
        assert "<table>" in one._repr_html_()  # type: ignore[attr-defined]


def test_names_in_a_notebook_cannot_be_markup(tmp_path: Path) -> None:
    from engine.show.notebook import as_html

    assert "<img" not in as_html("<img src=x>", {"a": "<img>", "b": [{"<img>": "<img>"}]})


GIVEN = [("bf16", "bfloat16"), (torch.bfloat16, "bfloat16"), ("torch.float16", "float16"), ("fp32", "float32")]


@pytest.mark.parametrize(("given", "meant"), GIVEN)
def test_element_types_are_taken_as_people_and_torch_write_them(given: Any, meant: str) -> None:
    assert engine.plan("internlm", STEP, dtype=given).dtype == meant


def test_sizes_are_taken_as_text(tmp_path: Path) -> None:
    plan = engine.plan("internlm", STEP, max_shard_size="200kB")
    assert plan.max_shard_size == 200_000 and len(plan.shards) > 1
    engine.convert("internlm", STEP, tmp_path / "hf", max_memory="1GB")


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "a mapping": (lambda: engine.plan(3, STEP), "a name, a path, or a loaded mapping"),  # type: ignore[arg-type]
    "a checkpoint": (lambda: engine.plan("internlm", 3), "a path or a URL"),  # type: ignore[arg-type]
    "settings": (lambda: engine.plan("internlm", STEP, settings="a=b"), "a dict, like"),  # type: ignore[arg-type]
    "an option too large to be shown": (
        lambda: engine.plan("internlm", STEP, settings={"max_position_embeddings": 10**5000}), "of 16610 bits"),
    "ranks too many to be shown": (lambda: engine.plan_reshard("internlm", STEP, pp=10**5000), "of 16610 bits"),
    "a tensor": (lambda: engine.explain(3, "internlm", STEP), "text"),  # type: ignore[arg-type]
    "a name": (lambda: engine.new_mapping(STEP, name=3), "text"),  # type: ignore[arg-type]
    "files": (lambda: engine.lint({"a": 1}), "text or a path"),  # type: ignore[arg-type]
    "mappings": (lambda: engine.prove(3.5), "names, paths or loaded mappings"),  # type: ignore[arg-type]
    "a plan": (lambda: engine.virtual("internlm"), "as `engine.plan` gives it"),  # type: ignore[arg-type]
    "a plan of tensors": (lambda: list(engine.iter_tensors(STEP)), "as `engine.plan` gives it"),  # type: ignore[arg-type]
    "a sample": (lambda: engine.verify(STEP, src=STEP, mapping="internlm", sample=5), "text"),  # type: ignore[arg-type]
    "a dtype": (lambda: engine.plan("internlm", STEP, dtype=torch.int8), "bfloat16"),  # type: ignore[arg-type]
    "a flag": (lambda: engine.convert("internlm", STEP, "x", overwrite="yes"), "True or False"),  # type: ignore[arg-type]
    "ranks": (lambda: engine.reverse("internlm", STEP, "x", tp="2"), "a number"),  # type: ignore[arg-type]
    "a folder": (lambda: engine.inspect(3), "a path or a URL"),  # type: ignore[arg-type]
    "an output": (lambda: engine.verify(None), "a path or a URL"),  # type: ignore[arg-type]
    "a listener": (lambda: engine.convert("internlm", STEP, "x", progress=3), "a function"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("call", WRONG)
def test_a_value_of_a_wrong_type_says_what_was_got_and_what_is_taken(call: str) -> None:
    function, expected = WRONG[call]
    with pytest.raises(engine.EngineError) as caught:
        function()
    assert caught.value.code == "E001" and expected in str(caught.value)


def test_the_only_mapping_that_fits_is_found_and_several_are_listed() -> None:
    assert engine.find_mapping(STEP).name == "internlm"
    with pytest.raises(engine.EngineError) as caught:
        engine.find_mapping(STEP.with_name("v2_tp2_pp2"))
    assert caught.value.code == "E003" and "internlm2-official: target internlm2, remote code" in str(caught.value)


def test_what_is_not_one_step_is_said_where_no_mapping_names_a_layout(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "1000").symlink_to(STEP)
    engine.convert("internlm", STEP, tmp_path / "hf")
    for finished in ("run/2000-hf", "outputs/3000"):  # which `run` does not read, beside a step or alone
        (tmp_path / finished).parent.mkdir(exist_ok=True)
        (tmp_path / finished).symlink_to(tmp_path / "hf")
    (tmp_path / "run" / "3000").mkdir()  # the newest, which is not whole
    for name in ("model_config.pt", "model_tp0_pp0.pt", "model_tp1_pp1.pt"):
        (tmp_path / "run" / "3000" / name).symlink_to(STEP / name)
    for folder, told, fix in (("run", "none itself", "run/1000"), ("hf", "is a Hugging Face checkpoint", "reverse"),
                              ("outputs", "holds Hugging Face checkpoints", "reverse")):  # fmt: skip
        with pytest.raises(engine.EngineError, match=told) as caught:
            engine.find_mapping(tmp_path / folder)
        assert caught.value.code == "E304" and "internevo" not in str(caught.value)
        assert fix in str(caught.value.fix) and "000-hf" not in str(caught.value)


def test_a_misspelt_dtype_is_answered_with_the_likely_one() -> None:
    with pytest.raises(engine.EngineError) as caught:
        engine.plan("internlm", STEP, dtype="bf17")
    assert str(caught.value.fix).endswith("did you mean `bf16`?")


def test_the_layout_that_knows_a_folders_files_says_what_is_wrong_with_them(tmp_path: Path) -> None:
    for name in ("model_world_size_1_rank_0.pt", "__0_0.distcp"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(engine.EngineError, match="two parallel modes"):
        engine.inspect(tmp_path)


def test_one_name_stands_for_a_list_of_one() -> None:
    assert api.lint("internlm") == [] == api.lint(["internlm"])


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("obstore", "store", lambda out: engine.plan("internlm", "s3://bucket/step")),
        ("distributed", "dask", lambda out: engine.convert("internlm", STEP, out, executor="dask")),
    ],
)
def test_an_extra_that_is_not_installed_is_named(
    module: str, extra: str, call: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(engine.EngineError, match=rf"E001(.|\n)*no module {module}(.|\n)*internlm-engine\[{extra}\]"):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()
