"""The public functions that read a checkpoint as what a run would make of it, without the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from engine.api.plans import plan
from engine.api.runs import small_files
from engine.language.model import Mapping as MappingFile
from engine.planning.request import WholeOptions

if TYPE_CHECKING:
    from engine.planning.model import Plan
    from engine.serve.tensors import Tensors
    from engine.serve.virtual import VirtualFolder

__all__ = ["open", "virtual"]


def open(
    src: str | Path | Plan = ".", mapping: str | Path | MappingFile = "", **options: Unpack[WholeOptions]
) -> Tensors:
    """A training checkpoint as a lazy state dict of the Hugging Face model.

    Args:
        src: the training checkpoint's folder, or a plan, which says all the rest.
        mapping: as for `plan`; so are the others.

    >>> with engine.open("ckpt/1000", mapping="internlm2-7b.yaml") as tensors:  # doctest: +SKIP
    ...     model = AutoModelForCausalLM.from_pretrained(None, config=config, state_dict=tensors)

    Raises:
        EngineError: as for `plan`. A tensor that is read: E402 when its replicas differ, E405 when a source changed.
    """
    from engine.planning.model import Plan
    from engine.serve.tensors import Tensors

    return Tensors(src if isinstance(src, Plan) else plan(mapping, src, **options))


def virtual(compiled: Plan, *, tokenizer: str | Path | None = None, code: str | Path | None = None) -> VirtualFolder:
    """The files that a run of a plan would write, each readable at any byte; nothing is written.

    Args:
        tokenizer, code: as for `convert`.

    >>> with engine.virtual(engine.plan("internlm2-7b.yaml", "ckpt/1000")) as folder:  # doctest: +SKIP
    ...     folder["model-00001-of-00008.safetensors"].read(0, 100)

    Raises:
        EngineError: as for `convert`, of what can be told without reading tensors.
    """
    from engine.serve.virtual import VirtualFolder

    return VirtualFolder(compiled, lambda: small_files(compiled, tokenizer, code))
