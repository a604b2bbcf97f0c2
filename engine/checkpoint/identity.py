"""Checks that files are the ranks that their names claim, and that they have not changed since a plan was made.

torch names the folder inside a zip, its root, after the file that it saves: `model_tp1_pp0/data.pkl` in
`model_tp1_pp0.pt` (`PyTorchStreamWriter::setup` in caffe2/serialize/inline_container.cc). So the root reveals an
exchanged, copied or renamed rank file. Files saved through a buffer have the root `archive`, and files from before
the zip format have none: among those only copies are found, by their content.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from engine.checkpoint.ranks import index_dims
from engine.errors import EngineError, Place
from engine.formats.headers import ITEM_SIZES, FileHeader, TensorHeader, span
from engine.language.documents import grouped, tree_of
from engine.language.expressions import compile_expression, whole_number
from engine.language.model import FilePattern, Layout
from engine.language.names import pattern

_SAMPLE = 4096  # bytes at the start of a tensor: enough to differ between slices of a trained tensor
_BLOCK = 1 << 20
_NUMBERS = re.compile(r"(?<=[.])\d+(?=[.])|\d+$")  # of a layer, and of an expert: `experts.3.w`, `experts.w3`


@dataclass(frozen=True, slots=True)
class Claim:
    """What a rank file's name claims.

    Attributes:
        saved_as: the rank file that it was saved as, by the zip's root or its content; None if neither says so.
        place: what distinguishes the file from others with the same tensors. Files with equal places may be replicas.
        unnumbered: the same without ranks that number something: only experts differ in files where it is equal.
    """

    header: FileHeader
    saved_as: str | None
    place: tuple[object, ...]
    unnumbered: tuple[object, ...]

    @property
    def name(self) -> str:
        return self.header.name


def saved_as(root: str | None, layout: Layout) -> str | None:
    """The rank file of a layout that a zip's root names; None when it names none."""
    if root is None or layout.zip_root is None:
        return None
    for name in dict.fromkeys(file.name for mode in layout.modes for file in mode.files):
        suffix = "." + name.rpartition(".")[2] if "." in name else ""
        for file in (root, root + suffix):  # torch removes the last suffix, which may have been another one
            if pattern(name).match(file) is not None:
                return file
    return None


def told_by(layout: Layout) -> tuple[str, ...]:
    """The dotted keys in each rank file's content that say which rank it is."""
    paths = [path for one in layout.says_ranks.values() for path in sorted(compile_expression(one).paths)]
    return tuple(dict.fromkeys([*_alike(layout), *paths]))


def _alike(layout: Layout) -> Iterator[str]:
    """Dotted keys whose values must be equal in all files: below `args.*`, every key that is declared and counts."""
    counting = [name for name, key in layout.keys.get("source", {}).items() if "*" not in name and key.ignored is None]
    for path in layout.says_alike:
        yield from (path.replace("*", name) for name in counting) if path.endswith(".*") else (path,)


def said_rank(header: FileHeader, file: FilePattern, layout: Layout) -> str | None:
    """The rank file of a pattern that a file's content says it is; None when it does not say."""
    names = tree_of({tuple(path.split(".")): value for path, value in header.says.items()})
    wanted = pattern(file.name)
    try:
        return wanted.format({dim: whole_number(layout.says_ranks[dim], names, dim) for dim in wanted.placeholders})
    except (EngineError, KeyError, ValueError):
        return None


def check_alike(headers: Sequence[FileHeader], layout: Layout) -> None:
    """E306 for a file whose content gives another step, run or model than the first file's, or does not give one."""
    for path in _alike(layout):
        told = [(header, header.says.get(path, "is not there")) for header in headers]
        for header, value in told[1:]:
            if value != told[0][1] and repr(value) != repr(told[0][1]):  # nan differs from itself
                raise EngineError(
                    "E306",
                    f"`{header.name}` is not of the same save as `{told[0][0].name}`",
                    place=Place(header.name),
                    got=f"{path} {value}"[:200],
                    expected=f"{path} {told[0][1]}"[:200],
                    fix="Copy all rank files of one step from the training run.",
                )


