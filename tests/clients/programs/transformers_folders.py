"""Runs in a client's environment: every folder of the list in transformers, as its card says, against the oracle."""

import json
import re
import sys
import warnings
from pathlib import Path

import torch
import transformers

warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()


def by_the_card(folder):
    """What the card's own lines of Python give."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S).group(1)
    names = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    return names


def loaded(folder, remote):
    """The model in float32 and what the loading report complains of."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    reward = "CausalLM" not in architecture
    kind = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    model, report = kind.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True, trust_remote_code=remote
    )
    return model.eval(), {name: sorted(map(str, keys)) for name, keys in report.items() if keys}, reward


def result_of(folder, given):
    remote = given.get("remote", False)
    card = by_the_card(folder)
    model, complaints, reward = loaded(folder, remote)
    found = {"complaints": complaints, "card_dtype": str(next(card["model"].parameters()).dtype)}
    if given.get("oracle"):
        asked = torch.load(given["oracle"], weights_only=True)
        with torch.no_grad():
            ids = asked["input_ids"]
            logits = model.score(model.model(ids).last_hidden_state) if reward else model(ids).logits
        found["difference"] = float((logits - asked["logits"]).abs().max())
    if given.get("save"):
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(model.config.vocab_size, (2, 40), generator=generator)
        with torch.no_grad():
            torch.save({"input_ids": ids, "logits": model(ids).logits}, given["save"])
    for end in given.get("ends", []) if not reward else []:
        # no other token can come: generation stops behind it
        ids = torch.tensor([[1]])
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
            prefix_allowed_tokens_fn=lambda *_, end=end: [end],
        )  # fmt: skip
        found.setdefault("stops", []).append(answer.shape[1] - 1)
    if given.get("texts"):
        tokenizer = card["tokenizer"]
        told = json.loads(Path(given["texts"]).read_text())
        found["ids"] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in told["texts"]]
        prompt = tokenizer.apply_chat_template(told["chat"], add_generation_prompt=True, tokenize=False)
        found["chat"] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        found["plain"] = tokenizer.decode(given["ends"], skip_special_tokens=True)
    return found


def main():
    asked = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, given in asked["models"].items():
        try:
            results[name] = result_of(Path(given["folder"]), given)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
    Path(sys.argv[2]).write_text(json.dumps({"version": transformers.__version__, "results": results}))


main()
