"""Runs in a client's environment: LoRA on every linear by peft, trained a step, merged, saved and loaded again."""

import json
import sys
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM


def result_of(given, out):
    asked = torch.load(given["oracle"], weights_only=True)
    ids = asked["input_ids"]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(given["folder"], torch_dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    with torch.no_grad():
        untrained = model(ids).logits
    linears = sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters())
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):  # the first step moves B alone, which starts at zero
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        trained = model(ids).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(out)
    again, report = AutoModelForCausalLM.from_pretrained(out, torch_dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        logits = again(ids).logits
    return {
        "difference": float((untrained - asked["logits"]).abs().max()),
        "merged": float((logits - trained).abs().max()),
        "moved": float((trained - untrained).abs().max()),
        "linears": linears,
        "layers": base.config.num_hidden_layers,
        "complaints": {name: sorted(map(str, keys)) for name, keys in report.items() if keys},
    }


def main():
    asked = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, given in asked["models"].items():
        try:
            results[name] = result_of(given, Path(asked["scratch"]) / f"{name}.peft")
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
    Path(sys.argv[2]).write_text(json.dumps({"version": peft.__version__, "results": results}))


main()
