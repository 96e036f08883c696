"""Capture of models that hold TorchRec collections, compared with the collections' own outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ir.capture import capture
from ir.errors import InputError, TraceError

pytest.importorskip("torchrec")

from torchrec import (  # type: ignore[attr-defined]
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.modules.embedding_configs import DataType, PoolingType

META = torch.device("meta")


def bags(device: torch.device = META, prefix: str = "t", weighted: bool = False) -> Any:
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name=f"{prefix}0",
                num_embeddings=70,
                embedding_dim=8,
                feature_names=["a", "b"],
                pooling=PoolingType.MEAN,
            ),
            EmbeddingBagConfig(
                name=f"{prefix}1",
                num_embeddings=30,
                embedding_dim=4,
                feature_names=["c"],
                data_type=DataType.FP16,
            ),
        ],
        is_weighted=weighted,
        device=device,
    )


def ids(batch: int) -> Any:
    count = 3 * batch
    return KeyedJaggedTensor(
        keys=["a", "b", "c"],
        values=torch.zeros(count, dtype=torch.int64),
        lengths=torch.ones(count, dtype=torch.int32),
    )


class Net(nn.Module):
    def __init__(self, *collections: Any, device: torch.device = META) -> None:
        super().__init__()
        self.parts = nn.ModuleList(collections)
        self.over = nn.Linear(12 * len(collections), 1, device=device)

    def forward(self, sparse: Any) -> Tensor:
        pooled = [part(sparse) for part in self.parts]
        return self.over(torch.cat([kt[key] for kt in pooled for key in ("a", "c")], 1))


def test_a_collection_is_one_lookup() -> None:
    model = capture(Net(bags()))
    assert [o.kind for o in model.ops] == [
        "input",
        "lookup",
        "reshape",
        "reshape",
        "reshape",
        "gemm",
        "output",
    ]
    lookup = model.ops[1]
    assert lookup.tables == ("t0", "t1")
    real = bags(torch.device("cpu"))(ids(16)).values()
    assert lookup.out_shape == tuple(real.shape)
    assert lookup.dtype == "fp32"
    first, second = model.tables
    assert (first.features, first.pooling, first.module) == (("a", "b"), "mean", "parts.0")
    assert (second.dtype, second.pooling) == ("fp16", "sum")


def test_parameter_paths_are_the_modules_own() -> None:
    module = Net(bags(), bags(prefix="u"))
    names = dict(module.named_parameters())
    for table in capture(module).tables:
        assert tuple(names[table.parameter].shape) == (table.rows, table.dim)
    model = capture(module)
    assert model.embedding_params + model.dense_params == sum(p.numel() for p in module.parameters())


def test_a_graph_made_by_torchrecs_own_tracer() -> None:
    from torchrec.fx import symbolic_trace

    module = Net(bags())
    graph = symbolic_trace(module, leaf_modules=["EmbeddingBagCollection"])
    direct, traced = capture(module, name="net"), capture(graph, name="net")
    assert traced.tables == direct.tables
    assert [o.kind for o in traced.ops] == [o.kind for o in direct.ops]


def test_collections_of_different_features_read_one_input() -> None:
    def collection(name: str) -> Any:
        config = EmbeddingBagConfig(
            name=name, num_embeddings=5, embedding_dim=4, feature_names=[f"of_{name}"]
        )
        return EmbeddingBagCollection([config], device=META)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = collection("a"), collection("b")

        def forward(self, sparse: Any) -> Tensor:
            return self.left(sparse)["of_a"] * self.right(sparse)["of_b"]

    assert [table.features for table in capture(Two()).tables] == [("of_a",), ("of_b",)]


def test_the_callers_batch_is_used() -> None:
    model = capture(Net(bags()), example_inputs=ids(5))
    assert model.ops[0].out_shape == (5, 3)
    assert model.ops[-1].out_shape == (5, 1)


def test_a_collection_alone_is_a_model() -> None:
    model = capture(bags(weighted=True))
    assert [table.parameter for table in model.tables] == [
        "embedding_bags.t0.weight",
        "embedding_bags.t1.weight",
    ]
    assert all(table.module == "" and table.weighted for table in model.tables)


def test_sequence_collections() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ec = EmbeddingCollection(
                [EmbeddingConfig(name="t", num_embeddings=70, embedding_dim=8, feature_names=["a", "b"])],
                device=META,
            )
            self.over = nn.Linear(8, 1, device=META)

        def forward(self, sparse: Any) -> Tensor:
            return self.over(self.ec(sparse)["a"].to_padded_dense(4).sum(1))

    model = capture(Sequence())
    (table,) = model.tables
    assert (table.pooling, table.parameter) == ("none", "ec.embeddings.t.weight")
    assert next(o for o in model.ops if o.name == "to_padded_dense").out_shape == (16, 4, 8)
    assert model.ops[-1].phase == "top"


def test_the_same_table_name_in_two_collections_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"two tables are called 't0' \(in 'parts.0' and 'parts.1'\); rename one"
    ):
        capture(Net(bags(), bags()))


def test_a_missing_feature_is_named_with_the_line() -> None:
    sparse = KeyedJaggedTensor(
        keys=["a"], values=torch.zeros(2, dtype=torch.int64), lengths=torch.ones(2, dtype=torch.int32)
    )
    with pytest.raises(TraceError, match=r"test_capture_torchrec.py:\d+: .*lacks feature 'b'"):
        capture(Net(bags()), example_inputs=sparse)


def test_an_empty_table_is_refused() -> None:
    empty = EmbeddingBagCollection(
        [EmbeddingBagConfig(name="t", num_embeddings=4, embedding_dim=0, feature_names=["a"])], device=META
    )
    with pytest.raises(InputError, match=r"table 't' has shape \(4, 0\)"):
        capture(empty)
