"""Custom mappings, which no test of this project covers: their errors must not result in a wrong model."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import EngineError, EngineErrors, shape_text
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.search import bundled
from engine.planning.as_model import class_named
from engine.planning.model import Plan
from engine.planning.wanted import wanted_by_mapping

# Lint findings that change decisions or output. Planning itself refuses the others, or they are harmless.
_REFUSED = ("L004", "L010", "L012", "L013", "L014", "L015", "L017")


def checked(plan: Plan) -> Plan:
    """A plan of a bundled mapping and layout, or of others that pass lint and fit the target's class; adds warnings.

    Raises:
        EngineError: E109 for errors of lint, and for tensors that the model class does not load.
    """
    mapping = plan.mapping
    paths = (bundled("mappings") / folder / f"{mapping.name}.yaml" for folder in ("", "families"))
    named = [load_mapping(path) for path in paths if path.is_file()]  # it may be one of these, or an edited copy
    copied = all(one.digest != mapping.digest for one in named)
    path = bundled("mappings") / "layouts" / f"{plan.layout.name}.yaml"
    layout = load_layout(str(path)) if path.is_file() else None  # the bundled one with its name
    if named and not copied and layout is not None and layout.digest == plan.layout.digest:
        return plan
    from engine.proving.lint import lint  # late, since most runs use bundled mappings
    from engine.proving.values import contradiction, not_allowed

    found = lint(mapping)
    wrong = [one for one in found if one.severity == "error" and one.code in _REFUSED]
    for one in wrong:
        one.code, one.message = "E109", f"{one.code}: {one.message}"
    if not wrong and plan.written is None:  # as lint checks literals, check the results of expressions
        wrong = [
            EngineError(
                "E109",
                f"L014: {contradiction('config', path, value, key)}",
                place=mapping.place,
                fix="Correct the expression, or its declaration in `keys`.",
            )
            for path, value, key in not_allowed(plan.config, mapping.keys.get("target", {}))
        ]
    if wrong:
        raise EngineErrors(wrong)
    _check_class(plan)
    told = [f"`engine lint` on the mapping: {one.message} ({one.place})" for one in found]
    if named and copied:
        other = f"`engine diff {mapping.name} {mapping.files[-1]}` shows the differences"
        told.insert(0, f"the mapping has the name of the bundled {mapping.name}, but is a different one: {other}")
    if layout is not None and layout.digest != plan.layout.digest:
        told.insert(0, f"the layout has the name of the bundled {layout.name}, but is a different one")
    return replace(plan, notices=(*plan.notices, *told))


def _check_class(plan: Plan) -> None:
    """E109 if the tensors to write are not those of the model class, as far as a file lists them."""
    classes, named = load_mapping("transformers").classes, class_named(plan.config)
    if plan.written is not None or named not in classes:
        return
    told = load_mapping(classes[named])
    wanted = wanted_by_mapping(told, plan.config)
    shapes = {one.name: one.shape for one in plan.outputs}
    if wanted is None or wanted.shapes == shapes:
        return
    name = min(name for name in {*wanted.shapes, *shapes} if wanted.shapes.get(name) != shapes.get(name))
    got, expected = (shape_text(held[name]) if name in held else "no such tensor" for held in (shapes, wanted.shapes))
    raise EngineError(
        "E109",
        f"{named} does not load what the mapping writes: `{name}`",
        place=plan.mapping.place,
        got=got,
        expected=expected,
        fix="Correct the rule's target, or `config`. transformers would put random numbers where a tensor is missing.",
    )
