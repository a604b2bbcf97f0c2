"""One digest of everything a plan decides: plans of equal digests write equal bytes from equal sources."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from engine.planning.copies import Copy
from engine.planning.model import Output, Plan


def digest_of_plan(plan: Plan) -> str:
    """The sha256 over everything a plan decides: every output, copy, replica, file and config key."""
    total = hashlib.sha256()

    def add(*facts: object) -> None:
        total.update(repr(facts).encode())

    def told(source: int) -> tuple[str, str]:
        return plan.files[plan.sources[source].file].name, plan.sources[source].header.name

    def add_output(output: Output, copies: Iterable[Copy]) -> None:
        add(output.name, output.dtype, output.read_dtype, output.shape, output.transform, output.transform_dim)
        for c in copies:
            add(told(c.source), c.source_offset, c.target_offset, c.shape, c.source_strides, c.target_strides)

    for index, output in enumerate(plan.outputs):
        add_output(output, plan.copies(index))
    for tied in plan.tied:
        add_output(tied.output, tied.copies)
        add("tied", tied.same_as)
    for one in sorted(tuple(told(s) for s in replicas.sources) for replicas in plan.replicas):
        add("replicas", one)
    for shard in plan.shards:
        add(shard.name, shard.format, [plan.outputs[i].name for i in shard.outputs])
    add(sorted((key, repr(value)) for key, value in plan.config.items()), sorted(plan.ignored))
    return total.hexdigest()
