"""Compares an output's forward pass with training's own: after each layer, and where they differ, step by step.

First both run independently from the same tokens. If hidden states differ, the model is run again
with every step's result replaced by training's once it has been compared, so that each tensor is
judged alone and one wrong layer does not make all later ones look wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import EngineError
from engine.oracle.load_model import fixed_tokens, not_built_in, one_line, plainly, quiet, run_model
from engine.oracle.meaning import plain_config
from engine.oracle.streamed_model import StreamedModel
from engine.oracle.wrong_layers import STEPS, Wrong, explain, in_lines
from engine.run.meter import Listener, Meter
from engine.storage.json_text import as_data

if TYPE_CHECKING:
    from engine.oracle.internevo import Forward

# Both sides compute in float32 and differ only in the order of sums. A sum of thousands of products
# is off by tens of units in the last place, and layers add up; a wrong tensor is off by its full size.
_EXACT = 4096 * 2.0**-23
_EMBEDDED = 4096  # rows of the embedding that are compared together
_ROUNDED = 8  # units in the last place of the type that weights were rounded to
_PRECISION = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23, "F64": 2.0**-52}


@dataclass(frozen=True, slots=True)
class Logits:
    """The result of comparing a model's forward pass with training's.

    Attributes:
        states: deviation of the hidden state after the embedding and each layer, and of the logits,
            each relative to the size of what it is compared with.
        tolerance: the largest deviation that rounding explains; of the logits, `head_tolerance`. Where
            weights were rounded to be written, it is one of a single step, and states may gather more.
        wrong: what differs, layer by layer.
    """

    states: tuple[float, ...]
    tolerance: float
    head_tolerance: float
    wrong: tuple[Wrong, ...]
    problems: tuple[str, ...]

    def summary(self) -> str:
        """One line about what was compared."""
        if not self.states:
            return "its forward pass was not compared"
        told = f"within {max(self.states[:-1]):.1e} after each layer, logits within {self.states[-1]:.1e}"
        verdict = "not training's own" if self.problems else "training's own"
        return f"the forward pass of {len(self.states) - 2} layers is {verdict}: {told}"

    def as_dict(self) -> dict[str, Any]:
        names = ["embedding", *(f"layer {i}" for i in range(len(self.states) - 2)), "logits"]
        data = as_data(self)
        return {"deviations": dict(zip(names, data.pop("states"), strict=False)), **data}


def compare_logits(folder: Path, forward: Forward, progress: Listener | None = None) -> Logits:
    """Run an output with transformers' code and its source with training's, and compare.

    Raises:
        EngineError: E202 when the letters of the MLP must be set, E2xx and E3xx when either cannot be read.
    """
    unknown = not_built_in(folder)
    if unknown is not None:
        return _failed(unknown)
    with forward as training, quiet(), plainly():
        try:
            streamed = StreamedModel(folder)
        except EngineError:
            raise
        except Exception as error:  # a configuration may make transformers raise anything
            return _failed(f"transformers cannot build the model: {one_line(error)}")
        with streamed:
            parts = streamed.parts()
            if streamed.problems or parts is None:
                return _failed(*(streamed.problems or ("the model is not built as Llama is",)))
            if len(parts[1]) != training.layers:
                return _failed(f"the model has {len(parts[1])} layers, the source {training.layers}")
            numbers = _numbers(training.numbers, streamed.model.config.to_dict())
            try:
                found = _compare(training, streamed, parts, progress)
            except (RuntimeError, ValueError, IndexError) as error:
                return _failed(*numbers, f"the model does not run: {one_line(error)}")
            rows = () if any(one.place == "embedding" for one in found.wrong) else _rows(training, streamed, parts[0])
            return replace(found, problems=(*found.problems, *rows, *numbers))


def _numbers(training: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Numbers of the configuration that differ from training, even if a few tokens do not show it.

    >>> _numbers({"rms_norm_eps": 1e-5, "hidden_act": "silu"}, {"rms_norm_eps": 1e-6, "hidden_act": "swish"})
    ['config.json: rms_norm_eps is 1e-06, training has 1e-05']
    """
    alike = {"swish": "silu"}
    told, wanted = plain_config(config), plain_config(training)
    return [
        f"config.json: {key} is {told[key]}, training has {value}"
        for key, value in wanted.items()
        if key in told and alike.get(str(told[key]), told[key]) != value
    ]


