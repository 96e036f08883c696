"""What the tower tests run in other processes: the tower form beside the flat model, on the same batch."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from codegen.runtime.gather import gather_rows
from codegen.runtime.launch import Rank
from codegen.runtime.towers.modules import tower_module
from codegen.towers import tower_model, whole_tables
from ir.plan import Plan

DIM = 8


class Model(nn.Module):
    """Pooled tables, optionally tower modules over groups of their features, and an over-arch."""

    def __init__(
        self, tables: list[list[Any]], groups: list[list[str]] | None, kind: str, weighted: bool = False
    ) -> None:
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        from torchrec.modules.embedding_configs import PoolingType

        super().__init__()
        self.ebc = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=rows,
                    embedding_dim=dim,
                    feature_names=features,
                    pooling=PoolingType[pooling.upper()],
                )
                for name, rows, dim, features, pooling in tables
            ],
            is_weighted=weighted,
            device=torch.device("cpu"),
        )
        self.groups = groups
        width = sum(dim * len(features) for _, _, dim, features, _ in tables)
        if groups:
            outs = [max(1, len(group) // 2) for group in groups]
            self.towers = nn.ModuleList(
                tower_module(kind, len(g), DIM, out)  # type: ignore[arg-type]
                for g, out in zip(groups, outs, strict=True)
            )
            width = DIM * sum(outs)
        self.names = [feature for table in tables for feature in table[3]]
        self.top = nn.Sequential(nn.Linear(width + 3, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, dense: Tensor, ids: Any) -> Tensor:
        pooled = self.ebc(ids)
        if self.groups:
            vectors = [
                tower(torch.stack([pooled[f] for f in group], dim=1)).flatten(1)
                for tower, group in zip(self.towers, self.groups, strict=True)
            ]
        else:
            vectors = [pooled[name] for name in self.names]
        return self.top(torch.cat([dense, *vectors], dim=1)).squeeze(-1)


def batch(tables: list[list[Any]], sizes: list[int], seed: int, weighted: bool) -> list[tuple[Tensor, Any]]:
    """Each rank's samples; bags of 0 to 3 ids, and one feature that is empty throughout on the last rank."""
    from torchrec import KeyedJaggedTensor

    random = torch.Generator().manual_seed(seed)
    made = []
    for rank, size in enumerate(sizes):
        keys, values, lengths = [], [], []
        for _, rows, _, features, _ in tables:
            for feature in features:
                keys.append(feature)
                count = torch.randint(0, 4, (size,), generator=random, dtype=torch.int32)
                if rank == len(sizes) - 1 and len(keys) == 1:
                    count.zero_()
                lengths.append(count)
                values.append(torch.randint(0, rows, (int(count.sum()),), generator=random))
        weights = torch.rand(sum(v.numel() for v in values), generator=random) if weighted else None
        ids = KeyedJaggedTensor(keys, torch.cat(values), lengths=torch.cat(lengths), weights=weights)
        made.append((torch.randn(size, 3, generator=random), ids))
    return made


def _loss(out: Tensor) -> Tensor:
    return (out * torch.arange(1, len(out) + 1)).square().mean() if len(out) else out.sum()


def compare(
    place: Rank, plan: dict[str, Any], tables: list[list[Any]], sizes: list[int], **how: Any
) -> dict[str, Any]:
    """Outputs, gradients (dense kernels) and weights after a step of the tower form less the flat model's."""
    torch.manual_seed(7)
    flat = Model(tables, how.get("groups"), how.get("kind", "none"), how.get("weighted", False))
    alone = copy.deepcopy(flat)
    optimizer, kernel = how.get("optimizer", "sgd"), how.get("kernel", "dense")
    # rank 0's weights everywhere would hide a wrong shard: every rank builds the same ones instead
    made = tower_model(
        Plan.from_dict(plan),
        flat,
        lr=0.5,
        optimizer=optimizer,
        dense_optimizer="sgd",
        kernel=kernel,
        eps=1e-6,
    )
    parts = batch(tables, sizes, 3, how.get("weighted", False))
    errors: dict[str, float] = {}

    outs = [alone(*part) for part in parts]
    mine = made(*parts[place.rank])
    errors["outputs"] = _worst(gather_rows(mine.detach()), torch.cat(outs).detach())
    sum(_loss(out) for out in outs).div(place.world_size).backward()  # type: ignore[union-attr]
    _loss(mine).backward()
    made.synchronise()
    whole = {
        t[0]: bag.weight.grad.clone()
        for t, bag in zip(tables, alone.ebc.embedding_bags.values(), strict=True)
    }
    if kernel == "dense":
        for held, weight in zip(made.lookup.lookup.held, made.lookup.lookup.shards, strict=True):
            s = held.shard
            expected = whole[held.table][s.row : s.row + s.rows, s.col : s.col + s.cols]
            assert weight.grad is not None
            errors["tables"] = max(errors.get("tables", 0.0), _worst(weight.grad, expected))
    for (name, parameter), twin in zip(_over_arch(made.module), alone.top.parameters(), strict=True):
        assert twin.grad is not None
        errors[name] = _worst(parameter.grad, twin.grad)
    if made.moved:
        module = made.lookup.module
        twins = alone.towers[made.lookup.tower]
        assert isinstance(twins, nn.Module)
        for p, twin in zip(module.parameters(), twins.parameters(), strict=True):
            errors["module"] = max(errors.get("module", 0.0), _worst(p.grad, twin.grad))
    shapes = {t[0]: (t[1], t[2]) for t in tables}
    before = whole_tables(made, shapes)
    # gradients are synchronised already: a second time would count them twice
    for own in made.optimizers:
        own.step()
    for p in alone.parameters():
        if p.grad is not None:
            p.data -= 0.5 * p.grad
    after = whole_tables(made, shapes)
    if optimizer == "sgd":
        errors["updated"] = max(
            _worst(after[name], bag.weight.detach()) for name, bag in alone.ebc.embedding_bags.items()
        )
    largest = torch.tensor(list(errors.values()), dtype=torch.float64)
    assert torch.isfinite(largest).all()
    moved = torch.tensor(len(made.moved))
    dist.all_reduce(moved)
    return {
        "errors": errors,
        "moved": int(moved),
        "before": float(sum(t.abs().sum() for t in before.values())),
    }


def _over_arch(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n.removeprefix("module."), p) for n, p in module.named_parameters() if "top." in n]


def _worst(found: Tensor | None, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected entry where that is above 1."""
    assert found is not None
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / max(1.0, float(expected.abs().max())))
