"""Wukong against the paper's equations written out, and against its published counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ir.capture import capture
from ir.errors import InputError
from planner.zoo import build
from planner.zoo.wukong import WukongLayer

DATA = Path(__file__).parent.parent / "planner" / "data" / "measured" / "published_figures.json"
PUBLISHED = json.loads(DATA.read_text(encoding="utf-8"))["wukong"]

SIZES = {  # l, n, k, MLP of table 5 to the zoo's name
    (2, 8, 24, "3x2048"): "wukong-l2",
    (4, 32, 24, "3x2048"): "wukong-l4",
    (8, 32, 24, "3x2048"): "wukong-l8",
    (8, 48, 48, "3x4096"): "wukong-l8-n48",
    (8, 96, 96, "3x8192"): "wukong-l8-n96",
    (8, 96, 96, "3x16384"): "wukong-l8-n96-wide",
    (8, 192, 192, "3x16384"): "wukong-l8-n192",
}


def layer_written_out(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The paper's equations with the full n x n factorisation machine, one sample at a time."""
    made = []
    for sample in x:
        machine = (sample @ sample.T) @ layer.fmb.y
        flat = F.layer_norm(machine.reshape(-1), machine.reshape(-1).shape)
        for index, part in enumerate(layer.fmb.mlp):
            flat = F.relu(flat) if index % 2 else part.weight @ flat + part.bias
        fmb = flat.reshape(layer.fmb.out, -1)
        whole = torch.cat([fmb, layer.lcb.weight @ sample])
        shortcut = sample if whole.shape == sample.shape else layer.shortcut.weight @ sample
        whole = whole + shortcut
        centred = whole - whole.mean(1, keepdim=True)
        made.append(centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt())
    return torch.stack(made)


@pytest.mark.parametrize("vectors", [5, 7])  # 7 = n_F + n_L: the shortcut is the identity
def test_a_layer_is_the_papers_equations(vectors: int) -> None:
    torch.manual_seed(0)
    layer = WukongLayer(vectors, 6, fmb=3, lcb=4, rank=2, hidden=(8, 9), device="cpu").double()
    x = torch.randn(4, vectors, 6, dtype=torch.float64)
    found = layer(x)
    assert found.shape == (4, 7, 6)
    assert torch.allclose(found, layer_written_out(layer, x), atol=1e-10)


def test_the_cost_of_a_layer_grows_linearly_with_the_vectors() -> None:
    """O(n k d), not O(n^2 d): the factorisation machine is never formed."""
    flops = []
    for vectors in (100, 200, 400):
        layer = WukongLayer(vectors, 8, fmb=2, lcb=2, rank=4, hidden=(16,), device="cpu")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(torch.zeros(1, vectors, 8))
        flops.append(counter.get_total_flops())
    assert flops[2] - flops[1] == 2 * (flops[1] - flops[0])


def test_table_3() -> None:
    params, mflop = PUBLISHED["table3_criteo_tb"]["Wukong"]
    model = capture(build("wukong-criteo").module)
    assert model.embedding_params + model.dense_params == pytest.approx(params, rel=1e-3)
    # nearly all of that are tables; the dense part alone is one fit, and not exact
    assert model.dense_params == pytest.approx(params - model.embedding_params, rel=3e-3)
    assert 3 * model.dense_flops / 1e6 == pytest.approx(mflop, rel=3e-3)


@pytest.mark.parametrize("row", PUBLISHED["table5_wukong"], ids=lambda row: f"{row['gflop_per_example']}")
def test_table_5(row: dict[str, Any]) -> None:
    model = capture(build(SIZES[row["l"], row["nF"], row["k"], row["mlp"]], embeddings="plain").module)
    assert row["nF"] == row["nL"]
    # forward and backward, 6 FLOP per multiply-add; one free parameter, the vectors of the first layer
    assert 3 * model.dense_flops / 1e9 == pytest.approx(row["gflop_per_example"], rel=0.25)
    assert model.embedding_params / 1e9 == pytest.approx(PUBLISHED["constants"]["sparse_params_B"], rel=1e-6)
    assert (model.embedding_params + model.dense_params) / 1e9 == pytest.approx(row["params_B"], rel=0.01)


@pytest.mark.parametrize("name", ["wukong-small", "dhen-small"])
def test_small_models_train_with_the_flops_captured(name: str) -> None:
    pytest.importorskip("torchrec")
    torch.manual_seed(0)
    made = build(name, row_cap=50, device="cpu")
    module: Any = made.module
    dense, sparse, labels = module.random_batch(64, made.workload, seed=1)
    # torch's counter does not know the fused attention of CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        assert module(dense, sparse).shape == (64,)
    assert counter.get_total_flops() == capture(module).dense_flops * 64
    optimizer = torch.optim.Adam(module.parameters(), lr=0.005)
    losses = []
    for _ in range(40):
        loss = F.binary_cross_entropy_with_logits(module(dense, sparse), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2  # one batch can be learnt by heart
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("wukong-small", {"rank": 0}, "rank must be at least 1, not 0"),
        ("wukong-small", {"bottom": (64, 20)}, "ends with 20"),
        ("dhen-small", {"modules": ("dlrm", "atention")}, r"did you mean 'attention'\?"),
        ("dhen-small", {"ensemble": "mean"}, "must be one of concat, sum, weighted"),
        ("dhen-small", {"heads": 3}, "3 attention heads do not divide vectors of 16 columns"),
        ("dhen-small", {"layers": 0}, "at least one layer"),
    ],
)
def test_mistakes(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        build(name, **options)