def _rows(training: Forward, streamed: StreamedModel, embedding: Any) -> Iterator[str]:
    """Rows of the embedding that differ from training's, including tokens that were not run."""
    tolerance = _tolerance(streamed.dtypes, training.dtypes)
    wrong: list[int] = []
    count = min(training.vocab(), embedding.num_embeddings)
    for low in range(0, count, _EMBEDDED):
        high = min(low + _EMBEDDED, count)
        got, wanted = streamed.rows(embedding, low, high), training.embedding(low, high)
        if got is None or got.shape != wanted.shape:
            return
        off = (got - wanted).abs() > tolerance * (wanted.abs() + wanted.pow(2).mean().sqrt())
        wrong += [low + int(row) for row in (off | got.isnan()).any(dim=1).nonzero()[:, 0]]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        yield f"embedding: row {wrong[0]}{more} of {count} differs from training's"


def _failed(*problems: str) -> Logits:
    return Logits((), 0.0, 0.0, (), problems)


def _compare(training: Forward, streamed: StreamedModel, parts: Sequence[Any], progress: Listener | None) -> Logits:
    model, embedding, layers = streamed.model, parts[0], parts[1]
    ids = fixed_tokens(min(training.vocab(), embedding.num_embeddings))
    meter = Meter(2 * training.layers, progress, "running training's layers", "layers")
    meter.begin("running training's layers")
    wanted = [training.embed(ids)]
    for i in range(training.layers):
        meter.advance(1)
        wanted.append(training.layer(i, wanted[-1])["out"])
    normed, logits = training.head(wanted[-1])
    broken = next((i for i, one in enumerate([*wanted, logits]) if not one.isfinite().all()), None)
    if broken is not None:
        where = "the logits" if broken == len(wanted) else f"the hidden state {_after(broken)}"
        return _failed(
            f"in training's own forward pass {where} holds NaN or infinity, as its weights may: nothing is compared"
        )
    got: list[torch.Tensor] = []
    hooks = [one.register_forward_hook(lambda _, __, out: got.append(_tensor(out))) for one in (embedding, *layers)]
    hooks += [one.register_forward_hook(lambda *_: meter.advance(1)) for one in layers]
    meter.begin("running the model's layers")
    got.append(run_model(model, ids))
    for hook in hooks:
        hook.remove()
    states = tuple(deviation(x, y) for x, y in zip(got, [*wanted, logits], strict=True))
    tolerance = _tolerance(streamed.dtypes, training.dtypes)
    head_tolerance = max(tolerance, _tolerance(streamed.dtypes, {"F64"}) if training.normalised else 0.0)
    bounds = [tolerance] * (len(states) - 1) + [head_tolerance]
    first = next((i for i, (state, bound) in enumerate(zip(states, bounds, strict=True)) if state > bound), None)
    if first is None:
        return Logits(states, tolerance, head_tolerance, (), ())
    steps = _Steps(training, [*wanted, normed, logits], tolerance, head_tolerance)
    wrong = tuple(steps.run(model, parts, ids))
    # A hidden state gathers what rounding the weights does to each layer before it, so it proves nothing then.
    rounded = bounds[first] > _EXACT
    problems = in_lines(wrong) or (
        ()
        if rounded
        else (
            f"{'the logits' if first == len(states) - 1 else f'the hidden state {_after(first)}'} differs by "
            f"{states[first]:.3g} of its size, more than rounding explains ({bounds[first]:.1g}), "
            "though every step by itself agrees",
        )
    )
    return Logits(states, tolerance, head_tolerance, wrong, problems)


