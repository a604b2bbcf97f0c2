"""Verifies an output: against its own manifest, every tensor and every file, streamed; and in other requested ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.hf_folder import read_hf_folder
from engine.checkpoint.manifests import NAME, read_manifest
from engine.comparing.effects import worded
from engine.errors import EngineError
from engine.formats.headers import TensorHeader
from engine.language.documents import changed
from engine.move.values import all_finite
from engine.planning.model import Plan
from engine.run.digests import ALGORITHM, content_id
from engine.run.looks import Look, listed, suspicious
from engine.run.manifest import making
from engine.run.written import check_index, extra_files, read_contents
from engine.storage.json_text import as_data
from engine.storage.places import on_this_machine
from engine.storage.store import Store

if TYPE_CHECKING:
    from engine.comparing.source import AgainstSource
    from engine.oracle.load_model import Loaded
    from engine.oracle.logits import Logits
    from engine.run.meter import Progress


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked in an output, and everything that is wrong with it.

    Attributes:
        tensors, files, nbytes: what was checked, whether it was as written or reported as wrong.
        read: tensors whose contents were compared with digests.
        unchecked: what was not checked, and why.
        values: suspicious values in the tensors, in words, although they are as they were written.
        manifest: whether there was a manifest to compare with.
        source, model, logits: results of the other requested checks.
    """

    tensors: int
    files: int
    nbytes: int
    content_id: str
    problems: tuple[str, ...]
    read: int = 0
    unchecked: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    manifest: bool = True
    source: AgainstSource | None = None
    model: Loaded | None = None
    logits: Logits | None = None

    def as_dict(self) -> dict[str, Any]:
        logits = None if self.logits is None else self.logits.as_dict()
        more = {"source": as_data(self.source), "model": as_data(self.model), "logits": logits}
        return {
            "tensors": self.tensors,
            "files": self.files,
            "bytes": self.nbytes,
            "content_id": self.content_id,
            "contents": self.read,
            "problems": list(self.problems),
            "unchecked": list(self.unchecked),
            "values": list(self.values),
            **({} if self.manifest else {"manifest": False}),
            **{name: one for name, one in more.items() if one is not None},
        }

    def and_also(self, *problems: str, unchecked: Sequence[str] = (), **more: Any) -> Verified:
        """A copy with more problems, and with results of other checks."""
        return replace(self, problems=(*self.problems, *problems), unchecked=(*self.unchecked, *unchecked), **more)


def verify_output(
    folder: Store,
    progress: Callable[[Progress], None] | None,
    *,
    plan: Plan | None,
    small: Mapping[str, bytes],
    sample: str | None,
    load: bool,
    source: Path | None,
    settings: Mapping[str, Any],
) -> Verified:
    """Verify an output against its manifest, and in every other requested way.

    Without a manifest the other ways still work, whichever program wrote the output. If no tensor's content was
    checked in any way, that is a problem.

    Args:
        plan: compare with what this plan makes of its source, in the blocks of `sample` (all if None).
        small: the files beside the weights that the source gives, by name.
        load: load the model with transformers and run it.
        source: compare the model's forward pass with training's own, run from this checkpoint.
        settings: values of variants by name, as with `--set`; the forward pass of training knows some of them.

    Raises:
        EngineError: E304 or E301 when there is no manifest and no other check is requested, E2xx and
            E3xx when output or source cannot be read.
    """
    from engine.comparing.source import parse_sample, source_bytes, verify_source
    from engine.oracle.frameworks import forward_of
    from engine.run.meter import Meter

    if plan is None:
        _check_settings(settings)
    training = None if source is None else forward_of(source, settings)  # refused before anything is compared
    needed = plan is None and source is None and not load
    known = read_manifest(folder) if needed or folder.has(NAME) else None
    blocks = parse_sample(sample or "100%")
    named = {str(entry.get("file")) for entry in (known or {"tensors": {}})["tensors"].values()}
    total = sum(state.size for state in folder.states([name for name in named if folder.has(name)]).values())
    meter = Meter(total + (source_bytes(plan, blocks) if plan is not None else 0), progress, "verifying")
    found = _of_manifest(folder, known, None if plan is None else small, meter.advance)
    if plan is not None:
        meter.begin("comparing with the source")
        against = verify_source(plan, folder, blocks, meter)
        problems, unchecked = _settings(folder, plan, small)
        told, other = ([], []) if known is None else _making(known, plan)
        replaced = [f"{name} in {file.name}" for file in plan.files for name in file.replaced]
        values = (*found.values, *listed("replaced in the source after training had saved it", replaced))
        found = found.and_also(
            *against.problems, *problems, *told, unchecked=[*unchecked, *other], source=against, values=values
        )
    meter.finish()  # headers count as done: they are not read again
    if load:
        from engine.oracle.load_model import load_model

        Meter(1, progress, "loading and running the model", "models").begin("loading and running the model")
        model = load_model(on_this_machine(folder, "--load"))
        found = found.and_also(*model.problems, model=model)
    if training is not None:
        from engine.oracle.logits import compare_logits

        logits = compare_logits(on_this_machine(folder, "--logits"), training, progress)
        found = found.and_also(*logits.problems, logits=logits)
    if found.read or found.source is not None or found.logits is not None or load or found.problems:
        return found
    return found.and_also(
        "no tensor's content was checked: there are no digests to compare with. Give --src and --mapping to compare "
        "with the source, or --logits"
    )


