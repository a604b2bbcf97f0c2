"""The content of mapping and layout files as frozen data. No I/O, no evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from engine.errors import Place
from engine.language.axes import Axes
from engine.language.keys import Key, Limits


@dataclass(frozen=True, slots=True)
class Expression:
    """A Jinja expression as written (without braces), and where."""

    text: str
    place: Place


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    axes: Axes
    place: Place


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `sources` are name patterns; `reverse` writes the first.

    `pieces` are patterns of tensors that a rank may have saved in its place: its rows, one piece after the other.
    `split` are axes, or `rows` or `columns`: a storage dimension that is cut wherever that falls.
    """

    name: str
    sources: tuple[str, ...]
    axes: Axes
    targets: tuple[Target, ...]
    place: Place
    split: tuple[str, ...] = ()
    stage: Literal["first", "last"] | None = None
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # variant → allowed choices
    optional: bool = False
    transform: tuple[str, str] | None = None  # (operation, its axis or number)
    transform_when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keep_dtype: bool = False
    drop: Mapping[str, str] = field(default_factory=dict)  # axis of the dropped piece → why
    zeros: tuple[str, ...] = ()  # axes of dropped pieces that are written as zeros
    tied_to: str | None = None
    pieces: tuple[str, ...] = ()
    dtype: str | None = None  # the element type of a tensor that is not a weight, such as a counter
    notice: str | None = None  # what is told when its training tensor is written under the first of its names

    def __hash__(self) -> int:
        return hash(self.name)  # other fields are mappings, which cannot be hashed

    def active(self, choices: Mapping[str, str]) -> bool:
        """Whether `when` holds; a variant that is still open does not exclude the rule."""
        return _holds(self.when, choices)

    def together(self, other: Rule) -> bool:
        """Whether some variant choices make both rules active."""
        return all(set(self.when[name]) & set(other.when[name]) for name in self.when.keys() & other.when.keys())

    @property
    def changes(self) -> tuple[object, ...]:
        """How it changes values, and when."""
        return self.transform, self.transform_when

    def under(self, choices: Mapping[str, str]) -> Rule:
        """The rule, without its transform if that is not active under these choices."""
        if not self.transform_when:
            return self
        kept = self.transform if _holds(self.transform_when, choices) else None
        return replace(self, transform=kept, transform_when={})


def _holds(when: Mapping[str, tuple[str, ...]], choices: Mapping[str, str]) -> bool:
    return not when or all(choices.get(name, allowed[0]) in allowed for name, allowed in when.items())


@dataclass(frozen=True, slots=True)
class Exclusion:
    """An `ignore` or `refuse` entry: a name pattern on one side, and why; `values` must be those of such a tensor."""

    side: Literal["source", "target"]
    pattern: str
    why: str
    place: Place
    values: Expression | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """A named fact with finitely many choices; an expression of None means `otherwise`.

    `answers` are settings to suggest if the checkpoint does not decide it, each with its likely values; among them,
    `config` stands for a file to give with --config.
    """

    name: str
    help: str
    choices: Mapping[str, Expression | None]
    decide: Literal["expression", "shapes"]
    default: str | None
    place: Place
    answers: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Option:
    name: str
    type: str  # integer | number | string | boolean
    default: Any
    help: str
    choices: tuple[Any, ...] | None
    place: Place
    limits: Limits


@dataclass(frozen=True, slots=True)
class MappingFile:
    """A resolved mapping: its own keys merged over its parents'.

    `config`, `training_config` and `remote_code` are trees of literals with `Expression` leaves.
    `transformers` says, as a string or an `Expression`, in which of its versions the target is the same model.
    `files` are the YAML files it came from, family first; `resolved` is the merged YAML data, which
    knows its places.
    """

    name: str
    version: str
    description: str
    place: Place
    layout: str
    model_types: tuple[str, ...]
    model_type: str
    architecture: str
    options: Mapping[str, Option]
    variants: Mapping[str, Variant]
    dims: Mapping[str, Expression]
    even: tuple[str, ...]  # axes that training can only divide evenly over ranks
    rules: tuple[Rule, ...]
    ignore: tuple[Exclusion, ...]
    refuse: tuple[Exclusion, ...]
    config: Mapping[str, Any]
    training_config: Mapping[str, Any]
    tokenizer: Mapping[str, Any] | None
    generation: Mapping[str, Any] | None
    chat_template: str | None
    expect: Mapping[str, int]
    files: tuple[str, ...]
    digest: str  # sha256 over the resolved data, canonical JSON
    resolved: Mapping[str, Any]
    layout_place: Place | None = None  # where the file names its layout
    keys: Mapping[str, Mapping[str, Key]] = field(default_factory=dict)  # side → key → its declaration
    expect_place: Place | None = None
    as_model: bool = False  # without rules: tensors are those of the target's model class, by name and shape
    classes: Mapping[str, str] = field(default_factory=dict)  # model class → the mapping that lists its tensors
    remote_code: Mapping[str, Any] | None = None  # `auto_map`, if transformers lacks the target's classes
    transformers: Any = None
    also: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # other model types that are the same model
    family: str = ""  # the nearest of its files that is of no release, without its suffix