def claim_of(
    header: FileHeader, file: FilePattern, ranks: Mapping[str, int], layout: Layout, said: str | None
) -> Claim:
    """What a file claims; its place is its pattern with its ranks, except ranks over which the layers are not cut.

    Nor do ranks count that number something, as expert ranks do, in a file where at most layers have numbers.

    Args:
        said: the rank file that it is by its content; None where that does not say it.
    """
    told = saved_as(header.root, layout) or said
    if file.boxes:
        return Claim(header, told, (file.name,), (file.name,))
    cutting = {dim for dim, role in file.cuts.get("layers", {}).items() if role not in ("recorded", "runtime")}
    others = {dim for cuts in file.cuts.values() for dim in cuts} - cutting
    numbering = {dim for axis in layout.indices for dim in index_dims(layout, axis)}
    unnumbered = (file.name, *(rank for dim, rank in ranks.items() if dim not in others | numbering))
    if not any(map(_numbered, header.tensors)):
        return Claim(header, told, unnumbered, unnumbered)
    return Claim(header, told, (file.name, *(rank for dim, rank in ranks.items() if dim not in others)), unnumbered)


def check_identities(claims: Sequence[Claim]) -> None:
    """E306 for the first file that is another rank than its name says, or a copy of another file.

    At most a few KiB of each file's payload are read, unless two files look alike.
    """
    for claim in claims:
        if claim.saved_as is not None and claim.saved_as != claim.name:
            raise _refused(
                f"`{claim.name}` was saved as `{claim.saved_as}`",
                claim,
                f"{claim.saved_as}, as the file itself says",
                claim.name,
                "Files were exchanged, renamed or copied over each other. Copy the folder again from the training "
                "run, or give each file the name it was saved under.",
            )
    _check_links(claims)
    for alike in _same_tensors(claims):
        _check_contents(alike)


def _check_links(claims: Sequence[Claim]) -> None:
    """One file under two names: hard links, or links to one file."""
    seen: dict[tuple[object, ...], Claim] = {}
    for claim in claims:
        links = None if claim.header.state is None else claim.header.state.links
        if links is None:
            continue
        # the saved rank too, since some file systems give an inode twice
        first = seen.setdefault((links, claim.header.identity), claim)
        if first is not claim:
            raise _refused(
                f"`{claim.name}` and `{first.name}` are one file",
                claim,
                "two names of one file, by links",
                "a file for each rank",
                "Every rank holds a different slice: copy the missing file from the training run.",
            )


def _same_tensors(claims: Sequence[Claim]) -> Iterator[list[Claim]]:
    """Groups of files whose tensors have the same names, types and shapes; one file for each place."""
    found: dict[tuple[object, ...], dict[tuple[object, ...], Claim]] = {}
    for claim in claims:
        kind = tuple(sorted((t.name, t.dtype, t.shape) for t in claim.header.tensors))
        found.setdefault((hash(kind), kind[:1], len(kind)), {}).setdefault(claim.place, claim)
    yield from (list(places.values()) for places in found.values() if len(places) > 1)


