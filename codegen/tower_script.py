"""A tower plan as a training script for ``torchrun``, on this project's runtime."""

from __future__ import annotations

import json
from typing import Any

from codegen.script import _build_lines, _declare, _features, _inputs, _plain, _template
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
    module, inputs = _declare(model, options)
    lookup_node(trace_model(module))
    dense, arguments = _inputs(module, inputs)
    return _template("towers.py.j2").render(
        model_name=_plain(plan.model.name),
        towers=len(decision.towers),
        module=decision.module,
        world_size=plan.world_size,
        hosts=plan.topology.hosts,
        host_size=plan.topology.host_size,
        global_batch=plan.workload.global_batch,
        digest=plan.digest,
        features=_features(plan),
        plan=repr(json.dumps(plan.to_dict(), separators=(",", ":"))),
        build=[f"    {line}".rstrip() for line in _build_lines(model, options, "cpu")],
        dense=dense,
        arguments=arguments,
        lr=_DEFAULT_LR,
    )
