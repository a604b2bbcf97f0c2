"""Verifying an output: against its own manifest, every tensor and every file, streamed; and what else is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, Place
from engine.formats.headers import FileHeader, TensorHeader
from engine.formats.rank_files import read_rank_file
from engine.formats.safetensors import read_safetensors
from engine.run.digests import ALGORITHM, content_id, digest_of
from engine.run.manifest import NAME, read_manifest
from engine.storage.places import on_this_machine
from engine.storage.sources import SourceFiles
from engine.storage.store import File, Store

if TYPE_CHECKING:
    from engine.comparing.source import AgainstSource
    from engine.oracle.load_model import Loaded
    from engine.oracle.logits import Logits
    from engine.planning.model import Plan
    from engine.run.meter import Progress

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked of an output, and everything that is wrong with it.

    Attributes:
        manifest: whether there was a manifest to compare with; if not, nothing was compared with it.
        source, model, logits: what else was asked for.
    """

    tensors: int
    files: int
    nbytes: int
    content_id: str
    problems: tuple[str, ...]
    manifest: bool = True
    source: AgainstSource | None = None
    model: Loaded | None = None
    logits: Logits | None = None

    def as_dict(self) -> dict[str, Any]:
        more = {"source": self.source, "model": self.model, "logits": self.logits}
        return {
            "tensors": self.tensors,
            "files": self.files,
            "bytes": self.nbytes,
            "content_id": self.content_id,
            "problems": list(self.problems),
            **({} if self.manifest else {"manifest": False}),
            **{name: one.as_dict() for name, one in more.items() if one is not None},
        }


def verify(folder: Store, advance: Callable[[int], None] = lambda _: None) -> Verified:
    """Read every byte of an output and compare it with the manifest.

    Raises:
        EngineError: E304 or E301 when there is no manifest to verify with.
    """
    data = read_manifest(folder)
    tensors: Mapping[str, Any] = data["tensors"]
    problems: list[str] = []
    for name, wanted in data["files"].items():
        problems += _check_small(folder, str(name), str(wanted))
    headers: dict[str, FileHeader] = {}
    for file in dict.fromkeys(str(entry.get("file")) for entry in tensors.values()):
        try:
            headers[file] = _read(folder, file)
        except EngineError as error:
            problems.append(f"{file}: {error.message}")
    found: dict[str, tuple[str, tuple[int, ...], str]] = {}
    nbytes = 0
    for file, header in headers.items():
        with SourceFiles((header,)) as sources:
            here = {str(k)[len(file) + 1 :] if str(k).startswith(f"{file}:") else str(k): (k, v)
                    for k, v in tensors.items() if v.get("file") == file}  # fmt: skip
            for one in header.tensors:
                key, entry = here.pop(one.name, (None, None))
                if key is None or entry is None:
                    problems.append(f"{file}:{one.name} is not in the manifest")
                    continue
                digest = digest_of(_blocks(sources, one, advance)) if "digest" in entry else ""
                nbytes += one.nbytes
                found[key] = (one.dtype, one.shape, digest)
                if [one.dtype, list(one.shape)] != [entry.get("dtype"), entry.get("shape")]:
                    problems.append(f"{file}:{one.name} is {one.dtype} {list(one.shape)}, not what was written")
                elif digest != entry.get("digest", ""):
                    problems.append(f"{file}:{one.name} has other bytes than were written")
            problems += [f"{file}:{name} is missing" for name in here]
    total = content_id(found) if data.get("digest") == ALGORITHM else ""
    if total != data.get("content_id", "") and not problems:
        problems.append("the content id is not that of the tensors")
    return Verified(len(found), len(data["files"]) + len(headers), nbytes, total, tuple(problems))


