"""A plan's GEMM formats as a torchao configuration script, for CUDA.

Class names and fields are those of torchao 0.18.0 (PyPI). torchao reads a layer's weight and input in one
configuration, so both must have a format that goes together; embedding tables are not its
business (its tensors have no ``embedding_bag``): TorchRec and FBGEMM hold those.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codegen.emission import plain
from codegen.formats import sites
from ir.errors import InputError
from ir.format_plan import FormatPlan
from ir.formats import Format, parse_format
from ir.plan import Plan

if TYPE_CHECKING:
    from torch import nn

VERSION = "0.18.0"  # of torchao: the fields of its configurations were read from this release

# torchao 0.18.0, prototype/mx_formats/constants.py: SUPPORTED_ELEM_DTYPES
_MX_ELEMENTS = {
    "mxfp8_e4m3": "torch.float8_e4m3fn",
    "mxfp8_e5m2": "torch.float8_e5m2",
    "mxfp6_e2m3": '"fp6_e2m3"',
    "mxfp6_e3m2": '"fp6_e3m2"',
    "mxfp4_e2m1": "torch.float4_e2m1fn_x2",
}
_FP8_ROWS = {"fp8_row": "PerRow()", "fp8_tensor": "PerTensor()"}
_WIDE = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class Configured:
    """One linear layer: the expression of its configuration and the formats it stands for."""

    path: str
    expression: str
    weight: str
    activation: str


def emit_torchao(plan: Plan, model: str, options: dict[str, Any] | None = None) -> str:
    """The text of a script with ``quantize_model(model)`` that quantises GEMMs as the plan says.

    Args:
        plan: a plan with number formats.
        model: a zoo name, ``"file.py:callable"`` or ``"module:callable"``; built on the meta device to find
            the paths of its layers.
        options: of the zoo model or the callable.

    Raises:
        InputError: the plan has no formats, or one that torchao cannot compute in.
    """
    decided = plan.decisions.formats
    if decided is None:
        raise InputError("the plan has no number formats; compile it with constraints.formats set")
    return script(decided, _declared(model, dict(options or {})), plan.model.name, plan.digest)


def _declared(model: str, options: dict[str, Any]) -> nn.Module:
    """The model on the meta device."""
    import torch

    from codegen.runtime.models import ModelSpec

    with contextlib.suppress(ImportError):
        import torchrec.distributed  # noqa: F401 - its imports fail under a meta default device
    if ":" not in model:
        return ModelSpec("planner.zoo:build", (model,), {**options, "device": "meta"}).declare(0)[0]
    with torch.device("meta"):
        return ModelSpec(model, (), options).declare(0)[0]


def script(decided: FormatPlan, module: nn.Module, name: str, digest: str) -> str:
    """The text for a model that is at hand; raises InputError as :func:`emit_torchao`."""
    layers = configurations(decided, module)
    tables = {t.name: t.format for t in decided.tensors if t.kind == "table" and t.format not in _WIDE}
    expressions = list(dict.fromkeys(layer.expression for layer in layers))
    lines = [
        f'"""GEMM formats of {plain(name)} (plan {plain(digest[:16])}) for torchao {VERSION}.',
        "",
        "Call quantize_model(model) on the trained model, on a CUDA device.",
        *_about_tables(tables),
        '"""',
        "",
        "from collections import OrderedDict",
        "",
        *_imports(" ".join(expressions)),
        "",
        "",
        "def configurations(**mx_options):",
        '    """torchao configuration of each linear layer; layers that are missing stay as they are.',
        "",
        "    mx_options go to MX configurations: kernel_preference=KernelPreference.EMULATED runs on a CPU.",
        '    """',
        *(f"    config{number} = {text}" for number, text in enumerate(expressions)),
        "    return OrderedDict(",
        "        {",
    ]
    for layer in layers:
        number = expressions.index(layer.expression)
        said = (
            layer.weight if layer.weight == layer.activation else f"{layer.weight}, input {layer.activation}"
        )
        lines.append(f"            {json.dumps(layer.path)}: config{number},  # {said}")
    lines += [
        "        }",
        "    )",
        "",
        "",
        "def quantize_model(model, **mx_options):",
        '    """Replace the weights of the layers above in place; returns the model."""',
        f'    if torchao.__version__.split("+")[0] != "{VERSION}":',
        f'        raise RuntimeError(f"written for torchao {VERSION}, found {{torchao.__version__}}")',
        "    # filter_fn must be None where layers are named",
        "    quantize_(model, FqnToConfig(fqn_to_config=configurations(**mx_options)), filter_fn=None)",
        "    return model",
    ]
    return "\n".join(lines) + "\n"


