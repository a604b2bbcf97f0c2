"""`make clients`: programs of others on what the engine writes, each in an environment of its own.

    python -m tests.clients            all of them; writes docs/clients.md
    python -m tests.clients peft       those whose name has the word; writes their rows anew

TOKENIZERS names a folder with the releases' own tokenizer_internlm.model and tokenizer_internlm2.model, and
OFFICIAL_CODE one with the official configuration_internlm2.py and modeling_internlm2.py; what needs them is left out
without them.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from tests.clients import models
from tests.clients.clients import Client, asked, clients
from tests.clients.environments import CONVERTER, FOLDER, ROOT, converter, environment, run

PAGE = ROOT / "docs" / "clients.md"
ABOUT = """# Clients

These programs load the output of `engine run`, each in its own environment. The folders are converted from genuine
InternEvo checkpoints (`tests/fixtures/`) in float32. `make clients` runs the programs, fails when a figure is wrong,
and writes this table. Figures are largest absolute differences.

| client | version | what was run | figure |
|---|---|---|---|
"""
LIMITS = f"""
llama.cpp's folders are converted by `convert_hf_to_gguf.py` of the source archive of {CONVERTER.replace("==", " ")}.

## What does not hold

- transformers before 4.51 silently reads `rope_scaling: yarn` as a different model (before 4.43 it refuses), and
  before 4.41 it drops biases of the MLP with a warning. Each folder's model card names the versions that work;
  `schemas/releases.yaml` holds all that is known, also of other classes.
- mergekit 0.1.5 drops the biases of attention, which InternLM (the first) has and InternLM2 does not: they are missing
  in its own list of a Llama's tensors. Merge InternLM models with another program.
- CTranslate2 4.8.5 converts the scaled angles of Llama 3.1 (`llama3`) without a word, and computes plain ones: logits
  are off by 0.09 to 2.3. Linear ones are right, dynamic ones and yarn it refuses. llama.cpp computes them right.
- llama.cpp (xllamacpp 2026.10.11549) keeps the spaces that SentencePiece models with `remove_extra_whitespaces` remove,
  and fails on unknown characters of a model without byte fallback. InternLM's models are neither. Names such as
  `<|x|>` it finds in a text only where it is asked to (`parse_special`), and `▁` in a text not as a symbol.
  `<s>` in a text it always takes for the token that begins one, whatever the SentencePiece model.
- vLLM and LMDeploy need an accelerator to run a model. Only their Python code that reads a folder's configuration and
  chooses the model was run: vLLM's registry, LMDeploy's TurboMind and its PyTorch engine.
- SGLang 0.5.23 was only read: its Llama has no biases in the MLP, and skips those of a folder without a word. Of the
  models here only InternEvo's with `mlp_bias` have any.
- exllamav2 was only read, too: of `rope_scaling` it knows `linear`, `yarn` and `llama3`, and takes `dynamic` for plain
  angles without a word, which are the same up to the trained length. mlx-lm computes all of them in models without
  experts.
- transformers before 4.47 gives no assistant masks: it reads the template in `tokenizer_config.json`, which has no
  `generation` tags, since a program that does not know them refuses the whole template. It warns.
- Newer copies of InternLM2's official code, as InternLM2.5 has, load in transformers 4.49 to 4.51 with the right
  logits, but their `generate()` fails there: `get_max_length` of the cache is gone. The first copies generate up to
  4.51.

These were read in the programs' sources and not run. The programs say nothing of them, and no key of `config.json`
helps:

- Whether weights of chosen experts are made to sum to one (`norm_topk_prob`) llama.cpp does not read: it does so in
  mixtures of Qwen3 and not in those of Qwen2, which InternEvo trains with it. mlx-lm 0.32.2 and TensorRT-LLM do not do
  it in those of Qwen2 either, and exllamav2 always does. exllamav3 refuses mixtures of Qwen3 without it. transformers,
  vLLM, SGLang and LMDeploy read the key.
- Scaled angles are plain ones in mlx-lm's mixtures of Mixtral, Qwen2 and Qwen3 and in SGLang's Mixtral, and linear ones
  are in text-generation-inference. SGLang computes `dynamic` ones as for the longest text, also for short texts.
  CTranslate2 takes a base of 10000 with scaled angles where transformers 4 is installed; with transformers 5 it does
  not.
- TensorRT-LLM's converter of Llama has no biases in the MLP, and SGLang none at all under InternLM2's official names.
"""


def main() -> None:
    words = sys.argv[1:]
    tokenizers, code = _folder("TOKENIZERS"), _folder("OFFICIAL_CODE")
    scratch = FOLDER / "models"
    shutil.rmtree(scratch, ignore_errors=True)
    folders = [*models.genuine(scratch), *models.scaled(scratch), models.with_mlp_biases(scratch)]
    folders += models.chats(scratch, tokenizers)
    if code is not None:
        folders += models.official(scratch, code)
    models.write_texts(scratch / "texts.json")
    chosen = [one for one in clients(code is not None) if not words or any(word in one.name for word in words)]
    if not any(one.name == "transformers" for one in chosen):
        folders = [folder for folder in folders if not folder.unproved]
    rows, failed = _rows(), []
    for client in chosen:
        start = time.monotonic()
        try:
            found = figures(client, [folder for folder in folders if client.folders(folder)], scratch)
        except (AssertionError, SystemExit) as error:
            failed.append(client)
            print(f"{client.name} {client.version}: WRONG: {error}", flush=True)
            continue
        rows[client.name, client.version] = [
            f"| {client.name} | {client.version} | {what} | {figure} |" for what, figure in found
        ]
        print(f"{client.name} {client.version}: {time.monotonic() - start:.0f} s", flush=True)
        for what, figure in found:
            print(f"  {what}: {figure}", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(chosen)} clients got something wrong")
    # official classes and tokenizers are not there for everyone: what was run with them stays
    kept = [row for one in clients(official=True) for row in rows.get((one.name, one.version), [])]
    PAGE.write_text(ABOUT + "\n".join(kept) + "\n" + LIMITS)


def _rows() -> dict[tuple[str, str], list[str]]:
    """The rows of the page as it is, by client and version."""
    rows: dict[tuple[str, str], list[str]] = {}
    for line in PAGE.read_text().splitlines() if PAGE.is_file() else []:
        if line.startswith("| ") and line.count(" | ") == 3:
            name, version = line[2:].split(" | ")[:2]
            rows.setdefault((name, version), []).append(line)
    rows.pop(("client", "version"), None)
    return rows


def _folder(variable: str) -> Path | None:
    return Path(os.environ[variable]) if os.environ.get(variable) else None


def figures(client: Client, folders: list[models.Folder], scratch: Path) -> list[tuple[str, str]]:
    """What was run and what came of it."""
    question = asked(client, folders, scratch / "texts.json", scratch)
    if client.program == "llama_cpp":
        question["converter"] = str(converter())
    told = run(environment(client.environment, client.requirements, bare=client.bare), client.program, question)
    assert told["version"].startswith(client.version), told["version"]
    return client.judge(folders, told["results"])


if __name__ == "__main__":
    main()
