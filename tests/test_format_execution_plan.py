"""From a request to a model that computes: compile, apply, emit."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import planner
from codegen.formats import apply_formats, sites
from codegen.runtime.format_tables import IntegerEmbeddingBag
from codegen.runtime.mx import fake_quantize
from ir.constraints import Constraints
from ir.errors import InputError
from ir.format_plan import FormatRequest
from planner.cli import cli
from planner.zoo import build

SOURCE = Path(__file__)


def make_model(device: str = "meta") -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = build(
        "dlrm",
        tables=[{"name": name, "rows": rows, "dim": 32} for name, rows in (("a", 400), ("b", 900))],
        dense_features=32,
        bottom=(64, 32),
        top=(64, 1),
        device=device,
    ).module
    return made


def test_a_plan_for_serving_runs_on_the_kernels_it_was_made_for() -> None:
    model = make_model("cpu")
    request = FormatRequest(objective="memory", max_loss=0.05, rules={"a": ("int8",), "b": ("int4",)})
    plan = planner.compile(model, "local-1", mode="inference", constraints=Constraints(formats=request))
    assert plan.decisions.formats is not None
    assert plan.decisions.formats.format_of("b") == "int4"
    served = plan.apply(model)
    kernels = [module for module in served.modules() if isinstance(module, IntegerEmbeddingBag)]
    assert len(kernels) == 2
    dense, ids = model.example_inputs(8)  # type: ignore[operator]
    by_hand = make_model("cpu")
    with torch.no_grad():
        for path, format in (("a", "int8"), ("b", "int4")):
            weight = by_hand.get_parameter(f"ebc.embedding_bags.{path}.weight")
            weight.copy_(fake_quantize(weight, format, -1))
        wide = {n: f for n, f in ((t.name, t.format) for t in plan.decisions.formats.tensors) if "." in n}
        assert torch.allclose(
            served(dense, ids), apply_formats(by_hand, wide, training=False)(dense, ids), atol=1e-6
        )
    other = build("dlrm-small", device="meta").module
    with pytest.raises(InputError, match="apply the plan to the model it is for"):
        plan.apply(other, inplace=True)


def test_a_plan_for_training_reads_master_weights_through_its_formats() -> None:
    model = make_model("cpu")
    layers = [name.removesuffix(".weight") for name in sites(model) if name.endswith(".weight")]
    request = FormatRequest(
        objective="loss",
        average_bits=7.0,
        kernels="emulate",
        formats=dict.fromkeys(("table", "weight", "activation"), ("mx9", "mx6", "mx4")),  # type: ignore[arg-type]
        groups=tuple((f"{layer}.weight", f"{layer}.input") for layer in layers),
    )
    plan = planner.compile(model, "local-1", constraints=Constraints(formats=request))
    decided = plan.decisions.formats
    assert decided is not None
    assert decided.average_bits <= 7.0
    for layer in layers:
        assert decided.format_of(f"{layer}.weight") == decided.format_of(f"{layer}.input")
    made = plan.apply(model, gradient="mx9")
    dense, ids = model.example_inputs(16)  # type: ignore[operator]
    made(torch.randn_like(dense), ids).square().sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())  # a copy


def test_the_command_emits_a_script_for_torchao(tmp_path: Path) -> None:
    runner = CliRunner()
    limits, out, script = tmp_path / "limits.yaml", tmp_path / "plan.json", tmp_path / "narrow.py"
    limits.write_text(
        "formats:\n  objective: memory\n  max_loss: 1.0\n  rules:\n"
        '    "bottom_0.*": [mxfp8_e4m3]\n    "bottom_2.*": [fp32]\n    "top_*": [fp32]\n'
    )
    model = f"{SOURCE}:make_model"
    arguments = [
        "compile",
        model,
        "--topology",
        "b200-1x2",
        "--mode",
        "inference",
        "--constraints",
        str(limits),
    ]
    done = runner.invoke(cli, [*arguments, "-o", str(out)])
    assert done.exit_code == 0, done.output
    done = runner.invoke(cli, ["emit", str(out), "--target", "torchao", "-o", str(script)])
    assert done.exit_code == 0, done.output
    text = script.read_text()
    ast.parse(text)
    assert '"bottom.0": config0,  # mxfp8_e4m3' in text
    assert "scaling_mode=ScaleCalculationMode.FLOOR" in text
    bare = runner.invoke(cli, ["compile", model, "--topology", "local-1", "-o", str(out)])
    assert bare.exit_code == 0, bare.output
    refused = runner.invoke(cli, ["emit", str(out), "--target", "torchao"])
    assert refused.exit_code == 2
    assert "constraints.formats" in refused.output
