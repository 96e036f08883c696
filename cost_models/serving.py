"""Seconds to the first token and between tokens of a served decoder, and bytes of a device.

One device of t tensor-, c context- and p pipeline-parallel ranks, T new tokens after P cached ones, B sequences
decoded together, L layers. Symbols as in :mod:`cost_models.llm`.

=============== ==============================================================================================
GEMMs           2 FLOP a weight and token over t c ranks; feed-forward at the FP8 peak where weights are FP8
attention       the ring of :mod:`cost_models.attention` over c ranks, a layer at a time
tensor          2 all-reduces of T h / c elements a layer: a ring inside a host, and between hosts a second
                one over the share of each device
launch          a layer's kernels, which short work does not hide
ring step       c - 1 times a layer: what a step costs beyond bytes and FLOP
cached prefix   once a layer where context ranks attend to a cache
decode          weights and the cache read once, B tokens; pass-Q: c partial attentions, c - 1 messages and an
                all-to-all, one after the other (as measured in arXiv 2411.01783, table 8)
pipeline        p - 1 messages; ranks work one after the other, so it saves memory and no time
=============== ==============================================================================================

Sources: "Context Parallelism for Scalable Million-Token Inference", arXiv 2411.01783; fits by
``benchmarks/context_parallel.py`` on its rows that are marked fit, tables 5 and 8 and its abstract.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.attention import Algorithm, AttentionShape, RingRates, attention_bytes, ring_seconds
from cost_models.attention_choice import choose, scenarios
from cost_models.compute import peak_flops
from ir.decoder import DecoderShape
from ir.serving import Exchange, ServingLayout
from ir.topology import Link, Topology

_PREFILL: tuple[Algorithm, ...] = ("pass_kv", "pass_q", "pass_q_eager", "all_gather")
_ITEM = {"bf16": 2.0, "fp8": 1.0}
_WIDE = 2.0  # bytes of bf16


@dataclass(frozen=True, slots=True)
class ServingRates:
    """What kernels and links reach, as fractions of the data sheet, and fixed seconds.

    A pair is the least and the most that was measured; the choice of exchange is made over the range.
    """

    gemm_efficiency: float = 0.4991  # fitted on the fit rows of context_parallel.json
    gemm_tile: int = 128  # rows: as cost_models.calibration.GPU
    # arXiv 2411.01783, table 5: ATTN 1608 and 414 us, causal FLOP, of 800 TFLOP/s
    attention_efficiency: tuple[float, float] = (0.6195, 0.6253)
    # table 5: SendRecv 166 us of 3.28 MB and 627 us of 16.4 MB, of 50 GB/s
    send_efficiency: tuple[float, float] = (0.395, 0.523)
    # table 5: All2All 424 us of 9.98 MB and 1023 us of 39.9 MB, of 50 GB/s
    all_to_all_efficiency: tuple[float, float] = (0.471, 0.781)
    fabric_efficiency: float = 0.755  # as cost_models.calibration.GPU
    stream_efficiency: float = 0.83  # as cost_models.calibration.GPU
    launch_seconds: float = 8.547e-5  # a layer; fitted on the fit rows of context_parallel.json
    ring_seconds: float = (
        6.337e-4  # a layer and ring step; fitted on the same and the abstract's 128K on 16 hosts
    )
    cached_seconds: float = 3.656e-3  # a layer; fitted on the fit rows of table 4
    decode_merge: float = 1.449e-5  # a layer with context ranks; fitted on the same rows
    decode_attention: float = (
        5.8e-6  # a partial attention beyond its bytes: table 8, 38.9 and 22.0 us at 128K and 64K
    )
    decode_message: float = 32.3e-6  # table 8, SendRecv, 128K and one sequence
    decode_return: float = 81.1e-6  # table 8, All2All, 128K and one sequence
    # 0 or 1 on the published machine, whose devices have cards of their own; planner calibrate measures them
    card_sharing: float = 1.0  # as cost_models.calibration.Calibration
    message_seconds: float = 0.0  # of a message between context ranks beyond its bytes
    all_to_all_seconds: float = 0.0  # of an all-to-all beyond its bytes
    kernel_seconds: float = 0.0  # of a call of the attention kernel beyond its FLOP
    masked_efficiency: float = 0.0  # of that kernel on squares under the causal mask; 0: as without
    merge_seconds: float = 0.0  # to add an element of a partial output to the sums
    source: str = (
        "fitted on arXiv 2411.01783 (Llama 3 405B, H100), rows marked fit; benchmarks/context_parallel.py"
    )


@dataclass(frozen=True)
class Server:
    """A decoder on a machine.

    Attributes:
        shape: the decoder.
        topology: whose first level is the host; context and pipeline ranks are spread over the outer ones.
        rates: what of it is reached.
    """

    shape: DecoderShape
    topology: Topology
    rates: ServingRates = ServingRates()

    def head_shape(self, layout: ServingLayout) -> AttentionShape:
        """Heads of one device; with more tensor ranks than key-value heads those are copied."""
        kv = max(1, self.shape.kv_heads // layout.tensor)
        heads = max(kv, self.shape.heads // layout.tensor)
        return AttentionShape(heads, kv, self.shape.head_dim, _ITEM[layout.cache])

    def ring_rates(self, layout: ServingLayout) -> tuple[RingRates, ...]:
        """The range of rates of attention and of the links between context ranks, most first.

        With m of c context ranks in each host, a host has one sender of m to its neighbour, and c - m of
        the c - 1 blocks of an all-to-all leave the host.
        """
        rates, between = self.rates, self._link(layout).bandwidth
        peak = peak_flops(self.topology.device, "bf16")
        m = max(1, self.topology.host_size // layout.tensor)
        spread = layout.context > m
        alone = min(rates.card_sharing, m) if spread else 1.0
        fewer = (layout.context - 1) / (layout.context - m) if spread else 1.0
        low, high = (
            RingRates(
                peak * rates.attention_efficiency[end],
                between * rates.send_efficiency[end] * alone,
                between * rates.all_to_all_efficiency[end] * fewer,
                message_seconds=rates.message_seconds,
                all_to_all_seconds=rates.all_to_all_seconds,
                kernel_seconds=rates.kernel_seconds,
                card_ranks=round(alone),
                masked_flops=peak * rates.masked_efficiency,
                merge_seconds=rates.merge_seconds,
            )
            for end in (0, 1)
        )
        return (high, *scenarios(low, high))

    def _link(self, layout: ServingLayout) -> Link:
        inside = layout.tensor * layout.context <= self.topology.host_size
        return self.topology.intra_link if inside else self.topology.inter_link

    def exchange(
        self, layout: ServingLayout, new: int, cached: int, algorithms: Sequence[Algorithm] = _PREFILL
    ) -> Exchange:
        """How context ranks attend: least worst-case regret over the range of rates."""
        if layout.context == 1:
            return "none"
        rates = self.ring_rates(layout)[1:]
        shape = self.head_shape(layout)
        return choose(shape, new, cached, layout.context, rates, algorithms=algorithms).algorithm

    def gemm_flops(self) -> tuple[float, float]:
        """FLOP a token in bf16-only matrices (attention, projection of one token left out) and feed-forward."""
        return (
            2.0 * self.shape.layers * self.shape.attention_matrices,
            2.0 * self.shape.layers * self.shape.ffn_matrices,
        )

    def prefill(self, layout: ServingLayout, new: int, cached: int, exchange: Exchange) -> dict[str, float]:
        """Seconds to the first token by purpose."""
        rates, c, layers = self.rates, layout.context, self.shape.layers
        device = self.topology.device
        wide, narrow = self.gemm_flops()
        slow = peak_flops(device, "bf16")
        fast = peak_flops(device, "fp8") if layout.weights == "fp8_row" else slow
        tokens = -(-new // c)
        share = -(-tokens // rates.gemm_tile) * rates.gemm_tile / layout.tensor
        algorithm: Algorithm = "pass_kv" if exchange == "none" else exchange
        ring = ring_seconds(algorithm, self.head_shape(layout), new, cached, c, self.ring_rates(layout)[0])
        terms = {
            "gemm": share * (wide / slow + narrow / fast) / rates.gemm_efficiency,
            "attention": layers * ring.terms["attention"],
            "context_exposed": layers * (ring.terms["exposed"] + ring.terms["return"]),
            "tensor": 2 * layers * self.all_reduce(layout.tensor, new / c * self.shape.hidden * _WIDE),
            "pipeline": self._pipeline(layout, new / c),
            "launch": layers * rates.launch_seconds,
            "ring_steps": layers * (c - 1) * rates.ring_seconds,
            "cached_prefix": layers * rates.cached_seconds if c > 1 and cached else 0.0,
        }
        return terms

    def decode(self, layout: ServingLayout, context: int, batch: int) -> dict[str, float]:
        """Seconds between tokens by purpose, with ``context`` tokens in the cache of each sequence."""
        rates, c, layers = self.rates, layout.context, self.shape.layers
        bandwidth = self.topology.device.tiers[0].read_bandwidth * rates.stream_efficiency
        slots = -(-batch // c)
        one = attention_bytes(self.head_shape(layout), 1, context / c) * slots / bandwidth
        partial = one + rates.decode_attention
        back = rates.decode_return + rates.decode_merge
        return {
            "weights": self.weight_bytes(layout) * layout.pipeline / bandwidth,
            "attention": layers * c * partial,
            "context_exposed": layers * ((c - 1) * rates.decode_message + back) if c > 1 else 0.0,
            "tensor": 2
            * layers
            * self.all_reduce(layout.tensor, slots * self.shape.hidden * _WIDE, small=True),
            "pipeline": self._pipeline(layout, slots),
            "launch": layers * rates.launch_seconds,
        }

    def all_reduce(self, ranks: int, size: float, small: bool = False) -> float:
        """Seconds of one all-reduce; ``small``: between hosts a message takes at least its latency."""
        if ranks == 1:
            return 0.0
        topology, rates = self.topology, self.rates
        inside = min(ranks, topology.host_size)
        hosts = -(-ranks // inside)
        fabric = topology.intra_link.bandwidth * rates.fabric_efficiency
        seconds = 2 * (inside - 1) / inside * size / fabric
        if hosts > 1:
            network = topology.inter_link.bandwidth * rates.send_efficiency[1]
            seconds += 2 * (hosts - 1) / hosts * size / inside / network
            seconds += (hosts - 1) * rates.decode_message if small else 0.0
        return seconds

    def _pipeline(self, layout: ServingLayout, tokens: float) -> float:
        if layout.pipeline == 1:
            return 0.0
        size = tokens * self.shape.hidden / layout.tensor * _WIDE
        network = self.topology.inter_link.bandwidth * self.rates.send_efficiency[1]
        return (layout.pipeline - 1) * (size / network + self.rates.decode_message)

    def weight_bytes(self, layout: ServingLayout) -> float:
        """Bytes of weights of a device; with FP8 the first and the last layer stay bf16."""
        shape = self.shape
        wide = shape.layers * (shape.attention_matrices + shape.layer_vectors)
        narrow = shape.layers * shape.ffn_matrices * _WIDE
        if layout.weights == "fp8_row":
            kept = min(2, shape.layers)
            # a scale of 4 bytes for each of a matrix's output rows
            rows = (2 if shape.gated else 1) * shape.ffn + shape.hidden
            narrow = (shape.layers - kept) * (
                shape.ffn_matrices + 4 * rows
            ) + kept * shape.ffn_matrices * _WIDE
        outer = shape.vocab_matrix * (1 if shape.tied else 2) + shape.outer_vectors
        return (wide * _WIDE + narrow + outer * _WIDE) / (layout.tensor * layout.pipeline)

    def cache_bytes_per_token(self, layout: ServingLayout) -> float:
        """Bytes of one token's keys and values on a device, before it is divided over context ranks."""
        layers = -(-self.shape.layers // layout.pipeline)
        return layers * self.head_shape(layout).kv_bytes_per_token

    def memory(self, layout: ServingLayout, new: int, total: int, batch: int) -> dict[str, int]:
        """Bytes of a device by purpose: weights, the cache of ``batch`` sequences, and buffers of a prompt."""
        tokens = -(-new // layout.context)
        shape = self.shape
        wide = 3 * shape.hidden + (3 * shape.ffn + 2 * shape.query_width + 2 * shape.kv_width) / layout.tensor
        blocks = 2 * self.head_shape(layout).kv_bytes_per_token * -(-total // layout.context)
        return {
            "weights": int(self.weight_bytes(layout)),
            "cache": int(self.cache_bytes_per_token(layout) * -(-total // layout.context) * batch),
            # a prompt is worked on in parts of at most 8,192 tokens a rank outside attention
            "buffers": int(min(tokens, 8192) * wide * _WIDE + tokens * shape.hidden * _WIDE)
            + int(blocks if layout.context > 1 else 0),
        }
