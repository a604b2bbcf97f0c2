"""Runs in a client's environment: what the configuration and registries of a serving program make of folders.

vLLM and LMDeploy need an accelerator to run a model; this asks the Python code that chooses how to.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path


def by_vllm(folder):
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import get_config

    config = get_config(folder, trust_remote_code=False)
    known = ModelRegistry.get_supported_archs()
    return {"architectures": config.architectures, "taken": [one in known for one in config.architectures]}


def by_lmdeploy(folder):
    from lmdeploy.archs import get_model_arch
    from lmdeploy.pytorch.models.module_map import MODULE_MAP
    from lmdeploy.turbomind.supported_models import is_supported

    architecture, _ = get_model_arch(folder)
    return {"architectures": [architecture], "taken": [bool(is_supported(folder)), architecture in MODULE_MAP]}


def main():
    asked = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, given in asked["models"].items():
        try:
            results[name] = {"vllm": by_vllm, "lmdeploy": by_lmdeploy}[asked["registry"]](given["folder"])
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
    Path(sys.argv[2]).write_text(json.dumps({"version": version(asked["registry"]), "results": results}))


main()
