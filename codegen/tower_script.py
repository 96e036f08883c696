"""A tower plan as a training script for ``torchrun``, on this project's runtime."""

from __future__ import annotations

import json
from typing import Any

from codegen.emission import plain
from codegen.script_parts import build_lines, declare, features, input_names, template
from codegen.towers import applied_towers, lookup_node, trace_model
from ir.plan import Plan

_DEFAULT_LR = 0.01


def emit_towers(plan: Plan, model: str, options: dict[str, Any] | None = None) -> str:
    """The text of a script that trains ``model`` in the plan's towers; the plan travels in it.

    Args:
        plan: with towers that are applied.
        model: a zoo name, ``"file.py:callable"`` or ``"module:callable"``, flat or with tower modules.
        options: of the zoo model or the callable.

    Raises:
        InputError: the plan has no towers, the model's lookup cannot be replaced, or its inputs are neither
            floating tensors nor one ``KeyedJaggedTensor``.
    """
    decision = applied_towers(plan)
    options = dict(options or {})
    module, inputs = declare(model, options)
    lookup_node(trace_model(module))
    dense, arguments = input_names(module, inputs)
    return template("towers.py.j2").render(
        model_name=plain(plan.model.name),
        towers=len(decision.towers),
        module=decision.module,
        world_size=plan.world_size,
        hosts=plan.topology.hosts,
        host_size=plan.topology.host_size,
        global_batch=plan.workload.global_batch,
        digest=plan.digest,
        features=features(plan),
        plan=repr(json.dumps(plan.to_dict(), separators=(",", ":"))),
        build=[f"    {line}".rstrip() for line in build_lines(model, options, "cpu")],
        dense=dense,
        arguments=arguments,
        lr=_DEFAULT_LR,
    )
