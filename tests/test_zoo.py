"""The zoo against published parameter, row and FLOP counts; its models train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import planner
from ir.capture import capture
from ir.errors import InputError
from ir.program import Model
from planner.models import resolve
from planner.zoo import build, descriptions, zoo_names

ROOT = Path(__file__).parent.parent

# Wukong (arXiv 2403.02545v4), table 3, Criteo Terabyte: parameters, and MFLOP of forward and backward
WUKONG = {"DLRM": (26_136_307_201, 4.62), "DCNv2": (26_179_364_097, 262.35)}
# Both published counts are 384 (three times the dim of 128) below the layers they describe.
LEFT_OUT = 384


def training_mflop(model: Model) -> float:
    """Forward and backward: 6 FLOP per multiply-add, less the first layer's gradient of its input."""
    first = next(op for op in model.ops if op.gemm is not None)
    assert first.module.startswith("bottom")
    return (3 * model.dense_flops - first.flops) / 1e6


@pytest.mark.parametrize("name", zoo_names())
@pytest.mark.parametrize("embeddings", ["torchrec", "plain"])
def test_counts_are_those_of_the_module(name: str, embeddings: str) -> None:
    if embeddings == "torchrec":
        pytest.importorskip("torchrec")
    module = build(name, embeddings=embeddings).module
    assert all(parameter.is_meta for parameter in module.parameters())
    model = capture(module)
    assert model.embedding_params + model.dense_params == sum(p.numel() for p in module.parameters())
    paths = dict(module.named_parameters())
    assert all(tuple(paths[t.parameter].shape) == (t.rows, t.dim) for t in model.tables)


def test_both_kinds_of_embeddings_give_the_same_tables_and_dense_part() -> None:
    pytest.importorskip("torchrec")
    bags, plain = (capture(build("dlrm-dcnv2", embeddings=kind).module) for kind in ("torchrec", "plain"))
    shapes = [
        [(t.name.rpartition(".")[2], t.rows, t.dim, t.features, t.pooling) for t in model.tables]
        for model in (bags, plain)
    ]
    assert shapes[0] == shapes[1]
    assert (bags.dense_params, bags.dense_flops) == (plain.dense_params, plain.dense_flops)


def test_wukongs_dlrm() -> None:
    # bottom 512-256-128, dot interaction, top two layers of 512; tables of MLPerf's multi-hot set
    model = capture(build("dlrm", tables="mlperf_dlrm_dcnv2.json", top=(512, 512, 1)).module)
    params, mflop = WUKONG["DLRM"]
    assert model.embedding_params == 204_184_588 * 128
    assert model.dense_params == 680_321
    assert model.embedding_params + model.dense_params - LEFT_OUT == params
    assert training_mflop(model) == pytest.approx(mflop, rel=1e-3)


def test_wukongs_dcnv2() -> None:
    # two full-rank cross layers, top four layers of 2048
    model = capture(build("dlrm-dcnv2", cross_layers=2, cross_rank=None, top=(2048,) * 4 + (1,)).module)
    params, mflop = WUKONG["DCNv2"]
    assert model.dense_params == 43_737_217
    assert model.embedding_params + model.dense_params - LEFT_OUT == params
    assert training_mflop(model) == pytest.approx(mflop, rel=1e-3)


def test_mlperf_dcnv2() -> None:
    made = build("dlrm-dcnv2")
    model = capture(made.module)
    assert round(model.embedding_params * 4 / 2**30, 1) == 97.4  # GiB, fp32; the published storage
    assert sum(stats.pooling_factor for stats in made.workload.features.values()) == 214
    # by hand: 13-512-256-128; three layers 3456-512-3456 with one bias; 3456-1024-1024-512-256-1
    bottom = 13 * 512 + 512 + 512 * 256 + 256 + 256 * 128 + 128
    cross = 3 * (2 * 3456 * 512 + 3456)
    top = 3456 * 1024 + 1024 + 1024**2 + 1024 + 1024 * 512 + 512 + 512 * 256 + 256 + 257
    assert model.dense_params == bottom + cross + top


