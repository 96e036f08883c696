"""Layers that change their width: against a masked full-size model, and on real processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codegen.runtime.growth.phases import PhasedTraining
from codegen.runtime.growth.resize import Resizer
from codegen.runtime.launch import launch
from ir.errors import InputError
from ir.growth import Growth, GrowthPhase, PrunedLayer

LAYERS = (PrunedLayer("0", ("2",), 12), PrunedLayer("2", ("4",), 10))
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.SiLU(), nn.Linear(10, 1))
    return made.double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=random, dtype=torch.float64)
    return x, (x.sum(1, keepdim=True) > 0).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x), y).backward()
        optimizer.step()


class Masked:
    """The reference: everything at full size, removed units masked, state kept by hand.

    Weights and state of what is removed are restored after every step, so that decay and momentum of an
    element whose gradient is masked to zero do not move it.
    """

    def __init__(self, model: nn.Sequential, optimizer: torch.optim.Optimizer, recover: bool) -> None:
        self.model, self.optimizer, self.recover = model, optimizer, recover
        self.active = [torch.ones(12, dtype=torch.bool), torch.ones(10, dtype=torch.bool)]

    def masks(self) -> dict[nn.Parameter, Tensor]:
        first, second = self.active
        model: Any = self.model
        return {
            model[0].weight: first[:, None].expand(12, 6),
            model[0].bias: first,
            model[2].weight: second[:, None] & first,
            model[2].bias: second,
            model[4].weight: second[None].clone(),
        }

    def keep(self, kept: list[Tensor]) -> None:
        model: Any = self.model
        for active, now, weight in zip(self.active, kept, (model[2].weight, model[4].weight), strict=True):
            back = torch.zeros_like(active)
            back[now] = True
            fresh = back & ~active & (not self.recover)
            with torch.no_grad():
                weight[:, fresh] = 0
                for key, value in self.optimizer.state[weight].items():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        squares = key in ("exp_avg_sq", "sum")
                        value[:, fresh] = value[:, active].mean(1, keepdim=True) if squares else 0
            active.copy_(back)

    def forward(self, x: Tensor) -> Tensor:
        model: Any = self.model
        x = torch.tanh(model[0](x)) * self.active[0]
        return model[4](F.silu(model[2](x)) * self.active[1])  # type: ignore[no-any-return]

    def train(self, steps: range) -> None:
        for step in steps:
            x, y = batch(step)
            self.optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(self.forward(x), y).backward()
            before = {
                p: (
                    p.detach().clone(),
                    {k: v.clone() for k, v in self.optimizer.state[p].items() if v.shape == p.shape},
                )
                for p in self.masks()
            }
            self.optimizer.step()
            with torch.no_grad():
                for p, mask in self.masks().items():
                    weight, state = before[p]
                    p.copy_(torch.where(mask, p, weight))
                    for key, value in self.optimizer.state[p].items():
                        if isinstance(value, Tensor) and value.shape == p.shape:
                            value.copy_(torch.where(mask, value, state.get(key, torch.zeros_like(value))))


@pytest.mark.parametrize("recover", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resized_model_trains_as_a_masked_one_with_the_same_optimizer_state(
    name: str, recover: bool
) -> None:
    small, whole = network(), network()
    optimizer = OPTIMIZERS[name](small.parameters())
    resizer = Resizer(small, LAYERS, optimizer, recover=recover)
    masked = Masked(whole, OPTIMIZERS[name](whole.parameters()), recover)
    step = 0
    for counts in ((12, 10), (5, 4), (8, 9), (3, 9), (12, 10)):
        resizer.resize(counts)
        masked.keep(resizer.kept)
        assert tuple(small[2].weight.shape) == (counts[1], counts[0])
        assert {id(p) for p in small.parameters()} == {
            id(p) for group in optimizer.param_groups for p in group["params"]
        }
        assert all(
            v.shape == p.shape
            for p in small.parameters()
            for v in optimizer.state[p].values()
            if v is not None and v.ndim
        )
        train(small, optimizer, range(step, step + 4))
        masked.train(range(step, step + 4))
        step += 4
        x, _ = batch(99)
        assert torch.allclose(small(x), masked.forward(x), atol=1e-12)
    for mine, other in zip(small.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-12)


def test_a_returning_weight_takes_no_longer_steps_than_those_beside_it() -> None:
    """Adam moves a weight by about its rate; with a mean square of zero it would be 3.2 rates."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    resizer = Resizer(model, LAYERS, optimizer, recover=False)
    train(model, optimizer, range(50))
    resizer.resize((4, 5))
    train(model, optimizer, range(50, 100))
    stayed = resizer.kept[1]
    resizer.resize((12, 10))
    train(model, optimizer, range(100, 101))
    moved: Any = model[4].weight
    back = ~torch.isin(torch.arange(10), stayed)
    assert 0 < float(moved.detach()[:, back].abs().max()) < 2 * 0.01