@dataclass(frozen=True, slots=True)
class Asked:
    """What to verify besides the manifest.

    Attributes:
        plan: compare with what this plan makes of its source, in the blocks of `sample` (all if None).
        load: load the model with transformers and run it.
        source: compare the model's forward pass with training's own, run from this checkpoint.
        settings: variants as `--set` gives them; the forward pass of training knows some of them.
    """

    plan: Plan | None = None
    sample: str | None = None
    load: bool = False
    source: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def verify_output(folder: Store, asked: Asked, progress: Callable[[Progress], None] | None = None) -> Verified:
    """Verify an output against its manifest, and in every other way that is asked for.

    Without a manifest the other ways still serve, whatever program wrote the output.

    Raises:
        EngineError: E304 or E301 when there is no manifest and nothing else is asked for, E2xx and
            E3xx when output or source cannot be read.
    """
    from engine.comparing.source import parse_sample, source_bytes, verify_source
    from engine.run.meter import Meter

    if asked.plan is None:
        _check_settings(asked.settings)
    needed = asked.plan is None and asked.source is None and not asked.load
    known = read_manifest(folder) if needed or folder.has(NAME) else None
    sample = parse_sample(asked.sample or "100%")
    named = {str(entry.get("file")) for entry in (known or {"tensors": {}})["tensors"].values()}
    total = sum(state.size for state in folder.states([name for name in named if folder.has(name)]).values())
    meter = Meter(total + (source_bytes(asked.plan, sample) if asked.plan is not None else 0), progress, "verifying")
    found = verify(folder, meter.advance) if known is not None else Verified(0, 0, 0, "", (), manifest=False)
    if asked.plan is not None:
        meter.begin("comparing with the source")
        source = verify_source(asked.plan, folder, sample, meter.advance)
        found = replace(found, source=source, problems=(*found.problems, *source.problems))
    meter.finish()  # files are counted whole, their headers are not read again
    if asked.load:
        from engine.oracle.load_model import load_model

        Meter(1, progress, "loading and running the model", "models").begin("loading and running the model")
        model = load_model(on_this_machine(folder, "--load"))
        found = replace(found, model=model, problems=(*found.problems, *model.problems))
    if asked.source is not None:
        from engine.oracle.logits import compare_logits

        logits = compare_logits(on_this_machine(folder, "--logits"), asked.source, asked.settings, progress)
        found = replace(found, logits=logits, problems=(*found.problems, *logits.problems))
    return found


def check_asked(src: bool, mapping: bool, logits: bool, sample: bool) -> None:
    """E001 for arguments that do not go together."""
    wrong = (
        ((mapping or logits) and not src, "there is nothing to compare with", "Give the training checkpoint: --src."),
        (src and not (mapping or logits), "the source alone says nothing", "Give --mapping, or --logits, or both."),
        (sample and not mapping, "a sample is of tensors compared with the source", "Give --src and --mapping too."),
    )
    for found, message, fix in wrong:
        if found:
            raise EngineError("E001", message, fix=fix)


def _check_settings(settings: Mapping[str, Any]) -> None:
    """E001 for settings that only a mapping could know."""
    from engine.oracle.frameworks import settings_of

    known = settings_of()
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise EngineError(
            "E001",
            f"there is no setting `{unknown[0]}` without a mapping",
            expected=", ".join(known),
            fix="Give --mapping, or leave it out.",
        )


def written_dtype(folder: Store) -> str:
    """The `--dtype` an output was made with, by its manifest, so that it need not be given again."""
    dtype = read_manifest(folder).get("dtype") if folder.has(NAME) else None
    return dtype if isinstance(dtype, str) else "auto"


def _check_small(folder: Store, name: str, wanted: str) -> list[str]:
    if "/" in name or name in ("", ".", ".."):
        return [f"{name!r} is not the name of a file of the output"]
    try:
        with folder.open(name) as file:
            total = hashlib.sha256()
            while block := file.read(_BLOCK):
                total.update(block)
    except EngineError as error:
        return [f"{name}: {error.message}"]
    return [] if total.hexdigest() == wanted else [f"{name} was changed"]


def _read(folder: Store, name: str) -> FileHeader:
    if "/" in name or name in ("", ".", ".."):
        raise EngineError("E301", "not the name of a file of the output", place=Place(name))
    file = File(folder, name)
    return read_safetensors(file) if name.endswith(".safetensors") else read_rank_file(file)


def _blocks(sources: SourceFiles, one: TensorHeader, advance: Callable[[int], None]) -> Any:
    """The bytes of a contiguous tensor."""
    buffer = memoryview(bytearray(min(_BLOCK, max(one.nbytes, 1))))
    for start in range(0, one.nbytes, _BLOCK):
        block = buffer[: min(_BLOCK, one.nbytes - start)]
        sources.read_into(0, one.offset + start, (block,))
        advance(len(block))
        yield block