def _of_manifest(
    folder: Store, known: Mapping[str, Any] | None, small: Mapping[str, bytes] | None, advance: Callable[[int], None]
) -> Verified:
    """The result of checking against the manifest; without one, against a plan's output and its `small` files."""
    if known is not None:
        return _check_written(folder, known, advance)
    unchecked = [f"{NAME}: there is none, so files were not compared with what was written"]
    strangers: list[str] = []
    if small is not None:
        files = [file.name for file in read_hf_folder(folder)]
        strangers, beside = extra_files(folder, {*files, *small})
        unchecked += beside
    return Verified(0, 0, 0, "", tuple(strangers), unchecked=tuple(unchecked), manifest=False)


def _check_written(folder: Store, data: Mapping[str, Any], advance: Callable[[int], None]) -> Verified:
    """Read every byte of an output and compare it with the manifest."""
    tensors: Mapping[str, Any] = data["tensors"]
    wrong: dict[str, None] = {}
    looks: dict[str, Look] = {}

    def look(name: str, tensor: TensorHeader, block: memoryview) -> None:
        looks[name] = looks.get(name, Look()).and_at(block, tensor.nbytes)
        if name not in wrong and not all_finite(block, tensor.dtype):
            wrong[name] = None

    found, nbytes, read, problems = read_contents(folder, data, advance, look)
    problems += check_index(folder, tensors)
    if not data["files"] and not any(str(entry.get("file")) + ":" in name for name, entry in tensors.items()):
        problems.append("the manifest names no file beside the weights, such as the configuration, so none was checked")
    files = {*data["files"], *(str(entry.get("file")) for entry in tensors.values())}
    strangers, unchecked = extra_files(folder, files)
    total = content_id(found) if found and read == len(found) else ""
    complete = data.get("digest") == ALGORITHM or "content_id" in data
    if (total != data.get("content_id", "") or complete != bool(total)) and not problems:
        problems.append("the content id is not that of the tensors: the manifest was changed")
    if read < len(found):
        which = "contents of the tensors" if not read else f"contents of {len(found) - read} tensors"
        names = f"{which}: the manifest has no digests of them, so only names, types and shapes were compared"
        unchecked = [names, *unchecked]
    whole = not any(":" in name for name in found)
    seen = {name: look._replace(wild=look.wild and name not in wrong) for name, look in looks.items()}
    sizes = ((name, *one, seen.get(name, Look())) for name, one in found.items())
    values = (*listed("NaN or infinity", wrong), *suspicious(sizes, whole=whole))
    told = (len(found), len(files), nbytes, total, (*problems, *strangers), read, tuple(unchecked))
    return Verified(*told, values=values)


