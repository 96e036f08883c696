"""The interaction modules of DHEN against torch's own layers and against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ir.capture import capture
from planner.zoo import build
from planner.zoo.dhen import (
    ENSEMBLES,
    MODULES,
    AdvancedDLRM,
    Convolution,
    CrossModule,
    DHENLayer,
    SelfAttention,
)

B, N, D, OUT = 3, 5, 8, 4


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(B, N, D, dtype=torch.float64)


def test_attention_is_torchs_transformer_encoder_layer(x: Tensor) -> None:
    ours = SelfAttention(N, D, OUT, 2, 16, "cpu").double()
    torchs = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, activation="gelu", batch_first=True).double()
    weights = {
        "self_attn.in_proj_weight": torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]),
        "self_attn.in_proj_bias": torch.cat([ours.query.bias, torch.zeros(D), ours.value.bias]),
        "self_attn.out_proj.weight": ours.project.weight,
        "self_attn.out_proj.bias": ours.project.bias,
        "linear1.weight": ours.feed_forward[0].weight,  # type: ignore[union-attr]
        "linear1.bias": ours.feed_forward[0].bias,  # type: ignore[union-attr]
        "linear2.weight": ours.feed_forward[2].weight,  # type: ignore[union-attr]
        "linear2.bias": ours.feed_forward[2].bias,  # type: ignore[union-attr]
    }
    torchs.load_state_dict({**torchs.state_dict(), **weights})
    expected = torch.einsum("ln,bnd->bld", ours.compress.weight, torchs(x))
    assert torch.allclose(ours(x), expected, atol=1e-10)


def test_cross_is_w_x_xt_brought_to_d_columns(x: Tensor) -> None:
    module = CrossModule(N, D, OUT, "cpu").double()
    for sample, found in zip(x, module(x), strict=True):
        square = module.compress.weight @ (sample @ sample.T)
        assert torch.allclose(found, square @ module.project.weight.T + module.project.bias)


def test_advanced_dlrm_reads_every_pair_once_and_the_compressed_vectors(x: Tensor) -> None:
    module = AdvancedDLRM(N, D, OUT, (16,), "cpu").double()
    for sample, found in zip(x, module(x), strict=True):
        dots = [sample[i] @ sample[j] for i in range(N) for j in range(i)]
        inputs = torch.cat([torch.stack(dots), (module.compress.weight @ sample).reshape(-1)])
        assert torch.allclose(found.reshape(-1), module.mlp(inputs))


def test_convolution_sees_the_neighbourhood_only(x: Tensor) -> None:
    module = Convolution(N, D, N, 2, 3, "cpu").double()
    with torch.no_grad():
        module.compress.weight.copy_(torch.eye(N))
    changed = x.clone()
    changed[:, 0, 0] += 1
    moved = (module(changed) - module(x)).abs().sum(0) > 0
    assert moved[:2, :2].any()
    assert not moved[2:].any()
    assert not moved[:, 2:].any()


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("vectors", [N, OUT])
def test_a_layer_normalises_the_ensemble_and_the_shortcut(ensemble: str, vectors: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(B, vectors, D, dtype=torch.float64)
    layer: Any = DHENLayer(vectors, D, OUT, MODULES, ensemble, (16,), 2, "cpu").double()
    if ensemble == "weighted":
        with torch.no_grad():
            layer.mix.copy_(torch.arange(1.0, 6.0).view(5, 1, 1, 1))
    found = layer(x)
    assert found.shape == (B, layer.vectors, D)
    parts = [expert(x) for expert in layer.experts]
    weights = {"sum": [1.0] * 5, "weighted": [1.0, 2.0, 3.0, 4.0, 5.0]}.get(ensemble, [])
    together = (
        sum(w * part for w, part in zip(weights, parts, strict=True)) if weights else torch.cat(parts, 1)
    )
    same = vectors == layer.vectors
    shortcut = x if same else torch.stack([layer.shortcut.weight @ sample for sample in x])
    assert torch.allclose(found, F.layer_norm(together + shortcut, (D,)))


def test_the_kinds_of_work_are_captured() -> None:
    model = capture(build("dhen-2").module)
    by_kind = {op.kind for op in model.ops if op.phase == "top"}
    assert {"gemm", "interaction", "attention", "norm", "elementwise"} <= by_kind
    assert sum(op.target == "Conv2d" for op in model.ops) == 2 * 2
    assert sum(op.kind == "attention" for op in model.ops) == 2
    small, large = (capture(build(name).module).dense_flops for name in ("dhen-2", "dhen-8"))
    assert large > 3 * small
