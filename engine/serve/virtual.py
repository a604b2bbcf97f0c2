"""Virtual files: each file that a run of a plan would write, readable at any byte, without the run.

The writer's own format lays out what comes before, between and after tensors. The tensors' bytes are read from
the sources on demand; digests and checksums are computed on demand.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from engine.checkpoint.manifests import NAME
from engine.move.values import check_transform
from engine.planning.model import OutputFile, Plan, Work
from engine.run.digests import content_id
from engine.run.execute import Small, check_names
from engine.run.journal import Done, identity_of
from engine.run.manifest import encode_manifest, index_file, manifest, tensor_key
from engine.run.schedule import layout_of
from engine.serve.readers import Readers, Reading
from engine.storage.virtual import Stretch, VirtualFile, VirtualStore, copied


class VirtualFolder(Reading[VirtualFile]):
    """The files that a run of a plan would write, by name. A context manager; any number of threads may read.

    Attributes:
        plan: the plan that is read.
        readers: read the bytes of its outputs.
        notices: the notices that a run would give.
        commit: 40 hexadecimal digits that change whenever any byte may.
        store: the same files as the source of another plan: `plan_reverse(mapping, folder.store, tp=4)`.
    """

    def __init__(self, plan: Plan, make_small: Callable[[], Small], threads: ThreadPoolExecutor | None = None) -> None:
        """Make the small files; no tensor is read.

        Args:
            threads: the executor that reads; default: one that `close` shuts down.

        Raises:
            EngineError: as for a run that has not begun to write.
        """
        for output in plan.outputs:
            check_transform(output)
        small = make_small()
        check_names(plan, small.files)
        files = small.whole()
        readers = Readers(plan, threads)
        self.notices = (*plan.notices, *small.notices)
        identity = identity_of(plan)
        made = [_weights(readers, file, _short(identity, file.name)[:40]) for file in plan.shards]
        made += [VirtualFile.of(name, data) for name, data in (files | index_file(plan)).items()]
        made.append(_manifest(plan, readers, files, identity))
        listed = {one.name: one for one in sorted(made, key=lambda one: one.name)}
        super().__init__(readers, listed, lambda file: file)
        self.plan, self.store = plan, _store(plan, listed)
        self.commit = _short(*((one.name, one.size, one.etag) for one in made))[:40]


def weight_files(work: Work, etags: Mapping[str, str]) -> VirtualStore:
    """Some weights files that a run of `work` would write, by their etags; only tensors of `work` can be read."""
    readers = Readers(work)
    return _store(work, {one.name: _weights(readers, one, etags[one.name]) for one in work.shards if one.name in etags})


def _store(work: Work, files: Mapping[str, VirtualFile]) -> VirtualStore:
    return VirtualStore(f"virtual:{work.folder}", files)


def _short(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _bytes(start: int, data: bytes) -> list[Stretch]:
    return [Stretch(start, start + len(data), partial(copied, data))] if data else []


def _computed(start: int, size: int, make: Callable[[], bytes]) -> Stretch:
    """Bytes that are computed when they are read."""

    def fill(at: int, target: memoryview) -> None:
        target[:] = memoryview(make())[at : at + len(target)]

    return Stretch(start, start + size, fill)


def _weights(readers: Readers, file: OutputFile, etag: str) -> VirtualFile:
    """A weights file: payload from the sources, the rest from the format's layout."""
    work, layout = readers.work, layout_of(readers.work, file)
    stretches = [
        Stretch(at, at + work.outputs[i].nbytes, partial(readers.read_into, i))
        for i, at in zip(file.outputs, layout.offsets, strict=True)
        if work.outputs[i].nbytes
    ]
    for start, data in layout.start():
        stretches += _bytes(start, data)

    def finished(index: int) -> bytes:
        return layout.finish([readers.done(i).checksum for i in file.outputs])[index][1]

    def behind(number: int, index: int) -> bytes:
        return layout.after(number, readers.done(file.outputs[number]).checksum)[index][1]

    # The place of these bytes does not depend on the checksums in them.
    for number in range(len(file.outputs)):
        for index, (start, data) in enumerate(layout.after(number, 0)):
            stretches.append(_computed(start, len(data), partial(behind, number, index)))
    for index, (start, data) in enumerate(layout.finish([0] * len(file.outputs))):
        stretches.append(_computed(start, len(data), partial(finished, index)))
    stretches.sort(key=lambda one: one.start)
    return VirtualFile(file.name, layout.size, etag, tuple(stretches))


_DIGEST, _CONTENT = 32, 64  # hexadecimal digits of a tensor's digest and of the content id


def _manifest(plan: Plan, readers: Readers, small: Mapping[str, bytes], identity: str) -> VirtualFile:
    """`conversion.json`, in which each digest is computed when its bytes are read."""
    mark = f"@{secrets.token_hex(8)}"  # occurs nowhere else in the file
    digits = _DIGEST - len(mark)
    data = manifest(plan, {i: Done(f"{mark}{i:0{digits}d}", 0) for i in range(len(plan.outputs))}, small)
    data["content_id"] = f"{mark}{'c' * (_CONTENT - len(mark))}"
    text = encode_manifest(data)
    stretches: list[Stretch] = []
    end = 0
    for found in re.finditer(rb"%b(c+|[0-9]{%d})" % (mark.encode(), digits), text):
        stretches += _bytes(end, text[end : found.start()])
        make = partial(_content_id, plan, readers) if found[1][:1] == b"c" else partial(_digest, readers, int(found[1]))
        stretches.append(_computed(found.start(), len(found[0]), make))
        end = found.end()
    stretches += _bytes(end, text[end:])
    etag = _short(identity, text.replace(mark.encode(), b"").decode())[:40]
    return VirtualFile(NAME, len(text), etag, tuple(stretches))


def _digest(readers: Readers, output: int) -> bytes:
    return readers.done(output).digest.encode()


def _content_id(plan: Plan, readers: Readers) -> bytes:
    """The content id, after all replicas have been compared."""
    readers.compare_all()
    tensors = {
        tensor_key(plan, file.name, plan.outputs[i].name): (
            plan.outputs[i].dtype, plan.outputs[i].shape, readers.done(i).digest,
        )
        for file in plan.shards
        for i in file.outputs
    }  # fmt: skip
    return content_id(tensors).encode()