def test_published_row_counts() -> None:
    assert sum(t.rows for t in capture(build("dlrm-kaggle").module).tables) == 33_762_577
    model, _ = _tables("criteo_terabyte_variants.json#uncapped_T0")
    assert sum(t.rows for t in model.tables) == 882_774_559


def _tables(which: str) -> Any:
    from ir.tables import load_tables

    return load_tables(ROOT / "planner" / "data" / "tables" / which)


@pytest.mark.parametrize(
    ("model", "gib"),
    [
        ("tiny", 4.2),
        ("small", 26.3),
        ("medium", 206.2),
        ("large", 773.8),
        ("jumbo", 3109.5),
        ("colossal", 22327.4),
    ],
)
def test_published_storage_of_nvidias_synthetic_models(model: str, gib: float) -> None:
    captured, _ = _tables(f"nvidia_synthetic_models.json#{model}")
    assert captured.embedding_params * 4 / 2**30 == pytest.approx(gib, abs=0.06)


@pytest.mark.parametrize("embeddings", ["torchrec", "plain"])
@pytest.mark.parametrize("name", ["dlrm-small", "dlrm-dcnv2-small"])
def test_models_train_on_the_cpu_with_the_flops_captured(name: str, embeddings: str) -> None:
    if embeddings == "torchrec":
        pytest.importorskip("torchrec")
    torch.manual_seed(0)
    made = build(name, row_cap=50, device="cpu", embeddings=embeddings)
    module: Any = made.module
    dense, sparse, labels = module.random_batch(64, made.workload, seed=1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert module(dense, sparse).shape == (64,)
    assert counter.get_total_flops() == capture(module).dense_flops * 64
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.005)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(module(dense, sparse), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2  # one batch can be learnt by heart
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_both_kinds_of_embeddings_compute_the_same() -> None:
    pytest.importorskip("torchrec")
    bags: Any = build("dlrm-small", row_cap=40, device="cpu", embeddings="torchrec")
    plain: Any = build("dlrm-small", row_cap=40, device="cpu", embeddings="plain")
    weights = {
        key.replace("ebc.embedding_bags", "ebc.bags"): value
        for key, value in bags.module.state_dict().items()
    }
    plain.module.load_state_dict(weights)
    dense, jagged, _ = bags.module.random_batch(8, bags.workload, seed=3)
    _, ids, _ = plain.module.random_batch(8, plain.workload, seed=3)
    assert torch.equal(bags.module(dense, jagged), plain.module(dense, ids))


def test_the_dot_interaction_is_all_pairs() -> None:
    from planner.zoo.layers import DotInteraction

    vectors = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))  # B, F + 1, D
    out = DotInteraction()(vectors[:, 0], [vectors[:, 1], vectors[:, 2]])
    pairs = [(vectors[:, i] * vectors[:, j]).sum(1) for i in range(3) for j in range(i)]
    assert torch.allclose(out, torch.cat([vectors[:, 0], torch.stack(pairs, 1)], 1))


def test_random_batches_follow_the_workload_and_the_seed() -> None:
    pytest.importorskip("torchrec")
    made: Any = build("dlrm-dcnv2-small", device="cpu", row_cap=30)
    _, sparse, _ = made.module.random_batch(16, made.workload, seed=5)
    for key in sparse.keys():  # noqa: SIM118  a KeyedJaggedTensor is no mapping
        assert int(sparse[key].lengths().sum()) == 16 * made.workload.stats(key).pooling_factor
    assert int(sparse.values().max()) < 30
    _, again, _ = made.module.random_batch(16, made.workload, seed=5)
    _, other, _ = made.module.random_batch(16, made.workload, seed=6)
    assert torch.equal(sparse.values(), again.values())
    assert not torch.equal(sparse.values(), other.values())


