"""Takes anew what transformers' classes know: `make targets` writes it to `schemas/targets.json`."""

from __future__ import annotations

import json
import re
from typing import Any

from engine.language.mapping_file import load_mapping
from engine.language.search import bundled, list_names
from engine.proving.targets import _auto, _keys, _of, _texts


def taken() -> dict[str, Any]:
    """What the installed transformers knows of the model types that bundled mappings target."""
    import transformers
    from transformers.activations import ACT2CLS
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    mappings = [load_mapping(name) for name in list_names()]
    told = [load_mapping(name) for one in mappings for name in one.classes.values()]
    wanted = sorted({one.model_type for one in (*mappings, *told)} & set(CONFIG_MAPPING_NAMES))
    names = {name for listed in _auto().values() for named in listed.values() for name in _texts(named)}
    ends = {found[0] for name in names if (found := re.search(r"For[A-Z]\w*$", name)) is not None}
    return {
        "transformers": transformers.__version__,
        "activations": sorted(ACT2CLS),
        "generation": sorted(transformers.GenerationConfig().to_dict()),
        "common": sorted(_keys(transformers.PretrainedConfig)),
        "heads": sorted(ends),
        "model types": sorted(CONFIG_MAPPING_NAMES),
        "configurations": {name: _of(name) for name in wanted},
    }


if __name__ == "__main__":
    text = json.dumps(taken(), indent=1, ensure_ascii=False) + "\n"
    (bundled("schemas") / "targets.json").write_text(text, encoding="utf-8")