def test_growth_without_recovery_does_not_change_the_function() -> None:
    model = network()
    resizer = Resizer(model, LAYERS, recover=False)
    resizer.resize((4, 5))
    x, _ = batch(0)
    before = model(x)
    resizer.resize((12, 10))
    assert torch.allclose(model(x), before, atol=1e-14)
    assert model[0].weight.shape == (12, 6)


def test_the_least_important_units_go_and_the_best_come_back() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 13)[:, None].expand(12, 6))
        model[2].weight.fill_(1.0)
    resizer = Resizer(model, LAYERS)
    resizer.resize((4, 10))
    assert resizer.kept[0].tolist() == [8, 9, 10, 11]
    resizer.resize((6, 10))
    assert resizer.kept[0].tolist() == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("layers", "counts", "says"),
    [
        ((PrunedLayer("7", ("2",), 12),), (3,), "no layer '7'"),
        ((PrunedLayer("1", ("2",), 12),), (3,), "is a Tanh"),
        ((PrunedLayer("0", ("2",), 11),), (3,), "has 12 units where the plan has 11"),
        (LAYERS, (13, 1), "cannot keep 13"),
        (LAYERS, (0, 1), "cannot keep 0"),
    ],
)
def test_mistakes(layers: tuple[PrunedLayer, ...], counts: tuple[int, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Resizer(network(), layers).resize(counts)


def section() -> Growth:
    """Three phases of four steps."""

    def phase(kind: Any, kept: tuple[int, ...]) -> GrowthPhase:
        return GrowthPhase(kind, 4, kept, 1.0, 1.0, 1, "fp32")

    return Growth(LAYERS, (phase("pruned", (4, 5)), phase("grown", (8, 7)), phase("full", (12, 10))))


def phased_rank(place: Any) -> list[float]:
    """Data-parallel training through the phases; the weights at the end."""
    model: Any = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    phases = PhasedTraining(section(), model, optimizer)

    def wrapped() -> Any:
        alone = place.world_size == 1
        return model if alone else nn.parallel.DistributedDataParallel(model)

    replica = wrapped()
    for step in range(12):
        if phases.begin_step(step):
            replica = wrapped()
        x, y = (part.chunk(place.world_size)[place.rank] for part in batch(step))
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(replica(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()  # type: ignore[no-any-return]


def test_ranks_resize_alike_and_equal_one_process() -> None:
    two = launch(f"{__file__}:phased_rank", 2, {}, timeout=120)
    alone = launch(f"{__file__}:phased_rank", 1, {}, timeout=120)[0]
    assert two[0] == two[1]
    assert len(alone) == sum(p.numel() for p in network().parameters())
    assert torch.allclose(torch.tensor(two[0]), torch.tensor(alone), atol=1e-9)


def test_phases_do_not_go_back() -> None:
    phases = PhasedTraining(section(), copy.deepcopy(network()), None)
    assert not phases.begin_step(3)
    assert phases.begin_step(9)  # two at once
    assert phases.phase == 2
    with pytest.raises(InputError, match="step 5 lies before phase 2"):
        phases.begin_step(5)
