"""The torchao script: its classes and fields against the wheel's, its numbers against torchao where installed."""

from __future__ import annotations

import ast
import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from codegen.formats import apply_formats
from codegen.torchao import script
from ir.errors import InputError
from ir.format_plan import FormatPlan, TensorFormat, TensorKind

FIELDS = json.loads((Path(__file__).parent / "data" / "torchao_fields.json").read_text())["classes"]
ALL = (
    "mxfp8_e4m3:rceil",
    "mxfp8_e5m2",
    "mxfp6_e2m3:even",
    "mxfp6_e3m2:ceil",
    "mxfp4_e2m1",
    "nvfp4",
    "fp8_row:bound=1200",
)


def model_of(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64, bias=i % 2 == 0) for i in range(layers)))


def planned(pairs: list[tuple[str, str]]) -> FormatPlan:
    def tensor(name: str, kind: TensorKind, format: str) -> TensorFormat:
        return TensorFormat(name, kind, format, 4096, 8, 0.0)

    tensors = [
        tensor(f"_{layer}.{suffix}", kind, format)
        for layer, pair in enumerate(pairs)
        for suffix, kind, format in (("weight", "weight", pair[0]), ("input", "activation", pair[1]))
    ]
    return FormatPlan("memory", 0, 0, 0, 0, 8, 0, 0, "test", tuple(tensors))


def test_every_class_and_field_is_torchaos() -> None:
    pairs = [(name, name) for name in ALL] + [("fp8_tensor", "bf16"), ("nvfp4", "fp32"), ("fp32", "fp32")]
    text = script(planned(pairs), model_of(len(pairs)), 'a "model"', "0" * 64)
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    configured = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in FIELDS]
    for call in configured:
        assert isinstance(call.func, ast.Name)
        assert not call.args
        assert {keyword.arg for keyword in call.keywords} - {None} <= set(FIELDS[call.func.id])
    assert {call.func.id for call in configured} == set(FIELDS)  # type: ignore[attr-defined]
    imported = {
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert imported <= used
    assert '"8"' in text
    assert '"9"' not in text  # fp32 stays as it is
    assert "activation_value_ub=1200.0" in text
    assert "ScaleCalculationMode.EVEN" in text


def test_what_torchao_cannot_compute_is_refused_by_layer() -> None:
    for pair in (("mx9", "mx9"), ("mxfp8_e4m3", "mxfp8_e4m3:rceil"), ("mxint8", "mxint8"), ("int8", "bf16")):
        with pytest.raises(InputError, match="layer '1': torchao has no"):
            script(planned([("fp32", "fp32"), pair]), model_of(2), "m", "0")
    with pytest.raises(InputError, match="away"):
        script(planned([("mxfp4_e2m1:away", "mxfp4_e2m1:away")]), model_of(1), "m", "0")
    for format, shape in (("mxfp8_e4m3", (48, 64)), ("fp8_row", (64, 24)), ("nvfp4", (24, 64))):
        with pytest.raises(InputError, match="in multiples of"):
            script(planned([(format, format)]), nn.Sequential(nn.Linear(*shape)), "m", "0")
    with pytest.raises(InputError, match="nothing for torchao"):
        script(planned([("bf16", "bf16")]), model_of(1), "m", "0")


def test_the_script_computes_what_the_plan_says() -> None:
    """Bit for bit, in torchao's own emulation; needs torchao 0.18.0."""
    torchao = pytest.importorskip("torchao")
    if not torchao.__version__.startswith("0.18.0"):
        pytest.skip("another torchao")
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    pairs = [(name, name) for name in ALL[:5]]
    model = model_of(5).to(torch.bfloat16)
    decided = planned(pairs)
    scope: dict[str, object] = {}
    exec(script(decided, model, "m", "0"), scope)
    theirs = scope["quantize_model"](  # type: ignore[operator]
        copy.deepcopy(model), kernel_preference=KernelPreference.EMULATED
    )
    ours = apply_formats(model, {t.name: t.format for t in decided.tensors}, training=False)
    x = torch.randn(9, 64).bfloat16()
    assert torch.equal(theirs(x), ours(x))
    assert not torch.equal(theirs(x), model(x))
