"""What the emitted training scripts share: templates, and how a script builds and feeds its model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.errors import InputError
from ir.plan import Plan

if TYPE_CHECKING:
    import jinja2
    from torch import nn

_TEMPLATES = Path(__file__).with_name("templates")


def template(name: str) -> jinja2.Template:
    """A template of a script."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # the output is Python; names are quoted by tojson or repr
    )
    return environment.get_template(name)


def declare(model: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The model on the meta device, and its example inputs or None; raises InputError when it cannot be built.

    ``model`` and ``options`` as in :func:`codegen.script.emit_torchrec`.
    """
    import torch
    import torchrec.distributed  # noqa: F401 - its imports fail under a meta default device

    from codegen.runtime.models import ModelSpec

    if ":" not in model:
        return ModelSpec("planner.zoo:build", (model,), {**options, "device": "meta"}).declare(0)
    with torch.device("meta"):
        return ModelSpec(model, (), options).declare(0)


def input_names(module: nn.Module, inputs: Any) -> tuple[list[tuple[str, str]], str]:
    """Dense inputs with their shape after the batch, and the names of all inputs in order.

    Raises:
        InputError: an input is neither a floating tensor nor the one ``KeyedJaggedTensor`` without weights.
    """
    from torch import Tensor

    from codegen.runtime.batches import input_shapes, is_jagged

    dense: list[tuple[str, str]] = []
    names = []
    for value in input_shapes(module, 2, inputs):
        if is_jagged(value) and "ids" not in names and value.weights_or_none() is None:
            names.append("ids")
        elif isinstance(value, Tensor) and value.is_floating_point():
            name = f"dense{len(dense) or ''}"
            names.append(name)
            dense.append((name, ", ".join(str(size) for size in value.shape[1:])))
        else:
            raise InputError(
                f"the model takes a {type(value).__name__} that the script cannot make up; its inputs must be "
                "floating tensors and one KeyedJaggedTensor without weights"
            )
    return dense, f"({names[0]},)" if len(names) == 1 else ", ".join(names)


def features(plan: Plan) -> list[tuple[str, int, float]]:
    """Of each feature its name, the rows of its table and the ids a sample."""
    rows = {feature: table.rows for table in plan.table_plans for feature in table.features}
    return [(name, count, plan.workload.stats(name).pooling_factor) for name, count in rows.items()]


def build_lines(model: str, options: dict[str, Any], device: str) -> list[str]:
    """The body of a script's ``build_model``, which makes the model on ``device``."""
    arguments = [f"{key}={value!r}" for key, value in options.items()]
    if ":" not in model:
        return [
            "from planner import zoo",
            "",
            f"return zoo.build({', '.join([repr(model), *arguments, f'device={device!r}'])}).module",
        ]
    where, _, name = model.rpartition(":")
    lines = []
    if where.endswith(".py"):
        folder = os.path.dirname(os.path.abspath(where))
        lines += ["import sys", "", f"sys.path.insert(0, {_quoted(folder)})"]
        where = Path(where).stem
    lines += [f"from {where} import {name}", ""]
    lines += [f'with torch.device("{device}"):', f"    made = {name}({', '.join(arguments)})"]
    return [*lines, "return made[0] if isinstance(made, tuple) else made"]


def _quoted(text: str) -> str:
    """A string literal with double quotes."""
    return json.dumps(text, ensure_ascii=False)
