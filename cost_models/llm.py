"""Seconds of a decoder's training step: layers, their communication, and the data-parallel exchange.

One rank, one micro-batch of b sequences of s tokens, t tensor-parallel and c context-parallel ranks, n = b s / c
tokens a rank; hidden h, query width q, key-value width k, feed-forward width f (times 2 where gated), e bytes.

================== =========================================================================================
GEMMs              (n, h, (q+2k)/t), (n, q/t, h), (n, h, 2f/t), (n, f/t, h): once forward, twice backward;
                   weight gradients are added to fp32 sums, which bounds those of few tokens
attention          4 q/t pairs FLOP forward, 2.5 times that backward; a causal mask has s (s+1) / 2 pairs
element-wise       (10 h + 2 (q+k) + 3 f) / t elements a token forward, (12 h + 2 (q+k) + 5 f) / t backward
tensor             4 collectives (2 all-gather, 2 reduce-scatter) of n h e bytes forward, 4 backward, exposed;
                   the 2 gathers more that weight gradients need run behind GEMMs (arXiv 2205.05198)
context            all-gather of keys and values, b s 2k/t e bytes, forward and again backward, and the
                   reduce-scatter of their fp32 gradients, exposed (as Llama 3 runs it, section 3.3.2)
data               all-gather of weights of e bytes, reduce-scatter of fp32 gradients over context x data ranks;
                   hidden behind compute except the first and the last unit and what outlasts the compute. With
                   hybrid sharding over the shards of one copy, and an all-reduce of the shard over the copies
================== =========================================================================================

Sources: Llama 3 (arXiv 2407.21783, section 3.3), Megatron-LM's sequence parallelism (arXiv 2205.05198),
ZeRO (arXiv 1910.02054). Transfers of different kinds do not slow each other down in this model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cost_models.attention import BACKWARD_FACTOR as ATTENTION_BACKWARD
from cost_models.attention import GRADIENT_BYTES, causal_pairs
from cost_models.calibration import GPU, Calibration, default_calibration
from cost_models.compute import gemm_seconds, peak_flops, stream_seconds
from cost_models.llm_network import Dimensions, Ring, ring
from cost_models.pipeline import ChunkSeconds
from ir.decoder import DecoderShape
from ir.dtypes import nbytes
from ir.parallelism import Layout, Recompute
from ir.topology import Topology

# 515 of 800 TFLOP/s, the middle of 507 to 522: arXiv 2411.01783, table 5, columns ATTN
ATTENTION_EFFICIENCY = 0.644
FP32_BYTES = 4

LLM_GPU = replace(
    GPU,
    # fitted on the row of llama3.json marked "fit" (8,192 GPUs) with benchmarks/llm.py; holds what the model has no
    # term for: clocks under load, stragglers, kernels between the GEMMs
    gemm_efficiency=0.5628,
    source="gemm_efficiency fitted on Llama 3 405B on 8,192 H100; published measurements for the rest",
)


def llm_calibration(topology: Topology) -> Calibration:
    """The constants for the topology's kind of device."""
    return LLM_GPU if topology.device.kind == "gpu" else default_calibration(topology)


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """One layer (or the output projection) and one micro-batch on one rank, by term."""

    gemm: tuple[float, float, float]  # forward, for inputs, for weights
    attention: tuple[float, float] = (0.0, 0.0)  # forward, backward
    elementwise: tuple[float, float] = (0.0, 0.0)
    again: float = 0.0  # recomputing outputs of norms and of the gated product
    tensor: tuple[float, float] = (0.0, 0.0)
    context: tuple[float, float] = (0.0, 0.0)

    @property
    def forward(self) -> float:
        """Seconds of the forward pass."""
        return self.gemm[0] + self.attention[0] + self.elementwise[0] + self.tensor[0] + self.context[0]

    @property
    def backward(self) -> float:
        """Seconds of the gradients of the inputs."""
        return self.gemm[1] + self.attention[1] + self.elementwise[1] + self.tensor[1] + self.context[1]

    def extra(self, recompute: Recompute) -> float:
        """Seconds of what the backward pass computes again."""
        return {"none": 0.0, "elementwise": self.again, "full": self.forward}[recompute]

    def chunk(self, recompute: Recompute) -> ChunkSeconds:
        """The three ops of a pipeline schedule."""
        return ChunkSeconds(self.forward, self.backward + self.extra(recompute), self.gemm[2])

    def window(self, recompute: Recompute) -> ChunkSeconds:
        """The part of :meth:`chunk` in which the network is free: without tensor and context parallelism."""
        alone = replace(self, tensor=(0.0, 0.0), context=(0.0, 0.0))
        return alone.chunk(recompute)

    def terms(self, recompute: Recompute) -> dict[str, float]:
        """Seconds by what they are spent on."""
        return {
            "gemm": sum(self.gemm),
            "attention": sum(self.attention),
            "elementwise": sum(self.elementwise),
            "recompute": self.extra(recompute),
            "tensor_parallel": sum(self.tensor),
            "context_parallel": sum(self.context),
        }


