"""What the API functions share: making an output from a plan, and reporting."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.run.running import Running
from engine.storage.json_text import as_data
from engine.storage.objects import MARK, ObjectStore
from engine.storage.places import on_this_machine, store_at

if TYPE_CHECKING:
    from engine.formats.headers import FileHeader
    from engine.planning.model import Plan
    from engine.run.journal import Done
    from engine.run.looks import Look
    from engine.storage.output import OutputFolder
    from engine.storage.uploads import Uploads


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did."""

    out: Path | str
    tensors: int
    bytes: int
    seconds: float
    variants: Mapping[str, str]
    files: tuple[str, ...]
    kept: int = 0  # bytes that an interrupted run had written
    content_id: str | None = None  # of all tensors, whatever files they lie in; None without digests
    notices: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        return {**as_data(self), "out": str(self.out), "seconds": round(self.seconds, 3)}


@dataclass(frozen=True, slots=True)
class Small:
    """The files of an output beside its weights, made before anything is written.

    Attributes:
        notices: what the user should know of them.
        later: makes more of them, slowly, while tensors are written; the event is set when they are no longer
            wanted.
        memory: bytes that all this takes.
        taken: SHA-256 of the tokenizer's files that were read.
    """

    files: Mapping[str, bytes]
    notices: tuple[str, ...] = ()
    later: Callable[[threading.Event], Mapping[str, bytes]] | None = None
    memory: int = 0
    taken: Mapping[str, str] = field(default_factory=dict)

    def whole(self) -> dict[str, bytes]:
        """All of the files, including those that take long to make."""
        return {**self.files, **(self.later(threading.Event()) if self.later is not None else {})}


def execute(
    compiled: Plan,
    source: str,
    out: Path | str,
    make_small: Callable[[], Small],
    how: Running,
    started: float,
    *,
    parts: str | None = None,
) -> Report:
    """Run a plan: weights files, small files and the manifest, complete at `out` or not at all.

    What can be refused without reading tensors is refused before the output folder is made.

    Args:
        make_small: makes the other files of the output; raises if it cannot.
        started: when the command started, for the report.
        parts: the digest of work that parts have done: their weights are used.
    """
    from engine.checkpoint.manifests import NAME
    from engine.run.journal import identity_of
    from engine.run.looks import suspicious
    from engine.run.manifest import encode_manifest, making, manifest, tensor_key
    from engine.run.parts import MARKER, WHOLE, read_markers, write_marker
    from engine.run.runner import check_runnable, side_by_side, take_parts, write_weights
    from engine.run.source import changed_configuration, check_source

    work = parts or identity_of(compiled)
    output = output_at(work, source, out, how, parts=parts is not None, read=compiled.files)
    written = None if parts is None else read_markers(compiled, parts, output.written)
    small = make_small()
    output.need = compiled.nbytes + sum(map(len, small.files.values()))
    made = making(compiled)
    json.dumps([made, *small.files], ensure_ascii=False).encode()  # fails for anything that could not be written
    check_runnable(compiled, how, small.memory, output.buffer)
    check_names(compiled, small.files)
    notices = [*compiled.notices, *small.notices, *changed_configuration(compiled)]
    files = dict(small.files)
    later = small.later

    def make_later(stopped: threading.Event) -> None:
        files.update(later(stopped) if later is not None else {})

    with output as store:
        if how.check_source:
            notices += check_source(compiled, how.progress)
        if written is not None:
            written = take_parts(compiled, store, written)
            if parts is not None and store.folder is not None:
                write_marker(parts, store, WHOLE, written)
            make_later(threading.Event())
        else:
            beside = [] if later is None else [make_later]
            written = write_weights(compiled, store, how, beside=beside, beside_memory=small.memory)
        told_of = (
            (tensor_key(compiled, file.name, o.name), o.dtype, o.shape, *_told(compiled, n, written.done[n]))
            for file in compiled.shards
            for n, o in ((n, compiled.outputs[n]) for n in file.outputs)
        )
        notices += suspicious(told_of, whole=compiled.written is None)
        data = manifest(compiled, written.done, files, made)
        side_by_side(partial(store.put, *one) for one in files.items())
        store.put(NAME, encode_manifest(data))
        names = tuple(name for name in store.names() if not name.startswith(MARKER))
    return Report(
        out=out,
        tensors=len(compiled.outputs),
        bytes=compiled.nbytes,
        seconds=time.monotonic() - started,
        variants={name: d.choice for name, d in compiled.decisions.items()},
        files=names,
        kept=written.kept,
        content_id=data.get("content_id"),
        notices=tuple(notices),
    )


def _told(compiled: Plan, output: int, done: Done) -> tuple[str, Look]:
    """The digest and the look of an output; of one that is padded with zeros they do not tell whether it is odd."""
    padded = done.look.zeros and any(
        not compiled.files[compiled.sources[copy.source].file].size for copy in compiled.copies(output)
    )
    return ("", done.look._replace(zeros=0)) if padded else (done.digest, done.look)


def output_at(
    work: str, source: str, out: Path | str, how: Running, *, parts: bool = False, read: Sequence[FileHeader] = ()
) -> OutputFolder | Uploads:
    """The output of a plan: a context that yields a store to write to, and at its end completes it or leaves nothing.

    Args:
        work: a digest of everything that determines the bytes of the output.
        read: the files of the source, which a folder that is replaced must not hold.
    """
    from engine.checkpoint.manifests import NAME
    from engine.run.parts import MARKER
    from engine.run.written import Ours
    from engine.storage.output import OutputFolder
    from engine.storage.uploads import Uploads

    store = store_at(out, "the output")
    if isinstance(store, ObjectStore):
        kept, foreign = how.resume or parts, Ours(lambda name: store.attribute(name, MARK) is not None)
        return Uploads(store, source, mark=NAME, work=work, overwrite=how.overwrite, resume=kept, foreign=foreign)
    path, shared = on_this_machine(store, "the output"), (work, MARKER) if parts else None
    files = [one.file.store.folder / one.name for one in read if one.file.store.folder is not None]
    return OutputFolder(
        path, Path(source), files, overwrite=how.overwrite, resume=how.resume, foreign=Ours(), shared=shared
    )


def check_names(compiled: Plan, small: Iterable[str]) -> None:
    """E502 when two files of the output would have the same name."""
    from engine.checkpoint.manifests import NAME
    from engine.run.journal import NAME as JOURNAL

    names = [*(file.name for file in compiled.shards), *small, NAME, JOURNAL]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EngineError(
            "E502",
            "two files of the output would have the same name",
            place=compiled.layout.place,
            got=twice,
            expected="names that differ",
            fix="Correct the names of files in the layout.",
        )
