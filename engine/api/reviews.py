"""The public functions that read plans, mappings and outputs and change nothing but what they are told to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.api.plans import plan
from engine.errors import EngineError
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.model import Mapping as MappingFile
from engine.run.execute import read_checkpoint

if TYPE_CHECKING:
    from engine.comparing.tensors import Comparison
    from engine.comparing.verify import Verified
    from engine.discover.scaffold import Scaffold
    from engine.explaining.explanation import Explanation
    from engine.planning.model import Plan
    from engine.proving.lint import Finding
    from engine.proving.proof import Proof
    from engine.run.meter import Progress


def describe_plan(compiled: Plan) -> dict[str, Any]:
    """A plan as JSON-ready data, as `engine plan --json` prints it (`schemas/plan.schema.json`)."""
    from engine.explaining.describe import describe_plan as describe

    return describe(compiled)


def explain(
    what: str,
    mapping: str | Path | MappingFile,
    src: str | Path = ".",
    *,
    backward: bool = False,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
) -> Explanation:
    """Where the elements of a tensor come from, or with `backward` where they go; reads headers only.

    Args:
        what: an output and slices of it, `model.norm.weight[0:4]`; with `backward` a stored tensor,
            `FILE:NAME[slices]`, or without the file the tensor of every file that has it.
        Others as for `plan`.

    Raises:
        EngineError: E001 for a name or a slice that is not there, else as for `plan`.
    """
    from engine.explaining.sources import explain_source
    from engine.explaining.targets import explain as forward

    compiled = plan(mapping, src, settings=settings, dtype=dtype)
    return explain_source(compiled, what) if backward else forward(compiled, what)


def inspect(src: str | Path = ".") -> dict[str, Any]:
    """What a checkpoint folder is: layout, mode, ranks, sizes, and which bundled mappings fit.

    Reads headers only. The first layout whose files are there is taken.

    Raises:
        EngineError: E2xx and E3xx, of the layout that came closest.
    """
    from engine.discover.inspect import describe_checkpoint
    from engine.language.search import layout_names, list_names

    first: EngineError | None = None
    for name in layout_names():
        layout = load_layout(name)
        try:
            checkpoint = read_checkpoint(src, layout)
        except EngineError as error:
            # Another layout may fit, unless this one knows the files and says what is wrong.
            if error.code != "E304":
                raise
            first = first or error
            continue
        return describe_checkpoint(checkpoint, layout, [load_mapping(m) for m in list_names()])
    raise first or EngineError("E002", "there are no layouts", fix="Reinstall the package.")


def compare(out: str | Path, ref: str | Path, *, progress: Callable[[Progress], None] | None = None) -> Comparison:
    """Compare two Hugging Face checkpoints tensor by tensor, and say what the differences mean.

    Each is a folder, an index or one weight file; safetensors and torch files may be mixed.

    Args:
        progress: called with bytes of `out` compared and in all, a few times a second.

    Raises:
        EngineError: E2xx and E3xx when either cannot be read.
    """
    from engine.checkpoint.hf_folder import read_hf_config, read_hf_folder
    from engine.comparing.diagnoses import diagnose
    from engine.comparing.tensors import Comparison, compare_files
    from engine.discover.guesses import geometries
    from engine.run.meter import Meter

    paths = Path(out), Path(ref)
    ours, theirs = (read_hf_folder(path) for path in paths)
    configs = [read_hf_config(path) for path in paths]
    meter = Meter(sum(tensor.nbytes for file in ours for tensor in file.tensors), progress)
    verdicts = compare_files(ours, theirs, configs, meter.advance)
    return Comparison(str(out), str(ref), verdicts, diagnose(verdicts, heads_known=bool(geometries(configs))))


def format_mapping(text: str) -> str:
    """A mapping file in its usual form: keys in order, long rules in block form, comments kept."""
    from engine.language.format import format_mapping as reformat

    return reformat(text)


def clean(out: str | Path) -> list[Path]:
    """Remove what interrupted runs left beside an output; returns what was removed."""
    from engine.storage.output import clean as remove
    from engine.storage.replacing import given_path

    return remove(given_path(out, "the output"))


def verify(
    out: str | Path,
    progress: Callable[[Progress], None] | None = None,
    *,
    src: str | Path | None = None,
    mapping: str | Path | MappingFile | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    sample: str | None = None,
    load: bool = False,
    logits: bool = False,
) -> Verified:
    """Verify an output: against its own manifest, and in whatever other way is asked for.

    Args:
        src: the training checkpoint it was made from.
        mapping: plan again with this mapping, and compare every tensor with what `src` gives.
        settings: variants and options, as `--set` gives them.
        dtype: as for `convert`; default: what the manifest says, else `auto`.
        sample: compare some blocks of each tensor only: a share like `5%`, or a number like `8`.
        load: load the model with transformers, without remote code, and run a forward pass.
        logits: compare its forward pass, layer by layer, with one computed from the rank files of
            `src` the way training computes it. No mapping is used for it.

    Raises:
        EngineError: E304 or E301 when there is no manifest and nothing else to compare with, E0xx
            for arguments that do not go together, E2xx and E3xx when either side cannot be read.
    """
    from engine.comparing.verify import Asked, check_asked, verify_output, written_dtype

    check_asked(src is not None, mapping is not None, logits, sample is not None)

    compiled = None
    if src is not None and mapping is not None:
        compiled = plan(mapping, src, settings=settings, dtype=dtype or written_dtype(Path(out)))
    source = Path(src) if src is not None and logits else None
    return verify_output(Path(out), Asked(compiled, sample, load, source, settings or {}), progress)


def lint(paths: Sequence[str | Path] = ()) -> list[Finding]:
    """Findings of mapping files; without paths, of every bundled one. Touches no checkpoint."""
    from engine.language.search import list_names
    from engine.proving.lint import lint_file

    names = [str(path) for path in paths] or list_names()
    return list(dict.fromkeys(finding for name in names for finding in lint_file(name)))


def view(
    mapping: str | Path | MappingFile,
    src: str | Path,
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one HTML page that shows what `convert` would do, and say how large it is; reads headers only.

    The page needs nothing else: it loads nothing, and works without scripts.

    Raises:
        EngineError: E401 when `out` exists, else as for `plan`.
    """
    from engine.show.page import is_page, view_page, write_page
    from engine.storage.replacing import check_file_free, given_path

    file = given_path(out, "the page")
    check_file_free(file, overwrite, is_page)
    return write_page(view_page(plan(mapping, src, settings=settings, dtype=dtype)), file, overwrite=overwrite)


