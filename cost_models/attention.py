"""Seconds of attention spread over N ranks by a ring: pass-KV, pass-Q, all-gather, and decoding.

Symbols, all per rank after tensor parallelism unless said otherwise: T new tokens, P cached tokens of one
sequence (or of a batch of like sequences, then times ``batch``), H query heads, G key-value heads, d head
dimension, e bytes an element, C FLOP/s that the attention kernel reaches, B bytes/s a neighbour link reaches.

============== ==========================================================================================
pairs          T P + T (T + 1) / 2 visible query-key pairs under a causal mask
FLOP           4 H d pairs: two products, 2 FLOP a multiply-add
KV block       2 G d e (T + P) / N bytes, the message of pass-KV
query block    H d e T / N bytes, the message of pass-Q
partial block  H (d e + 4) T / N bytes: a partial output and its fp32 log-sum-exp
step, A        FLOP / N^2 / C: each rank's queries against each rank's keys, equal by 2N-chunk placement; plus k for
               each kernel call (1, on a cache 2) and m for each row merged (T / N)
own step, A0   the same with its own keys, of which T^2 / 4 N^2 pairs lie in two squares under the mask, at rate C_m;
               3 calls, on a cache 4, which merge 3 T / 2 N and 2 T / N rows (the last rank has one larger square)
pass-KV        max(A0, S_kv) + (N - 2) max(A, S_kv) + A
pass-Q         max(A0, S_q) + (N - 2) max(A, S_q) + A + all-to-all of (N - 1) partial blocks + m T to merge N of them
pass-Q, eager  max(A0, S_q) + max(A, S_q) + (N - 3) max(A, S_q + R) + max(A, R) + R + m T: partial results return step
               by step; a result of step s goes s ranks back, so min(s, N - s, ranks of a card) share each card
all-gather     (N - 1) S_kv + A0 + (N - 1) A: nothing hidden, as in Llama 3 training (arXiv 2407.21783, section 3.3.2)
============== ==========================================================================================

S is a block's bytes / B plus the latency of a message, R that of a partial block; the eager form is for
N > 2, with two ranks it is max(A0, S_q) + A + R + m T. Calls and rows are those of
:mod:`codegen.runtime.context_parallel`; k = m = 0 and C_m = C where nobody measured them. Source of pass-KV and
pass-Q: "Context Parallelism for Scalable Million-Token Inference", arXiv 2411.01783, sections 3.3 to 3.5,
appendices A, C and D; its own figures leave out the causal half and the log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ir.errors import InputError

Algorithm = Literal["pass_kv", "pass_q", "pass_q_eager", "all_gather"]
LSE_BYTES = 4  # the log-sum-exp travels in fp32
# Flash attention's backward has five products where its forward has two: arXiv 2307.08691, section 3.1
BACKWARD_FACTOR = 2.5
GRADIENT_BYTES = 4  # gradients of keys and values are summed in fp32 on their way round


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads of one attention on one rank.

    Attributes:
        heads: query heads, H.
        kv_heads: key-value heads, G; divides H.
        head_dim: d.
        element_bytes: e, bytes of an element of q, k and v.
    """

    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: float = 2.0

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1 or self.element_bytes <= 0:
            raise InputError(
                f"attention needs at least one head, key-value head and dimension, and element bytes above 0, "
                f"not {self.heads}, {self.kv_heads}, {self.head_dim} and {self.element_bytes:g}"
            )
        if self.heads % self.kv_heads:
            raise InputError(
                f"{self.heads} query heads cannot share {self.kv_heads} key-value heads; "
                f"grouped-query attention needs a multiple"
            )

    @property
    def width(self) -> int:
        """Elements of one query token, H d."""
        return self.heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of one token's keys and values."""
        return 2.0 * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def query_bytes_per_token(self) -> float:
        """Bytes of one token's queries."""
        return self.width * self.element_bytes

    @property
    def partial_bytes_per_token(self) -> float:
        """Bytes of one token's partial output and its log-sum-exp."""
        return self.heads * (self.head_dim * self.element_bytes + LSE_BYTES)


@dataclass(frozen=True, slots=True)
class RingRates:
    """What kernels and links reach.

    Attributes:
        attention_flops: FLOP/s of the attention kernel, C.
        send_bandwidth: bytes/s to the next rank while it computes, B.
        all_to_all_bandwidth: bytes/s a rank sends in an all-to-all of large messages.
        memory_bandwidth: bytes/s at which keys and values are read; bounds decoding.
        message_seconds: seconds a message to the neighbour takes beyond its bytes.
        all_to_all_seconds: seconds an all-to-all takes beyond its bytes.
        kernel_seconds: seconds a call of the attention kernel takes beyond its work, k.
        masked_flops: FLOP/s of the kernel on squares under the causal mask, visible pairs counted, C_m; 0: as others.
        merge_seconds: seconds to add one element of a partial output to the running sums; times H d it is m.
        card_ranks: ranks of a host that share what ``send_bandwidth`` is of one of them alone.
    """

    attention_flops: float
    send_bandwidth: float
    all_to_all_bandwidth: float
    memory_bandwidth: float = math.inf
    message_seconds: float = 0.0
    all_to_all_seconds: float = 0.0
    kernel_seconds: float = 0.0
    card_ranks: int = 1
    masked_flops: float = 0.0
    merge_seconds: float = 0.0

    def __post_init__(self) -> None:
        rates = (self.attention_flops, self.send_bandwidth, self.all_to_all_bandwidth, self.memory_bandwidth)
        waits = (
            self.message_seconds,
            self.all_to_all_seconds,
            self.kernel_seconds,
            self.masked_flops,
            self.merge_seconds,
        )
        if not (all(rate > 0 for rate in rates) and all(wait >= 0 for wait in waits)):
            raise InputError(f"rates must be above 0 and overheads at least 0, not {rates} and {waits}")