def _about_tables(tables: dict[str, str]) -> list[str]:
    if not tables:
        return []
    listed = ", ".join(f"{name} {format}" for name, format in sorted(tables.items())[:8])
    more = f" and {len(tables) - 8} more" if len(tables) > 8 else ""
    return ["", f"Not here: narrow tables ({plain(listed)}{more}); quantise them with TorchRec."]


def _imports(expressions: str) -> list[str]:
    """Import lines for the names that the expressions use."""
    names = ["FqnToConfig", "quantize_"]
    for name in (
        "Float8DynamicActivationFloat8WeightConfig",
        "Float8WeightOnlyConfig",
        "PerRow",
        "PerTensor",
    ):
        names += [name] if f"{name}(" in expressions else []
    formats = [
        name
        for name in (
            "MXDynamicActivationMXWeightConfig",
            "NVFP4DynamicActivationNVFP4WeightConfig",
            "NVFP4WeightOnlyConfig",
            "ScaleCalculationMode",
        )
        if name in expressions
    ]
    lines = ["import torch"] if "torch." in expressions else []
    lines += ["import torchao"]
    if formats:
        lines.append(f"from torchao.prototype.mx_formats import {', '.join(formats)}")
    return [*lines, f"from torchao.quantization import {', '.join(sorted(names, key=str.lower))}"]


def configurations(decided: FormatPlan, module: nn.Module) -> tuple[Configured, ...]:
    """The layers that the plan narrows, in the model's order.

    Raises:
        InputError: a pair of formats that torchao has no configuration for; it names the layer.
    """
    known = sites(module)
    formats: dict[str, dict[str, str]] = {}
    for tensor in decided.tensors:
        site = known.get(tensor.name)
        if site is not None and site.kind in ("weight", "activation"):
            formats.setdefault(site.path, {})[site.kind] = tensor.format
    found = []
    for path, pair in formats.items():
        weight, activation = (parse_format(pair.get(kind, "fp32")) for kind in ("weight", "activation"))
        if weight.base in _WIDE and activation.base in _WIDE:
            continue
        _check_widths(path, module.get_submodule(path), weight)
        found.append(Configured(path, _expression(path, weight, activation), weight.id, activation.id))
    if not found:
        raise InputError("the plan keeps every linear layer wide; there is nothing for torchao to quantise")
    return tuple(found)


def _check_widths(path: str, linear: Any, weight: Format) -> None:
    """MX and NVFP4 take whole blocks; FP8's torch._scaled_mm, multiples of 16 both ways. torchao skips others."""
    inputs, outputs = linear.in_features, linear.out_features
    multiple = weight.block or 16
    if inputs % multiple or (not weight.block and outputs % multiple):
        raise InputError(
            f"layer {path!r} is {inputs} x {outputs}, and torchao computes {weight.id} in multiples of {multiple}; "
            "pin it to bf16 (constraints.formats.rules)"
        )


def _expression(path: str, weight: Format, activation: Format) -> str:
    for format in (weight, activation):
        if (
            format.axis != -1
            or format.rounding != "even"
            or format.block not in (0, parse_format(format.base).block)
        ):
            raise InputError(
                f"layer {path!r}: torchao has no {format.id}; use the format without options but the scale mode"
            )
    bases = weight.base, activation.base
    if weight == activation and weight.base in _MX_ELEMENTS:
        element = _MX_ELEMENTS[weight.base]
        return (
            f"MXDynamicActivationMXWeightConfig(activation_dtype={element}, weight_dtype={element}, "
            f"scaling_mode=ScaleCalculationMode.{weight.scale_mode.upper()}, **mx_options)"
        )
    if bases == ("nvfp4", "nvfp4"):
        return "NVFP4DynamicActivationNVFP4WeightConfig()"
    if weight.base == "nvfp4" and activation.base in _WIDE:
        return "NVFP4WeightOnlyConfig()"
    if weight.base in _FP8_ROWS and activation.base == weight.base:
        # torchao bounds the scales of inputs only; weights have none that large
        bound = "" if activation.scale_bound is None else f", activation_value_ub={activation.scale_bound!r}"
        return f"Float8DynamicActivationFloat8WeightConfig(granularity={_FP8_ROWS[weight.base]}{bound})"
    if weight.base in _FP8_ROWS and activation.base in _WIDE:
        return f"Float8WeightOnlyConfig(granularity={_FP8_ROWS[weight.base]})"
    raise InputError(
        f"layer {path!r}: torchao has no configuration for weights in {weight.id} with inputs in {activation.id}; "
        "allow mxfp8_e4m3, mxfp4_e2m1, nvfp4 or fp8_row for both (constraints.formats.rules)"
    )