def _after(state: int) -> str:
    return f"after layer {state - 1}" if state else "after the embedding"


def deviation(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference of an element, relative to it and to the usual size of all.

    Infinite for other shapes and for what is not a number.

    >>> import torch
    >>> deviation(torch.tensor([1.0, 1.5]), torch.tensor([1.0, 1.0]))
    0.25
    """
    if got.shape != wanted.shape:
        return float("inf")
    scale = wanted.abs() + wanted.pow(2).mean().sqrt()
    off = ((got - wanted).abs() / scale.clamp_min(1e-30)).max().item()
    return off if off == off else float("inf")


def _tolerance(written: frozenset[str], source: frozenset[str] | set[str]) -> float:
    """The deviation that rounding explains: weights may have been written in a less precise type than the source's."""
    coarsest = max(_PRECISION.get(dtype, 0.0) for dtype in written)
    kept = source <= written or written <= {"F32", "F64"}
    return _EXACT + (0.0 if kept else _ROUNDED * coarsest)


def _tensor(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


class _Steps:
    """A run in which each step is compared with training's and then replaced by it."""

    def __init__(
        self, training: Forward, wanted: Sequence[torch.Tensor], tolerance: float, head_tolerance: float
    ) -> None:
        """Args: wanted: training's hidden states, its last norm and its logits."""
        self._training, self._wanted = training, wanted
        self._tolerance, self._head_tolerance = tolerance, head_tolerance
        self._trace: dict[str, torch.Tensor] = {}
        self._place = ""
        self._steps: dict[str, tuple[float, torch.Tensor, torch.Tensor]] = {}
        self._wrong: list[Wrong] = []
        self._hooks: list[Any] = []

    def run(self, model: Any, parts: Sequence[Any], ids: torch.Tensor) -> list[Wrong]:
        """Everything that is wrong, place by place."""
        embedding, layers, norm, head = parts
        self._hook(embedding, "embedding", "embedding", partial(self._wanted.__getitem__, 0), False)
        for i, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(partial(self._enter, i)))
            for step, (path, inward) in STEPS.items():
                module = layer
                for name in path.split(".") if path else ():
                    module = getattr(module, name, None)
                if module is not None:
                    self._hook(module, f"layer {i}", step, partial(self._traced, step), inward)
        self._hook(norm, "head", "norm", partial(self._wanted.__getitem__, -2), False)
        self._hook(head, "head", "logits", partial(self._wanted.__getitem__, -1), False)
        run_model(model, ids)
        self._leave("")
        for hook in self._hooks:
            hook.remove()
        return self._wrong

    def _traced(self, step: str) -> torch.Tensor:
        return self._trace[step]

    def _enter(self, layer: int, *_: Any) -> None:
        self._trace = self._training.layer(layer, self._wanted[layer])

    def _leave(self, place: str) -> None:
        """Judge the steps of the place before, unless it is the same."""
        if place != self._place:
            bound = self._head_tolerance if self._place == "head" else self._tolerance
            wrong = explain(self._place, self._steps, bound, self._training.head_dim)
            self._wrong += [] if wrong is None else [wrong]
            self._place, self._steps = place, {}

    def _check(self, place: str, step: str, got: torch.Tensor, wanted: torch.Tensor) -> bool:
        self._leave(place)
        self._steps[step] = (deviation(got, wanted), got, wanted)
        return got.shape == wanted.shape

    def _hook(self, module: Any, place: str, step: str, wanted: Callable[[], torch.Tensor], inward: bool) -> None:
        """Compare a module's output or input with training's, and replace it by training's."""

        def replaced(_: Any, inputs: Any, output: Any = None) -> Any:
            held, value = inputs if inward else output, wanted()
            if not self._check(place, step, _tensor(held), value):
                return None
            return (value, *held[1:]) if isinstance(held, tuple) else value

        register = module.register_forward_pre_hook if inward else module.register_forward_hook
        self._hooks.append(register(replaced))