def _check_contents(claims: list[Claim]) -> None:
    """E306 for two files that are bit-identical, unless every tensor is constant, for example zeros."""
    order = sorted(claims[0].header.tensors, key=lambda t: (-t.nbytes, t.name))
    groups, telling = [claims], False
    for tensor in order:
        item = ITEM_SIZES[tensor.dtype]
        samples = [grouped((begins(c.header, _tensor(c, tensor.name)), c) for c in group) for group in groups]
        telling |= any(sample != sample[:item] * (len(sample) // item) for each in samples for sample in each)
        groups = [alike for each in samples for alike in each.values() if len(alike) > 1]
    for group in groups if telling else ():
        for other in group[1:]:
            if all(_equal(group[0], other, t.name) for t in order) and not _may_be_equal(
                group[0], other, claims, group
            ):
                raise _refused(
                    f"`{other.name}` and `{group[0].name}` hold the same tensors",
                    other,
                    f"{len(order)} tensors that are equal to the last bit",
                    "different slices or layers on each rank",
                    "One is a copy of the other under a wrong name: copy the missing file from the training run.",
                )


def _may_be_equal(one: Claim, other: Claim, claims: Sequence[Claim], group: Sequence[Claim]) -> bool:
    """Whether equal files hold the same experts, as after upcycling.

    Both say which ranks they are, or all of three or more expert ranks are equal, or all experts in each file are.

    Args:
        claims: every file with the same tensors; `group`, those that are equal.
    """
    if one.unnumbered != other.unnumbered:
        return False
    every = [claim in group for claim in claims if claim.unnumbered == one.unnumbered]
    if None not in (one.saved_as, other.saved_as) or (len(every) > 2 and all(every)):
        return True
    experts = [*grouped((name, t) for t in one.header.tensors if (name := _numbered(t))).values()]
    same = (_same(one.header, each[0], one.header, tensor) for each in experts for tensor in each[1:])
    return min(map(len, experts), default=0) > 1 and all(same)


def _numbered(tensor: TensorHeader) -> str:
    """The name without its last number, if that is another than its layer's; else nothing."""
    numbers = [*_NUMBERS.finditer(tensor.name)]
    return tensor.name[: numbers[-1].start()] + tensor.name[numbers[-1].end() :] if len(numbers) > 1 else ""


def begins(header: FileHeader, tensor: TensorHeader) -> bytes:
    """The first bytes of a tensor; tensors that differ nearly always differ there."""
    return next(blocks(header, tensor, _SAMPLE), b"")


def _tensor(claim: Claim, name: str) -> TensorHeader:
    return next(t for t in claim.header.tensors if t.name == name)


def _equal(one: Claim, other: Claim, name: str) -> bool:
    return _same(one.header, _tensor(one, name), other.header, _tensor(other, name))


def _same(file: FileHeader, tensor: TensorHeader, twin: FileHeader, other: TensorHeader) -> bool:
    """Whether two tensors hold the same bytes; only known if both have the same strides."""
    return tensor.strides == other.strides and all(
        x == y for x, y in zip(blocks(file, tensor), blocks(twin, other), strict=False)
    )


def blocks(header: FileHeader, tensor: TensorHeader, size: int = _BLOCK) -> Iterator[bytes]:
    """The bytes from a tensor's first element to its last, including those of others in between."""
    if not prod(tensor.shape):
        return
    end = tensor.offset + span(tensor.shape, tensor.strides) * ITEM_SIZES[tensor.dtype]
    file = header.file.store.ranges(header.file.name, None)
    try:
        for at in range(tensor.offset, end, size):
            block = bytearray(min(size, end - at))
            file.read_into(at, (memoryview(block),))
            yield bytes(block)
    finally:
        file.close()


def _refused(message: str, claim: Claim, got: str, expected: str, fix: str) -> EngineError:
    return EngineError("E306", message, place=Place(claim.name), got=got, expected=expected, fix=fix)


Marks = Mapping[str, Any]  # identify a file


def marks_of(header: FileHeader) -> dict[str, Any]:
    """What identifies a file. Without checksums of its content, only the very same file, untouched, will match."""
    found: dict[str, Any] = {"name": header.name, "size": header.size, "identity": header.identity}
    if not header.summed and header.state is not None:
        found["state"] = dict(header.state.told())
    return found


def check_files(then: Sequence[Marks], files: Sequence[FileHeader], folder: str, saved: str, again: str) -> None:
    """E405 for the first file that has changed.

    Args:
        then: the marks of the files at that time.
        saved: the file that holds these marks.
        again: what the user should do.
    """
    before = {one["name"]: one for one in then}
    now = {header.name: marks_of(header) for header in files}
    for name in sorted({*before, *now}):
        if before.get(name) == now.get(name):
            continue
        fix = again
        if name not in now or name not in before:
            got, expected = ("gone", "present") if name not in now else ("new", "no such file")
        elif now[name]["identity"] != before[name]["identity"]:
            got, expected = (
                f"{one['size']} bytes, headers {one['identity'][:12]}" for one in (now[name], before[name])
            )
        else:
            states = (one.get("state", {}).items() for one in (now[name], before[name]))
            told = [", ".join(f"{key} {value}" for key, value in state) for state in states]
            got, expected = (one or "nothing known of the file itself" for one in told)
            fix = f"The headers are the same, but without checksums in the file, its tensors may differ. {again}"
        raise EngineError(
            "E405",
            f"`{name}` changed since the plan was saved",
            place=Place(folder),
            got=got,
            expected=f"{expected}, as in {saved}",
            fix=fix,
        )
