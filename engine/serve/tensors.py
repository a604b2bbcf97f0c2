"""A plan's outputs as a lazy state dict: names to tensors that are read on access."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from numbers import Integral
from typing import TYPE_CHECKING, Any

from engine.assets.bundle import make_assets
from engine.assets.generation import GENERATION, generation_config, within
from engine.errors import EngineError
from engine.formats.headers import DTYPES, ITEM_SIZES
from engine.move.values import check_transform
from engine.planning.as_model import class_named
from engine.planning.model import Plan
from engine.run.manifest import tensor_key
from engine.serve.readers import PART_BYTES, Readers, Reading

if TYPE_CHECKING:
    import torch


class Tensors(Reading["torch.Tensor"]):
    """The state dict that a run would write: a mapping of names to tensors.

    A tensor is read on access, after its replicas have been compared; it owns its memory and is not cached. A
    context manager; any number of threads may read.

    Attributes:
        plan: the plan that is read.
        slices: the same names to slices, which are read only when indexed; for transformers, which sorts all
            values before it takes the first.
    """

    def __init__(self, plan: Plan) -> None:
        for output in plan.outputs:
            check_transform(output)
        outputs = {tensor_key(plan, file.name, plan.outputs[i].name): i for file in plan.shards for i in file.outputs}
        super().__init__(Readers(plan), outputs, self._tensor)
        self.plan = plan
        self.slices: Mapping[str, Slice] = Reading(self.readers, outputs, self._slice)

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration, as in `config.json`."""
        return dict(self.plan.config)

    def model(self, **options: Any) -> Any:
        """The model that transformers builds from these tensors; writes no file and runs no remote code.

        Args:
            options: as for transformers' `from_pretrained`, like `dtype` and `device_map`.

        Raises:
            EngineError: E209 for an architecture that transformers does not have.
        """
        import transformers

        config = self.config
        named = class_named(config)
        found: Any = getattr(transformers, named, None)
        known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if not known:
            raise EngineError(
                "E209", "transformers has no class for this model", got=named,
                fix="Load the tensors into a class of your own: `load_state_dict(tensors, assign=True)`.",
            )  # fmt: skip
        options = {"generation_config": transformers.GenerationConfig.from_dict(self._generation()), **options}
        # The class itself: `AutoModelForCausalLM` of some versions requires a path.
        made = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        return found.from_pretrained(None, config=made, state_dict=self.slices, **options)

    def _generation(self) -> dict[str, Any]:
        """The generation settings of what a run would write."""
        settings, _ = within(self.plan.mapping.generation or {}, self.plan.sizes.get("vocab"))
        told = generation_config(settings, self.plan.config)
        with suppress(EngineError):  # a tokenizer that is wrong is not needed here
            told = make_assets(self.plan, None).files.get(GENERATION, told)
        return dict(json.loads(told))

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor, as from safetensors' `safe_open`."""
        return self[name]

    def get_slice(self, name: str) -> Slice:
        """A tensor to be sliced without reading all of it, as from safetensors' `safe_open`."""
        return self.slices[name]

    def __repr__(self) -> str:
        return f"<{len(self)} tensors of {self.plan.nbytes:,} bytes, read from {self.plan.folder}>"

    def compare_all(self) -> None:
        """Compare all replicas now, instead of each when its tensor is read; E402 when some differ."""
        self.readers.compare_all()

    def _slice(self, output: int) -> Slice:
        return Slice(self.readers, output)

    def _tensor(self, output: int) -> torch.Tensor:
        return self._slice(output)[...]


class Slice:
    """A tensor that is not read yet, as from safetensors' `get_slice`."""

    def __init__(self, readers: Readers, output: int) -> None:
        self._readers, self._index = readers, output
        self._output = readers.work.outputs[output]

    def get_shape(self) -> list[int]:
        return list(self._output.shape)

    def get_dtype(self) -> str:
        """The element type as safetensors spells it."""
        return self._output.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._output.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch_types()[self._output.dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The elements that an index of integers, slices and `...` selects.

        Only the selected rows of the first dimension are read, a few megabytes at a time.

        Raises:
            EngineError: E402 when replicas differ, E405 when a source changed, E3xx when one cannot be read.
            IndexError, TypeError, ValueError: for an invalid index, as in torch.
        """
        import torch

        shape = self._output.shape
        if not shape:
            return self._rows(0, 1).reshape(())[index]
        first, *rest = _expanded(index, len(shape))
        rows = (
            range(*first.indices(shape[0])) if isinstance(first, slice) else range(shape[0])[first : first + 1 or None]
        )
        if not isinstance(first, slice) and not -shape[0] <= first < shape[0]:
            raise IndexError(f"index {first} is out of range for {shape[0]} rows of {self._output.name}")
        if rows.step < 0:
            raise ValueError("a slice cannot go backwards")
        if rows.step == 1 and all(one == slice(None) for one in rest):
            found = self._rows(rows.start, max(rows.start, rows.stop))
        else:
            per = max(1, PART_BYTES // max(1, prod(shape[1:]) * ITEM_SIZES[self._output.dtype] * rows.step))
            some = [rows[at : at + per] for at in range(0, max(len(rows), 1), per)]
            read = (self._rows(one.start, max(one.start, one.stop - one.step + 1))[:: rows.step] for one in some)
            found = torch.cat([block[(slice(None), *rest)] for block in read])
        return found if isinstance(first, slice) else found[0]

    def _rows(self, low: int, high: int) -> torch.Tensor:
        import torch

        shape = self._output.shape
        tensor = torch.empty((high - low, *shape[1:]), dtype=self.dtype)
        if tensor.numel():
            row = prod(shape[1:]) * ITEM_SIZES[self._output.dtype]
            self._readers.read_into(self._index, low * row, tensor.view(-1).view(torch.uint8).numpy().data)
        return tensor


def _expanded(index: Any, dims: int) -> list[int | slice]:
    """An index with one entry for each dimension.

    >>> _expanded((..., 3), 3)
    [slice(None, None, None), slice(None, None, None), 3]
    """
    given = list(index) if isinstance(index, tuple) else [index]
    if not all(one is ... or (isinstance(one, Integral | slice) and not isinstance(one, bool)) for one in given):
        raise TypeError(f"only integers, slices and ... can be indices, not {index!r}"[:200])
    if given.count(...) > 1:
        raise IndexError("an index can have one ...")
    at = given.index(...) if ... in given else len(given)
    before, after = given[:at], [one for one in given[at:] if one is not ...]
    if len(before) + len(after) > dims:
        raise IndexError(f"too many indices for {dims} dimensions")
    return [*before, *[slice(None)] * (dims - len(before) - len(after)), *after]


def torch_types() -> dict[str, torch.dtype]:
    """Torch's element types by their safetensors names."""
    import torch

    return {held: getattr(torch, name) for name, held in DTYPES.items()}