def new_mapping(
    src: str | Path = ".",
    *,
    name: str | None = None,
    like: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Scaffold:
    """A first draft of a mapping for a checkpoint: what fits, what is guessed, what a person must decide.

    Args:
        name: the mapping's; default: that of the file or of the folder.
        like: the family to extend, by name or path; default: the nearest bundled one.
        out: the file to write; without it the text is only returned.
        overwrite: replace a file that exists.

    Raises:
        EngineError: E401 when the file exists; E2xx and E3xx for what cannot be read.
    """
    from engine.discover.files import new_mapping as make

    return make(src, read_checkpoint, name=name, like=like, out=out, overwrite=overwrite)


def prove(names: Sequence[str | Path | MappingFile] = (), *, mutants: bool = False) -> list[Proof]:
    """Prove mappings: total, injective, exactly invertible, alike in every layout; without names, all bundled ones.

    Runs the real planner and runner on tiny index tensors in a temporary folder, checks a release's
    own sizes by box arithmetic, and compares names and shapes with transformers' model. Rules that
    several mappings share are run once.

    Args:
        names: paths, names of bundled mappings, or loaded ones.
        mutants: perturb each rule too, and say what would have caught it.
    """
    from engine.language.search import list_names
    from engine.proving.prove import prove as prove_each

    bundled = sorted(list_names(), key=lambda name: not name.startswith("families/"))
    return prove_each(list(names) or bundled, mutants=mutants)


def write_meanings(names: Sequence[str | Path] = ()) -> list[Path]:
    """Write what mapping files mean into `meanings/` beside them, for `prove` to compare with later.

    Args:
        names: paths or names of bundled mappings; default: all bundled ones.
    """
    from engine.language.search import list_names
    from engine.proving.committed import write_meaning as write

    every = [*names] or sorted(list_names(), key=lambda name: len(load_mapping(name).files))  # parents first
    return [write(name) for name in every]
