"""Which ring: the choice between pass-KV and pass-Q by modelled seconds, and the published heuristics.

Sources: "Context Parallelism for Scalable Million-Token Inference", arXiv 2411.01783, algorithms 1 and 5,
equations 1, 2 and 5, appendix D. Symbols as in :mod:`cost_models.attention`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cost_models.attention import Algorithm, AttentionShape, RingCost, RingRates, check_lengths, ring_seconds
from ir.errors import InputError


@dataclass(frozen=True, slots=True)
class Choice:
    """Which algorithm, and what is known about it.

    Attributes:
        algorithm: the one with the least worst-case regret.
        regret: seconds it can lose against the best, at worst over the scenarios.
        runner_up: the next best.
        runner_up_regret: seconds that one can lose.
        costs: of each algorithm in the first scenario.
    """

    algorithm: Algorithm
    regret: float
    runner_up: Algorithm
    runner_up_regret: float
    costs: Mapping[Algorithm, RingCost]


def scenarios(low: RingRates, high: RingRates) -> tuple[RingRates, ...]:
    """The corners of a range of rates: each of C, B and the all-to-all's bandwidth at either end."""
    ends = itertools.product(
        (low.attention_flops, high.attention_flops),
        (low.send_bandwidth, high.send_bandwidth),
        (low.all_to_all_bandwidth, high.all_to_all_bandwidth),
    )
    return tuple(
        replace(high, attention_flops=flops, send_bandwidth=send, all_to_all_bandwidth=back)
        for flops, send, back in dict.fromkeys(ends)
    )


def choose(
    shape: AttentionShape,
    new: float,
    cached: float,
    ranks: int,
    rates: RingRates | Sequence[RingRates],
    *,
    batch: int = 1,
    algorithms: Sequence[Algorithm] = ("pass_kv", "pass_q"),
) -> Choice:
    """The algorithm whose largest regret over the scenarios is least; with one scenario, the fastest.

    A link reaches different rates at different message sizes and loads. Where the range decides which is
    faster, the choice that can lose less is the better one (minimax regret, Savage 1951). Ties go to the
    first of ``algorithms``.
    """
    given = [rates] if isinstance(rates, RingRates) else list(rates)
    if len(algorithms) < 2 or not given:
        raise InputError("a choice needs two algorithms at least and a scenario")
    tables: list[dict[Algorithm, RingCost]] = [
        {name: ring_seconds(name, shape, new, cached, ranks, rate, batch=batch) for name in algorithms}
        for rate in given
    ]
    worst: dict[Algorithm, float] = {
        name: max(table[name].seconds - min(c.seconds for c in table.values()) for table in tables)
        for name in algorithms
    }
    first, second = sorted(algorithms, key=lambda name: worst[name])[:2]
    return Choice(first, worst[first], second, worst[second], tables[0])


def crossover(
    shape: AttentionShape,
    total: int,
    ranks: int,
    rates: RingRates | Sequence[RingRates],
    *,
    batch: int = 1,
) -> int | None:
    """The fewest new tokens of ``total`` (new + cached) from which on pass-KV is chosen at every T tried.

    Searched over T = 1..total by bisection; None when pass-Q is still chosen at T = total. Below this many
    new tokens the queries are the smaller message.
    """
    if total < 1:
        raise InputError(f"a crossover needs at least one token, not {total}")

    def by_kv(new: int) -> bool:
        return choose(shape, new, total - new, ranks, rates, batch=batch).algorithm == "pass_kv"

    if not by_kv(total):
        return None
    low, high = 0, total  # pass-Q at low (or low is 0), pass-KV at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if by_kv(middle) else (middle, high)
    return high


def heuristic_threshold(
    shape: AttentionShape, new: float, cached: float, ranks: int, flops: float, bandwidth: float
) -> Algorithm:
    """Algorithm 1 of arXiv 2411.01783: pass-KV when it is hidden (eq. 2) or the smaller message (eq. 1).

    T >= N C G e / (2 H B), or T / (T + P) >= 2 G / H; C and B are ``flops`` and ``bandwidth``. The miss rate
    T / (T + P) and H, G are ratios, so any tensor-parallel share of the heads gives the same answer as long
    as C and B are those of one rank.
    """
    check_lengths(new, cached, ranks, 1)
    return (
        "pass_kv"
        if _hidden(shape, new, ranks, flops, bandwidth) or _small(shape, new, cached, 0.0)
        else "pass_q"
    )


def heuristic_refined(
    shape: AttentionShape, new: float, cached: float, ranks: int, flops: float, bandwidth: float
) -> Algorithm:
    """Algorithm 5 of arXiv 2411.01783, which counts pass-Q's all-to-all (eq. 5).

    As :func:`heuristic_threshold`, with the miss rate compared to 2 G / H - 4 T B / (N C e).
    """
    check_lengths(new, cached, ranks, 1)
    less = 4 * new * bandwidth / (ranks * flops * shape.element_bytes)
    return (
        "pass_kv"
        if _hidden(shape, new, ranks, flops, bandwidth) or _small(shape, new, cached, less)
        else "pass_q"
    )


def heuristic_empirical(new: float, cached: float) -> Algorithm:
    """Appendix D of arXiv 2411.01783: pass-KV if alpha ln T + beta ln(T / (T + P)) + gamma > 0.

    Coefficients as printed; fitted there on T up to about e^9 for Llama 3 405B on four hosts.
    """
    check_lengths(new, cached, 1, 1)
    if new <= 0:
        return "pass_q"
    alpha, beta, gamma = -1.059, 1.145, 12.112  # arXiv 2411.01783, appendix D
    return (
        "pass_kv" if alpha * math.log(new) + beta * math.log(new / (new + cached)) + gamma > 0 else "pass_q"
    )


def _hidden(shape: AttentionShape, new: float, ranks: int, flops: float, bandwidth: float) -> bool:
    """Equation 2: a KV block is sent within the time of one partial attention."""
    return new >= ranks * flops * shape.kv_heads * shape.element_bytes / (2 * shape.heads * bandwidth)


def _small(shape: AttentionShape, new: float, cached: float, less: float) -> bool:
    """Equation 1 (and 5): the KV block is not larger than the query block."""
    miss = new / (new + cached) if new + cached else 0.0
    return miss >= 2 * shape.kv_heads / shape.heads - less


# What Llama 3 405B with TP8 on H100 (400 Gbit/s RDMA) reached: the least and the most of the rows of table 5 of
# arXiv 2411.01783 (planner/data/measured/context_parallel.json, table5_us, all marked fit), by the formulas above.
H100_RDMA_LOW = RingRates(
    attention_flops=4.956e14,  # ATTN 1608 us at T = 12,800
    send_bandwidth=1.974e10,  # SendRecv 166 us of 3.28 MB, pass-Q at T = 3,200
    all_to_all_bandwidth=2.355e10,  # All2All 424 us of 9.98 MB, T = 3,200
)
H100_RDMA_HIGH = RingRates(
    attention_flops=5.002e14,  # ATTN 414 us at T = 3,200
    send_bandwidth=2.613e10,  # SendRecv 627 us of 16.4 MB, pass-KV at T = 3,200
    all_to_all_bandwidth=3.904e10,  # All2All 1023 us of 39.9 MB, T = 12,800
)
