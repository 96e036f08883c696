"""Fluid simulation of flows that share resources max-min fairly.

A flow drains through a set of resources (ports) at one rate. At any moment rates are max-min fair:
no flow can get more without taking from one that has no more (Bertsekas, Gallager, Data Networks, 6.5.2),
found by progressive filling. A flow starts when the flows it waits for have ended, and drains after its delay.

:func:`simulate_schedule` times a :class:`ir.schedules.Schedule` on a network of levels in which every rank
has, at each level, one port to send and one to receive, and one unit that adds up what arrives.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from cost_models.collective.terms import NetworkLevel, check_levels
from ir.errors import InputError
from ir.schedules import Message, Schedule, Shape
from ir.schedules.trees import level_of

_TOGETHER = 1e-9  # relative: events closer than this are one event


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes through resources.

    Attributes:
        resources: what it drains through; their capacities are bytes/s.
        size: bytes.
        delay: seconds between being ready and draining.
        after: indices of the flows that must have ended.
    """

    resources: tuple[Hashable, ...]
    size: float
    delay: float = 0.0
    after: tuple[int, ...] = ()


def fair_rates(
    flows: Mapping[int, tuple[Hashable, ...]], capacity: Mapping[Hashable, float]
) -> dict[int, float]:
    """Max-min fair rates, bytes/s: the tightest resource fixes its flows, then the next one."""
    users: dict[Hashable, set[int]] = {}
    for index, resources in flows.items():
        for resource in resources:
            users.setdefault(resource, set()).add(index)
    left = {resource: capacity[resource] for resource in users}
    rates: dict[int, float] = {}
    while users:
        share = min(left[resource] / len(found) for resource, found in users.items())
        tight = [r for r, found in users.items() if left[r] / len(found) <= share * (1 + _TOGETHER)]
        for index in {index for resource in tight for index in users[resource]}:
            rates[index] = share
            for resource in flows[index]:
                left[resource] -= share
                users[resource].discard(index)
                if not users[resource]:
                    del users[resource]
    return rates


def simulate(flows: Sequence[Flow], capacity: Mapping[Hashable, float]) -> list[float]:
    """Seconds at which each flow ends.

    Raises:
        InputError: flows that wait for each other.
    """
    waits = [len(set(flow.after)) for flow in flows]
    followers: dict[int, list[int]] = {}
    for index, flow in enumerate(flows):
        for other in set(flow.after):
            followers.setdefault(other, []).append(index)
    starts: list[tuple[float, int]] = [(flow.delay, i) for i, flow in enumerate(flows) if not waits[i]]
    heapq.heapify(starts)
    ends = [-1.0] * len(flows)
    left: dict[int, float] = {}
    now = 0.0
    while starts or left:
        rates = fair_rates({index: flows[index].resources for index in left}, capacity)
        drained = {index: now + left[index] / rates[index] for index in left}
        moment = min(min(drained.values(), default=math.inf), starts[0][0] if starts else math.inf)
        for index in left:
            left[index] -= rates[index] * (moment - now)
        now = moment
        ended = [index for index, seconds in drained.items() if seconds <= now * (1 + _TOGETHER)]
        for index in ended:
            del left[index]
        while starts and starts[0][0] <= now * (1 + _TOGETHER):
            index = heapq.heappop(starts)[1]
            if flows[index].size > 0 and flows[index].resources:
                left[index] = flows[index].size
            else:
                ended.append(index)
        for index in ended:
            ends[index] = now
            for follower in followers.get(index, ()):
                waits[follower] -= 1
                if not waits[follower]:
                    heapq.heappush(starts, (now + flows[follower].delay, follower))
    if any(waits):
        raise InputError("flows wait for each other; remove the cycle")
    return ends


def simulate_schedule(
    schedule: Schedule, size: float, levels: Sequence[NetworkLevel], reduction: float = 0.0
) -> float:
    """Seconds of ``schedule`` with a buffer of ``size`` bytes a rank.

    Args:
        schedule: the messages; its ranks are numbered as those of the network.
        size: bytes of the buffer of one rank.
        levels: of the network, innermost first.
        reduction: seconds a byte that a rank needs to add what arrived.

    Raises:
        InputError: the schedule is for another number of ranks.
    """
    shape = check_levels(levels)
    block = size / schedule.blocks
    flows: list[Flow] = []
    capacity: dict[Hashable, float] = {}
    for rank in range(schedule.ranks):
        for index, level in enumerate(levels):
            capacity["out", index, rank] = capacity["in", index, rank] = level.bandwidth
        capacity["add", rank] = 1 / reduction if reduction else 1.0
    if schedule.ranks != math.prod(shape):
        raise InputError(
            f"the schedule is for {schedule.ranks} ranks, the network has {math.prod(shape)}; use one shape"
        )
    last: dict[int, list[int]] = {}
    for messages in schedule.steps:
        ends: dict[int, list[int]] = {}
        for message in messages:
            after = (*last.get(message.source, ()), *last.get(message.target, ()))
            flows += _message(message, shape, levels, block, after, len(flows), reduction)
            for rank in (message.source, message.target):
                ends.setdefault(rank, []).append(len(flows) - 1)
        last |= ends
    return max(simulate(flows, capacity), default=0.0)


def _message(
    message: Message,
    shape: Shape,
    levels: Sequence[NetworkLevel],
    block: float,
    after: tuple[int, ...],
    index: int,
    reduction: float,
) -> list[Flow]:
    """The transfer, and the addition where it arrives."""
    level = level_of(message.source, message.target, shape)
    size = len(message.blocks) * block
    ports = (("out", level, message.source), ("in", level, message.target))
    flows = [Flow(ports, size, levels[level].latency, after)]
    if message.reduce and reduction:
        flows.append(Flow((("add", message.target),), size, 0.0, (index,)))
    return flows