def test_row_cap_and_other_options() -> None:
    made = build("dlrm", row_cap=1000, dim=16, bottom=(32, 16), top=(8, 1), global_batch=512)
    model = capture(made.module)
    assert max(t.rows for t in model.tables) == 1000
    assert {t.dim for t in model.tables} == {16}
    assert made.workload.global_batch == 512
    assert {name: build(name).description for name in zoo_names()} == descriptions()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("dlrm-dcnv3", {}, r"no model 'dlrm-dcnv3' in the zoo \(did you mean 'dlrm-dcnv2'\?\)"),
        ("dlrm", {"row_kap": 3}, r"dlrm has no option 'row_kap' \(did you mean 'row_cap'\?\)"),
        ("dlrm", {"row_cap": 0}, "row_cap must be at least 1"),
        ("dlrm", {"bottom": (64,)}, r"dims \[128\] and the bottom MLP ends with \[64\]"),
        ("dlrm", {"embeddings": "other"}, "must be 'torchrec' or 'plain', not 'other'"),
        ("dlrm", {"tables": "nowhere.json"}, "nowhere.json does not exist"),
    ],
)
def test_mistakes(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        build(name, **options)


def test_listing_the_zoo_and_reading_tables_imports_no_torch() -> None:
    code = (
        "import sys; from planner.zoo import zoo_names; from planner.models import resolve; "
        "resolve('planner/data/tables/mlperf_dlrm_dcnv2.json'); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "False"


# ---- what MODEL may be ----


def test_a_zoo_name() -> None:
    found = resolve("dlrm-small")
    assert found.model.name == "dlrm-small"
    assert found.workload is not None
    assert found.workload.global_batch == 4096
    assert found.module is not None


MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.over = nn.EmbeddingBag(40_000_000, 128), nn.Linear(128, 1)

    def forward(self, ids):
        return self.over(self.bag(ids))

def build():
    return Net()

def with_inputs():
    return Net(), (torch.zeros(4, 7, dtype=torch.int64),)

def broken():
    return Net().nothing

def number():
    return 3
"""


def test_a_callable_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(MODULE)
    found = resolve(f"{file}:build")
    assert found.model.name == "net:build"
    assert found.model.embedding_params == 40_000_000 * 128  # 19 GiB that nobody allocated
    assert resolve(f"{file}:with_inputs").model.ops[0].out_shape == (4, 7)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{dir}/net.py:bild", r"no callable 'bild' \(did you mean 'build'\?\)"),
        ("{dir}/net.py:broken", r"net.py:20 failed while broken\(\) built the model: AttributeError"),
        ("{dir}/net.py:number", "returned int; it must return an nn.Module"),
        ("{dir}/net.py", "needs the name of a callable"),
        ("{dir}/other.py:build", "other.py does not exist"),
        ("{dir}/syntax.py:build", "syntax.py:2 is not Python"),
        ("{dir}/raises.py:build", "raises.py:1 failed while it was imported: ZeroDivisionError"),
        ("{dir}/none.json", "none.json does not exist"),
        ("dlrm-dcn", r"no model 'dlrm-dcn' \(did you mean 'dlrm-dcnv2'\?\)"),
    ],
)
def test_models_that_cannot_be_had(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "net.py").write_text(MODULE)
    (tmp_path / "syntax.py").write_text("x = 1\ny = (\n")
    (tmp_path / "raises.py").write_text("x = 1 / 0\n")
    with pytest.raises(InputError, match=says):
        resolve(text.format(dir=tmp_path))


def test_options_are_for_the_zoo(tmp_path: Path) -> None:
    file = tmp_path / "tables.json"
    file.write_text(json.dumps({"tables": [{"name": "a", "rows": 3, "dim": 4}]}))
    with pytest.raises(InputError, match="options such as 'row_cap' are for models of the zoo"):
        resolve(file, row_cap=3)
    assert resolve(file).model.name == "tables"


def test_a_model_of_the_zoo_is_taken_where_a_module_is() -> None:
    pytest.importorskip("torchrec")
    made = build("dlrm-small", row_cap=100)
    plan = planner.compile(made, "local-2")
    assert plan.digest == planner.compile(made.module, "local-2", made.workload, name="dlrm-small").digest
    assert str(plan.to_torchrec(made)) == str(plan.to_torchrec(made.module))
    for verb in (plan.to_torchrec, plan.apply):
        with pytest.raises(InputError, match=r"a str is no model; .* what planner.zoo.build\(\) returns"):
            verb("dlrm-small")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="or pass a process group"):  # past the model
        plan.apply(made)
