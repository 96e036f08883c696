"""Deduplicated compute equals the model on whole batches: outputs, gradients, and fewer rows really run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codegen.dedup_graph import deduplicate_compute
from ir.errors import InputError

ROWS, DIM, LENGTH = 50, 8, 5


class Ranker(nn.Module):
    """Self-attention over a user's history, user MLP, then the item and dense features."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ROWS, DIM)
        self.users = nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.norm = nn.LayerNorm(DIM)
        self.user_mlp = nn.Sequential(nn.Linear(2 * DIM, 16), nn.ReLU(), nn.Linear(16, DIM))
        self.top = nn.Linear(3 * DIM, 1)
        self.rows_seen: list[int] = []
        self.attention.register_forward_hook(lambda _m, i, _o: self.rows_seen.append(len(i[0])))

    def forward(self, history: Tensor, profile: Tensor, item: Tensor, dense: Tensor) -> Tensor:
        sequence = self.items(history)
        attended = self.norm(self.attention(sequence, sequence, sequence)[0] + sequence)
        weights = torch.softmax(attended.sum(dim=2), dim=-1)
        pooled = torch.matmul(weights.unsqueeze(1), attended).squeeze(1)
        user = self.user_mlp(torch.cat([pooled, self.users(profile)], dim=1))
        both = torch.cat([user, self.items(item), dense], dim=1)
        return self.top(both).squeeze(-1)


def inputs(samples: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Distinct history and profile rows, the row of each sample, and the per-sample inputs."""
    random = torch.Generator().manual_seed(seed)
    distinct = samples // 3
    inverse = torch.cat(
        [torch.arange(distinct), torch.randint(0, distinct, (samples - distinct,), generator=random)]
    )
    return {
        "history": torch.randint(0, ROWS, (distinct, LENGTH), generator=random),
        "profile": torch.randint(0, ROWS, (distinct, 3), generator=random),
        "item": torch.randint(0, ROWS, (samples,), generator=random),
        "dense": torch.randn(samples, DIM, generator=random),
    }, inverse


def test_outputs_and_gradients_are_exact_and_attention_runs_on_distinct_rows() -> None:
    torch.manual_seed(0)
    model = Ranker()
    given, inverse = inputs(12, 1)
    whole = (given["history"][inverse], given["profile"][inverse], given["item"], given["dense"])
    made = deduplicate_compute(model, {"history": 0, "profile": 0}, whole)
    assert any("attention" in name for name in made.meta["deduplicated"])
    assert not any("top" in name for name in made.meta["deduplicated"])

    given, inverse = inputs(30, 2)  # another batch size than the example's
    whole = (given["history"][inverse], given["profile"][inverse], given["item"], given["dense"])
    expected = model(*whole)
    expected.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.rows_seen.clear()
    found = made(given["history"], given["profile"], given["item"], given["dense"], (inverse,))
    assert model.rows_seen == [10]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.square().mean().backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_two_groups_stay_apart_until_they_meet() -> None:
    torch.manual_seed(0)
    model = Ranker()
    given, inverse = inputs(12, 3)
    other = torch.arange(12) % 4
    profile = torch.randint(0, ROWS, (4, 3))
    whole = (given["history"][inverse], profile[other], given["item"], given["dense"])
    made = deduplicate_compute(model, {"history": 0, "profile": 1}, whole)
    assert not any("user_mlp" in name for name in made.meta["deduplicated"])
    found = made(given["history"], profile, given["item"], given["dense"], (inverse, other))
    torch.testing.assert_close(found, model(*whole), rtol=1e-5, atol=1e-6)


class Normalised(nn.Module):
    """Statistics over the batch: distinct rows would change them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.emb, self.norm, self.how = nn.Embedding(ROWS, DIM), nn.BatchNorm1d(DIM), how

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        x = self.emb(ids)
        if self.how == "norm":
            x = self.norm(x)
        elif self.how == "softmax":
            x = torch.softmax(x, dim=-2)  # dimension 0 by another name
        elif self.how == "mean":
            x = x - x.mean(0)
        elif self.how == "transpose":
            x = x.transpose(0, 1).softmax(-1).transpose(0, 1)
        elif self.how == "moved":
            x = torch.transpose(torch.transpose(x, dim0=0, dim1=1).softmax(-1), dim0=0, dim1=1)
        elif self.how == "gram":
            x = torch.matmul(torch.matmul(x, x.transpose(0, 1)), x)
        return x + dense


@pytest.mark.parametrize("how", ["norm", "softmax", "mean", "transpose", "moved", "gram"])
def test_what_mixes_samples_runs_on_all_of_them(how: str) -> None:
    torch.manual_seed(0)
    model = Normalised(how)
    rows, inverse = torch.randint(0, ROWS, (3,)), torch.tensor([0, 1, 2, 0, 0, 1, 2])
    dense = torch.randn(7, DIM)
    made = deduplicate_compute(model, {"ids": 0}, (rows[inverse], dense))
    torch.testing.assert_close(made(rows, dense, (inverse,)), model(rows[inverse], dense))


class Keyed(nn.Module):
    """Features by key: bags of ids and offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.EmbeddingBag(ROWS, DIM), nn.EmbeddingBag(ROWS, DIM)
        self.tower = nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM))

    def forward(self, sparse: Any) -> Tensor:
        ids, offsets = sparse["a"][0], sparse["a"][1]
        other = sparse["b"]
        return (self.tower(self.a(ids, offsets)) * self.b(other[0], other[1])).sum(1)


def test_features_of_a_mapping() -> None:
    torch.manual_seed(0)
    model = Keyed()
    inverse = torch.tensor([0, 0, 1, 1, 1, 0])
    a = (torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 3]))  # rows [1, 2, 3] and [4, 5]
    whole_a = (torch.tensor([1, 2, 3] * 2 + [4, 5] * 3 + [1, 2, 3]), torch.tensor([0, 3, 6, 8, 10, 12]))
    b = (torch.arange(6), torch.arange(6))
    made = deduplicate_compute(model, {"a": 0}, ({"a": whole_a, "b": b},))
    assert any("tower" in name for name in made.meta["deduplicated"])
    expected = model({"a": whole_a, "b": b})
    torch.testing.assert_close(made({"a": a, "b": b}, (inverse,)), expected)
    with pytest.raises(InputError, match="does not read feature 'c'"):
        deduplicate_compute(model, {"c": 0}, ({"a": whole_a, "b": b},))
