"""Loads an output as its users will: with transformers, without remote code, and one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.hf_folder import read_hf_config, read_hf_folder
from engine.errors import EngineError
from engine.planning.as_model import beyond_building, class_named
from engine.storage.local import LocalStore

if TYPE_CHECKING:
    import torch

BATCH, LENGTH = 2, 12
_REWARD = "ForSequenceClassification"


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of loading an output with transformers.

    Attributes:
        architecture: the class that was loaded; None when transformers has none.
        largest: the largest absolute output of the forward pass.
    """

    architecture: str | None
    parameters: int
    largest: float | None
    problems: tuple[str, ...]

    def summary(self) -> str:
        """One line about what was run."""
        if self.problems or self.architecture is None:
            return "transformers does not run it as it is"
        return f"transformers loads {self.architecture}, {self.parameters:,} parameters; its outputs are finite"


def load_model(folder: Path) -> Loaded:
    """Load an output whole, in its own types, and run fixed tokens through it.

    Every key of the model must be in the files, in the model's shape, and no other; every output
    must be a finite number.
    """
    import torch

    unknown = not_built_in(folder)
    if unknown is not None:
        return Loaded(None, 0, None, (unknown,))
    with quiet(), plainly():
        try:
            model, report = auto_class(folder).from_pretrained(
                str(folder),
                dtype="auto",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=any(file.name.endswith(".safetensors") for file in read_hf_folder(LocalStore(folder))),
                output_loading_info=True,
            )
        except EngineError:
            raise
        except Exception as error:  # a configuration may make transformers raise anything
            return Loaded(None, 0, None, (f"transformers cannot load it: {one_line(error)}",))
        problems = [
            f"{str(name)[:200]} {what}"
            for key, what in (
                ("missing_keys", "is missing, and transformers would fill it with random weights"),
                ("unexpected_keys", "is not part of the model"),
                ("mismatched_keys", "has another shape than the model's"),
            )
            for name in sorted(report.get(key) or (), key=str)
        ]
        model.eval()
        ids = fixed_tokens(model.config.vocab_size)
        try:
            outputs = run_model(model, ids)
        except Exception as error:  # a configuration may load and still make any of its layers raise
            return Loaded(type(model).__name__, 0, None, (*problems, f"the model does not run: {one_line(error)}"))
    largest = float(outputs.abs().max())
    if not bool(torch.isfinite(outputs).all()):
        problems.append(f"the forward pass gives {int((~torch.isfinite(outputs)).sum())} outputs that are not finite")
    count = sum(parameter.numel() for parameter in model.parameters())
    finite = largest if largest < float("inf") else None
    return Loaded(type(model).__name__, count, finite, tuple(problems))


def run_model(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of every position; for a reward model, the rewards of every position."""
    if hasattr(model, "score"):
        result: torch.Tensor = model.score(model.base_model(ids, use_cache=False).last_hidden_state)
    else:
        result = model(ids, use_cache=False).logits
    return result.float()


def auto_class(folder: Path) -> Any:
    """The class that loads what `architectures` of the config names."""
    import transformers

    named = class_named(read_hf_config(LocalStore(folder)))
    kind = "AutoModelForSequenceClassification" if named.endswith(_REWARD) else "AutoModelForCausalLM"
    return getattr(transformers, kind)


def not_built_in(folder: Path) -> str | None:
    """Why transformers cannot run it without remote code, else None: `internlm` and `internlm2` are such types."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = read_hf_config(LocalStore(folder))
    beyond = beyond_building(config)
    if beyond is not None:
        return f"{beyond}: no such model can be built"
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return "there is no config.json that names a model_type, so transformers cannot load it"
    if kind in CONFIG_MAPPING:
        return None
    return (
        f"transformers has no model of type `{kind}` built in: it runs with remote code only, which is not run here. "
        "Convert with a mapping whose target is `llama` or `internlm3` to have the model itself verified"
    )


def fixed_tokens(vocab: int) -> torch.Tensor:
    """The same token ids each time, spread over the vocabulary."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab, (BATCH, LENGTH), generator=generator)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def plainly() -> Iterator[None]:
    """Compute on the CPU, in the types of the tensors, whatever defaults of torch the caller has set."""
    import torch

    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Run transformers without progress bars and warnings; relevant warnings are reported as problems."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