@dataclass(frozen=True)
class Training:
    """What is trained, on what; prices of layers are kept, since many layouts share them.

    Attributes:
        shape: the decoder.
        sequence: tokens of a sequence.
        sequences: sequences of a step, over all replicas.
        topology, calibration: the machine and what of it is reached.
        dtype: element type of the GEMMs and of activations on the wire.
    """

    shape: DecoderShape
    sequence: int
    sequences: int
    topology: Topology
    calibration: Calibration
    dtype: str = "bf16"
    state_bytes: int = 8  # optimizer state of a parameter besides the fp32 master copy: Adam's two moments
    tensor_exposed: float = 1.0  # share of the tensor-parallel collectives that kernels do not hide
    _kept: dict[tuple[str, int, int, int], LayerSeconds] = field(
        default_factory=dict, compare=False, repr=False
    )
    _rings: dict[Dimensions, Ring] = field(default_factory=dict, compare=False, repr=False)

    @property
    def flops(self) -> float:
        """Model FLOP of a step."""
        return self.shape.training_flops_per_token(self.sequence) * self.sequence * self.sequences

    def ring(self, *dimensions: tuple[int, int]) -> Ring:
        """The communicator over mesh dimensions (size, stride)."""
        if dimensions not in self._rings:
            self._rings[dimensions] = ring(dimensions, self.topology, self.calibration)
        return self._rings[dimensions]

    def tokens(self, context: int, micro_batch: int) -> int:
        """Tokens of one micro-batch on one rank."""
        return micro_batch * self.sequence // context

    def stream(self, elements: float, item: float) -> float:
        """Seconds to move so many elements through memory, half read and half written."""
        moved = elements * item / 2
        return stream_seconds(moved, moved, self.topology.device, self.calibration)

    def gemm(self, m: float, k: float, n: float) -> float:
        """Seconds of one product."""
        return gemm_seconds(m, k, n, self.dtype, self.topology.device, self.calibration)

    def products(self, m: float, pairs: tuple[tuple[float, float], ...]) -> tuple[float, float, float]:
        """Forward, input-gradient and weight-gradient seconds of m rows through (k, n) matrices."""
        forward = sum(self.gemm(m, k, n) for k, n in pairs)
        inputs = sum(self.gemm(m, n, k) for k, n in pairs)
        weights = sum(max(self.gemm(k, m, n), self._accumulation(m, k, n)) for k, n in pairs)
        return forward, inputs, weights

    def _accumulation(self, m: float, k: float, n: float) -> float:
        """Seconds to read both factors and to add their product to an fp32 gradient in memory."""
        read = (k * m + m * n) * nbytes(self.dtype) + k * n * FP32_BYTES
        return stream_seconds(read, k * n * FP32_BYTES, self.topology.device, self.calibration)

    def layer(self, tensor: int, context: int, micro_batch: int) -> LayerSeconds:
        """One decoder layer."""
        return self._keep("layer", self._layer, tensor, context, micro_batch)

    def head(self, tensor: int, context: int, micro_batch: int) -> LayerSeconds:
        """The output projection and the loss, split over the vocabulary."""
        return self._keep("head", self._head, tensor, context, micro_batch)

    def embedding(self, tensor: int, context: int, micro_batch: int) -> LayerSeconds:
        """The vocabulary embedding: rows read and written, and one collective each way."""
        return self._keep("embedding", self._embedding, tensor, context, micro_batch)

    def _keep(
        self, what: str, price: Callable[[int, int, int], LayerSeconds], t: int, c: int, b: int
    ) -> LayerSeconds:
        key = (what, t, c, b)
        if key not in self._kept:
            self._kept[key] = price(t, c, b)
        return self._kept[key]

    def _layer(self, t: int, c: int, b: int) -> LayerSeconds:
        shape, item, n = self.shape, nbytes(self.dtype), self.tokens(c, b)
        h, q, f = shape.hidden, shape.query_width / t, shape.ffn / t
        k = kv_width(shape, t)
        up = (2 if shape.gated else 1) * f
        wide = up + f  # elements around the activation function
        pairs = b * causal_pairs(self.sequence) / c
        rate = peak_flops(self.topology.device, self.dtype) * ATTENTION_EFFICIENCY
        attention = 4 * q * pairs / rate
        collective = self.tensor_exposed * self.ring((t, 1)).gather(n * h * item)
        gathered = b * self.sequence * 2 * k
        over = self.ring((c, t))
        forth, back = over.gather(gathered * item), over.gather(gathered * GRADIENT_BYTES)
        return LayerSeconds(
            gemm=self.products(n, ((h, q + 2 * k), (q, h), (h, up), (f, h))),
            attention=(attention, ATTENTION_BACKWARD * attention),
            elementwise=(
                self.stream(n * (10 * h / t + 2 * (q + k) + wide), item),
                self.stream(n * (12 * h / t + 2 * (q + k) + wide + up), item),
            ),
            again=self.stream(n * (4 * h / t + wide), item),
            tensor=(4 * collective, 4 * collective),
            context=(forth, forth + back),
        )

    def _head(self, t: int, c: int, b: int) -> LayerSeconds:
        n, item = self.tokens(c, b), nbytes(self.dtype)
        collective = self.tensor_exposed * self.ring((t, 1)).gather(n * self.shape.hidden * item)
        logits = n * self.shape.vocab / t
        return LayerSeconds(
            gemm=self.products(n, ((self.shape.hidden, self.shape.vocab / t),)),
            # the maximum and the sum of exponentials; the gradient: each reads, and writes, the fp32 logits
            elementwise=(self.stream(2 * logits, FP32_BYTES), self.stream(2 * logits, FP32_BYTES)),
            tensor=(collective, collective),
        )

    def _embedding(self, t: int, c: int, b: int) -> LayerSeconds:
        n, item = self.tokens(c, b), nbytes(self.dtype)
        collective = self.tensor_exposed * self.ring((t, 1)).gather(n * self.shape.hidden * item)
        moved = self.stream(2 * n * self.shape.hidden / t, item)
        return LayerSeconds((0.0, 0.0, 0.0), elementwise=(moved, moved), tensor=(collective, collective))