@dataclass(frozen=True, slots=True)
class RingCost:
    """Modelled seconds of one attention on N ranks.

    Attributes:
        algorithm: which one.
        terms: "attention" (N steps), "exposed" (transfers that attention does not hide) and "return"
            (partial outputs on their way home); they add up to ``seconds``.
        hidden: seconds of transfers that run behind attention.
        bytes_sent: bytes one rank sends.
    """

    algorithm: Algorithm
    terms: Mapping[str, float]
    hidden: float
    bytes_sent: float

    @property
    def seconds(self) -> float:
        """The sum of the terms."""
        return sum(self.terms.values())


def causal_pairs(new: float, cached: float = 0.0) -> float:
    """Visible query-key pairs of ``new`` tokens after ``cached`` ones: T P + T (T + 1) / 2."""
    return new * cached + new * (new + 1) / 2


def attention_flops(shape: AttentionShape, new: float, cached: float = 0.0, *, causal: bool = True) -> float:
    """FLOP of one forward attention of one sequence: 4 H d for each visible pair."""
    pairs = causal_pairs(new, cached) if causal else new * (new + cached)
    return 4.0 * shape.width * pairs


def attention_bytes(shape: AttentionShape, new: float, cached: float = 0.0) -> float:
    """Bytes a fused kernel moves: q, k, v once in, the output once out (scores stay on chip)."""
    return 2 * new * shape.query_bytes_per_token + (new + cached) * shape.kv_bytes_per_token


def check_lengths(new: float, cached: float, ranks: int, batch: int) -> None:
    """Raise InputError for negative lengths, no ranks or no sequences."""
    if new < 0 or cached < 0 or ranks < 1 or batch < 1:
        raise InputError(
            f"attention needs lengths of 0 or more, a rank and a sequence, not {new:g} new and {cached:g} "
            f"cached tokens, {ranks} ranks and {batch} sequences"
        )


def step_seconds(
    shape: AttentionShape,
    new: float,
    cached: float,
    ranks: int,
    rates: RingRates,
    batch: int = 1,
    *,
    own: bool = False,
) -> float:
    """A: seconds of one rank's queries against one rank's keys, the larger of compute and memory time.

    ``own``: against its own keys, A0.
    """
    flops = batch * attention_flops(shape, new, cached) / ranks**2
    moved = batch * attention_bytes(shape, new / ranks, cached / ranks)
    seconds = flops / rates.attention_flops
    calls, rows = (2 if cached else 1), new / ranks
    if own:
        chunks = min(2, ranks)  # those of one rank alone follow each other
        calls, rows = (2 * chunks, 2 * rows) if cached else (2 * chunks - 1, (2 - 1 / chunks) * rows)
        masked = batch * 4.0 * shape.width * chunks * (new / ranks / chunks) ** 2 / 2
        if rates.masked_flops > 0:
            seconds += masked / rates.masked_flops - masked / rates.attention_flops
    fixed = batch * (calls * rates.kernel_seconds + rows * shape.width * rates.merge_seconds)
    return max(seconds, moved / rates.memory_bandwidth) + fixed