def _settings(folder: Store, plan: Plan, wanted: Mapping[str, bytes]) -> tuple[list[str], list[str]]:
    """Where configuration, tokenizer and other files differ from what the mapping gives; and what it does not give."""
    from engine.comparing.settings import GENERATION, TEMPLATES, TOKENIZER, compare_settings, small_files

    here, unchecked = small_files(folder), []
    if not wanted.keys() & set(TOKENIZER):
        given, own = {*TOKENIZER}, {*wanted}
        if here.keys() & set(TOKENIZER):
            spec = plan.mapping.tokenizer
            ready = spec is None or str(spec.get("file", "tokenizer.model")) not in here
            if ready and plan.mapping.chat_template is None:
                own.discard(GENERATION)  # its generation settings go over the mapping's
            given |= {GENERATION, *TEMPLATES} - own
        here, wanted = ({name: of[name] for name in of if name not in given} for of in (here, wanted))
        unchecked.append("the tokenizer: a run takes none from beside the training checkpoint")
    remote = plan.mapping.remote_code is not None
    if remote:
        unchecked.append("code and `auto_map`: the mapping does not hold the official files")
    found = [
        one
        for one in compare_settings(here, wanted)
        if not (remote and (one.part == "code" or one.what.startswith("auto_map")))
    ]
    told = [f"{one.part}: {one.what} is {one.out}, the mapping gives {one.ref}: {one.effect}" for one in found]
    return told, unchecked


_DECIDED = ("variants", "options", "sizes", "unread")  # by a mapping and a source


def _making(known: Mapping[str, Any], plan: Plan) -> tuple[list[str], list[str]]:
    """What the manifest says wrongly about how it was made; and what another source or mapping leaves open."""
    made = making(plan)
    if known["sources"] != made["sources"]:
        unlike = [name for name, _, _ in changed(known["sources"], made["sources"])]
        told = listed("how it was made was not checked: it was made from other files", unlike)
        return [], [f"{NAME}: {''.join(told)}"]
    same_mapping = any(known["mapping"][key] == as_data(made["mapping"][key]) for key in ("digest", "resolved"))
    then, now = (_how(said, made["mapping"] if same_mapping else ()) for said in (known, made))
    differ = [one for one in changed(then, now) if same_mapping or (one[0] in then and one[0] in now)]
    told = [f"{NAME}: {'.'.join(at)} is {worded(was)}, the source gives {worded(is_)}" for at, was, is_ in differ]
    return (told, []) if same_mapping else ([], [f"{one}, by another mapping" for one in told])


def _how(said: Mapping[str, Any], keys: Iterable[str]) -> dict[tuple[str, str], Any]:
    """How a manifest says that an output was made: (part, name) → value, and `keys` of the part `mapping`."""
    found = {(part, name): value for part in _DECIDED for name, value in said.get(part, {}).items()}
    found |= {at: value["choice"] for at, value in found.items() if at[0] == "variants"}
    return found | {("mapping", key): as_data(said["mapping"].get(key)) for key in keys}


def check_asked(src: bool, mapping: bool, logits: bool, sample: bool) -> None:
    """E001 for arguments that do not fit together."""
    wrong = (
        ((mapping or logits) and not src, "there is nothing to compare with", "Give the training checkpoint: --src."),
        (src and not (mapping or logits), "the source alone is not enough", "Give --mapping, or --logits, or both."),
        (sample and not mapping, "a sample is for comparing tensors with the source", "Give --src and --mapping too."),
    )
    for found, message, fix in wrong:
        if found:
            raise EngineError("E001", message, fix=fix)


def _check_settings(settings: Mapping[str, Any]) -> None:
    """E001 for settings that only a mapping defines."""
    from engine.oracle.frameworks import SETTINGS

    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise EngineError(
            "E001",
            f"there is no setting `{unknown[0]}` without a mapping",
            expected=", ".join(SETTINGS),
            fix="Give --mapping, or leave it out.",
        )


def written_dtype(folder: Store) -> str:
    """The `--dtype` that an output was made with, from its manifest, so that it need not be given again."""
    dtype = read_manifest(folder).get("dtype") if folder.has(NAME) else None
    return dtype if isinstance(dtype, str) else "auto"
