"""A transformers model whose weights are read when a layer needs them, and then dropped.

The model is built without weights; hooks load each module's own tensors for its forward pass, so
that a model of any size runs in the memory of its largest tensor, with the very code that users
run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from engine.checkpoint.hf_folder import read_hf_folder
from engine.formats.headers import TensorHeader
from engine.oracle.float_tensors import FloatTensors
from engine.oracle.load_model import auto_class
from engine.storage.local import LocalStore


class StreamedModel(FloatTensors):
    """A decoder of transformers in float32, streamed from its files.

    Attributes:
        model: the model; its modules may be hooked.
        problems: why it cannot be run; if there are any, it is not run.
    """

    def __init__(self, folder: Path) -> None:
        headers = read_hf_folder(LocalStore(folder))
        super().__init__(headers)
        self._found = {tensor.name: (i, tensor) for i, file in enumerate(headers) for tensor in file.tensors}
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            self.model = auto_class(folder).from_config(config, dtype=torch.float32, attn_implementation="eager")
        self.model.eval()
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if "Rotary" in type(child).__name__:  # has no weights, but computes buffers when it is made
                    setattr(parent, name, type(child)(config=self.model.config))
        self.problems = (*self._compute_buffers(), *self._stream())
        self.dtypes = frozenset(header.dtype for _, header in self._found.values())

    def _compute_buffers(self) -> Iterator[str]:
        """Let the model compute what its modules hold besides weights, such as a scale; yields what it does not."""
        for name, module in self.model.named_modules():
            held = {key: one for key, one in module.named_buffers(recurse=False) if one.is_meta}
            for key, one in held.items():
                if one.is_floating_point() and key in module._non_persistent_buffers_set:
                    setattr(module, key, torch.full_like(one, math.nan, device="cpu"))
            if held:
                self.model._init_weights(module)
            unknown = [key for key in held if getattr(module, key).is_meta or getattr(module, key).isnan().any()]
            yield from (f"{name}.{key} is on no device" for key in unknown)

    def _stream(self) -> list[str]:
        """Hook every module that has its own parameters; reports tensors that are missing or have a wrong shape."""
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if self.model.config.tie_word_embeddings else {}
        problems = []
        for path, module in self.model.named_modules():
            own = {name: f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
            stored: dict[str, tuple[int, TensorHeader]] = {}
            for name, full in own.items():
                found = self._found.get(full) or self._found.get(tied.get(full, ""))
                shape = tuple(module.get_parameter(name).shape)
                if found is None:
                    problems.append(f"{full} is missing")
                elif found[1].shape != shape:
                    problems.append(f"{full} is {list(found[1].shape)}, the config makes it {list(shape)}")
                else:
                    stored[name] = found
            if stored:
                self._hook(module, stored, torch.nn.Parameter)
        return problems

    def _hook(self, module: Any, stored: dict[str, tuple[int, TensorHeader]], parameter: Any) -> None:
        empty = {name: module.get_parameter(name) for name in stored}

        def load(module: Any, _: Any) -> None:
            for name, place in stored.items():
                module._parameters[name] = parameter(self.read(*place), requires_grad=False)

        def drop(module: Any, *_: Any) -> None:
            module._parameters.update(empty)

        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop)

    def rows(self, module: Any, low: int, high: int) -> Any:
        """Rows low..high of a module's weight; None for a module without one."""
        name = next((path for path, one in self.model.named_modules() if one is module), None)
        found = self._found.get(f"{name}.weight")
        return None if found is None else self.read(*found, low, high)

    def parts(self) -> Sequence[Any] | None:
        """Embedding, layers, last norm and head, if it is built as Llama is; else None."""
        base = self.model.base_model
        head = getattr(self.model, "lm_head", None) or getattr(self.model, "score", None)
        found = [getattr(base, name, None) for name in ("embed_tokens", "layers", "norm")]
        return None if head is None or any(one is None for one in found) else [*found, head]