def kv_width(shape: DecoderShape, tensor: int) -> float:
    """Key (or value) elements of a token on one rank; with more ranks than heads they are copied."""
    return max(shape.kv_width / tensor, float(shape.head_dim))


@dataclass(frozen=True, slots=True)
class DataSeconds:
    """The exchange over context x data ranks in one step."""

    exposed: float
    hidden: float


def data_seconds(
    training: Training, layout: Layout, chunk_params: float, window: ChunkSeconds
) -> DataSeconds:
    """Weights gathered and gradients scattered in one step, for the widest chunk.

    A run is what passes through a chunk before its gradients are scattered: all micro-batches (ZeRO-1),
    those that follow one another (ZeRO-2: N of them, 1 without virtual stages), or one (ZeRO-3, which also
    gathers the weights for the forward and the backward pass of each, as PyTorch's FSDP2 does).

    Args:
        training, layout: what and how.
        chunk_params: parameters of the chunk on one rank.
        window: its seconds of compute, behind which the exchange hides.
    """
    if layout.replicas == 1:
        return DataSeconds(0.0, 0.0)
    stride = layout.tensor * layout.context * layout.pipeline
    inner = layout.data // layout.replicate
    over = training.ring((layout.context, layout.tensor), (inner, stride))
    copies = training.ring((layout.replicate, stride * inner))
    item = nbytes(training.dtype)  # weights are gathered in the type they are computed in
    unit = min(chunk_params, training.shape.layer_params / layout.tensor)

    def reduced(params: float) -> float:
        size = params * FP32_BYTES
        return over.gather(size) + 2 * copies.gather(size / layout.shards)

    gather, scatter = over.gather(chunk_params * item), reduced(chunk_params)
    first, last = over.gather(unit * item), reduced(unit)
    stages, length = layout.virtual_stages, run_length(layout)
    runs = layout.micro_batches // length if layout.zero >= 2 else 1
    back = window.backward + window.weight
    again = gather if layout.zero == 3 else 0.0
    per_run = scatter + 2 * again
    exposed = first + max(0.0, gather - first - window.forward)
    exposed += (stages - 1) * max(0.0, gather - length * window.forward)
    exposed += last + max(0.0, scatter + again - last - back)
    exposed += (stages - 1) * max(0.0, scatter + again - length * back)
    exposed += (runs - 1) * stages * max(0.0, per_run - length * window.total)
    moved = stages * (gather + scatter + again + (runs - 1) * per_run)
    return DataSeconds(exposed, max(0.0, moved - exposed))


def run_length(layout: Layout) -> int:
    """Micro-batches between two scatters of a chunk's gradients, from ZeRO-2 on."""
    if layout.zero == 3:
        return 1
    if layout.schedule == "gpipe":
        return layout.micro_batches
    return layout.contiguous if layout.virtual_stages > 1 else 1
