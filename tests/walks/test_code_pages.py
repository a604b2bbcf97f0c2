# ruff: noqa: E501 (an edit stands in one line)
"""The examples of the pages of codes that are about mapping files are what the engine says now.

`python -m tests.walks.test_code_pages` writes them anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.depth import sampled
from tests.support.mistakes import FILE, ROOT, Mistake, told

PAGES = ROOT / "docs" / "codes"
HEAD = "    split: vocab\n    stage: last\n    when: {head: plain}"
CHILD = "mapping: 1\nname: my-model\nversion: 1.0.0\ndescription: a model of mine\nextends: families/internlm2.yaml\n"
EXAMPLES = {
    "E101": Mistake("A colon in a text without quotes.", "description: InternLM2 and 2.5 as trained by InternEvo, to the",
                    "description: InternLM2 to Llama: the"),
    "E102": Mistake("A misspelt key of a rule.", "    split: groups\n    when: {rotary: halves}",
                    "    spilt: groups\n    when: {rotary: halves}"),
    "E103": Mistake("A closing parenthesis is missing.", "axes: hidden | (groups queries head_dim)",
                    "axes: hidden | (groups queries head_dim"),
    "E104": Mistake("A closing brace is missing.", "layers.{layer}.attention.wo.{param}",
                    "layers.{layer.attention.wo.{param}"),
    "E105": Mistake("A call that is not part of the language.", "head_dim: hidden // heads", "head_dim: len(heads)"),
    "E106": Mistake("`remove` names a rule that the parent does not have.", "", CHILD + "remove: [qvk]\n"),
    "E107": Mistake("The source is cut into `groups` and `queries`, the target into `heads`.",
                    "    target: \"model.layers.{layer}.self_attn.o_proj.{param}\"\n    axes: hidden | (groups queries head_dim)",
                    "    targets:\n      - {name: \"model.layers.{layer}.self_attn.o_proj.{param}\", axes: hidden | (heads head_dim)}\n"
                    "    axes: hidden | (groups queries head_dim)", command=("plan", "-m", FILE, "-s", "step")),
    "E108": Mistake("A rule asks for a variant that does not exist.", "when: {rotary: pairs}", "when: {rotery: pairs}"),
    "L001": Mistake("A new rule for a tensor that the family already reads.", "",
                    CHILD + "rules:\n  - {name: norm_again, source: norm.weight, target: model.final_norm.weight, axes: hidden, stage: last}\n"),
    "L002": Mistake("The rule for rotary pairs is removed, while the variant keeps its choice `pairs`.", "",
                    CHILD + "remove: [qkv_pairs]\n"),
    "L003": Mistake("A dim that nothing reads.", "  half: 2", "  half: 2\n  window: 4096"),
    "L004": Mistake("The final norm is ignored, and a rule reads it.", "", CHILD + "ignore:\n  - {source: norm.weight, why: not needed}\n"),
    "L005": Mistake("The first target of `qkv` takes the keys instead of the queries.",
                    "self_attn.q_proj.{param}\", axes: (groups queries head_dim) | hidden",
                    "self_attn.q_proj.{param}\", axes: (groups k head_dim) | hidden"),
    "L007": Mistake("`vocab` is misspelt in one rule.", f"    axes: vocab hidden\n{HEAD}",
                    f"    axes: vcoab hidden\n{HEAD.replace('vocab', 'vcoab')}"),
    "L008": Mistake("`otherwise` comes first.",
                    "      pairs: qk_interleaved | default(not (adapt_hf | default(true)))\n      halves: otherwise",
                    "      halves: otherwise\n      pairs: qk_interleaved | default(not (adapt_hf | default(true)))"),
    "L009": Mistake("A misspelt key, hidden by its default.", "multiple_of | default(256)", "multiple_off | default(256)"),
    "L010": Mistake("A misspelt key of `config`.", "vocab_size: \"{{ vocab }}\"", "vocb_size: \"{{ vocab }}\""),
    "L011": Mistake("A misspelt class.", "architecture: LlamaForCausalLM", "architecture: LlamaForCausalLn"),
    "L012": Mistake("A misspelt tensor in an expression.", "present('tok_embeddings.weight')", "present('tok_embedings.weight')"),
    "L013": Mistake("A misspelt choice in an expression.", "labels if head == 'reward'", "labels if head == 'rewrad'"),
    "L014": Mistake("A value that `keys` excludes.", "  tie_word_embeddings: false", "  tie_word_embeddings: true"),
    "L015": Mistake("The tokens that begin and end a text are exchanged.", "bos: <s>, eos: </s>", "bos: </s>, eos: <s>"),
    "L016": Mistake("A default in quotes, which is a text.", "default: 32768", "default: \"32768\""),
    "L017": Mistake("The two places of theta have different defaults.", "  rope_theta: \"{{ rope_base | default(10000) }}\"\n  rope_scaling",
                    "  rope_theta: \"{{ rope_base | default(1000000) }}\"\n  rope_scaling"),
}  # fmt: skip
_SECTION = re.compile(r"(?<=^## Example\n\n).*?(?=^## )", re.MULTILINE | re.DOTALL)


def example(code: str, folder: Path) -> str:
    """The section of a page that shows what the engine says of a mistake."""
    mistake = EXAMPLES[code]
    _, text = told(mistake, folder)
    assert re.search(rf"^{code} ", text, re.MULTILINE), text
    shown = f"$ engine {' '.join(mistake.command)}\n{text}"
    return f"{mistake.title}\n\n{mistake.edit}\n\n```text\n{shown}\n```\n\n"


@sampled(2)
@pytest.mark.parametrize("code", EXAMPLES)
def test_the_example_of_a_page_is_what_the_engine_says(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _SECTION.search((PAGES / f"{code}.md").read_text())[0] == example(code, tmp_path)  # type: ignore[index]


def test_places_in_bundled_files_are_of_what_the_examples_of_pages_are_about() -> None:
    """Of all pages, also of those whose examples need a checkpoint: each edit of a family may move its lines."""
    for page in sorted(PAGES.glob("*.md")):
        for shown in re.findall(r"^```text\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for name, row, column in re.findall(r"(mappings/[\w/-]+\.yaml):(\d+):(\d+)", shown):
                lines, at = (ROOT / name).read_text().splitlines()[int(row) - 1 :], int(column) - 1
                words = set(re.findall(r"\w+", shown)) & set(re.findall(r"\w+", "\n".join(lines[:4])[at:]))
                assert re.fullmatch(r" *(- |\w+: )?", lines[0][:at]), (page.name, name, row)
                assert words - {"layer", "param", "name", "the", "model"}, (page.name, name, row)


if __name__ == "__main__":
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        for name in EXAMPLES:
            page = PAGES / f"{name}.md"
            page.write_text(_SECTION.sub(lambda _, n=name: example(n, Path(temporary)), page.read_text(), count=1))