def ring_seconds(
    algorithm: Algorithm,
    shape: AttentionShape,
    new: float,
    cached: float,
    ranks: int,
    rates: RingRates,
    *,
    batch: int = 1,
) -> RingCost:
    """Modelled time of one causal attention by ``algorithm``.

    Args:
        algorithm: "pass_kv", "pass_q", "pass_q_eager" or "all_gather".
        shape: heads of one rank.
        new: T, new tokens of a sequence, over all ranks.
        cached: P, cached tokens of a sequence, over all ranks.
        ranks: N.
        rates: what kernels and links reach.
        batch: sequences of these lengths.

    Raises:
        InputError: negative lengths, no ranks, or an unknown algorithm.
    """
    check_lengths(new, cached, ranks, batch)
    own = step_seconds(shape, new, cached, ranks, rates, batch, own=True)
    other = step_seconds(shape, new, cached, ranks, rates, batch)
    attention = own + (ranks - 1) * other
    if algorithm not in ("pass_kv", "pass_q", "pass_q_eager", "all_gather"):
        raise InputError(f"there is no context-parallel algorithm {algorithm!r}; use pass_kv or pass_q")
    if ranks == 1:
        return RingCost(algorithm, {"attention": attention, "exposed": 0.0, "return": 0.0}, 0.0, 0.0)
    others = ranks - 1
    kv = batch * shape.kv_bytes_per_token * (new + cached) / ranks
    query = batch * shape.query_bytes_per_token * new / ranks
    partial = batch * shape.partial_bytes_per_token * new / ranks
    send = {name: size / rates.send_bandwidth + rates.message_seconds for name, size in
            (("kv", kv), ("query", query))}  # fmt: skip
    homeward, sent = 0.0, others * (query + partial)
    covers = [own] + [other] * others  # a transfer runs behind the step at which it starts
    if algorithm in ("pass_kv", "all_gather"):
        sent = others * kv
        transfers = [send["kv"]] * others
        covers = covers if algorithm == "pass_kv" else [0.0] * others
    elif algorithm == "pass_q":
        transfers = [send["query"]] * others
        homeward = others * partial / rates.all_to_all_bandwidth + rates.all_to_all_seconds
    else:
        # behind step s travel the queries of step s + 1 and what step s - 1 made of others' queries
        back = [
            partial * min(s, ranks - s, rates.card_ranks) / rates.send_bandwidth + rates.message_seconds
            for s in range(1, ranks)
        ]
        transfers = [send["query"]] * min(2, others)
        transfers += [send["query"] + home for home in back[:-2]]
        transfers += back[-2:-1]
        homeward = back[-1]
    if algorithm in ("pass_q", "pass_q_eager"):
        homeward += batch * new * shape.width * rates.merge_seconds
    exposed = sum(max(0.0, transfer - cover) for transfer, cover in zip(transfers, covers, strict=False))
    terms = {"attention": attention, "exposed": exposed, "return": homeward}
    return RingCost(algorithm, terms, sum(transfers) - exposed, sent)


def backward_seconds(
    shape: AttentionShape, new: float, ranks: int, rates: RingRates, *, batch: int = 1
) -> RingCost:
    """The backward pass of pass-KV without a cache: keys go round again, their gradients N times behind them.

    Step s computes for 2.5 A while keys of step s + 1 and gradients of step s - 1 travel; the last
    gradients go home after the last step. Arguments as in :func:`ring_seconds`.
    """
    check_lengths(new, 0, ranks, batch)
    attention = BACKWARD_FACTOR * step_seconds(shape, new, 0, ranks, rates, batch)
    if ranks == 1:
        return RingCost("pass_kv", {"attention": attention, "exposed": 0.0, "return": 0.0}, 0.0, 0.0)
    kv = batch * shape.kv_bytes_per_token * new / ranks
    gradient = kv / shape.element_bytes * GRADIENT_BYTES
    forth = kv / rates.send_bandwidth + rates.message_seconds
    back = gradient / rates.send_bandwidth + rates.message_seconds
    transfers = [forth, *([forth + back] * (ranks - 2)), back]
    exposed = sum(max(0.0, transfer - attention) for transfer in transfers)
    terms = {"attention": ranks * attention, "exposed": exposed, "return": back}
    return RingCost("pass_kv", terms, sum(transfers) - exposed, (ranks - 1) * kv + ranks * gradient)


def decode_seconds(
    shape: AttentionShape,
    context: float,
    batch: int,
    ranks: int,
    rates: RingRates,
    *,
    padded: bool = False,
) -> RingCost:
    """One decode step by pass-Q: one new token a sequence, keys spread evenly over the ranks.

    Args:
        shape: heads of one rank.
        context: tokens a sequence has.
        batch: sequences, whose queries are dealt to the ranks in turn.
        ranks: N.
        rates: ``memory_bandwidth`` bounds the attention.
        padded: queries are padded to a multiple of N and the padding is computed, as in arXiv 2411.01783,
            section 3.6; False is what this project's runtime does.
    """
    check_lengths(1, context, ranks, batch)
    slots = math.ceil(batch / ranks)  # queries of the fullest rank
    computed = slots * ranks if padded else batch  # over the whole ring each rank sees every query once
    moved = computed * attention_bytes(shape, 1, context / ranks)
    flops = computed * attention_flops(shape, 1, context) / ranks
    calls = ranks if padded else min(ranks, batch)
    attention = max(flops / rates.attention_flops, moved / rates.memory_bandwidth)
    attention += calls * rates.kernel_seconds
    if ranks == 1:
        return RingCost("pass_q", {"attention": attention, "exposed": 0.0, "return": 0.0}, 0.0, 0.0)
    query, partial = slots * shape.query_bytes_per_token, slots * shape.partial_bytes_per_token
    send = query / rates.send_bandwidth + rates.message_seconds
    others = ranks - 1
    exposed = others * max(0.0, send - attention / ranks)
    homeward = others * partial / rates.all_to_all_bandwidth + rates.all_to_all_seconds
    terms = {"attention": attention, "exposed": exposed, "return": homeward}
    return RingCost("pass_q", terms, others * send - exposed, others * (query + partial))
