"""TorchRec's planner with each shard priced once: the same plans, affordable on large table sets.

The search is TorchRec's: its enumeration and prices, its proposers in their order and its partitioner.
Left out is only what cannot change the result: pricing equal shards again, placing a proposal whose
average or largest load already reaches the best plan's, or whose storage exceeds all that there is, and
running two ``min_partition`` s that give the same options. ``vs_torchrec.py --check-rival`` and the tests
compare its plans and ratings with those of the untouched planner.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks._torchrec_placing import Placer
from benchmarks._torchrec_proposals import Proposal, dynamic_programming, greedy, grid, uniform
from benchmarks._torchrec_rival import MIN_PARTITIONS, Case, RivalPlan, tuned_constraints
from benchmarks._torchrec_space import Pricing, Space
from cost_models.adapters.torchrec import reserve

SLACK = 1e-9  # relative; far above the rounding of a sum of some thousand terms


class Twin:
    """Plans of TorchRec's planner for one case, from one pricing."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.pricing = Pricing(case)
        self.found: dict[int, RivalPlan] = {}

    def default(self) -> RivalPlan:
        """What the planner as it comes finds."""
        space, seconds = self._space(self.case.constraints)
        proposals = [grid(space), greedy(space, space.depth), greedy(space, space.breadth)]
        plan = self._best(space, [*proposals, uniform(space, space.depth)], seconds)
        return RivalPlan(plan.total, plan.total, plan.cpu_seconds, plan.note, plan.ratings)

    def tuned(self, min_partitions: tuple[int | None, ...] = MIN_PARTITIONS) -> list[RivalPlan]:
        """One plan a ``min_partition``, each the best over all proposers; equal ones once."""
        plans = []
        for width in min_partitions:
            space, seconds = self._space(tuned_constraints(self.case, width))
            signature = space.signature()
            if signature in self.found:
                continue
            proposals = [
                grid(space),
                greedy(space, space.depth),
                greedy(space, space.breadth),
                uniform(space, space.depth),
                uniform(space, space.breadth),
                dynamic_programming(space, self._placer().capacity),
            ]
            self.found[signature] = self._best(space, proposals, seconds)
            plans.append(self.found[signature])
        return plans

    def _space(self, constraints: dict[str, Any]) -> tuple[Space, float]:
        started = time.process_time()
        space = self.pricing.space(constraints)
        return space, time.process_time() - started

    def _placer(self) -> Placer:
        case = self.case
        reserved = reserve(case.module, case.sharders, case.topology, case.batch_size, case.constraints)
        return Placer(reserved)

    def _best(self, space: Space, proposals: list[Iterator[Proposal]], seconds: float) -> RivalPlan:
        started = time.process_time()
        search = _Search(space, self._placer())
        for proposer in proposals:
            for proposal in proposer:
                search.consider(proposal)
        plans = [
            [space.options[number].ranked(self.case, ranks) for number, ranks in zip(*found, strict=True)]
            if found
            else None
            for found in search.plans
        ]
        note = "" if plans[0] else "no proposal fits"
        used = seconds + time.process_time() - started
        return RivalPlan(plans[0], plans[1], used, note, (search.best[0], search.best[1]))


class _Search:
    """The best plan so far under both objectives."""

    def __init__(self, space: Space, placer: Placer) -> None:
        self.space, self.placer = space, placer
        self.best = [float("inf"), float("inf")]
        self.plans: list[tuple[Proposal, list[list[int]]] | None] = [None, None]
        self.seen: set[tuple[int, int]] = set()
        random = np.random.default_rng(0)
        self.marks = random.integers(0, 2**64, size=(2, len(space.options)), dtype=np.uint64)
        self.room = placer.room.sum(axis=0)
        self.widest = placer.room.max(axis=0)

    def consider(self, proposal: Proposal) -> None:
        """Place and rate a proposal, unless it is known or cannot be better."""
        first, second = np.bitwise_xor.reduce(self.marks[:, proposal], axis=1)
        key = (int(first), int(second))
        if key in self.seen:
            return  # TorchRec keeps the rating of the first order of the tables it meets
        self.seen.add(key)
        if not self._promising(proposal):
            return
        chosen = [self.space.options[number] for number in proposal]
        ranks = self.placer.place(chosen)
        if ranks is None:
            return
        total, extra = [0.0] * self.placer.world, [0.0] * self.placer.world
        for priced, places in zip(chosen, ranks, strict=True):
            for unit, rank in zip(priced.each(), places, strict=True):
                total[rank] += unit.total
                extra[rank] += unit.extra
        for objective, value in enumerate((max(total), max(extra))):
            if value < self.best[objective]:
                self.best[objective] = value
                self.plans[objective] = (proposal, ranks)

    def _promising(self, proposal: Proposal) -> bool:
        """Whether its loads could be better under either objective, and its storage could fit."""
        space, world = self.space, self.placer.world
        average = space.sums[proposal].sum() / world
        average_extra = space.sums_extra[proposal].sum() / world
        bound = max(average, space.deepest[proposal].max()) * (1.0 - SLACK)
        bound_extra = max(average_extra, space.deepest_extra[proposal].max()) * (1.0 - SLACK)
        if bound >= self.best[0] and bound_extra >= self.best[1]:
            return False
        if (space.storage[proposal].sum(axis=0) > self.room).any():
            return False
        return not (space.largest[proposal] > self.widest).any()
