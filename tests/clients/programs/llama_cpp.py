"""Runs in a client's environment: folders converted to GGUF and served by llama.cpp; ids, logits, where chats stop."""

import json
import subprocess
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path

import torch
import xllamacpp


class Served:
    """A model behind llama.cpp's own server, on a port of this machine that the system chooses."""

    def __init__(self, file):
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_gpu_layers, params.warmup, params.n_parallel = 256, 0, False, 1
        params.hostnames, params.port, params.verbosity = ["127.0.0.1"], 0, 0
        params.cache_prompt = False
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)

    def ask(self, path, question):
        data = json.dumps(question).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.server.listening_address + path, data, headers)) as r:
            return json.loads(r.read())

    def ids(self, text, special=False):
        """Of plain text; or, with what begins a text and names of tokens in it, of a prompt."""
        question = {"content": text, "add_special": special, "parse_special": special}
        return self.ask("/tokenize", question)["tokens"]

    def complete(self, prompt, **more):
        return self.ask("/completion", {"prompt": prompt, "temperature": 0, "return_tokens": True, **more})


def logits_apart(served, asked):
    """How far llama.cpp's logarithms of probabilities are from the oracle's, over the prefixes of a text."""
    worst = 0.0
    row, wanted = asked["input_ids"][0].tolist(), asked["logits"][0].float().log_softmax(-1)
    for length in range(1, len(row) + 1):
        answer = served.complete(row[:length], n_predict=1, n_probs=wanted.shape[-1], post_sampling_probs=False)
        for one in answer["completion_probabilities"][0]["top_logprobs"]:
            worst = max(worst, abs(one["logprob"] - float(wanted[length - 1, one["id"]])))
    return worst


def result_of(given, converter, file):
    folder = Path(given["folder"])
    command = [sys.executable, str(converter), str(folder), "--outfile", str(file), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-800:]}
    served = Served(file)
    found = {}
    if given.get("oracle"):
        found["difference"] = logits_apart(served, torch.load(given["oracle"], weights_only=True))
    if given.get("texts"):
        told = json.loads(Path(given["texts"]).read_text())
        found["ids"] = [served.ids(text) for text in told["texts"]]
        if told.get("chat"):
            prompt = served.ask("/apply-template", {"messages": told["chat"]})["prompt"]
            found["chat"] = served.ids(prompt, True)
    for end in given.get("ends", []):
        # nothing else can come: it stops there, and says nothing of it, or it goes on
        answer = served.complete([1], n_predict=6, logit_bias=[[end, 1e4]])
        found.setdefault("stops", []).append([answer["stop_type"], answer["tokens_predicted"], answer["content"]])
    return found


def main():
    asked = json.loads(Path(sys.argv[1]).read_text())
    converter = Path(asked["converter"])
    results = {}
    for name, given in asked["models"].items():
        try:
            results[name] = result_of(given, converter, Path(asked["scratch"]) / f"{name}.gguf")
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
    Path(sys.argv[2]).write_text(json.dumps({"version": version("xllamacpp"), "results": results}))


main()