@dataclass(frozen=True, slots=True)
class Prefix:
    prefix: str
    when: Expression | None


@dataclass(frozen=True, slots=True)
class RankMap:
    """Which ranks share a file when files are not the cross product: one file per `rank`."""

    count: Expression
    dims: Mapping[str, Expression]


@dataclass(frozen=True, slots=True)
class FilePattern:
    """One kind of weights file.

    Attributes:
        cuts: stage class → rank dimension → `split`, `rows`, `recorded`, `runtime` or an axis.
        boxes: each tensor records which box it is of a larger one; ranks, if names have any, say nothing.
        mesh: of such files, when they are written: rank dimension → the storage dimension that it cuts.
    """

    name: str
    cuts: Mapping[str, Mapping[str, str]]
    ranks: RankMap | None
    number: Expression | None
    place: Place
    boxes: bool = False
    mesh: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Beside:
    """A small file written beside each rank file; its name has the placeholders of the mode's first file."""

    file: str
    content: Any
    format: str = "pickled_mapping"


@dataclass(frozen=True, slots=True)
class Mode:
    """A parallel mode, identified by its first file's name; `only_read` is the reason if it is never written.

    Attributes:
        format: what its files are: `torch`, `nested` (in mappings of mappings), `dcp`, `safetensors` or `whole`.
        state: which keys of a file hold the tensors, as name patterns; none: the file itself does.
        when: whether a configuration is of this mode, for modes whose files have the same names.
        choices: for variants that a mapping may have, the only choice that is written in this mode.
    """

    name: str
    help: str
    files: tuple[FilePattern, ...]
    aliases: tuple[str, ...] = ()
    beside: tuple[Beside, ...] = ()
    only_read: str | None = None
    format: str = "torch"
    state: tuple[str, ...] = ()
    when: Expression | None = None
    choices: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A place where a configuration may be: a file, and the dotted key in it."""

    file: str
    format: str  # pickled_mapping, json or dcp
    key: str | None = None  # for dcp it begins with the name of a value of the checkpoint
    kind: str | None = None  # `namespace`: written as an argparse.Namespace
    beside: tuple[str, ...] = ()  # keys next to the last of `key` that are read too


@dataclass(frozen=True, slots=True)
class RefusedFile:
    patterns: tuple[str, ...]
    why: str
    fix: str
    place: Place
    when: Expression | None = None  # over the configuration; None: always
    tensors: tuple[str, ...] = ()  # globs of names, instead of patterns of files


@dataclass(frozen=True, slots=True)
class LayerCut:
    """How the layer axis is cut over pipeline stages: chunks and the ranks that `stage` reads, sorted by it."""

    stage: Expression
    variants: Mapping[str, Variant]
    divides: Expression | None
    uneven: str


@dataclass(frozen=True, slots=True)
class Layout:
    name: str
    version: str
    description: str
    place: Place
    config_file: str
    configs: tuple[ConfigFile, ...]  # its possible places; the first is `config_file`
    config_of_target: bool  # it is the target's own config.json, which may also be given
    config_from_target: bool  # if it is missing, a given config.json of the target replaces it
    config_has: frozenset[str]  # keys of which every configuration has one; empty: it may have any
    training_file: str | None
    training_format: str | None  # python_source
    training_repeats: str | None  # the key under which it repeats the configuration
    training_write: Mapping[str, Any]  # its content when written: literals with `Expression` leaves
    prefixes: tuple[Prefix, ...]
    options: Mapping[str, Option]
    layers: LayerCut
    uneven: str
    even: tuple[str, ...]  # stage classes whose tensors the framework can only cut evenly
    whole: Mapping[str, str]  # stage class whose tensors every rank may hold whole instead → the key that says so
    lone_rank: Mapping[str, int]
    joined: Mapping[str, Sequence[str]]  # key that says whether linears are one → the last words of their names
    zip_root: str | None  # the meaning of the folder inside a rank file's zip: `file_name`; None: no meaning
    says_ranks: Mapping[str, Expression]  # a file's own rank per dimension, from values saved in it
    says_alike: tuple[str, ...]  # keys whose values must be the same in all files
    sizes: Mapping[str, Expression]  # ranks per dimension, by the training configuration
    modes: tuple[Mode, ...]
    skip: tuple[str, ...]
    skip_tensors: tuple[str, ...]  # names of tensors that do not belong to the model, as globs
    wrappers: tuple[str, ...]  # words that wrappers insert into names; they are removed
    refuse: tuple[RefusedFile, ...]
    files: tuple[str, ...]
    digest: str
    keys: Mapping[str, Mapping[str, Key]] = field(default_factory=dict)  # of every model of the framework
    indices: Mapping[str, Expression] = field(default_factory=dict)  # axis → its number in the whole model
